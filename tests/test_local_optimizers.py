"""Local steps beyond SGD: those of torch.optim, padded, cut, rounded and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.local import LocalWork, local_sgd, steps_run_by
from fedcore.local_settings import LocalSettings
from fedcore.optimizers import Moments, Training
from fedcore.speed.recording import Recorder
from fedcore.task import Task
from fedcore.types import Batches, Params, Tree
from tests.helpers import assert_close, equal

STEPS, BATCH, FEATURES, CLASSES = 6, 5, 4, 3
LR = 0.05
ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.1}


def task_of(dtype: torch.dtype = torch.float64, **others: Any) -> Task:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)]
    model = nn.Sequential(*layers).to(dtype)
    rows = Examples(torch.zeros(1, FEATURES), torch.zeros(1, dtype=torch.int64))
    data = FederatedData(rows, rows, np.zeros(1, dtype=np.int64), np.array([0, 1]))
    return Task(model, data, **others)


def batches_of(dtype: torch.dtype = torch.float64, seed: int = 1) -> Batches:
    """Six steps, of which the third has two examples."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(STEPS, BATCH)
    mask[2, 2:] = 0
    x = torch.randn(STEPS, BATCH, FEATURES, generator=draw, dtype=dtype)
    return Batches(x, torch.randint(0, CLASSES, (STEPS, BATCH), generator=draw), mask)


def trained(
    task: Task,
    batches: Batches,
    local: dict[str, Any],
    t: float | None = 0,
    rounds: int = 1,
    moments: Moments | None = None,
    **hooks: Any,
) -> tuple[LocalWork, Moments | None]:
    """(the end of local training in round t, the moments that the client keeps)."""
    training = Training.of(LocalSettings(**local), rounds)
    assert training is not None
    params, now = task.init_params(), None if t is None else torch.tensor(float(t))
    with training.inside(task, now, moments) as session:
        work = local_sgd(task.loss, params, batches, hooks.pop("lr", LR), **hooks)
    return work, session.moments


def by_torch(
    task: Task,
    batches: Batches,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    clip: float | None = None,
) -> Params:
    """The parameters after the same steps of an optimizer of PyTorch."""
    variables = trees.map(lambda x: x.requires_grad_(), task.init_params())
    optimizer = make(list(variables.values()))
    for x, y, mask in trees.unbind(batches):
        optimizer.zero_grad()
        task.loss(variables, x, y, mask).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(list(variables.values()), clip)
        optimizer.step()
    done: Params = trees.map(torch.Tensor.detach, variables)
    return done


# The same steps as PyTorch's


@given(
    st.sampled_from([0.0, 0.9]),
    # With 0 a tiny gradient divides a large moment: rounding grows without bounds.
    st.sampled_from([0.5, 0.99, 0.9999]),
    st.sampled_from([1e-8, 1e-2]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 0.05, 100.0]),
)
@settings(max_examples=6)
def test_adamw_takes_the_steps_of_torch_optim(
    beta1: float, beta2: float, eps: float, decay: float, clip: float | None
) -> None:
    local = {
        "optimizer": "adamw",
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": decay,
        "clip": clip,
    }

    def make(variables: list[Tensor]) -> torch.optim.Optimizer:
        betas = (beta1, beta2)
        return torch.optim.AdamW(variables, LR, betas, eps, weight_decay=decay)

    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        task, batches = task_of(dtype), batches_of(dtype)
        found, _ = trained(task, batches, local)
        expected = by_torch(task, batches, make, clip)
        assert_close(found.params, expected, limit, f"AdamW in {dtype}")


