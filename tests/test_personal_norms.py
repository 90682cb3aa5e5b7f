"""Statistics that stay on the client: plain PyTorch, padding, batches of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedcore import trees
from fedcore.data.federated import Examples
from fedcore.errors import SettingsError
from fedcore.local import full_gradient, local_sgd, steps_run_by
from fedcore.models.norms import (
    PersonalBatchNorm,
    personal_batch_norm,
)
from fedcore.speed.recording import Recorder
from fedcore.statistics import statistic_names, statistics_moved
from fedcore.task import Task
from fedcore.types import Batches, Tuning
from tests.helpers import loop_of
from tests.norms import (
    CLASSES,
    EVEN,
    assert_close,
    batches_of,
    experiment,
    make_task,
    plain,
    ran,
    rows_of,
    train_plainly,
    unconverted,
)


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_fedbn_is_fedbn_in_plain_pytorch_on_the_real_rows(
    engine: str, tmp_path: Path
) -> None:
    """Three rounds: every shared parameter, and what each client keeps."""
    options = {"way": "personal", "dtype": "float64"}
    e = experiment(
        "personal",
        options=options,
        engine__name=engine,
        rounds=3,
        participation__cohort=6,
    )
    loop = loop_of(e, tmp_path / "r")
    states = [unconverted(loop.task.model).state_dict() for _ in EVEN]
    shares = torch.tensor(EVEN, dtype=torch.float64) / sum(EVEN)
    shared = [name for name in states[0] if not name.startswith("bn")]
    kept = statistic_names(loop.task.model)
    for t in range(e.rounds):
        loop.round()
        for client in range(len(EVEN)):
            model = unconverted(loop.task.model)
            model.load_state_dict(states[client])
            states[client] = plain(model.train(), client, loop.task, e, t)
        for name in shared:
            parts = torch.stack([state[name] for state in states])
            mean = torch.tensordot(shares, parts, 1)
            for state in states:
                state[name] = mean
    for name in shared:
        assert_close(loop.state.server.params[name], states[0][name])
    assert not any(name.startswith("bn") for name in loop.state.server.params)
    assert loop.engine.states is not None
    for client, state in enumerate(states):
        own = loop.engine.states.get(client).v
        for name in kept:
            assert_close(own[name], state[name])
        assert_close(own["bn2.weight"], state["bn2.weight"])


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_statistics_move_in_both_passes_of_fedalt(engine: str, tmp_path: Path) -> None:
    options = {"way": "personal", "dtype": "float64"}
    e = experiment(
        "personal",
        "fedalt",
        options=options,
        engine__name=engine,
        rounds=1,
        participation__cohort=6,
    )
    loop = loop_of(e, tmp_path / "r")
    original = unconverted(loop.task.model)
    loop.round()
    assert loop.engine.states is not None
    for client in range(len(EVEN)):
        model = copy.deepcopy(original).train()
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            parts[name.startswith("bn")].append(parameter)
        train_plainly(model, parts[True], batches_of(loop.task, client, e, 0, 1))
        train_plainly(model, parts[False], batches_of(loop.task, client, e, 0))
        expected = model.state_dict()
        for name, value in loop.engine.states.get(client).v.items():
            assert_close(value, expected[name])


@pytest.mark.parametrize("parts", [["all"], ["output"]])
def test_fine_tuning_moves_statistics_whatever_it_trains(
    parts: list[str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"finetune__parts": parts, "finetune__epochs": 2}
    e = experiment("personal", rounds=1, **settings)
    task = make_task(e)
    method = e.build_method()
    shared = method.init_server(task.init_params(), task.population)
    own = method.init_client(task.init_params())
    batches = batches_of(task, 0, e, 0)
    model = unconverted(task.model)
    tuned = copy.deepcopy(model).train()
    chosen = dict(tuned.named_parameters())
    if parts == ["output"]:
        chosen = {n: p for n, p in chosen.items() if n.startswith("out.")}
    train_plainly(tuned, list(chosen.values()), batches)
    rows = batches_of(task, 1, e, 0)
    metrics, _ = method.finetune(
        task, torch.tensor(0), shared, own, Tuning(batches, rows)
    )
    mask = rows.mask.flatten() > 0
    with torch.no_grad():
        outputs = tuned.eval()(rows.x.flatten(0, 1)[mask])
    loss = nn.functional.cross_entropy(outputs, rows.y.flatten()[mask])
    assert metrics.metrics["loss"].item() == pytest.approx(loss.item(), abs=1e-4)


def test_a_client_that_never_trained_evaluates_with_the_first_statistics(
    tmp_path: Path,
) -> None:
    e = experiment("personal", participation__cohort=1, rounds=1)
    loop = ran(e, tmp_path / "r")
    start = loop.task.init_params()
    assert loop.engine.states is not None
    moved = 0
    for client in range(len(EVEN)):
        own = loop.method.model_for(loop.state.server, loop.engine.states.get(client))
        moved += not torch.equal(own["bn1.running_mean"], start["bn1.running_mean"])
    assert moved == 1


def padded(rows: Examples, real: int, width: int, fill: float) -> Batches:
    """One batch of `real` rows, and padding with `fill` in every entry."""
    x = torch.full((1, width, *rows.x.shape[1:]), fill)
    y = torch.zeros(1, width, dtype=torch.int64)
    mask = torch.zeros(1, width)
    x[0, :real], y[0, :real], mask[0, :real] = rows.x[:real], rows.y[:real], 1
    return Batches(x, y, mask)


def personal_task() -> Task:
    return make_task(experiment("personal"))


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e6])
@pytest.mark.parametrize("real", [1, 2, 5])
def test_padding_changes_no_statistic_and_no_gradient(real: int, fill: float) -> None:
    task, rows = personal_task(), rows_of(5, seed=1)
    start = task.init_params()
    alone = local_sgd(task.loss, start, padded(rows, real, real, 0.0), 0.05)
    beside = local_sgd(task.loss, start, padded(rows, real, real + 7, fill), 0.05)
    assert_close(beside.params, alone.params)
    assert_close(beside.loss, alone.loss)


def test_no_hook_of_local_training_moves_statistics() -> None:
    task, batches = personal_task(), padded(rows_of(5), 5, 5, 0.0)
    start = task.init_params()
    bare = local_sgd(task.loss, start, batches, 0.05).params
    full = local_sgd(
        task.loss,
        start,
        batches,
        dict.fromkeys(start, 0.05),
        correction=trees.map(torch.ones_like, start),
        prox=0.5,
        center=trees.zeros_like(start),
        momentum=0.9,
        weight_decay=0.1,
    ).params
    slope, _ = full_gradient(task.loss, start, batches)
    for name in statistic_names(task.model):
        assert torch.equal(bare[name], full[name])
        assert not torch.equal(bare[name], start[name])
        assert not slope[name].any()


def test_where_a_channel_has_one_value_the_running_statistics_stand_in() -> None:
    norm = personal_batch_norm(nn.BatchNorm1d(4))
    assert isinstance(norm, PersonalBatchNorm)
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 4)
    assert_close(norm.train()(x), norm.eval()(x))
    norm.train()
    with statistics_moved() as moves:
        norm(x)
    assert torch.equal(moves.latest(norm.running_mean), norm.running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_narrow_numbers_are_taken_in_float32(dtype: torch.dtype) -> None:
    """bfloat16 counts to 256; there are 1 200 values a channel."""
    norm = nn.BatchNorm2d(3).to(dtype)
    personal = personal_batch_norm(copy.deepcopy(norm))
    assert isinstance(personal, PersonalBatchNorm)
    x = (torch.randn(3, 3, 20, 20) + 2).to(dtype)
    with statistics_moved() as moves:
        out = personal(x)
    expected = norm(x)
    assert out.dtype == dtype
    limit = 2 * torch.finfo(dtype).eps
    assert_close(out, expected, limit)
    assert_close(moves.latest(personal.running_mean), norm.running_mean, limit)
    assert_close(moves.latest(personal.running_var), norm.running_var, limit)
    assert personal.eval()(x).dtype == dtype


def test_many_norms_stay_finite_on_one_example_beside_padding() -> None:
    """Each might blow padding up by 300, which is infinite after sixteen."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(36, 8)]
    for _ in range(30):
        layers += [nn.BatchNorm1d(8), nn.Linear(8, 8)]
    model = personal_batch_norm(nn.Sequential(*layers, nn.Linear(8, CLASSES)))
    task = personal_task().with_model(model)
    for real in (0, 1, 2):
        batches = padded(rows_of(5), real, 5, 9.0)
        work = local_sgd(task.loss, task.init_params(), batches, 0.01)
        assert bool(trees.finite(work.params))


def test_a_recording_takes_the_mask_of_each_batch() -> None:
    task, rows = personal_task(), rows_of(5)
    start, recorder = task.init_params(), Recorder("the loss")
    for real in (5, 3, 2, 1, 4):
        batches = padded(rows, real, 5, 2.0)
        written = local_sgd(task.loss, start, batches, 0.05).params
        with steps_run_by(recorder):
            recorded = local_sgd(task.loss, start, batches, 0.05).params
        assert_close(recorded, written)
    (recording,) = recorder._recordings.values()
    assert recording.code is not None
    assert recording.uses == 5


def test_a_batch_axis_that_is_not_the_first_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(0, 2), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    task = personal_task().with_model(personal_batch_norm(model))
    with pytest.raises(SettingsError, match="batch as the first axis"):
        local_sgd(task.loss, task.init_params(), padded(rows_of(5), 5, 5, 0.0), 0.1)
