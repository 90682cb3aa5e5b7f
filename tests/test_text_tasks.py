"""Tasks of text: who takes part, what is held out, what is tested on, and bases."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from fedcore import Experiment
from fedcore.data.partition import Own
from fedcore.data.text.texts import by_client, divided
from fedcore.data.text.windows import NO_TARGET
from fedcore.errors import SettingsError
from fedcore.models.base import load_base, save_base
from fedcore.models.huggingface import HuggingFace
from fedcore.models.writing import Writer
from fedcore.pretraining.pretrain import Budget, pretrain
from fedcore.rounds.loop import run
from fedcore.tasks.text import material_of, texts_of
from tests.test_text_pretraining import Silent
from tests.texts import CLIENTS, SMALL_MODEL, lines_in, rows, speakers

PLAYS: dict[str, Any] = {
    "method": "fedavg",
    "task": "shakespeare",
    "model": SMALL_MODEL,
    "text": {"base": 0.5, "least": 2000},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the first half of the texts, barely trained."""
    folder = tmp_path_factory.mktemp("bases")
    pretrain(speakers(folder, text__base=0.4), folder / "base", Budget(2), Silent())
    return folder / "base"


def with_base(folder: Path, base: Path, **settings: Any) -> Experiment:
    return speakers(folder, base=str(base), **{"text__base": 0.4, **settings})


# Next tokens


def test_shakespeares_speakers_take_part_with_all_their_text() -> None:
    task = Experiment.parse(PLAYS).build_task()
    assert task.population == 50
    data = task.data
    characters = by_client(texts_of(Experiment.parse(PLAYS)))
    clients = divided(characters, 0.5, 2000).clients
    for number, text in enumerate(clients.values()):
        rows = data.offsets[number], data.offsets[number + 1]
        targets = int((data.y[slice(*rows)] != NO_TARGET).sum())
        assert targets == len(text) - 1  # the first character follows none
    whole = sum(map(len, clients.values()))
    assert int((data.y != NO_TARGET).sum()) == whole - 50
    assert [*task.extra_tests] == ["unseen"]


def test_speakers_are_not_spread_over_other_clients(tmp_path: Path) -> None:
    even = {"partition": {"name": "iid"}}
    for experiment in (Experiment.parse({**PLAYS, **even}), speakers(tmp_path, **even)):
        with pytest.raises(SettingsError, match=r'"iid": the texts of .* name'):
            experiment.build_task()
    natural = {**PLAYS, "partition": {"name": "natural"}}
    assert Experiment.parse(natural).build_task().population == 50


def test_the_last_windows_are_held_out_and_are_the_test_set() -> None:
    task = Experiment.parse({**PLAYS, "holdout": 0.2}).build_task()
    data, begin = task.data, 0
    for client in range(task.population):
        trained, held = data.rows(client, "train"), data.rows(client, "test")
        rows = np.concatenate([trained, held])
        assert (np.diff(rows) == 1).all(), "in the order of the text"
        assert len(held) == round(0.2 * len(rows))
        own = slice(begin, begin + len(held))
        assert torch.equal(data.test.x[own], data.x[held])
        assert torch.equal(data.test.y[own], data.y[held])
        begin += len(held)
        # No token that is predicted at the end was a target in training.
        last, first = data.y[trained[-1]][-1], data.x[held[0]][0]
        assert last == first
    assert begin == len(data.test.y)


def test_clients_count_by_their_tokens(tmp_path: Path) -> None:
    task = speakers(tmp_path).build_task()
    for client in range(CLIENTS):
        held = task.data.y[task.data.rows(client, "train")]
        counted = task.num_examples(np.array([client]), "train")
        assert counted == (held != NO_TARGET).sum().item()