def test_clipped_steps_are_those_of_clip_grad_norm() -> None:
    task, batches = task_of(), batches_of()

    def make(variables: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(variables, LR, momentum=0.9)

    for clip in (0.01, 0.3, 10.0):
        found, _ = trained(task, batches, {"clip": clip}, momentum=0.9)
        expected = by_torch(task, batches, make, clip)
        assert_close(found.params, expected, 1e-12, f"SGD clipped to {clip}")


def test_clipping_at_infinity_changes_no_bit() -> None:
    task, batches = task_of(torch.float32), batches_of(torch.float32)
    found, _ = trained(task, batches, {"clip": math.inf})
    plain = local_sgd(task.loss, task.init_params(), batches, LR)
    assert equal(found.params, plain.params)


def test_the_corrected_gradient_is_clipped_and_then_goes_to_the_optimizer() -> None:
    """One parameter of two numbers: gradient (1, 0), correction (2, 0), prox (0, 4)."""
    task = task_of()
    start = torch.zeros(2, dtype=torch.float64)
    center = {"w": torch.tensor([0.0, -4.0], dtype=torch.float64)}
    correction = {"w": torch.tensor([2.0, 0.0], dtype=torch.float64)}

    def loss(params: Params, x: Tree, y: Tensor, mask: Tensor) -> Tensor:
        return params["w"][0] * mask.mean()

    one = Batches(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    training = Training.of(LocalSettings(clip=1.0), 1)
    assert training is not None
    with training.inside(task, torch.tensor(0.0), None):
        done = local_sgd(
            loss, {"w": start}, one, 1.0, correction, prox=1.0, center=center
        )
    # (3, 4) has norm 5, so that a fifth of it is left.
    assert done.params["w"].tolist() == pytest.approx([-0.6, -0.8], abs=1e-6)


# Step sizes that change


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5, 0.0]),
    ],
)
def test_the_schedule_goes_over_the_rounds_of_the_run(
    schedule: str, shares: list[float]
) -> None:
    task, batches = task_of(), batches_of()
    first = trees.at(batches, slice(1))
    whole, _ = trained(task, first, {"clip": math.inf})
    start = task.init_params()
    for t, share in enumerate(shares):
        part, _ = trained(task, first, {"schedule": schedule}, t, rounds=4)
        step = trees.scale(trees.sub(whole.params, start), share)
        moved = trees.sub(part.params, start)
        assert_close(moved, step, 1e-12, f"{schedule} in round {t} of 4")
    tuned, _ = trained(task, first, {"schedule": schedule}, None, rounds=4)
    assert_close(tuned.params, whole.params, 1e-12, "fine-tuning has no schedule")


def test_a_warm_up_raises_the_step_size_step_by_step() -> None:
    task, batches = task_of(), batches_of()
    y = task.init_params()
    for i, batch in enumerate(trees.unbind(batches)):
        one = trees.map(lambda x: x[None], batch)
        y = local_sgd(task.loss, y, one, LR * min((i + 1) / 4, 1.0)).params
    found, _ = trained(task, batches, {"warmup": 4})
    assert_close(found.params, y, 1e-12, "a warm-up of 4 steps")


def test_a_step_size_a_parameter_follows_the_schedule_too() -> None:
    task, batches = task_of(), batches_of()
    sizes = {name: 0.01 * (i + 1) for i, name in enumerate(task.init_params())}
    halves = {name: size / 2 for name, size in sizes.items()}
    for optimizer in ({"optimizer": "adamw"}, {"clip": 1.0}):
        local = {**optimizer, "schedule": "linear"}
        found, _ = trained(task, batches, local, t=1, rounds=2, lr=sizes)
        expected, _ = trained(task, batches, optimizer, lr=halves)
        assert_close(found.params, expected.params, 1e-12, str(optimizer))


# Padding


@pytest.mark.parametrize(
    "local",
    [ADAMW, {**ADAMW, "clip": 0.1, "warmup": 4, "micro": 2}, {"warmup": 4, "micro": 3}],
    ids=["adamw", "all of it", "sgd"],
)
def test_padded_steps_change_neither_moments_nor_parameters(
    local: dict[str, Any],
) -> None:
    task, batches = task_of(torch.float32), batches_of(torch.float32)
    places = [1, 2, 4, 5, 6, 8]  # padding at the start, between, and at the end
    padded = trees.map(lambda x: x.new_zeros(10, *x.shape[1:]), batches)
    for whole, part in zip(trees.leaves(padded), trees.leaves(batches), strict=True):
        whole[places] = part
    moments = None
    if "optimizer" in local:
        local, moments = {**local, "moments": "kept"}, Moments.zero(task.init_params())
    plain = trained(task, batches, local, moments=moments)
    beside = trained(task, padded, local, moments=moments)
    assert equal(beside[0].params, plain[0].params)
    assert beside[0].steps == plain[0].steps == STEPS
    if plain[1] is not None:
        assert beside[1] is not None
        assert equal(beside[1], plain[1])
        assert plain[1].k == STEPS


def test_a_client_without_a_step_moves_nothing() -> None:
    task, batches = task_of(), batches_of()
    nothing = batches._replace(mask=torch.zeros(STEPS, BATCH))
    for none in (nothing, trees.at(batches, slice(0))):
        done, _ = trained(task, none, {**ADAMW, "warmup": 2, "clip": 1.0})
        assert equal(done.params, task.init_params())


# Moments that are kept


