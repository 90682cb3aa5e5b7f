"""BatchNorm is refused by default, and its three ways out work in every engine."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.local import full_gradient, local_sgd, steps_run_by
from fedcore.models.norms import (
    FrozenBatchNorm,
    PersonalBatchNorm,
    freeze_batch_norm,
    personal_batch_norm,
    to_group_norm,
)
from fedcore.rounds.loop import Loop, run
from fedcore.speed.recording import Recorder
from fedcore.statistics import statistic_names, statistics_moved
from fedcore.task import Task
from fedcore.types import Batches, Params, Tuning
from tests.helpers import loop_of, slow, small

EVEN = (23, 12, 18, 17, 7, 22)  # examples of clients; of 5 a batch, none has one
UNEVEN = (23, 11, 16, 1, 0, 21)
CLASSES = 3
LR = 0.05


# Models and tasks


class Net(nn.Module):
    """Convolution, two norms, and a third that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 6)
        self.bn2 = nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv(x)).tanh().mean((2, 3))
        h = self.bn2(self.fc1(h)).tanh()
        h = self.bn2(self.fc2(h)).tanh()
        out: Tensor = self.out(h)
        return out


def trained_net() -> Net:
    """A net whose statistics are no longer those of a new one."""
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(5):
        model(torch.randn(16, 1, 6, 6) + 1)
    return model


def rows_of(n: int, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=g) * 2 + 1
    return Examples(x, torch.randint(CLASSES, (n,), generator=g))


def make_task(e: Experiment) -> Task:
    """Six clients of uneven sizes; `options.way` converts the net."""
    sizes = e.options.get("sizes", EVEN)
    rows = rows_of(sum(sizes))
    order, offsets = np.arange(sum(sizes)), np.cumsum([0, *sizes])
    model = trained_net().to(getattr(torch, e.options.get("dtype", "float32")))
    rows = Examples(rows.x.to(model.out.weight.dtype), rows.y)
    data = FederatedData(rows, rows, order, offsets)
    return Task(WAYS[e.options["way"]](model), data)


WAYS: dict[str, Any] = {
    "group": lambda model: to_group_norm(model, 2),
    "frozen": freeze_batch_norm,
    "personal": personal_batch_norm,
}


def experiment(way: str, method: str = "fedsim", **settings: Any) -> Experiment:
    values: dict[str, Any] = {
        "task": "tests.test_norms:make_task",
        "options": {"way": way},
        "population": None,
        "holdout": 0.0,
        "local__batch_size": 5,
        "local__epochs": 2,
        "participation__cohort": 4,
        "rounds": 4,
    }
    if method in ("fedsim", "fedalt"):
        values["method__personal"] = ["norm"] if way == "personal" else []
    return small(method, **(values | settings))


def ran(e: Experiment, folder: Path, rounds: int | None = None) -> Loop:
    loop = loop_of(e, folder)
    for _ in range(e.rounds if rounds is None else rounds):
        loop.round()
    return loop


def everything(loop: Loop) -> list[Params]:
    """The server's parameters and every client's own."""
    assert loop.engine.states is not None
    own = [loop.engine.states.get(i) for i in range(len(EVEN))]
    parts = [loop.state.server.params, *(getattr(state, "v", {}) for state in own)]
    copies: list[Params] = trees.map(torch.clone, parts)
    return copies


def assert_close(a: Any, b: Any, limit: float = 1e-5) -> None:
    for one, other in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


# Refusals


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)],
)
def test_batch_norm_is_refused_in_a_line_with_the_three_ways_out(
    layer: nn.Module,
) -> None:
    rows = rows_of(4)
    data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    with pytest.raises(SettingsError) as refusal:
        Task(nn.Sequential(nn.Flatten(), layer), data)
    message = str(refusal.value)
    assert f'"1" ({type(layer).__name__})' in message
    for way in ("to_group_norm", "freeze_batch_norm", "personal_batch_norm"):
        assert way in message
    assert "track_running_stats" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.InstanceNorm2d(3, track_running_stats=True), "track_running_stats=False"),
        (nn.LazyBatchNorm1d(), "call the model once"),
        (nn.LazyLinear(3), "call the model once"),
        (nn.LazyConv2d(3, 3), "call the model once"),
    ],
)
def test_other_layers_with_statistics_or_without_shape_are_refused(
    layer: nn.Module, advice: str
) -> None:
    rows = rows_of(4)
    data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    with pytest.raises(SettingsError, match=f'"0" .*{advice}') as refusal:
        Task(nn.Sequential(layer), data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "ditto", "pfedme"])
def test_a_method_that_would_share_statistics_is_refused(
    method: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r'"bn1\.running_mean".*fedbn\.toml'):
        loop_of(experiment("personal", method), tmp_path / "r")


