"""What a deployment costs, and what it survives: real processes over TLS with node authentication on one machine.

python -m benchmarks.deployment                      overhead of a round, warm clients against stock SuperNodes
python -m benchmarks.deployment faults --number 50   random faults in a row; the seed is printed, and --seed takes it
python -m benchmarks.deployment memory               50 warm clients for 100 rounds: memory against rounds
python -m benchmarks.deployment memory --clients 6 --rounds 100000 --minutes 15 --set "model.hidden=[8]"     light rounds, for long
python -m benchmarks.deployment large                a model of 44 MB, and one of 1 GB
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.federation import Federation, federation, free_port

# 64-600-200-10: 161 210 parameters
MLP = ["model.hidden=[600, 200]", "partition.name=iid", "participation.name=uniform"]


def settings(clients: int, rounds: int, *more: str) -> list[str]:
    sizes = [
        f"population={clients}",
        f"participation.cohort={clients}",
        f"engine.min_clients={clients}",
        f"rounds={rounds}",
    ]
    return [
        *MLP,
        *sizes,
        "evaluation.every=1000",
        "evaluation.clients=0",
        "local.steps=1",
        *more,
    ]


def stock(f: Federation, i: int) -> None:
    tls = ["--root-certificates", str(f.certs / f"client-{i}" / "ca.crt")]
    key = ["--auth-supernode-private-key", str(f.certs / f"client-{i}" / "client.key")]
    program, bin_ = "flower-supernode", Path(sys.executable).parent
    f.start(
        f"stock-{i}",
        [
            str(bin_ / program),
            "--superlink",
            f.address,
            *tls,
            *key,
            "--port",
            str(free_port()),
            "--node-config",
            f"partition-id={i}",
        ],
        FLWR_HOME=str(f.folder / f"home-{i}"),
        PATH=f"{bin_}{os.pathsep}{os.environ['PATH']}",
    )


def overhead() -> None:
    """Seconds of a round beyond those of the training itself, which `sequential` measures: four clients, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        e = Experiment.load("fedavg", [*settings(4, 12), "engine.name=sequential"])
        training = float(
            np.median(
                [row["seconds"] for row in run(e, Path(folder) / "s").history[1:]]
            )
        )
    print(f"the training itself: {training:.3f} s a round")
    for kind, rounds in (("warm clients", 30), ("stock SuperNodes", 3)):
        with tempfile.TemporaryDirectory() as folder, federation(Path(folder), 4) as f:
            f.server("fedavg", *settings(4, rounds))
            for i in range(4):
                if kind == "warm clients":
                    f.client(i)
                else:
                    stock(f, i)
            f.finished(300)
            seconds = [row["seconds"] for row in f.rows()][1:]
        beyond = np.array(seconds) - training
        load = os.getloadavg()[0]
        print(
            f"{kind}: {np.median(seconds):.3f} s a round, {np.median(beyond):.3f} s beyond the training "
            f"({beyond.min():.3f} to {beyond.max():.3f}, {len(seconds)} rounds, load {load:.1f})",
            flush=True,
        )


KINDS = (
    "ServerApp",
    "SuperLink",
    "server",
    "everything",
    "client",
    "client",
    "network",
    "network",
)


def faults(number: int, seed: int, clients: int = 4) -> bool:
    """Kill and cut at random; every round and report has to be there in the end, and all parameters as if nothing had been.

    For that a round waits for a client that went away in it (`engine.rejoin_timeout`), and none is left out (no `round_timeout`).
    """
    draw = random.Random(seed)
    print(f"seed {seed}, {number} faults", flush=True)
    rounds = 4 * number + 10
    given = settings(clients, rounds, "engine.rejoin_timeout=300")
    done: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), clients) as f,
    ):
        expected = run(
            Experiment.load("scaffold", [*given, "engine.name=sequential"]),
            Path(folder) / "sequential",
        )
        f.server("scaffold", *given)
        for i in range(clients):
            f.proxy(i)
        f.all_clients()
        f.reached(1, 120)
        for _ in range(number):
            before, began = len(f.rows()), time.monotonic()
            assert before < rounds, (
                "the run ended before the last fault: more rounds are needed"
            )
            time.sleep(draw.random())
            done.append(fault(draw, f, lambda: f.server("scaffold", *given)))
            f.reached(len(f.rows()) + 1, 240)
            print(
                f"{len(done)}: {done[-1]}, after round {before}, healed after {time.monotonic() - began:.1f} s",
                flush=True,
            )
        result = f.finished(600)
        rows, reasons = f.rows(), f.log("server")
    assert [row["round"] for row in rows] == list(range(1, rounds + 1)), (
        "a round is missing"
    )
    lost = sum(sum(row["dropped"].values()) for row in rows)
    same = result["params_sha256"] == expected.params_sha256
    counted = ", ".join(
        f"{kind} {n}" for kind, n in Counter(kind.split()[0] for kind in done).items()
    )
    print(
        f"{number} faults ({counted}), {len(rows)} rounds, {lost} reports lost, the same bits as never interrupted: {same}"
    )
    if not same or lost:
        print(reasons)
    return same and not lost


