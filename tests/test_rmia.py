"""Membership inference with reference models: the formula, and what it finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedcore import Examples, Experiment, FederatedData
from fedcore.audit import metrics
from fedcore.audit.attacks import rmia
from fedcore.audit.attacks.rmia import Pool, Rows, reference_scores
from fedcore.audit.observe import Observation, Subject
from fedcore.audit.simulate import simulate
from fedcore.task import Task
from fedcore.tasks import build_task


def noise(experiment: Experiment) -> Task:
    """Inputs and classes that have nothing to do with each other: to be memorised."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(900, 30, generator=draw)
    y = torch.randint(0, 3, (900,), generator=draw)
    train, test = Examples(x[:400], y[:400]), Examples(x[400:], y[400:])
    data = FederatedData(train, test, np.arange(400), np.arange(21) * 20)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 3))
    return Task(model, data)


def audited(epochs: int = 30, examples: int = 16) -> tuple[Task, list[Subject]]:
    """A task, and two clients of one synthetic round."""
    experiment = Experiment.parse(
        {
            "method": {"name": "fedavg", "local_lr": 0.1},
            "task": f"{__name__}:noise",
            "population": 20,
            "local": {"epochs": epochs, "batch_size": 8},
        }
    )
    task = build_task(experiment)
    task.check()
    return task, simulate(experiment, task, 2, examples)


def public_of(task: Task) -> Rows:
    return Rows(*task.data.test)


def candidates_of(subject: Subject, public: Rows) -> tuple[Rows, int]:
    """(the client's examples, and as many of each class from the public; how many)."""
    truth = subject.truth
    assert truth is not None
    rows: list[int] = []
    for label in truth.y.tolist():
        of_class = (public.y == label).nonzero().flatten().tolist()
        rows += [row for row in of_class if row not in rows][:8]
    x = torch.cat([truth.x, public.x[rows]])
    return Rows(x, torch.cat([truth.y, public.y[rows]])), len(truth.y)


def test_scores_are_those_of_the_paper() -> None:
    """The formulas again, in NumPy: two references, three candidates, two z."""
    rng = np.random.default_rng(3)
    target, out = rng.uniform(0.1, 0.9, 5), rng.uniform(0.1, 0.9, (2, 5))
    is_out = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]], dtype=bool)
    mean = (out * is_out).sum(0) / is_out.sum(0)
    ratio = target / (0.5 * (1.3 * mean + 0.7))
    share = [np.mean(ratio[j] / ratio[3:] >= 1) for j in range(3)]

    found = rmia._Likelihoods(
        torch.tensor(np.log(target)), torch.tensor(np.log(out)), torch.tensor(is_out)
    )
    ratios = found.target - rmia._prior(found)
    assert torch.allclose(ratios.exp(), torch.tensor(ratio))
    scores = rmia._shares(ratios[:3], ratios[3:])
    np.testing.assert_allclose(scores.numpy(), share, atol=2 * rmia.TIE)
    # Beyond all z the ratio itself orders candidates.
    top = rmia._shares(torch.tensor([5.0, 6.0]), ratios[3:])
    assert top[1] > top[0] > 0.99


def test_an_example_that_all_references_saw_counts_all_of_them() -> None:
    logs = torch.log(torch.tensor([[0.5], [0.25]], dtype=torch.float64))
    seen_by_all = torch.zeros(2, 1, dtype=torch.bool)
    found = rmia._Likelihoods(logs[0], logs, seen_by_all)
    expected = math.log(0.5 * (1.3 * 0.375 + 0.7))
    assert float(rmia._prior(found)) == pytest.approx(expected)


def test_members_are_found_and_others_are_not() -> None:
    task, subjects = audited()
    public, areas, blind = public_of(task), [], []
    for number, subject in enumerate(subjects):
        candidates, n = candidates_of(subject, public)
        scores = reference_scores([subject.seen], *candidates, public, 4, 0)
        assert isinstance(scores, torch.Tensor)
        areas.append(metrics.membership(scores[:n], scores[n:])["auc"])
        # The other client's model has seen none of them.
        stranger = subjects[1 - number].seen
        scores = reference_scores([stranger], *candidates, public, 4, 0)
        assert isinstance(scores, torch.Tensor)
        blind.append(metrics.membership(scores[:n], scores[n:])["auc"])
    assert min(areas) > 0.9, areas
    assert max(blind) < 0.7, blind


