"""Clients per second of every engine, of a plain PyTorch loop, of Flower's own Ray simulation and of pfl-research: `make bench`.

    python -m benchmarks.engines [models] [cohorts] [ragged] [overhead] [registered] [start]     default: all of them
    python -m benchmarks.engines models --model mlp --without Flower pfl

One process tree, the same model, data, cohort, batches and learning rate; the contenders take turns (Ray, Flower and pfl, which
have processes of their own, come after), and what is printed are medians over the rounds after the first, and ratios of them. Also:
what an engine itself costs a client (clients that do nothing), a round with 1 000 and with 100 000 registered clients, and the time
to the end of the first round. Writes benchmarks/results.json, and with --picture a plot.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, nn

from benchmarks.pfl_simulation import pfl
from fedcore import Experiment
from fedcore.engines.base import Work
from fedcore.engines.vectorised import Vectorised
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import equally
from fedcore.rounds.loop import Loop, Quiet
from fedcore.task import Task
from fedcore.trees import add, scale
from fedcore.types import Batches, Model, Params, Stateless

ROOT = Path(__file__).parent
CORES = os.cpu_count() or 1
Seconds = dict[str, list[float]]
"""Of rounds, by contender."""

EVEN = ["partition.name=iid"]  # 60 examples each
MODELS = {
    "logistic": ["model.name=logistic"],
    "mlp": ["model.name=mlp"],
    "lenet": ["model.name=lenet"],
    "cnn": ["model.name=cnn"],
    "resnet": ["model.name=resnet", "participation.cohort=4"],
    "vit": ["model.name=vit", "participation.cohort=10"],
}
TITLES = {
    "logistic": "logistic, 7 850 parameters",
    "mlp": "MLP 784-200-10",
    "lenet": "LeNet",
    "cnn": "CNN, 1.7 M parameters",
    "resnet": "ResNet-18-GN, 11 M parameters, cohort 4",
    "vit": "small ViT, cohort 10",
}
NOTHING = {
    "60k": ["model.hidden=[76]"],
    "11M": ["model.name=resnet"],
}  # models for clients that do nothing, by parameters
OTHERS = {"logistic", "mlp", "lenet", "cnn"}  # models with which Flower and pfl are run


class Settings(MethodSettings):
    local_lr: float = 0.1


class Up(NamedTuple):
    delta: Params


class Noop(Method[Settings]):
    """Clients that send the model back as it came: what is left is the engine."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        return Up(down.params), state

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server, equally).value
        return Model(scale(add(server.params, mean.delta), 0.5))


def experiment(*settings: str) -> Experiment:
    return Experiment.load(
        ROOT / "fashion.toml", ["evaluation.every=100000", "rounds=100000", *settings]
    )


def loop_for(e: Experiment) -> Loop:
    return Loop(
        e, Path(tempfile.mkdtemp(prefix="fedcore-bench-")), Quiet(), None, False
    )


def one_round(loop: Loop) -> float:
    """Seconds of one round, without evaluation."""
    return float(loop.round()["seconds"])


@contextmanager
def engine(e: Experiment, *more: str) -> Iterator[Loop]:
    """A loop after its first round, which warms up and measures chunks."""
    loop = loop_for(Experiment.parse(e.model_dump(mode="json"), list(more)))
    one_round(loop)
    yield loop
    loop.close()


class Plain:
    """The yardstick: FedAvg as one would write it by hand in PyTorch, in one process or in several, each on one thread."""

    def __init__(self, e: Experiment, processes: int = 1) -> None:
        self.loop = loop_for(e)
        self.server = {
            name: p.detach().clone().share_memory_()
            for name, p in self.loop.task.model.named_parameters()
        }
        self.t, self.pipes, self.totals = 0, [], []
        context = torch.multiprocessing.get_context("spawn")
        for _ in range(processes if processes > 1 else 0):
            ours, theirs = context.Pipe()
            total = {
                name: torch.zeros_like(p).share_memory_()
                for name, p in self.server.items()
            }
            context.Process(
                target=_serve,
                args=(e.model_dump_json(), theirs, self.server, total),
                daemon=True,
            ).start()
            self.pipes.append(ours)
            self.totals.append(total)

    def round(self) -> float:
        """Seconds of one round."""
        cohort, _ = self.loop.process.sample(self.t, {})
        clients: list[int] = cohort.tolist()
        begin = time.perf_counter()
        if self.pipes:
            for i, pipe in enumerate(self.pipes):
                pipe.send((self.t, clients[i :: len(self.pipes)]))
            weight = sum(pipe.recv() for pipe in self.pipes)
            totals = self.totals
        else:
            torch.set_num_threads(1)
            total = {name: torch.zeros_like(p) for name, p in self.server.items()}
            weight, totals = (
                _share(self.loop, self.server, total, clients, self.t),
                [total],
            )
            torch.set_num_threads(CORES)
        for name, value in self.server.items():
            value += sum(total[name] for total in totals) / weight
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.t += 1
        return time.perf_counter() - begin

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)


