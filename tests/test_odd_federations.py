"""Federations that are not as usual: clients without examples, tasks without test set.

And presets made for another number of clients, labels that are no classes, and
evaluations that fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import methods
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import RunError, SettingsError
from fedcore.metrics import accuracy, cross_entropy
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import Quiet, Result, run
from fedcore.task import Task
from fedcore.tasks import build_task
from fedcore.views.compare import compare
from fedcore.views.run_report import write_report
from tests.helpers import STRATEGIES, per_method

OWN = "tests.test_odd_federations:make"
LN3 = math.log(3)
BROKEN: list[bool] = []  # whether the metric of `make` fails


def share_of_first(outputs: Tensor, y: Tensor) -> Tensor:
    if BROKEN:
        raise ValueError("no such class\nin the table")
    return (y == 0).to(outputs.dtype)


def hinge(outputs: Tensor, y: Tensor) -> Tensor:
    return (1 - y * outputs[:, 0]).relu()


def make(e: Experiment) -> Task:
    """A linear model from zero on 100 examples of three classes, spread as told."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 4, generator=draw), torch.arange(100) % 3
    rows = Examples(x, y)
    if e.options.get("signs"):
        rows = Examples(x, 1 - 2 * (y % 2))
    offsets = np.cumsum([0, *e.options.get("sizes", [100, 0, 0, 0])])
    test = None if e.options.get("without_test") else rows
    data = FederatedData(rows, test, np.arange(offsets[-1]), offsets, e.holdout, e.seed)
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model: nn.Module = nn.Sequential(linear) if e.lora.rank else linear
    proxy = Examples(x[:12], y[:12]) if e.proxy else None
    loss = hinge if e.options.get("signs") else cross_entropy
    metrics: dict[str, Any] = {"accuracy": accuracy, "first": share_of_first}
    return Task(model, data, loss, metrics, proxy)


def experiment(overrides: dict[str, Any] | None = None, **options: Any) -> Experiment:
    values = {
        "method": "fedavg",
        "task": OWN,
        "options": options,
        "rounds": 3,
        "local": {"steps": 1},
        "evaluation": {"every": 1},
        "engine": {"name": "sequential"},
        "holdout": 0.0,
    }
    return Experiment.parse(values, overrides or {})


class Listener(Quiet):
    """Keeps the notes; `after` is called with the number of every round done."""

    def __init__(self, after: Callable[[int], None] = lambda t: None) -> None:
        self.notes: list[str] = []
        self._after = after

    def note(self, message: str) -> None:
        self.notes.append(message)

    def round_done(self, row: dict[str, Any]) -> None:
        self._after(row["round"])


@pytest.fixture(autouse=True)
def _mended() -> Iterator[None]:
    yield
    BROKEN.clear()


# Clients without examples


def train_losses(result: Result) -> list[float]:
    return [row["train_loss"] for row in result.history]


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_the_loss_of_clients_without_examples_is_no_loss_of_zero(
    engine: str, tmp_path: Path
) -> None:
    result = run(experiment({"engine.name": engine}), tmp_path / "r")
    assert train_losses(result)[0] == pytest.approx(LN3, abs=1e-6)
    spread = result.final["client_loss"]
    assert spread["mean"] == pytest.approx(result.final["test_loss"], abs=1e-6)
    assert spread["std"] == 0


