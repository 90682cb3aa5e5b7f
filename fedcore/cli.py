"""The command `fedcore`: results on stdout, progress on stderr, exit status 0 done, 1 failed, 2 bad settings, 130 interrupted."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.audit import command as audit
from fedcore.deploy import commands as deploy
from fedcore.errors import FedcoreError, SettingsError

if TYPE_CHECKING:
    from fedcore.config import Experiment

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Federated learning that is simulated, deployed and audited with the same method file.",
)

Preset = Annotated[
    str, typer.Argument(metavar="PRESET", help="a TOML file, or the name of a method")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a setting, e.g. rounds=5; repeatable",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="the run directory; default: a new one in runs/"),
]


@app.command()
def run(
    preset: Annotated[
        str | None,
        typer.Argument(metavar="PRESET", help="a TOML file, or the name of a method"),
    ] = None,
    set_: Set = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="sequential, vectorised or ray")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="of everything that is drawn")
    ] = None,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="go on with the run in this directory"),
    ] = None,
    json_: Json = False,
) -> None:
    """Train, and write a run directory with a report. With --resume, PRESET may be left out."""
    from fedcore.rounds import loop
    from fedcore.views.terminal import Terminal, show_result

    if resume is not None and out is not None:
        raise SettingsError(
            f"--out {out} and --resume {resume}: a resumed run stays in its directory; give one of the two"
        )
    with _interruptible(), Terminal() as terminal:
        result = loop.run(
            _experiment(preset, set_, engine, seed, resume), out, resume, terminal
        )
    from fedcore.views.run_report import (
        write_or_note,  # with its plots half a second: not before the first round
    )

    report_file = write_or_note(result.run_dir)
    if json_:
        print(json.dumps(result.to_dict()))
    else:
        show_result(result, report_file)


@app.command()
def compare(
    presets: Annotated[
        list[str],
        typer.Argument(metavar="PRESET...", help="TOML files, or names of methods"),
    ],
    seeds: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="runs of each, with seeds s, s+1, ..."),
    ] = 3,
    set_: Set = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="sequential, vectorised or ray")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="default: a new one in runs/; an old one is gone on with",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Run several presets with the same settings and seeds: a table with mean and standard deviation, and a plot."""
    from fedcore.rounds.rundir import fresh

    experiments = [
        (Path(preset).stem, _experiment(preset, set_, engine, None, None))
        for preset in presets
    ]
    _compared(experiments, seeds, out or fresh("compare"), json_)


def _compared(
    experiments: Sequence[tuple[str, Experiment]], seeds: int, out: Path, json_: bool
) -> None:
    from fedcore.views import compare as comparing
    from fedcore.views.terminal import Terminal

    with _interruptible(), Terminal() as terminal:
        comparison = comparing.compare(experiments, seeds, out, terminal)
    if json_:
        print(json.dumps(comparison.to_dict()))
    else:
        comparing.show(comparison)
    if comparison.failed:
        sys.exit(1)


@app.command()
def sensitivity(
    preset: Preset,
    seeds: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="runs of each, with seeds s, s+1, ..."),
    ] = 3,
    set_: Set = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="sequential, vectorised or ray")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="default: a new one in runs/; an old one is gone on with",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Which kind of layer to personalise: FedSim with each kind personal, on the preset's task and model."""
    from fedcore.rounds.rundir import fresh
    from fedcore.views import model_summary as anatomy

    _compared(
        anatomy.sensitivity(_experiment(preset, set_, engine, None, None)),
        seeds,
        out or fresh("sensitivity"),
        json_,
    )


@app.command()
def model(preset: Preset, set_: Set = None, json_: Json = False) -> None:
    """The preset's model: parameters of every layer, dense and factored; what is sent, and what stays on the client."""
    from fedcore.views import model_summary as anatomy

    found = anatomy.anatomy(_experiment(preset, set_, None, None, None))
    if json_:
        print(json.dumps(found.to_dict()))
    else:
        anatomy.show(found)


@app.command()
def methods() -> None:
    """List every method with its reference, and the presets that are another method's settings."""
    import ast

    folder = Path(__file__).parent.parent / "strategies"
    files = sorted(f for f in folder.glob("*.py") if not f.name.startswith("_"))
    # Read, not imported: the list comes at once.
    lines = {
        f.stem: (ast.get_docstring(ast.parse(f.read_text())) or "").partition("\n")[0]
        for f in files
    }
    presets = {
        f.stem: f.read_text().splitlines()[1].lstrip("# ")
        for f in sorted(folder.glob("*.toml"))
        if f.stem not in lines
    }
    width = max(map(len, [*lines, *presets]))
    for name, line in lines.items():
        print(f"{name:<{width}}  {line}")
    print("\nPresets of the methods above:")
    for name, line in presets.items():
        print(f"{name:<{width}}  {line}")


@app.command()
def show(preset: Preset, set_: Set = None, json_: Json = False) -> None:
    """Print the resolved settings of a preset, every default included."""
    experiment = _experiment(preset, set_, None, None, None)
    print(
        json.dumps(experiment.model_dump(mode="json"))
        if json_
        else experiment.to_toml(),
        end="" if not json_ else "\n",
    )


@app.command()
def report(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR", help="a directory that `fedcore run` wrote"),
    ],
) -> None:
    """Write report.html of a run, finished or not, and print its path."""
    from fedcore.views.run_report import write_report

    print(write_report(run_dir))


audit.register(app)
deploy.register(app)


def _say(message: str) -> None:
    print(f"fedcore: {message}", file=sys.stderr)


@contextmanager
def _interruptible(
    message: str = "interrupted; a run that has a checkpoint goes on with: fedcore run --resume DIR",
) -> Iterator[None]:
    """Ctrl-C where the round loop does not heed it: before the first round, or a second time."""
    try:
        yield
    except KeyboardInterrupt:
        _say(message)
        sys.exit(130)


def _experiment(
    preset: str | None,
    set_: list[str] | None,
    engine: str | None,
    seed: int | None,
    resume: Path | None,
) -> Experiment:
    from fedcore.config import Experiment
    from fedcore.rounds.rundir import stored

    overrides = list(set_ or [])
    overrides += [f'engine.name="{engine}"'] if engine is not None else []
    overrides += [f"seed={seed}"] if seed is not None else []
    if preset is not None:
        return Experiment.load(preset, overrides)
    if resume is None:
        raise SettingsError(
            "expected a PRESET, e.g. fedcore run strategies/fedavg.toml, or --resume DIR"
        )
    return Experiment.parse(
        stored(resume), overrides, source=str(resume / "config.toml")
    )


def main() -> None:
    """Entry point: a user's mistake is one message, never a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    sys.path.insert(
        0, os.getcwd()
    )  # a user's own task or method lies where the command is given
    try:
        app()
    except FedcoreError as e:
        _say(str(e))
        sys.exit(e.exit_status)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
