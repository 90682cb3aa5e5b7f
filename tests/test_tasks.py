"""The bundled least-squares tasks, and the proxy set that a server holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData, LocalSettings
from fedcore.errors import SettingsError
from fedcore.metrics import squared_error
from fedcore.rounds.loop import run
from fedcore.storage import memory as limits
from fedcore.task import Task
from fedcore.tasks import build_task
from fedcore.types import Batches
from tests.helpers import SMALL, equal, small

PAPER = {
    "method": "rerce",
    "task": "weighted-least-squares",
    "population": 40,
    "holdout": 0.0,
}


def test_weighted_least_squares_has_the_papers_sizes_and_optimum() -> None:
    """The optimum is the centralised solution."""
    task = build_task(
        Experiment.parse(
            {**PAPER, "options": {"examples": [50, 90], "features": 128, "noise": 0.01}}
        )
    )
    assert 50 <= task.data.sizes.min() < task.data.sizes.max() <= 90
    x, (y, weight) = task.data.x.numpy(), task.data.y.numpy().T
    assert x.dtype == np.float64
    assert set(weight) == {1e4}
    H, b = (
        2 * x.T @ (weight[:, None] * x),
        2 * x.T @ (weight * y),
    )  # sum over clients of H_k and b_k
    assert task.optimum is not None
    assert task.optimum["weight"][0].numpy() == pytest.approx(
        np.linalg.solve(H, b), rel=1e-8, abs=1e-10
    )
    found = task.test({"weight": task.optimum["weight"]})
    assert found["distance"] == 0
    assert found["loss"] == pytest.approx(
        1 - 128 / len(y), rel=0.1
    )  # residual chi-square over n
    means = np.array([x[task.data.rows(k, "train")].mean() for k in range(40)])
    assert -0.6 < means.min() < -0.3 < 0.3 < means.max() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": [5, 3]}, r"expected two whole numbers, least and most"),
        ({"examples": [0, 3]}, r"expected two whole numbers, least and most"),
        (
            {"noise": 0},
            r"options\.noise = 0: input should be greater than or equal to 0\.000001; "
            "weighted-least-squares knows examples",
        ),
        ({"colour": 1}, r"options\.colour = 1"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_task(Experiment.parse({**PAPER, "options": options}))


def test_a_proxy_set_that_a_task_does_not_make_is_refused() -> None:
    with pytest.raises(
        SettingsError,
        match=r'proxy = 5, but the task "weighted-least-squares" makes no proxy set',
    ):
        build_task(Experiment.parse({**PAPER, "proxy": 5}))


def test_a_proxy_set_that_takes_a_whole_class_is_refused() -> None:
    values = {"method": "fedavg", "task": "digits", "proxy": 1430}
    settings = Experiment.parse(values)
    with pytest.raises(
        SettingsError,
        match=r"proxy = 1430: takes 143 examples of class \d, "
        r"which has 14\d in the training pool",
    ):
        build_task(settings)


def test_without_a_proxy_set_clients_hold_what_they_held() -> None:
    plain, carved = (
        build_task(Experiment.parse({"method": "fedavg", "population": 10, "proxy": n}))
        for n in (0, 40)
    )
    assert plain.proxy is None
    assert len(np.unique(plain.data.order)) == len(np.unique(carved.data.order)) + 40


def test_the_deviation_of_every_client_is_reported_in_db(tmp_path: Path) -> None:
    row = run(small("rerce exact", rounds=2), tmp_path / "r").history[-1]
    assert row["nmsd_db"] == pytest.approx(10 * np.log10(row["client_nmsd"]["mean"]))
    assert row["client_nmsd"]["p10"] <= row["client_nmsd"]["p90"]
    assert (
        "nmsd_db"
        not in run(
            Experiment.parse(
                {**SMALL, "task": "digits", "options": {}, "method": "fedavg"}
            ),
            tmp_path / "d",
        ).final
    )


@pytest.mark.parametrize("name", ["admm exact", "rerce exact", "clu exact"])
def test_a_hessian_that_does_not_fit_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "available", lambda device: 100)
    with pytest.raises(
        SettingsError,
        match=r"Hessian of 5 parameters for each of 12 clients: "
        r"15\.2 kB of memory on cpu, but 100 B are free",
    ):
        run(small(name), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_hessian_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"15,010 parameters .* expected at most 2,000 .* "
        'use method.solver = "sgd"',
    ):
        run(small("admm exact", task="digits", options={}), tmp_path / "r")


def test_a_proxy_set_that_does_not_fit_the_model_is_refused() -> None:
    task = build_task(small("fedlaw"))
    proxy = Examples(torch.zeros(3, 7), torch.zeros(3, 1))
    unfit = Task(task.model, task.data, squared_error, {}, proxy)
    with pytest.raises(
        SettingsError, match=r"cannot take proxy examples of shape \(7,\)"
    ):
        unfit.check()


def with_dropout() -> Task:
    """A task whose model drops outputs in training mode, in which it is."""
    rows = Examples(torch.ones(8, 1), torch.zeros(8, 50))
    data = FederatedData(rows, rows, np.arange(8), np.array([0, 4, 8]))
    model = nn.Sequential(nn.Linear(1, 50), nn.Dropout(0.5))
    return Task(model, data, loss=squared_error, metrics={})


def test_a_task_is_measured_in_evaluation_mode_and_leaves_the_mode_as_it_was() -> None:
    task = with_dropout()
    params = task.init_params()
    batches = task.data.batches(np.array([0]), "test", LocalSettings(), 0, 0)
    plan = trees.at(batches, 0)
    evaluated, tested = task.evaluate(params, plan), task.test(params)
    assert task.model.training
    assert task.model[1].training  # type: ignore[index]
    task.model.eval()
    assert equal(evaluated, task.evaluate(params, plan))
    assert tested == task.test(params)
    assert not task.model.training


def test_clients_are_measured_side_by_side_without_a_draw() -> None:
    """vmap refuses to draw, so that it fails where dropout is on."""
    task = with_dropout()
    params = task.init_params()
    clients = np.array([0, 1])
    batches = task.data.batches(clients, "test", LocalSettings(), 0, 0)
    together = vmap(partial(task.evaluate, params))(batches)
    assert together["loss"].shape == (2,)
    assert task.model.training


def test_a_failure_while_it_is_measured_leaves_the_mode_as_it_was() -> None:
    task = with_dropout()
    misfit = Batches(torch.ones(1, 2, 7), torch.ones(1, 2, 50), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        task.evaluate(task.init_params(), misfit)
    assert task.model.training


def test_a_task_for_another_model_leaves_the_first_as_it_is() -> None:
    task = with_dropout()
    model = nn.Linear(1, 50)
    another = task.with_model(model, lambda loss, params: params["weight"].sum())
    assert another.model is model
    assert another.data is task.data
    assert task.model is not model
    assert task.penalty is None
    params = another.init_params()
    x, y = task.data.x, task.data.y
    mean = squared_error(model(x), y).mean()
    penalised = another.loss(params, x, y, torch.ones(8))
    assert penalised.item() == pytest.approx((mean + model.weight.sum()).item())
    with pytest.raises(SettingsError, match="keeps running statistics"):
        task.with_model(nn.BatchNorm1d(1))


def test_a_task_that_moves_is_returned() -> None:
    task = with_dropout()
    assert task.to(torch.device("cpu")) is task
    assert task.data.to(torch.device("cpu")) is task.data


def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = limits.available(torch.device("cpu"))
    assert free > 1e8
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1200\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 200\n")
    for limit, expected in (("3000\n", 2000), ("500\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert limits.available(torch.device("cpu")) == expected
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.available(torch.device("cpu")) > 1e8
