"""Defences: each by itself, in every engine, and settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fedcore.strategies.fedavg import FedAvg
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.errors import RunError, SettingsError
from fedcore.messages.defence import Defence, DefenceSettings, clip, protect, quantise
from fedcore.method import Method, Round, on_client
from fedcore.reports import equally
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless
from tests.helpers import STRATEGIES, assert_close, equal, loop_of, small
from tests.methods import Settings

ALL: dict[str, Any] = {
    "defence__clip": 0.5,
    "defence__noise_multiplier": 0.02,
    "defence__top_k": 0.7,
    "defence__bits": 8,
}


class Message(NamedTuple):
    w: dict[str, Tensor]
    loss: Tensor
    count: Tensor


def message(scale: float = 1.0) -> Message:
    draw = torch.Generator().manual_seed(1)
    w = {
        "a": torch.randn(300, 20, generator=draw),
        "b": torch.randn(7, generator=draw),
        "gain": torch.tensor(0.3),
    }
    return Message(trees.scale(w, scale), torch.tensor(1.5), torch.arange(4))


def protected(m: Any, seed: int = 0, **settings: Any) -> Any:
    return protect(m, DefenceSettings(**settings), torch.Generator().manual_seed(seed))


def norm(tree: Any) -> float:
    """The L2 norm over all entries."""
    return float(trees.ravel(tree).double().norm())


# Each defence


@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
def test_clipping_bounds_the_norm_over_all_tensors_and_keeps_the_direction(
    bound: float,
) -> None:
    m = message()
    sent = protected(m, clip=bound)
    assert norm(sent.w) <= bound * (1 + 1e-6)
    assert norm(sent.w) == pytest.approx(bound, rel=1e-5)
    product = float(trees.dot(trees.double(sent.w), trees.double(m.w)))
    assert product / norm(sent.w) / norm(m.w) == pytest.approx(1, abs=1e-6)
    scalars = (sent.loss, sent.count.tolist())
    assert scalars == (m.loss, [0, 1, 2, 3]), "sent as they are, without noise"
    assert equal(protected(m, clip=1e6), m), "a message within the bound is not touched"


def test_clipping_changes_no_cosine_so_that_gradient_inversion_sees_the_same() -> None:
    m, other = message().w, message().w
    other = trees.map(lambda x: x + 0.3 * x.abs(), other)

    def loss(update: Any) -> float:  # 1 - cos, what gradient inversion minimises
        a, b = trees.ravel(update).double(), trees.ravel(other).double()
        return float(1 - a @ b / a.norm() / b.norm())

    assert loss(clip(m, 0.01)) == pytest.approx(loss(m), abs=1e-6)


def test_no_noise_all_entries_and_many_bits_are_the_identity() -> None:
    m = message()
    assert equal(protected(m, noise_multiplier=0.0), m)
    assert equal(protected(m, top_k=1.0), m)
    for bits in (24, 32):
        rounded = protected(m, bits=bits)
        for name, x in m.w.items():
            error = (rounded.w[name] - x).abs().max()
            assert error <= 1e-6 * x.abs().max(), (bits, name)


def test_noise_has_its_deviation_on_every_entry_and_scalars_say_nothing() -> None:
    m = message(1e-3)  # within the bound
    sent = protected(m, clip=2.0, noise_multiplier=0.25)
    noise = trees.ravel(trees.sub(sent.w, m.w))
    # 6 008 draws: standard error 0.9 %
    assert float(noise.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float(noise.mean())) < 4 * 0.5 / len(noise) ** 0.5
    assert bool((noise != 0).all()), "the 0-d parameter too"
    assert (sent.loss.item(), sent.count.tolist()) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize("scale", [1e-3, 1.0], ids=["within the bound", "clipped"])
def test_two_tensors_of_one_message_get_different_noise_and_roundings(
    scale: float,
) -> None:
    x = torch.linspace(-scale, scale, 50)
    same = {"a": x, "b": x.clone()}
    noised = protected(same, clip=1.0, noise_multiplier=1.0)
    assert not bool((noised["a"] == noised["b"]).any())
    rounded = protected(same, bits=3)
    assert not torch.equal(rounded["a"], rounded["b"])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.333, 0.999])
def test_top_k_keeps_exactly_the_largest_over_the_whole_message(share: float) -> None:
    m = message()
    before, after = trees.ravel(m.w), trees.ravel(protected(m, top_k=share).w)
    kept = after != 0
    assert int(kept.sum()) == int(np.ceil(share * len(before)))
    assert bool((after[kept] == before[kept]).all())
    assert before[kept].abs().min() >= before[~kept].abs().max()


def test_the_share_of_top_k_is_not_rounded_up_by_floating_point() -> None:
    sent = protected({"a": torch.arange(1.0, 101.0)}, top_k=0.07)
    assert int((sent["a"] != 0).sum()) == 7  # 0.07 x 100 is 7.000000000000001
    sent = protected({"a": torch.ones(10)}, top_k=0.25)
    assert sent["a"].sum() == 3, "ties are broken, not kept"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantisation_has_its_levels_and_is_unbiased(bits: int) -> None:
    x = torch.tensor([-1.0, -0.37, -0.01, 0.0, 0.2, 0.5, 0.73])
    draw, levels, n = torch.Generator().manual_seed(0), 2 ** (bits - 1) - 1, 10_000
    draws = torch.stack([quantise(x, bits, draw) for _ in range(n)]).double()
    steps = draws * levels
    assert (steps - steps.round()).abs().max() < 1e-5
    assert steps.abs().max() <= levels + 1e-5
    error = (draws.mean(0) - x).abs()
    assert bool((error <= 4 * draws.std(0) / n**0.5 + 1e-7).all()), error
    assert bool((draws[:, 3] == 0).all()), "zero stays zero"
    assert quantise(torch.zeros(3), bits, draw).tolist() == [0, 0, 0]


def test_the_order_is_clip_noise_top_k_quantise() -> None:
    m = message()
    all_four = protected(m, clip=1.0, noise_multiplier=1.0, top_k=0.1, bits=2)
    sent = trees.ravel(all_four.w)
    assert int((sent != 0).sum()) <= int(np.ceil(0.1 * len(sent)))
    step = protected(m, clip=1.0, noise_multiplier=1.0, top_k=0.1)
    by_hand = protect(step, DefenceSettings(bits=2), torch.Generator().manual_seed(5))
    assert {float(v) for v in by_hand.w["a"].unique().sign()} <= {-1.0, 0.0, 1.0}
    noised = protected(m, clip=1.0, noise_multiplier=1.0)
    assert norm(noised.w) > 10, "noise comes after the clipping"
    kept = step.w["a"] != 0
    largest = noised.w["a"][kept]
    assert torch.equal(step.w["a"][kept], largest), "of the noised entries"


def test_an_update_that_is_not_finite_leaves_as_nan_and_not_unclipped() -> None:
    m = message(1e3)
    m.w["b"][2] = torch.nan
    sent = protected(m, clip=1.0, noise_multiplier=1.0)
    assert bool(trees.ravel(sent.w).isnan().all())


def test_types_and_shapes_stay(recwarn: pytest.WarningsRecorder) -> None:
    w = {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "double": torch.ones(2, 2, dtype=torch.float64),
        "none": torch.ones(0),
    }
    sent = protected(w, clip=1.0, noise_multiplier=0.1, top_k=0.5, bits=4)
    assert sent.keys() == w.keys()
    for name, x in w.items():
        assert (sent[name].dtype, sent[name].shape) == (x.dtype, x.shape)
    assert not recwarn


# The key


@on_client
def other(self: Any, down: Any) -> Any:
    """Another client function than FedAvg's."""


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"fn": other}, {"t": 2}, {"client": 3}],
    ids=lambda change: next(iter(change)),
)
def test_draws_have_a_key(change: dict[str, Any]) -> None:
    def sent(
        seed: int = 0, fn: Any = FedAvg.train, t: int = 1, client: int = 2
    ) -> Tensor:
        defence = Defence(DefenceSettings(clip=1, noise_multiplier=1), seed)
        noised: Tensor = defence.protect(message(), fn, t, client).w["a"]
        return noised

    assert torch.equal(sent(), sent())
    assert not torch.equal(sent(), sent(**change))


