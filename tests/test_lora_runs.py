"""Methods on adapters in whole runs: what moves, what travels, and what stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fedcore.strategies.exactlora import Down
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.engines.chunks import Chunks
from fedcore.engines.message_shape import message_shape
from fedcore.errors import SettingsError
from fedcore.factors import Pair, Products, pair_of
from fedcore.local import steps_run_by
from fedcore.methods import load
from fedcore.models.lora import LoraSettings, with_lora
from fedcore.rng import rng
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import Loop, Result, run
from fedcore.settings.presets import read_preset
from fedcore.tasks import build_task
from fedcore.types import Model, Params, Stateless
from tests.helpers import assert_close, equal, loop_of, loop_round

RANK, M, N = 4, 32, 64  # of the layer that has an adapter
FACTORS = 4 * RANK * (M + N)  # bytes
PRESETS = [
    "fedit",
    "ffalora",
    "fedsalora",
    "rolora",
    "fedexlora",
    "flora",
    "flexlora",
    "hetlora",
]


def digits(preset: str, **settings: Any) -> Experiment:
    """The method and the adapters of a preset on small images, by plain SGD."""
    values = read_preset(preset)
    own = {key: values[key] for key in ("method", "lora")}
    own["lora"] = {**own["lora"], "rank": RANK, "alpha": RANK, "targets": ["1"]}
    own["method"] = {**own["method"], "local_lr": 0.1}
    if "ranks" in own["method"]:
        own["method"]["ranks"] = [1, 2, RANK]
    base: dict[str, Any] = {
        "task": "digits",
        "population": 12,
        "rounds": 3,
        "model": {"name": "mlp", "hidden": [M]},
        "local": {"batch_size": 20},
        "participation": {"name": "uniform", "cohort": 5},
        "evaluation": {"every": 1},
        "engine": {"name": "sequential"},
    }
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse({**base, **own}, overrides)


def frozen(model: nn.Module) -> Params:
    values = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            values[name] = value.detach().clone()
    return values


def last(result: Result, name: str) -> list[float]:
    return [row[name] for row in result.history]


# Every preset


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_weights_keep_their_bytes_and_factors_alone_travel(
    preset: str, tmp_path: Path
) -> None:
    loop = loop_of(digits(preset, engine__name="vectorised"), tmp_path / "r")
    before = frozen(loop.task.model)
    assert {"1.weight", "1.bias", "3.weight", "3.bias"} <= before.keys()
    try:
        result = loop.run()
    finally:
        loop.close()
    assert equal(before, frozen(loop.task.model))
    assert result.dropped == {}
    loss = 4  # bytes of the training loss that each client sends
    up = [row["bytes_up"] - 5 * loss for row in result.history]
    shares = {"ffalora": RANK * M, "fedsalora": RANK * N}
    if preset in shares:
        assert up == [5 * 4 * shares[preset]] * 3
    elif preset == "rolora":
        assert up == [5 * 4 * RANK * side for side in (M, N, M)]
    elif preset in ("flexlora", "hetlora"):
        ranks = [_ranks(loop, t) for t in range(3)]
        assert up == [sum(ranks[t]) * 4 * (M + N) for t in range(3)]
        assert len({rank for row in ranks for rank in row}) == 3
        assert last(result, "bytes_down") == up
    else:
        assert up == [5 * FACTORS] * 3
    if preset == "fedit":
        assert last(result, "bytes_down") == [5 * FACTORS] * 3


def _ranks(loop: Loop, t: int) -> list[int]:
    """The ranks of the clients that took part in round t."""
    table = read_clients(loop.folder, "train", columns=["round", "client"])
    method: Any = loop.method
    ranks = []
    for row in table.to_pylist():
        if row["round"] == t + 1:
            draw = rng(loop.experiment.seed, "lora rank", row["client"])
            ranks.append(method.s.ranks[draw.integers(3)])
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_adapters_learns(preset: str, tmp_path: Path) -> None:
    settings = {"rounds": 8, "lora__train": ["output"], "method__local_lr": 0.15}
    more = {"engine__name": "vectorised", "local__epochs": 4}
    result = run(digits(preset, **settings, **more), tmp_path / "r")
    losses = last(result, "test_loss")
    assert losses[-1] < 0.9 * losses[0]


# What a change of weights is to a client


def works(form: str, rank: int = RANK) -> tuple[Work, Any]:
    """The work of the clients of exactlora, and its method."""
    preset = {"fedex": "fedexlora"}.get(form, form)
    e = digits(preset, lora__rank=rank, lora__alpha=rank)
    task = build_task(e)
    method = load("exactlora")(e.method)
    return Work(task, method, e.local, 0), method


@pytest.mark.parametrize("is_whole", [True, False])
def test_clients_train_on_the_changed_weight(is_whole: bool) -> None:
    """As on a model whose own weight has the change in it; [M, N] is not square."""
    work, method = works("fedex")
    task, draw = work.task, torch.Generator().manual_seed(0)
    left = torch.randn(M, 2, generator=draw)
    right = torch.randn(2, N, generator=draw) / 10
    params = {name: value + 0.1 for name, value in task.init_params().items()}
    down = Down(params, {}, {"1": left}, {"1": right})
    if is_whole:
        down = Down(params, {"1": left @ right}, {}, {})
    up, _ = work.one(method.train, 3, down, Stateless(), 0)
    with torch.no_grad():
        task.model.get_parameter("1.weight").add_(left @ right)
    expected, _ = work.one(method.train, 3, Down(params, {}, {}, {}), Stateless(), 0)
    assert_close(up, expected, 1e-6, "an update at W0 + C")
    with torch.no_grad():
        task.model.get_parameter("1.weight").sub_(2 * left @ right)
    other, _ = work.one(method.train, 3, Down(params, {}, {}, {}), Stateless(), 0)
    assert not torch.allclose(up.delta["1.lora_B"], other.delta["1.lora_B"], atol=1e-3)


def test_fine_tuning_starts_from_the_changed_weight() -> None:
    work, method = works("flora")
    params = work.task.init_params()
    change = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    losses = []
    for down in (params, {**params, "1.lora_change": change}):
        metrics, _ = work.one(method.evaluate, 3, Model(down), Stateless(), 0)
        tuned, _ = work.one(method.finetune, 3, Model(down), Stateless(), 0)
        # No epoch of fine-tuning: what is measured is the start.
        assert equal(metrics, tuned)
        losses.append(metrics.metrics["loss"].item())
    assert losses[0] != losses[1]


def test_a_model_whose_layers_take_no_change_is_refused() -> None:
    work, method = works("fedex")
    del work.task.model.get_submodule("1")._buffers["lora_change"]
    with pytest.raises(SettingsError, match='the layer "1" takes no change'):
        method.check(work.task, 5)


def test_what_a_round_loses_is_of_second_order_in_the_step_size() -> None:
    work, method = works("fedex", rank=2)
    draw = torch.Generator().manual_seed(0)
    params = {}
    for name, value in work.task.init_params().items():
        params[name] = value + 0.1 * torch.randn(value.shape, generator=draw)
    lost = []
    for lr in (0.2, 0.1, 0.05):
        settings = method.s.model_copy(update={"local_lr": lr})
        one_step = work.local.model_copy(update={"steps": 1})
        again: Any = type(method)(settings)
        other = Work(work.task, again, one_step, 0)
        moves = []
        for client in range(3):
            down = Down(params, {}, {}, {})
            up, _ = other.one(again.train, client, down, Stateless(), 0)
            moves.append(pair_of(up.delta, "1"))
        products = Products(keeps_factors=True)
        for pair in moves:
            products.add(Pair(pair.left[None], pair.right[None]), torch.ones(1))
        lost.append(products.centred_pair().product.norm().item())
    assert lost[0] / lost[1] == pytest.approx(4, rel=1e-3)
    assert lost[1] / lost[2] == pytest.approx(4, rel=1e-3)


def test_the_first_round_of_one_step_loses_nothing(tmp_path: Path) -> None:
    """While B = 0 the gradient of A is exactly zero."""
    one_step = {"local": {"batch_size": 20, "steps": 1}}
    result = run(digits("fedexlora", rounds=2, **one_step), tmp_path / "r")
    first, second = last(result, "server_residual")
    assert first == 0
    assert 0 < second < 0.1


# Reductions


def test_ffa_with_the_identity_is_full_fine_tuning_of_that_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 6).double(), torch.randn(9, 3).double()
    full = {"0.weight": dense.get_parameter("0.weight").detach().clone()}
    settings = LoraSettings(rank=6, alpha=12, freeze="A")
    model = with_lora(copy.deepcopy(dense), settings)
    model.get_parameter("0.lora_A").data = torch.eye(6).double()
    B, s, eta = {"0.lora_B": torch.zeros(4, 6).double()}, 2.0, 0.05
    start = full["0.weight"].clone()
    for _ in range(5):
        slope_B = grad(lambda p: _error(model, p, x, y))(B)
        slope_W = grad(lambda p: _error(dense, p, x, y))(full)
        B = trees.axpy(-eta, slope_B, B)
        full = trees.axpy(-(s**2) * eta, slope_W, full)
    moved = full["0.weight"] - start
    assert moved.abs().max() > 0.01
    assert torch.allclose(s * B["0.lora_B"], moved, rtol=0, atol=1e-15)


def _error(model: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    outputs: Tensor = functional_call(model, params, (x,))
    return (outputs - y).square().mean()


def test_scale_and_step_size_of_ffa_are_one_choice(tmp_path: Path) -> None:
    """(s, eta) is (1, s^2 eta), to the bit where s is a power of two."""
    products = []
    for alpha, lr in ((2 * RANK, 0.025), (RANK, 0.1)):
        settings = {"lora__alpha": alpha, "method__local_lr": lr}
        result = run(digits("ffalora", **settings), tmp_path / str(alpha))
        products.append(alpha / RANK * result.params["1.lora_B"])
    assert products[0].abs().max() > 0.01
    assert torch.equal(*products)


def test_rolora_moves_one_factor_a_round_and_b_is_first(tmp_path: Path) -> None:
    loop = loop_of(digits("rolora"), tmp_path)
    before, moved = loop.state.server.params, []
    for t in range(4):
        r = loop_round(loop, t, range(5))
        after = loop.method.round(Model(before), r).params
        moved.append([n for n in before if not torch.equal(before[n], after[n])])
        before = after
    assert moved == [["1.lora_B"], ["1.lora_A"]] * 2


def test_a_round_of_a_before_one_of_b_is_lost(tmp_path: Path) -> None:
    settings = {"rounds": 1, "method__first": "A"}
    result = run(digits("rolora", **settings), tmp_path / "r")
    assert not result.params["1.lora_B"].any()
    start = build_task(digits("rolora")).init_params()
    assert torch.equal(result.params["1.lora_A"], start["1.lora_A"])


def test_fedsa_shares_a_alone(tmp_path: Path) -> None:
    loop = loop_of(digits("fedsalora"), tmp_path)
    method: Any = loop.method
    up = message_shape(loop.desk.work, method.train, loop.state.server, 0)
    assert list(up.delta) == ["1.lora_A"]
    assert list(loop.state.server.params) == ["1.lora_A"]
    assert list(method.init_client(loop.task.init_params()).v) == ["1.lora_B"]
    assert method.personalises()


def test_of_equal_clients_fedsa_is_fedit(tmp_path: Path) -> None:
    """Where all of them take part in every round, on the same batches."""
    settings = {
        "task": "tests.lora:equal_clients",
        "participation": {"name": "uniform", "fraction": 1.0},
        "local": {"batch_size": 100, "epochs": 3},
        "lora__targets": ["0"],
    }
    one = run(digits("fedit", **settings), tmp_path / "fedit")
    other = loop_of(digits("fedsalora", **settings), tmp_path / "fedsa")
    result = other.run()
    assert torch.allclose(result.params["0.lora_A"], one.params["0.lora_A"], atol=1e-6)
    own = other.engine.states.get(2).v["0.lora_B"]  # type: ignore[union-attr]
    assert own.abs().max() > 0.01
    assert torch.allclose(own, one.params["0.lora_B"], atol=1e-6)
    other.close()


# On a transformer of text


def test_adapters_of_a_transformer_are_recorded_and_batched(tmp_path: Path) -> None:
    results = []
    for engine in ("sequential", "vectorised"):
        results.append(run(tokens(engine), tmp_path / engine))
    one, other = results
    assert_close(other.params, one.params, 1e-5, "gpt with adapters in one batch")
    e = tokens("vectorised")
    loop = loop_of(e, tmp_path / "r")
    chunks = Chunks(loop.desk.work)
    batches = loop.desk.work.batches(loop.method.train, [0, 1], 0)  # type: ignore[attr-defined]
    chunks.begin_round(0)
    with steps_run_by(chunks.recorder):
        down, state = loop.state.server, Stateless()
        chunks.batched(loop.method.train, down, state, batches, 0)  # type: ignore[attr-defined]
    assert chunks.recorder is not None
    recordings = list(chunks.recorder._recordings.values())
    assert recordings
    assert all(recording.code is not None for recording in recordings)


def tokens(engine: str) -> Experiment:
    """A small transformer with adapters."""
    lora = {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]}
    values = {"task": "tests.lora:tokens", "lora": lora, "engine": {"name": engine}}
    values |= {"method": {"name": "fedavg", "local_lr": 0.5}, "rounds": 2}
    values["local"] = {"steps": 3, "batch_size": 2}
    values["participation"] = {"name": "uniform", "cohort": 4}
    return Experiment.parse(values)
