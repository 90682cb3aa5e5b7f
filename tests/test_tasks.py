"""The bundled least-squares tasks, and the proxy set that a server holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.config import Experiment
from fedcore.data.federated import Examples
from fedcore.errors import SettingsError
from fedcore.rounds.loop import run
from fedcore.storage import memory as limits
from fedcore.tasks import build_task
from tests.helpers import SMALL, VARIANTS, small

PAPER = {
    "method": "rerce",
    "task": "weighted-least-squares",
    "population": 40,
    "holdout": 0.0,
}


def test_weighted_least_squares_has_the_papers_sizes_and_its_optimum_is_the_centralised_solution() -> (
    None
):
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
            r"options\.noise = 0: input should be greater than or equal to 0\.000001; weighted-least-squares knows examples",
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
    with pytest.raises(
        SettingsError,
        match=r"proxy = 1430: takes 143 examples of class \d, which has 14\d in the training pool",
    ):
        build_task(
            Experiment.parse({"method": "fedavg", "task": "digits", "proxy": 1430})
        )


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


@pytest.mark.parametrize("name", VARIANTS)
def test_a_hessian_that_does_not_fit_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "available", lambda device: 100)
    with pytest.raises(
        SettingsError,
        match=r"Hessian of 5 parameters for each of 12 clients: 15\.2 kB of memory on cpu, but 100 B are free",
    ):
        run(small(name), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_hessian_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r'15,010 parameters .* expected at most 2,000 .* use method.solver = "sgd"',
    ):
        run(small("admm exact", task="digits", options={}), tmp_path / "r")


def test_a_proxy_set_that_does_not_fit_the_model_is_refused() -> None:
    task = build_task(small("fedlaw"))
    task.proxy = Examples(torch.zeros(3, 7), torch.zeros(3, 1))
    with pytest.raises(
        SettingsError, match=r"cannot take proxy examples of shape \(7,\)"
    ):
        task.check()


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
