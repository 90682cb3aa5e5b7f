"""FedLAW's clients and settings, its proxy set, and whole runs."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds.loop import run
from fedcore.tasks import build_task
from fedcore.types import Batches, Model
from tests.fedlaw import (
    CLASSES,
    FEATURES,
    Lab,
    cohort,
    flat,
)
from tests.helpers import loop_of, small


@pytest.mark.parametrize("t", [0, 3])
def test_a_client_runs_torchs_sgd_at_the_rate_of_its_round(t: int) -> None:
    (models, n, _), lab = (
        cohort(),
        Lab(t=t, local_lr=0.2, lr_decay=0.8, momentum=0.9, weight_decay=0.1),
    )
    draw, model = np.random.default_rng(0), copy.deepcopy(lab.task.model)
    x, y = (
        torch.from_numpy(draw.standard_normal((5, 4, FEATURES))),
        torch.from_numpy(draw.integers(0, CLASSES, (5, 4))),
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2 * 0.8**t, momentum=0.9, weight_decay=0.1
    )
    for xb, yb in zip(x, y, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(xb), yb).backward()
        optimizer.step()
    lab.round(models, n)
    up, _ = lab.asked[0](
        lab.task,
        torch.tensor(float(t)),
        Model(lab.task.init_params()),
        (),
        Batches(x, y, torch.ones(5, 4)),
    )
    expected = flat({name: p.detach() for name, p in model.named_parameters()}) - flat(
        lab.task.init_params()
    )
    assert flat(up.delta) == pytest.approx(
        expected, abs=1e-6
    )  # the rate of a round is in float32


REFUSED = [
    "swa=true",
    "gamma=0.9",
    "gamma_bounds=[1.2,0.8]",
    "gamma_bounds=[-1,1]",
    "server_epochs=-1",
    "server_batch=0",
    "temperature=0",
]


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_cannot_be_meant_are_refused(setting: str) -> None:
    with pytest.raises(SettingsError, match=setting.split("=")[0]):
        Experiment.load(
            "fedlaw", ["method.server_epochs=13", f"method.{setting}"]
        )  # 13: too few for swa


PLAIN = {
    "learn_lambda": False,
    "learn_gamma": False,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr_decay": 1.0,
}


def digits(
    method: str, settings: dict[str, Any] | None = None, **others: Any
) -> Experiment:
    values = {
        "method": {"name": method, "local_lr": 0.1, **(settings or {})},
        "model": {"name": "mlp", "hidden": [9]},
        "proxy": 50,
    }
    cohort = {
        "population": 10,
        "participation": {"name": "uniform", "cohort": 4},
        "rounds": 3,
        "seed": 1,
    }
    return Experiment.parse(
        {
            **values,
            **cohort,
            "engine": {"name": "sequential", "device": "cpu"},
            **others,
        }
    )


def test_with_nothing_learned_it_is_fedavg_bit_for_bit_or_a_multiple_of_it(
    tmp_path: Path,
) -> None:
    plain = run(digits("fedavg"), tmp_path / "a")
    assert (
        run(digits("fedlaw", PLAIN), tmp_path / "b").params_sha256
        == plain.params_sha256
    )
    once = run(digits("fedavg", rounds=1), tmp_path / "c").params
    scaled = run(
        digits("fedlaw", {**PLAIN, "gamma": 0.9}, rounds=1), tmp_path / "d"
    ).params
    assert flat(scaled) == pytest.approx(0.9 * flat(once), abs=1e-7)


def test_traffic_is_fedavgs_to_the_byte(tmp_path: Path) -> None:
    d = 4 * len(flat(build_task(digits("fedlaw")).init_params()))
    for name in ("fedavg", "fedlaw"):
        row = loop_of(digits(name), tmp_path / name).round()
        assert (row["bytes_down"], row["bytes_up"]) == (4 * d, 4 * (d + 4)), (
            name
        )  # the loss beside the model


def test_a_run_is_reproducible_resumes_and_logs_who_was_mixed(tmp_path: Path) -> None:
    some: dict[str, Any] = {
        "participation": {"name": "uniform", "cohort": 6, "dropout": 0.4},
        "min_reports": 0,
        "rounds": 4,
    }
    whole = run(digits("fedlaw", **some), tmp_path / "whole")
    run(digits("fedlaw", **{**some, "rounds": 2}), tmp_path / "part")
    again = run(digits("fedlaw", **some), resume=tmp_path / "part")
    assert again.params_sha256 == whole.params_sha256
    assert (
        run(digits("fedlaw", **{**some, "seed": 2}), tmp_path / "other").params_sha256
        != whole.params_sha256
    )
    assert len({row["reports"] for row in whole.history}) > 1
    for row in whole.history:
        assert len(row["server_lambda"]) == row["reports"]
        assert sum(row["server_lambda"]) == pytest.approx(1, abs=1e-5)
        assert row["server_steps"] == 20  # 50 examples fit in one batch
        assert row["server_proxy_loss"] < row["server_proxy_loss_before"]
    assert whole.history[-1]["server_params_norm"] == pytest.approx(
        np.linalg.norm(flat(whole.params)), rel=1e-5
    )


def rows_of(x: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in x)


@pytest.mark.parametrize("size", [50, 53])
def test_the_proxy_set_is_balanced_and_nobody_elses(size: int) -> None:
    own, again, other, none = (
        build_task(digits("fedlaw", proxy=p, seed=s))
        for p, s in ((size, 1), (size, 1), (size, 2), (0, 1))
    )
    x, y = own.proxy
    assert len(x) == len(y) == size
    assert set(torch.bincount(y, minlength=10).tolist()) <= {size // 10, -(-size // 10)}
    held, pool = own.data.order, none.data.order
    assert len(set(held.tolist())) == len(held) == len(pool) - size
    assert rows_of(own.data.x[np.setdiff1d(pool, held)]) == rows_of(
        x
    )  # what the clients lost, and no more
    assert torch.equal(own.data.test.x, none.data.test.x)
    assert torch.equal(again.proxy.x, x)
    assert not torch.equal(other.proxy.x, x)


def test_least_squares_has_a_proxy_set_of_its_own(tmp_path: Path) -> None:
    loop = loop_of(small("fedlaw", proxy=7), tmp_path)
    assert len(loop.task.proxy.x) == 7
    assert not rows_of(loop.task.proxy.x) & (
        rows_of(loop.task.data.x) | rows_of(loop.task.data.test.x)
    )
    row = loop.round()
    assert row["server_proxy_loss"] < row["server_proxy_loss_before"]


def test_without_a_proxy_set_nothing_starts(tmp_path: Path) -> None:
    assert Experiment.load("fedlaw").proxy > 0
    for number, make in enumerate((digits, small)):
        with pytest.raises(SettingsError, match="proxy"):
            run(make("fedlaw", proxy=0), tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


def test_a_cohort_beyond_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(available=90, total=90)
    )
    with pytest.raises(
        SettingsError
    ) as refused:  # 5 models of 5 numbers take 100 bytes or more
        run(small("fedlaw", proxy=10, engine__device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sizes = set(re.findall(r"[\d.,]+ [kMG]?B\b", str(refused.value)))
    assert sizes > {"90 B"}, f"no bytes needed, or none available, in: {refused.value}"
