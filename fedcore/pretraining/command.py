"""The command `fedcore pretrain`.

Imports of PyTorch wait until the options are known to make sense.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import SettingsError
from fedcore.escapes import printable
from fedcore.interrupts import importing

if TYPE_CHECKING:
    from fedcore.config import Experiment

# What `fedcore pretrain shakespeare` trains: the base of the presets of LoRA.
SHAKESPEARE = {
    "method": {"name": "fedavg"},
    "task": "shakespeare",
    "base": "bases/shakespeare",
    "text": {"base": 0.5, "least": 2000, "length": 64},
    "model": {"name": "gpt"},
}

Target = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|shakespeare",
        help="settings with a task of text, a model and text.base; shakespeare: the "
        "base of the bundled presets",
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="default: 1700, some minutes")
]
Minutes = Annotated[
    float | None,
    typer.Option(
        metavar="M",
        min=0.01,
        help="as many steps as fit into them here; base.json says how many",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="default: what the preset's `base` names, or bases/TASK"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a setting, e.g. model.width=64; repeatable",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="of everything that is drawn")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(pretrain)


def pretrain(
    target: Target,
    steps: Steps = None,
    minutes: Minutes = None,
    out: Out = None,
    set_: Set = None,
    seed: Seed = None,
    json_: Json = False,
) -> None:
    """Train a base model on text of which no client has any, and keep it."""
    if steps is not None and minutes is not None:
        raise SettingsError(
            f"--steps {steps} and --minutes {minutes:g}: give one of the two"
        )
    if minutes is not None and not math.isfinite(minutes):
        raise SettingsError(f"--minutes {minutes:g}: expected a number of minutes")
    with importing():
        from fedcore.pretraining.pretrain import STEPS, Budget
        from fedcore.pretraining.pretrain import pretrain as make
        from fedcore.pretraining.progress import Progress

    experiment = _experiment(target, set_, seed)
    folder = out or experiment.base or Path("bases") / experiment.task
    with Progress() as progress:
        budget = Budget(STEPS if steps is None else steps, minutes)
        facts = make(experiment, folder, budget, progress)
    if json_:
        print(json.dumps({"base": str(folder), **facts}))
    else:
        _show(folder, facts)


def _experiment(target: str, set_: list[str] | None, seed: int | None) -> Experiment:
    """The settings that are meant."""
    with importing():
        from fedcore.config import Experiment
        from fedcore.settings.overrides import Override

    overrides: list[str | Override] = list(set_ or [])
    if seed is not None:
        overrides.append(Override("seed", seed, f"--seed {seed}"))
    if target == "shakespeare":
        return Experiment.parse(SHAKESPEARE, overrides, source=target)
    return Experiment.load(target, overrides)


def _show(folder: Path, facts: dict[str, Any]) -> None:
    """Print what was made."""
    losses = facts["losses"]
    lines = {"base": str(folder)}
    for text in ("base", "clients"):
        before, after = (losses[when][text] for when in ("before", "after"))
        lines[f"nats a character, {text}"] = (
            f"{before['nats_a_character']:.4f} before, "
            f"{after['nats_a_character']:.4f} after"
        )
    lines["steps"] = f"{facts['steps']:,} in {facts['seconds']:.0f} s"
    lines["parameters"] = f"{facts['parameters']:,}, sha256 {facts['sha256'][:16]}"
    for name, text in lines.items():
        print(printable(f"{name:<28}{text}"))
