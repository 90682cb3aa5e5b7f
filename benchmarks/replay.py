"""A deployment, its replay, and the next one's time as its clock predicts it.

Real processes over TLS on one machine: eight devices, two of them slow. A device is as
slow as its task, whose examples take a moment to be read: far longer than its training.

python -m benchmarks.replay model
    50 server updates, in which a device disappears and returns: a simulation that
    follows their arrivals has the same model
python -m benchmarks.replay time --number 3
    a clock fitted to one deployment predicts how long the next one's updates take, and
    which clients miss a deadline
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedcore.clock.arrivals import read_arrivals
from fedcore.clock.fit import fit
from fedcore.config import Experiment
from fedcore.rounds.loop import run
from fedcore.rounds.rundir import stored
from tests.flower.federation import federation
from tests.flower.paced import Fleet, PacedTask, replayed

PACE = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8, 4: 0.9, 5: 1.0, 6: 4.0, 7: 5.0}  # seconds
UPDATES = 50
BUFFERED = [
    "schedule.name=buffered",
    "schedule.buffer=4",
    "schedule.concurrency=8",
    f"rounds={UPDATES}",
]
DEADLINE = ["schedule.deadline_s=2", "rounds=15"]
COMMON = ["evaluation.every=1000", "evaluation.clients=0", "local.steps=2"]


def deployed(folder: Path, settings: list[str], disappears: bool = False) -> str:
    """Run a deployment to its end; the SHA-256 of its model."""
    folder.mkdir(parents=True)
    with federation(folder, len(PACE)) as f:
        fleet = Fleet(f, PACE)
        if disappears:
            settings = [*settings, f"engine.min_clients={len(PACE) - 1}"]
        fleet.start("fedavg", *COMMON, *settings)
        if disappears:
            f.reached(15)
            f.kill("client-2")
            f.reached(30)
            fleet.client(2)
        result = f.finished()
    return str(result["params_sha256"])


def model() -> None:
    """The model of a deployment, and of its replay."""
    with tempfile.TemporaryDirectory() as place, PacedTask(Path(place)):
        folder = Path(place) / "deployment"
        sha256 = deployed(folder, BUFFERED, disappears=True)
        arrivals = read_arrivals(folder / "run")
        same = replayed(folder / "run", folder / "replayed") == sha256
        outcomes = arrivals["outcome"].value_counts().to_pylist()
        print(f"{arrivals.num_rows} works, by outcome: {outcomes}")
        print(f"{UPDATES} updates, replayed: {'the same model' if same else 'ANOTHER'}")


def predicted(source: Path, recording: Path, clock: Path) -> pa.Table:
    """The arrivals of a simulation of the run in `source`.

    Its clock is fitted to the run in `recording`, and written to the file `clock`.
    """
    found = fit(read_arrivals(recording), len(PACE))
    lines = ["client,step_s,latency_s"]
    for client in range(len(PACE)):
        step_s, latency_s = found.step_s[client], max(found.latency_s[client], 1e-6)
        lines.append(f"{client},{step_s:.6f},{latency_s:.6f}")
    clock.write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = Experiment.parse(stored(source)).model_dump(mode="json")
    settings["clock"] = {
        "trace": str(clock),
        "jitter": found.jitter,
        "server_s": found.server_s,
    }
    settings["engine"] = {"name": "sequential"}
    folder = clock.with_suffix("")
    run(Experiment.parse(settings), folder)
    return read_arrivals(folder)


def seconds(arrivals: pa.Table) -> float:
    """From the first work that was sent to the last answer of the last update."""
    back = arrivals["back_us"].to_numpy()
    return float(back.max() - arrivals["sent_us"].to_numpy().min()) / 1e6


def late(arrivals: pa.Table) -> set[tuple[int, int]]:
    """(round, client) of those that missed the deadline."""
    found = set()
    for row in arrivals.to_pylist():
        if row["outcome"] == "timeout":
            found.add((row["update"], row["client"]))
    return found


def predict(number: int) -> None:
    """Predicted against measured, of the deployment after the one that was fitted."""
    errors, scores = [], []
    for attempt in range(number):
        seed = [f"seed={attempt}"]
        with tempfile.TemporaryDirectory() as place, PacedTask(Path(place)):
            folder = Path(place)
            deployed(folder / "first", [*BUFFERED, *seed])
            deployed(folder / "second", [*BUFFERED, f"seed={attempt + 100}"])
            deployed(folder / "third", [*DEADLINE, *seed])
            first = folder / "first" / "run"
            second, third = folder / "second" / "run", folder / "third" / "run"
            guess = seconds(predicted(second, first, folder / "clock-2.csv"))
            measured = seconds(read_arrivals(second))
            errors.append(guess / measured - 1)
            wanted = late(read_arrivals(third))
            found = late(predicted(third, first, folder / "clock-3.csv"))
            both = len(wanted & found)
            scores.append(2 * both / max(len(wanted) + len(found), 1))
            print(
                f"{UPDATES} updates: predicted {guess:.1f} s, measured {measured:.1f} s"
                f" ({100 * errors[-1]:+.1f} %); {len(wanted)} late, F1 {scores[-1]:.3f}"
            )
    error = 100 * statistics.median(np.abs(errors))
    print(f"median of {number}: {error:.1f} % off, F1 {statistics.median(scores):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["model", "time"])
    parser.add_argument("--number", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "model":
        model()
    else:
        predict(arguments.number)


if __name__ == "__main__":
    main()
