"""The cost of secure sums in a deployment: a round with and without, on one machine.

Real processes over TLS, with certificates of clients. Plain and secure alternate, so
that whatever else the machine does falls on both.

python -m benchmarks.secure_deployment
    six devices, models of 160 k and 1.7 M parameters
python -m benchmarks.secure_deployment --clients 30 --rounds 10
    thirty
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.deployment import settings
from tests.flower.federation import Federation, federation

MODELS = {
    "160 k": "model.hidden=[600, 200]",
    "1.7 M": "model.hidden=[1280, 1280]",
}
SKIPPED = 3  # rounds at the start, in which processes get warm


class Cost(NamedTuple):
    """Of one round, the median; processes' own times are means over the run."""

    seconds: float
    device_cpu: float  # of one device
    server_cpu: float  # of the ServerApp and the SuperLink
    bytes_up: float  # of all devices, as the run counts them


def cpu_of(number: int) -> float:
    """CPU seconds of a process so far; 0 for one that has ended."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def cpu(f: Federation) -> tuple[float, float]:
    """(CPU seconds of one device, of the server) so far."""
    devices = [p.pid for name, p in f.processes.items() if name != "server"]
    app = f.running_serverapp()
    own = 0.0 if app is None else cpu_of(app)
    total = sum(cpu_of(number) for number in devices)
    return total / len(devices), own + cpu_of(f.facts()["superlink"])


def cost(clients: int, rounds: int, *more: str) -> Cost:
    """The cost of a round of a run with these settings."""
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), clients) as f,
    ):
        f.server("fedavg", *settings(clients, rounds, *more))
        f.all_clients()
        f.reached(SKIPPED)
        begin = cpu(f)
        f.reached(rounds - 1)
        end = cpu(f)
        f.finished()
        rows = f.rows()[SKIPPED : rounds - 1]
    counted = len(rows)
    return Cost(
        float(np.median([row["seconds"] for row in rows])),
        (end[0] - begin[0]) / counted,
        (end[1] - begin[1]) / counted,
        float(np.median([row["bytes_up"] for row in rows])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    arguments = parser.parse_args()
    for name in arguments.models:
        for _ in range(arguments.repeats):
            for kind in ("plain", "secure"):
                given = [MODELS[name]]
                if kind == "secure":
                    given.append("aggregation.secure=true")
                found = cost(arguments.clients, arguments.rounds, *given)
                row = {"model": name, "kind": kind, "clients": arguments.clients}
                row |= {key: round(x, 4) for key, x in found._asdict().items()}
                print(json.dumps(row | {"load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