@pytest.mark.parametrize(
    "personal", [[], ["output"], [r"bn1\..+"], [r".*running_mean"]]
)
def test_statistics_in_the_shared_part_are_refused(
    personal: list[str], tmp_path: Path
) -> None:
    e = experiment("personal", method__personal=personal)
    with pytest.raises(SettingsError, match=r"fedbn\.toml"):
        loop_of(e, tmp_path / "r")


@pytest.mark.parametrize("convert", WAYS.values())
def test_a_lazy_layer_cannot_be_converted(convert: Any) -> None:
    with pytest.raises(SettingsError, match=r'"0" .*has no shape yet'):
        convert(nn.Sequential(nn.LazyBatchNorm2d()))


class Odd(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("convert", WAYS.values())
def test_a_norm_with_a_forward_of_its_own_is_not_replaced(convert: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Odd(4))
    with pytest.raises(SettingsError, match=r'"1" \(Odd\) has a forward of its own'):
        convert(model)
    assert type(model[0]) is nn.BatchNorm1d  # nothing was replaced


def test_settings_of_a_norm_that_cannot_be_had_are_refused() -> None:
    untracked = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(SettingsError, match="no running statistics to freeze"):
        freeze_batch_norm(untracked)
    cumulative = nn.Sequential(nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(SettingsError, match="momentum=None"):
        personal_batch_norm(cumulative)
    with pytest.raises(SettingsError, match="groups = 0"):
        to_group_norm(untracked, 0)


# Conversions


@pytest.mark.parametrize("convert", WAYS.values())
def test_parameters_keep_their_names_order_and_identity(convert: Any) -> None:
    model = Net()
    before = dict(model.named_parameters())
    assert convert(model) is model
    after = dict(model.named_parameters())
    statistics = statistic_names(model)
    assert [name for name in after if name not in statistics] == list(before)
    for name, parameter in before.items():
        assert after[name] is parameter
    model.load_state_dict(Net().state_dict(), strict=False)


@pytest.mark.parametrize("convert", WAYS.values())
def test_a_shared_norm_is_replaced_by_one_and_the_model_itself_too(
    convert: Any,
) -> None:
    norm = nn.BatchNorm1d(4)
    model = convert(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, norm)}))
    assert model["a"] is model["b"][0] is model["b"][1]
    assert not isinstance(model["a"], nn.BatchNorm1d)
    assert not isinstance(convert(norm), nn.BatchNorm1d)


@pytest.mark.parametrize("convert", WAYS.values())
def test_a_norm_without_weights_of_another_type_is_converted(convert: Any) -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(4, affine=False)).double().eval())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model[0].training
    assert model(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


@pytest.mark.parametrize("convert", WAYS.values())
def test_a_norm_with_an_activation_keeps_it(convert: Any) -> None:
    model = convert(nn.Sequential(BatchNormAct2d(4)))
    out = model(torch.randn(5, 4, 3, 3))
    assert out.min() == 0
    assert out.max() > 0
    assert not isinstance(model[0], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [
        (64, 32, 32),
        (48, 32, 24),
        (10, 32, 5),
        (7, 32, 1),
        (2, 8, 1),
        (1, 8, 1),
        (64, 1, 1),
    ],
)
def test_groups_are_the_largest_divisor_that_leaves_two_channels(
    channels: int, groups: int, expected: int
) -> None:
    norm = to_group_norm(nn.BatchNorm2d(channels), groups)
    assert norm.num_groups == expected


def test_a_vector_is_normalised_over_all_its_entries() -> None:
    """In groups of one or two entries it would be constant, or signs."""
    norm = to_group_norm(nn.BatchNorm1d(16))
    x = torch.randn(5, 16)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (16,)))


# Frozen statistics


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (6, 4)),
        (nn.BatchNorm1d, (6, 4, 5)),
        (nn.BatchNorm2d, (6, 4, 5, 5)),
        (nn.BatchNorm3d, (6, 4, 3, 3, 3)),
    ],
)
def test_frozen_is_batch_norm_in_evaluation_mode(
    kind: Any, shape: tuple[int, ...], affine: bool
) -> None:
    norm = kind(4, affine=affine, eps=1e-3).double()
    norm(torch.randn(shape).double() * 3 + 1)
    frozen = freeze_batch_norm(copy.deepcopy(norm)).train()
    norm.eval()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_close(frozen(x), norm(x), 1e-14)
    for one, other in zip(
        [x, *frozen.parameters()], [x, *norm.parameters()], strict=True
    ):
        (a,) = torch.autograd.grad(frozen(x).sin().sum(), one)
        (b,) = torch.autograd.grad(norm(x).sin().sum(), other)
        assert_close(a, b, 1e-13)


