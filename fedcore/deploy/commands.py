"""The commands of a deployment. The server's and the client's packages are imported by name, when a command needs them."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.errors import SettingsError

Json = Annotated[
    bool,
    typer.Option("--json", help="print one JSON object and nothing else on stdout"),
]
Certs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="what fedcore certs made: DIR/server, or DIR/client-N of this device",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="no TLS and no authentication: on a network where everybody is trusted",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a setting; repeatable"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (certs, server, client, doctor, status, states):
        app.command()(command)


def certs(
    host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="name or address by which clients reach the server; repeatable",
        ),
    ],
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, help="clients, one key pair each")
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="what is there stays, what is missing is made"
        ),
    ] = Path("certs"),
) -> None:
    """Make an authority, the server's certificate and a key pair for each client. Print what is new."""
    from fedcore.deploy import certs as making

    for file in making.make(out, host, nodes):
        print(file)


def server(
    preset: Annotated[
        str,
        typer.Argument(metavar="PRESET", help="a TOML file, or the name of a method"),
    ],
    certs: Certs = None,
    insecure: Insecure = False,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="where clients connect to")
    ] = "0.0.0.0:9092",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="default: a new one in runs/; an old one is gone on with",
        ),
    ] = None,
    set_: Set = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="of everything that is drawn")
    ] = None,
    json_: Json = False,
) -> None:
    """Train with clients on other machines, one for each client of the population; they join with fedcore client."""
    from fedcore.config import Experiment
    from fedcore.rounds.loop import Result
    from fedcore.views.terminal import show_result

    given = {
        "checkpoint.seconds": 0,
        **({} if seed is None else {"seed": seed}),
    }  # every round: clients need not keep more states
    overrides = [
        *(f"{key}={value}" for key, value in given.items()),
        *(set_ or []),
        'engine.name="grid"',
    ]
    e = Experiment.load(preset, overrides)
    _quiet()
    result = importlib.import_module("server.serve").serve(
        e, listen, _secured(certs, insecure), out
    )
    if json_:
        print(json.dumps(result))
    else:
        report = Path(result["run_dir"]) / "report.html"
        show_result(Result(**result, params={}), report if report.exists() else None)


def client(
    id_: Annotated[
        int,
        typer.Option(
            "--id",
            metavar="N",
            min=0,
            help="which client of the population this is, from 0",
        ),
    ],
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="where the server listens")
    ],
    certs: Certs = None,
    insecure: Insecure = False,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="what the client keeps; default: ./client-N-state"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="this device's own data, the task's data_folder"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="options.* and engine.device of this device; repeatable",
        ),
    ] = None,
    poll: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.01,
            help="longest pause between two looks for work, in seconds",
        ),
    ] = 0.2,
) -> None:
    """Take part in a federation, until stopped."""
    folder = _secured(certs, insecure)
    _quiet()
    importlib.import_module("client.supernode").serve(
        server, id_, folder, state, data, set_ or [], poll
    )


def doctor(
    certs: Certs = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="the server, as clients name it"),
    ] = None,
    json_: Json = False,
) -> None:
    """Check versions, certificates, keys, names, ports and clocks, and say what to fix. Exit status 1 when something is wrong."""
    _quiet()
    checks: list[tuple[str, str | None]] = importlib.import_module(
        "client.doctor"
    ).examine(certs, server)
    faults = [fault for _, fault in checks if fault]
    if json_:
        print(
            json.dumps(
                {
                    "ok": not faults,
                    "checks": [
                        {"check": what, "fault": fault} for what, fault in checks
                    ],
                }
            )
        )
    else:
        for what, fault in checks:
            print(f"{'FIX ' if fault else 'ok  '}{what}{': ' + fault if fault else ''}")
    raise typer.Exit(1 if faults else 0)


def status(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR",
            help="the run directory of a fedcore server on this machine",
        ),
    ],
    json_: Json = False,
) -> None:
    """Nodes, when each was last heard of, the round, and who it waits for."""
    _quiet()
    facts: dict[str, Any] = importlib.import_module("server.status").status(run_dir)
    print(
        json.dumps(facts)
        if json_
        else importlib.import_module("server.status").text(facts)
    )


def states(
    state: Annotated[
        Path, typer.Argument(metavar="DIR", help="the --state directory of a client")
    ],
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="delete what is kept of this run; repeatable"),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", min=0, help="delete what was not used for so many days"
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """List what a client keeps, by run, and delete what is not needed any more."""
    found = importlib.import_module("client.states").tidy(
        state, forget or [], older_than
    )
    print(
        json.dumps(found)
        if json_
        else importlib.import_module("client.states").text(found)
    )


def _secured(certs: Path | None, insecure: bool) -> Path | None:
    """The directory of keys, None for a connection without TLS. Raises SettingsError unless exactly one was asked for."""
    if insecure == (certs is not None):
        raise SettingsError(
            "expected --certs DIR, as fedcore certs makes it; or --insecure, for no TLS and no authentication"
        )
    return certs


def _quiet() -> None:
    """Flower tells nobody about its use, and says nothing that is not ours to say."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
    logging.getLogger("fedcore").setLevel(logging.WARNING)
