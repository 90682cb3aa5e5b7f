"""The cost of a deployment, and the faults that it survives.

Real processes over TLS with node authentication on one machine.

python -m benchmarks.deployment
    overhead of a round, warm clients against stock SuperNodes
python -m benchmarks.deployment faults --number 50
    random faults in a row; the seed is printed, and --seed takes it
python -m benchmarks.deployment memory
    50 warm clients for 100 rounds: memory against rounds
python -m benchmarks.deployment memory --clients 6 --rounds 100000 --minutes 15 \\
    --set "model.hidden=[8]"
    light rounds, for long
python -m benchmarks.deployment large
    a model of 44 MB, and one of 1 GB
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
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower.federation import Federation, Gate, federation, free_port
from tests.helpers import PATIENCE

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
    """Start a SuperNode of Flower's own."""
    keys, programs = f.certs / f"client-{i}", Path(sys.executable).parent
    command = [str(programs / "flower-supernode"), "--superlink", f.address]
    command += ["--root-certificates", str(keys / "ca.crt")]
    command += ["--auth-supernode-private-key", str(keys / "client.key")]
    command += ["--port", str(free_port()), "--node-config", f"partition-id={i}"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    home = str(f.folder / f"home-{i}")
    f.start(f"stock-{i}", command, FLWR_HOME=home, PATH=path)


def overhead() -> None:
    """Seconds of a round beyond those of the training itself.

    `sequential` measures the training: four clients, one after another.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = [*settings(4, 12), "engine.name=sequential"]
        result = run(Experiment.load("fedavg", given), Path(folder) / "s")
        seconds = [row["seconds"] for row in result.history[1:]]
        training = float(np.median(seconds))
    print(f"the training itself: {training:.3f} s a round")
    for kind, rounds in (("warm clients", 30), ("stock SuperNodes", 3)):
        with tempfile.TemporaryDirectory() as folder, federation(Path(folder), 4) as f:
            f.server("fedavg", *settings(4, rounds))
            for i in range(4):
                if kind == "warm clients":
                    f.client(i)
                else:
                    stock(f, i)
            f.finished()
            seconds = [row["seconds"] for row in f.rows()][1:]
        beyond = np.array(seconds) - training
        load = os.getloadavg()[0]
        print(
            f"{kind}: {np.median(seconds):.3f} s a round, "
            f"{np.median(beyond):.3f} s beyond the training "
            f"({beyond.min():.3f} to {beyond.max():.3f}, {len(seconds)} rounds, "
            f"load {load:.1f})",
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
    """Kill and cut at random; whether no round, report or bit is lost in the end.

    For that a round waits for a client that went away in it (`engine.rejoin_timeout`),
    and none is left out (no `deadline_s`). A gate keeps the run from ending before
    the last fault.
    """
    draw = random.Random(seed)
    print(f"seed {seed}, {number} faults", flush=True)
    rounds = 6 * number + 10
    given = settings(clients, rounds, "engine.rejoin_timeout=300")
    done: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), clients) as f,
    ):
        oracle = Experiment.load("scaffold", [*given, "engine.name=sequential"])
        expected = run(oracle, Path(folder) / "sequential")
        gate = Gate(Path(folder), t=4)
        gated = Gated(f, gate, [*given, gate.TASK])
        for i in range(clients):
            f.proxy(i)
        gated.start()
        f.reached(1)
        for _ in range(number):
            before, began = len(f.rows()), time.monotonic()
            gate.open_to(before + 4)
            time.sleep(draw.random())
            done.append(fault(draw, gated))
            after = len(f.rows())
            gate.open_to(after + 2)
            f.reached(after + 1)
            seconds = time.monotonic() - began
            print(
                f"{len(done)}: {done[-1]}, after round {before}, "
                f"healed after {seconds:.1f} s",
                flush=True,
            )
        gate.open()
        result = f.finished()
        rows, reasons = f.rows(), f.log("server")
    numbers = [row["round"] for row in rows]
    assert numbers == list(range(1, rounds + 1)), "a round is missing"
    lost = sum(sum(row["dropped"].values()) for row in rows)
    is_same = result["params_sha256"] == expected.params_sha256
    kinds = Counter(kind.split()[0] for kind in done)
    counted = ", ".join(f"{kind} {times}" for kind, times in kinds.items())
    print(
        f"{number} faults ({counted}), {len(rows)} rounds, {lost} reports lost, "
        f"the same bits as never interrupted: {is_same}"
    )
    if not is_same or lost:
        print(reasons)
    return is_same and not lost


class Gated(NamedTuple):
    """A federation whose clients wait at a gate, as it is started."""

    f: Federation
    gate: Gate
    settings: list[str]

    def server(self) -> None:
        self.f.server("scaffold", *self.settings, **self.gate.path)

    def client(self, i: int) -> None:
        self.f.client(i, **self.gate.environment)

    def start(self) -> None:
        self.server()
        for i in range(self.f.clients):
            self.client(i)


def fault(draw: random.Random, gated: Gated) -> str:
    """Make one fault; its description."""
    f, kind = gated.f, draw.choice(KINDS)
    i = draw.randrange(f.clients)
    if kind == "ServerApp":
        os.kill(f.serverapp(), signal.SIGKILL)
    elif kind == "SuperLink" and (f.run / "server.json").exists():
        os.kill(f.facts()["superlink"], signal.SIGKILL)
    elif kind == "client":
        f.kill(f"client-{i}")
        pause = draw.uniform(0, 5)
        time.sleep(pause)
        gated.client(i)
        kind += f" {i} killed, started after {pause:.1f} s"
    elif kind == "network":
        how: Literal["swallow", "hold", "reset"] = draw.choice(
            ["swallow", "hold", "reset"]
        )
        seconds = draw.uniform(1, 10)
        f.proxies[i].cut_for(seconds, how)
        kind += f" of client {i}: {how} for {seconds:.1f} s"
    elif kind == "everything":
        for name in list(f.processes):
            f.kill(name)
        gated.start()
    else:
        f.kill("server")
        gated.server()
    return kind


def memory(
    clients: int, rounds: int, poll: float, minutes: float, more: list[str]
) -> None:
    """Memory by kind of process, and how fast it grows.

    The memory of a process is its proportional set size, in which shared pages are
    divided by the processes that share them. Growth is measured by its anonymous
    memory, for the rest changes with whatever else on the machine loads the same
    libraries.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        federation(Path(folder), clients) as f,
    ):
        f.server("fedavg", *settings(clients, rounds, *more))
        for i in range(clients):
            f.client(i, "--poll", poll)
        f.reached(2)
        begin, said, samples = time.monotonic(), 0.0, []
        while (
            f.processes["server"].poll() is None
            and len(f.rows()) < rounds
            and time.monotonic() - begin < 60 * minutes
        ):
            anonymous, pss = _sample(f, "Anonymous"), _sample(f, "Pss")
            now = time.monotonic() - begin
            samples.append((now, len(f.rows()), *anonymous.values()))
            if now - said > 60:
                said = now
                print(
                    f"minute {now / 60:.1f}, round {samples[-1][1]}, "
                    f"anonymous MB: {_sizes(anonymous)}; PSS: {_sizes(pss)}",
                    flush=True,
                )
            time.sleep(SAMPLE)
        took = [row["seconds"] for row in f.rows()]
    table = np.array(samples)
    print(
        f"{clients} clients, {len(took)} rounds in {table[-1, 0] / 60:.1f} minutes, "
        f"{np.median(took):.2f} s a round"
    )
    half = table[table[:, 1] >= len(took) / 2]
    _print_growth("the last half of the rounds", half)
    _print_growth("from minute 6 on", table[table[:, 0] >= 360])