def test_instance_norm_with_statistics_can_be_frozen() -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm(torch.randn(3, 4, 5, 5) + 2)
    frozen = freeze_batch_norm(copy.deepcopy(norm)).train()
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(frozen(x), norm.eval()(x))


def test_training_moves_weights_of_frozen_norms_and_not_their_statistics(
    tmp_path: Path,
) -> None:
    loop = ran(experiment("frozen"), tmp_path / "r")
    model, start = loop.task.model, loop.task.init_params()
    assert isinstance(model, Net)
    assert isinstance(model.bn1, FrozenBatchNorm)
    assert not any("running" in name for name in start)
    assert not torch.equal(loop.state.server.params["bn1.weight"], start["bn1.weight"])


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_frozen_is_fedavg_of_a_model_in_evaluation_mode(
    engine: str, tmp_path: Path
) -> None:
    e = experiment("frozen", engine__name=engine, rounds=1, participation__cohort=6)
    loop = loop_of(e, tmp_path / "r")
    original = unconverted(loop.task.model)
    expected: Params = {}
    for client, size in enumerate(EVEN):
        trained = plain(original.eval(), client, loop.task, e, 0)
        for name in loop.task.init_params():
            share = trained[name] * size / sum(EVEN)
            expected[name] = expected.get(name, 0) + share
    loop.round()
    assert_close(loop.state.server.params, expected)


# Statistics that stay on the client


def unconverted(model: nn.Module) -> Net:
    """The same model with BatchNorm of PyTorch."""
    assert isinstance(model, Net)
    net = Net().to(model.out.weight.dtype)
    missing, unexpected = net.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("num_batches" in name for name in missing)
    return net


def batches_of(
    task: Task, client: int, e: Experiment, t: int, plan: int = 0
) -> Batches:
    ids = np.array([client])
    stacked = task.data.batches(ids, "train", e.local, e.seed, t, plan)
    return Batches(*(part[0] for part in stacked))


def plain(
    model: Net, client: int, task: Task, e: Experiment, t: int
) -> dict[str, Tensor]:
    """A client's training in plain PyTorch, on its real rows only."""
    model = copy.deepcopy(model)
    train_plainly(model, list(model.parameters()), batches_of(task, client, e, t))
    return model.state_dict()


def train_plainly(model: Net, parameters: list[nn.Parameter], batches: Batches) -> None:
    optimizer = torch.optim.SGD(parameters, LR)
    for x, y, mask in zip(*batches, strict=True):
        real = mask > 0
        if real.any():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[real]), y[real])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


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


# Engines


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ray_computes_what_the_sequential_engine_does(way: str, tmp_path: Path) -> None:
    e = experiment(way)
    workers = experiment(way, engine__name="ray", engine__workers=2)
    one = run(e, tmp_path / "sequential")
    other = run(workers, tmp_path / "ray")
    assert other.params_sha256 == one.params_sha256


@pytest.mark.parametrize("way", WAYS)
def test_clients_are_batched_recorded_and_forked_without_a_warning(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    e = experiment(way, engine__name="vectorised", engine__chunk=2)
    loop = ran(e, tmp_path / "r")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert loop.engine._chunks.impurity is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("way", "method"),
    [
        ("group", "fedsim"),
        ("frozen", "fedsim"),
        ("personal", "fedsim"),
        slow("personal", "fedalt"),
    ],
)
def test_vectorised_is_sequential_with_batches_of_one_and_a_client_without_any(
    way: str, method: str, tmp_path: Path
) -> None:
    options = {"way": way, "sizes": UNEVEN, "dtype": "float64"}
    settings: dict[str, Any] = {"options": options}
    one, two = (
        everything(
            ran(experiment(way, method, engine__name=name, **settings), tmp_path / name)
        )
        for name in ("sequential", "vectorised")
    )
    assert_close(one, two)
    assert all(bool(x.isfinite().all()) for x in trees.leaves(one))


@pytest.mark.parametrize(
    ("way", "engine"),
    [
        ("personal", "sequential"),
        ("personal", "vectorised"),
        slow("group", "vectorised"),
        slow("frozen", "vectorised"),
    ],
)
def test_resume_is_bit_exact(way: str, engine: str, tmp_path: Path) -> None:
    e = experiment(way, engine={"name": engine})
    whole = everything(ran(e, tmp_path / "whole"))
    (tmp_path / "part").mkdir()
    short = experiment(way, engine={"name": engine}, rounds=2)
    with contextlib.closing(loop_of(short, tmp_path / "part")) as loop:
        loop.run()
    resumed = loop_of(e, tmp_path / "part", resume=True)
    assert resumed.state.t == 2
    for _ in range(2):
        resumed.round()
    pairs = zip(trees.leaves(whole), trees.leaves(everything(resumed)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