def _share(
    loop: Loop, server: Params, total: Params, clients: list[int], t: int
) -> int:
    """Train these clients one after another; the weighted sum of their changes goes into `total`, its weight is returned."""
    model: nn.Module = loop.task.model
    work, lr = (
        Work(loop.task, loop.method, loop.experiment.local, loop.experiment.seed),
        loop.experiment.method.local_lr,
    )  # type: ignore[attr-defined]
    weight = 0
    for client in clients:
        batches = work.batches(loop.method.train, [client], t)  # type: ignore[attr-defined]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(server[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        counts = batches.mask[0].sum(1).int().tolist()
        for x, y, n in zip(batches.x[0], batches.y[0], counts, strict=True):
            if n == 0:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
            optimizer.step()
        n = sum(counts)
        weight += n
        with torch.no_grad():
            for name, p in model.named_parameters():
                total[name] += n * (p - server[name])
    return weight


def _serve(settings: str, pipe: Any, server: Params, total: Params) -> None:
    """One process of the plain loop."""
    torch.set_num_threads(1)
    loop = loop_for(Experiment.model_validate_json(settings))
    while (work := pipe.recv()) is not None:
        for value in total.values():
            value.zero_()
        pipe.send(_share(loop, server, total, work[1], work[0]))


def flower(e: Experiment, rounds: int, folder: Path) -> list[float]:
    """Seconds of each round of Flower's own simulation: its Ray backend, one message a client, FedAvg over NumPy arrays."""
    (folder / "settings.json").write_text(e.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "benchmarks.flower_simulation",
        str(folder / "settings.json"),
        str(rounds),
    ]
    environment = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_DEDUP_LOGS": "0",
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT.parent,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if done.returncode or not lines:
        raise SystemExit(
            f"Flower's simulation failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    seconds: list[float] = json.loads(lines[-1].removeprefix("SECONDS "))
    return seconds


def take_turns(
    e: Experiment, rounds: int, engines: dict[str, list[str]], cores: int = CORES
) -> Seconds:
    """Our engines and the plain loops, in alternating order."""
    loops = {
        name: loop_for(Experiment.parse(e.model_dump(mode="json"), more))
        for name, more in engines.items()
    }
    plain = {
        f"plain loop, {n} core{'s' * (n > 1)}": Plain(e, n)
        for n in dict.fromkeys((1, cores))
    }
    contenders: dict[str, Callable[[], float]] = {
        name: p.round for name, p in plain.items()
    }
    contenders |= {
        name: lambda loop=loop: one_round(loop) for name, loop in loops.items()
    }  # type: ignore[misc]
    seconds: Seconds = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # warms up, and measures chunks
    for i in range(max(rounds // 2, 1)):
        for name in sorted(contenders, reverse=bool(i % 2)):
            contenders[
                name
            ]()  # untimed: caches and threads are as the one before left them
            seconds[name] += [contenders[name]() for _ in range(2)]
    for closing in (*loops.values(), *plain.values()):
        closing.close()
    return seconds


def models(rounds: int, which: list[str], without: list[str]) -> dict[str, Any]:
    """The main comparison: even clients, cohort 100 of 1 000."""
    found = {}
    for model in which:
        e = experiment(*EVEN, *MODELS[model])
        heavy = model not in ("logistic", "mlp")
        few = max(rounds // 3, 4) if heavy else rounds
        ours = {"sequential": ["engine.name=sequential"], "vectorised": []}
        seconds = take_turns(
            e, few, {name: more for name, more in ours.items() if name not in without}
        )
        if (
            "ray" not in without
        ):  # after the others: its cluster's own processes are never idle
            with engine(e, "engine.name=ray") as loop:
                seconds[f"ray, {CORES} workers"] = [one_round(loop) for _ in range(few)]
        with tempfile.TemporaryDirectory() as folder:
            if model in OTHERS and "pfl" not in without:
                for processes in dict.fromkeys((1, CORES)):
                    name = f"pfl 0.6.0, {processes} process{'es' * (processes > 1)}"
                    seconds[name] = pfl(e, few + 1, Path(folder), processes)[1:]
            if model in OTHERS and "Flower" not in without:
                seconds["Flower 1.39, Ray"] = flower(e, 4, Path(folder))[
                    1:
                ]  # the first starts the actors
        found[model] = {"cohort": e.participation.cohort, "rounds": summary(seconds)}  # type: ignore[attr-defined]
        show(TITLES[model], found[model]["rounds"], found[model]["cohort"])
    return found


def summary(seconds: Seconds) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median_s": statistics.median(v),
            "min_s": min(v),
            "max_s": max(v),
            "rounds": len(v),
        }
        for name, v in seconds.items()
    }


def show(title: str, rows: dict[str, dict[str, float]], cohort: int) -> None:
    """A table, with the ratio of every contender's median to that of `vectorised`."""
    ours = rows["vectorised"]["median_s"]
    print(
        f"\n{title}\n| | s a round, median (min to max) | clients/s | times `vectorised` |\n|---|---|---|---|"
    )
    for name, row in rows.items():
        spread = f"{row['median_s']:.3f} ({row['min_s']:.3f} to {row['max_s']:.3f})"
        print(
            f"| {name} | {spread} | {cohort / row['median_s']:,.0f} | {row['median_s'] / ours:.2f} |",
            flush=True,
        )


def cohorts(rounds: int) -> dict[str, Any]:
    """The MLP with 10, 100 and 1 000 of 1 000 clients."""
    found = {}
    for cohort in (10, 100, 1000):
        e = experiment(*EVEN, f"participation.cohort={cohort}")
        found[str(cohort)] = summary(
            take_turns(
                e, max(rounds // (3 if cohort > 100 else 1), 4), {"vectorised": []}
            )
        )
        show(f"MLP, cohort {cohort}", found[str(cohort)], cohort)
    return found


def ragged(rounds: int) -> dict[str, Any]:
    """Clients of log-normal sizes, cohort 100; and what share of the steps is padding."""
    found = {}
    for model in ("logistic", "mlp"):
        e = experiment("partition.name=size_skew", *MODELS[model])
        rows = summary(take_turns(e, rounds, {"vectorised": []}))
        with engine(e) as loop:
            padding = _padding(loop)
        found[model] = {"rounds": rows, "padding": padding}
        show(
            f"{model}, log-normal sizes; {padding:.1%} of the steps of `vectorised` are padding",
            rows,
            100,
        )
    return found


def _padding(loop: Loop) -> float:
    """Share of the local steps of ten rounds that are padding."""
    vectorised = loop.engine
    assert isinstance(vectorised, Vectorised)
    train, done, needed = loop.method.train, 0, 0  # type: ignore[attr-defined]
    for t in range(10):
        cohort, _ = loop.process.sample(t, {})
        for chunk in vectorised.chunks(train, cohort.numpy()):
            steps = vectorised.work.steps(train, np.array(chunk))
            done, needed = (
                done + int(steps.max()) * len(chunk),
                needed + int(steps.sum()),
            )
    return 1 - needed / done


def overhead(rounds: int, without: list[str]) -> dict[str, Any]:
    """Clients that do nothing: milliseconds a client, and seconds of a large cohort."""
    noop = "method.name=benchmarks.engines:Noop"
    found: dict[str, Any] = {size: {} for size in NOTHING}
    for size, settings in NOTHING.items():
        e = experiment(noop, *EVEN, *settings)
        for name in ("sequential", "vectorised"):
            with engine(e, f"engine.name={name}") as loop:
                found[size][name] = (
                    statistics.median(one_round(loop) for _ in range(rounds))
                    / 100
                    * 1e3
                )
        if "Flower" not in without:
            with tempfile.TemporaryDirectory() as folder:
                found[size]["Flower 1.39, Ray"] = (
                    statistics.median(flower(e, 3, Path(folder))[1:]) / 100 * 1e3
                )
        print(
            f"\nclients that do nothing, {size} parameters, ms a client:",
            {k: round(v, 3) for k, v in found[size].items()},
        )
    large = experiment(
        noop,
        *EVEN,
        "model.hidden=[76]",
        "population=10000",
        "participation.cohort=1000",
    )
    with engine(large) as loop:
        found["cohort 1000 of 10000, s"] = statistics.median(
            one_round(loop) for _ in range(rounds)
        )
    print(
        f"cohort 1 000 of 10 000, clients that do nothing: {found['cohort 1000 of 10000, s']:.3f} s a round",
        flush=True,
    )
    return found


def registered(rounds: int) -> dict[str, Any]:
    """A round of cohort 100 with 1 000 and with 100 000 registered clients of the synthetic task, taking turns; and start-up."""
    loops: dict[int, Loop] = {}
    start: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"1000": [], "100000": []}
    for population in (1_000, 100_000):
        begin = time.perf_counter()
        loops[population] = loop_for(
            experiment(
                "task=least-squares", f"population={population}", "method.local_lr=0.01"
            )
        )
        one_round(loops[population])
        start[str(population)] = time.perf_counter() - begin
    for i in range(2 * rounds):
        for population in sorted(loops, reverse=bool(i % 2)):
            seconds[str(population)].append(one_round(loops[population]))
    medians = {population: statistics.median(v) for population, v in seconds.items()}
    ratio = medians["100000"] / medians["1000"]
    print(
        f"\na round with 100 000 registered clients: {ratio:.2f} x one with 1 000; start-up {start['100000']:.1f} s",
        flush=True,
    )
    return {"round_s": medians, "ratio": ratio, "start_s": start}


def start() -> dict[str, float]:
    """Seconds to the end of the first round in a new process, imports left out: with nothing in the cache, and again."""
    code = (
        "import time; from benchmarks.engines import *; e = experiment(*EVEN); begin = time.perf_counter(); "
        "loop = loop_for(e); one_round(loop); print(time.perf_counter() - begin)"
    )
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("chunk sizes measured, partition made", "from the cache"):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "XDG_CACHE_HOME": cache},
                cwd=ROOT.parent,
                capture_output=True,
                text=True,
                check=True,
            )
            found[name] = float(done.stdout.split()[-1])
    print(
        "\nMLP, to the end of the first round, s:",
        {k: round(v, 2) for k, v in found.items()},
        flush=True,
    )
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """Clients per second of every contender, by model, on a logarithmic axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedcore.views.figures import SERIES, STYLE, svg
    from fedcore.views.page import THEME

    names = list(
        dict.fromkeys(name for model in found.values() for name in model["rounds"])
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            at = [
                i + (number - len(names) / 2) * 0.1
                for i, model in enumerate(found.values())
                if name in model["rounds"]
            ]
            speeds = [
                m["cohort"] / m["rounds"][name]["median_s"]
                for m in found.values()
                if name in m["rounds"]
            ]
            axes.bar(at, speeds, 0.09, color=SERIES[number % len(SERIES)], label=name)
        axes.set(
            yscale="log",
            ylabel="clients per second",
            xticks=range(len(found)),
            xticklabels=list(found),
        )
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=4
        )
        file.write_text(svg(figure, transparent=False, facecolor=THEME["card"][0]))


def main() -> None:
    parts = ["models", "cohorts", "ragged", "overhead", "registered", "start"]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=", ".join(parts) + "; default: all"
    )
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=list(MODELS)
    )
    parser.add_argument(
        "--without", nargs="+", default=[], help="Flower, pfl, sequential, ray"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    if unknown := set(a.parts) - set(parts):
        parser.error(
            f"no such part: {', '.join(sorted(unknown))}; expected some of {', '.join(parts)}"
        )
    file = ROOT / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["machine"] = {
        "cpus": CORES,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(results["machine"])
    runs: dict[str, Callable[[], Any]] = {
        "models": lambda: models(a.rounds, a.model, a.without),
        "cohorts": lambda: cohorts(a.rounds),
        "ragged": lambda: ragged(a.rounds),
        "overhead": lambda: overhead(a.rounds, a.without),
        "registered": lambda: registered(a.rounds),
        "start": start,
    }
    for part in a.parts or parts:
        results[part] = {**results.get(part, {}), **runs[part]()}  # models one by one
        file.write_text(json.dumps(results, indent=1) + "\n")
    if a.picture and "models" in results:
        draw(results["models"], a.picture)


if __name__ == "__main__":
    main()