def _print_growth(name: str, rows: np.ndarray) -> None:
    """Growth of memory in rows of (seconds, round, MB of each kind of process)."""
    if len(rows) <= 2:
        return
    kinds = ("a client", "server", "SuperLink", "ServerApp")
    for column, kind in enumerate(kinds, 2):
        sizes = rows[:, column]
        by_minute, by_round = (np.polyfit(rows[:, x], sizes, 1)[0] for x in (0, 1))
        print(
            f"{name}: {kind} {sizes[0]:.1f} to {sizes[-1]:.1f} MB, "
            f"{by_round * 1000:+.1f} kB a round, "
            f"{by_minute * 60000:+.0f} kB a minute"
        )


def _sample(f: Federation, measure: str) -> dict[str, float]:
    """MB of a process, the mean of its kind."""
    clients = [process.pid for name, process in f.processes.items() if name != "server"]
    app = f.running_serverapp()
    kinds = {
        "clients": clients,
        "server": [f.processes["server"].pid],
        "SuperLink": [f.facts()["superlink"]],
        "ServerApp": [] if app is None else [app],
    }
    means = {}
    for kind, numbers in kinds.items():
        sizes = [_memory(number, measure) for number in numbers]
        means[kind] = sum(sizes) / max(len(sizes), 1)
    return means


SAMPLE = 10.0  # seconds between two looks at the memory


def _sizes(sizes: dict[str, float]) -> str:
    return ", ".join(f"{kind} {size:.1f}" for kind, size in sizes.items())


def _memory(number: int, measure: str) -> float:
    """In MB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = [int(line.split()[1]) for line in lines if line.startswith(f"{measure}:")]
    return sum(sizes) * 1024 / 1e6


def large() -> None:
    """11 million parameters go round; a gigabyte is refused, with the limit named."""
    for name, width in (("44 MB", 3260), ("1 GB", 15750)):
        given = [*settings(2, 2), f"model.hidden=[{width}, {width}]"]
        with tempfile.TemporaryDirectory() as folder, federation(Path(folder), 2) as f:
            f.server("fedavg", *given)
            f.all_clients()
            status = f.processes["server"].wait(PATIENCE)
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
    arguments = parser.parse_args()
    if arguments.what == "faults":
        seed = arguments.seed
        if seed is None:
            seed = random.SystemRandom().randrange(10**6)
        sys.exit(0 if faults(arguments.number, seed) else 1)
    elif arguments.what == "memory":
        memory(
            arguments.clients,
            arguments.rounds,
            arguments.poll,
            arguments.minutes,
            arguments.set,
        )
    else:
        {"overhead": overhead, "large": large}[arguments.what]()


if __name__ == "__main__":
    main()
