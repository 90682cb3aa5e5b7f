"""The two models of text: sizes, causality, padding, and clients in a batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedcore.data.text.tokens import Characters
from fedcore.errors import SettingsError
from fedcore.models import CharLstm, Gpt
from fedcore.models.lstm import Lstm
from fedcore.models.text import TextShape, mean_of_tokens
from fedcore.models.writing import Writer
from fedcore.rounds.loop import run
from fedcore.token_metrics import next_token_loss
from tests.helpers import loop_of
from tests.texts import speakers

SHAPE = TextShape(vocabulary=7, length=6, pad=6)
MODELS = [Gpt(width=8, layers=2, heads=2), CharLstm(embedding=3, hidden=8)]
NAMES = [model.name for model in MODELS]

each_model = pytest.mark.parametrize("settings", MODELS, ids=NAMES)


@pytest.fixture(autouse=True)
def _same(same_models: None) -> None:
    """Models start the same, whatever ran before."""


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_models_have_the_published_sizes() -> None:
    shape = TextShape(65, length=80, pad=64)
    assert size_of(CharLstm().build_text(shape)) == 815_945  # LEAF's
    gpt = Gpt(width=96, layers=3, heads=3)
    assert size_of(gpt.build_text(shape._replace(length=64))) == 354_336


@each_model
def test_no_output_depends_on_later_tokens(settings: Any) -> None:
    model = settings.build_text(SHAPE)
    ids = torch.tensor([[1, 2, 3, 4, 5, 0]])
    before = model(ids)
    assert before.shape == (1, 6, 7)
    for position in range(1, 6):
        changed = ids.clone()
        changed[:, position:] = 6
        assert torch.equal(model(changed)[:, :position], before[:, :position])
        assert not torch.equal(model(changed)[:, position], before[:, position])


@each_model
def test_padding_changes_neither_loss_nor_gradient(settings: Any) -> None:
    model = settings.build_text(SHAPE)
    y = torch.tensor([[2, 3, -100, -100, -100, -100]])

    def loss(params: dict[str, Tensor], ids: Tensor) -> Tensor:
        return next_token_loss(functional_call(model, params, (ids,)), y).sum()

    params = dict(model.named_parameters())
    one, other = torch.tensor([[1, 2, 6, 6, 6, 6]]), torch.tensor([[1, 2, 3, 0, 5, 4]])
    assert torch.equal(loss(params, one), loss(params, other))
    gradients = [grad(loss)(params, ids) for ids in (one, other)]
    for name in params:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


@each_model
def test_a_shorter_row_is_the_start_of_a_longer_one(settings: Any) -> None:
    model = settings.build_text(SHAPE)
    ids = torch.tensor([[1, 2, 3, 4, 5, 0]])
    torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :4])


@each_model
def test_classes_are_read_from_real_tokens_alone(settings: Any) -> None:
    model = settings.build_text(SHAPE._replace(num_classes=3))
    ids = torch.tensor([[1, 2, 3, 6, 6, 6]])
    whole = model(ids)
    assert whole.shape == (1, 3)
    torch.testing.assert_close(model(ids[:, :3]), whole)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 4, 6, 6]])), whole)
    assert model(torch.full((1, 6), 6)).isfinite().all()  # a text without a token


def test_mean_of_tokens_is_over_what_is_there() -> None:
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_of_tokens(states, torch.tensor([[0, 0, 9]]), pad=9).item() == 2


def test_attention_is_that_of_pytorch() -> None:
    block = Gpt(width=8, layers=1, heads=2).build_text(SHAPE).blocks[0]  # type: ignore
    z = torch.randn(3, 6, 8)
    q, k, v = block.qkv(z).chunk(3, dim=-1)
    heads = [part.view(3, 6, 2, 4).transpose(1, 2) for part in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True)
    found = block.attention(z)
    torch.testing.assert_close(found, expected.transpose(1, 2).reshape(3, 6, 8))


def test_a_tied_output_has_one_weight() -> None:
    model = Gpt(width=8, heads=2, tied=True).build_text(SHAPE)
    assert "head.weight" not in dict(model.named_parameters())
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    params["token.weight"] = torch.zeros_like(params["token.weight"])
    logits = functional_call(model, params, (torch.tensor([[1, 2]]),))
    assert torch.equal(logits, torch.zeros(1, 2, 7))
    with pytest.raises(SettingsError, match=r"model\.tied = true"):
        Gpt(tied=True).build_text(SHAPE._replace(num_classes=3))


def test_heads_divide_the_width() -> None:
    with pytest.raises(
        SettingsError, match=r"model\.heads = 3: expected a divisor of m"
    ):
        Gpt(width=8, heads=3).build_text(SHAPE)


def test_the_lstm_is_that_of_pytorch() -> None:
    torch.manual_seed(5)
    own = Lstm(3, 8, layers=2)
    torch.manual_seed(5)
    other = nn.LSTM(3, 8, num_layers=2, batch_first=True)
    own_state, other_state = own.state_dict(), other.state_dict()
    assert list(own_state) == list(other_state)
    for name, value in other_state.items():
        assert torch.equal(own_state[name], value), name
    x = torch.randn(4, 6, 3)
    assert torch.equal(own(x), other(x)[0])
    torch.testing.assert_close(own.unrolled(x), own(x))


def test_the_unrolled_lstm_is_batched_over_clients() -> None:
    """As it runs where there is a GPU."""
    lstm, x = Lstm(3, 4, layers=1), torch.randn(2, 5, 6, 3)
    params = {name: p.detach() for name, p in lstm.named_parameters()}
    lstm.forward = lstm.unrolled  # type: ignore[method-assign]

    def total(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, params, (x,)).square().sum()

    batched = vmap(grad(total), in_dims=(None, 0))(params, x)
    for i in range(2):
        alone = grad(total)(params, x[i])
        for name, value in alone.items():
            torch.testing.assert_close(batched[name][i], value)


# Writing


class Successor(nn.Module):
    """Sure that each token is followed by the next one, modulo 5."""

    def __init__(self) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(9.0))

    def forward(self, ids: Tensor) -> Tensor:
        follows = functional.one_hot((ids.clamp(max=4) + 1) % 5, 7)
        return self.certainty * follows


def test_a_writer_goes_on_from_the_prompt() -> None:
    model = Successor()
    params = {"certainty": torch.tensor(9.0)}
    writer = Writer(model, Characters("abcde"), 3, "cd", tokens=7, temperature=0)
    assert writer(params) == "eabcdea"
    assert model.training  # as it was before
    sure = Writer(model, Characters("abcde"), 3, "cd", tokens=7, temperature=0.1)
    assert sure(params) == "eabcdea"


def test_a_writer_draws_the_same_twice_and_never_padding() -> None:
    params = {"certainty": torch.tensor(0.0)}  # every token is as likely
    writer = Writer(Successor(), Characters("abcde"), 3, tokens=60)
    text = writer(params)
    assert text == writer(params)
    assert len(text) == 60  # padding would be left out
    assert set(text) <= {*"abcde", "\N{REPLACEMENT CHARACTER}"}
    assert len(set(text)) > 3
    another = Writer(Successor(), Characters("abcde"), 3, tokens=60, seed=1)
    assert another(params) != text


def test_a_writer_takes_a_model_with_more_outputs_than_there_are_tokens() -> None:
    params = {"certainty": torch.tensor(0.0)}  # 7 outputs, each as likely
    writer = Writer(Successor(), Characters("abc"), 3, tokens=60)
    assert set(writer(params)) <= {*"abc", "\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_has_diverged_writes_no_further(temperature: float) -> None:
    writer = Writer(Successor(), Characters("abc"), 3, temperature=temperature)
    for certainty in (math.nan, math.inf):
        assert writer({"certainty": torch.tensor(certainty)}).endswith("no numbers)")


# In a run


def final_of(settings: Any, engine: str, folder: Path) -> dict[str, Any]:
    """The measures at the end of a short run."""
    experiment = speakers(folder, engine__name=engine, engine__chunk=3)
    experiment = experiment.model_copy(update={"model": settings.model_dump()})
    return run(experiment, folder / engine).final


@each_model
def test_engines_agree_on_a_model_of_text(settings: Any, tmp_path: Path) -> None:
    alone = final_of(settings, "sequential", tmp_path)
    batched = final_of(settings, "vectorised", tmp_path)
    for measure in ("test_loss", "test_token_accuracy", "test_perplexity"):
        assert batched[measure] == pytest.approx(alone[measure], rel=1e-5), measure


def test_local_steps_of_the_gpt_run_from_recordings(tmp_path: Path) -> None:
    loop = loop_of(speakers(tmp_path, engine__name="vectorised"), tmp_path / "run")
    loop.run()
    recordings = loop.engine._chunks.recorder._recordings  # type: ignore[attr-defined]
    loop.close()
    assert recordings
    assert all(recording.code is not None for recording in recordings.values())