def test_an_evaluation_message_passes_untouched(tmp_path: Path) -> None:
    settings = DefenceSettings(clip=1e-6, noise_multiplier=10.0, top_k=0.01, bits=2)
    sent = Defence(settings, 0).protect(message(), FedAvg.evaluate, 0, 0)
    assert equal(sent, message())
    defended = loop_of(small("fedavg", **ALL), tmp_path / "a")
    plain = loop_of(small("fedavg"), tmp_path / "b")
    assert defended.evaluate() == plain.evaluate()


# In a run


def defended(name: str) -> dict[str, Any]:
    """The defences that a method can have.

    Quantisation alone where messages are no differences; none where it clips itself.
    """
    if name == "dpfedavg":
        return {}
    differences = small(name).build_method().differences
    return ALL if differences else {"defence__bits": 8}


@pytest.mark.parametrize("name", [*STRATEGIES, "tests.methods:Two"])
def test_defences_are_the_same_in_every_engine_and_every_run(
    name: str, tmp_path: Path
) -> None:
    settings = defended(name)
    one = run(small(name, **settings), tmp_path / "a")
    again = run(small(name, **settings), tmp_path / "b")
    chunks = {"engine__name": "vectorised", "engine__chunk": 3}
    batched = run(small(name, **settings, **chunks), tmp_path / "c")
    assert one.params_sha256 == again.params_sha256
    assert_close(batched.params, one.params, 1e-6, f"{name} in chunks of 3")
    assert one.dropped == batched.dropped == {}
    if settings:
        plain = run(small(name), tmp_path / "d")
        assert plain.params_sha256 != one.params_sha256
        assert (plain.bytes_up, plain.bytes_down) == (one.bytes_up, one.bytes_down)


