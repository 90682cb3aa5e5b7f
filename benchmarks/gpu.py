"""Clients per second on a GPU, against a plain PyTorch loop on it: `python -m benchmarks.gpu`.

The models of `benchmarks.engines`, cohorts of 100 and 1 000 of 1 000 even clients, of ResNet-18 10 and 100. Prints the device, and
a table for each.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.engines import EVEN, MODELS, TITLES, engine, experiment, one_round, show, summary, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=6)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here; these tables need one. On CPUs: python -m benchmarks.engines")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for model in a.model:
        for cohort in (10, 100) if model == "resnet" else (100, 1000):
            e = experiment(*EVEN, *MODELS[model], f"participation.cohort={cohort}", "engine.device=cuda")
            torch.cuda.reset_peak_memory_stats()
            rows = summary(take_turns(e, a.rounds, {"vectorised": []}, cores=1))
            peak = torch.cuda.max_memory_allocated() / 1e9
            show(f"{TITLES[model]}; {cohort} clients a round, at most {peak:.1f} GB of GPU memory", rows, cohort)
    with engine(experiment("method.name=benchmarks.engines:Noop", *EVEN, "model.hidden=[76]", "engine.device=cuda")) as loop:
        print(f"\nclients that do nothing, 60 000 parameters: {min(one_round(loop) for _ in range(a.rounds)) * 10:.3f} ms a client")


if __name__ == "__main__":
    main()
