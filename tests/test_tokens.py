"""Means over tokens, perplexity formed once, an ordered holdout, a hash of the base."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedcore import (
    Examples,
    FederatedData,
    Metric,
    Task,
    trees,
)
from fedcore.data.federated import LocalSettings
from fedcore.frozen import frozen_sha256
from fedcore.local import full_gradient
from fedcore.models.norms import personal_batch_norm
from fedcore.ratio_metrics import RatioMetric
from fedcore.rounds.loop import run
from fedcore.speed.recording import Recorder
from fedcore.token_metrics import (
    next_token_loss,
    num_targets,
    perplexity,
)
from fedcore.types import Batches, Params
from tests.helpers import loop_of
from tests.measured import assert_same_measures
from tests.tokens import (
    L,
    Tokens,
    accuracy_by_hand,
    held_rows,
    language,
    nll_by_hand,
    settings,
    windows,
)

# The oracle: one token at 2 nats, three tokens at 1 nat


class Given(nn.Module):
    """Gives logits by which the target of row 0 costs 2 nats, those of row 1 one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, nats: Tensor) -> Tensor:
        likely = -nats
        other = torch.log1p(-likely.exp())
        return torch.stack([likely, other], -1) + self.shift


def oracle() -> Task:
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    y = torch.tensor([[0, -100, -100], [0, 0, 0]])
    rows = Examples(x, y)
    holders = np.array([0, 1]), np.array([0, 1, 2])
    return Task(
        Given(), FederatedData(rows, rows, *holders), next_token_loss, size=num_targets
    )


def test_a_mean_is_over_tokens_and_perplexity_is_formed_once() -> None:
    task = oracle()
    params, (x, y) = task.init_params(), task.data.test
    assert next_token_loss(task.predict(params, x), y).tolist() == pytest.approx([2, 1])
    ones = torch.ones(2)
    assert task.loss(params, x, y, ones).item() == pytest.approx(1.25)
    assert task.num_examples(np.array([0, 1]), "train").tolist() == [1, 3]
    for batch_size in (1, 2, 1000):
        tested = task.test(params, batch_size)
        assert tested["loss"] == pytest.approx(1.25)
        assert tested["perplexity"] == pytest.approx(3.4903, abs=5e-5)
    by_client = []
    for i in range(2):
        batches = Batches(x[None, i : i + 1], y[None, i : i + 1], ones[None, :1])
        states = task.evaluate(params, batches)
        by_client.append(task.set_metrics["perplexity"].value(states))
    assert np.mean(by_client) == pytest.approx(5.0537, abs=5e-5)  # never shown


def test_a_run_measures_tokens_of_all_clients_of_the_test_set_and_of_others(
    tmp_path: Path,
) -> None:
    experiment = settings()
    result = run(experiment, tmp_path / "run")
    task = language(experiment)
    data, final = task.data, result.final
    for kind, rows in (
        ("test", data.test),
        ("unseen", task.extra_tests["unseen"]),
        ("client", held_rows(data)),
    ):
        nats = nll_by_hand(task, result.params, rows)
        table = torch.tensor([1, 2, 3, 1, 0])
        characters = int(table[rows.y[rows.y >= 0]].sum())
        expected = {
            "loss": np.mean(nats),
            "perplexity": math.exp(np.mean(nats)),
            "nats_a_character": np.sum(nats) / characters,
            "token_accuracy": accuracy_by_hand(task, result.params, rows),
        }
        for name, value in expected.items():
            found = final[f"{kind}_{name}"]
            if kind == "client":
                found = found["pooled"]
            assert found == pytest.approx(value, rel=1e-5), (kind, name)
    assert final["measures"]["perplexity"] == "lower"
    assert final["measures"]["nats_a_character"] == "lower"


@pytest.mark.parametrize(
    "engine",
    [
        {"engine__name": "vectorised", "engine__chunk": 2},
        {"engine__name": "vectorised", "engine__chunk": 5},
        pytest.param({"engine__name": "ray"}, marks=pytest.mark.slow),
    ],
)
def test_every_engine_weighs_by_tokens(engine: dict[str, Any], tmp_path: Path) -> None:
    one = run(settings(), tmp_path / "one")
    other = run(settings(**engine), tmp_path / "other")
    for name, value in one.params.items():
        assert torch.allclose(value, other.params[name], atol=1e-6)
    for name in ("test_perplexity", "unseen_perplexity"):
        assert other.final[name] == pytest.approx(one.final[name], rel=1e-5)
    assert_same_measures(one, other)


