"""Laws of the long run: ages, and who is heard how often. Specification (f) 6, 7, 11.

Tolerances come from the sample: the standard error of means over batches of updates,
which have more to do with each other than single answers have.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedcore.clock.queue import Queue, Update
from fedcore.clock.settings import Buffered
from tests.helpers import slow

SECOND = 1_000_000
BATCHES = 20
ERRORS = 4  # standard errors that an estimate may be off by


def run(queue: Queue, number: int, scale: np.ndarray, spread: str) -> list[Update]:
    """Updates with durations of mean `scale` [population], in seconds."""
    draw = np.random.default_rng(5)

    def work(clients: np.ndarray) -> np.ndarray:
        n = len(clients)
        factor = np.ones(n)
        if spread == "exponential":
            factor = draw.exponential(1.0, n)
        if spread == "lognormal":
            factor = draw.lognormal(-0.5, 1.0, n)
        durations: np.ndarray = np.rint(SECOND * scale[clients] * factor)
        return durations.astype(np.int64) + 1

    return [queue.advance(t, work) for t in range(number)]


def ages_of(updates: list[Update], first: int = 0) -> np.ndarray:
    """tau of every answer, [updates after the first ones, K]."""
    rows = []
    for t, update in enumerate(updates):
        rows.append([t - item.version for item, _ in update.arrived])
    return np.array(rows[first:])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """(mean of values [updates, ...], its standard error) from means over batches."""
    size = len(values) // BATCHES
    batches = values[: size * BATCHES].reshape(BATCHES, -1).mean(1)
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(BATCHES))


def close(values: np.ndarray, expected: float, most: float) -> None:
    """The mean is as expected, and the sample is large enough to tell."""
    mean, error = mean_and_error(values)
    assert error < most
    assert abs(mean - expected) < ERRORS * error, (mean, expected, error)


# P(tau = 0) of (M, K), as the specification has it.
FRESH = {(4, 1): 0.25, (10, 5): 0.2629, (30, 10): 0.1662}


@pytest.mark.parametrize(("concurrency", "buffer"), FRESH)
def test_the_law_of_ages_of_work_that_takes_an_exponential_time(
    concurrency: int, buffer: int
) -> None:
    stays = 1 - 1 / concurrency
    exact = np.mean([1 - stays**j for j in range(1, buffer + 1)])
    assert exact == pytest.approx(FRESH[concurrency, buffer], abs=5e-5)

    population = 20 * concurrency
    schedule = Buffered(buffer=buffer, concurrency=concurrency)
    queue = Queue(schedule, population, seed=2)
    updates = run(queue, 8000 // buffer, np.ones(population), "exponential")
    ages = ages_of(updates, first=200 // buffer)
    close(ages == 0, float(exact), most=0.012)
    # The mean is (M - 1) / K whatever the durations.
    close(ages, (concurrency - 1) / buffer, most=0.03 * concurrency / buffer)
    # tau = floor((u + g) / K): u is uniform on 0 ... K - 1, g geometric.
    for tau in range(1, 6):
        law = 0.0
        for u, rest in itertools.product(range(buffer), range(buffer)):
            g = tau * buffer + rest - u
            law += (1 - stays) * stays**g / buffer
        close(ages == tau, law, most=0.012)


@pytest.mark.parametrize("spread", ["constant", "lognormal"])
def test_the_mean_age_does_not_depend_on_the_durations(spread: str) -> None:
    scale = np.random.default_rng(1).lognormal(0, 1.5, 200)
    queue = Queue(Buffered(buffer=5, concurrency=10), population=200, seed=2)
    ages = ages_of(run(queue, 1500, scale, spread))
    # What is returned and what is still out have aged 9 a answer together, so that the
    # mean is below 9 / 5 by the share of the work in flight alone, and by what is lost
    # in rounding down.
    assert ages.mean() == pytest.approx(1.8, rel=0.02)


def mean_field(durations: np.ndarray, concurrency: int) -> float:
    """w with sum_i d_i / (w + d_i) = M: seconds that a client waits for work."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if (durations / (middle + durations)).sum() > concurrency:
            low = middle
        else:
            high = middle
    return low


def shares_of_fifths(counts: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """Share of the answers from each fifth of the clients, the slowest first."""
    slowest_first = np.argsort(-durations, kind="stable")
    fifths: np.ndarray = counts[slowest_first].reshape(5, -1).sum(1) / counts.sum()
    return fifths


@pytest.mark.parametrize(("concurrency", "buffer"), [(10, 5), slow(30, 10)])
def test_clients_are_heard_at_the_rates_of_the_mean_field(
    concurrency: int, buffer: int
) -> None:
    """1 / (w + d_i), and updates a second with it."""
    durations = 1 + 5 * np.random.default_rng(0).lognormal(0, 1.0, 100)
    schedule = Buffered(buffer=buffer, concurrency=concurrency)
    queue = Queue(schedule, population=100, seed=3)
    number = 10_000 // buffer
    updates = run(queue, number, durations, "constant")
    counts = np.zeros(100)
    for update in updates:
        for item, _ in update.arrived:
            counts[item.client] += 1
    rates = 1 / (mean_field(durations, concurrency) + durations)
    expected = shares_of_fifths(rates, durations)
    # A share of 10 000 answers is off by sqrt(0.16 / 10000) = 0.004 at most by chance;
    # the mean field by some 1 / N.
    assert shares_of_fifths(counts, durations) == pytest.approx(expected, abs=0.01)
    speed = number / (updates[-1].now / SECOND)
    assert speed == pytest.approx(rates.sum() / buffer, rel=0.02)


def test_few_at_work_are_heard_alike_and_all_at_work_by_their_speed() -> None:
    durations = np.random.default_rng(0).lognormal(0, 1.0, 100)
    few = Queue(Buffered(buffer=1, concurrency=1), population=100, seed=3)
    counts = np.zeros(100)
    for update in run(few, 4_000, durations, "constant"):
        counts[update.arrived[0].item.client] += 1
    # 40 each, with a standard deviation of 6.3.
    assert abs(counts - 40).max() < 28
    everybody = Queue(Buffered(buffer=1, concurrency=100), population=100, seed=3)
    updates = run(everybody, 2_000, durations, "constant")
    end = updates[-1].now
    counts = np.zeros(100)
    for update in updates:
        counts[update.arrived[0].item.client] += 1
    # w = 0: nobody waits, so that each is back once in its own duration.
    own = np.rint(SECOND * durations) + 1
    assert abs(counts - end / own).max() <= 1
