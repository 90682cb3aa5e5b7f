"""Audits of tasks that are no images in classes: attacks that cannot be, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import Examples, Experiment, FederatedData, Task
from fedcore.data.sources import Pixels
from fedcore.metrics import squared_error

Audit = Callable[..., dict[str, Any]]

WORDS, CLIENTS, EACH = 30, 6, 8
INVERSIONS = ("sme", "ig", "dlg", "idlg", "dlfa", "analytic")


def data_of(x: Tensor, y: Tensor, e: Experiment) -> FederatedData:
    """Six clients of eight rows each; the rest is the test set."""
    n = CLIENTS * EACH
    train, test = Examples(x[:n], y[:n]), Examples(x[n:], y[n:])
    offsets = np.arange(CLIENTS + 1) * EACH
    return FederatedData(train, test, np.arange(n), offsets, e.holdout, e.seed)


def reals(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(CLIENTS * EACH + 40, *shape, generator=draw)


def classes(number: int = 3) -> Tensor:
    return torch.arange(CLIENTS * EACH + 40) % number


class Words(nn.Module):
    """A classifier of token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.output = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.output(self.embedding(x).mean(1))
        return outputs


class Rounded(nn.Module):
    """Token ids that come as real numbers: no gradient reaches them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.words(x.long())
        return outputs


def token_ids(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, WORDS, (CLIENTS * EACH + 40, *shape), generator=draw)


def tokens(e: Experiment) -> Task:
    return Task(Words(), data_of(token_ids(5), classes(), e))


def tokens_as_reals(e: Experiment) -> Task:
    return Task(Rounded(), data_of(token_ids(5).float(), classes(), e))


def table(e: Experiment) -> Task:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    return Task(model, data_of(reals(7), classes(), e))


def regression(e: Experiment) -> Task:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1))
    y = reals(7).sum(1, keepdim=True)
    return Task(model, data_of(reals(7), y, e), squared_error, {})


def soft_targets(e: Experiment) -> Task:
    return Task(nn.Linear(7, 3), data_of(reals(7), reals(3).softmax(1), e), metrics={})


def many_targets(e: Experiment) -> Task:
    """A class for each of four places, as in next words."""
    model = nn.Sequential(nn.Linear(7, 12), nn.Unflatten(1, (3, 4)))
    y = classes()[:, None].expand(-1, 4).contiguous()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction="none").mean(1)

    return Task(model, data_of(reals(7), y, e), loss, {})


def one_output(e: Experiment) -> Task:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    data = data_of(reals(1, 4, 4), classes(1), e)
    return Task(model, data, pixels=Pixels((0.5,), (0.3,)))


def one_class_of_three(e: Experiment) -> Task:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    data = data_of(reals(1, 4, 4), classes(1), e)
    return Task(model, data, pixels=Pixels((0.5,), (0.3,)))


class Direction(nn.Module):
    """A classifier of directions; zeros have none, and 0 / 0 is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.output(x / x.square().sum(1, keepdim=True).sqrt())
        return outputs


def nan_losses(e: Experiment) -> Task:
    """Half of the test examples have a loss that is no number."""
    x = reals(7)
    x[CLIENTS * EACH :: 2] = 0
    return Task(Direction(), data_of(x, classes(), e))


def ignored_labels(e: Experiment) -> Task:
    y = classes()
    y[::4] = -100

    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    return Task(model, data_of(reals(7), y, e), ignoring, {})


