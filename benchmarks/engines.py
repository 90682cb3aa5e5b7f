"""Clients per second of every engine, a plain loop, Flower's simulation and pfl.

python -m benchmarks.engines [PART ...]      default: all of them
    models, cohorts, ragged, overhead, registered, start
python -m benchmarks.engines models --model mlp --without Flower pfl

Part of `make bench`. One process tree, the same model, data, cohort, batches and
learning rate. The contenders take turns; Ray, Flower and pfl have processes of their
own and come after. Printed are medians over the rounds after the first, and their
ratios. Also: the engine's own cost of a client (clients that do nothing), a round with
1 000 and with 100 000 registered clients, and the time to the end of the first round.
Writes benchmarks/results.json, and with --picture a plot.
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
from functools import partial
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
"""Seconds of each round, by contender."""

Summary = dict[str, dict[str, float]]
"""Median, least and most seconds of a round, and the rounds, by contender."""

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
# Models for clients that do nothing, by parameters.
NOTHING = {"60k": ["model.hidden=[76]"], "11M": ["model.name=resnet"]}
OTHERS = {"logistic", "mlp", "lenet", "cnn"}  # models that Flower and pfl run too
FLOWER = "Flower 1.39, Ray"

# Prints the seconds to the end of the first round, in a process of its own.
START = """\
import time
from benchmarks.engines import *
settings = experiment(*EVEN)
begin = time.perf_counter()
loop = loop_for(settings)
one_round(loop)
print(time.perf_counter() - begin)
"""


class Settings(MethodSettings):
    local_lr: float = 0.1


class Up(NamedTuple):
    delta: Params


class Noop(Method[Settings]):
    """Clients that send the model back as it came: the engine's cost is left."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        return Up(down.params), state

    def round(self, server: Model, r: Round) -> Model:
        mean = r.mean(self.train, r.cohort, server, equally).value
        return Model(scale(add(server.params, mean.delta), 0.5))


def experiment(*settings: str) -> Experiment:
    common = ["evaluation.every=100000", "rounds=100000"]
    return Experiment.load(ROOT / "fashion.toml", [*common, *settings])


def changed(settings: Experiment, more: list[str]) -> Experiment:
    return Experiment.parse(settings.model_dump(mode="json"), more)


def loop_for(settings: Experiment) -> Loop:
    folder = Path(tempfile.mkdtemp(prefix="fedcore-bench-"))
    return Loop(settings, folder, Quiet(), None, False)


def one_round(loop: Loop) -> float:
    """Seconds of one round, without evaluation."""
    return float(loop.round()["seconds"])


def median_round(loop: Loop, rounds: int) -> float:
    """Seconds of a round, the median of this many."""
    return statistics.median(one_round(loop) for _ in range(rounds))


@contextmanager
def engine(settings: Experiment, *more: str) -> Iterator[Loop]:
    """A loop after its first round, which warms up and measures chunks."""
    loop = loop_for(changed(settings, list(more)))
    one_round(loop)
    yield loop
    loop.close()


class Plain:
    """The yardstick: FedAvg as one would write it by hand in PyTorch.

    In one process or in several, each on one thread.
    """

    def __init__(self, settings: Experiment, processes: int = 1) -> None:
        self.loop = loop_for(settings)
        self.server: Params = {}
        for name, p in self.loop.task.model.named_parameters():
            self.server[name] = p.detach().clone()
            self.server[name].share_memory_()  # type: ignore[no-untyped-call]
        self.t = 0
        self.pipes: list[Any] = []
        self.totals: list[Params] = []
        for _ in range(processes if processes > 1 else 0):
            self._start(settings)

    def _start(self, settings: Experiment) -> None:
        """One more process."""
        context = torch.multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        total = {name: torch.zeros_like(p) for name, p in self.server.items()}
        for value in total.values():
            value.share_memory_()  # type: ignore[no-untyped-call]
        arguments = (settings.model_dump_json(), there, self.server, total)
        context.Process(target=_serve, args=arguments, daemon=True).start()
        self.pipes.append(here)
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
            weight = _share(self.loop, self.server, total, clients, self.t)
            totals = [total]
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
    """Train these clients one after another; the sum of their weights.

    The weighted sum of their changes is added to `total`.
    """
    settings, method = loop.experiment, loop.method
    model: nn.Module = loop.task.model
    work = Work(loop.task, method, settings.local, settings.seed)
    lr = method.s.local_lr
    weight = 0
    for client in clients:
        batches = work.batches(method.train, [client], t)  # type: ignore[attr-defined]
        assert isinstance(batches, Batches)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(server[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        counts = batches.mask[0].sum(1).int().tolist()
        for x, y, n in zip(batches.x[0], batches.y[0], counts, strict=True):
            if n == 0:
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[:n]), y[:n])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        num_examples = sum(counts)
        weight += num_examples
        with torch.no_grad():
            for name, p in model.named_parameters():
                total[name] += num_examples * (p - server[name])
    return weight