def test_processes_change_no_bit(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        torch.set_num_threads(processes)
        e = settings(
            engine__name="vectorised", engine__chunk=1, participation__cohort=5
        )
        loop = loop_of(e, tmp_path / f"{processes}")
        try:
            loop.engine.choices["processes"] = 2
            result = loop.run()
            assert loop.engine.processes == processes  # type: ignore[attr-defined]
        finally:
            loop.close()
            torch.set_num_threads(1)
        for row in result.history:
            assert row["cohort"] == 5
        found.append((result.params_sha256, result.final))
    assert found[0] == found[1]


def test_the_loss_is_recorded() -> None:
    task = language()
    params = trees.map(lambda p: p.expand(3, *p.shape), task.init_params())
    x, y = trees.map(lambda v: v[:12].view(3, 4, -1), tuple(task.data.test))
    ones = torch.ones(3, 4)

    def step(inputs: tuple[Params, Tensor, Tensor, Tensor]) -> Any:
        return grad_and_value(task.loss)(*inputs)

    recorder = Recorder("the loss")
    given = (params, x, y, ones)
    for _ in range(3):
        found = vmap(lambda *one: recorder.run(step, "tokens", one, ()))(*given)
        torch.testing.assert_close(found, vmap(lambda *one: step(one))(*given))
    recordings = recorder._recordings.values()
    assert recordings
    assert all(recording.code is not None for recording in recordings)


# Data: an ordered holdout, batches, sizes


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    holdout=st.floats(0, 0.9),
    seed=st.integers(0, 99),
    ordered=st.booleans(),
)
@settings_of_tests(max_examples=40, deadline=None)
def test_a_clients_weight_is_the_sum_of_the_sizes_of_its_rows(
    sizes: list[int], holdout: float, seed: int, ordered: bool
) -> None:
    total = sum(sizes)
    rows = windows(max(total, 1), seed)
    order = np.random.default_rng(seed).permutation(total)
    offsets = np.cumsum([0, *sizes])
    data = FederatedData(rows, None, order, offsets, holdout, seed, ordered)
    task = Task(Tokens(), data, next_token_loss, size=num_targets)
    clients = np.arange(len(sizes))
    for kind in ("train", "test"):
        counts = []
        for client in clients:
            held = data.rows(client, kind)
            counts.append(int((rows.y[held] >= 0).sum()))
        assert task.num_examples(clients, kind).tolist() == counts
        again = pickle.loads(pickle.dumps(task))
        assert again.num_examples(clients, kind).tolist() == counts
    if ordered:
        for client in clients:
            kept = data.rows(client, "all")
            own = order[offsets[client] : offsets[client + 1]]
            assert kept.tolist() == own[: len(kept)].tolist()
            if holdout and data.held[client]:
                assert data.rows(client, "test").tolist() == own[len(kept) :].tolist()


def test_other_data_have_other_weights() -> None:
    task = language()
    assert task.num_examples(np.array([2]), "train") == num_targets(task.data.y[12:13])
    few = FederatedData(
        windows(4, seed=5), None, np.arange(4), np.array([0, 1, 2, 4]), ordered=True
    )
    other = task.with_data(few)
    expected = int(num_targets(few.y[2:]).sum())
    assert other.num_examples(np.array([2]), "train") == expected


def test_batches_of_an_evaluation_have_8192_targets_at_most() -> None:
    y = torch.zeros(200, 1000, dtype=torch.int64)
    rows = Examples(torch.zeros(200, 1), y)
    data = FederatedData(rows, rows, np.arange(200), np.array([0, 20, 200]))
    clients, local = np.array([0, 1]), LocalSettings()
    assert data.steps(clients, "test", local).tolist() == [3, 23]
    assert data.batches(clients, "test", local, 0, 0).mask.shape == (2, 23, 8)
    seen = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return outputs.sum(1)

    task = Task(nn.Linear(1, 1), data, loss, {})
    task.test(task.init_params())
    assert seen == [8] * 25


@given(seed=st.integers(0, 99))
@settings_of_tests(max_examples=20, deadline=None)
def test_the_loss_of_a_batch_is_that_of_a_loop_over_its_examples(seed: int) -> None:
    task, rows = language(), windows(5, seed)
    draw = np.random.default_rng(seed)
    mask = torch.from_numpy(draw.integers(0, 2, 5)).float()
    params = task.init_params()
    above, below = 0.0, 0
    for i in range(5):
        if mask[i]:
            one = Examples(rows.x[i : i + 1], rows.y[i : i + 1])
            nats = nll_by_hand(task, params, one)
            above, below = above + sum(nats), below + len(nats)
    found = task.loss(params, *rows, mask).item()
    assert found == pytest.approx(above / max(below, 1), rel=1e-5)
    batches = Batches(rows.x[None], rows.y[None], mask[None])
    measured = task.evaluate(params, batches)
    assert measured["loss"].item() == pytest.approx(found, rel=1e-5)


