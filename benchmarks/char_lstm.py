"""The character LSTM: FedAvg here, and LEAF's recipe as a plain loop.

python -m benchmarks.char_lstm [--rounds 30] [--seeds 3]

Both train LEAF's model (embedding 8, two LSTM layers of 256) on the clients of the task
`shakespeare`: 10 clients a round, one epoch in batches of 10 windows of 80 characters,
SGD. The loop is PyTorch alone, and draws clients and batches by itself, so the two are
compared by where they arrive: token accuracy on the clients' held-out text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment, Task, run

COHORT, BATCH, STEP = 10, 10, 0.8
SETTINGS = {
    "task": "shakespeare",
    "population": 50,
    "holdout": 0.2,
    "model.name": "char-lstm",
    "text.length": 80,
    "text.base": 0.5,
    "text.least": 2000,
    "participation.cohort": COHORT,
    "local.batch_size": BATCH,
    "local.epochs": 1,
    "method.local_lr": STEP,
    "evaluation.clients": 0,
    "evaluation.every": 1000,
}


def plain_loop(task: Task, rounds: int, seed: int) -> float:
    """FedAvg in a few lines of PyTorch; its token accuracy on the test set."""
    draw = np.random.default_rng(seed)
    model, data = task.model, task.data
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(rounds):
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        tokens = 0
        for client in draw.choice(data.population, COHORT, replace=False).tolist():
            rows = torch.from_numpy(data.rows(client, "train"))
            model.load_state_dict(start)
            _train(model, data.x[rows], data.y[rows], draw)
            num_tokens = int((data.y[rows] >= 0).sum())
            for name, value in model.state_dict().items():
                total[name] += num_tokens * value
            tokens += num_tokens
        start = {name: value / tokens for name, value in total.items()}
    model.load_state_dict(start)
    return _accuracy(model, *task.data.test)


def _train(model: nn.Module, x: Tensor, y: Tensor, draw: np.random.Generator) -> None:
    optimizer = torch.optim.SGD(model.parameters(), STEP)
    order = torch.from_numpy(draw.permutation(len(x)))
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        logits = model(x[batch])
        loss = functional.cross_entropy(logits.flatten(0, 1), y[batch].flatten())
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    hits = 0
    for start in range(0, len(x), 64):
        predicted = model(x[start : start + 64]).argmax(-1)
        hits += int((predicted == y[start : start + 64]).sum())
    return hits / int((y >= 0).sum())


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/char-lstm"))
    options = parser.parse_args()
    ours, plain = [], []
    for seed in range(options.seeds):
        settings = {**SETTINGS, "rounds": options.rounds, "seed": seed}
        experiment = Experiment.load("fedavg", settings)
        folder = options.out / f"{options.rounds}-{seed}"
        resume = folder if folder.is_dir() else None
        result = run(experiment, None if resume else folder, resume, progress=False)
        ours.append(100 * result.final["test_token_accuracy"])
        print(f"seed {seed}: fedcore {ours[-1]:.2f} %", file=sys.stderr)
        plain.append(100 * plain_loop(experiment.build_task(), options.rounds, seed))
        print(f"seed {seed}: plain loop {plain[-1]:.2f} %", file=sys.stderr)
    rows = [
        ["fedcore, FedAvg", mean_and_std(ours, ".2f")],
        ["plain loop", mean_and_std(plain, ".2f")],
        ["difference", f"{statistics.fmean(ours) - statistics.fmean(plain):+.2f}"],
    ]
    print_table(["", f"token accuracy %, {options.rounds} rounds"], rows)


if __name__ == "__main__":
    main()