def _serve(settings: str, pipe: Any, server: Params, total: Params) -> None:
    """One process of the plain loop."""
    torch.set_num_threads(1)
    loop = loop_for(Experiment.model_validate_json(settings))
    while (order := pipe.recv()) is not None:
        t, clients = order
        for value in total.values():
            value.zero_()
        pipe.send(_share(loop, server, total, clients, t))


def flower(settings: Experiment, rounds: int, folder: Path) -> list[float]:
    """Seconds of each round of Flower's own simulation.

    Its Ray backend, one message a client, FedAvg over NumPy arrays.
    """
    file = folder / "settings.json"
    file.write_text(settings.model_dump_json())
    program = [sys.executable, "-m", "benchmarks.flower_simulation"]
    environment = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_DEDUP_LOGS": "0",
    }
    done = subprocess.run(
        [*program, str(file), str(rounds)],
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
    settings: Experiment, rounds: int, engines: dict[str, list[str]], cores: int = CORES
) -> Seconds:
    """Seconds of fedcore's engines and the plain loops, in alternating order.

    `engines` has the settings of each by its label.
    """
    loops = [loop_for(changed(settings, more)) for more in engines.values()]
    plain = [Plain(settings, processes) for processes in dict.fromkeys((1, cores))]
    contenders: dict[str, Callable[[], float]] = {}
    for one in plain:
        processes = max(len(one.pipes), 1)
        label = f"plain loop, {processes} core{'s' * (processes > 1)}"
        contenders[label] = one.round
    for label, loop in zip(engines, loops, strict=True):
        contenders[label] = partial(one_round, loop)
    for run in contenders.values():
        run()  # warms up, and measures chunks
    seconds: Seconds = {name: [] for name in contenders}
    for i in range(max(rounds // 2, 1)):
        for name in sorted(contenders, reverse=bool(i % 2)):
            run = contenders[name]
            run()  # untimed: caches and threads are as the one before left them
            seconds[name] += [run(), run()]
    for loop in loops:
        loop.close()
    for one in plain:
        one.close()
    return seconds


def take_others(settings: Experiment, rounds: int, without: list[str]) -> Seconds:
    """Seconds of pfl and of Flower, whose first rounds start processes."""
    seconds: Seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "pfl" not in without:
            for processes in dict.fromkeys((1, CORES)):
                label = f"pfl 0.6.0, {processes} process{'es' * (processes > 1)}"
                seconds[label] = pfl(settings, rounds + 1, folder, processes)[1:]
        if "Flower" not in without:
            seconds[FLOWER] = flower(settings, 4, folder)[1:]
    return seconds


def models(rounds: int, names: list[str], without: list[str]) -> dict[str, Any]:
    """The main comparison: even clients, cohort 100 of 1 000."""
    engines = {"sequential": ["engine.name=sequential"], "vectorised": []}
    for label in without:
        engines.pop(label, None)
    results: dict[str, Any] = {}
    for model in names:
        settings = experiment(*EVEN, *MODELS[model])
        is_light = model in ("logistic", "mlp")
        timed = rounds if is_light else max(rounds // 3, 4)
        seconds = take_turns(settings, timed, engines)
        if "ray" not in without:
            # After the others: its cluster's own processes are never idle.
            with engine(settings, "engine.name=ray") as loop:
                times = [one_round(loop) for _ in range(timed)]
            seconds[f"ray, {CORES} workers"] = times
        if model in OTHERS:
            seconds |= take_others(settings, timed, without)
        cohort = settings.model_dump()["participation"]["cohort"]
        results[model] = {"cohort": cohort, "rounds": summary(seconds)}
        show(TITLES[model], results[model]["rounds"], cohort)
    return results


def summary(seconds: Seconds) -> Summary:
    rows: Summary = {}
    for name, times in seconds.items():
        rows[name] = {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "max_s": max(times),
            "rounds": len(times),
        }
    return rows


def show(title: str, rows: Summary, cohort: int) -> None:
    """A table, with the ratio of every contender's median to that of `vectorised`."""
    reference = rows["vectorised"]["median_s"]
    print(
        f"\n{title}\n"
        "| | s a round, median (min to max) | clients/s | times `vectorised` |\n"
        "|---|---|---|---|"
    )
    for name, row in rows.items():
        median = row["median_s"]
        times = f"{median:.3f} ({row['min_s']:.3f} to {row['max_s']:.3f})"
        speed, ratio = f"{cohort / median:,.0f}", f"{median / reference:.2f}"
        print(f"| {name} | {times} | {speed} | {ratio} |", flush=True)


def cohorts(rounds: int) -> dict[str, Any]:
    """The MLP with 10, 100 and 1 000 of 1 000 clients."""
    results = {}
    for cohort in (10, 100, 1000):
        settings = experiment(*EVEN, f"participation.cohort={cohort}")
        timed = max(rounds // 3 if cohort > 100 else rounds, 4)
        rows = summary(take_turns(settings, timed, {"vectorised": []}))
        results[str(cohort)] = rows
        show(f"MLP, cohort {cohort}", rows, cohort)
    return results


def ragged(rounds: int) -> dict[str, Any]:
    """Clients of log-normal sizes, cohort 100; and the share of steps that pad."""
    results = {}
    for model in ("logistic", "mlp"):
        settings = experiment("partition.name=size_skew", *MODELS[model])
        rows = summary(take_turns(settings, rounds, {"vectorised": []}))
        with engine(settings) as loop:
            padding = _padding(loop)
        results[model] = {"rounds": rows, "padding": padding}
        share = f"{padding:.1%} of the steps of `vectorised` are padding"
        show(f"{model}, log-normal sizes; {share}", rows, 100)
    return results


def _padding(loop: Loop) -> float:
    """Share of the local steps of ten rounds that are padding."""
    vectorised = loop.engine
    assert isinstance(vectorised, Vectorised)
    train = loop.method.train  # type: ignore[attr-defined]
    done = needed = 0
    for t in range(10):
        cohort, _ = loop.process.sample(t, {})
        for chunk in vectorised.chunks(train, cohort.numpy()):
            steps = vectorised.work.steps(train, np.array(chunk))
            done += int(steps.max()) * len(chunk)
            needed += int(steps.sum())
    return 1 - needed / done


def overhead(rounds: int, without: list[str]) -> dict[str, Any]:
    """Clients that do nothing: milliseconds a client, and seconds of a large cohort."""
    method = "method.name=benchmarks.engines:Noop"
    results: dict[str, Any] = {}
    for size, more in NOTHING.items():
        settings = experiment(method, *EVEN, *more)
        milliseconds: dict[str, float] = {}
        for name in ("sequential", "vectorised"):
            with engine(settings, f"engine.name={name}") as loop:
                milliseconds[name] = median_round(loop, rounds) / 100 * 1e3
        if "Flower" not in without:
            with tempfile.TemporaryDirectory() as folder:
                times = flower(settings, 3, Path(folder))[1:]
            milliseconds[FLOWER] = statistics.median(times) / 100 * 1e3
        results[size] = milliseconds
        rounded = {name: round(value, 3) for name, value in milliseconds.items()}
        title = f"clients that do nothing, {size} parameters, ms a client:"
        print(f"\n{title}", rounded)
    many = ["population=10000", "participation.cohort=1000"]
    with engine(experiment(method, *EVEN, *NOTHING["60k"], *many)) as loop:
        seconds = median_round(loop, rounds)
    results["cohort 1000 of 10000, s"] = seconds
    print(
        f"cohort 1 000 of 10 000, clients that do nothing: {seconds:.3f} s a round",
        flush=True,
    )
    return results


def registered(rounds: int) -> dict[str, Any]:
    """A round of cohort 100 with 1 000 and with 100 000 registered clients, in turns.

    On the synthetic task; and the start-up.
    """
    loops: dict[int, Loop] = {}
    start_s: dict[str, float] = {}
    seconds: Seconds = {"1000": [], "100000": []}
    task = ["task=least-squares", "method.local_lr=0.01"]
    for population in (1_000, 100_000):
        begin = time.perf_counter()
        loops[population] = loop_for(experiment(*task, f"population={population}"))
        one_round(loops[population])
        start_s[str(population)] = time.perf_counter() - begin
    for i in range(2 * rounds):
        for population in sorted(loops, reverse=bool(i % 2)):
            seconds[str(population)].append(one_round(loops[population]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["100000"] / medians["1000"]
    print(
        f"\na round with 100 000 registered clients: {ratio:.2f} x one with 1 000; "
        f"start-up {start_s['100000']:.1f} s",
        flush=True,
    )
    return {"round_s": medians, "ratio": ratio, "start_s": start_s}


def start() -> dict[str, float]:
    """Seconds to the end of the first round in a new process, imports left out.

    With nothing in the cache, and again.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("chunk sizes measured, partition made", "from the cache"):
            done = subprocess.run(
                [sys.executable, "-c", START],
                env={**os.environ, "XDG_CACHE_HOME": cache},
                cwd=ROOT.parent,
                capture_output=True,
                text=True,
                check=True,
            )
            seconds[name] = float(done.stdout.split()[-1])
    rounded = {name: round(value, 2) for name, value in seconds.items()}
    print("\nMLP, to the end of the first round, s:", rounded, flush=True)
    return seconds


def draw(results: dict[str, Any], file: Path) -> None:
    """Clients per second of every contender, by model, on a logarithmic axis."""
    # Here, so that no process that is timed loads them.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedcore.views.figures import SERIES, STYLE, svg
    from fedcore.views.page import THEME

    names: dict[str, None] = {}  # in their order
    for result in results.values():
        names |= dict.fromkeys(result["rounds"])
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            places: list[float] = []
            speeds: list[float] = []
            for i, result in enumerate(results.values()):
                if name in result["rounds"]:
                    places.append(i + (number - len(names) / 2) * 0.1)
                    median = result["rounds"][name]["median_s"]
                    speeds.append(result["cohort"] / median)
            color = SERIES[number % len(SERIES)]
            axes.bar(places, speeds, 0.09, color=color, label=name)
        axes.set(
            yscale="log",
            ylabel="clients per second",
            xticks=range(len(results)),
            xticklabels=list(results),
        )
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        file.write_text(svg(figure, transparent=False, facecolor=THEME["card"][0]))


def main() -> None:
    parts = ["models", "cohorts", "ragged", "overhead", "registered", "start"]
    known = ", ".join(parts)
    every_model = list(MODELS)
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{known}; default: all"
    )
    parser.add_argument("--model", nargs="+", choices=every_model, default=every_model)
    parser.add_argument(
        "--without", nargs="+", default=[], help="Flower, pfl, sequential, ray"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(
            f"no such part: {', '.join(sorted(unknown))}; expected some of {known}"
        )
    file = ROOT / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["machine"] = {
        "cpus": CORES,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(results["machine"])
    rounds, without = arguments.rounds, arguments.without
    runs: dict[str, Callable[[], Any]] = {
        "models": lambda: models(rounds, arguments.model, without),
        "cohorts": lambda: cohorts(rounds),
        "ragged": lambda: ragged(rounds),
        "overhead": lambda: overhead(rounds, without),
        "registered": lambda: registered(rounds),
        "start": start,
    }
    for part in arguments.parts or parts:
        results[part] = {**results.get(part, {}), **runs[part]()}  # models one by one
        file.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.picture and "models" in results:
        draw(results["models"], arguments.picture)


if __name__ == "__main__":
    main()