def test_a_full_gradient_is_that_of_all_tokens_in_one_batch() -> None:
    task = language()
    (x, y), params = task.data.test, task.init_params()
    mask = torch.ones(20)
    mask[-1] = 0
    whole, loss = grad_and_value(task.loss)(params, x[:20], y[:20], mask)
    five = trees.map(lambda v: v[:20].view(5, 4, *v.shape[1:]), (x, y, mask))
    found, value = full_gradient(task.loss, params, Batches(*five))
    assert torch.isclose(value, loss)
    for name, slope in whole.items():
        assert torch.allclose(found[name], slope, atol=1e-7)
    # A loss of one's own says how much examples count in it.
    own, batches = functools.partial(task.loss), Batches(*five)
    assert full_gradient(own, params, batches, task.weights)[1] == value
    assert not torch.isclose(full_gradient(own, params, batches)[1], loss)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    task = language()
    (x, y), params = task.data.test, task.init_params()
    other = torch.where(y >= 0, x, 0)
    assert bool((other != x).any())
    ones = torch.ones(len(y))
    slope, loss = grad_and_value(task.loss)(params, x, y, ones)
    again, same = grad_and_value(task.loss)(params, other, y, ones)
    assert torch.equal(loss, same)
    for name, value in slope.items():
        assert torch.equal(value, again[name])


def test_a_batch_without_targets_gives_0_and_moves_nothing() -> None:
    task = language()
    x = torch.zeros(2, L, dtype=torch.int64)
    y = torch.full((2, L), -100)
    slope, loss = grad_and_value(task.loss)(task.init_params(), x, y, torch.ones(2))
    assert loss == 0
    assert not any(bool(value.any()) for value in slope.values())
    states = task.evaluate(
        task.init_params(), Batches(x[None], y[None], y.new_ones(1, 2))
    )
    assert math.isnan(task.set_metrics["perplexity"].value(states))
    assert states["loss"] == 0


def test_sizes_may_be_below_1() -> None:
    task = language()
    task.size = lambda y: num_targets(y) / 100
    whole = language()
    params, (x, y) = task.init_params(), task.data.test
    found = task.loss(params, x[:2], y[:2], torch.ones(2))
    assert torch.isclose(found, whole.loss(params, x[:2], y[:2], torch.ones(2)))
    assert task.test(params)["loss"] == pytest.approx(whole.test(params)["loss"])


def test_perplexity_by_the_loss_is_that_of_its_own_sums() -> None:
    task = language()
    params, (x, y) = task.init_params(), task.data.test
    outputs, mask = task.predict(params, x), torch.ones(len(y))
    own = RatioMetric("perplexity", perplexity)
    with_loss = RatioMetric("perplexity", perplexity, next_token_loss)
    losses = next_token_loss(outputs, y)
    one = own.value(own.states(outputs, y, mask, losses))
    other = with_loss.value(with_loss.states(outputs, y, mask, losses))
    assert one == pytest.approx(other, rel=1e-6)
    halved = with_loss.states(outputs, y, mask, losses / 2)
    assert with_loss.value(halved) == pytest.approx(one**0.5, rel=1e-6)
    doubled = Metric(perplexity, outputs=lambda outputs: 2 * outputs)
    tempered = RatioMetric("perplexity", doubled, next_token_loss)
    found = tempered.value(tempered.states(outputs, y, mask, losses))
    expected = math.exp(
        nn.functional.cross_entropy(2 * outputs.transpose(1, 2), y).item()
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_perplexity_too_large_is_infinite() -> None:
    sums = {"p/numerator": torch.tensor(1e4), "p/denominator": torch.tensor(1.0)}
    assert RatioMetric("p", perplexity).value(sums) == math.inf


# What is frozen


def by_hand(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).partition(".")[2]
        digest.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_what_is_frozen_has_a_hash_and_what_is_trained_has_none() -> None:
    task = language()
    assert task.base_sha256 == ""
    model = Tokens()
    model.embedding.requires_grad_(False)
    model.register_buffer("table", torch.arange(3))
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    other = task.with_model(model)
    frozen = {"embedding.weight": model.embedding.weight, "table": torch.arange(3)}
    assert other.base_sha256 == by_hand(frozen)
    assert task.base_sha256 == ""  # of another model
    assert pickle.loads(pickle.dumps(other)).base_sha256 == other.base_sha256
    for change in ("byte", "trained", "scratch"):
        again = copy.deepcopy(model)
        if change == "byte":
            again.embedding.weight.view(torch.uint8)[0, 0] ^= 1
        elif change == "trained":
            again.head.bias.data += 1
        else:
            again.register_buffer("scratch", torch.zeros(2), persistent=False)
        is_same = task.with_model(again).base_sha256 == other.base_sha256
        assert is_same == (change != "byte")


def test_statistics_that_clients_keep_are_not_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), personal_batch_norm(nn.BatchNorm1d(2)))
    assert frozen_sha256(model) == ""
