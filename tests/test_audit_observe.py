"""What an adversary sees, and the boundary: attacks see nothing else."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from fedcore import trees
from fedcore.audit import attacks, observe
from fedcore.audit.attacks import base
from fedcore.audit.examine import doubts
from fedcore.audit.observe import Observation, Subject, Truth, aggregate, public_of
from fedcore.audit.plan import IMAGE_ATTACKS
from fedcore.audit.simulate import simulate
from fedcore.engines.base import Work
from fedcore.engines.sequential import Sequential
from fedcore.errors import SettingsError
from fedcore.messages.secure.ring import Ring
from fedcore.storage.rows import StateStore
from fedcore.tasks import build_task
from tests.audits import flat, without_output_layer
from tests.helpers import assert_close, equal
from tests.test_audit_captures import digits

# Synthetic rounds


def test_a_synthetic_client_does_plain_local_sgd() -> None:
    experiment = digits(local__epochs=3, local__batch_size=8, method__local_lr=0.05)
    task = build_task(experiment)
    subject = simulate(experiment, task, clients=3, examples=8)[1]
    assert subject.truth is not None
    x, y = subject.truth
    w = {name: p.clone().requires_grad_() for name, p in task.init_params().items()}
    for _ in range(3):  # one batch of all: its order does not matter
        loss = torch.nn.functional.cross_entropy(task.predict(w, x), y)
        slopes = torch.autograd.grad(loss, list(w.values()))
        for name, g in zip(w, slopes, strict=True):
            w[name] = (w[name] - 0.05 * g).detach().requires_grad_()
    expected = trees.sub(trees.map(torch.detach, w), task.init_params())
    assert_close(subject.seen.delta, expected, 1e-6, "update")
    assert subject.seen.public.local_steps(8) == 3


def test_synthetic_clients_hold_distinct_training_examples() -> None:
    experiment = digits()
    task = build_task(experiment)
    subjects = simulate(experiment, task, clients=4, examples=10)
    held = torch.cat([s.truth.x for s in subjects if s.truth is not None]).flatten(1)
    rows = {tuple(row) for row in held.tolist()}
    assert (len(held), len(rows)) == (40, 40)
    assert not rows & {tuple(row) for row in task.data.test.x.flatten(1).tolist()}


def test_more_examples_than_clients_have_are_refused() -> None:
    with pytest.raises(SettingsError, match="only 0 of 8 clients have as many"):
        simulate(digits(), build_task(digits()), clients=2, examples=10_000)


def test_a_synthetic_round_computes_what_the_sequential_engine_does() -> None:
    """A captured run with the same data then has the same updates, bit for bit."""
    experiment = digits(population=4, participation__cohort=4, rounds=1)
    task, method = build_task(experiment), experiment.build_method()
    params = task.init_params()
    work = Work(task, method, experiment.local, experiment.seed)
    engine = Sequential(work, StateStore(method.init_client(params), 10**9, Path))
    down = method.init_server(params, 4)
    reports = list(engine.each(method.train, torch.arange(4), down, 0))  # type: ignore[attr-defined]
    sizes = [int(r.num_examples[0]) for r in reports]
    compared = 0
    subjects = simulate(experiment, task, 4, min(sizes))
    for size, report, subject in zip(sizes, reports, subjects, strict=True):
        if size == min(sizes):
            assert equal(trees.at(report.up.delta, 0), subject.seen.delta)
            compared += 1
    assert compared > 0


# Observations


@pytest.mark.parametrize(
    ("settings", "steps"), [({"epochs": 4, "batch_size": 8}, 4 * 3), ({"steps": 7}, 7)]
)
def test_local_steps_follow_from_epochs_and_batches(
    settings: dict[str, int], steps: int
) -> None:
    experiment = digits(**{f"local__{key}": value for key, value in settings.items()})
    assert public_of(experiment, build_task(experiment)).local_steps(20) == steps


def test_the_update_leads_from_the_start_to_the_end() -> None:
    seen = simulate(digits(), build_task(digits()), 2, 10)[0].seen
    assert_close(trees.sub(seen.wT, seen.w0), seen.delta, 1e-6, "wT - w0")
    back = trees.sub(seen.w0, seen.wT)
    assert_close(base.gradient_like(seen), back, 1e-6, "w0 - wT")


def test_a_mean_of_one_client_is_that_client() -> None:
    subject = simulate(digits(), build_task(digits()), 2, 10)[0]
    assert aggregate([subject]) is subject


def test_secure_aggregation_shows_the_mean_by_examples_and_no_client() -> None:
    experiment = digits()
    task = build_task(experiment)
    small = simulate(experiment, task, 2, 10)[0]
    large = simulate(experiment, task, 2, 30)[1]
    both = aggregate([small, large])
    quarter = trees.scale(small.seen.delta, 0.25)
    rest = trees.scale(large.seen.delta, 0.75)
    # One unit a client, of 40 examples: the sum is that of whole numbers.
    unit = Ring(n_max=2).step / 40
    assert_close(both.seen.delta, trees.add(quarter, rest), 2 * unit, "mean")
    steps = trees.ravel(both.seen.delta).double() / unit
    assert (steps - steps.round()).abs().max() < 0.1
    assert (both.seen.clients, both.seen.total_examples) == (2, 40)
    assert both.truth is not None
    assert len(both.truth.x) == 40
    assert aggregate([small, Subject(large.seen, None)]).truth is None


def test_secure_aggregation_of_unlike_messages_is_refused() -> None:
    one, other = simulate(digits(), build_task(digits()), 2, 10)
    unlike = Subject(without_output_layer(other.seen), None)
    with pytest.raises(SettingsError, match="one kind of message"):
        aggregate([one, unlike])


# The sign


def test_an_update_with_its_sign_turned_round_is_noticed_and_warned_of() -> None:
    experiment = digits()
    task = build_task(experiment)
    seen = [subject.seen for subject in simulate(experiment, task, 4, 20)]
    x, y = task.data.test
    for observation in seen:
        cosine = observe.alignment(observation, x, y)
        assert cosine > 0
        turned = observe.alignment(observation.flipped(), x, y)
        assert turned == pytest.approx(-cosine)
    assert doubts(seen, task) == []
    (warning,) = doubts([seen[0].flipped(), *seen[1:]], task)
    assert "1 of 4 clients point against the gradient of public data" in warning
    assert f"client {seen[0].client}: cosine -" in warning


def test_the_alignment_is_a_cosine_with_the_public_gradient() -> None:
    experiment = digits()
    task = build_task(experiment)
    seen = simulate(experiment, task, 1, 20)[0].seen
    x, y = task.data.test
    w = {name: p.clone().requires_grad_() for name, p in seen.w0.items()}
    loss = torch.nn.functional.cross_entropy(task.predict(w, x), y)
    slopes = torch.autograd.grad(loss, list(w.values()))
    g = torch.cat([slope.flatten() for slope in slopes]).double().numpy()
    d = flat(seen.delta).double().numpy()
    expected = float(-(g @ d) / np.linalg.norm(g) / np.linalg.norm(d))
    assert observe.alignment(seen, x, y) == pytest.approx(expected, abs=1e-5)


# The boundary


@pytest.mark.parametrize("name", IMAGE_ATTACKS)
def test_an_attack_takes_observations_and_labels_and_no_truth(name: str) -> None:
    method = IMAGE_ATTACKS[name].reconstruct
    names = list(inspect.signature(method).parameters)
    assert names == ["self", "seen", "labels", "seed", "progress"]
    hints = get_type_hints(method)
    kinds = [str(hints[parameter]) for parameter in names[1:]]
    assert kinds[0] == "collections.abc.Sequence[fedcore.audit.observe.Observation]"
    assert kinds[1] == "collections.abc.Sequence[torch.Tensor | None]"
    assert kinds[2] == "<class 'int'>"
    for word in ("Truth", "Subject", "Task"):
        assert word not in " ".join(kinds)


def test_an_observation_holds_no_example_of_a_client() -> None:
    assert set(get_type_hints(Observation)) == {
        "public",
        "round",
        "client",
        "function",
        "w0",
        "delta",
        "num_examples",
        "clients",
        "together",
        "labels",
    }
    parameters: set[torch.Size] = set()
    held: set[torch.Size] = set()
    for subject in simulate(digits(), build_task(digits()), 2, 10):
        seen = subject.seen
        assert seen.labels is None  # granted by the plan alone
        held |= {x.shape for x in (*seen.w0.values(), *seen.delta.values())}
        parameters |= {p.shape for p in seen.public.model.parameters()}
    assert held == parameters


FILES = sorted(Path(attacks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_module_that_attacks_imports_neither_truths_nor_metrics_nor_data(
    file: Path,
) -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    forbidden = (
        "metrics",
        "Truth",
        "truth",
        "Subject",
        "fedcore.task",
        "fedcore.data",
        "examine",
        "scoring",
        "simulate",
        "captur",
        "loop",
    )
    for name in names:
        assert not any(word in name for word in forbidden), name


def test_a_truth_is_no_field_of_anything_that_attacks_get() -> None:
    for kind in (Observation, observe.Public, base.Reconstruction):
        for hint in get_type_hints(kind).values():
            assert Truth.__name__ not in str(hint)


def test_an_observation_on_another_device_shares_its_model_with_the_others() -> None:
    subjects = simulate(digits(), build_task(digits()), 2, 10)
    seen = [subject.seen for subject in subjects]
    granted = [replace(seen[0], labels=torch.tensor([1])), seen[1]]
    one, other = observe.moved(granted, torch.device("cpu"))
    assert one.public is other.public is not seen[0].public
    assert equal(one.delta, seen[0].delta)
    assert one.labels is not None