def test_loss_and_perplexity_are_over_tokens(tmp_path: Path) -> None:
    task = speakers(tmp_path).build_task()
    params = task.init_params()
    measured = task.test(params)
    x, y = task.data.test
    logits = task.predict(params, x).double().log_softmax(-1)
    likely = logits.gather(-1, y.clamp(min=0)[..., None])[..., 0][y >= 0]
    nats = -likely.mean().item()
    assert measured["loss"] == pytest.approx(nats, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert measured["nats_a_character"] == pytest.approx(nats, rel=1e-5)


def test_nats_a_character_compare_tokenizers(tmp_path: Path) -> None:
    """Even shares over a vocabulary: log V nats a token, fewer a character."""
    pytest.importorskip("tokenizers")
    task = speakers(
        tmp_path, text__tokens="bpe", text__base=0.4, text__vocabulary=270
    ).build_task()
    params = {name: torch.zeros_like(p) for name, p in task.init_params().items()}
    measured = task.test(params)
    assert measured["loss"] == pytest.approx(math.log(270), rel=1e-5)
    assert 0.6 < measured["nats_a_character"] / math.log(270) < 0.98


def test_the_vocabulary_is_none_of_the_clients(tmp_path: Path) -> None:
    marked = rows()
    marked[-1]["text"] += "\N{SECTION SIGN}"
    experiment = speakers(tmp_path, text__base=0.4)
    plain = material_of(experiment).tokenizer
    lines_in(tmp_path, marked)
    tokenizer = material_of(experiment).tokenizer
    assert tokenizer.to_json() == plain.to_json()
    assert "\N{SECTION SIGN}" not in tokenizer.decode(range(tokenizer.size))


@pytest.mark.parametrize("tokens", ["characters", "bytes", "bpe"])
def test_a_task_goes_to_other_processes(tokens: str, tmp_path: Path) -> None:
    if tokens == "bpe":
        pytest.importorskip("tokenizers")
    settings = {"text__tokens": tokens, "text__base": 0.4, "text__vocabulary": 270}
    task = speakers(tmp_path, **settings).build_task()
    params = task.init_params()
    other = pickle.loads(pickle.dumps(task))
    assert other.test(params) == task.test(params)
    assert other.sample(params) == task.sample(params)


def test_small_clients_are_unseen(tmp_path: Path) -> None:
    task = speakers(tmp_path, text__least=330).build_task()
    assert task.population == 3  # of 242, 282, 322, 362, 402, 442 characters
    (unseen,) = task.extra_tests.values()
    assert int((unseen.y != NO_TARGET).sum()) == 242 + 282 + 322 - 3


def test_without_a_holdout_there_is_no_test_set(tmp_path: Path) -> None:
    task = speakers(tmp_path, holdout=0).build_task()
    assert len(task.data.test.y) == 0
    assert task.data.evaluated_on == "train"
    final = run(speakers(tmp_path, holdout=0), tmp_path / "run").final
    assert math.isfinite(final["client_perplexity"]["mean"])


def test_texts_without_clients_are_spread(tmp_path: Path) -> None:
    bare = [{"text": row["text"]} for row in rows()]
    file = str(lines_in(tmp_path, bare))
    settings = {"partition.name": "iid", "population": 4}
    experiment = speakers(tmp_path).model_copy(update=settings)
    lines_in(tmp_path, bare)
    task = experiment.model_copy(update={"data_folder": file}).build_task()
    assert task.population == 4
    targets = int((task.data.y != NO_TARGET).sum())
    assert targets == sum(len(row["text"]) + 1 for row in bare) - 4
    with pytest.raises(
        SettingsError, match="the texts name no clients and have no cla"
    ):
        experiment.model_copy(update={"partition.name": "dirichlet"}).build_task()


def test_a_device_has_its_own_text_alone(tmp_path: Path, base: Path) -> None:
    experiment = with_base(tmp_path, base, population=4)
    own = BaseModel.model_copy(experiment, update={"partition": Own(client=2)})
    lines_in(tmp_path, [{"text": row["text"]} for row in rows(2, 333)])
    task = own.build_task()
    assert task.population == 4
    assert (np.diff(task.data.offsets) > 0).tolist() == [False, False, True, False]
    alone = BaseModel.model_copy(own, update={"base": None})
    with pytest.raises(SettingsError, match="the vocabulary is that of a base text"):
        alone.build_task()


# Classes


def test_shakespeares_ten_largest_roles_are_told_apart() -> None:
    settings = {**PLAYS, "text": {"target": "label"}, "population": 20}
    task = Experiment.parse(settings).build_task()
    task.check()
    assert task.population == 20
    assert len(task.data.y) + len(task.data.test.y) == 1111
    assert len(task.data.test.y) == 218  # the last fifth of each role
    labels = torch.cat([task.data.y, task.data.test.y])
    assert labels.bincount().max().item() / 1111 == pytest.approx(0.156, abs=5e-4)
    assert task.predict(task.init_params(), task.data.x[:3]).shape == (3, 10)


def test_roles_of_the_base_are_not_told_apart() -> None:
    text = {"target": "label", "base": 0.5}
    experiment = Experiment.parse({**PLAYS, "text": text, "population": 20})
    material = material_of(experiment)
    assert {text.client for text in material.texts}.isdisjoint(material.division.base)
    assert experiment.build_task().population == 20


def test_small_clients_have_classes_as_well(tmp_path: Path) -> None:
    settings = {"text__target": "label", "population": 2}
    whole = speakers(tmp_path, **settings).build_task()
    least = speakers(tmp_path, text__least=10**6, **settings).build_task()
    assert torch.equal(least.data.x, whole.data.x)


def test_labels_of_texts_are_classes(tmp_path: Path) -> None:
    task = speakers(tmp_path, text__target="label", population=2).build_task()
    assert task.data.num_classes() == 2
    assert (len(task.data.y), len(task.data.test.y)) == (10, 2)
    natural = speakers(
        tmp_path, text__target="label", partition__name="natural", holdout=0
    ).build_task()
    assert natural.population == CLIENTS - 1  # both texts of the last are for testing
    named = [{**row, "label": ["no", "yes"][row["label"]]} for row in rows()]
    experiment = speakers(tmp_path, text__target="label", population=2)
    lines_in(tmp_path, named)
    assert torch.equal(experiment.build_task().data.y, task.data.y)


LABELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": (None, {}, "have no column label"),
    "too large": (3, {"text.classes": 2}, "found labels from 3 to 3, expected 0 to 1"),
    "negative": (-1, {}, "found labels from -1"),
}


