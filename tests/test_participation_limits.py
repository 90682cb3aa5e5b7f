"""Methods for unequal participation in their limits, with clients that train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import intervals, trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.metrics import squared_error
from fedcore.rng import rng
from fedcore.rounds.loop import run
from fedcore.task import Task
from tests.helpers import assert_close, loop_of, slow, small
from tests.participation import (
    ALL,
    QUICK,
    RARE,
    RATES,
    SOME,
)

ENGINES = ["sequential", slow("vectorised")]


End = Callable[..., Tensor]


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> End:
    """The model after ten rounds. No experiment is run twice."""
    ends: dict[str, Tensor] = {}

    def of(name: str, participation: dict[str, Any], **settings: Any) -> Tensor:
        values = {"rounds": 10, **QUICK, **settings}
        e = small(name, participation=participation, **values)
        key = e.to_toml()
        if key not in ends:
            ends[key] = run(e, tmp_path_factory.mktemp("run") / "r").params["weight"]
        return ends[key]

    return of


def assert_same(a: Tensor, b: Tensor, engine: str, what: str) -> None:
    if engine == "sequential":
        gap = (a - b).abs().max().item()
        assert torch.equal(a, b), f"{what}: differ by {gap:.1e}, not the same bits"
    assert_close(a, b, 1e-6, what)


def on(engine: str) -> dict[str, Any]:
    if engine == "vectorised":
        return {"engine__name": engine, "engine__chunk": 4}
    return {"engine__name": engine}


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_zero_is_fedavg_with_known_rates(
    end: End, engine: str
) -> None:
    expected = end("fedavg", SOME, method__weighting="known", **on(engine))
    assert_same(
        end("fedstale", SOME, method__beta=0.0, method__rates="known", **on(engine)),
        expected,
        engine,
        "beta 0",
    )
    assert (
        expected - end("fedavg", SOME, method__weighting="all", **on(engine))
    ).abs().max() > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_one_is_fedvarp_with_known_rates(
    end: End, engine: str
) -> None:
    expected = end("fedvarp", SOME, method__weighting="known", **on(engine))
    assert_same(
        end("fedstale", SOME, method__beta=1.0, method__rates="known", **on(engine)),
        expected,
        engine,
        "beta 1",
    )
    assert (
        expected
        - end("fedstale", SOME, method__beta=0.0, method__rates="known", **on(engine))
    ).abs().max() > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_zero_and_estimated_rates_is_fedau(
    end: End, engine: str
) -> None:
    for cutoff in ({}, {"method__cutoff": 2}):
        expected = end("fedau", SOME, **cutoff, **on(engine))
        assert_same(
            end("fedstale", SOME, method__beta=0.0, **cutoff, **on(engine)),
            expected,
            engine,
            f"beta 0, {cutoff}",
        )


UNIFORM = {"name": "uniform", "cohort": 5}


@pytest.mark.parametrize("engine", ENGINES)
def test_fedstale_with_beta_one_is_fedvarp_for_uniform_cohorts(
    end: End, engine: str
) -> None:
    fedstale = end(
        "fedstale", UNIFORM, method__beta=1.0, method__rates="known", **on(engine)
    )
    assert_close(fedstale, end("fedvarp", UNIFORM, **on(engine)), 1e-6, "q = M / N")


PROCESSES: dict[str, dict[str, Any]] = {
    "bernoulli": SOME,
    "rare": RARE,
    "markov": {"name": "markov", "p": RATES, "q": 0.3},
    "cyclic": {"name": "cyclic", "mean": 0.3, "cycle": 6},
    "uniform": UNIFORM,
    "dropout": {"name": "uniform", "dropout": 0.5},
}


@pytest.mark.parametrize(
    "process",
    ["markov", "dropout", *map(slow, ("bernoulli", "rare", "cyclic", "uniform"))],
)
def test_fedau_with_cutoff_one_is_fedavg_over_all_whoever_comes(
    end: End, process: str
) -> None:
    expected = end(
        "fedavg", PROCESSES[process], method__weighting="all", method__server_lr=1.3
    )
    assert_same(
        end("fedau", PROCESSES[process], method__cutoff=1, method__server_lr=1.3),
        expected,
        "sequential",
        process,
    )


@pytest.mark.slow
def test_fedau_with_cutoff_one_is_fedavg_over_all_batched(end: End) -> None:
    expected = end("fedavg", SOME, method__weighting="all", **on("vectorised"))
    assert_same(
        end("fedau", SOME, method__cutoff=1, **on("vectorised")),
        expected,
        "vectorised",
        "cut-off 1",
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_when_everybody_comes_fedau_is_fedavg(end: End, engine: str) -> None:
    expected = end("fedau", ALL, **on(engine))
    for weighting in ("participating", "all", "known"):
        assert_same(
            end("fedavg", ALL, method__weighting=weighting, **on(engine)),
            expected,
            engine,
            weighting,
        )
    for cutoff in (1, 3):
        assert_same(
            end("fedau", ALL, method__cutoff=cutoff, **on(engine)),
            expected,
            engine,
            f"cut-off {cutoff}",
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "weighting"),
    [("mifa", None), ("fedvarp", "participating"), ("fedvarp", "known")],
)
def test_when_everybody_comes_memory_changes_only_rounding(
    end: End, name: str, weighting: str | None, engine: str
) -> None:
    options = {} if weighting is None else {"method__weighting": weighting}
    fedavg = end("fedavg", ALL, method__weighting="participating", **on(engine))
    assert_close(end(name, ALL, **options, **on(engine)), fedavg, 1e-6, name)


def uneven(e: Experiment) -> Task:
    """Least squares, twelve clients with 1 to 9 examples each."""
    sizes = np.array([1, 9, 4, 2, 7, 3, 3, 8, 1, 5, 6, 2])
    draw, n = rng(e.seed, "uneven"), sizes.sum()
    x = draw.standard_normal((n, 3), dtype=np.float32)
    w = np.repeat(
        draw.standard_normal((len(sizes), 3), dtype=np.float32), sizes, axis=0
    )
    examples = Examples(
        torch.from_numpy(x), torch.from_numpy((x * w).sum(1, keepdims=True))
    )
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = FederatedData(examples, examples, np.arange(n), np.cumsum([0, *sizes]))
    return Task(model, data, loss=squared_error, metrics={})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rates", ["known", "estimated"])
def test_when_everybody_comes_fedstale_is_fedavg_by_examples_for_every_beta(
    end: End, rates: str, engine: str
) -> None:
    """Up to rounding: beta H and the beta h_i cancel, but in float32."""
    task = {"task": f"{__name__}:uneven", "options": {}, **on(engine)}
    fedavg = end("fedavg", ALL, method__weighting="examples", **task)
    assert (
        fedavg - end("fedavg", ALL, method__weighting="all", **task)
    ).abs().max() > 0.01
    for beta in (0.0, 0.3, 1.0):
        found = end(
            "fedstale",
            ALL,
            method__weights="examples",
            method__beta=beta,
            method__rates=rates,
            **task,
        )
        assert_close(found, fedavg, 1e-6, f"beta {beta}")


def test_fedstale_sends_what_fedavg_sends_and_remembers_one_model_a_client_and_one_more(
    tmp_path: Path,
) -> None:
    fedstale = run(small("fedstale", participation=SOME, **QUICK), tmp_path / "a")
    fedavg = run(small("fedavg", participation=SOME, **QUICK), tmp_path / "b")
    for key in ("cohort", "bytes_down", "bytes_up"):
        assert [row[key] for row in fedstale.history] == [
            row[key] for row in fedavg.history
        ], key
    assert fedstale.bytes_up > 0
    loop = loop_of(
        small("fedstale", participation=ALL, rounds=2, **QUICK), tmp_path / "c"
    )
    loop.run()
    n, d, server = 12, 5, loop.state.server
    numbers = len(loop.memory.row_of) * sum(
        x.numel() for x in trees.leaves(loop.memory.initial)
    )
    numbers += (
        sum(x.numel() for x in trees.leaves(server) if x.is_floating_point()) - d
    )  # less the model itself
    integers = [x.numel() for x in trees.leaves(server) if not x.is_floating_point()]
    loop.close()
    assert (numbers, integers) == ((n + 1) * d, [n, n])


def test_clients_late_gone_and_never_seen_in_a_recorded_trace(
    tmp_path: Path, end: End
) -> None:
    """Client 0 always, 1 from round 100 on, 2 in rounds 0 and 101, 3 never."""
    lines = [
        " ".join(
            str(i)
            for i, here in enumerate([True, t >= 100, t in (0, 101), False])
            if here
        )
        for t in range(103)
    ]
    file = tmp_path / "trace.txt"
    file.write_text("\n".join(lines) + "\n")
    options = {"population": 4, "rounds": 103, "local__batch_size": 11}
    trace = {"name": "trace", "file": str(file)}
    fedavg = end("fedavg", trace, method__weighting="all", **options)
    assert torch.equal(end("fedau", trace, method__cutoff=1, **options), fedavg)
    assert (end("fedau", trace, **options) - fedavg).abs().max() > 1e-3

    # Intervals: of client 1 101, 1, 1, or 50, 50, 1, 1, 1;
    # of client 2 1, 101, or 1, 50, 50, 1.
    for cutoff, weights in (
        (None, (1, 103 / 3, 102 / 2, 1)),
        (50, (1, 103 / 5, 102 / 4, 50)),
    ):
        settings = {} if cutoff is None else {"method__cutoff": cutoff}
        loop = loop_of(
            small("fedau", participation=trace, **options, **QUICK, **settings),
            tmp_path / str(cutoff),
        )
        loop.run()
        loop.close()
        found = intervals.omega(
            loop.state.server.intervals, torch.arange(4), 103, cutoff
        )
        assert found.tolist() == list(weights)
