"""DP-SGD in local steps: against a loop over examples, recorded, batched, sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest
from torch import Tensor, fx, nn
from torch.func import grad, vmap

from fedcore import privacy, trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.dpsgd import Drawn, clipped_sum, normals_of_system
from fedcore.engines.base import Work
from fedcore.engines.run_client import run_client
from fedcore.local import LocalWork, local_sgd, steps_run_by
from fedcore.local_settings import LocalSettings
from fedcore.optimizers import Training
from fedcore.rounds.loop import run
from fedcore.speed import functorch as ops
from fedcore.speed.recording import Recorder, Recording
from fedcore.task import Task
from fedcore.types import Batches, Params, Tree
from tests.helpers import assert_close as assert_all_close
from tests.helpers import equal, per_method, small

FEATURES, CLASSES, WIDTH, STEPS = 4, 3, 7, 5
LR = 0.05
METHODS = ["fedavg", "fedprox", "fedopt", "mifa", "ditto", "fedalt", "admm", "rerce"]
METHODS += ["fedsim", "fedau", "fedvarp", "fedstale", "dpfedavg", "fedlaw"]
METHODS += ["rolora", "exactlora", "flexlora", "hetlora"]


@pytest.fixture(autouse=True)
def _without_the_slower_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "epsilon_prv", lambda *_: (None, "not asked for"))


def assert_close(found: Tree, expected: Tree, tolerance: float) -> None:
    assert_all_close(found, expected, tolerance, "steps of DP-SGD")


def task_of(sizes: list[int] | None = None, dtype: torch.dtype = torch.float64) -> Task:
    """A small classifier; clients hold `sizes` examples."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)]
    offsets = np.cumsum([0, *(sizes or [9])])
    total = int(offsets[-1])
    x = torch.randn(total, FEATURES, dtype=dtype)
    rows = Examples(x, torch.randint(0, CLASSES, (total,)))
    data = FederatedData(rows, rows, np.arange(total), offsets)
    return Task(nn.Sequential(*layers).to(dtype), data)


