"""The outcome of a run."""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedcore.errors import FedcoreError
from fedcore.rounds.history import History
from fedcore.rounds.slow_clients import (
    Speeds,
    heard_clients,
    last_evaluation,
    slowest,
)
from fedcore.rounds.time_summary import clock_kind, time_summary
from fedcore.types import Params

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.task import Task

WHOLE = ("measures", "extra_tests", "sample")
LAST = ("test_", "client_", "finetuned_", "nmsd_", "privacy", "canaries")


@dataclass
class Result:
    """The outcome of a run; `fedcore run --json` prints it."""

    method: str
    engine: str
    seed: int
    rounds: int
    population: int
    cohort: float  # mean clients asked a round
    final: dict[str, Any]
    history: list[dict[str, Any]]
    clients_trained: int
    clients_per_second: float  # `History.clients_per_second`
    first_round_s: float
    bytes_down: int
    bytes_up: int
    dropped: dict[str, int]
    late_answers: int
    params_sha256: str
    run_dir: str
    # By the run's `clock_kind` of clock: `time_summary`, the slowest fifth and tenth.
    time: dict[str, Any]  # empty without a clock
    params: Params = field(repr=False)

    @property
    def measures(self) -> dict[str, bool]:
        """Whether higher is better, by measure; that which judges the run first."""
        return History(self.history).measures

    def _repr_html_(self) -> str:
        """The result as a notebook shows it."""
        lines = {"method": f"{self.method}, {self.engine} engine, seed {self.seed}"}
        for measure in self.measures:
            value = self.final.get(f"test_{measure}")
            if value is not None:
                lines[f"test {measure}"] = f"{value:.4f}"
        lines["rounds"] = (
            f"{self.rounds}, {self.cohort:.4g} of {self.population} clients"
        )
        if self.time:
            lines[f"{self.time['clock']} time"] = f"{self.time['time_s']:,.6g} s"
        lines["speed"] = f"{self.clients_per_second:,.0f} clients/s"
        lines["parameters"] = f"sha256 {self.params_sha256[:16]}"
        report = Path(self.run_dir) / "report.html"
        lines["report"] = str(report) if report.exists() else f"none in {self.run_dir}"
        rows = []
        for name, text in lines.items():
            cell = html.escape(text)
            if name == "report" and report.exists():
                cell = f'<a href="{html.escape(str(report))}">{cell}</a>'
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{cell}</td></tr>")
        return f"<table>{''.join(rows)}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parameters, ready for JSON."""
        names = [f.name for f in fields(self) if f.name != "params"]
        return {name: getattr(self, name) for name in names}


def params_sha256(params: Params) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def final_measures(history: History, evaluated_on: str) -> dict[str, Any]:
    """The last evaluation: test sets, clients, fine-tuning, privacy."""
    final: dict[str, Any] = {
        "test_loss": None,
        "test_accuracy": None,
        "client_accuracy": None,
    }
    evaluated = history.evaluated
    extra = [f"{name}_" for name in evaluated.get("extra_tests", ())]
    for key, value in evaluated.items():
        if key in WHOLE or key.startswith((*LAST, *extra)):
            final[key] = value
    final["clients_evaluated_on"] = evaluated_on
    return final


def time_of(folder: Path, history: History, speeds: Speeds | None) -> dict[str, Any]:
    """The time of a run by its own clock, and who was heard in it, ready for JSON."""
    import pyarrow as pa

    summary, rounds = time_summary(history), len(history)
    if not summary:
        return {}
    try:
        heard = heard_clients(folder, speeds, rounds)
        evaluated = last_evaluation(folder, rounds)
    except (OSError, KeyError, FedcoreError, pa.ArrowException):
        return summary  # the run is done, and its report says what is missing
    if heard is not None:
        summary |= slowest(heard, evaluated, history.measure)
    return summary


def outcome(
    experiment: Experiment, task: Task, history: History, params: Params, folder: Path
) -> Result:
    """The outcome of a run in `folder` up to the last round in `history`."""
    spent = time_of(folder, history, Speeds.of(experiment, task.population))
    if spent:
        settings = experiment.model_dump(include={"engine", "schedule"})
        spent["clock"] = clock_kind(settings)
    return Result(
        method=experiment.method.name,
        engine=experiment.engine.name,
        seed=experiment.seed,
        rounds=len(history),
        population=task.population,
        cohort=history.total("cohort") / max(len(history), 1),
        final=final_measures(history, task.data.evaluated_on),
        history=history.rows,
        clients_trained=int(history.total("reports")),
        clients_per_second=round(history.clients_per_second, 2),
        first_round_s=history.rows[0]["first_round_s"],
        bytes_down=int(history.total("bytes_down")),
        bytes_up=int(history.total("bytes_up")),
        dropped=dict(history.dropped()),
        late_answers=int(history.total("late_answers")),
        params_sha256=params_sha256(params),
        run_dir=str(folder),
        time=spent,
        params=params,
    )
