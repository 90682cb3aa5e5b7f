"""The participation that a method is told of is the one that happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcore.rounds.participation import answering
from tests.helpers import assert_close, loop_of, small


def test_known_rates_are_those_of_updates_that_arrive_after_dropouts(
    tmp_path: Path,
) -> None:
    """w <- w + 1/N sum_i delta_i / (p_i (1 - dropout)), over the clients that answer."""
    rates = np.linspace(0.3, 0.9, 12)
    dropout = 0.4
    process = {"name": "bernoulli", "p": rates.tolist(), "dropout": dropout}
    e = small("fedavg", method__weighting="known", participation=process)
    loop = loop_of(e, tmp_path)
    cohort, _ = loop.process.sample(0, {})
    arrived = answering(cohort, dropout, e.seed, 0)
    assert 1 < len(arrived) < len(cohort)
    method: Any = loop.method
    server = loop.state.server
    expected = {name: x.double() for name, x in server.params.items()}
    for report in loop.engine.each(method.train, arrived, server, 0):
        for row, client in enumerate(report.clients.tolist()):
            share = 1 / (12 * rates[client] * (1 - dropout))
            for name, delta in report.up.delta.items():
                expected[name] = expected[name] + share * delta[row].double()
    loop.round()
    assert_close(loop.state.server.params, expected, 1e-6, "w_1")


def test_updates_arrive_at_the_known_rates(tmp_path: Path) -> None:
    process = {"name": "bernoulli", "mean": 0.5, "dropout": 0.4}
    loop = loop_of(small("fedavg", participation=process), tmp_path)
    assert loop.rates is not None
    rounds = 2000
    count = torch.zeros(12)
    for t in range(rounds):
        cohort, _ = loop.process.sample(t, {})
        count[answering(cohort, 0.4, loop.e.seed, t)] += 1
    error = (count / rounds - loop.rates).abs()
    deviation = (loop.rates * (1 - loop.rates) / rounds).sqrt()
    assert bool((error < 4 * deviation).all())