def batches_of(dtype: torch.dtype = torch.float64) -> tuple[Batches, Drawn]:
    """Five steps: the second has drawn nothing, the fourth two; the last is padding."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(STEPS, WIDTH)
    mask[1], mask[4] = 0, 0
    mask[3, 2:] = 0
    x = torch.randn(STEPS, WIDTH, FEATURES, generator=draw, dtype=dtype)
    y = torch.randint(0, CLASSES, (STEPS, WIDTH), generator=draw)
    size = torch.tensor([3.0, 3, 3, 3, 0], dtype=torch.float64)
    noise = torch.randn(STEPS, 51, generator=draw, dtype=dtype)
    return Batches(x, y, mask), Drawn(size, noise)


def trained(task: Task, given: tuple[Batches, Drawn], **local: Any) -> LocalWork:
    training = Training.of(LocalSettings(**local), 1)
    assert training is not None
    with training.inside(task, torch.tensor(0.0), None, given[1]):
        return local_sgd(task.loss, task.init_params(), given[0], LR)


def by_hand(task: Task, given: tuple[Batches, Drawn], clip: float, z: float) -> Params:
    """The steps, example by example."""
    params, ones = task.init_params(), torch.ones(1)
    for batch, (size, noise) in zip(
        trees.unbind(given[0]), trees.unbind(tuple(given[1])), strict=True
    ):
        if float(size) == 0:
            continue
        numbers = noise
        slope = trees.zeros_like(params)
        for x, y, m in zip(*batch, strict=True):
            if float(m) == 0:
                continue
            g = grad(task.loss)(params, x[None], y[None], ones)
            norm = math.sqrt(sum(float(v.square().sum()) for v in g.values()))
            slope = trees.axpy(min(1.0, clip / norm), g, slope)
        for name, value in slope.items():
            own, numbers = numbers[: value.numel()], numbers[value.numel() :]
            slope[name] = value + z * clip * own.view(value.shape)
        params = trees.axpy(-LR / float(size), slope, params)
    return params


@pytest.mark.parametrize("z", [0.0, 1.3])
def test_steps_are_those_of_a_loop_over_examples(z: float) -> None:
    task, given = task_of(), batches_of()
    expected = by_hand(task, given, 0.4, z)
    done = trained(task, given, dp={"clip": 0.4, "noise": z})
    if not z:
        done = trained(
            task,
            (given[0], given[1]._replace(noise=torch.empty(STEPS, 0))),
            dp={"clip": 0.4},
        )
    assert_close(done.params, expected, 1e-14)
    assert float(done.steps) == 4  # with the one that drew nothing
    assert float(done.loss) == 0


def test_a_loop_and_vmap_agree_in_float32() -> None:
    task, (batches, _) = task_of(dtype=torch.float32), batches_of(torch.float32)
    params, (x, y, mask) = task.init_params(), trees.at(batches, 0)

    def alone(p: Params, own_x: Any, own_y: Tensor) -> Tensor:
        return task.loss(p, own_x, own_y, torch.ones(1))

    total = trees.zeros_like(params)
    for j in range(WIDTH):
        g = grad(alone)(params, x[j : j + 1], y[j : j + 1])
        norm = math.sqrt(sum(float(v.square().sum()) for v in g.values()))
        total = trees.axpy(min(1.0, 0.5 / norm), g, total)
    assert_close(clipped_sum(alone, params, x, y, mask, 0.5), total, 2e-7)
    # Without a bound that counts: their number times the gradient of the mean.
    mean = grad(task.loss)(params, x, y, mask)
    whole = clipped_sum(alone, params, x, y, mask, 1e9)
    assert_close(whole, trees.scale(mean, WIDTH), 1e-6)


def test_an_example_left_out_moves_the_sum_by_no_more_than_the_bound() -> None:
    task, (batches, _) = task_of(), batches_of()
    params, (x, y, mask) = task.init_params(), trees.at(batches, 0)
    x = x * torch.tensor([1e-6, 1.0, 1e3, 1e6, 1.0, 1.0, 1.0])[:, None]

    def alone(p: Params, own_x: Any, own_y: Tensor) -> Tensor:
        return 1e4 * task.loss(p, own_x, own_y, torch.ones(1))

    whole = clipped_sum(alone, params, x, y, mask, 0.5)
    for j in range(WIDTH):
        rest = mask.clone()
        rest[j] = 0
        moved = trees.sub(whole, clipped_sum(alone, params, x, y, rest, 0.5))
        norm = float(trees.dot(moved, moved).sqrt())
        assert norm == pytest.approx(0.5, rel=1e-12)


def graph_of(recording: Recording) -> fx.Graph:
    assert recording.code is not None
    graph: fx.Graph = recording.code.__self__.graph  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("batched", [False, True])
def test_a_recording_computes_the_same(batched: bool) -> None:
    task, (batches, drawn) = task_of(), batches_of()
    recorder = Recorder("the loss")
    expected = by_hand(task, (batches, drawn), 0.4, 1.3)
    local = {"dp": {"clip": 0.4, "noise": 1.3}}
    two = trees.map(lambda v: torch.stack([v, v.flip(0)]), (batches, drawn))
    with steps_run_by(recorder):
        for _ in range(3):
            if batched:
                done = vmap(lambda own: trained(task, own, **local).params)(two)
                done = trees.at(done, 0)
            else:
                done = trained(task, (batches, drawn), **local).params
            assert_close(done, expected, 1e-13)
    recordings = list(recorder._recordings.values())
    assert recordings
    for recording in recordings:
        # Two norms for each weight of a linear layer, whose gradients of single
        # examples are not in memory, and one for each bias.
        targets = [node.target for node in graph_of(recording).nodes]
        assert targets.count(ops.VECTOR_NORM) == 6


def test_pieces_of_a_batch_are_one_step() -> None:
    task, given = task_of(), batches_of()
    whole = trained(task, given, dp={"clip": 0.4, "noise": 1.0})
    pieces = trained(task, given, dp={"clip": 0.4, "noise": 1.0}, micro=3)
    assert_close(pieces.params, whole.params, 1e-14)


@pytest.mark.parametrize("local", [{"precision": "bfloat16"}, {"optimizer": "adamw"}])
def test_other_steps_follow_the_noised_gradient(local: dict[str, Any]) -> None:
    """They have the same bound: an example that is left out cannot be told by size."""
    task, given = task_of(dtype=torch.float32), batches_of(torch.float32)
    quiet = given[1]._replace(noise=torch.empty(STEPS, 0))
    done = trained(task, (given[0], quiet), dp={"clip": 1e-3}, **local)
    moved = trees.sub(done.params, task.init_params())
    assert bool(trees.finite(moved))
    if "precision" in local:
        # Four steps, of 7 + 0 + 7 + 2 examples, each of 1e-3 at most.
        assert float(trees.dot(moved, moved).sqrt()) <= LR * 16 * 1e-3 / 3 * 1.001


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    task, (batches, _) = task_of(), batches_of()
    empty = batches._replace(mask=torch.zeros(STEPS, WIDTH))
    entries = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(STEPS, 51, generator=draw, dtype=torch.float64)
        size = torch.tensor([4.0, 4, 0, 0, 0], dtype=torch.float64)
        done = trained(task, (empty, Drawn(size, noise)), dp={"clip": 2, "noise": 3})
        moved = trees.sub(done.params, task.init_params())
        entries.append(trees.ravel(trees.leaves(moved)))
    found = torch.cat(entries).numpy() / (LR * 2 * 3 / 4 * math.sqrt(2))
    assert kstest(found, "norm").pvalue > 1e-3


def test_numbers_of_the_system_are_normal_and_never_the_same() -> None:
    first, second = normals_of_system(20_001), normals_of_system(20_001)
    assert kstest(first, "norm").pvalue > 1e-6
    assert not np.isin(first, second).any()
    assert np.isfinite(first).all()
    pairs = np.corrcoef(first[:10_000], first[10_000:20_000])
    assert abs(pairs[0, 1]) < 0.05


# Sampling


def sampled(
    data: FederatedData, local: LocalSettings, clients: list[int], t: int, **more: Any
) -> Batches:
    return data.batches(np.array(clients), "train", local, 3, t, **more)


def test_every_step_draws_each_example_on_its_own() -> None:
    data = task_of([12]).data
    local = LocalSettings(steps=4000, dp={"clip": 1.0, "rate": 0.3})  # type: ignore[arg-type]
    x, _, mask = trees.at(sampled(data, local, [0], 0), 0)
    drawn = torch.zeros(4000, 12, dtype=torch.bool)
    for row in range(12):
        drawn[:, row] = ((x == data.x[row]).all(2) & (mask > 0)).any(1)
    counts = drawn.sum(1)
    assert bool((counts == mask.sum(1)).all())  # none twice
    expected = binom.pmf(np.arange(13), 12, 0.3) * 4000
    found = np.bincount(counts.numpy(), minlength=13)
    common = expected > 5
    rest = [found[~common].sum()], [expected[~common].sum()]
    both = [
        np.append(a[common], b) for a, b in zip((found, expected), rest, strict=True)
    ]
    assert chisquare(*both).pvalue > 1e-3
    rates = drawn.double().mean(0)
    assert float((rates - 0.3).abs().max()) < 0.04
    together = np.corrcoef(drawn.numpy().T) - np.eye(12)
    assert np.abs(together).max() < 0.07
    steps = drawn[1:] & drawn[:-1]  # in one step, and in the next
    assert float((steps.double().mean(0) - 0.09).abs().max()) < 0.025


def test_a_batch_without_examples_is_padding_of_a_step() -> None:
    data = task_of([2, 0, 3]).data
    local = LocalSettings(steps=30, dp={"clip": 1.0, "rate": 0.05})  # type: ignore[arg-type]
    batches = sampled(data, local, [0, 1, 2], 5)
    assert bool((batches.mask.sum(2) == 0).any(1).all())
    assert bool((batches.mask.sum(2) > 0).any(1)[[0, 2]].all())
    own = data.x[:2]
    # Padding is the client's own, whatever its first step drew, and zeros without one.
    is_own = (batches.x[0][:, :, None] == own).all(3).any(2)
    assert bool(is_own.all())
    assert not bool(batches.x[1].any())


def test_nothing_is_cut_off_where_more_is_drawn_than_expected() -> None:
    data = task_of([40, 40, 40]).data
    local = LocalSettings(batch_size=4, epochs=8, dp={"clip": 1.0})  # type: ignore[arg-type]
    together = sampled(data, local, [0, 1, 2], 0, even=True)
    alone = sampled(data, local, [1], 0)
    widest = int(alone.mask.sum(2).max())
    assert alone.mask.shape[2] == widest > 6
    assert bool((together.mask[1].sum(1) == alone.mask[0].sum(1)).all())
    assert equal(together.x[1, :, :widest], alone.x[0]) or bool(
        (together.mask[1, :, :widest] == alone.mask[0]).all()
    )


def test_devices_draw_examples_from_their_own_system() -> None:
    data = task_of([40]).data
    local = LocalSettings(batch_size=8, epochs=5, dp={"clip": 1.0})  # type: ignore[arg-type]
    first = sampled(data, local, [0], 0)
    assert equal(first, sampled(data, local, [0], 0))
    secret = [sampled(data, local, [0], 0, is_secret=True) for _ in range(2)]
    masks = [batches.mask.sum(2) for batches in (first, *secret)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(masks[a], masks[b])


def test_devices_draw_noise_from_their_own_system() -> None:
    e = small("fedavg", local__dp={"clip": 0.5, "noise": 1.0})
    task, method = e.build_task(), e.build_method()
    noises = []
    for is_secret in (False, False, True, True):
        work = Work(task, method, e.local, e.seed, draws_secretly=is_secret)
        noises.append(work.batches(method.train, [2], 1).drawn.noise)
    assert equal(noises[0], noises[1])
    for noise in noises[2:]:
        assert not torch.isin(noise, noises[0]).any()
    assert not torch.isin(noises[2], noises[3]).any()
    assert work.with_few_widths().draws is not None
    assert work.with_few_widths().draws_secretly


def test_noise_and_examples_are_drawn_anew_for_every_client_round_and_plan() -> None:
    e = small("ditto", local__dp={"clip": 0.5, "noise": 1.0})
    task, method = e.build_task(), e.build_method()
    work = Work(task, method, e.local, e.seed)
    numbers = []
    for t in (0, 1):
        given = work.batches(method.train, [1, 2], t)
        assert given.drawn.size.shape == given.batches.mask.shape[:2]
        numbers.append(given.drawn.noise.flatten())
    drawn = torch.cat(numbers)
    assert len(drawn.unique()) == len(drawn)


# Engines and methods

DP: dict[str, Any] = {"local__dp": {"clip": 0.5, "noise": 0.8}, "local__batch_size": 3}


@per_method(METHODS)
def test_engines_agree(name: str, tmp_path: Path) -> None:
    in_float64: dict[str, Any] = dict(DP)
    one = run(small(name, **in_float64), tmp_path / "a")
    many = run(
        small(name, **in_float64, engine__name="vectorised", engine__chunk=3),
        tmp_path / "b",
    )
    assert not one.dropped
    assert not many.dropped
    assert many.final["test_loss"] == pytest.approx(one.final["test_loss"], rel=2e-5)
    assert many.final["privacy_examples"] == one.final["privacy_examples"]
    assert not [key for key in one.history[-1] if key.startswith("train_")]


def test_a_message_is_the_same_alone_and_among_others() -> None:
    """In float64, whatever the width of batches: to 1e-14."""
    task = task_of([9, 4, 0, 17])
    e = small("fedavg", local__dp={"clip": 0.5, "noise": 0.8}, local__epochs=2)
    work = Work(task, e.build_method(), e.local, e.seed)
    fn, down = work.method.train, work.method.init_server(task.init_params(), 4)
    batches = work.batches(fn, [0, 1, 2, 3], 2)
    now, training = work.now(2), work.training

    def client(own: Any) -> Any:
        return run_client(fn, task, now, down, (), own, training)[0]

    together = vmap(client, randomness="different")(batches)
    for i in range(4):
        up, _ = work.one(fn, i, down, (), 2)
        assert_close(trees.at(together, i), up, 1e-13)
    unmoved = trees.at(together, 2).delta
    assert equal(unmoved, trees.zeros_like(unmoved))


def test_a_step_is_divided_by_what_is_expected_and_never_by_what_was_drawn() -> None:
    task = task_of([2, 12, 40])
    e = small("fedavg", local__dp={"clip": 0.5}, local__batch_size=5)
    work = Work(task, e.build_method(), e.local, e.seed)
    size = work.batches(work.method.train, [0, 1, 2], 0).drawn.size  # type: ignore[union-attr]
    assert size.sum(0).tolist() == [12, 10, 10, 5, 5, 5, 5, 5]  # 2 + 5 + 5 first
    by_rate = LocalSettings(dp={"clip": 1.0, "rate": 0.05})  # type: ignore[arg-type]
    assert by_rate.expected_batch(40) == 2
    assert by_rate.expected_batch(10) == 1  # a step is never longer than one example's
