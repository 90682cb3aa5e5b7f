"""Runs whose clients take other steps than SGD's: every engine, resume, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.run_client import run_client
from fedcore.errors import SettingsError
from fedcore.local_settings import LocalSettings
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.optimizers import Kept
from fedcore.rounds.loop import run
from fedcore.rounds.refusals import refuse_training
from fedcore.task import Task
from fedcore.types import Batches, Model, Stateless
from tests.helpers import assert_close, equal, loop_of, slow, small
from tests.test_local_optimizers import task_of

ALL: dict[str, Any] = {
    "local__optimizer": "adamw",
    "local__weight_decay": 0.01,
    "local__clip": 0.5,
    "local__schedule": "cosine",
    "local__warmup": 2,
    "local__micro": 2,
}
KEPT = {**ALL, "local__moments": "kept"}


class Settings(MethodSettings):
    local_lr: float = 0.05


class OwnSteps(Method[Settings]):
    """Clients that take steps of their own."""

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        return down, state

    def round(self, server: Model, r: Round) -> Model:
        return r.mean(self.train, r.cohort, server).value  # type: ignore[no-any-return]


# Engines

VECTORISED = {"engine__name": "vectorised", "engine__chunk": 3}
RAY = {"engine__name": "ray", "engine__workers": 2}


@pytest.mark.parametrize(
    ("name", "local", "engine"),
    [
        ("fedavg", ALL, VECTORISED),
        ("fedavg", KEPT, VECTORISED),
        ("admm", KEPT, VECTORISED),
        ("fedalt", ALL, VECTORISED),
        slow("fedsim", KEPT, VECTORISED),
        slow("pfedme", {"local__optimizer": "adamw"}, VECTORISED),
        slow("scaffold", {"local__micro": 2}, VECTORISED),
        slow("admm", KEPT, RAY),
    ],
)
def test_engines_agree_about_other_steps(
    name: str, local: dict[str, Any], engine: dict[str, Any], tmp_path: Path
) -> None:
    one = run(small(name, **local), tmp_path / "sequential")
    other = run(small(name, **local, **engine), tmp_path / "other")
    what = f"{name} in {engine['engine__name']}"
    assert_close(other.params, one.params, 1e-5, what)
    assert one.dropped == other.dropped == {}
    plain = run(small(name), tmp_path / "plain")
    assert plain.params_sha256 != one.params_sha256


def test_clients_keep_the_same_moments_in_every_engine(tmp_path: Path) -> None:
    rows = []
    for engine in ({}, VECTORISED):
        loop = loop_of(small("fedavg", **KEPT, **engine), tmp_path / str(engine))
        for _ in range(3):
            loop.round()
        states = loop.engine.states
        assert states is not None
        rows.append([states.get(client) for client in range(12)])
        loop.close()
    for client, (one, other) in enumerate(zip(*rows, strict=True)):
        assert isinstance(one, Kept)
        assert_close(other, one, 1e-5, f"client {client}")
    steps = [float(row.moments.k) for row in rows[0]]
    assert max(steps) > min(steps) == 0  # some took part, and some never did


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_resumed_run_goes_on_with_its_moments(engine: str, tmp_path: Path) -> None:
    def settings(**others: Any) -> Experiment:
        return small("fedavg", engine__name=engine, **others)

    local = {"local__optimizer": "adamw", "local__moments": "kept"}
    whole = run(settings(rounds=5, **local), tmp_path / "whole")
    run(settings(rounds=2, **local), tmp_path / "part")
    resumed = run(settings(rounds=5, **local), resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    fresh = run(settings(rounds=5, local__optimizer="adamw"), tmp_path / "fresh")
    assert fresh.params_sha256 != whole.params_sha256


def test_a_run_with_a_schedule_keeps_its_number_of_rounds(tmp_path: Path) -> None:
    """After two of two rounds the step size is at its end, and not after two of 5."""
    cosine = {"local__schedule": "cosine"}
    run(small("fedavg", rounds=2, **cosine), tmp_path / "run")
    expected = r"rounds was 2 and is now 5.*schedule"
    with pytest.raises(SettingsError, match=expected):
        run(small("fedavg", rounds=5, **cosine), resume=tmp_path / "run")


def test_evaluation_and_fine_tuning_leave_moments_alone(tmp_path: Path) -> None:
    often = small("fedavg", **KEPT, evaluation__every=1, finetune__epochs=2)
    rarely = small("fedavg", **KEPT)
    one, other = run(often, tmp_path / "often"), run(rarely, tmp_path / "rarely")
    assert one.params_sha256 == other.params_sha256
    assert "finetuned_loss" in one.final


def test_fine_tuning_has_no_schedule(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg", **KEPT, finetune__epochs=2), tmp_path)
    work, method, server = loop.desk.work, loop.method, loop.state.server
    state = work.first_state(loop.task.init_params())
    fn, ends = method.finetune, []
    batches = trees.at(work.batches(fn, [1], 0), 0)
    for t in (0.0, float(loop.experiment.rounds)):
        now = torch.tensor(t)
        up, after = run_client(
            fn, loop.task, now, server, state, batches, work.training
        )
        assert equal(after, state)
        ends.append(float(up.metrics["loss"]))
    before, _ = work.one(method.evaluate, 1, server, state, 0)
    assert ends[0] == ends[1] < float(before.metrics["loss"])
    loop.close()


@pytest.mark.slow
def test_a_fltrust_server_trains_as_its_clients_do(tmp_path: Path) -> None:
    more = {"proxy": 24, "aggregation": {"rule": "fltrust"}, "options": {}}
    e = small("fedavg", task="digits", model={"name": "logistic"}, **KEPT, **more)
    assert run(e, tmp_path / "run").dropped == {}


# Refusals


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("scaffold", {"optimizer": "adamw"}, "local.optimizer.*scaffold.*K eta_l"),
        ("scaffold", {"clip": 1.0}, "local.clip = 1.0 does not fit scaffold"),
        ("scaffold", {"warmup": 2}, "local.warmup"),
        ("fedamd", {"precision": "bfloat16"}, "local.precision.*fedamd.*recursion"),
        ("fedamd", {"schedule": "linear"}, "local.schedule"),
        ("admm exact", {"micro": 2}, "local.micro.*exact"),
        ("clu exact", {"clip": 1.0}, "local.clip.*exact"),
        ("rerce exact", {"optimizer": "adamw"}, "local.optimizer.*exact"),
        ("pfedme", {"schedule": "cosine"}, "local.schedule.*pfedme.*theta"),
        ("pfedme", {"optimizer": "adamw", "moments": "kept"}, "local.moments.*batch"),
        ("ditto", {"optimizer": "adamw", "moments": "kept"}, "more than once a round"),
        ("fedalt", {"optimizer": "adamw", "moments": "kept"}, "local.moments.*u and v"),
        ("rolora", {"optimizer": "adamw", "moments": "kept"}, "local.moments.*second"),
    ],
)
def test_methods_refuse_steps_that_are_wrong_for_them(
    name: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    local = {"batch_size": 4, **settings}
    with pytest.raises(SettingsError, match=words):
        run(small(name, local=local), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_momentum_of_the_method_and_adamw_exclude_each_other(tmp_path: Path) -> None:
    def settings(momentum: float) -> Experiment:
        return small("fedlaw", method__momentum=momentum, local__optimizer="adamw")

    with pytest.raises(SettingsError, match=r"method\.momentum is SGD's"):
        run(settings(0.9), tmp_path / "run")
    run(settings(0.0), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moments": "kept"}, 'moments = "kept": sgd has none'),
        ({"weight_decay": 0.1}, "weight_decay = 0.1 is adamw's"),
        ({"clip": 0.0}, "clip"),
        ({"beta1": 1.0}, "beta1"),
        ({"batch_size": 4, "micro": 5}, "micro = 5: a batch has batch_size = 4"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        LocalSettings(**settings)


def test_pieces_are_refused_where_a_loss_is_no_sum_over_them() -> None:
    from fedcore.models.norms import personal_batch_norm

    e = small("fedavg", local__micro=2)
    method = e.build_method()
    penalised = task_of(penalty=lambda mean, params: mean(params).square())
    with pytest.raises(SettingsError, match="penalty of its own"):
        refuse_training(e, penalised, method)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(SettingsError, match="statistics are those of whole batches"):
        refuse_training(e, task_of().with_model(personal_batch_norm(model)), method)


def test_rounding_is_refused_for_a_model_that_is_not_float32() -> None:
    e = small("fedavg", local__precision="bfloat16")
    with pytest.raises(SettingsError, match=r'"0\.weight" is float64'):
        refuse_training(e, task_of(torch.float64), e.build_method())
    refuse_training(e, task_of(torch.float32), e.build_method())


def test_a_method_with_steps_of_its_own_says_that_it_knows_no_others(
    tmp_path: Path,
) -> None:
    name = f"{__name__}:OwnSteps"
    result = run(small(name), tmp_path / "plain")
    assert result.dropped == {}
    with pytest.raises(Exception, match=r"trains without fedcore\.local"):
        run(small(name, local__clip=1.0), tmp_path / "clipped")


def test_default_steps_need_no_session(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg"), tmp_path)
    assert loop.desk.work.training is None
    assert loop.desk.work.first_state(loop.task.init_params()) == Stateless()
    loop.close()