def test_the_same_seed_gives_the_same_scores() -> None:
    task, subjects = audited(epochs=1, examples=6)
    public = public_of(task)
    candidates, _ = candidates_of(subjects[0], public)
    first = reference_scores([subjects[0].seen], *candidates, public, 2, 5)
    again = reference_scores([subjects[0].seen], *candidates, public, 2, 5)
    other = reference_scores([subjects[0].seen], *candidates, public, 2, 6)
    assert isinstance(first, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_references_are_trained_as_the_client_was_and_are_as_long() -> None:
    _, subjects = audited(epochs=2, examples=16)
    seen = subjects[0].seen
    truth = subjects[0].truth
    assert truth is not None
    own, draw = Rows(*truth), torch.Generator().manual_seed(0)
    end = rmia._reference(seen, own, draw)
    # On the client's own examples: the same up to the order of the batches.
    ours = torch.cat([(end[n] - seen.w0[n]).flatten() for n in seen.delta])
    theirs = torch.cat([seen.delta[n].flatten() for n in seen.delta])
    cosine = torch.dot(ours, theirs) / (ours.norm() * theirs.norm())
    assert float(cosine) > 0.95
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.1)
    short = {name: x / 10 for name, x in seen.delta.items()}
    clipped = replace(seen, delta=short, public=replace(seen.public, clipped=True))
    end = rmia._reference(clipped, own, draw)
    length = sum(float((end[n] - seen.w0[n]).square().sum()) for n in short) ** 0.5
    assert length == pytest.approx(float(theirs.norm()) / 10, rel=1e-3)


def test_references_have_the_candidates_mix_of_classes() -> None:
    task, subjects = audited(epochs=1, examples=16)
    public, seen = public_of(task), subjects[0].seen
    candidates, n = candidates_of(subjects[0], public)
    pool = Pool.of(seen, candidates, public)
    drawn = pool.drawn(pool.size, torch.Generator().manual_seed(1))
    assert set(drawn.y.tolist()) <= set(candidates.y.tolist())
    assert pool.size == n
    one = torch.ones(len(candidates.y), dtype=torch.int64)
    pool = Pool.of(seen, candidates._replace(y=one), public)
    assert set(pool.population(torch.Generator()).y.tolist()) == {1}


def unknown_step(seen: Observation) -> Observation:
    return replace(seen, public=replace(seen.public, lr=None))


def long_training(seen: Observation) -> Observation:
    return replace(seen, public=replace(seen.public, epochs=10**6))


@pytest.mark.parametrize(
    ("changed", "why"),
    [(unknown_step, "step size"), (long_training, "one reference model takes")],
)
def test_what_cannot_be_trained_is_said(changed: object, why: str) -> None:
    task, subjects = audited(epochs=1, examples=4)
    public = public_of(task)
    assert callable(changed)
    candidates, _ = candidates_of(subjects[0], public)
    found = reference_scores([changed(subjects[0].seen)], *candidates, public, 2, 0)
    assert isinstance(found, str)
    assert why in found
    nothing = Rows(public.x[:0], public.y[:0])
    found = reference_scores([subjects[0].seen], *candidates, nothing, 2, 0)
    assert isinstance(found, str)
    assert "no public examples" in found


def test_rates_come_with_exact_intervals() -> None:
    members = torch.cat([torch.full((30,), 2.0), torch.zeros(10)])
    others = torch.arange(2000.0) / 2000
    rates = metrics.membership(members, others)
    for name, allowed in (("1", 20), ("0.1", 2)):
        rate = rates[f"tpr_at_{name}_percent_fpr"]
        assert rate["value"] == 0.75
        # Clopper and Pearson's limits, as quantiles of the beta distribution.
        assert rate["low"] == pytest.approx(stats.beta.ppf(0.025, 30, 11))
        assert rate["high"] == pytest.approx(stats.beta.ppf(0.975, 31, 10))
        expected = stats.beta.ppf(0.95, allowed + 1, 2000 - allowed)
        assert rate["fpr_high"] == pytest.approx(expected)


def test_references_count_for_examples_that_they_did_not_train_on() -> None:
    _, subjects = audited(epochs=1, examples=8)
    seen, truth = subjects[0].seen, subjects[0].truth
    assert truth is not None
    # Two public examples, of which a reference trains on one.
    public = Rows(truth.x[:2], truth.y[:2])
    pool = Pool(public, torch.ones(2, dtype=torch.float64), 1)
    draw = torch.Generator().manual_seed(0)
    found = rmia._likelihoods(seen, Rows(*truth), pool, 6, draw)
    assert found.is_out[:, 2:].all()
    assert found.is_out[:, :2].sum(1).tolist() == [1] * 6
    # An example that a reference trained on is likelier there than elsewhere.
    for row in range(2):
        logs, is_out = found.references[:, row], found.is_out[:, row]
        assert logs[~is_out].mean() > logs[is_out].mean()
