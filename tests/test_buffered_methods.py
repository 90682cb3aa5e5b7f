"""Methods under a buffered schedule: their papers' steps, on a schedule by hand.

Three clients with 2, 3 and 7 examples take one local step an example, one second each:
the durations of the worked table of docs/time.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.clock.arrivals import read_arrivals
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.rounds.loop import run
from fedcore.task import Task
from tests.helpers import loop_of, small

SIZES = (2, 3, 7)  # examples, local steps, and seconds, of each client
CENTRES = (1.0, -2.0, 4.0)  # c_i of its objective (x - c_i)^2 / 2
LR = 0.1

Schedule = list[list[tuple[int, int]]]  # (version, client) of every update
# K = 2 and K = 1, as they are worked out in docs/time.md.
PAIRS: Schedule = [
    [(0, 0), (0, 1)],
    [(1, 0), (1, 1)],
    [(0, 2), (2, 0)],
    [(2, 1), (3, 0)],
    [(3, 1), (4, 0)],
    [(2, 2), (5, 0)],
]
SINGLES: Schedule = [[(0, 0)], [(0, 1)], [(1, 0)], [(2, 1)], [(3, 0)], [(0, 2)]]
TIMES = {2: [3, 6, 8, 10, 12, 14], 1: [2, 3, 4, 6, 6, 7]}


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """(x - c)^2 / 2 of every example."""
    return (outputs - targets).square().flatten(1).sum(1) / 2


def pulls(settings: Experiment) -> Task:
    """One number, which client i pulls to c_i; it starts at 0."""
    sizes = settings.options.get("sizes", SIZES)
    centres = settings.options.get("centres", CENTRES)
    y = torch.tensor(np.repeat(centres, sizes), dtype=torch.float32)[:, None]
    examples = Examples(torch.ones_like(y), y)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    order, offsets = np.arange(len(y)), np.cumsum([0, *sizes])
    data = FederatedData(examples, examples, order, offsets)
    return Task(model, data, loss=half_square, metrics={})


def delta(client: int, x: float) -> float:
    """The change after one step of gradient descent an example, from x."""
    return ((1 - LR) ** SIZES[client] - 1) * (x - CENTRES[client])


def pulled(method: dict[str, Any], buffer: int, **schedule: Any) -> Experiment:
    return Experiment.parse(
        {
            "task": "tests.test_buffered_methods:pulls",
            "method": {"local_lr": LR, **method},
            "rounds": 6,
            "holdout": 0.0,
            "local": {"batch_size": 1, "epochs": 1},
            "clock": {"step_s": 1.0},
            "schedule": {
                "name": "buffered",
                "buffer": buffer,
                "concurrency": 3,
                **schedule,
            },
            "evaluation": {"clients": 0},
            "engine": {"name": "sequential"},
        }
    )


def values_of(experiment: Experiment, folder: Path) -> list[float]:
    """The number after every server update; the times are those of the table."""
    made = loop_of(experiment, folder)
    values = []
    for time_s in TIMES[experiment.schedule.buffer]:  # type: ignore[union-attr]
        row = made.round()
        assert row["time_s"] == time_s
        values.append(made.state.server.params["weight"].item())
    return values


def staleness(tau: int) -> float:
    return 1 / math.sqrt(1 + tau)


Weigh = Callable[[int, int], float]  # (tau, client) -> weight


def fedbuff(schedule: Schedule, weigh: Weigh, divisor: Weigh, eta: float) -> np.ndarray:
    """x += eta sum of weigh Delta / sum of divisor, the buffer's; x of every update."""
    x = [0.0]
    for t, buffer in enumerate(schedule):
        total = weight = 0.0
        for version, client in buffer:
            total += weigh(t - version, client) * delta(client, x[version])
            weight += divisor(t - version, client)
        x.append(x[t] + eta * total / weight)
    return np.array(x[1:])


def one(tau: int, client: int) -> float:
    return 1.0


def by_age(tau: int, client: int) -> float:
    return staleness(tau)


def by_examples(tau: int, client: int) -> float:
    return float(SIZES[client])


def by_both(tau: int, client: int) -> float:
    return SIZES[client] * staleness(tau)