def ignoring(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def no_test_set(e: Experiment) -> Task:
    data = data_of(reals(1, 4, 4), classes(), e)
    data.test = Examples(data.test.x[:0], data.test.y[:0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return Task(model, data, pixels=Pixels((0.5,), (0.3,)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))
        outputs: Tensor = self.output(states[:, -1])
        return outputs


def recurrent(e: Experiment) -> Task:
    return Task(Recurrent(), data_of(token_ids(5), classes(), e))


class Steps(nn.Module):
    """A threshold at the entrance: the gradient that reaches the input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.output((x.flatten(1) > 0).to(x.dtype))
        return outputs


def steps(e: Experiment) -> Task:
    data = data_of(reals(1, 4, 4), classes(), e)
    return Task(Steps(), data, pixels=Pixels((0.5,), (0.3,)))


@pytest.fixture
def audited(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Audit:
    """Audit a task of this file by every attack: audit.json, stdout and stderr."""

    def audit(name: str, *options: str) -> dict[str, Any]:
        words = ["audit", "fedavg", f"--set=task={__name__}:{name}", "--epochs=1"]
        words += ["--examples=4", "--clients=2", "--set=population=6"]
        words += [f"--attack={','.join((*INVERSIONS, 'labels', 'membership'))}"]
        for attack in INVERSIONS[:-1]:
            words.append(f"--option={attack}.iterations=3")
        status, out, err = cli(*words, "--out", tmp_path / "audit", *options)
        assert status == 0, err
        assert "Traceback" not in err
        text = (tmp_path / "audit" / "audit.json").read_text()
        assert "NaN" not in text
        page = (tmp_path / "audit" / "audit.html").read_text()
        found: dict[str, Any] = json.loads(text)
        return found | {"out": out, "err": err, "page": page}

    return audit


def clients_of(audit: dict[str, Any]) -> list[dict[str, Any]]:
    clients: list[dict[str, Any]] = audit["cells"][0]["clients"]
    assert len(clients) == 2
    return clients


def left_out(audit: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    """Every one of these attacks is named with the reason, and no other one is."""
    for client in clients_of(audit):
        for name, result in client["attacks"].items():
            assert result["ok"] == (name not in names), (name, result)
    for name in names:
        line = f" {name} was not run: "
        for place in ("out", "err"):
            said = [text for text in audit[place].splitlines() if line in text]
            assert len(said) == 1, (place, name, audit[place])
            assert why in said[0], said
        assert f"{name} was not run" in audit["page"].lower()


@pytest.mark.parametrize("name", ["tokens", "recurrent"])
def test_token_ids_are_not_rebuilt_and_their_labels_and_members_are_scored(
    name: str, audited: Audit
) -> None:
    audit = audited(name)
    left_out(audit, INVERSIONS, "inputs that are real numbers (these are int64)")
    for client in clients_of(audit):
        assert client["labels"]["ok"], client["labels"]
        assert sum(client["labels"]["counts"]) == 4
        assert 0 <= client["labels"]["accuracy"] <= 1
        assert client["membership"]["ok"], client["membership"]
        assert 0 <= client["membership"]["auc"] <= 1
        assert client["grade"] is None, "nothing was rebuilt"


@pytest.mark.parametrize("name", ["tokens_as_reals", "steps"])
def test_inputs_that_no_gradient_reaches_are_not_rebuilt(
    name: str, audited: Audit
) -> None:
    audit = audited(name)
    for client in clients_of(audit):
        for attack in INVERSIONS[:-1]:
            assert not client["attacks"][attack]["ok"]
        assert client["labels"]["ok"], client["labels"]
        assert client["membership"]["ok"]
    assert (
        "dlg was not run: needs a model whose gradient reaches the inputs"
        in (audit["err"])
    )


def test_rows_of_a_table_are_rebuilt_where_an_attack_is_for_them(
    audited: Audit,
) -> None:
    audit = audited("table")
    left_out(audit, ("sme", "ig", "idlg", "dlfa"), "")
    for client in clients_of(audit):
        assert client["attacks"]["analytic"]["ok"]
        assert client["labels"]["ok"]
        assert client["membership"]["ok"]


@pytest.mark.parametrize("name", ["regression", "soft_targets", "many_targets"])
def test_targets_that_are_no_classes_have_no_labels_to_recover(
    name: str, audited: Audit
) -> None:
    audit = audited(name)
    for client in clients_of(audit):
        assert client["labels"] == {
            "ok": False,
            "error": "the targets are no classes",
        }
        assert not client["membership"]["ok"]
        assert "no classes" in client["membership"]["error"]
    assert "labels were not recovered" in audit["err"]
    names = INVERSIONS[:-1]

    left_out(audit, names, "a classification task")


def test_one_class_is_audited_as_any_number(audited: Audit) -> None:
    for client in clients_of(audited("one_class_of_three")):
        assert client["labels"]["ok"]
        assert client["membership"]["ok"]
        assert client["attacks"]["analytic"]["ok"]


def test_a_model_that_does_not_fit_its_data_is_refused(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    task = f"--set=task={__name__}:one_output"
    status, _, err = cli("audit", "fedavg", task, "--out", tmp_path / "audit")
    assert status != 0
    assert "with one logit an example use binary_cross_entropy" in err
    assert "Traceback" not in err


def test_a_loss_that_is_no_number_is_said_and_not_scored(audited: Audit) -> None:
    for client in clients_of(audited("nan_losses")):
        assert client["labels"]["ok"]
        assert not client["membership"]["ok"]
        assert (
            "candidates, or its gradient, is no finite number"
            in (client["membership"]["error"])
        )


def test_labels_that_are_ignored_are_no_classes_to_recover(audited: Audit) -> None:
    audit = audited("ignored_labels")
    for client in clients_of(audit):
        assert not client["labels"]["ok"]
        assert not client["membership"]["ok"]


def test_an_audit_without_a_test_set_scores_what_needs_none(audited: Audit) -> None:
    for client in clients_of(audited("no_test_set")):
        assert client["labels"]["ok"]
        assert not client["membership"]["ok"]


def test_a_client_of_one_example_is_audited(audited: Audit) -> None:
    audit = audited("table", "--examples=1")
    for client in clients_of(audit):
        assert client["num_examples"] == 1
        assert client["membership"]["ok"]


@pytest.mark.parametrize("name", ["tokens", "regression"])
def test_a_run_that_kept_updates_is_audited_alike(
    name: str, cli: Any, tmp_path: Path
) -> None:
    run, task = tmp_path / "run", f"--set=task={__name__}:{name}"
    words: list[Any] = [
        "run",
        "fedavg",
        task,
        "--set=rounds=2",
        "--set=audit.capture=2",
    ]
    words += ["--set=participation.cohort=4", "--set=population=6", "--out", run]
    assert cli(*words)[0] == 0
    status, out, err = cli("audit", run)
    assert status == 0, err
    assert "sme was not run" in out


@pytest.mark.parametrize("name", ["tokens", "regression", "soft_targets"])
def test_labels_that_an_attack_is_told_are_told_where_there_are_some(
    name: str, audited: Audit
) -> None:
    for client in clients_of(audited(name, "--labels=oracle")):
        if name == "tokens":
            assert client["labels"]["accuracy"] == 1
        else:
            assert not client["labels"]["ok"]


def test_a_mean_of_two_clients_words_is_audited_as_theirs_together(
    cli: Any, tmp_path: Path
) -> None:
    words = ["audit", "fedavg", f"--set=task={__name__}:tokens", "--set=rounds=1"]
    words += ["--set=population=6", "--set=participation.cohort=6", "--clients=2"]
    words += ["--defence=secagg=2", "--json", "--out", str(tmp_path / "audit")]
    status, out, err = cli(*words)
    assert status == 0, err
    clients = json.loads(out)["cells"][0]["clients"]
    assert [client["clients_aggregated"] for client in clients] == [2, 2]
    assert all(client["labels"]["ok"] for client in clients)
    assert "sme was not run" in err
