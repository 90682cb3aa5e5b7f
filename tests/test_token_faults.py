"""Targets of tokens, sizes and extra test sets that a run would not be right with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import (
    Examples,
    FederatedData,
    SettingsError,
    Task,
    cross_entropy,
)
from fedcore.metrics import Ratio
from fedcore.token_metrics import (
    nats_a_character,
    next_token_loss,
    num_targets,
    perplexity,
    token_accuracy,
    total_nll,
)
from tests.tokens import (
    Tokens,
    V,
    language,
    windows,
)

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"size": lambda y: y.sum()},
        r"size gives shape \(\) for 8 examples, expected.*\(8,\)",
    ),
    ({"size": lambda y: y[:, 0] * 0.0 - 1}, r"size gives -1 for train\.y\[0\]"),
    ({"size": lambda y: y[:, 0] * math.nan}, r"size gives nan for train\.y\[0\]"),
    ({"size": lambda y: y[:, 0] * 0.0}, r"size gives 0 for each of the 34 examples of"),
    (
        {"size": lambda y: num_targets(y) / len(y)},
        r"size mixes examples: train\.y\[0\]",
    ),
    ({"size": lambda y: y @ y}, r"size cannot take targets of shape \(8, 6\)"),
    ({"size": lambda y: 3}, r"size gives 3 for 8 examples"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_sizes_that_are_none_are_refused(given: dict[str, Any], words: str) -> None:
    task = language()
    assert task.check() is None
    task.size = given["size"]
    with pytest.raises(SettingsError, match=words):
        task.check()


def test_tokens_that_the_model_has_no_output_for_are_refused_with_the_row() -> None:
    for name in ("train", "test", "unseen"):
        task = language()
        rows = {
            "train": task.data.y,
            "test": task.data.test.y,
            "unseen": task.extra_tests["unseen"].y,
        }
        rows[name][4, 0] = V
        named = name if name != "unseen" else r'extra_tests\["unseen"\]'
        words = rf"{named}\.y\[4\] holds the token 5: the model has 5 outputs"
        with pytest.raises(SettingsError, match=words):
            task.check()


def test_an_example_without_a_target_needs_sizes() -> None:
    task = language()
    task.data.y[3] = -100
    task.check()
    task.size = None
    with pytest.raises(
        SettingsError, match=r"train\.y\[3\] has no target.*num_targets"
    ):
        task.check()


def test_classes_of_positions_may_all_be_ignored_where_the_example_counts_0() -> None:
    y = torch.tensor([[0, 1], [-100, -100], [1, -100]])
    rows = Examples(torch.randn(3, 2, 2), y)
    data = FederatedData(rows, rows, np.arange(3), np.array([0, 3]))
    task = Task(nn.Conv1d(2, 2, 1), data, cross_entropy)
    with pytest.raises(SettingsError, match=r"y\[1\] = -100.*every example counts"):
        task.check()
    Task(nn.Conv1d(2, 2, 1), data, cross_entropy, size=num_targets).check()


TOKENS, TARGETS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
SHAPES: list[tuple[Tensor, Tensor, str]] = [
    (TOKENS, TARGETS[:1], r"\(1, 3\) for outputs of shape \(2, 3, 5\)"),
    (TOKENS, TARGETS[:, :1], r"\(2, 1\)"),
    (TOKENS, TARGETS[..., None], r"\(2, 3, 1\)"),
    (TOKENS.transpose(1, 2), TARGETS, r"outputs\.transpose\(1, 2\)"),
    (TOKENS, TARGETS.float(), r"write y\.long"),
    (TOKENS[:, 0], TARGETS[:, 0], "cross_entropy"),
]


@pytest.mark.parametrize(("outputs", "y", "words"), SHAPES)
@pytest.mark.parametrize("fn", [next_token_loss, token_accuracy, total_nll])
def test_shapes_that_would_broadcast_are_refused(
    fn: Any, outputs: Tensor, y: Tensor, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        fn(outputs, y)


@pytest.mark.parametrize("name", ["test", "train", "client", "a_b", "3", "", "a/b", 7])
def test_names_of_extra_tests_that_are_taken_are_refused(name: Any) -> None:
    with pytest.raises(SettingsError, match=r"extra_tests holds .*expected a name"):
        Task(Tokens(), language().data, next_token_loss, extra_tests={name: windows(2)})


def test_extra_tests_without_rows_or_names_are_refused() -> None:
    data = language().data
    with pytest.raises(SettingsError, match=r'extra_tests\["far"\] has no rows'):
        Task(Tokens(), data, next_token_loss, extra_tests={"far": windows(0)})
    with pytest.raises(SettingsError, match=r"extra_tests is a list"):
        Task(Tokens(), data, next_token_loss, extra_tests=[windows(2)])


def test_a_table_of_characters_must_fit_the_vocabulary() -> None:
    for wrong in (torch.ones(2, 2), torch.tensor([-1.0]), torch.ones(0)):
        with pytest.raises(SettingsError, match="characters has shape"):
            nats_a_character(wrong)
    task = language()
    metric = nats_a_character(torch.ones(V + 1))
    short = Task(
        Tokens(), task.data, next_token_loss, {"nats": metric}, size=num_targets
    )
    with pytest.raises(SettingsError, match=r"outputs of 5 tokens for a table of 6"):
        short.check()


def test_a_model_may_have_more_outputs_than_its_tokenizer_has_tokens() -> None:
    measure = nats_a_character(torch.ones(3))
    y = torch.tensor([[0, 2, -100]])
    assert measure.denominators(torch.zeros(1, 3, 8), y).tolist() == [2.0]


def test_a_ratio_with_a_negative_denominator_is_refused() -> None:
    ratio = Ratio(total_nll, lambda outputs, y: num_targets(y) - 100.0)
    task = Task(Tokens(), language().data, next_token_loss, {"r": ratio})
    with pytest.raises(SettingsError, match=r'"r" has a denominator of'):
        task.check()
    with pytest.raises(SettingsError, match="the loss is Ratio"):
        Task(Tokens(), language().data, perplexity)


def test_next_tokens_are_measured_by_perplexity_where_nothing_is_named() -> None:
    task = Task(Tokens(), language().data, next_token_loss)
    assert task.measures == {"perplexity": False, "token_accuracy": True, "loss": False}


def test_a_token_that_is_no_target_is_never_right() -> None:
    outputs = torch.zeros(1, 3, 2)  # of which token 0 is the first of the largest
    y = torch.tensor([[0, -100, -100]])
    assert token_accuracy(outputs, y).tolist() == [1.0]
