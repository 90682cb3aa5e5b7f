"""Labels and members told from an update."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from fedcore.audit import metrics
from fedcore.audit.attacks import labels, membership
from fedcore.audit.simulate import simulate
from fedcore.tasks import build_task
from tests.attacks import (
    cnn,
    data,
    digits,
    flat,
    gradient_of,
    mlp,
    see,
    subjects,
)
from tests.helpers import assert_close

pytestmark = pytest.mark.usefixtures("same_models")


def test_gradients_of_the_output_bias_sum_to_zero_and_tell_the_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = data(12, 130)
    o = see(cnn(), x, y, lr=0.05)
    change = -labels.bias_of(o) / 0.05
    assert change.sum().abs().item() < 1e-6
    p = o.public.predict(o.w0, x).softmax(1).mean(0)
    assert_close(change, p - torch.bincount(y, minlength=5) / 12, 1e-6, "G = p - k / N")
    monkeypatch.setattr(labels, "mean_output", lambda *_: p.double())  # the true one
    assert labels.count(o).tolist() == torch.bincount(y, minlength=5).tolist()
    assert metrics.label_accuracy(labels.recover(o), y)["accuracy"] == 1.0


@pytest.mark.parametrize("n", [1, 7, 30])
def test_counts_are_whole_and_sum_to_the_number_of_examples(n: int) -> None:
    o = see(cnn(), *data(n, 131), lr=0.1, epochs=4, batch=4)
    blind = replace(o, public=replace(o.public, lr=None))
    mean = replace(o, together=3 * n, clients=3)
    for seen in (o, blind, mean):
        counts = labels.count(seen)
        assert counts.dtype == torch.int64
        assert int(counts.sum()) == seen.total_examples
        assert int(counts.min()) >= 0
        recovered = labels.recover(seen)
        assert torch.equal(recovered, recovered.sort().values)


@pytest.mark.parametrize(
    ("counts", "n", "expected"),
    [
        ([1.4, 1.4, 1.2], 4, [2, 1, 1]),
        ([-3, 2, 2], 4, [0, 2, 2]),
        ([0, 0], 3, [2, 1]),
        ([10, 30], 4, [1, 3]),
    ],
)
def test_remainders_are_rounded_by_size(
    counts: list[float], n: int, expected: list[int]
) -> None:
    assert labels.whole(torch.tensor(counts), n).tolist() == expected


def test_without_a_step_size_the_sign_tells_which_classes_there_are() -> None:
    x, _ = data(8, 132)
    y = torch.tensor([0] * 4 + [3] * 4)
    o = see(cnn(), x, y, lr=0.01)
    blind = replace(o, public=replace(o.public, lr=None))
    assert torch.unique(labels.recover(blind)).tolist() == [0, 3]


def test_labels_that_are_granted_are_sorted_and_not_recovered() -> None:
    o = replace(see(cnn(), *data(3, 133)), labels=torch.tensor([4, 0, 2]))
    assert labels.recover(o).tolist() == [0, 2, 4]


def test_labels_of_a_personal_output_layer_stay_unknown() -> None:
    o = see(mlp(), *data(3, 134))
    hidden = replace(o, delta=dict(list(o.delta.items())[:2]))
    with pytest.raises(ValueError, match="never left the client"):
        labels.recover(hidden)
    squares = replace(o.public, loss=lambda a, b: (a - b).square().mean(1))
    with pytest.raises(ValueError, match="no classes"):
        labels.recover(replace(o, public=squares))


@pytest.mark.parametrize(
    ("examples", "size", "epochs", "least"), [(10, 5, 10, 0.98), (50, 10, 20, 0.98)]
)
def test_label_counts_of_fresh_models_are_nearly_all_right(
    examples: int, size: int, epochs: int, least: float
) -> None:
    settings: dict[str, Any] = {
        "partition__name": "pathological",
        "partition__classes": 4,
        "population": 10,
        "method__local_lr": 0.004,
        "local__batch_size": size,
        "local__epochs": epochs,
    }
    accuracies: list[float] = []
    for seed in range(3):
        seen, _, truths, _ = subjects(2, examples, seed=seed, **settings)
        for o, truth in zip(seen, truths, strict=True):
            found = metrics.label_accuracy(labels.recover(o), truth.y)
            accuracies.append(found["accuracy"])
    assert sum(accuracies) / len(accuracies) >= least, accuracies


# Membership


def test_members_are_told_from_others_after_several_epochs() -> None:
    experiment = digits(local__epochs=10, model__name="mlp")
    task = build_task(experiment)
    test_x, test_y = task.data.test
    areas: dict[str, list[float]] = {"loss_drop": [], "gradient": []}
    for subject in simulate(experiment, task, 8, 10):
        members = subject.truth
        assert members is not None
        # Others of the same classes, ten for each member.
        rows: list[int] = []
        for label, n in Counter(members.y.tolist()).items():
            rows += (test_y == label).nonzero().flatten()[: 10 * n].tolist()
        x, y = (
            torch.cat([members.x, test_x[rows]]),
            torch.cat([members.y, test_y[rows]]),
        )
        for name, values in membership.scores([subject.seen], x, y).items():
            areas[name].append(metrics.membership(values[:10], values[10:])["auc"])
    for name, of_clients in areas.items():
        assert sum(of_clients) / len(of_clients) > 0.6, (name, of_clients)


def test_membership_scores_are_loss_drops_and_cosines() -> None:
    model, (x, y) = mlp().double(), data(4, 140, dtype=torch.float64)
    first = see(model, x[:2], y[:2], epochs=3)
    second = see(model, x[1:3], y[1:3], epochs=2)
    found = membership.scores([first, second], x, y)
    for i in range(4):
        one_x, one_y = x[i : i + 1], y[i : i + 1]
        drop = cosine = 0.0
        for o in (first, second):
            before = functional.cross_entropy(o.public.predict(o.w0, one_x), one_y)
            after = functional.cross_entropy(o.public.predict(o.wT, one_x), one_y)
            drop += (before - after).item() / 2
            g, D = flat(gradient_of(model, o.w0, one_x, one_y)), -flat(o.delta)
            cosine += functional.cosine_similarity(D, g, dim=0).item() / 2
        assert found["loss_drop"][i].item() == pytest.approx(drop, abs=1e-10)
        assert found["gradient"][i].item() == pytest.approx(cosine, abs=1e-10)
