"""Clients per second on a GPU, against a plain PyTorch loop on it: `python -m benchmarks.gpu`.

The models of `benchmarks.engines` with 1 000 even clients. Prints the device, a table for each model and cohort, and what a client
that does nothing costs.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=list(MODELS)
    )
    parser.add_argument("--rounds", type=int, default=6)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no CUDA device here; these tables need one. On CPUs: python -m benchmarks.engines"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for model in a.model:
        for cohort in COHORTS.get(model, (100, 1000)):
            e = experiment(
                *EVEN,
                *MODELS[model],
                f"participation.cohort={cohort}",
                "engine.device=cuda",
            )
            torch.cuda.reset_peak_memory_stats()
            rows = summary(take_turns(e, a.rounds, {"vectorised": []}, cores=1))
            peak = torch.cuda.max_memory_allocated() / 1e9
            show(
                f"{TITLES[model]}; {cohort} clients a round, at most {peak:.1f} GB of GPU memory",
                rows,
                cohort,
            )
    for size, settings in NOTHING.items():
        with engine(
            experiment(
                "method.name=benchmarks.engines:Noop",
                *EVEN,
                *settings,
                "engine.device=cuda",
            )
        ) as loop:
            seconds = statistics.median(one_round(loop) for _ in range(a.rounds))
            print(
                f"\nclients that do nothing, {size} parameters: {10 * seconds:.3f} ms a client"
            )


if __name__ == "__main__":
    main()