@pytest.mark.slow
def test_ray_has_the_bits_of_sequential_with_defences_too(tmp_path: Path) -> None:
    one = run(small("scaffold", **ALL), tmp_path / "a")
    workers = {"engine__name": "ray", "engine__workers": 2}
    ray = run(small("scaffold", **ALL, **workers), tmp_path / "b")
    assert ray.params_sha256 == one.params_sha256
    assert ray.final["privacy"] == one.final["privacy"]


def test_the_server_receives_what_was_protected_and_the_channel_comes_after(
    tmp_path: Path,
) -> None:
    clipped = {"defence__clip": 0.01}
    quiet = loop_of(small("fedavg", **clipped), tmp_path / "a")
    e = small("fedavg", **clipped, links__uplink__variance=1.0)
    noisy = loop_of(e, tmp_path / "b")
    down, fn = Model(quiet.state.server.params), quiet.method.train  # type: ignore[attr-defined]
    (report,) = quiet.engine.each(fn, torch.tensor([2]), down, 0)
    assert norm(report.up.delta) <= 0.01 * (1 + 1e-6)
    (report,) = noisy.engine.each(fn, torch.tensor([2]), down, 0)
    assert norm(report.up.delta) > 0.1


def test_a_client_keeps_what_it_sent_unprotected(tmp_path: Path) -> None:
    kept = []
    for folder, settings in (("defended", ALL), ("plain", {})):
        loop = loop_of(small("scaffold", **settings), tmp_path / folder)
        loop.round()
        cohort, _ = loop.process.sample(0, {})
        assert loop.engine.states is not None
        kept.append(loop.engine.states.get(int(cohort[0])))
    assert equal(*kept)


def test_with_noise_no_training_loss_is_logged_and_without_it_is(
    tmp_path: Path,
) -> None:
    noise = {"defence__clip": 1.0, "defence__noise_multiplier": 1.0}
    noisy = run(small("fedavg", **noise), tmp_path / "a")
    for row in noisy.history:
        assert not any(key.startswith("train_") for key in row)
    trained = read_clients(tmp_path / "a", function="train")
    assert np.isnan(trained["loss"].to_numpy()).all()
    measured = read_clients(tmp_path / "a", function="evaluate")
    assert np.isfinite(measured["loss"].to_numpy()).all()
    clipped = run(small("fedavg", defence__clip=1.0), tmp_path / "b")
    assert clipped.history[0]["train_loss"] > 0
    assert clipped.history[0]["reports"] == noisy.history[0]["reports"] == 5


class Again(Method[Settings]):
    """Asks the same work of its clients twice in one round."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        return Model(trees.zeros_like(down.params)), state

    def round(self, server: Model, r: Round) -> Model:
        for _ in range(2):
            mean = r.mean(self.train, r.cohort, server, equally)
            change: Params = mean.value.params
            server = Model(trees.add(server.params, change))
        return server


def test_the_same_noise_twice_is_refused(tmp_path: Path) -> None:
    clipped = {"defence__clip": 1.0}
    run(small("tests.test_defence:Again", **clipped), tmp_path / "a")
    e = small("tests.test_defence:Again", **clipped, defence__noise_multiplier=1.0)
    refusal = r'asks client \d+ for "train" twice in one round'
    with pytest.raises(RunError, match=refusal):
        run(e, tmp_path / "b")


# Settings that are refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip", 0),
        ("clip", -1),
        ("noise_multiplier", -1),
        ("top_k", 0),
        ("top_k", 1.1),
        ("bits", 1),
        ("bits", 33),
    ],
)
def test_settings_outside_their_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(SettingsError, match=rf"defence\.{key} = "):
        small("fedavg", **{f"defence__{key}": value})


def test_noise_without_a_bound_and_unknown_keys_are_refused_in_words() -> None:
    unbounded = r"defence: noise_multiplier = 1\.0 without clip.*set clip too"
    with pytest.raises(SettingsError, match=unbounded):
        small("fedavg", defence__noise_multiplier=1.0)
    unknown = r"unknown key defence\.noise.*did you mean defence\.noise_multiplier"
    with pytest.raises(SettingsError, match=unknown):
        small("fedavg", defence__noise_multiplie=1.0)
    overrides = ["defence.clip=1", "defence.noise_multiplier=0.5"]
    e = Experiment.load("strategies/fedavg.toml", overrides)
    assert e.defence == DefenceSettings(clip=1, noise_multiplier=0.5)


@pytest.mark.parametrize("name", ["admm", "rerce", "clu", "fedamd"])
@pytest.mark.parametrize(
    "settings", [{"defence__clip": 1.0}, {"defence__top_k": 0.5}], ids=["clip", "top_k"]
)
def test_methods_that_send_other_things_than_differences_refuse_clipping(
    name: str, settings: Any, tmp_path: Path
) -> None:
    other_things = r"sends other things \(whole models, or gradients\).*e\.g\. fedavg"
    with pytest.raises(SettingsError, match=f"{name} {other_things}"):
        run(small(name, **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_work_without_a_defence_sends_what_it_computed(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg"), tmp_path)
    work = Work(loop.task, loop.method, loop.experiment.local, 0)
    fn = loop.method.train  # type: ignore[attr-defined]
    assert work.arrives_as_is(fn)
    assert equal(work.send(message(), fn, 0, 0), message())
