"""What leaves a client: clipped, noised, made sparse, rounded; the same in every engine; and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.errors import RunError, SettingsError
from fedcore.messages.defence import Defence, DefenceSettings, clip, protect, quantise
from fedcore.method import Method, Round, on_client
from fedcore.reports import equally
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless
from strategies.fedavg import FedAvg
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
    return float(trees.ravel(tree).double().norm())


# Each defence (specification, section 12.5)


@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
def test_clipping_bounds_the_norm_over_all_tensors_and_keeps_the_direction(
    bound: float,
) -> None:
    m = message()
    sent = protected(m, clip=bound)
    assert norm(sent.w) <= bound * (1 + 1e-6)
    assert norm(sent.w) == pytest.approx(bound, rel=1e-5)
    cosine = (
        float(trees.dot(trees.double(sent.w), trees.double(m.w)))
        / norm(sent.w)
        / norm(m.w)
    )
    assert cosine == pytest.approx(1, abs=1e-6)
    assert (sent.loss, sent.count.tolist()) == (m.loss, [0, 1, 2, 3]), (
        "without noise, scalars are sent as they are"
    )
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
            assert (rounded.w[name] - x).abs().max() <= 1e-6 * x.abs().max(), (
                bits,
                name,
            )


def test_noise_has_its_deviation_on_every_entry_and_scalars_say_nothing() -> None:
    m = message(1e-3)  # within the bound
    sent = protected(m, clip=2.0, noise_multiplier=0.25)
    noise = trees.ravel(trees.sub(sent.w, m.w))
    assert float(noise.std()) == pytest.approx(
        0.5, rel=0.03
    )  # 6 008 draws: standard error 0.9 %
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
    w = {"a": torch.arange(1.0, 101.0)}
    assert (
        int((protected(w, top_k=0.07)["a"] != 0).sum()) == 7
    )  # 0.07 x 100 is 7.000000000000001
    assert protected({"a": torch.ones(10)}, top_k=0.25)["a"].sum() == 3, (
        "ties are broken, not kept"
    )


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
    sent = trees.ravel(
        protected(m, clip=1.0, noise_multiplier=1.0, top_k=0.1, bits=2).w
    )
    assert int((sent != 0).sum()) <= int(np.ceil(0.1 * len(sent)))
    step = protected(m, clip=1.0, noise_multiplier=1.0, top_k=0.1)
    by_hand = protect(step, DefenceSettings(bits=2), torch.Generator().manual_seed(5))
    assert {float(v) for v in by_hand.w["a"].unique().sign()} <= {-1.0, 0.0, 1.0}
    noised = protected(m, clip=1.0, noise_multiplier=1.0)
    assert norm(noised.w) > 10, "noise comes after the clipping"
    kept = step.w["a"] != 0
    assert torch.equal(step.w["a"][kept], noised.w["a"][kept]), (
        "the largest of the noised entries"
    )


def test_an_update_that_is_not_finite_is_refused_whole_instead_of_leaving_unclipped() -> (
    None
):
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
    assert {n: (x.dtype, x.shape) for n, x in sent.items()} == {
        n: (x.dtype, x.shape) for n, x in w.items()
    }
    assert not recwarn


# The key


def test_draws_have_a_key_and_differ_by_seed_round_client_and_function() -> None:
    def other(self, down) -> None:  # type: ignore[no-untyped-def]
        pass

    other.client_data = "train"  # type: ignore[attr-defined]

    def sent(
        seed: int = 0, fn: Any = FedAvg.train, t: int = 1, client: int = 2
    ) -> Tensor:
        found: Tensor = (
            Defence(DefenceSettings(clip=1, noise_multiplier=1), seed)
            .protect(message(), fn, t, client)
            .w["a"]
        )
        return found

    assert torch.equal(sent(), sent())
    for change in ({"seed": 1}, {"fn": other}, {"t": 2}, {"client": 3}):
        assert not torch.equal(sent(), sent(**change)), change  # type: ignore[arg-type]


def test_an_evaluation_message_passes_untouched(tmp_path: Path) -> None:
    settings = DefenceSettings(clip=1e-6, noise_multiplier=10.0, top_k=0.01, bits=2)
    assert equal(
        Defence(settings, 0).protect(message(), FedAvg.evaluate, 0, 0), message()
    )
    defended = loop_of(small("fedavg", **ALL), tmp_path / "a")
    plain = loop_of(small("fedavg"), tmp_path / "b")
    assert defended.evaluate() == plain.evaluate()


# In a run


def defended(name: str) -> dict[str, Any]:
    """What this method can have: quantisation alone where messages are no differences, nothing where it clips by itself."""
    if name == "dpfedavg":
        return {}
    return ALL if loop_differences(name) else {"defence__bits": 8}


def loop_differences(name: str) -> bool:
    return type(small(name).build_method()).differences


@pytest.mark.parametrize("name", [*STRATEGIES, "tests.methods:Two"])
def test_defences_are_the_same_in_every_engine_and_every_run(
    name: str, tmp_path: Path
) -> None:
    settings = defended(name)
    one, again = (run(small(name, **settings), tmp_path / folder) for folder in "ab")
    batched = run(
        small(name, **settings, engine__name="vectorised", engine__chunk=3),
        tmp_path / "c",
    )
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
    ray = run(
        small("scaffold", **ALL, engine__name="ray", engine__workers=2), tmp_path / "b"
    )
    assert ray.params_sha256 == one.params_sha256
    assert ray.final["privacy"] == one.final["privacy"]


def test_the_server_receives_what_was_protected_and_the_channel_comes_after(
    tmp_path: Path,
) -> None:
    quiet = loop_of(small("fedavg", defence__clip=0.01), tmp_path / "a")
    noisy = loop_of(
        small("fedavg", defence__clip=0.01, links__uplink__variance=1.0), tmp_path / "b"
    )
    down, fn = Model(quiet.state.server.params), quiet.method.train  # type: ignore[attr-defined]
    (report,) = quiet.engine.each(fn, torch.tensor([2]), down, 0)
    assert norm(report.up.delta) <= 0.01 * (1 + 1e-6)
    (report,) = noisy.engine.each(fn, torch.tensor([2]), down, 0)
    assert norm(report.up.delta) > 0.1


def test_a_client_keeps_what_it_sent_unprotected(tmp_path: Path) -> None:
    loops = [
        loop_of(small("scaffold", **s), tmp_path / str(i))
        for i, s in enumerate((ALL, {}))
    ]
    for loop in loops:
        loop.round()
    client = int(loops[0].process.sample(0, {})[0][0])
    assert equal(*(loop.engine.states.get(client) for loop in loops))  # type: ignore[union-attr]


def test_with_noise_no_training_loss_is_logged_and_without_it_is(
    tmp_path: Path,
) -> None:
    noisy = run(
        small("fedavg", defence__clip=1.0, defence__noise_multiplier=1.0),
        tmp_path / "a",
    )
    assert not any(key.startswith("train_") for row in noisy.history for key in row)
    table = pq.read_table(tmp_path / "a" / "clients.parquet").to_pylist()
    assert {row["function"] for row in table} == {"train", "evaluate"}
    assert all(np.isnan(row["loss"]) for row in table if row["function"] == "train")
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
    run(small("tests.test_defence:Again", defence__clip=1.0), tmp_path / "a")
    with pytest.raises(
        RunError, match=r'asks client \d+ for "train" twice in one round'
    ):
        run(
            small(
                "tests.test_defence:Again",
                defence__clip=1.0,
                defence__noise_multiplier=1.0,
            ),
            tmp_path / "b",
        )


# What a user can get wrong


def test_settings_that_mean_nothing_are_refused_in_words() -> None:
    with pytest.raises(
        SettingsError,
        match=r"defence: noise_multiplier = 1\.0 without clip.*set clip too",
    ):
        small("fedavg", defence__noise_multiplier=1.0)
    for key, value in (
        ("clip", 0),
        ("clip", -1),
        ("noise_multiplier", -1),
        ("top_k", 0),
        ("top_k", 1.1),
        ("bits", 1),
        ("bits", 33),
    ):
        with pytest.raises(SettingsError, match=rf"defence\.{key} = "):
            small("fedavg", **{f"defence__{key}": value})
    with pytest.raises(
        SettingsError,
        match=r"unknown key defence\.noise.*did you mean defence\.noise_multiplier",
    ):
        small("fedavg", defence__noise_multiplie=1.0)
    e = Experiment.load(
        "strategies/fedavg.toml", ["defence.clip=1", "defence.noise_multiplier=0.5"]
    )
    assert (
        e.defence.clip,
        e.defence.noise_multiplier,
        e.defence.top_k,
        e.defence.bits,
    ) == (1, 0.5, 1, None)


@pytest.mark.parametrize("name", ["admm", "rerce", "clu", "fedamd"])
@pytest.mark.parametrize(
    "settings", [{"defence__clip": 1.0}, {"defence__top_k": 0.5}], ids=["clip", "top_k"]
)
def test_methods_that_send_other_things_than_differences_refuse_clipping(
    name: str, settings: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        SettingsError,
        match=rf"{name} sends other things \(whole models, or gradients\).*e\.g\. fedavg",
    ):
        run(small(name, **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_work_without_a_defence_sends_what_it_computed(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg"), tmp_path)
    work = Work(loop.task, loop.method, loop.experiment.local, 0)
    fn = loop.method.train  # type: ignore[attr-defined]
    assert work.arrives_as_is(fn)
    assert equal(work.send(message(), fn, 0, 0), message())
