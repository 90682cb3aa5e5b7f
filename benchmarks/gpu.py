"""Clients per second on a GPU, against a plain PyTorch loop on it.

`python -m benchmarks.gpu`: the models of `benchmarks.engines` with 1 000 even clients.
Prints the device, a table for each model and cohort, and the cost of a client that does
nothing.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.engines import (
    EVEN,
    MODELS,
    NOTHING,
    TITLES,
    engine,
    experiment,
    one_round,
    show,
    summary,
    take_turns,
)

COHORTS = {"resnet": (10, 100), "vit": (100,)}  # of the others: 100 and 1 000
ON_GPU = "engine.device=cuda"


def compare(model: str, cohort: int, rounds: int) -> None:
    """Print the table of one model and cohort."""
    settings = (*EVEN, *MODELS[model], f"participation.cohort={cohort}", ON_GPU)
    torch.cuda.reset_peak_memory_stats()
    times = take_turns(experiment(*settings), rounds, {"vectorised": []}, cores=1)
    peak = torch.cuda.max_memory_allocated() / 1e9
    memory = f"at most {peak:.1f} GB of GPU memory"
    title = f"{TITLES[model]}; {cohort} clients a round, {memory}"
    show(title, summary(times), cohort)


def time_nothing(size: str, rounds: int) -> None:
    """Print the cost of clients that do nothing with a model of this size."""
    method = "method.name=benchmarks.engines:Noop"
    with engine(experiment(method, *EVEN, *NOTHING[size], ON_GPU)) as loop:
        seconds = statistics.median(one_round(loop) for _ in range(rounds))
    milliseconds = 10 * seconds  # a client of 100
    print(
        f"\nclients that do nothing, {size} parameters: {milliseconds:.3f} ms a client"
    )


def main() -> None:
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=list(MODELS)
    )
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no CUDA device here; these tables need one. "
            "On CPUs: python -m benchmarks.engines"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for model in arguments.model:
        for cohort in COHORTS.get(model, (100, 1000)):
            compare(model, cohort, arguments.rounds)
    for size in NOTHING:
        time_nothing(size, arguments.rounds)


if __name__ == "__main__":
    main()
