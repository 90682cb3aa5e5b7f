"""A client that sends the full gradient of its data: one step of size 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcore import trees
from fedcore.audit.attacks.base import gradient
from fedcore.audit.observe import observation, public_of, truth_of
from fedcore.config import Experiment
from fedcore.rounds.captures import Exchange, captured
from fedcore.rounds.loop import Loop
from tests.attacks import gradient_of
from tests.helpers import assert_close, loop_of

FEDAMD: dict[str, Any] = {
    "method": {"name": "fedamd", "local_lr": 0.05, "p": 0.5},
    "task": "digits",
    "population": 6,
    "rounds": 2,
    "holdout": 0.0,
    "model": {"name": "mlp", "hidden": [6]},
    "partition": {"name": "iid"},
    "local": {"batch_size": 64, "epochs": 3},
    "participation": {"name": "uniform", "cohort": 4},
    "evaluation": {"clients": 0},
    "engine": {"name": "sequential"},
    "audit": {"capture": 3},
}


def run_fedamd(folder: Path) -> tuple[Experiment, Loop, list[Exchange]]:
    experiment = Experiment.parse(FEDAMD)
    run = loop_of(experiment, folder)
    run.run()
    return experiment, run, captured(folder)


def test_a_captured_full_gradient_is_one_step_of_size_one(tmp_path: Path) -> None:
    experiment, run, exchanges = run_fedamd(tmp_path)
    known = public_of(experiment, run.task)
    anchors = [x for x in exchanges if x.function == "anchor"]
    assert anchors
    for exchange in anchors:
        seen = observation(run.method, known, exchange)
        truth = truth_of(run.task, exchange.client)
        assert (seen.public.lr, seen.public.local_steps(seen.num_examples)) == (1.0, 1)
        expected = gradient_of(seen.public.model, seen.w0, truth.x, truth.y)
        # Batches of 64 are added up in another order.
        assert_close(gradient(seen), expected, 1e-6, f"client {exchange.client}")


def test_training_is_captured_with_its_own_step_size(tmp_path: Path) -> None:
    experiment, run, exchanges = run_fedamd(tmp_path)
    known = public_of(experiment, run.task)
    miners = [x for x in exchanges if x.function == "mine"]
    assert miners
    for exchange in miners:
        seen = observation(run.method, known, exchange)
        assert seen.public is known
        assert (known.lr, known.epochs, known.batch_size) == (0.05, 3, 64)
        assert trees.dot(seen.delta, seen.delta) > 0