@pytest.mark.parametrize("fault", LABELS)
def test_labels_that_are_no_classes_are_refused(fault: str, tmp_path: Path) -> None:
    label, settings, expected = LABELS[fault]
    experiment = speakers(tmp_path, text__target="label", population=2)
    lines_in(tmp_path, [{**row, "label": label} for row in rows()])
    with pytest.raises(SettingsError, match=expected):
        experiment.model_copy(update=settings).build_task()


def test_a_device_needs_numbered_classes(tmp_path: Path) -> None:
    experiment = speakers(tmp_path, text__target="label", population=2)
    own = BaseModel.model_copy(experiment, update={"partition": Own(client=1)})
    with pytest.raises(SettingsError, match=r"text\.classes must be set"):
        own.build_task()
    text = experiment.text.model_copy(update={"classes": 3})
    task = BaseModel.model_copy(own, update={"text": text}).build_task()
    assert task.predict(task.init_params(), task.data.x[:1]).shape == (1, 3)


# Settings that do not fit


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image model": ({"model.name": "mlp"}, r'"mlp": it takes images'),
    "both": ({"options.dataset": "a/b"}, "and not both"),
    "option": ({"options.sequence": 3}, r"options\.sequence"),
    "proxy": ({"proxy": 5}, "makes no proxy set"),
    "population": ({"population": 9}, "the task has 6 clients"),
    "classes": ({"text.classes": 3}, r'classes = 3: target = "next" has none'),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_settings_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    settings, expected = REFUSED[fault]
    with pytest.raises(SettingsError, match=expected):
        speakers(tmp_path).model_copy(update=settings).build_task()


def test_a_text_model_refuses_images() -> None:
    experiment = Experiment.parse({"method": "fedavg", "model": {"name": "gpt"}})
    with pytest.raises(SettingsError, match='"digits" has images'):
        experiment.build_task()


def test_the_plays_have_neither_folder_nor_options() -> None:
    for settings in ({"data_folder": "x"}, {"options": {"a": 1}}):
        with pytest.raises(SettingsError):
            Experiment.parse({**PLAYS, **settings}).build_task()


# Bases


def test_a_run_starts_with_the_base(tmp_path: Path, base: Path) -> None:
    task = with_base(tmp_path, base).build_task()
    fresh = speakers(tmp_path, text__base=0.4).build_task()
    own, drawn = task.init_params(), fresh.init_params()
    assert list(own) == list(drawn)
    assert any(not torch.equal(own[name], drawn[name]) for name in own)
    again = with_base(tmp_path, base, seed=5).build_task().init_params()
    for name, value in own.items():
        assert torch.equal(again[name], value), name


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"model.heads": 1}, r"pretrained with model\.heads = 2"),
    "width": ({"model.width": 16}, r"pretrained with model\.width = 8"),
    "length": (
        {"text.length": 16},
        r'of "position\.weight" it has one of shape \[8, 8',
    ),
    "tokens": ({"text.tokens": "bytes"}, r"base = .* has characters"),
    "share": ({"text.base": 0.2}, r'= 0\.4, and has seen the text of client "c2"'),
    "none": ({"base": "nowhere"}, r"base = nowhere: there is no such folder"),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_a_base_of_other_settings_is_refused(
    fault: str, tmp_path: Path, base: Path
) -> None:
    settings, expected = OTHERS[fault]
    with pytest.raises(SettingsError, match=expected):
        with_base(tmp_path, base).model_copy(update=settings).build_task()