@per_method(STRATEGIES)
def test_clients_without_examples_change_no_mean_of_losses_in_any_method(
    name: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": {"name": name}, "proxy": 12}
    if name == "dpfedavg":
        settings["method"] = {"name": name, "noise_multiplier": 0.0}
    if name in ("rolora", "exactlora"):
        settings["lora"] = {"rank": 2, "targets": ["0"]}
    sizes = [40, 0, 60, 0]
    result = run(experiment(settings, sizes=sizes), tmp_path / "r")
    losses = [row.get("train_loss") for row in result.history]
    if name == "dpfedavg":  # its clients send no losses
        assert losses == [None] * 3
    elif name == "pfedme":  # its loss is that of the personal model, in training
        assert losses[0] == pytest.approx(LN3, rel=0.02)
    else:
        assert losses[0] == pytest.approx(LN3, abs=1e-6)
        assert all(loss > 1 for loss in losses if loss is not None)
    assert result.dropped == {}
    table = read_clients(tmp_path / "r").to_pandas()
    is_empty = table["num_examples"] == 0
    assert is_empty.any()
    others = ["round", "function", "client", "num_examples", "left_out"]
    measures = table.columns.difference(others)
    assert table.loc[is_empty, measures].isna().all(axis=None)


def test_a_round_of_clients_without_examples_is_skipped_and_has_no_loss(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("1 2\n0\n3\n")
    settings = {"participation": {"name": "trace", "file": str(trace)}}
    result = run(experiment(settings), tmp_path / "r")
    skipped = [row["skipped"] for row in result.history]
    assert skipped == [True, False, True]
    assert "train_loss" not in result.history[0]
    assert result.history[1]["train_loss"] == pytest.approx(LN3, abs=1e-6)


def test_a_client_without_examples_counts_as_no_change_where_clients_count_alike(
    tmp_path: Path,
) -> None:
    """Its objective is zero, so that a mean over clients is over all of them."""
    alike = {"method": {"name": "fedavg", "weighting": "participating"}}
    alone = run(experiment(alike, sizes=[100]), tmp_path / "alone")
    four = run(experiment({**alike, "rounds": 1}), tmp_path / "four")
    one = run(experiment({**alike, "rounds": 1}, sizes=[100]), tmp_path / "one")
    assert len(alone.history) == 3
    for name, value in four.params.items():
        torch.testing.assert_close(value, one.params[name] / 4)


def test_without_an_example_anywhere_nothing_is_run(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"order is empty: none of 4 clients holds"):
        run(experiment(sizes=[0, 0, 0, 0]), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_clients_without_held_out_examples_are_in_no_mean_of_measures(
    tmp_path: Path,
) -> None:
    sizes = [1, 10, 0, 1, 20]
    settings = {"holdout": 0.2, "finetune.epochs": 1}
    result = run(experiment(settings, sizes=sizes), tmp_path / "r")
    table = read_clients(tmp_path / "r", "evaluate").to_pandas()
    last = table[table["round"] == 3].set_index("client")
    assert last["num_examples"].tolist() == [0, 2, 0, 0, 4]
    held = last.loc[[1, 4], "loss"]
    assert result.final["client_loss"]["mean"] == pytest.approx(held.mean())
    assert result.final["finetuned_loss"]["mean"] > 0.5


# Tasks without a test set


def test_a_task_without_a_test_set_is_measured_on_its_clients_alone(
    tmp_path: Path,
) -> None:
    settings = experiment(without_test=True, sizes=[30, 70])
    result = run(settings, tmp_path / "r")
    for row in result.history:
        assert not [key for key in row if key.startswith("test_")]
        assert row["client_loss"]["mean"] > 0.5
    assert result.final["test_loss"] is None
    assert result.final["client_accuracy"]["mean"] > 0
    assert "client" in write_report(tmp_path / "r").read_text()
    build_task(settings).check()


@pytest.mark.parametrize("clients", [0, 10])
def test_methods_are_compared_without_a_test_set(clients: int, tmp_path: Path) -> None:
    one, other = (
        experiment(
            {"method.name": name, "evaluation.clients": clients},
            without_test=True,
            sizes=[30, 70],
        )
        for name in ("fedavg", "fedprox")
    )
    compare([("one", one), ("other", other)], 1, tmp_path / "c", Quiet())
    assert (tmp_path / "c" / "compare.html").exists()


# The number of clients


def test_a_tasks_own_number_of_clients_counts_and_is_said(tmp_path: Path) -> None:
    listener = Listener()
    settings = experiment({"population": 100}, sizes=[30, 20, 20, 30])
    result = run(settings, tmp_path / "r", observer=listener)
    assert result.population == 4
    assert (
        f'the task "{OWN}" has 4 clients, which count: population = 100 does not'
        in (" ".join(listener.notes))
    )
    run(
        experiment({"population": 100, "rounds": 4}, sizes=[30, 20, 20, 30]),
        resume=tmp_path / "r",
    )
    assert build_task(settings).population == 4


def test_a_cohort_that_a_task_does_not_have_says_what_to_set(tmp_path: Path) -> None:
    settings = {"population": 100, "participation.cohort": 10}
    with pytest.raises(SettingsError) as refused:
        run(experiment(settings, sizes=[30, 20, 20, 30]), tmp_path / "r")
    assert str(refused.value) == (
        f'participation.cohort = 10, but the task "{OWN}" has 4 clients: set '
        "participation.cohort to at most that, e.g. --set participation.cohort=4, or a "
        "share of them, e.g. --set participation.fraction=0.5"
    )
    bundled = {"task": "least-squares", "population": 5, "participation.cohort": 10}
    with pytest.raises(SettingsError, match="; or raise population, which is 5"):
        run(experiment(bundled), tmp_path / "r")
    assert not (tmp_path / "r").exists()


# Labels that are no classes


def test_rates_by_class_need_classes(tmp_path: Path) -> None:
    rates = {"participation": {"name": "bernoulli", "alpha": 0.5}}
    with pytest.raises(SettingsError, match=r"no classes: train\.y\[1\] = -1; leave"):
        run(experiment(rates, signs=True), tmp_path / "r")
    with pytest.raises(SettingsError, match=r"train\.y is float32, of shape \(1,\)"):
        run(experiment({**rates, "task": "least-squares"}), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    result = run(experiment(signs=True), tmp_path / "r")
    assert result.rounds == 3
    write_report(tmp_path / "r")


# Evaluations that fail


def test_an_evaluation_that_fails_keeps_the_rounds_before_and_names_the_metric(
    tmp_path: Path,
) -> None:
    def break_after(t: int) -> None:
        if t == 2:
            BROKEN.append(True)

    settings = experiment({"rounds": 5}, sizes=[30, 20, 50])
    with pytest.raises(RunError) as failed:
        run(settings, tmp_path / "r", observer=Listener(break_after))
    assert str(failed.value) == (
        'round 3: the metric "first" failed on the test set: ValueError: no such '
        "class; the rounds before are kept: mend it, and go on with fedcore run "
        f"--resume {tmp_path / 'r'}"
    )
    state = json.loads((tmp_path / "r" / "checkpoint" / "state.json").read_text())
    assert state["round"] == 2
    BROKEN.clear()
    resumed = run(settings, resume=tmp_path / "r")
    whole = run(settings, tmp_path / "whole")
    assert [row["round"] for row in resumed.history] == [1, 2, 3, 4, 5]
    assert resumed.params_sha256 == whole.params_sha256
    assert train_losses(resumed) == train_losses(whole)


def test_every_method_has_a_test_here() -> None:
    assert set(methods.names()) == set(STRATEGIES)
