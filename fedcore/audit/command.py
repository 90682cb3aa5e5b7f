"""The command `fedcore audit`.

Imports of PyTorch and of plots wait until the options are known to make sense.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

from fedcore.errors import FedcoreError, SettingsError
from fedcore.escapes import printable
from fedcore.interrupts import importing

if TYPE_CHECKING:
    from fedcore.audit.plan import Plan
    from fedcore.audit.results import Audit
    from fedcore.config import Experiment

EPOCHS, EXAMPLES = "1,5,20", "8"  # of a sweep
IMAGES = ("thumbnails", "none")
INTERRUPTED = 130  # exit status

Target = Annotated[
    str,
    typer.Argument(
        metavar="PRESET|RUN_DIR",
        help="settings to audit, or a run that kept updates (audit.capture)",
    ),
]
AttackNames = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="default: sme,ig,analytic,labels,membership"),
]
Defences = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SETTINGS",
        help='e.g. "clip=1 noise_multiplier=0.01", none, or panel for a range; '
        "repeatable",
    ),
]
Epochs = Annotated[
    str | None,
    typer.Option(metavar="E,F", help=f"of the sweep; default: {EPOCHS}"),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(metavar="B,C", help="of the sweep; default: the preset's"),
]
Examples = Annotated[
    str | None,
    typer.Option(
        metavar="N,M", help=f"of each client of the sweep; default: {EXAMPLES}"
    ),
]
BudgetName = Annotated[
    str, typer.Option(metavar="NAME", help="quick, standard, thorough or paper")
]
LabelsName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="recovered, oracle (the attacks are told) or soft (optimised)",
    ),
]
Clients = Annotated[int, typer.Option(metavar="N", min=1, help="attacked in each cell")]
AttackOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ATTACK.KEY=VALUE", help="e.g. sme.iterations=500; repeatable"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a setting, e.g. rounds=5; repeatable",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="of the runs that defences are switched on in"),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="of everything that is drawn")
]
Flip = Annotated[
    bool,
    typer.Option(
        "--flip", help="what clients sent is global minus local; never guessed"
    ),
]
NoTruth = Annotated[
    bool,
    typer.Option(
        "--no-truth", help="do not compare with the clients' data: nothing is scored"
    ),
]
Images = Annotated[
    str, typer.Option(metavar="NAME", help="in the report: thumbnails or none")
]
FailAbove = Annotated[
    float | None,
    typer.Option(
        metavar="SCORE",
        min=0,
        max=100,
        help="exit with 1 if a client's input leakage is higher",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="default: RUN_DIR/audit, or a new one in runs/; "
        "an old one is gone on with",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(audit)


def audit(
    target: Target,
    attack: AttackNames = None,
    defence: Defences = None,
    epochs: Epochs = None,
    batch_size: BatchSizes = None,
    examples: Examples = None,
    budget: BudgetName = "quick",
    labels: LabelsName = "recovered",
    clients: Clients = 4,
    option: AttackOptions = None,
    set_: Set = None,
    engine: Engine = None,
    seed: Seed = None,
    flip: Flip = False,
    no_truth: NoTruth = False,
    images: Images = "thumbnails",
    fail_above: FailAbove = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Attack what clients send, and report what it gives away of their data."""
    _check_choice("--images", images, IMAGES)
    sweep = {"--epochs": epochs, "--batch-size": batch_size, "--examples": examples}
    for flag, text in sweep.items():
        _numbers(flag, text or "1")
    run_dir = _run_dir(target)
    training = {"--defence": defence, "--set": set_, "--engine": engine}
    _refuse_changes(run_dir, sweep, training)
    _refuse_truth(no_truth, labels, fail_above)
    experiment = _experiment(target, run_dir, set_, engine, seed)
    values: dict[str, Any] = {
        "options": _attack_options(option or []),
        "budget": budget,
        "labels": labels,
        "truth": not no_truth,
        "flip": flip,
        "images": images != "none",
        "clients": clients,
        "seed": experiment.seed if seed is None else seed,
    }
    if attack is not None:
        values["attacks"] = tuple(attack.split(","))
    plan = _plan(values)
    request = Request(experiment, plan, run_dir, defence or [], sweep)
    result, folder = _examined(request, out)
    _tell(result, folder, json_, fail_above)


class Request(NamedTuple):
    """The audit that the user asks for."""

    experiment: Experiment
    plan: Plan
    run_dir: Path | None  # a run that kept updates
    defences: Sequence[str]
    sweep: Mapping[str, str | None]  # numbers by option


def _run_dir(target: str) -> Path | None:
    """The run directory that is meant; None where it is a preset.

    A folder that has the name of a method, and holds no run, is not meant.
    """
    from fedcore.settings.presets import is_preset

    if not os.path.isdir(target):
        return None
    folder = Path(target)
    if is_preset(target) and not (folder / "config.toml").is_file():
        return None
    return folder


