"""Audits of text: tokens, members, and what is not attacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import Examples, Experiment, FederatedData, Task
from fedcore.audit.attacks.membership import losses
from fedcore.audit.attacks.tokens import Tokens, present
from fedcore.audit.cells import prepare_captured
from fedcore.audit.observe import Subject, Truth, public_of
from fedcore.audit.plan import Plan
from fedcore.audit.simulate import simulate
from fedcore.audit.text_scores import non_members, token_result
from fedcore.rounds.loop import run
from fedcore.tasks import build_task
from fedcore.token_metrics import next_token_loss, num_targets

V, LENGTH, PAD, CLIENTS, ROWS = 41, 6, 40, 4, 12


class Bigram(nn.Module):
    """The next token from the one before; kinds differ in what is trained."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.token = nn.Embedding(V, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, V, bias=kind == "bias")
        if kind == "tied":
            self.head.weight = self.token.weight
        if kind in ("bias", "head", "frozen"):
            self.token.requires_grad_(False)
        if kind == "frozen":
            self.head.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.token(ids)))
        return logits


def make(e: Experiment) -> Task:
    """Each client writes of ten tokens of its own; its last row is padded."""
    draw = np.random.default_rng(0)
    x = np.empty((CLIENTS * ROWS, LENGTH), dtype=np.int64)
    y = np.empty_like(x)
    for row in range(len(x)):
        client = row // ROWS
        text = draw.integers(0, 10, LENGTH + 1) + 10 * client
        x[row], y[row] = text[:-1], text[1:]
        if row % 3 == 2:
            x[row, 4:], y[row, 4:] = PAD, -100
    rows = Examples(torch.from_numpy(x), torch.from_numpy(y))
    offsets = np.arange(CLIENTS + 1) * ROWS
    data = FederatedData(rows, rows, np.arange(len(x)), offsets, e.holdout, e.seed)
    model = Bigram(str(e.options.get("kind", "plain")))
    return Task(model, data, loss=next_token_loss, metrics={}, size=num_targets)


def settings(kind: str = "plain", **more: Any) -> Experiment:
    values: dict[str, Any] = {
        "method": {"name": "fedavg", "local_lr": 0.5},
        "task": f"{__name__}:make",
        "options": {"kind": kind},
        "population": CLIENTS,
        "participation": {"cohort": CLIENTS},
        "holdout": 0.0,
        "local": {"epochs": 2, "batch_size": 3},
    }
    return Experiment.parse(values | more)


def subjects_of(e: Experiment, examples: int = 3) -> list[Subject]:
    return simulate(e, build_task(e), 2, examples)


def truth_of(subject: Subject) -> Truth:
    assert subject.truth is not None
    return subject.truth


def test_rows_of_the_embedding_tell_every_token_that_goes_in_and_no_other() -> None:
    for subject in subjects_of(settings()):
        tokens, truth = present(subject.seen), truth_of(subject)
        assert tokens.source == "token.weight"
        real = set(truth.x[truth.y >= 0].tolist())
        assert set(tokens.found.nonzero().flatten().tolist()) == real
        assert PAD not in real, "and padding is no token"
        assert PAD in truth.x


@pytest.mark.parametrize(
    ("kind", "source"),
    [("bias", "head.bias"), ("head", "head.weight"), ("tied", "token.weight")],
)
def test_the_output_layer_tells_targets_where_the_embedding_does_not(
    kind: str, source: str
) -> None:
    e = settings(kind, local={"steps": 1, "batch_size": 3})
    for subject in subjects_of(e):
        tokens, truth = present(subject.seen), truth_of(subject)
        assert (tokens.source, tokens.are_inputs) == (source, False)
        result = token_result(tokens, truth, truth)
        assert result["recall"] > 0.8 or kind != "bias", result
        assert 0 < result["found"] < V
        if kind == "bias":
            real = set(truth.y[truth.y >= 0].tolist())
            assert set(tokens.found.nonzero().flatten().tolist()) == real


def test_what_stays_on_the_client_is_not_attacked_and_the_reason_says_so() -> None:
    (subject, _) = subjects_of(settings("frozen"))
    with pytest.raises(ValueError, match="neither the embedding nor the output layer"):
        present(subject.seen)


def test_tokens_are_scored_by_precision_recall_and_a_guess_by_public_text() -> None:
    """Text of tokens 0, 0, 1; found 0 and 2; public text is of 0 alone."""
    found = torch.tensor([True, False, True])
    y = torch.zeros(1, 3, dtype=torch.int64)
    truth = Truth(torch.tensor([[0, 0, 1]]), y)
    public = Truth(torch.zeros(5, 3, dtype=torch.int64), y.expand(5, 3))
    result = token_result(Tokens(found, True, "w"), truth, public)
    assert result["precision"] == result["recall"] == result["accuracy"] == 0.5
    assert result["chance"] == pytest.approx(2 / 3)  # 1 of 1 right, 1 of 2 found
    assert result["grade"] == "A", "no better than the guess"
    unscored = token_result(Tokens(found, True, "w"), None, public)
    assert "accuracy" not in unscored
    assert unscored["found"] == 2