@pytest.mark.parametrize("buffer", [1, 2])
@pytest.mark.parametrize(
    ("method", "schedule", "weigh", "divisor"),
    [
        ({"weighting": "participating"}, {}, by_age, one),
        ({"weighting": "participating"}, {"staleness": "constant"}, one, one),
        ({"weighting": "participating"}, {"normalise": "weights"}, by_age, by_age),
        ({"weighting": "examples"}, {}, by_both, by_examples),
        ({"weighting": "examples"}, {"normalise": "weights"}, by_both, by_both),
    ],
)
def test_fedbuff_is_its_equation(
    method: dict[str, Any],
    schedule: dict[str, Any],
    weigh: Weigh,
    divisor: Weigh,
    buffer: int,
    tmp_path: Path,
) -> None:
    settings = {"name": "fedavg", "server_lr": 0.7, **method}
    experiment = pulled(settings, buffer, **schedule)
    table = PAIRS if buffer == 2 else SINGLES
    expected = fedbuff(table, weigh, divisor, 0.7)
    np.testing.assert_allclose(values_of(experiment, tmp_path), expected, atol=2e-6)


def test_fedasync_is_its_equation_in_the_form_of_differences(tmp_path: Path) -> None:
    """x += alpha s(tau) Delta at every arrival, s(tau) = (1 + tau)^-a."""

    def polynomial(tau: int, client: int) -> float:
        return float((1 + tau) ** -0.3)

    method = {"name": "fedavg", "weighting": "participating", "server_lr": 0.6}
    experiment = pulled(method, 1, staleness="polynomial", a=0.3)
    expected = fedbuff(SINGLES, polynomial, one, 0.6)
    np.testing.assert_allclose(values_of(experiment, tmp_path), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["fedprox", "ditto"])
def test_methods_that_average_are_fedbuff_with_their_own_local_steps(
    name: str, tmp_path: Path
) -> None:
    method = {"name": name, **({"mu": 0.0} if name == "fedprox" else {})}
    experiment = pulled(method, 2)
    if name == "ditto":  # its clients train twice, in twice the time
        clock = {"clock": {"step_s": 0.5}}
        experiment = experiment.model_copy(update=clock)
    expected = fedbuff(PAIRS, by_both, by_examples, 1.0)
    np.testing.assert_allclose(values_of(experiment, tmp_path), expected, atol=2e-6)


def test_an_optimizer_of_the_server_steps_on_the_buffers_mean(tmp_path: Path) -> None:
    method = {"name": "fedopt", "optimizer": "adam", "server_lr": 0.3, "tau": 0.01}
    x, m, v = [0.0], 0.0, 0.01**2
    for t, buffer in enumerate(PAIRS):
        total = 0.0
        for version, client in buffer:
            weight = by_both(t - version, client)
            total += weight * delta(client, x[version])
        mean = total / sum(SIZES[client] for _, client in buffer)
        m = 0.9 * m + 0.1 * mean
        v = 0.99 * v + 0.01 * mean**2
        x.append(x[t] + 0.3 * m / (math.sqrt(v) + 0.01))
    found = values_of(pulled(method, 2), tmp_path)
    np.testing.assert_allclose(found, x[1:], atol=5e-6)


@pytest.mark.parametrize("buffer", [1, 2])
def test_fedvarp_on_a_buffer_is_ca2fl(buffer: int, tmp_path: Path) -> None:
    """x += eta (h + (1/K) sum_b (Delta_b - h_b)); then h_b <- Delta_b, and h again."""
    eta, x, h = 0.7, [0.0], np.zeros(3)
    for arrivals in PAIRS if buffer == 2 else SINGLES:
        changes = []
        for version, client in arrivals:
            changes.append((client, delta(client, x[version])))
        fresh = sum(change - h[client] for client, change in changes) / buffer
        x.append(x[-1] + eta * (h.mean() + fresh))
        for client, change in changes:
            h[client] = change
    experiment = pulled(
        {"name": "fedvarp", "server_lr": eta}, buffer, staleness="constant"
    )
    np.testing.assert_allclose(values_of(experiment, tmp_path), x[1:], atol=2e-6)


def test_mifa_with_a_buffer_of_one_is_ace(tmp_path: Path) -> None:
    """At each arrival h_i <- Delta_i, and x += eta h, the mean over all clients."""
    eta, x, h = 0.7, [0.0], np.zeros(3)
    for ((version, client),) in SINGLES:
        h[client] = delta(client, x[version])
        x.append(x[-1] + eta * h.mean())
    experiment = pulled({"name": "mifa", "server_lr": eta}, 1, staleness="constant")
    np.testing.assert_allclose(values_of(experiment, tmp_path), x[1:], atol=2e-6)