def fault(draw: random.Random, f: Federation, start_server: Callable[[], Any]) -> str:
    """Make one; what it was."""
    kind = draw.choice(KINDS)
    i = draw.randrange(f.clients)
    if kind == "ServerApp" and (process := f.serverapp()):
        os.kill(process, signal.SIGKILL)
    elif kind == "SuperLink" and (f.run / "server.json").exists():
        os.kill(f.facts()["superlink"], signal.SIGKILL)
    elif kind == "client":
        f.kill(f"client-{i}")
        time.sleep(pause := draw.uniform(0, 5))
        f.client(i)
        kind += f" {i} killed, started after {pause:.1f} s"
    elif kind == "network":
        how: Literal["swallow", "hold", "reset"] = draw.choice(
            ["swallow", "hold", "reset"]
        )
        f.proxies[i].cut_for(seconds := draw.uniform(1, 10), how)
        kind += f" of client {i}: {how} for {seconds:.1f} s"
    else:
        for name in list(f.processes) if kind == "everything" else ["server"]:
            f.kill(name)
        if kind == "everything":
            f.all_clients()
        start_server()
    return kind


def memory(
    clients: int, rounds: int, poll: float, minutes: float, more: list[str]
) -> None:
    """Memory by kind of process, and how fast it grows.

    What a process takes is its proportional set size, in which shared pages are divided by who shares them; what grows is its
    anonymous memory, for the other changes with whoever else on the machine loads the same libraries.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), clients) as f,
    ):
        f.server("fedavg", *settings(clients, rounds, *more))
        for i in range(clients):
            f.client(i, "--poll", poll)
        f.reached(2, 900)
        begin, said, samples = time.monotonic(), 0.0, []
        while (
            f.processes["server"].poll() is None
            and len(f.rows()) < rounds
            and time.monotonic() - begin < 60 * minutes
        ):
            kinds = {
                "clients": [
                    p.pid for name, p in f.processes.items() if name != "server"
                ]
            }
            kinds |= {
                "server": [f.processes["server"].pid],
                "SuperLink": [f.facts()["superlink"]],
                "ServerApp": [f.serverapp()],
            }
            pss, own = (
                {
                    kind: sum(_memory(number, what) for number in numbers)
                    / len(numbers)
                    for kind, numbers in kinds.items()
                }
                for what in ("Pss", "Anonymous")
            )
            now = time.monotonic() - begin
            samples.append((now, len(f.rows()), *own.values()))
            if now - said > 60:
                said = now
                print(
                    f"minute {now / 60:.1f}, round {samples[-1][1]}, anonymous MB: {_sizes(own)}; PSS: {_sizes(pss)}",
                    flush=True,
                )
            time.sleep(SAMPLE)
        took = [row["seconds"] for row in f.rows()]
    table = np.array(samples)
    print(
        f"{clients} clients, {len(took)} rounds in {table[-1, 0] / 60:.1f} minutes, {np.median(took):.2f} s a round"
    )
    for name, rows in (
        ("the last half of the rounds", table[table[:, 1] >= len(took) / 2]),
        ("from minute 6 on", table[table[:, 0] >= 360]),
    ):
        for column, kind in enumerate(
            ("a client", "server", "SuperLink", "ServerApp"), 2
        ):
            if len(rows) > 2:
                by_round, by_minute = (
                    np.polyfit(rows[:, x], rows[:, column], 1)[0] for x in (1, 0)
                )
                print(
                    f"{name}: {kind} {rows[0, column]:.1f} to {rows[-1, column]:.1f} MB, "
                    f"{by_round * 1000:+.1f} kB a round, {by_minute * 60000:+.0f} kB a minute"
                )


SAMPLE = 10.0  # seconds between two looks at the memory


def _sizes(sizes: dict[str, float]) -> str:
    return ", ".join(f"{kind} {size:.1f}" for kind, size in sizes.items())


def _memory(number: int, what: str) -> float:
    """In MB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))
        * 1024
        / 1e6
    )


def large() -> None:
    """11 million parameters go round; a gigabyte is refused, with the limit named."""
    for name, width, more in (("44 MB", 3260, []), ("1 GB", 15750, [])):
        given: list[Any] = [*settings(2, 2, *more), f"model.hidden=[{width}, {width}]"]
        with tempfile.TemporaryDirectory() as folder, federation(Path(folder), 2) as f:
            f.server("fedavg", *given)
            f.client(0)
            f.client(1)
            status = f.processes["server"].wait(500)
            took = [row["seconds"] for row in f.rows()]
            said = "" if status == 0 else f.log("server").strip().splitlines()[-1]
        print(
            f"{name}: exit status {status}; seconds a round {took} {said}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="overhead",
        choices=["overhead", "faults", "memory", "large"],
    )
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--poll", type=float, default=0.2, help="of the clients, in seconds"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="end after so many, whatever the rounds",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the run whose memory is measured",
    )
    a = parser.parse_args()
    if a.what == "faults":
        sys.exit(
            0
            if faults(
                a.number,
                random.SystemRandom().randrange(10**6) if a.seed is None else a.seed,
            )
            else 1
        )
    elif a.what == "memory":
        memory(a.clients, a.rounds, a.poll, a.minutes, a.set)
    else:
        {"overhead": overhead, "large": large}[a.what]()


if __name__ == "__main__":
    main()
