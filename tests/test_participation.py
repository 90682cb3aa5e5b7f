"""The participation that a method is told of is the one that happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedcore.rounds.participation import answering
from tests.helpers import assert_close, loop_of, small


def test_known_rates_are_those_of_updates_that_arrive_after_dropouts(
    tmp_path: Path,
) -> None:
    """w <- w + 1/N sum delta_i / (p_i (1 - dropout)), over clients that answer."""
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