def test_a_client_twice_in_a_buffer_is_compared_with_its_first_update(
    tmp_path: Path,
) -> None:
    """CA2FL where a client brings an old version, and then the new one in time."""
    sizes, centres = [1, 1, 4, 6, 9], [1.0, -2.0, 4.0, 3.0, -5.0]
    eta, K, N = 0.7, 4, 5
    method = {"name": "fedvarp", "server_lr": eta}
    experiment = pulled(method, K, staleness="constant", concurrency=3)
    options = {"sizes": sizes, "centres": centres}
    result = run(
        experiment.model_copy(update={"rounds": 20, "options": options}), tmp_path
    )
    x, h, twice = [0.0], np.zeros(N), 0
    for arrivals in recorded(tmp_path):
        assert len(arrivals) == K
        twice += len({client for _, client in arrivals}) < K
        step, mean = 0.0, h.mean()
        for version, client in arrivals:  # by version, and then by client
            shrunk = (1 - LR) ** sizes[client] - 1
            change = shrunk * (x[version] - centres[client])
            step += (change - h[client]) / K
            h[client] = change
        x.append(x[-1] + eta * (mean + step))
    assert twice > 1
    assert result.params["weight"].item() == pytest.approx(x[-1], abs=2e-6)


def recorded(folder: Path) -> Schedule:
    """(version, client) of every update, as the run wrote them down."""
    by_update: dict[int, list[tuple[int, int]]] = {}
    for row in read_arrivals(folder).to_pylist():
        pair = (row["version"], row["client"])
        by_update.setdefault(row["update"], []).append(pair)
    return [sorted(by_update[update]) for update in sorted(by_update)]


@pytest.mark.parametrize(
    "name", ["fedopt", "fedprox", "fedalt", "pfedme"]
)  # the others: tests/test_buffer.py
def test_where_all_are_equally_fast_a_buffer_is_a_round(
    name: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "population": 12,
        "participation": {"name": "uniform", "cohort": 4},
        "local": {"batch_size": 4, "steps": 2},
        "rounds": 4,
        "engine": {"name": "sequential"},
    }
    plain = run(small(name, **settings), tmp_path / "plain")
    settings["clock"] = {"step_s": 1.0}
    settings["schedule"] = {"name": "buffered", "buffer": 4, "concurrency": 4}
    buffered = run(small(name, **settings), tmp_path / "buffered")
    assert buffered.params_sha256 == plain.params_sha256


@pytest.mark.parametrize("name", ["fedalt", "ditto", "pfedme"])
def test_personal_parts_follow_the_clients_own_last_work(
    name: str, tmp_path: Path
) -> None:
    """A client that was not back yet has the state that it had when it was asked."""
    settings: dict[str, Any] = {
        "population": 12,
        "local": {"batch_size": 4, "steps": 2},
        "rounds": 5,
        "clock": {"step_s": {"name": "lognormal", "median": 1.0}},
        "schedule": {"name": "buffered", "buffer": 2, "concurrency": 6},
        "engine": {"name": "sequential"},
    }
    made = loop_of(small(name, **settings), tmp_path)
    heard: set[int] = set()
    for _ in range(5):
        made.round()
    made.arrivals.write(5)
    for arrivals in recorded(tmp_path):
        heard.update(client for _, client in arrivals)
    assert set(made.stores["clients"].row_of) == heard


@pytest.mark.parametrize("name", ["fedavg", "fedvarp", "ditto"])
def test_who_drops_out_in_the_update_that_sent_the_model_is_no_answer(
    name: str, tmp_path: Path
) -> None:
    staleness = "constant" if name == "fedvarp" else "sqrt"
    schedule = {"name": "buffered", "buffer": 6, "concurrency": 6}
    experiment = small(
        name,
        population=24,
        participation={"name": "uniform", "dropout": 0.4},
        local={"batch_size": 4, "steps": 2},
        rounds=8,
        clock={"step_s": {"name": "lognormal", "median": 1.0}},
        schedule={**schedule, "staleness": staleness},
    )
    rows = run(experiment, tmp_path).history
    assert all(row["reports"] == 6 for row in rows)
    assert sum(row["dropped"].get("dropout", 0) for row in rows) > 8
