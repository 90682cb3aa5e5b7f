"""Labels and membership: what leaks where no image does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedcore.audit import metrics
from fedcore.audit.attacks import labels, membership
from fedcore.audit.simulate import simulate
from fedcore.tasks import build_task
from tests.audits import (
    audited,
    cnn,
    data,
    digits,
    exact,
    flat,
    gradient_of,
    mlp,
    see,
    with_public,
    without_output_layer,
)
from tests.helpers import assert_close

# Labels


def test_gradients_of_the_output_bias_sum_to_zero_and_tell_the_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = data(12, 130)
    seen = see(cnn(), x, y, lr=0.05)
    change = -labels.bias_of(seen) / 0.05
    assert change.sum().abs().item() < 1e-6
    p, counts = seen.public.predict(seen.w0, x).softmax(1).mean(0), torch.bincount(y)
    assert_close(change, p - counts / 12, 1e-6, "G = p - k / N")
    # With the true p the counts are exact.
    monkeypatch.setattr(labels, "mean_output", lambda *_: p.double())
    assert labels.count(seen).tolist() == counts.tolist()
    assert metrics.label_accuracy(labels.recover(seen), y)["accuracy"] == 1.0


@pytest.mark.parametrize("n", [1, 7, 30])
def test_counts_are_whole_and_sum_to_the_number_of_examples(n: int) -> None:
    plain = see(cnn(), *data(n, 131), lr=0.1, epochs=4, batch=4)
    blind = with_public(plain, lr=None)
    several = replace(plain, together=3 * n, clients=3)
    for seen in (plain, blind, several):
        counts = labels.count(seen)
        assert counts.dtype == torch.int64
        assert int(counts.sum()) == seen.total_examples
        assert int(counts.min()) >= 0
        recovered = labels.recover(seen).tolist()
        assert recovered == sorted(recovered)


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
    seen = see(cnn(), x, torch.tensor([0] * 4 + [3] * 4), lr=0.01)
    blind = with_public(seen, lr=None)
    assert torch.unique(labels.recover(blind)).tolist() == [0, 3]


def test_labels_that_are_granted_are_sorted_and_not_recovered() -> None:
    seen = replace(see(cnn(), *data(3, 133)), labels=torch.tensor([4, 0, 2]))
    assert labels.recover(seen).tolist() == [0, 2, 4]


def test_labels_of_a_personal_output_layer_stay_unknown() -> None:
    seen = see(mlp(), *data(3, 134))
    with pytest.raises(ValueError, match="never left the client"):
        labels.recover(without_output_layer(seen))

    def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().mean(1)

    with pytest.raises(ValueError, match="no classes"):
        labels.recover(with_public(seen, loss=squared_error))


@pytest.mark.parametrize(("examples", "size", "epochs"), [(10, 5, 10), (50, 10, 20)])
def test_label_counts_of_fresh_models_are_nearly_all_right(
    examples: int, size: int, epochs: int
) -> None:
    shares: list[float] = []
    for seed in range(2):
        clients = audited(
            2,
            examples,
            seed=seed,
            population=10,
            method__local_lr=0.004,
            local__batch_size=size,
            local__epochs=epochs,
            partition__name="pathological",
            partition__classes=4,
        )
        for seen, truth in zip(clients.seen, clients.truths, strict=True):
            found = metrics.label_accuracy(labels.recover(seen), truth.y)
            shares.append(found["accuracy"])
    assert sum(shares) / len(shares) >= 0.98, shares


# Membership


def test_members_are_told_from_others_after_several_epochs() -> None:
    experiment = digits(local__epochs=10, model__name="mlp")
    task = build_task(experiment)
    areas: dict[str, list[float]] = {"loss_drop": [], "gradient": []}
    for subject in simulate(experiment, task, 8, 10):
        members = subject.truth
        assert members is not None
        others: list[int] = []  # ten times as many of every class
        for label, n in enumerate(torch.bincount(members.y).tolist()):
            rows = (task.data.test.y == label).nonzero().flatten()
            others += rows[: 10 * n].tolist()
        x = torch.cat([members.x, task.data.test.x[others]])
        y = torch.cat([members.y, task.data.test.y[others]])
        for name, values in membership.scores([subject.seen], x, y).items():
            found = metrics.membership(values[:10], values[10:])
            areas[name].append(found["auc"])
    for name, values in areas.items():
        assert sum(values) / len(values) > 0.6, (name, values)


def test_membership_scores_are_loss_drops_and_cosines() -> None:
    model, (x, y) = mlp().double(), exact(4, 140)
    exchanges = [
        see(model, x[:2], y[:2], epochs=3),
        see(model, x[1:3], y[1:3], epochs=2),
    ]
    found = membership.scores(exchanges, x, y)
    drops, cosines = [], []
    for seen in exchanges:
        before, after = (
            functional.cross_entropy(seen.public.predict(w, x), y, reduction="none")
            for w in (seen.w0, seen.wT)
        )
        drops.append(before - after)
        slopes = []
        for i in range(4):
            one = slice(i, i + 1)
            slopes.append(flat(gradient_of(model, seen.w0, x[one], y[one])))
        back = -flat(seen.delta)[None]
        cosines.append(functional.cosine_similarity(back, torch.stack(slopes)))
    assert_close(found["loss_drop"], sum(drops) / 2, 1e-10, "loss drop")
    assert_close(found["gradient"], sum(cosines) / 2, 1e-10, "cosine")
