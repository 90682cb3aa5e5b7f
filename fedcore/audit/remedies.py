"""Remedies as cells: runs in which a defence was switched on, each audited."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedcore.audit.cells import Cell, Observer, Prepared, prepare_captured
from fedcore.audit.plan import Plan
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds import loop
from fedcore.settings.overrides import Override, value_of
from fedcore.tasks import build_task

# Settings that a run can switch on, each to be weighed against its cost in accuracy.
PANEL = (
    "none",
    "clip=0.2",
    "clip=0.2 noise_multiplier=0.002",
    "clip=0.2 noise_multiplier=0.01",
    "top_k=0.1",
    "bits=4",
    "local.batch_size=12",
    "local.epochs=20",
    "secagg=4",
    'method.name=fedsim method.personal=["input"]',
    'method.name=fedsim method.personal=["output"]',
)


class _Defence(NamedTuple):
    text: str  # as the user wrote it
    overrides: dict[str, str]  # settings by key
    together: int  # clients of whom only the mean is seen


def defences(
    experiment: Experiment, plan: Plan, wanted: Sequence[str], out: Path
) -> list[Cell]:
    """One run of the experiment a defence, trained to its end in `out`.

    Attacked are the clients captured in its first round. A defence is settings as in
    --set, separated by spaces: "clip=1 noise_multiplier=0.01" (of the section
    `defence`), "local.epochs=5", "method.name=fedsim"; "secagg=M": only the mean of M
    clients is seen; "none"; "panel": those of PANEL. Raises SettingsError.
    """
    texts: list[str] = []
    for text in wanted:
        texts += PANEL if text == "panel" else [text]
    once = dict.fromkeys(texts)
    return [_cell(experiment, plan, _parsed(text), out) for text in once]


def _cell(experiment: Experiment, plan: Plan, defence: _Defence, out: Path) -> Cell:
    text, overrides, together = defence
    kept = {"audit.capture": str(plan.clients * together), "audit.rounds": "[1]"}
    given = []
    for key, value in (overrides | kept).items():
        written = f'--defence "{text}": {key}={value}'
        given.append(Override(key, value_of(value, written), written))
    values = experiment.model_dump(mode="json", exclude_none=True)
    changed = Experiment.parse(values, given, text)
    _check(changed)
    run_dir = out / "runs" / hashlib.sha256(text.encode()).hexdigest()[:12]

    def prepare(observer: Observer) -> Prepared:
        if (run_dir / "config.toml").exists():
            loop.run(changed, resume=run_dir, observer=observer.training())
        else:
            loop.run(changed, out=run_dir, observer=observer.training())
        return prepare_captured(changed, run_dir, plan, 1, together)

    identity = [changed.model_dump(mode="json"), together]
    return Cell(text, {"defence": text}, prepare, identity)


def _check(experiment: Experiment) -> None:
    """Raises SettingsError for a setting that would stop the run at its start.

    So that it is found before the first of several runs is trained.
    """
    task, method = build_task(experiment), experiment.build_method()
    params = task.init_params()
    method.init_server(params, task.population)
    method.init_client(params)


def _parsed(text: str) -> _Defence:
    if text == "none":
        return _Defence(text, {}, 1)
    words = re.split(r"\s+(?=[\w.]+=)", text.strip())
    overrides, together = {}, 1
    for word in words:
        key, equals, value = word.partition("=")
        is_number = value.isdigit() and int(value) > 0
        if not equals or (key == "secagg" and not is_number):
            raise SettingsError(
                f'--defence "{text}": found "{word}", expected key=value, '
                "e.g. clip=1, local.epochs=5, secagg=4, or none"
            )
        if key == "secagg":
            together = int(value)
        elif "." in key or key in Experiment.model_fields:
            overrides[key] = value
        else:
            overrides[f"defence.{key}"] = value
    return _Defence(text, overrides, together)
