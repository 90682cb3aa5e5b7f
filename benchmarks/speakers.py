"""Adapters on Shakespeare's speakers: what each method reaches, and what it sends.

python -m benchmarks.speakers next
    a small GPT pretrained on the first half of the text, 50 of the other speakers as
    clients: every contender tries three step sizes on validation windows (the last
    fifth of what clients train on), and runs with the best of them on three seeds
python -m benchmarks.speakers roles
    the same small, for who speaks: ten roles over 20 clients
python -m benchmarks.speakers next --contenders fedit-8,ffa --seeds 1

Tables are Markdown on stdout, progress is on stderr. Runs in --out (default:
runs/speakers) are read, or gone on with: stop it in any way, and call it again. The
base is made by `fedcore pretrain shakespeare` where it is not there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tables import mean_and_std, print_table
from fedcore import Examples, Experiment, FederatedData, Task, run
from fedcore.tasks import TASKS

TUNING_SEED = 100  # apart from the seeds of the table
MEGABYTE = 1e6


class Contender(NamedTuple):
    """A row of the table."""

    title: str
    preset: str
    settings: dict[str, Any]
    steps: tuple[float, ...]  # step sizes that it may choose from


ADAPTERS = (1e-3, 2e-3, 5e-3)
NEXT = {
    "full": Contender(
        "full fine-tuning", "fedit", {"lora.rank": 0}, (1e-4, 2e-4, 5e-4)
    ),
    "fedit-2": Contender("FedIT, rank 2", "fedit", {"lora.rank": 2}, ADAPTERS),
    "fedit-8": Contender("FedIT, rank 8", "fedit", {}, ADAPTERS),
    "fedit-32": Contender("FedIT, rank 32", "fedit", {"lora.rank": 32}, ADAPTERS),
    "ffa": Contender("FFA-LoRA, rank 8", "ffalora", {}, ADAPTERS),
    "rolora": Contender("RoLoRA, rank 8", "rolora", {}, ADAPTERS),
    "fedsa": Contender("FedSA-LoRA, rank 8", "fedsalora", {}, ADAPTERS),
    "flora": Contender("FLoRA, rank 8", "flora", {}, ADAPTERS),
    "fedex": Contender("FedEx-LoRA, rank 8", "fedexlora", {}, ADAPTERS),
    "flexlora": Contender(
        "FlexLoRA, ranks 2, 4, 8", "flexlora", {"method.ranks": (2, 4, 8)}, ADAPTERS
    ),
    "hetlora": Contender(
        "HetLoRA, ranks 2, 4, 8", "hetlora", {"method.ranks": (2, 4, 8)}, ADAPTERS
    ),
}
ROLES_SETTINGS = {
    "text.target": "label",
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "population": 20,
    "lora.train": ["output"],
    "text.least": 0,
}
ROLES = {
    name: NEXT[name]._replace(settings={**NEXT[name].settings, **ROLES_SETTINGS})
    for name in ("fedit-8", "ffa", "rolora", "fedsa", "fedex")
}
STUDIES = {"next": NEXT, "roles": ROLES}


# Tuning


def validation_task(experiment: Experiment) -> Task:
    """The task without its test windows.

    The last windows of what clients train on take their place: a step size is chosen on
    text that the table does not judge by.
    """
    task = TASKS["shakespeare"](experiment.model_copy(update={"task": "shakespeare"}))
    data = task.data
    clients = range(data.population)
    rows = [data.rows(client, "train") for client in clients]
    counts = [len(own) for own in rows]
    inner = FederatedData(
        Examples(data.x, data.y),
        None,
        np.concatenate(rows),
        np.cumsum([0, *counts]),
        experiment.holdout,
        ordered=True,
    )
    held = np.concatenate([inner.rows(client, "test") for client in clients])
    inner.test = Examples(data.x[held], data.y[held])
    return task.with_data(inner)


def tuned_step(name: str, contender: Contender, out: Path) -> float:
    """The step size with the least loss on the validation windows."""
    losses = {}
    for step in contender.steps:
        folder = out / f"{name}-tune-{step:g}"
        settings = {
            **contender.settings,
            "method.local_lr": step,
            "seed": TUNING_SEED,
            "task": "benchmarks.speakers:validation_task",
        }
        losses[step] = judged(final(contender.preset, settings, folder), contender)
    return min(losses, key=lambda step: losses[step])


# Runs


def final(preset: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The last row, bytes and seconds of a run; read where it is done."""
    file = folder / "result.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    print(f"{folder.name}", file=sys.stderr)
    every = Experiment.load(preset).rounds  # only the last round is measured
    experiment = Experiment.load(preset, {"evaluation.every": every, **settings})
    is_begun = (folder / "checkpoint").is_dir()
    if is_begun:
        result = run(experiment, resume=folder, progress=False)
    else:
        result = run(experiment, folder, progress=False)
    seconds = sum(row["seconds"] for row in result.history)
    start = result.history[0].get("baseline", {})
    values = {
        "final": result.final,
        "start": start,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "seconds": seconds,
    }
    file.write_text(json.dumps(values))
    return values


def judged(values: dict[str, Any], contender: Contender) -> float:
    """The loss that judges a contender: clients' own models on their own text."""
    loss: float = values["final"]["client_loss"]["pooled"]
    return loss


def of_seeds(
    contender: Contender, step: float, name: str, seeds: int, out: Path
) -> list[dict[str, Any]]:
    values = []
    for seed in range(seeds):
        settings = {**contender.settings, "method.local_lr": step, "seed": seed}
        values.append(final(contender.preset, settings, out / f"{name}-{seed}"))
    return values


def row_of(contender: Contender, step: float, runs: list[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    finals = [values["final"] for values in runs]
    row = [contender.title, f"{step:g}"]
    losses = [last["client_loss"]["pooled"] for last in finals]
    row.append(mean_and_std(losses, ".4f"))
    for key, form, factor in (
        ("test_loss", ".4f", 1.0),
        ("unseen_loss", ".4f", 1.0),
        ("test_perplexity", ".3f", 1.0),
        ("test_token_accuracy", ".2f", 100.0),
        ("test_accuracy", ".1f", 100.0),
    ):
        if all(last.get(key) is not None for last in finals):
            row.append(mean_and_std([factor * last[key] for last in finals], form))
        else:
            row.append("-")
    for key in ("bytes_up", "bytes_down"):
        row.append(f"{statistics.fmean(r[key] for r in runs) / MEGABYTE:.2f}")
    row.append(f"{statistics.fmean(r['seconds'] for r in runs):.0f}")
    return row


HEAD = [
    "method",
    "step size",
    "nats, own models on own text",
    "nats, global model",
    "nats, unseen speakers",
    "perplexity",
    "token accuracy %",
    "accuracy %",
    "MB up",
    "MB down",
    "s",
]


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--contenders", help="some alone, e.g. fedit-8,ffa")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/speakers"))
    options = parser.parse_args()
    contenders = STUDIES[options.study]
    names = options.contenders.split(",") if options.contenders else list(contenders)
    out = options.out / options.study
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names:
        contender = contenders[name]
        step = tuned_step(name, contender, out)
        runs = of_seeds(contender, step, name, options.seeds, out)
        rows.append(row_of(contender, step, runs))
    print_table(HEAD, rows)


if __name__ == "__main__":
    main()
