"""Captured updates are what the server got, neither more nor less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit.attacks.base import gradient
from fedcore.audit.observe import observation, public_of, truth_of
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.reports import Reports
from fedcore.rounds import captures, loop
from fedcore.rounds.captures import Exchange, captured
from fedcore.tasks import build_task
from fedcore.types import Params, Tree
from tests.audits import gradient_of
from tests.helpers import assert_close, equal, loop_of

DIGITS: dict[str, Any] = {
    "task": "digits",
    "population": 8,
    "rounds": 3,
    "seed": 3,
    "holdout": 0.0,
    "model": {"name": "mlp", "hidden": [6]},
    "partition": {"name": "iid"},
    "local": {"batch_size": 64},
    "participation": {"name": "uniform", "cohort": 4},
    "evaluation": {"every": 3, "clients": 0},
    "checkpoint": {"seconds": 0.0},
    "engine": {"name": "sequential"},
    "audit": {"capture": 2},
}
# Methods whose messages differ in kind; `by_hand` writes out what each of them sends.
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": {"name": "fedavg"}},
    "scaffold": {"method": {"name": "scaffold"}},
    "fedsim with a personal output layer": {
        "method": {"name": "fedsim", "personal": ["output"]}
    },
    "fedamd": {"method": {"name": "fedamd", "local_lr": 0.05, "p": 0.5}},
    "rerce": {"method": {"name": "rerce", "rho": 0.1}},
    "fedavg of FedPara factors": {
        "method": {"name": "fedavg"},
        "lowrank": {"form": "fedpara"},
        "model": {"name": "mlp", "hidden": [64]},
    },
    "fedavg over noisy links": {
        "method": {"name": "fedavg"},
        "links": {"uplink": {"snr_db": 20.0}, "downlink": {"variance": 1e-4}},
    },
    "fedavg with clipping and noise": {
        "method": {"name": "fedavg"},
        "defence": {"clip": 0.5, "noise_multiplier": 0.1},
        "participation": {"name": "bernoulli", "mean": 0.5},
    },
}
every_method = pytest.mark.parametrize("name", METHODS)


def digits(name: str = "fedavg", **settings: Any) -> Experiment:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse({**DIGITS, **METHODS[name]}, overrides)


def by_hand(down: Any, up: Any) -> tuple[Params, Params] | None:
    """(start, change) of a message, from its fields."""
    if hasattr(up, "delta"):
        return down.params, up.delta
    if hasattr(up, "v"):  # FedAMD's full gradient: a step of size 1
        return down.params, trees.scale(up.v, -1.0)
    if hasattr(up, "w"):  # RERCE sends its whole model
        return down.s, trees.sub(up.w, down.s)
    return None


def record(run: loop.Loop) -> list[Exchange]:
    """Everything that the loop's engine brings back from now on."""
    seen: list[Exchange] = []
    each = run.engine.each

    def recording(fn: Any, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        for reports in each(fn, clients, down, t):
            for row, client in enumerate(reports.clients.tolist()):
                told = by_hand(down, trees.at(reports.up, row))
                if told is None or fn.__name__.startswith("evaluate"):
                    continue
                w0, delta = (trees.map(torch.clone, side) for side in told)
                n = int(reports.num_examples[row])
                seen.append(Exchange(t + 1, client, fn.__name__, w0, delta, n))
            yield reports

    run.engine.each = recording  # type: ignore[method-assign]
    return seen


@every_method
def test_captures_are_exactly_what_the_server_got(name: str, tmp_path: Path) -> None:
    run = loop_of(digits(name), tmp_path)
    seen = record(run)
    run.run()
    kept = captured(tmp_path)
    assert {exchange.round for exchange in kept} == {1, 3}
    for t in (1, 3):
        of_round = [exchange for exchange in kept if exchange.round == t]
        clients = {exchange.client for exchange in of_round}
        assert 0 < len(clients) <= 2
        expected = [x for x in seen if x.round == t and x.client in clients]
        for one, other in zip(of_round, expected, strict=True):
            assert one[:3] == other[:3]
            assert one.num_examples == other.num_examples
            assert equal([one.w0, one.delta], [other.w0, other.delta]), one[:3]


@every_method
def test_a_captured_run_trains_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    plain = loop.run(digits(name, audit__capture=0), tmp_path / "plain")
    kept = loop.run(digits(name), tmp_path / "kept")
    assert plain.params_sha256 == kept.params_sha256
    assert not (tmp_path / "plain" / captures.FOLDER).exists()


def test_personal_tensors_never_reach_a_capture(tmp_path: Path) -> None:
    experiment = digits("fedsim with a personal output layer")
    run = loop_of(experiment, tmp_path)
    run.run()
    published = run.task.init_params()
    names, kept = list(published), captured(tmp_path)
    shared, personal = names[:2], names[2:]
    for exchange in kept:
        assert sorted(exchange.w0) == sorted(exchange.delta) == sorted(shared)
    for file in (tmp_path / captures.FOLDER).iterdir():
        content = file.read_bytes()
        assert not any(name.encode() in content for name in personal)
    seen = observation(run.method, public_of(experiment, run.task), kept[-1])
    assert list(seen.delta) == shared
    for name in personal:
        assert torch.equal(seen.w0[name], published[name])
        assert torch.equal(seen.wT[name], seen.w0[name])


def test_factors_are_observed_as_factors(tmp_path: Path) -> None:
    experiment = digits("fedavg of FedPara factors")
    run = loop_of(experiment, tmp_path)
    run.run()
    public = public_of(experiment, run.task)
    seen = observation(run.method, public, captured(tmp_path)[0])
    assert list(seen.w0) == list(seen.delta) == list(run.task.init_params())
    kinds = {name.rpartition(".")[2] for name in seen.delta}
    assert kinds == {"X1", "Y1", "X2", "Y2", "bias"}
    x = run.task.data.x[:5]
    assert torch.equal(public.predict(seen.w0, x), run.task.predict(seen.w0, x))


def test_a_full_gradient_is_observed_as_one_step_of_size_one(tmp_path: Path) -> None:
    """The anchors of FedAMD, whose own step size and batches do not count."""
    local = {"local__epochs": 4, "local__batch_size": 8}
    all_rounds = {"audit__capture": 4, "audit__rounds": [1, 2, 3]}
    experiment = digits("fedamd", **local, **all_rounds)
    run = loop_of(experiment, tmp_path)
    run.run()
    public, functions = public_of(experiment, run.task), set[str]()
    for exchange in captured(tmp_path):
        seen = observation(run.method, public, exchange)
        functions.add(seen.function)
        if seen.function != "anchor":
            assert (seen.public.lr, seen.public.epochs) == (0.05, 4)
            continue
        n = exchange.num_examples
        assert (seen.public.lr, seen.public.local_steps(n)) == (1.0, 1)
        # So an attack that divides by eta T has the client's gradient itself.
        truth = truth_of(run.task, exchange.client)
        g = gradient_of(public.model, seen.w0, *truth)
        assert_close(gradient(seen), g, 1e-6, f"client {exchange.client}")
    assert functions == {"anchor", "mine"}


def test_the_client_that_was_met_before_is_chosen_again(tmp_path: Path) -> None:
    everybody = {"audit__capture": 1, "participation__cohort": 8}
    loop.run(digits(audit__rounds=[1, 2, 3], **everybody), tmp_path)
    kept = captured(tmp_path)
    assert len({exchange.client for exchange in kept}) == 1
    assert [exchange.round for exchange in kept] == [1, 2, 3]


def test_a_run_that_was_interrupted_keeps_its_captures(tmp_path: Path) -> None:
    experiment = digits(audit__rounds=[1, 3])

    class Impatient(loop.Quiet):
        def round_done(self, row: dict[str, Any]) -> None:
            if row["round"] == 2:
                begun._stop.set()

    (tmp_path / "part").mkdir()
    begun = loop.Loop(experiment, tmp_path / "part", Impatient(), None, False)
    with pytest.raises(loop.Interrupted):
        begun.run()
    begun.close()
    # A run can be audited while it runs.
    assert {exchange.round for exchange in captured(tmp_path / "part")} == {1}
    loop.run(experiment, resume=tmp_path / "part")
    loop.run(experiment, tmp_path / "whole")
    part, whole = (captured(tmp_path / name) for name in ("part", "whole"))
    assert {exchange.round for exchange in part} == {1, 3}
    for one, other in zip(part, whole, strict=True):
        assert one[:3] == other[:3]
        assert equal([one.w0, one.delta], [other.w0, other.delta])


def test_only_the_owner_may_read_captures(tmp_path: Path) -> None:
    loop.run(digits(rounds=1), tmp_path / "run")
    folder = tmp_path / "run" / captures.FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_run_without_captures_says_how_to_get_them(tmp_path: Path) -> None:
    loop.run(digits(audit__capture=0, rounds=1), tmp_path)
    advice = r"holds no captured updates: run it with --set audit\.capture=N"
    with pytest.raises(SettingsError, match=advice):
        captured(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        "cut short",
        "no tensors at all",
        "empty",
        "another safetensors file",
        "a header that is none",
    ],
)
def test_a_damaged_capture_is_named(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    loop.run(digits(rounds=1), tmp_path)
    (file,) = (tmp_path / captures.FOLDER).iterdir()
    whole, tensors = file.read_bytes(), {"w": torch.zeros(2)}
    contents = {
        "cut short": whole[: len(whole) // 2],
        "no tensors at all": b"\x00" * 100,
        "empty": b"",
        "another safetensors file": save(tensors),
        "a header that is none": save(
            tensors, {"exchanges": json.dumps([{"round": 1}])}
        ),
    }
    file.write_bytes(contents[damage])
    with pytest.raises(SettingsError, match=f"{file.name} is damaged"):
        captured(tmp_path)


def test_nothing_to_capture_is_said_once(tmp_path: Path) -> None:
    notes: list[str] = []

    class Ears(loop.Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    values = {**DIGITS, "method": {"name": "tests.methods:Two"}}
    experiment = Experiment.parse(values, {"audit.rounds": [1, 2, 3]})
    loop.run(experiment, tmp_path, observer=Ears())
    assert len([note for note in notes if "nothing captured" in note]) == 1
    with pytest.raises(SettingsError, match="no captured updates"):
        captured(tmp_path)


@every_method
def test_a_synthetic_round_gives_the_kind_of_observation_that_a_run_gives(
    name: str, tmp_path: Path
) -> None:
    experiment = digits(name, rounds=1)
    run = loop_of(experiment, tmp_path)
    run.run()
    public = public_of(experiment, run.task)
    real = observation(run.method, public, captured(tmp_path)[0])
    made = simulate(experiment, build_task(experiment), clients=2, examples=20)[0].seen
    assert list(real.w0) == list(made.w0)
    assert list(real.delta) == list(made.delta)
    for side in ("w0", "delta"):
        for key, x in getattr(real, side).items():
            other = getattr(made, side)[key]
            assert (x.shape, x.dtype) == (other.shape, other.dtype), (side, key)
    for field in fields(public):
        if field.name not in ("model", "lr", "epochs", "batch_size"):
            one, other = (getattr(seen.public, field.name) for seen in (real, made))
            assert one == other, field.name
    assert made.round == 1
    assert made.num_examples == 20
