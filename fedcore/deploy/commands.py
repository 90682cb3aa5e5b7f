"""The commands of a deployment.

The packages `server` and `client` are imported by name, when a command needs them.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.errors import SettingsError
from fedcore.escapes import escaped, printable

__all__ = ["register"]

Preset = Annotated[
    str,
    typer.Argument(metavar="PRESET", help="a TOML file, or the name of a method"),
]
RunDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="the run directory of a fedcore server on this machine",
    ),
]
StateDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="the --state directory of a client")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]
Certs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="from fedcore certs: DIR/server, or DIR/client-N of this device",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="no TLS and no authentication: on a network where everybody is trusted",
    ),
]
Hosts = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        help="name or address by which clients reach the server; repeatable",
    ),
]
Nodes = Annotated[
    int, typer.Option(metavar="N", min=1, help="clients, one key pair each")
]
CertsOut = Annotated[
    Path,
    typer.Option(metavar="DIR", help="files that are there stay, others are made"),
]
Listen = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="where clients connect to")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="default: a new one in runs/; an old one is gone on with"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a setting; repeatable"),
]
DeviceSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="options.*, model.path and engine.device of this device; repeatable",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="of everything that is drawn")
]
ClientId = Annotated[
    int,
    typer.Option(
        "--id",
        metavar="N",
        min=0,
        help="number of this client in the population, from 0",
    ),
]
Server = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="where the server listens")
]
MaybeServer = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="the server, as clients name it"),
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="the client's own states; default: ./client-N-state"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="this device's own data, the task's data_folder"),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="this device's copy of the server's base; default: where the server has "
        "it",
    ),
]
Poll = Annotated[
    float,
    typer.Option(
        metavar="S",
        min=0.01,
        help="longest pause between two looks for work, in seconds",
    ),
]
SumsAlone = Annotated[
    bool,
    typer.Option(
        "--secure",
        help="take part in secure sums alone, whatever the server's settings say",
    ),
]
Forget = Annotated[
    list[str] | None,
    typer.Option(metavar="RUN", help="delete the states of this run; repeatable"),
]
OlderThan = Annotated[
    float | None,
    typer.Option(metavar="DAYS", min=0, help="delete states not used for so many days"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (certs, server, client, doctor, status, states):
        app.command()(command)


def certs(host: Hosts, nodes: Nodes, out: CertsOut = Path("certs")) -> None:
    """Make an authority, the server's certificate and key pairs; print new files."""
    from fedcore.deploy import certs as making

    for file in making.make(out, host, nodes):
        print(escaped(str(file)))


def server(
    preset: Preset,
    certs: Certs = None,
    insecure: Insecure = False,
    listen: Listen = "0.0.0.0:9092",
    out: Out = None,
    set_: Set = None,
    seed: Seed = None,
    json_: Json = False,
) -> None:
    """Train with clients on other machines, which join with fedcore client.

    There is one for each client of the population.
    """
    from fedcore.config import Experiment
    from fedcore.rounds.loop import Result
    from fedcore.settings.overrides import Override
    from fedcore.views.terminal import show_result

    # A checkpoint every round, so that clients need not keep more states.
    overrides: list[str | Override] = ["checkpoint.seconds=0"]
    if seed is not None:
        overrides.append(Override("seed", seed, f"--seed {seed}"))
    overrides += [*(set_ or []), 'engine.name="grid"']
    experiment = Experiment.load(preset, overrides)
    _quieten()
    serve = importlib.import_module("fedcore.server.serve").serve
    result = serve(experiment, listen, _keys(certs, insecure), out)
    if json_:
        print(json.dumps(result))
    else:
        report = Path(result["run_dir"]) / "report.html"
        show_result(Result(**result, params={}), report if report.exists() else None)


def client(
    id_: ClientId,
    server: Server,
    certs: Certs = None,
    insecure: Insecure = False,
    state: State = None,
    data: Data = None,
    base: Base = None,
    set_: DeviceSet = None,
    poll: Poll = 0.2,
    secure: SumsAlone = False,
) -> None:
    """Take part in a federation, until stopped."""
    keys = _keys(certs, insecure)
    _quieten()
    serve = importlib.import_module("fedcore.client.supernode").serve
    serve(server, id_, keys, state, data, set_ or [], poll, base, secure)


def doctor(
    certs: Certs = None, server: MaybeServer = None, json_: Json = False
) -> None:
    """Check versions, certificates, keys, names, ports and clocks; say what to fix.

    Exit status 1 when something is wrong.
    """
    _quieten()
    examine = importlib.import_module("fedcore.client.doctor").examine
    checks: list[tuple[str, str | None]] = examine(certs, server)
    faults = [fault for _, fault in checks if fault]
    if json_:
        listed = [{"check": check, "fault": fault} for check, fault in checks]
        print(json.dumps({"ok": not faults, "checks": listed}))
    else:
        for check, fault in checks:
            line = f"FIX {check}: {fault}" if fault else f"ok  {check}"
            print(escaped(line))
    raise typer.Exit(1 if faults else 0)


def status(run_dir: RunDir, json_: Json = False) -> None:
    """Print the nodes, when each was last heard of, and whom the round waits for."""
    _quieten()
    module = importlib.import_module("fedcore.server.status")
    nodes: dict[str, Any] = module.status(run_dir)
    print(json.dumps(nodes) if json_ else printable(module.text(nodes)))


def states(
    state: StateDir,
    forget: Forget = None,
    older_than: OlderThan = None,
    json_: Json = False,
) -> None:
    """List the states that a client keeps, by run, and delete those not needed."""
    module = importlib.import_module("fedcore.client.states")
    kept = module.tidy(state, forget or [], older_than)
    print(json.dumps(kept) if json_ else printable(module.text(kept)))


def _keys(certs: Path | None, insecure: bool) -> Path | None:
    """The directory of keys; None for a connection without TLS.

    Raises SettingsError unless exactly one of the two was asked for.
    """
    if insecure == (certs is not None):
        raise SettingsError(
            "expected --certs DIR, as fedcore certs makes it; "
            "or --insecure, for no TLS and no authentication"
        )
    return certs


def _quieten() -> None:
    """Stop Flower from reporting its use and from printing more than warnings."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
    logging.getLogger("fedcore").setLevel(logging.WARNING)
