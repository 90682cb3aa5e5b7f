"""The command `fedcore`: results on stdout, progress on stderr.

Exit status: 0 done, 1 failed, 2 bad settings, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.audit import command as audit
from fedcore.deploy import commands as deploy
from fedcore.errors import FedcoreError, SettingsError
from fedcore.escapes import printable
from fedcore.interrupts import importing
from fedcore.pretraining import command as pretraining
from fedcore.stress import command as stress
from fedcore.usage import App, call, open_streams
from fedcore.users import find_user_modules

if TYPE_CHECKING:
    from fedcore.config import Experiment

app = App("Federated learning: one method file is simulated, deployed and audited.")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a file that is written to

PRESET_HELP = "a TOML file, or the name of a method"
FRESH_HELP = "default: a new one in runs/; an old one is gone on with"

Preset = Annotated[str, typer.Argument(metavar="PRESET", help=PRESET_HELP)]
MaybePreset = Annotated[str | None, typer.Argument(metavar="PRESET", help=PRESET_HELP)]
Presets = Annotated[
    list[str],
    typer.Argument(metavar="PRESET...", help="TOML files, or names of methods"),
]
RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", help="a directory that `fedcore run` wrote"),
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
Seeds = Annotated[
    int, typer.Option(metavar="N", min=1, help="runs of each, with seeds s, s+1, ...")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="the run directory; default: a new one in runs/"),
]
SharedOut = Annotated[Path | None, typer.Option(metavar="DIR", help=FRESH_HELP)]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="go on with the run in this directory"),
]
Round = Annotated[
    int | None,
    typer.Option(
        "--round",
        metavar="N",
        min=0,
        help="with --resume: go back to the checkpoint of this round",
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="with a clock: the value, e.g. 0.9, whose simulated time is told",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]


@app.command()
def run(
    preset: MaybePreset = None,
    set_: Set = None,
    engine: Engine = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    round_: Round = None,
    json_: Json = False,
) -> None:
    """Train, and write a run directory with a report. --resume needs no PRESET."""
    with importing():
        from fedcore.rounds import loop
        from fedcore.views.terminal import Terminal, show_result

    if resume is not None and out is not None:
        raise SettingsError(
            f"--out {out} and --resume {resume}: a resumed run stays in its directory; "
            "give one of the two"
        )
    if round_ is not None and resume is None:
        raise SettingsError(
            f"--round {round_} without --resume: expected --resume DIR, the run that "
            "is to go back"
        )
    with _interruptible(), Terminal() as terminal:
        experiment = _experiment(preset, set_, engine, seed, resume)
        result = loop.run(experiment, out, resume, terminal, back_to=round_)
    # Its import takes half a second, with the plots: not before the first round.
    from fedcore.views.run_report import write_or_note

    report_file = write_or_note(result.run_dir)
    if json_:
        print(json.dumps(result.to_dict()))
    else:
        show_result(result, report_file)


@app.command()
def compare(
    presets: Presets,
    seeds: Seeds = 3,
    set_: Set = None,
    engine: Engine = None,
    out: SharedOut = None,
    target: Target = None,
    json_: Json = False,
) -> None:
    """Run several presets on the same seeds: a table and plots of all of them."""
    with importing():
        from fedcore.rounds.rundir import fresh

    experiments = []
    for preset in presets:
        experiment = _experiment(preset, set_, engine)
        experiments.append((Path(preset).stem, experiment))
    _compare(experiments, seeds, out or fresh("compare"), json_, target)


def _compare(
    experiments: Sequence[tuple[str, Experiment]],
    seeds: int,
    out: Path,
    json_: bool,
    target: float | None = None,
) -> None:
    with importing():
        from fedcore.views import compare as comparing
        from fedcore.views.terminal import Terminal

    with _interruptible(), Terminal() as terminal:
        rounds = comparing.rounds_to_do(experiments, seeds, out)
        runs = f"{len(experiments)} settings x {seeds} seeds in {out}"
        terminal.planned(len(experiments) * seeds, rounds, runs)
        try:
            comparison = comparing.compare(experiments, seeds, out, terminal, target)
        except FedcoreError:
            with suppress(OSError):
                out.rmdir()  # made for these runs, and still empty
            raise
    if json_:
        print(json.dumps(comparison.to_dict()))
    else:
        comparing.show(comparison)
    if comparison.failed:
        sys.exit(1)


@app.command()
def sensitivity(
    preset: Preset,
    seeds: Seeds = 3,
    set_: Set = None,
    engine: Engine = None,
    out: SharedOut = None,
    json_: Json = False,
) -> None:
    """Run FedSim with each kind of layer personal, to see which one pays."""
    from fedcore.rounds.rundir import fresh
    from fedcore.views import model_summary

    experiments = model_summary.sensitivity(_experiment(preset, set_, engine))
    _compare(experiments, seeds, out or fresh("sensitivity"), json_)


@app.command()
def model(preset: Preset, set_: Set = None, json_: Json = False) -> None:
    """Count the parameters of each layer, and those that stay on the client."""
    from fedcore.views import model_summary

    parts = model_summary.anatomy(_experiment(preset, set_))
    if json_:
        print(json.dumps(parts.to_dict()))
    else:
        model_summary.show(parts)


@app.command()
def methods() -> None:
    """List every method with its reference, and the presets of each."""
    import ast
    import importlib

    folder = Path(importlib.import_module("fedcore.strategies").__path__[0])
    references, presets = {}, {}
    for file in sorted(folder.glob("[!_]*.py")):
        # Read, not imported: the list comes at once.
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        references[file.stem] = docstring.partition("\n")[0]
    for file in sorted(folder.glob("*.toml")):
        if file.stem not in references:
            presets[file.stem] = file.read_text().splitlines()[1].lstrip("# ")
    width = max(map(len, references | presets))
    for name, line in references.items():
        print(printable(f"{name:<{width}}  {line}"))
    print("\nPresets of the methods above:")
    for name, line in presets.items():
        print(printable(f"{name:<{width}}  {line}"))


@app.command()
def show(preset: Preset, set_: Set = None, json_: Json = False) -> None:
    """Print the resolved settings of a preset, every default included."""
    experiment = _experiment(preset, set_)
    if json_:
        print(json.dumps(experiment.model_dump(mode="json")))
    else:
        print(printable(experiment.to_toml()), end="")


@app.command()
def report(run_dir: RunDir) -> None:
    """Write report.html of a run, finished or not, and print its path."""
    from fedcore.views.run_report import write_report

    print(printable(str(write_report(run_dir))))


audit.register(app)
stress.register(app)
pretraining.register(app)
deploy.register(app)


def _say(message: str) -> None:
    print(f"fedcore: {printable(message)}", file=sys.stderr)


@contextmanager
def _interruptible(
    message: str = (
        "interrupted; a run that has a checkpoint goes on with: "
        "fedcore run --resume DIR"
    ),
) -> Iterator[None]:
    """Ctrl-C with a message and status 130, where the round loop does not heed it.

    That is before the first round, or a second time.
    """
    try:
        yield
    except KeyboardInterrupt:
        _say(message)
        sys.exit(130)


def _experiment(
    preset: str | None,
    set_: list[str] | None,
    engine: str | None = None,
    seed: int | None = None,
    resume: Path | None = None,
) -> Experiment:
    """The settings of a preset, or of the run to resume, with overrides."""
    with importing():
        from fedcore.config import Experiment
        from fedcore.rounds.rundir import stored
        from fedcore.settings.overrides import Override

    overrides: list[str | Override] = list(set_ or [])
    if engine is not None:
        overrides.append(Override("engine.name", engine, f"--engine {engine}"))
    if seed is not None:
        overrides.append(Override("seed", seed, f"--seed {seed}"))
    if preset is not None:
        return Experiment.load(preset, overrides)
    if resume is None:
        raise SettingsError(
            "expected a PRESET, e.g. fedcore run strategies/fedavg.toml, "
            "or --resume DIR"
        )
    source = str(resume / "config.toml")
    return Experiment.parse(stored(resume), overrides, source=source)


def main() -> None:
    """Run the command that was given; a user's mistake is one message, no traceback."""
    open_streams()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    find_user_modules()
    try:
        try:
            status = call(app)
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except FedcoreError as error:
        _say(str(error))
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _say(f"the output cannot be written: {error.strerror}; make room")
        # Python would try to write it again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