def test_kept_moments_are_those_of_one_long_training() -> None:
    task, batches = task_of(), batches_of()
    local = {"optimizer": "adamw", "moments": "kept", "warmup": 2}
    zero = Moments.zero(task.init_params())
    _, moments = trained(task, batches, local, moments=zero)
    assert moments is not None
    again, kept = trained(task, batches, local, t=1, moments=moments)
    fresh, _ = trained(task, batches, {"optimizer": "adamw", "warmup": 2}, t=1)
    assert kept is not None
    assert kept.k == 2 * STEPS
    difference = trees.sub(again.params, fresh.params)
    assert trees.dot(difference, difference) > 1e-6
    # The written recursion, from the moments of the round before.
    y, m, v = task.init_params(), moments.m, moments.v
    for i, (x, target, mask) in enumerate(trees.unbind(batches)):
        g = torch.func.grad(task.loss)(y, x, target, mask)
        k = STEPS + i + 1
        m = {name: 0.9 * m[name] + 0.1 * g[name] for name in g}
        v = {name: 0.99 * v[name] + 0.01 * g[name] ** 2 for name in g}
        lr = LR * min((i + 1) / 2, 1.0)
        for name in g:
            root = (v[name] / (1 - 0.99**k)).sqrt() + 1e-8
            y[name] = y[name] - lr * m[name] / (1 - 0.9**k) / root
    assert_close(again.params, y, 1e-11, "the second round")


def test_moments_of_a_bfloat16_model_are_float32() -> None:
    task, batches = task_of(torch.bfloat16), batches_of(torch.bfloat16)
    zero = Moments.zero(task.init_params())
    local = {"optimizer": "adamw", "moments": "kept"}
    done, moments = trained(task, batches, local, moments=zero)
    assert {x.dtype for x in trees.leaves(done.params)} == {torch.bfloat16}
    assert {x.dtype for x in trees.leaves(moments)} == {torch.float32}


# Pieces, and rounded products


@given(st.integers(2, 7), st.booleans(), st.sampled_from([{}, ADAMW]))
@settings(max_examples=8)
def test_a_batch_in_pieces_takes_the_step_of_the_whole(
    micro: int, has_sizes: bool, local: dict[str, Any]
) -> None:
    def size(y: Tensor) -> Tensor:
        return (y + 0.5).double()

    task = task_of(size=size if has_sizes else None)
    batches = batches_of()
    pieces, _ = trained(task, batches, {**local, "micro": micro})
    whole, _ = trained(task, batches, {**local, "clip": math.inf})
    assert_close(pieces.params, whole.params, 1e-12, f"{micro} pieces")
    assert float(pieces.loss) == pytest.approx(float(whole.loss), abs=1e-12)


def test_bfloat16_rounds_the_products_and_nothing_else() -> None:
    seen = set()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    task, batches = task_of(torch.float32, loss=loss), batches_of(torch.float32)
    done, _ = trained(task, batches, {"precision": "bfloat16"})
    assert seen == {torch.bfloat16}
    plain = local_sgd(task.loss, task.init_params(), batches, LR)
    assert {x.dtype for x in trees.leaves(done)} == {torch.float32}
    start = task.init_params()
    expected = trees.ravel(trees.sub(plain.params, start))
    off = trees.ravel(trees.sub(done.params, plain.params)).norm() / expected.norm()
    assert 1e-5 < off < 0.02


# Recorded


@pytest.mark.parametrize(
    "local",
    [
        ADAMW,
        {"clip": 0.2},
        {**ADAMW, "clip": 0.2, "schedule": "cosine", "warmup": 3, "micro": 2},
        {"schedule": "linear", "warmup": 3, "micro": 3},
        {"precision": "bfloat16"},
    ],
    ids=["adamw", "clip", "all of adamw", "all of sgd", "bfloat16"],
)
def test_recorded_steps_are_those_that_are_written(local: dict[str, Any]) -> None:
    is_rounded = "precision" in local
    dtype = torch.float32 if is_rounded else torch.float64
    task = task_of(dtype)
    several = trees.stack([batches_of(dtype, seed) for seed in (1, 2, 3)])
    several.mask[0, 4:] = 0  # a client that ends early
    recorder = Recorder("the loss")
    for t in range(3):

        def client(batches: Batches, t: int = t) -> Tree:
            return trained(task, batches, local, t, rounds=5)[0]

        expected = [client(trees.at(several, i)) for i in range(3)]
        with steps_run_by(recorder):
            alone = [client(trees.at(several, i)) for i in range(3)]
            found = vmap(client)(several)
        limit = 2e-3 if is_rounded else 1e-11
        what = f"{local} in round {t}"
        assert_close(trees.stack(alone), trees.stack(expected), limit, what)
        assert_close(found, trees.stack(expected), limit, what)
    recordings = list(recorder._recordings.values())
    assert all(recording.code is not None for recording in recordings)
    # The first step and the others, alone and batched: nothing anew in later rounds.
    assert len(recordings) == 4
