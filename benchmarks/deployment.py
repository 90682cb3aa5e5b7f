"""What a deployment costs, and what it survives: real processes over TLS with node authentication on one machine.

python -m benchmarks.deployment                      overhead of a round, warm clients against stock SuperNodes
python -m benchmarks.deployment faults --number 50   random faults in a row; the seed is printed, and --seed takes it
python -m benchmarks.deployment memory               50 warm clients for 100 rounds: memory against rounds
python -m benchmarks.deployment large                a model of 44 MB, and one of 1 GB
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedcore.config import Experiment
from fedcore.loop import run
from tests.flower.federation import Federation, federation, free_port

# 64-600-200-10: 161 210 parameters
MLP = ["model.hidden=[600, 200]", "partition.name=iid", "participation.name=uniform"]


def settings(clients: int, rounds: int, *more: str) -> list[str]:
    sizes = [f"population={clients}", f"participation.cohort={clients}", f"engine.min_clients={clients}", f"rounds={rounds}"]
    return [*MLP, *sizes, "evaluation.every=1000", "evaluation.clients=0", "local.steps=1", *more]


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
        training = float(np.median([row["seconds"] for row in run(e, Path(folder) / "s").history[1:]]))
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


def faults(number: int, seed: int) -> None:
    """Kill at random; every round has to be there in the end, with every client's state as if nothing had been."""
    draw = random.Random(seed)
    print(f"seed {seed}, {number} faults", flush=True)
    rounds = 2 * number + 10
    given = settings(4, rounds)
    done: list[str] = []
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), 4) as f:
        expected = run(Experiment.load("scaffold", [*given, "engine.name=sequential"]), Path(folder) / "sequential").params_sha256
        f.server("scaffold", *given)
        f.all_clients()
        f.reached(1, 120)
        for _ in range(number):
            before = len(f.rows())
            kind = draw.choice(["ServerApp", "SuperLink", "server", "everything"])
            time.sleep(draw.random())
            if kind == "ServerApp" and (process := f.serverapp()):
                os.kill(process, signal.SIGKILL)
            elif kind == "SuperLink" and (f.run / "server.json").exists():
                os.kill(f.facts()["superlink"], signal.SIGKILL)
            else:
                for name in list(f.processes) if kind == "everything" else ["server"]:
                    f.kill(name)
                if kind == "everything":
                    f.all_clients()
                f.server("scaffold", *given)
            done.append(kind)
            f.reached(before + 1, 180)
            print(f"{len(done)}: {kind} after round {before}", flush=True)
        result = f.finished(600)
        rows = f.rows()
    assert [row["round"] for row in rows] == list(range(1, rounds + 1)), "a round is missing"
    same = result["params_sha256"] == expected
    lost = sum(sum(row["dropped"].values()) for row in rows)
    print(f"{number} faults, {len(rows)} rounds, {lost} reports lost, the same bits as never interrupted: {same}")
    sys.exit(0 if same else 1)


def memory(clients: int, rounds: int) -> None:
    """Resident memory after a tenth of the rounds and on, as a slope."""
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), clients) as f:
        f.server("fedavg", *settings(clients, rounds))
        f.all_clients()
        f.reached(rounds // 10, 900)
        samples: list[tuple[int, float, float]] = []
        while f.processes["server"].poll() is None:
            server = f.processes["server"].pid
            tree = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
            sizes = (
                [_resident(p) for p in tree],
                [_resident(psutil.Process(p.pid)) for n, p in f.processes.items() if n != "server"],
            )
            samples.append((len(f.rows()), sum(sizes[0]), float(np.mean(sizes[1]))))
            time.sleep(2)
            if len(f.rows()) >= rounds:
                break
        took = [row["seconds"] for row in f.rows()]
    table = np.array(samples)
    for name, column in (("server, all its processes", 1), ("a client", 2)):
        slope = np.polyfit(table[:, 0], table[:, column], 1)[0]
        (r0, m0), (r1, m1) = table[0, [0, column]], table[-1, [0, column]]
        print(f"{name}: {m0:.1f} MB at round {r0:.0f}, {m1:.1f} MB at round {r1:.0f}, slope {slope * 1000:.1f} kB a round")
    print(f"{clients} clients, {len(took)} rounds, {np.median(took):.2f} s a round")


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0


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
        print(f"{name}: exit status {status}; seconds a round {took} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="overhead", choices=["overhead", "faults", "memory", "large"])
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=100)
    a = parser.parse_args()
    if a.what == "faults":
        faults(a.number, random.SystemRandom().randrange(10**6) if a.seed is None else a.seed)
    elif a.what == "memory":
        memory(a.clients, a.rounds)
    else:
        {"overhead": overhead, "large": large}[a.what]()


if __name__ == "__main__":
    main()
