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
from fedcore.data.federated import FederatedData
from fedcore.errors import SettingsError
from fedcore.models.norms import (
    FrozenBatchNorm,
    freeze_batch_norm,
    personal_batch_norm,
    to_group_norm,
)
from fedcore.rounds.loop import run
from fedcore.statistics import statistic_names
from fedcore.task import Task
from fedcore.types import Params
from tests.helpers import loop_of, slow
from tests.norms import (
    EVEN,
    UNEVEN,
    WAYS,
    Net,
    assert_close,
    everything,
    experiment,
    plain,
    ran,
    rows_of,
    unconverted,
)

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


# Engines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_computes_what_the_cpu_computes(way: str, tmp_path: Path) -> None:
    options = {"way": way, "dtype": "float64"}
    one = run(experiment(way, options=options, engine__device="cpu"), tmp_path / "cpu")
    cuda: dict[str, Any] = {"engine__device": "cuda", "engine__name": "vectorised"}
    other = run(experiment(way, options=options, **cuda), tmp_path / "gpu")
    assert_close(one.params, trees.to(other.params, torch.device("cpu")))


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
