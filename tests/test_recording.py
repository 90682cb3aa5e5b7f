"""Recorded local steps: the numbers of steps that run as they are written.

Whatever the model, the hooks and the batching.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.chunks import PADDING, pack
from fedcore.local import local_sgd, steps_run_by
from fedcore.metrics import cross_entropy
from fedcore.models import Cnn, LeNet, Logistic, Mlp, ResNet, Vit
from fedcore.rounds.loop import run
from fedcore.speed.kernels.convolution import (
    convolutions,
    convolutions_backward,
    products,
    products_backward,
)
from fedcore.speed.kernels.unfolding import patches, patches_adjoint
from fedcore.speed.recording import Recorder
from fedcore.split import split
from fedcore.task import Task
from fedcore.types import Batches, Params, Tree
from tests.helpers import assert_close, loop_of, small

CLIENTS, STEPS, BATCH = 3, 3, 4
SHAPE = (1, 16, 16)
BUILDERS = [
    Logistic(),
    Mlp(hidden=(9, 7)),
    LeNet(),
    Cnn(kernel=3),
    ResNet(depth=10, width=8, groups=2),
    Vit(depth=1, patch=4),
]
HOOKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "prox and decay": {"prox": 0.3, "weight_decay": 0.01},
    "a step size a parameter": {"lr": True},
    "a step size that is a tensor": {"lr": torch.tensor(0.05, dtype=torch.float64)},
    "correction and center": {"correction": True, "center": True, "prox": 0.2},
}


def task_of(model: nn.Module) -> Task:
    rows = Examples(torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.int64))
    return Task(
        model, FederatedData(rows, rows, np.zeros(1, dtype=np.int64), np.array([0, 1]))
    )


def batches(dtype: torch.dtype = torch.float64) -> Batches:
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(CLIENTS, STEPS, BATCH, dtype=dtype)
    mask[0, 2], mask[1, 1, 2:] = (
        0,
        0,
    )  # a client that ends early, a batch that is not full
    x = torch.rand(CLIENTS, STEPS, BATCH, *SHAPE, generator=draw, dtype=dtype)
    return Batches(
        x, torch.randint(0, 10, (CLIENTS, STEPS, BATCH), generator=draw), mask
    )


def train(task: Task, params: Params, b: Batches, hooks: dict[str, Any]) -> Tree:
    more = dict(hooks)
    lr = more.pop("lr", 0.1)
    if lr is True:
        lr = {name: 0.02 * (i + 1) for i, name in enumerate(params)}
    for name in ("correction", "center"):
        if name in more:
            more[name] = trees.map(lambda x: 0.1 * x.sin() + 0.01, params)
    return local_sgd(task.loss, params, b, lr, **more)


CASES = [(model, "plain") for model in BUILDERS] + [
    (model, hooks) for model in BUILDERS[1:3] for hooks in HOOKS if hooks != "plain"
]


@pytest.mark.parametrize(
    ("settings", "hooks"), CASES, ids=lambda case: getattr(case, "name", case)
)
def test_a_recorded_step_computes_what_the_step_does(settings: Any, hooks: str) -> None:
    torch.manual_seed(0)
    task = task_of(settings.build(SHAPE, 10).double())
    params, b = task.init_params(), batches()
    before = trees.map(torch.clone, params)

    def client(b: Batches) -> Tree:
        return train(task, params, b, HOOKS[hooks])

    recorder = Recorder("the loss")
    expected = trees.stack([client(trees.at(b, i)) for i in range(CLIENTS)])
    with steps_run_by(recorder):
        assert_close(
            trees.stack([client(trees.at(b, i)) for i in range(CLIENTS)]),
            expected,
            1e-11,
            "one by one",
        )
        assert_close(vmap(client)(b), expected, 1e-11, "batched")
        assert_close(vmap(client)(b), expected, 1e-11, "batched again")
    # The first step, which may not write to what it was given, and the others; each
    # alone and batched.
    assert len(recorder._recordings) == 4
    assert_close(params, before, 0.0, "what the client was sent")


def test_products_are_added_to_the_parameters_in_one_pass_and_in_place() -> None:
    task, recorder = task_of(Mlp(hidden=(9, 7)).build(SHAPE, 10)), Recorder("the loss")
    with steps_run_by(recorder):
        vmap(lambda b: train(task, task.init_params(), b, {}))(batches(torch.float32))
    first, later = (
        [str(node.target) for node in r.code.__self__.graph.nodes]
        for r in recorder._recordings.values()
    )  # type: ignore[attr-defined]
    assert first.count("aten.baddbmm.default") == 3
    assert "aten.baddbmm_.default" not in first
    assert later.count("aten.baddbmm_.default") == 3
    assert not {
        name for name in (*first, *later) if name.startswith("aten.addcmul.")
    } - {"aten.addcmul.default"}
    assert "aten.addcmul.default" not in later


def test_parameters_that_stay_are_part_of_the_model_and_stay() -> None:
    torch.manual_seed(0)
    task = task_of(Mlp(hidden=(9,)).build(SHAPE, 10).double())
    fixed, moving = split(task.init_params(), ["output"])
    b = trees.at(batches(), 1)

    def loss(v: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return task.loss({**fixed, **v}, x, y, mask)

    expected = local_sgd(loss, moving, b, 0.1)
    with steps_run_by(Recorder("the loss")):
        assert_close(
            local_sgd(task.loss, moving, b, 0.1, fixed=fixed),
            expected,
            1e-12,
            "recorded",
        )
    assert_close(
        local_sgd(task.loss, moving, b, 0.1, fixed=fixed), expected, 0.0, "as written"
    )


def test_what_local_training_returns_is_the_callers_own_even_without_a_batch() -> None:
    task = task_of(Logistic().build(SHAPE, 10))
    params = task.init_params()
    nothing = Batches(*(x[0, :0] for x in batches(torch.float32)))
    end = local_sgd(task.loss, params, nothing, 0.1)
    assert_close(end.params, params, 0.0, "parameters")
    assert not {x.data_ptr() for x in end.params.values()} & {
        x.data_ptr() for x in params.values()
    }


def test_who_differentiates_through_local_training_still_can() -> None:
    task = task_of(Logistic().build(SHAPE, 10).double())
    b = trees.at(batches(), 1)

    def after(params: Params) -> Tensor:
        return local_sgd(task.loss, params, b, 0.1).loss

    expected = grad(after)(task.init_params())
    with steps_run_by(Recorder("the loss")):
        assert_close(grad(after)(task.init_params()), expected, 0.0, "gradient")


def test_a_loss_that_looks_at_values_runs_unrecorded() -> None:
    task = task_of(Logistic().build(SHAPE, 10).double())
    task.metrics["loss"] = lambda out, y: (
        cross_entropy(out, y) * (2.0 if float(out.detach().sum()) > 0 else 1.0)
    )
    b = trees.at(batches(), 1)
    expected = train(task, task.init_params(), b, {})
    with steps_run_by(Recorder("the loss")):
        assert_close(train(task, task.init_params(), b, {}), expected, 0.0, "training")


def test_a_loss_that_looks_at_values_behind_the_recorders_back_is_found_out() -> None:
    task = task_of(Logistic().build(SHAPE, 10).double())
    weights = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    task.metrics["loss"] = lambda out, y: (
        cross_entropy(out, y) * torch.tensor([weights[i] for i in y.tolist()])
    )
    b = batches()

    def both() -> list[Tree]:
        return [
            train(task, task.init_params(), Batches(*(x[i : i + 1, 0] for x in b)), {})
            for i in (0, 1, 2, 0)
        ]

    expected = both()
    with steps_run_by(Recorder("the loss")):
        assert_close(both(), expected, 1e-11, "training")


def test_a_loss_that_is_not_the_tasks_is_never_recorded() -> None:
    task, scale = task_of(Logistic().build(SHAPE, 10).double()), [1.0]
    b = trees.at(batches(), 1)

    def loss(params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return scale[0] * task.loss(params, x, y, mask)

    with steps_run_by(Recorder("the loss")):
        before = local_sgd(loss, task.init_params(), b, 0.1).loss
        scale[0] = 2.0
        assert local_sgd(loss, task.init_params(), b, 0.1).loss > 1.5 * before


def test_a_resumed_run_splits_clients_as_before_whatever_the_machine(
    tmp_path: Path,
) -> None:
    e = small("fedavg", engine__name="vectorised", participation__cohort=12)
    torch.set_num_threads(3)
    try:
        expected = run(e, tmp_path / "whole").params_sha256
        half = loop_of(e.model_copy(update={"rounds": 2}), tmp_path / "halves")
        half.run()
        half.close()
    finally:
        torch.set_num_threads(1)
    loop = loop_of(e, tmp_path / "halves", resume=True)
    assert loop.run().params_sha256 == expected
    loop.close()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=120),
    st.sampled_from([1, 2, 8, 12, 64]),
)
def test_chunks_hold_every_client_once_with_little_padding(
    steps: list[int], most: int
) -> None:
    steps = sorted(steps, reverse=True)
    found = pack(list(range(len(steps))), steps, most)
    assert [i for chunk in found for i in chunk] == list(range(len(steps)))
    assert all(len(chunk) <= most for chunk in found)
    assert (
        sum(max(steps[i] for i in c) * len(c) for c in found)
        <= sum(steps) / (1 - PADDING) + 1e-9
    )
    assert sum(max(steps[i] for i in c) for c in found) <= sum(
        steps
    )  # batched steps; one by one it would be so many


def test_chunks_of_log_normal_clients_spend_what_padding_is_allowed() -> None:
    steps = sorted(
        (1 + np.random.default_rng(0).lognormal(1, 0.8, 100)).astype(int).tolist(),
        reverse=True,
    )
    found = pack(list(range(100)), steps, 50)
    apart = sum(set(steps))  # chunks of one length each: no padding
    assert sum(max(steps[i] for i in c) for c in found) < 0.8 * apart


def test_batches_of_few_widths_hold_the_same_examples() -> None:
    rows = Examples(torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.int64))
    sizes = [1, 2, 3, 5, 6, 11, 12]
    data = FederatedData(rows, rows, np.arange(40), np.array([0, *np.cumsum(sizes)]))
    local = small("fedavg", local={"batch_size": 12}).local
    widths = set()
    for client, size in enumerate(sizes):
        plain, even = (
            data.batches(np.array([client]), "train", local, 0, 0, 0, even)
            for even in (False, True)
        )
        widths.add(even.x.shape[2])
        assert plain.x.shape[2] == size <= even.x.shape[2] < 2 * size + 1
        assert torch.equal(even.x[0, 0, :size], plain.x[0, 0])
        assert even.mask.sum() == plain.mask.sum() == size
    assert widths == {1, 2, 3, 6, 12}


SHAPES = [
    ((2, 3, 9, 11), (3, 2), (1, 1), (0, 0), (1, 1)),
    ((2, 1, 9, 11), (3, 3), (2, 1), (1, 2), (2, 3)),
    ((1, 2, 8, 9), (2, 3), (1, 2), (0, 1), (2, 1)),
    ((3, 4, 6, 5), (1, 1), (1, 1), (0, 0), (2, 2)),
]


@pytest.mark.parametrize(("shape", "kernel", "dilation", "padding", "stride"), SHAPES)
def test_patches_and_their_adjoint_are_pytorchs(
    shape: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> None:
    x = torch.randn(shape)
    settings = [list(v) for v in (kernel, dilation, padding, stride)]
    expected = functional.unfold(x, kernel, dilation, padding, stride)
    assert torch.equal(patches(x, *settings), expected)
    y = torch.randn_like(expected)
    back = functional.fold(y, shape[2:], kernel, dilation, padding, stride)
    torch.testing.assert_close(patches_adjoint(y, list(shape[2:]), *settings), back)


def test_two_results_that_are_equal_are_two_tensors() -> None:
    x, recorder = torch.randn(3), Recorder("the loss")
    for _ in range(3):
        a, b, c = recorder.run(
            lambda x: (x * 2, x * 2, (x * 2).sin() + (x * 2).sin()), "twice", x, ()
        )
        a.add_(1)
        torch.testing.assert_close(b, 2 * x)
        torch.testing.assert_close(c, 2 * (2 * x).sin())
    (recording,) = recorder._recordings.values()
    names = [str(node.target) for node in recording.code.__self__.graph.nodes]  # type: ignore[union-attr]
    assert (
        names.count("aten.sin.default") == 1
    )  # what is computed twice is computed once


@pytest.mark.parametrize(("shape", "kernel", "dilation", "padding", "stride"), SHAPES)
def test_convolutions_as_products_are_pytorchs(
    shape: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> None:
    clients, outputs = 3, 5
    x = torch.randn(clients, *shape, dtype=torch.float64)
    w = torch.randn(clients, outputs, shape[1], *kernel, dtype=torch.float64)
    settings = [list(v) for v in (stride, padding, dilation)]
    expected = convolutions(x, w, *settings)
    torch.testing.assert_close(products(x, w, *settings), expected)
    g = torch.randn_like(expected)
    for wanted in ([True, True, False], [False, True, False], [True, False, False]):
        back = convolutions_backward(g, x, w, *settings, wanted)
        for found, right in zip(
            products_backward(g, x, w, *settings, wanted), back, strict=True
        ):
            assert (found is None) == (right is None)
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d((3, 2)),
        nn.AvgPool2d(2, 1),
        nn.AvgPool2d(4, ceil_mode=True),
    ],
)
@pytest.mark.parametrize("size", [(12, 12), (7, 6)])
def test_recorded_averages_are_pytorchs(pool: nn.Module, size: tuple[int, int]) -> None:
    x = torch.randn(5, 2, 3, *size)

    def step(inputs: tuple[Tensor]) -> Tensor:
        return grad(lambda x: pool(x).square().sum())(inputs[0])

    recorder = Recorder("the loss")
    for _ in range(3):
        found = vmap(lambda x: recorder.run(step, "pool", (x,), ()))(x)
        torch.testing.assert_close(found, vmap(lambda x: step((x,)))(x))
    assert all(
        recording.code is not None for recording in recorder._recordings.values()
    )


def by_channels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().tanh().permute(0, 3, 1, 2)


@pytest.mark.parametrize("change", [by_channels, lambda x: x.transpose(2, 3).tanh()])
def test_layouts_are_as_pytorch_has_them(change: Any) -> None:
    layer, x = nn.Linear(3, 3), torch.randn(5, 2, 3, 4, 4)

    def step(inputs: tuple[Tensor, Params]) -> Tree:
        def loss(x: Tensor, w: Params) -> Tensor:
            y = functional.linear(
                change(x).permute(0, 2, 3, 1), w["weight"], w["bias"]
            ).permute(0, 3, 1, 2)
            y = functional.unfold(functional.avg_pool2d(y, 2), 1).flatten(1)
            return (
                y.view(2, 4, 3)
                .transpose(1, 2)
                .log_softmax(-1)
                .reshape(-1, 4)[:, 0]
                .sum()
            )

        return grad(loss, argnums=(0, 1))(*inputs)

    inputs = (
        x,
        trees.map(
            lambda p: p.detach().expand(5, *p.shape), dict(layer.named_parameters())
        ),
    )
    recorder = Recorder("the loss")
    for _ in range(3):
        found = vmap(lambda *given: recorder.run(step, "layout", given, ()))(*inputs)
        torch.testing.assert_close(found, vmap(lambda *given: step(given))(*inputs))
    assert all(
        recording.code is not None for recording in recorder._recordings.values()
    )


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_recorded_softmax_is_pytorchs(classes: int) -> None:
    x, far = torch.randn(3, 6, classes), torch.tensor([1.0, 100.0, 1e7])[:, None, None]
    x[:, 0] = 1.0

    def step(inputs: tuple[Tensor]) -> Tensor:
        return grad(lambda x: functional.log_softmax(x, -1).square().mean())(inputs[0])

    recorder = Recorder("the loss")
    for scale in (1.0, far, far):
        found = vmap(lambda x: recorder.run(step, "softmax", (x,), ()))(scale * x)
        torch.testing.assert_close(found, vmap(lambda x: step((x,)))(scale * x))
    assert all(
        recording.code is not None for recording in recorder._recordings.values()
    )