def test_subwords_of_another_kind_are_refused(tmp_path: Path) -> None:
    tokens = {"text__tokens": "bpe", "text__vocabulary": 257}
    made = speakers(tmp_path, text__base=0.4, **tokens)
    pretrain(made, tmp_path / "bpe", Budget(1), Silent())
    of_base = with_base(tmp_path, tmp_path / "bpe", **tokens)
    of_base.build_task()
    with pytest.raises(SettingsError, match=r'with text\.tokens = "bpe"; set'):
        of_base.model_copy(update={"text.tokens": "some/folder"}).build_task()


DAMAGES: dict[str, dict[str, Any]] = {
    "settings": {"settings": [1]},
    "model": {"settings": {"model": "gpt"}},
    "texts": {"texts": 5},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_facts_of_another_kind_are_refused(
    damage: str, tmp_path: Path, base: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    facts = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps({**facts, **DAMAGES[damage]}))
    with pytest.raises(SettingsError, match=rf'cannot be read .*its "{damage}" is'):
        with_base(tmp_path, other).build_task()


def test_a_pretrained_model_reads_the_tokens_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    model = HuggingFace(path=tmp_path / "model")
    experiment = speakers(tmp_path).model_copy(update={"model": model})
    with pytest.raises(SettingsError, match="has a tokenizer of its own"):
        experiment.build_task()


def test_one_byte_of_a_base_changed_is_noticed(tmp_path: Path, base: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = bytearray((other / "base.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "base.safetensors").write_bytes(content)
    with pytest.raises(SettingsError, match=r"its sha256 is .*, and base\.json says"):
        with_base(tmp_path, other).build_task()


def test_classes_go_on_from_a_base_with_an_output_of_their_own(
    tmp_path: Path, base: Path
) -> None:
    own = with_base(tmp_path, base, text__target="label", population=2)
    task = own.build_task()
    weights = with_base(tmp_path, base).build_task().init_params()
    for name, value in task.init_params().items():
        if not name.startswith("classifier"):
            assert torch.equal(weights[name], value), name


def test_a_tied_model_is_saved_once_and_loaded(tmp_path: Path) -> None:
    settings = {**SMALL_MODEL, "tied": True}
    experiment = speakers(tmp_path).model_copy(update={"model": settings})
    one, other = (
        experiment.model_copy(update={"seed": s}).build_task() for s in (0, 1)
    )
    save_base(tmp_path / "base", one.model, "{}", {})
    load_base(other.model, tmp_path / "base")
    for name, value in one.init_params().items():
        assert torch.equal(other.init_params()[name], value), name


# Runs


def test_a_run_with_adapters_writes_with_them(tmp_path: Path, base: Path) -> None:
    settings = {"lora__rank": 2, "lora__targets": ["qkv", "proj"]}
    experiment = with_base(tmp_path, base, **settings)
    task = experiment.build_task()
    assert isinstance(task.sample, Writer)
    assert task.sample.model is task.model
    assert len(task.sample(task.init_params())) == 200
    final = run(experiment, tmp_path / "run").final
    assert math.isfinite(final["test_nats_a_character"])


def test_a_run_on_text_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = run(speakers(tmp_path, rounds=4), tmp_path / "whole")
    run(speakers(tmp_path, rounds=2), tmp_path / "part")
    rest = run(speakers(tmp_path, rounds=4), None, tmp_path / "part")
    assert rest.params_sha256 == whole.params_sha256


def test_the_layer_of_classes_is_trained_beside_adapters(tmp_path: Path) -> None:
    """No base has it: frozen it would stay as it was drawn."""
    settings = {"text__target": "label", "population": 2, "lora__rank": 2}
    trained = speakers(tmp_path, **settings).build_task().init_params()
    assert {"classifier.weight", "classifier.bias"} <= trained.keys()
    others = [n for n in trained if "lora_" not in n and "classifier" not in n]
    assert others == []
