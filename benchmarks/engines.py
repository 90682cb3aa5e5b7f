"""Clients per second of every engine, of a plain PyTorch loop, and of Flower's own Ray simulation: `make bench`.

One process tree, the same model, data, cohort, batches and learning rate; the contenders take turns, and what is printed are
medians over the rounds after the first. Also: what an engine itself costs a client (clients that do nothing), and a round with
1 000 and with 100 000 registered clients. Prints tables, or JSON with --json, and writes benchmarks/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedcore import Experiment
from fedcore.engines.base import Work
from fedcore.loop import Loop, Quiet
from fedcore.method import Method, MethodSettings, on_client
from fedcore.task import Task
from fedcore.trees import add, scale, uniform_mean
from fedcore.types import Batches, Model, Params, Round, Stateless

ROOT = Path(__file__).parent
MODELS = {"logistic": "logistic", "mlp 784-200-10": "mlp"}


class Settings(MethodSettings):
    local_lr: float = 0.1


class Up(NamedTuple):
    delta: Params


class Noop(Method[Settings]):
    """Clients that send the model back as it came: what is left is the engine."""

    @on_client
    def train(self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches) -> tuple[Up, Stateless]:
        return Up(down.params), state

    def round(self, server: Model, r: Round) -> Model:
        return Model(scale(add(server.params, uniform_mean(r.each(self.train, r.cohort, server)).delta), 0.5))


def loop_for(e: Experiment) -> Loop:
    return Loop(e, Path(tempfile.mkdtemp(prefix="fedcore-bench-")), Quiet(), None, False)


def one_round(loop: Loop) -> float:
    """Seconds of one round, without evaluation."""
    return float(loop.round()["seconds"])


def plain(e: Experiment) -> Callable[[], float]:
    """The yardstick: FedAvg as one would write it by hand in PyTorch, on one thread."""
    loop = loop_for(e)
    task, work = loop.task, Work(loop.task, loop.method, e.local, e.seed)
    model: nn.Module = task.model
    server = {name: p.detach().clone() for name, p in model.named_parameters()}
    t = 0

    def run() -> float:
        nonlocal t
        torch.set_num_threads(1)
        cohort, _ = loop.process.sample(t, {})
        begin = time.perf_counter()
        total, weight = {name: torch.zeros_like(p) for name, p in server.items()}, 0.0
        for client in cohort.tolist():
            batches = work.batches(loop.method.train, [client], t)  # type: ignore[attr-defined]
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(server[name])
            optimizer = torch.optim.SGD(model.parameters(), lr=e.method.local_lr)  # type: ignore[attr-defined]
            for x, y, mask in zip(batches.x[0], batches.y[0], batches.mask[0], strict=True):
                n = int(mask.sum())
                if n == 0:
                    continue
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
                optimizer.step()
            n = int(batches.mask.sum())
            weight += n
            with torch.no_grad():
                for name, p in model.named_parameters():
                    total[name] += n * (p - server[name])
        for name in server:
            server[name] = server[name] + total[name] / weight
        t += 1
        torch.set_num_threads(os.cpu_count() or 1)
        return time.perf_counter() - begin

    return run


def engine(e: Experiment, *more: str) -> tuple[Callable[[], float], Loop]:
    loop = loop_for(Experiment.parse(e.model_dump(mode="json"), list(more)))
    one_round(loop)  # warms up, and measures chunks
    return lambda: one_round(loop), loop


def flower(e: Experiment, rounds: int, folder: Path) -> list[float]:
    """Seconds of each round of Flower's own simulation: its Ray backend, one message a client, FedAvg over NumPy arrays."""
    (folder / "settings.json").write_text(e.model_dump_json())
    command = [sys.executable, "-m", "benchmarks.flower_simulation", str(folder / "settings.json"), str(rounds)]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_DEDUP_LOGS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT.parent, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if done.returncode or not lines:
        raise SystemExit(f"Flower's simulation failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    seconds: list[float] = json.loads(lines[-1].removeprefix("SECONDS "))
    return seconds


def compare_engines(model: str, rounds: int) -> dict[str, Any]:
    settings = [f"model.name={MODELS[model]}", "evaluation.every=100000", "rounds=100000"]
    e = Experiment.load(ROOT / "fashion.toml", settings)
    contenders: dict[str, Callable[[], float]] = {"plain loop, 1 core": plain(e)}
    contenders["plain loop, 1 core"]()
    loops = []
    for name, more in {
        "sequential": ["engine.name=sequential"],
        "vectorised": ["engine.name=vectorised"],
        f"ray, {os.cpu_count()} workers": ["engine.name=ray"],
    }.items():
        contenders[name], loop = engine(e, *more)
        loops.append(loop)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds // 2):
        order = list(contenders) if i % 2 == 0 else list(reversed(contenders))
        for name in order:
            contenders[name]()  # untimed: caches and threads are as the one before left them
            seconds[name] += [contenders[name]() for _ in range(2)]
    for loop in loops:
        loop.close()
    with tempfile.TemporaryDirectory() as folder:
        seconds["Flower 1.39, Ray"] = flower(e, 4, Path(folder))[1:]  # the first starts the actors
    return {
        name: {"median_s": statistics.median(v), "min_s": min(v), "max_s": max(v), "clients_per_s": 100 / statistics.median(v)}
        for name, v in seconds.items()
    }


def overhead(rounds: int) -> dict[str, float]:
    """Milliseconds a client of engines whose clients do nothing, 60 000 parameters, cohort 100."""
    found = {}
    for name in ("sequential", "vectorised"):
        e = Experiment.load(
            ROOT / "fashion.toml",
            [
                "method.name=benchmarks.engines:Noop",
                "model.hidden=[76]",
                f"engine.name={name}",
                "rounds=100000",
                "evaluation.every=100000",
            ],
        )
        run, loop = engine(e)
        found[name] = statistics.median(run() for _ in range(rounds)) / 100 * 1e3
        loop.close()
    return found


def registered(rounds: int) -> dict[str, Any]:
    """A round of cohort 100 with 1 000 and with 100 000 registered clients of the synthetic task, taking turns; and start-up."""
    runs: dict[int, Callable[[], float]] = {}
    start: dict[int, float] = {}
    seconds: dict[int, list[float]] = {1_000: [], 100_000: []}
    for population in (1_000, 100_000):
        begin = time.perf_counter()
        e = Experiment.load(
            ROOT / "fashion.toml",
            [
                "task=least-squares",
                f"population={population}",
                "rounds=100000",
                "evaluation.every=100000",
                "method.local_lr=0.01",
            ],
        )
        runs[population], _ = engine(e)
        start[population] = time.perf_counter() - begin
    for i in range(rounds):
        for population in sorted(runs, reverse=bool(i % 2)):
            seconds[population].append(runs[population]())
    medians = {str(population): statistics.median(v) for population, v in seconds.items()}
    return {"round_s": medians, "ratio": medians["100000"] / medians["1000"], "start_s": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    rounds = parser.parse_args().rounds
    machine = {"cpus": os.cpu_count(), "cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    results: dict[str, Any] = {"machine": machine, "engines": {model: compare_engines(model, rounds) for model in MODELS}}
    results |= {"noop_ms_per_client": overhead(rounds), "registered": registered(2 * rounds)}
    (ROOT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if parser.parse_args().json:
        print(json.dumps(results))
        return
    for model, table in results["engines"].items():
        base = table["Flower 1.39, Ray"]["median_s"]
        print(f"\n{model}, cohort 100 of 1 000, 60 examples on average, batch 20")
        print(f"{'':<22}{'s a round':>10}{'min':>8}{'max':>8}{'clients/s':>11}{'x Flower':>10}")
        for name, row in table.items():
            numbers = f"{row['median_s']:>10.3f}{row['min_s']:>8.3f}{row['max_s']:>8.3f}{row['clients_per_s']:>11,.0f}"
            print(f"{name:<22}{numbers}{base / row['median_s']:>10.1f}")
    print(
        "\nclients that do nothing, 60 000 parameters, ms a client:",
        {k: round(v, 3) for k, v in results["noop_ms_per_client"].items()},
    )
    r = results["registered"]
    print(f"a round with 100 000 registered clients: {r['ratio']:.2f} x one with 1 000; start-up {r['start_s'][100_000]:.1f} s")


if __name__ == "__main__":
    main()