def _refuse_changes(
    run_dir: Path | None, sweep: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """Raises SettingsError for options that contradict each other."""
    if run_dir is not None:
        _refuse(
            {**sweep, **training},
            f"{run_dir} is a run, whose updates are audited as they were sent: "
            "give a PRESET to change settings",
        )
    elif training["--defence"]:
        _refuse(
            sweep,
            "with --defence clients are those of a run: set local.epochs and "
            "local.batch_size with --set or --defence",
        )


def _refuse(options: Mapping[str, Any], why: str) -> None:
    given = [option for option, value in options.items() if value]
    if given:
        raise SettingsError(f"{' and '.join(given)}: {why}")


def _refuse_truth(no_truth: bool, labels: str, fail_above: float | None) -> None:
    """Raises SettingsError for options that need what --no-truth withholds."""
    if no_truth and labels == "oracle":
        raise SettingsError(
            "--labels oracle tells the attacks the true labels, which --no-truth "
            "withholds: give one of the two"
        )
    if no_truth and fail_above is not None:
        raise SettingsError(
            "--fail-above needs scores, and with --no-truth nothing is scored: "
            "give one of the two"
        )


def _experiment(
    target: str,
    run_dir: Path | None,
    set_: list[str] | None,
    engine: str | None,
    seed: int | None,
) -> Experiment:
    with importing():
        from fedcore.config import Experiment
        from fedcore.rounds.rundir import stored
        from fedcore.settings.overrides import Override
        from fedcore.settings.presets import is_preset, missing

    if run_dir is None and not is_preset(target):
        raise SettingsError(
            f"{target}: expected a PRESET or a RUN_DIR; there is no such directory, "
            f"and {missing(target)}"
        )
    if run_dir is not None:
        source = f"{run_dir}/config.toml"
        return Experiment.parse(stored(run_dir), source=source)
    overrides: list[str | Override] = list(set_ or [])
    if engine is not None:
        overrides.append(Override("engine.name", engine, f"--engine {engine}"))
    if seed is not None:
        overrides.append(Override("seed", seed, f"--seed {seed}"))
    return Experiment.load(target, overrides)


def _plan(values: Mapping[str, Any]) -> Plan:
    from fedcore.audit.plan import BUDGETS, Labels, Plan

    _check_choice("--budget", values["budget"], BUDGETS)
    _check_choice("--labels", values["labels"], get_args(Labels))
    plan = Plan(**values)
    plan.check()
    return plan


def _examined(request: Request, out: Path | None) -> tuple[Audit, Path]:
    """The audit, and the directory that it is in."""
    from fedcore.rounds.rundir import fresh
    from fedcore.views.terminal import AuditTerminal

    experiment = request.experiment
    folder = out
    if folder is None and request.run_dir is not None:
        folder = request.run_dir / "audit"
    elif folder is None:
        task = experiment.task.replace(":", "-")
        folder = fresh(f"audit-{experiment.method.name}-{task}")
    try:
        with _only_for_the_owner(), AuditTerminal() as terminal:
            return _run(request, folder, terminal), folder
    except KeyboardInterrupt:
        _say(
            "interrupted, and no report written; cells that are done are kept: "
            "the same command with --out DIR goes on"
        )
        sys.exit(INTERRUPTED)
    except FedcoreError:
        with suppress(OSError):
            folder.rmdir()  # made for this audit, and still empty
        raise


def _run(request: Request, folder: Path, terminal: Any) -> Audit:
    from fedcore.audit.cells import rounds_of, sweep
    from fedcore.audit.examine import examine
    from fedcore.audit.remedies import defences

    experiment, plan = request.experiment, request.plan
    if request.run_dir is not None:
        _, cells = rounds_of(request.run_dir, plan)
        return examine("captured", experiment, cells, plan, folder, terminal)
    if request.defences:
        cells = defences(experiment, plan, request.defences, folder)
        rounds = len(cells) * experiment.rounds
        _say(f"{len(cells)} runs to train and audit, {rounds:,} rounds in all")
        return examine("defences", experiment, cells, plan, folder, terminal)
    default = {
        "--epochs": EPOCHS,
        "--batch-size": str(experiment.local.batch_size),
        "--examples": EXAMPLES,
    }
    numbers = []
    for flag, text in request.sweep.items():
        numbers.append(_numbers(flag, text or default[flag]))
    cells = sweep(experiment, plan, *numbers)
    return examine("sweep", experiment, cells, plan, folder, terminal)


def _tell(result: Audit, folder: Path, json_: bool, fail_above: float | None) -> None:
    """Write the report, print the results, and exit with the status they ask for."""
    # With its plots this takes half a second: not before the first cell.
    from fedcore.audit import report

    with _only_for_the_owner():
        file = report.write(result, folder, ["fedcore", *sys.argv[1:]])
    if json_:
        print(json.dumps({**report.ready(result), "report": str(file)}))
    else:
        report.show(result, file)
    if result.interrupted:
        _say(
            f"interrupted: {file} holds what is done; "
            f"the same command with --out {folder} goes on"
        )
        sys.exit(INTERRUPTED)
    too_high = None
    if fail_above is not None:
        too_high = report.too_high(result, fail_above)
    if too_high is not None:
        _say(too_high)
    if too_high is not None or result.failed:
        sys.exit(1)


def _check_choice(flag: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise SettingsError(f"{flag} {value}: expected one of {', '.join(choices)}")


def _numbers(flag: str, text: str) -> list[int]:
    """Distinct numbers from 1 on, in the order given."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise SettingsError(
            f"{flag} {text}: expected numbers from 1 on, separated by commas, "
            f"e.g. {flag} 1,5,20"
        )
    return list(dict.fromkeys(map(int, words)))


def _attack_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`sme.iterations=500` as {"sme": {"iterations": 500}}.

    The attack checks whether it knows them.
    """
    from fedcore.settings.overrides import value_of

    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        attack, dot, name = key.strip().partition(".")
        if not (equals and dot and attack and name):
            raise SettingsError(
                f'--option "{text}": expected ATTACK.KEY=VALUE, '
                "e.g. --option sme.iterations=500"
            )
        options.setdefault(attack, {})[name] = value_of(
            value.strip(), f"--option {key}"
        )
    return options


@contextmanager
def _only_for_the_owner() -> Iterator[None]:
    """Files and directories made here are for their owner alone to read.

    They hold what was rebuilt of clients' data.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _say(message: str) -> None:
    print(f"fedcore: {printable(message)}", file=sys.stderr)
