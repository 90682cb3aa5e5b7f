"""Trees, splits, random numbers, local training: each against plain arithmetic."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedcore
from fedcore import Experiment, trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.run_client import run_client
from fedcore.errors import SettingsError, TooFewReports
from fedcore.local import full_gradient, local_sgd
from fedcore.metrics import squared_error
from fedcore.reports import Reports, RunningSum, Weight, by_examples, equally
from fedcore.rng import rng, seed_of, streams, torch_seed
from fedcore.rounds.participation import (
    Bernoulli,
    Cyclic,
    Markov,
    Trace,
    Uniform,
    answering,
)
from fedcore.split import split
from fedcore.storage.checkpoint import Checkpoint
from fedcore.storage.rows import ROWS, StateStore
from fedcore.task import Task
from fedcore.types import Batches, Model, Stateless


def params(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 2, generator=g),
        "a.bias": torch.randn(3, generator=g),
        "b": torch.randn((), generator=g),
    }


# Trees


def test_flatten_names_every_leaf_and_unflatten_is_its_inverse() -> None:
    tree = (Model(params()), {"x": torch.ones(2)})
    flat = trees.flatten(tree)
    assert list(flat)[:2] == ["0/params/a.weight", "0/params/a.bias"]
    again = trees.unflatten(flat, tree)
    assert all(
        torch.equal(x, y)
        for x, y in zip(trees.leaves(again), trees.leaves(tree), strict=True)
    )
    assert list(trees.flatten(torch.ones(1))) == [""]


def reports(values: list[float], counts: list[float]) -> Reports:
    return Reports(
        torch.arange(len(values)),
        Model({"w": torch.tensor(values)[:, None]}),
        torch.tensor(counts),
    )


def mean_of(groups: list[Reports], weight: Weight) -> float:
    total = RunningSum()
    for group in groups:
        total.add(group, weight(group.clients, group.num_examples))
    value: float = total.mean(dict).value.params["w"].item()
    return value


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_the_weighted_mean_is_the_same_however_reports_are_grouped(
    pairs: list[tuple[float, int]], size: int
) -> None:
    values, counts = [v for v, _ in pairs], [float(n) for _, n in pairs]
    groups = [
        reports(values[i : i + size], counts[i : i + size])
        for i in range(0, len(values), size)
    ]
    by_size, alike = mean_of(groups, by_examples), mean_of(groups, equally)
    assert by_size == pytest.approx(np.average(values, weights=counts), abs=1e-4)
    assert alike == pytest.approx(np.mean(values), abs=1e-4)


def test_a_mean_over_nobody_is_refused() -> None:
    with pytest.raises(TooFewReports):
        mean_of([], equally)
    with pytest.raises(TooFewReports):
        mean_of([reports([1.0], [0.0])], by_examples)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_finite_finds_what_is_not(bad: float) -> None:
    tree = {"a": torch.zeros(4, 3), "n": torch.ones(4, dtype=torch.int64)}
    assert bool(trees.finite(tree))
    tree["a"][2, 1] = bad
    assert not bool(trees.finite(tree))
    assert trees.row_sums(tree).isfinite().tolist() == [True, True, False, True]
    assert trees.row_sums(trees.at(tree, slice(2, 3))).isfinite().tolist() == [False]
    assert trees.row_sums({"n": torch.ones(3, dtype=torch.int64)}).tolist() == []
    second = {"a": torch.zeros(2, 3), "b": torch.tensor([0.0, bad])}
    assert trees.row_sums(second).isfinite().tolist() == [True, False]
    large = {
        "a": torch.full((2, 100_000), 2.0, dtype=torch.half)
    }  # whose sum no half can hold
    assert bool(trees.finite(large))
    assert trees.row_sums(large).isfinite().tolist() == [True, True]


def test_axpy_takes_numbers_and_tensors() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([10.0, 20.0])}
    assert trees.axpy(-2.0, a, b)["w"].tolist() == [8.0, 16.0]
    assert trees.axpy(torch.tensor(0.5), a, b)["w"].tolist() == [10.5, 21.0]


# Split


@given(st.sets(st.sampled_from(["a.weight", "a.bias", "b"])))
def test_a_split_is_total_and_disjoint(personal: set[str]) -> None:
    p = params()
    shared, own = split(p, map(re.escape, personal))
    assert set(own) == personal
    assert shared.keys() | own.keys() == p.keys()
    assert not shared.keys() & own.keys()
    assert [name for name in p if name in shared] == list(shared)


# Random numbers


def test_generators_are_named_and_independent_of_the_global_one() -> None:
    torch.manual_seed(1)
    a = rng(0, "batches", 3, 7).random(4)
    torch.manual_seed(2)
    assert np.array_equal(a, rng(0, "batches", 3, 7).random(4))
    others = [
        rng(1, "batches", 3, 7),
        rng(0, "noise", 3, 7),
        rng(0, "batches", 7, 3),
        rng(0, "batches", 3),
    ]
    assert all(not np.array_equal(a, other.random(4)) for other in others)
    assert 0 <= seed_of(0, "x", 1) < 2**63


@given(
    st.integers(0, 2**70),
    st.lists(st.tuples(*3 * [st.integers(0, 2**32 - 1)]), min_size=1, max_size=4),
)
def test_many_generators_at_once_draw_what_each_draws_alone(
    seed: int, ids: list[tuple[int, ...]]
) -> None:
    for columns in (1, 3):  # fewer and more words than NumPy's seeding mixes at once
        rows = np.array(ids, dtype=np.int64)[:, :columns]
        for row, draw in zip(
            rows.tolist(), streams(seed, "batches", rows), strict=True
        ):
            alone = rng(seed, "batches", *row)
            assert draw.permutation(9).tolist() == alone.permutation(9).tolist()
            assert draw.random() == alone.random()


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_that_many_generators_cannot_have_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        next(streams(0, "batches", np.array([[0, bad]])))


def test_torch_seed_puts_the_global_generator_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch_seed(0, "init"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with torch_seed(0, "init"):
        assert torch.equal(torch.rand(3), first)


# Local training


def quadratic(
    p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return (0.5 * (x @ p["w"] - y).square() * mask).sum() / mask.sum().clamp(min=1)


def test_local_sgd_with_its_hooks_is_the_written_out_recursion() -> None:
    g = np.random.default_rng(0)
    x, y, w0, c = (
        g.standard_normal((3, 4, 2)),
        g.standard_normal((3, 4)),
        g.standard_normal(2),
        g.standard_normal(2),
    )
    mask = np.ones((3, 4))
    mask[1, 2:] = 0
    mask[2] = 0
    w = w0.copy()
    losses = []
    for k in (0, 1):
        n = int(mask[k].sum())
        r = x[k, :n] @ w - y[k, :n]
        losses.append(0.5 * np.mean(r**2))
        w = w - 0.1 * (x[k, :n].T @ r / n + c + 0.3 * (w - w0))
    batches = Batches(*(torch.tensor(v, dtype=torch.float64) for v in (x, y, mask)))
    done = local_sgd(
        quadratic,
        {"w": torch.tensor(w0)},
        batches,
        0.1,
        {"w": torch.tensor(c)},
        prox=0.3,
    )
    assert done.params["w"].tolist() == pytest.approx(w.tolist(), abs=1e-12)
    assert done.steps.item() == 2
    assert done.loss.item() == pytest.approx(np.mean(losses))


def test_the_full_gradient_weighs_every_example_the_same() -> None:
    g = np.random.default_rng(1)
    x, y, w = (
        g.standard_normal((2, 3, 2)),
        g.standard_normal((2, 3)),
        g.standard_normal(2),
    )
    mask = np.array([[1.0, 1, 1], [1, 0, 0]])
    rows, targets = np.concatenate([x[0], x[1, :1]]), np.concatenate([y[0], y[1, :1]])
    batches = Batches(*(torch.tensor(v, dtype=torch.float64) for v in (x, y, mask)))
    gradient, value = full_gradient(quadratic, {"w": torch.tensor(w)}, batches)
    assert gradient["w"].tolist() == pytest.approx(
        (rows.T @ (rows @ w - targets) / 4).tolist()
    )
    assert value.item() == pytest.approx(0.5 * np.mean((rows @ w - targets) ** 2))


def test_a_client_whose_work_is_not_finite_keeps_its_old_state() -> None:
    def fn(task, t, down, state, batches):  # type: ignore[no-untyped-def]
        return {"w": torch.tensor([torch.nan])}, {"c": state["c"] + 1}

    up, state = run_client(
        fn, None, torch.tensor(0.0), None, {"c": torch.tensor([4.0])}, None
    )  # type: ignore[arg-type]
    assert torch.isnan(up["w"]).all()
    assert state["c"].tolist() == [4.0]


# Participation


def no_counts() -> np.ndarray:
    raise AssertionError("this process does not need labels")


def test_uniform_cohorts_have_their_size_and_no_client_twice() -> None:
    process = Uniform(cohort=7).process(30, 0, no_counts)
    cohorts = [process.sample(t, {})[0] for t in range(400)]
    assert all(
        len(set(c.tolist())) == 7 and c.tolist() == sorted(c.tolist()) for c in cohorts
    )
    share = np.bincount(torch.cat(cohorts).numpy(), minlength=30) / 400
    assert share.min() > 0.15
    assert share.max() < 0.32  # 7/30 = 0.233, standard deviation 0.021


def test_bernoulli_takes_each_client_at_its_own_rate() -> None:
    p = (0.1, 0.5, 1.0)
    process = Bernoulli(p=p).process(3, 0, no_counts)
    taken = np.zeros(3)
    for t in range(4000):
        taken[process.sample(t, {})[0].numpy()] += 1
    assert taken / 4000 == pytest.approx(p, abs=0.03)


def test_markov_has_the_long_run_rate_and_the_memory_of_the_reference() -> None:
    process: Any = Markov(p=(0.1, 0.02, 1.0), q=0.05).process(3, 0, no_counts)
    assert process.enter == pytest.approx([0.05, 1 / 49, 0.05])
    assert process.leave == pytest.approx([0.45, 1.0, 0.0])
    state, seen = process.start(), np.zeros((20000, 3))
    for t in range(20000):
        cohort, state = process.sample(t, state)
        seen[t, cohort.numpy()] = 1
    assert seen.mean(0) == pytest.approx([0.1, 0.02, 1.0], abs=0.02)
    centred = seen[:, 0] - seen[:, 0].mean()
    assert (centred[1:] * centred[:-1]).mean() / centred.var() == pytest.approx(
        1 - 0.05 - 0.45, abs=0.05
    )


def test_markov_participation_is_stationary_from_the_first_round() -> None:
    process = Markov(mean=0.3).process(20_000, 0, no_counts)
    cohort, _ = process.sample(0, process.start())
    assert len(cohort) / 20_000 == pytest.approx(0.3, abs=0.015)


def test_a_fraction_of_the_population_is_not_cut_by_rounding() -> None:
    assert [
        len(Uniform(fraction=f).process(100, 0, no_counts).sample(0, {})[0])
        for f in (0.29, 0.57, 0.055)
    ] == [29, 57, 5]


def test_rates_are_those_at_which_clients_come() -> None:
    for settings in (
        Uniform(cohort=3),
        Bernoulli(mean=0.3),
        Markov(mean=0.3, q=0.2),
        Cyclic(mean=0.3, cycle=10),
    ):
        process = settings.process(10, 0, no_counts)
        state, came = process.start(), np.zeros(10)
        for t in range(4000):
            cohort, state = process.sample(t, state)
            came[cohort.numpy()] += 1
        assert process.rates is not None
        assert came / 4000 == pytest.approx(process.rates, abs=0.04), settings.name


def test_cyclic_clients_come_in_one_block_a_cycle() -> None:
    process = Cyclic(p=(0.1, 0.5), cycle=20).process(2, 0, no_counts)
    seen = np.zeros((200, 2), dtype=int)
    for t in range(200):
        seen[t, process.sample(t, {})[0].numpy()] = 1
    for client, active in ((0, 2), (1, 10)):
        first = int(seen[:, client].argmax())
        assert all(seen[s : s + 20, client].sum() == active for s in range(first, 180))


def test_rates_follow_the_class_mix_as_in_fedau() -> None:
    counts = np.eye(4, dtype=int) * 5  # client n holds class n alone
    rates = Bernoulli(mean=0.1, alpha=0.1, floor=0.0).rates(4, 3, lambda: counts)
    assert (
        rates.mean() == pytest.approx(0.1) or rates.max() == 1.0
    )  # class-balanced: the mean is `mean`, unless clipped
    assert (
        Bernoulli(mean=0.1, alpha=0.1, floor=0.02).rates(4, 3, lambda: counts).min()
        >= 0.02
    )


def test_dropout_takes_its_share_and_is_the_same_each_time() -> None:
    cohort = torch.arange(5000)
    left = answering(cohort, 0.3, 0, 4)
    assert len(left) / 5000 == pytest.approx(0.7, abs=0.03)
    assert torch.equal(left, answering(cohort, 0.3, 0, 4))
    assert not torch.equal(left, answering(cohort, 0.3, 0, 5))


def test_a_trace_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("2 0\n\n1\n")
    process = Trace(file=file).process(3, 0, no_counts)
    assert [process.sample(t, {})[0].tolist() for t in range(3)] == [[0, 2], [], [1]]
    with pytest.raises(SettingsError, match="3 lines"):
        process.check(4)
    file.write_text("0 9\n")
    with pytest.raises(SettingsError, match="line 1"):
        Trace(file=file).process(3, 0, no_counts)
    with pytest.raises(SettingsError, match="No such file"):
        Trace(file=tmp_path / "none").process(3, 0, no_counts)


# Client state


def test_state_is_kept_by_commit_and_forgotten_by_rollback(tmp_path: Path) -> None:
    store = StateStore({"c": torch.zeros(2)}, 10**6, lambda: tmp_path)
    store.put([5], {"c": torch.ones(1, 2)})
    assert store.get(5)["c"].tolist() == [1, 1]
    store.rollback()
    assert store.get(5)["c"].tolist() == [0, 0]
    store.put([5, 9], {"c": torch.tensor([[1.0, 2], [3, 4]])})
    store.commit()
    assert store.gather([9, 7, 5])["c"].tolist() == [[3, 4], [0, 0], [1, 2]]


@pytest.mark.parametrize("ram", [10**9, 0], ids=["memory", "mapped files"])
def test_a_store_is_the_same_in_memory_and_in_files_and_after_a_checkpoint(
    ram: int, tmp_path: Path
) -> None:
    initial = {"c": torch.zeros(3), "n": torch.zeros((), dtype=torch.int64)}
    store = StateStore(initial, ram, lambda: tmp_path)
    clients = rng(0, "ids").permutation(1000)[: 3 * ROWS + 5].tolist()
    for i in clients:
        store.put([i], {"c": torch.full((1, 3), float(i)), "n": torch.tensor([i])})
    store.commit()
    assert (len(list(tmp_path.iterdir())) > 0) == (ram == 0)
    saved = dict(store.save_blocks())
    other = StateStore(initial, 10**9, lambda: tmp_path)
    other.load(store.clients(), saved.__getitem__)
    for s in (store, other):
        assert s.gather(clients)["n"].tolist() == clients
        assert s.get(1001)["n"].item() == 0
    assert StateStore(Stateless(), ram, lambda: tmp_path).is_stateless


def test_a_store_is_saved_whole_whichever_blocks_its_rows_move_to(
    tmp_path: Path,
) -> None:
    """Rounds of any size move rows up and down the blocks.

    A checkpoint takes over the blocks that did not change.
    """
    store = StateStore(
        {"n": torch.zeros((), dtype=torch.int64)}, 10**9, lambda: tmp_path
    )
    checkpoint, expected = Checkpoint(tmp_path), dict[int, int]()
    random = rng(0, "ids")
    for t in range(40):
        cohort = random.choice(
            200, int(random.choice([1, 20, 200])), replace=False
        ).tolist()
        store.put(cohort, {"n": torch.full((len(cohort),), t)})
        if t % 7 == 3:
            store.rollback()
            continue
        store.commit()
        expected |= dict.fromkeys(cohort, t)
        keep = {str(n) for n in store.in_use() if n not in store.changed}
        checkpoint.save(
            t,
            {"clients": store.clients()},
            ((str(n), block) for n, block in store.save_blocks()),
            keep,
        )
        store.saved()
        other = StateStore(store.initial, 10**9, lambda: tmp_path)
        other.load(checkpoint.read()["clients"], lambda n: checkpoint.part(str(n)))
        assert {i: int(other.get(i)["n"]) for i in expected} == expected
    assert len(store.blocks) <= 8, "rows are used again"


def test_the_version_is_the_one_in_pyproject() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["version"] == fedcore.__version__


# Settings


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["engine.name=vectorised"], {"engine": {"device": "cpu", "workers": 2}}),
        (["engine.name=grid"], {"engine": {"rejoin_timeout": 60.0}}),
        (["participation.name=uniform"], {"participation": {"cohort": 10}}),
        (["options.name=foo"], {"options": {"base": "x", "name": "foo"}}),
        (
            ["method.mu=0.5", "method=fedprox"],
            {"method": {"mu": 0.5, "name": "fedprox"}},
        ),
        (
            ["participation.fraction=0.5"],
            {"participation": {"cohort": None, "fraction": 0.5}},
        ),
        (["local.steps=5"], {"local": {"steps": 5}}),
        (
            ["participation.name=bernoulli"],
            {"participation": {"name": "bernoulli", "mean": 0.1}},
        ),
    ],
    ids=str,
)
def test_choosing_a_kind_drops_only_the_settings_of_another_kind(
    overrides: list[str], kept: dict[str, dict[str, Any]]
) -> None:
    values = {
        "method": {"name": "fedavg"},
        "engine": {"device": "cpu", "workers": 2, "rejoin_timeout": 60},
        "participation": {"cohort": 10},
        "local": {"epochs": 3},
        "options": {"base": "x"},
    }
    found = Experiment.parse(values, overrides).model_dump(mode="json")
    for section, expected in kept.items():
        assert expected.items() <= found[section].items()


# Tasks


def test_a_task_whose_parts_do_not_fit_is_refused_by_name() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    data = FederatedData(
        Examples(x, y), Examples(x, y), np.arange(4), np.array([0, 2, 4])
    )
    line = torch.nn.Linear(3, 1)
    with pytest.raises(SettingsError, match=r"the loss gives shape \(4, 1\)"):
        Task(line, data, loss=lambda outputs, y: (outputs - y) ** 2, metrics={}).check()
    with pytest.raises(SettingsError, match=r"cannot take examples of shape \(3,\)"):
        Task(torch.nn.Linear(4, 1), data, loss=squared_error, metrics={}).check()
    with pytest.raises(SettingsError, match='the metric "odd" cannot take'):
        Task(
            line,
            data,
            loss=squared_error,
            metrics={"odd": lambda outputs, y: outputs @ y},
        ).check()
    with pytest.raises(SettingsError, match='metrics holds "loss"'):
        Task(line, data, loss=squared_error, metrics={"loss": squared_error})
    Task(line, data, loss=squared_error, metrics={}).check()