def test_non_members_are_the_clients_own_windows_that_it_did_not_train_on() -> None:
    for subject in subjects_of(settings(), examples=5):
        assert subject.others is not None
        assert len(subject.others.y) == ROWS - 5
        owners = set((subject.others.x[subject.others.y >= 0] // 10).tolist())
        truth = truth_of(subject)
        assert owners == set((truth.x[truth.y >= 0] // 10).tolist())


def test_a_window_that_was_trained_on_as_well_is_no_candidate() -> None:
    x = torch.arange(12).reshape(4, 3)
    truth, pool = Truth(x[:2], x[:2]), Truth(x[1:], x[1:])
    draw = np.random.default_rng(0)
    others = non_members(truth, pool, 10, draw)
    assert isinstance(others, Truth)
    assert others.x.tolist() == x[2:].tolist()
    assert isinstance(non_members(truth, truth, 10, draw), str)
    assert len(non_members(truth, pool, 1, draw)[0]) == 1


def test_local_steps_are_counted_in_windows_and_not_in_tokens() -> None:
    e = settings()
    for subject in subjects_of(e, examples=6):
        tokens = int((truth_of(subject).y >= 0).sum())
        assert subject.seen.num_examples == tokens == 4 * LENGTH + 2 * 4
        assert subject.seen.public.local_steps(tokens) == 2 * 2


@pytest.mark.parametrize(
    "local",
    [{"optimizer": "adamw"}, {"clip": 1.0}, {"schedule": "linear"}, {"warmup": 2}],
)
def test_updates_that_are_no_sum_of_gradients_have_no_known_scale(
    local: dict[str, Any],
) -> None:
    plain, other = settings(), settings(local={"steps": 2, **local})
    task = build_task(plain)
    assert public_of(plain, task).lr == 0.5
    assert public_of(other, task).lr is None


def test_a_change_of_frozen_weights_is_part_of_what_a_client_starts_from(
    tmp_path: Path,
) -> None:
    e = settings(
        "frozen",
        method={"name": "exactlora", "form": "fedex", "local_lr": 0.5},
        lora={"rank": 2, "targets": ["middle"]},
        audit={"capture": 2},
        rounds=2,
    )
    run(e, tmp_path / "run")
    for t in (1, 2):
        prepared = prepare_captured(e, tmp_path / "run", Plan(), t)
        for subject in prepared.subjects:
            change = subject.seen.w0["middle.lora_change"]
            assert change.any() == (t == 2), "what the first round lost"
            assert list(subject.seen.w0)[-1] == "head.weight"
            assert set(subject.seen.delta) == {"middle.lora_A", "middle.lora_B"}
    with_change = losses(subject.seen, subject.seen.w0, *truth_of(subject))
    w0 = {k: v for k, v in subject.seen.w0.items() if k != "middle.lora_change"}
    assert not torch.equal(losses(subject.seen, w0, *truth_of(subject)), with_change)


def audit(cli: Any, tmp_path: Path, kind: str, *more: object) -> dict[str, Any]:
    preset, out = tmp_path / "preset.toml", tmp_path / "out"
    preset.write_text(settings(kind).to_toml())
    words = ("--epochs", "20", "--examples", "6", "--clients", "2", "--out", out)
    status, _, err = cli("audit", preset, *words, *more)
    assert status == 0, err
    result: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return {**result, "err": err, "page": (out / "audit.html").read_text()}


def test_an_audit_of_text_scores_tokens_and_members_and_refuses_attacks_on_images(
    cli: Any, tmp_path: Path
) -> None:
    found = audit(cli, tmp_path, "plain", "--attack", "sme,labels,membership")
    for client in found["cells"][0]["clients"]:
        assert client["labels"]["ok"], client
        assert client["labels"]["accuracy"] == 1.0
        assert client["labels"]["chance"] < 1.0
        test = client["membership"]
        assert test["ok"], test
        assert test["auc"] > 0.7, "20 epochs on six windows are remembered"
        assert test["loss_drop"]["others"] == ROWS - 6, "the client's own"
        assert test["base"]["auc"] == test["loss_drop"]["auc"], "in a first round"
        assert client["attacks"]["sme"] == {
            "ok": False,
            "error": "needs inputs that are real numbers (these are int64)",
        }
        assert client["grade"] is None
    assert "sme was not run: needs inputs that are real numbers" in found["err"]
    page = " ".join(found["page"].split())
    assert "no attack here rebuilds a sentence" in page
    assert "Tokens of a client&#39;s text" in page
    assert "(LAMP, FILM, DAGER)" in page, "what is not attacked is said"
    assert "32 tokens" in page


def test_an_audit_of_frozen_tokens_says_that_they_were_not_looked_for(
    cli: Any, tmp_path: Path
) -> None:
    found = audit(cli, tmp_path, "frozen", "--attack", "labels,membership")
    for client in found["cells"][0]["clients"]:
        assert not client["labels"]["ok"]
        assert client["membership"]["ok"], "factors alone still tell members"
    assert "tokens were not recovered: neither the embedding nor" in found["err"]
    assert "Tokens: not recovered" in found["page"]
