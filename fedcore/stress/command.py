"""The command `fedcore stress`.

Imports of PyTorch and of plots wait until the options are known to make sense.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.errors import FedcoreError, SettingsError
from fedcore.escapes import printable
from fedcore.interrupts import importing

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.stress.examine import Prepared
    from fedcore.stress.results import Stress

INTERRUPTED = 130  # exit status

Preset = Annotated[
    str,
    typer.Argument(metavar="PRESET", help="a TOML file, or the name of a method"),
]
Rules = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="e.g. mean,nnm+multi_krum; default: the common ones, and fltrust where "
        "the server has data (proxy)",
    ),
]
Attacks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="e.g. sign_flip:10,alie:1.5,minmax:unit; default: those that the data "
        "allow",
    ),
]
Fractions = Annotated[
    str, typer.Option(metavar="P,Q", help="malicious shares of the population")
]
Seeds = Annotated[
    int, typer.Option(metavar="N", min=1, help="runs of each, with seeds s, s+1, ...")
]
FailBelow = Annotated[
    float | None,
    typer.Option(
        metavar="PERCENT",
        min=0,
        max=100,
        help="exit with 1 if the best rule's accuracy in its worst case is lower",
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
    str | None, typer.Option(metavar="NAME", help="sequential, vectorised or ray")
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="of everything that is drawn")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="default: a new one in runs/; an old one is gone on with"
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(stress)


def stress(
    preset: Preset,
    rules: Rules = None,
    attacks: Attacks = None,
    fraction: Fractions = "0.2",
    seeds: Seeds = 1,
    fail_below: FailBelow = None,
    set_: Set = None,
    engine: Engine = None,
    seed: Seed = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Train under attack with each rule: what holds, and what does not."""
    fractions = _fractions(fraction)
    _refuse_share(fail_below)
    prepared = _prepared(
        _experiment(preset, set_, engine, seed),
        preset,
        _words("--rules", rules),
        _words("--attacks", attacks),
        fractions,
        seeds,
    )
    measure = prepared.judge.measure
    if fail_below is not None and measure != "accuracy":
        raise SettingsError(
            f"--fail-below is an accuracy in percent, and these runs are judged by "
            f"{measure}: leave it out, and read the worst case in --json"
        )
    _tell(_examined(prepared, out), json_, fail_below)


def _words(flag: str, text: str | None) -> list[str]:
    """The words between commas, each once; none where the option was not given."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise SettingsError(
            f"{flag} {text}: expected names separated by commas, without spaces"
        )
    return list(dict.fromkeys(words))


def _fractions(text: str) -> tuple[float, ...]:
    """Distinct shares between 0 and 1, in the order given."""
    shares = []
    for word in text.split(","):
        try:
            share = float(word)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise SettingsError(
                f"--fraction {text}: expected shares between 0 and 1, separated by "
                "commas, e.g. --fraction 0.1,0.2"
            )
        shares.append(share)
    return tuple(dict.fromkeys(shares))


def _refuse_share(fail_below: float | None) -> None:
    """Raises SettingsError for a share where percent are expected."""
    if fail_below is not None and 0 < fail_below <= 1:
        raise SettingsError(
            f"--fail-below {fail_below:g}: expected percent, as the table has them, "
            f"e.g. --fail-below {100 * fail_below:g}"
        )


def _experiment(
    preset: str, set_: list[str] | None, engine: str | None, seed: int | None
) -> Experiment:
    with importing():
        from fedcore.config import Experiment
        from fedcore.settings.overrides import Override

    overrides: list[str | Override] = list(set_ or [])
    if engine is not None:
        overrides.append(Override("engine.name", engine, f"--engine {engine}"))
    if seed is not None:
        overrides.append(Override("seed", seed, f"--seed {seed}"))
    return Experiment.load(preset, overrides)


def _prepared(
    experiment: Experiment,
    preset: str,
    rules: list[str],
    attacks: list[str],
    fractions: tuple[float, ...],
    seeds: int,
) -> Prepared:
    """Every cell, and what is known before the first of them is run."""
    with importing():
        from fedcore.stress.examine import default_plan, prepare
        from fedcore.stress.plan import Plan, parse_attack, parse_rule

    named_rules = tuple(map(parse_rule, rules))
    named_attacks = tuple(map(parse_attack, attacks))
    task = experiment.build_task()
    task.check()
    given = Plan(named_rules, named_attacks, fractions, seeds)
    plan, notes = default_plan(experiment, given, task)
    prepared = prepare(experiment, preset, plan, task)
    return prepared._replace(notes=[*notes, *prepared.notes])


def _examined(prepared: Prepared, out: Path | None) -> Stress:
    """The results, after all runs, or those until an interrupt."""
    from fedcore.rounds.rundir import fresh
    from fedcore.stress.examine import examine
    from fedcore.stress.terminal import StressTerminal

    experiment, folder = prepared.experiment, out
    if folder is None:
        task = experiment.task.replace(":", "-")
        folder = fresh(f"stress-{experiment.method.name}-{task}")
    try:
        with StressTerminal() as terminal:
            return examine(prepared, folder, terminal)
    except KeyboardInterrupt:
        _say(f"interrupted; the same command with --out {folder} goes on")
        sys.exit(INTERRUPTED)
    except FedcoreError:
        with suppress(OSError):
            folder.rmdir()  # made for this test, and still empty
        raise


def _tell(result: Stress, json_: bool, fail_below: float | None) -> None:
    """Write the report, print the results, and exit with the status they ask for."""
    # With its plots this takes half a second: not before the first run.
    from fedcore.stress import report

    folder = result.folder
    if result.is_interrupted and not folder.exists():
        _say("interrupted before the first run")
        sys.exit(INTERRUPTED)
    file = report.write(result, ["fedcore", *sys.argv[1:]])
    if json_:
        print(json.dumps({**result.to_dict(), "report": str(file)}))
    else:
        report.show(result, file)
    if result.is_interrupted:
        _say(
            f"interrupted: {file} holds what is done; "
            f"the same command with --out {folder} goes on"
        )
        sys.exit(INTERRUPTED)
    too_low = None
    if fail_below is not None:
        too_low = report.too_low(result, fail_below)
    if too_low is not None:
        _say(too_low)
        sys.exit(1)


def _say(message: str) -> None:
    print(f"fedcore: {printable(message)}", file=sys.stderr)
