"""Inputs that are trees of tensors, padded sequences, outputs with logits, buffers."""

from __future__ import annotations

import logging
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fedcore import Experiment, SettingsError, pad_sequences, trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.inputs import model_outputs, shapes
from fedcore.metrics import cross_entropy
from fedcore.rounds.loop import run
from fedcore.task import Task
from fedcore.types import Tree
from tests.helpers import assert_close, equal, slow, small

SIZES = [9, 0, 4, 13, 1, 6]
ROWS = sum(SIZES)
WORDS, LENGTH, WIDTH = 12, 5, 4


class Core(nn.Module):
    """Words [B, LENGTH] and numbers [B, WIDTH] of which the mask [B, LENGTH] counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.join = nn.Embedding(WORDS, 3), nn.Linear(WIDTH, 3)
        self.out = nn.Linear(3, 3)

    def compute(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        weights = mask[..., None].to(numbers.dtype)
        mean = (self.embed(ids) * weights).sum(1) / weights.sum(1).clamp(min=1)
        out: Tensor = self.out((mean + self.join(numbers)).tanh())
        return out


class OneTensor(Core):
    """The oracle: all of it in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        ids, mask, numbers = x.split([LENGTH, LENGTH, WIDTH], 1)
        return self.compute(ids.long(), mask, numbers)


class ByName(Core):
    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        return self.compute(ids, mask, numbers)


class AnyName(Core):
    def forward(self, **x: Tensor) -> Tensor:
        return self.compute(**x)


class Whole(Core):
    """Takes the dict itself, with a tuple in it."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.compute(*batch["text"], batch["numbers"])


class InOrder(Core):
    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        return self.compute(ids, mask, numbers)


class Row(NamedTuple):
    text: tuple[Tensor, Tensor]
    numbers: Tensor


class OneTuple(Core):
    """Takes the NamedTuple itself."""

    def forward(self, row: Row) -> Tensor:
        return self.compute(*row.text, row.numbers)


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As that of transformers: a dataclass that is a dict of what is not None."""

    loss: Tensor | None = None
    logits: Any = None
    attentions: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Outputs(NamedTuple):
    hidden: Tensor
    logits: Tensor


class HuggingFace(Core):
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        numbers: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ModelOutput:
        assert mask is not None
        assert numbers is not None
        logits = self.compute(ids, mask, numbers)
        return ModelOutput(logits=logits, attentions=(ids, mask))


class NamedOutputs(ByName):
    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> Any:
        return Outputs(numbers, self.compute(ids, mask, numbers))


class DictOutputs(ByName):
    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> Any:
        return {"logits": self.compute(ids, mask, numbers), "hidden": numbers}


class Encoding(Mapping[str, Tensor]):
    """As the BatchEncoding of transformers: a mapping that is no dict."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name]

    def __iter__(self) -> Any:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LENGTH + 1, (ROWS,), generator=g).tolist()
    texts = [torch.randint(1, WORDS, (n,), generator=g) for n in lengths]
    padded = pad_sequences(texts, "ids", length=LENGTH)
    numbers = torch.randn(ROWS, WIDTH, generator=g)
    y = torch.randint(0, 3, (ROWS,), generator=g)
    return padded["ids"], padded["mask"], numbers, y


def inputs(kind: str) -> Any:
    ids, mask, numbers, _ = parts()
    named = {"ids": ids, "mask": mask, "numbers": numbers}
    return {
        "OneTensor": torch.cat([ids.float(), mask.float(), numbers], 1),
        "Whole": {"text": (ids, mask), "numbers": numbers},
        "InOrder": (ids, mask, numbers),
        "OneTuple": Row((ids, mask), numbers),
        "AnyName": Encoding(named),
    }.get(kind, named)


KINDS = ["ByName", "AnyName", "Whole", "InOrder", "OneTuple"]
OUTPUTS = ["HuggingFace", "NamedOutputs", "DictOutputs"]


def make(e: Experiment) -> Task:
    kind = e.options["kind"]
    examples = Examples(inputs(kind), parts()[3])
    order = np.random.default_rng(1).permutation(ROWS)
    starts = np.append(0, np.cumsum(SIZES))
    data = FederatedData(examples, examples, order, starts, e.holdout, e.seed)
    proxy = Examples(*trees.at((data.x, data.y), slice(8)))
    return Task(globals()[kind](), data, proxy=proxy)


def params_of(
    method: str, kind: str, engine: str, folder: Path, **others: Any
) -> tuple[Tree, dict[str, Any]]:
    """The model after two rounds, and the last row of measures."""
    e = small(
        method,
        task="tests.test_inputs:make",
        population=len(SIZES),
        options={"kind": kind},
        rounds=2,
        engine__name=engine,
        participation__cohort=len(SIZES),
        finetune__epochs=1,
        **others,
    )
    result = run(e, out=folder / f"{kind}-{engine}")
    row = dict(result.history[-1])
    measures = {k: v for k, v in row.items() if "loss" in k or "accuracy" in k}
    return result.params, measures


CHUNKS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "vectorised": {"engine__chunk": 3},
}


@pytest.mark.parametrize("engine", ["sequential", "vectorised", slow("ray")])
@pytest.mark.parametrize("kind", [*KINDS, *OUTPUTS])
def test_a_tree_of_inputs_gives_the_bits_of_one_tensor(
    kind: str, engine: str, tmp_path: Path
) -> None:
    others = CHUNKS.get(engine, {})
    params, measures = params_of("fedavg", kind, engine, tmp_path, **others)
    expected, right = params_of("fedavg", "OneTensor", engine, tmp_path, **others)
    assert equal(params, expected)
    assert measures == right
    assert measures["client_accuracy"] is not None
    oracle, _ = params_of("fedavg", kind, "sequential", tmp_path / "oracle")
    assert_close(params, oracle, 1e-6, f"{kind} in {engine}")


@pytest.mark.parametrize(
    "method", ["scaffold", "ditto", "pfedme", "fedamd", "fedlaw", "admm", "fedalt"]
)
def test_every_kind_of_method_takes_trees(method: str, tmp_path: Path) -> None:
    others: dict[str, Any] = {"holdout": 0.3}
    if method == "fedalt":
        others["method.personal"] = ["out.*"]
    if method == "fedlaw":
        others["proxy"] = 8
    params, measures = params_of(
        method, "Whole", "vectorised", tmp_path, engine__chunk=3, **others
    )
    expected, right = params_of(
        method, "OneTensor", "vectorised", tmp_path, engine__chunk=3, **others
    )
    assert equal(params, expected)
    assert measures == right


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_are_trees_are_pickled_and_moved(kind: str) -> None:
    e = small("fedavg", task="tests.test_inputs:make", population=len(SIZES))
    e = e.model_copy(update={"options": {"kind": kind}})
    data = make(e).data
    again = pickle.loads(pickle.dumps(data))
    assert equal((again.x, again.y, *again.test), (data.x, data.y, *data.test))
    data.to(torch.device("meta"))
    assert all(x.is_meta for x in trees.leaves((data.x, data.y, *data.test)))
    assert data.device.type == "meta"


def test_data_of_bfloat16_are_pickled() -> None:
    x = torch.randn(4, 2).bfloat16()
    rows = Examples(x, torch.zeros(4, dtype=torch.int64))
    data = FederatedData(rows, rows, np.arange(4), np.array([0, 4]))
    assert torch.equal(pickle.loads(pickle.dumps(data)).x, x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([torch.zeros(3), torch.zeros(2), torch.zeros(1)], "x is a list"),
        ({"a": torch.zeros(3, 1), "b": torch.zeros(4, 1)}, "rows"),
        ({"a": torch.zeros(3, 1), "b": "text"}, "b"),
        ((torch.zeros(3), torch.tensor(1.0)), "x[1] is a single number"),
        ({}, "x"),
        (None, "x is None"),
    ],
)
def test_inputs_that_are_no_tensors_of_equal_rows_are_refused(
    x: Any, message: str
) -> None:
    good = Examples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SettingsError) as refusal:
        FederatedData(good._replace(x=x), good, np.arange(3), np.array([0, 3]))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_inputs_that_a_model_does_not_take_are_named() -> None:
    ids, mask, _, y = parts()
    rows = Examples({"ids": ids, "masks": mask}, y)
    data = FederatedData(rows, rows, np.arange(ROWS), np.array([0, ROWS]))
    with pytest.raises(SettingsError, match=r"of shape ids .*masks .*masks"):
        Task(ByName(), data).check()


def test_a_forward_with_defaults_is_called_with_what_there_is() -> None:
    class Optional(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            return ids.float() if mask is None else ids * mask

    x = torch.ones(2, 3)
    assert torch.equal(model_outputs(Optional(), {}, {"ids": x}), x)
    assert torch.equal(model_outputs(Optional(), {}, {"ids": x, "mask": 0 * x}), 0 * x)
    assert torch.equal(model_outputs(Optional(), {}, (x,)), x)
    sequential = nn.Sequential(nn.Identity())
    assert model_outputs(sequential, {}, {"a": x, "b": x}).keys() == {"a", "b"}
    assert shapes((x, {"a": x})) == "0 (3,), 1/a (3,)"


# Sequences


def test_sequences_are_padded_to_one_length_with_a_mask() -> None:
    sequences = [torch.ones(2, 3), torch.ones(0, 3), torch.ones(4, 3)]
    padded = pad_sequences(sequences, "series", "seen", value=-1, length=5)
    assert padded["series"].shape == (3, 5, 3)
    assert padded["seen"].tolist() == [[1, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 1, 0]]
    assert padded["series"].sum() == 6 * 3 - 9 * 3
    words = pad_sequences([[], [1, 2]], "input_ids", "attention_mask")
    assert words["input_ids"].tolist() == [[0, 0], [1, 2]]
    assert words["input_ids"].dtype == words["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "no sequence"),
        (([torch.ones(2), torch.ones(2, 3)],), "sequence 1"),
        (([torch.ones(2), torch.ones(2).long()],), "sequence 1 is torch.int64"),
        (([torch.ones(2), torch.tensor(1.0)],), "sequence 1 is a single number"),
        (([torch.ones(2), ["a"]],), "sequence 1 is no tensor"),
        (([torch.ones(2), torch.ones(7)], "x", "mask", 0, 4), "sequence 1 has 7"),
        (([torch.ones(2)], "x", "x"), "both"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as refusal:
        pad_sequences(*arguments)
    assert "\n" not in str(refusal.value)


class Recurrent(nn.Module):
    """The last state of each sequence, by its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 3), nn.Linear(4, 3)
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(ids))
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None]
        out: Tensor = self.out(h.take_along_dim(last, 1)[:, 0])
        return out


class Packed(Recurrent):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(ids), mask.sum(1), batch_first=True, enforce_sorted=False
        )
        out: Tensor = self.out(self.lstm(packed)[1][0][-1])
        return out


def text_task(model: nn.Module, **others: Any) -> Task:
    ids, mask, _, y = parts()
    rows = Examples({"ids": ids, "mask": mask}, y)
    starts = np.append(0, np.cumsum(SIZES))
    return Task(model, FederatedData(rows, rows, np.arange(ROWS), starts), **others)


def test_a_mask_does_what_packing_does() -> None:
    torch.manual_seed(0)
    model, packed = Recurrent(), Packed()
    packed.load_state_dict(model.state_dict())
    ids, mask, _, _ = parts()
    assert_close(model(ids, mask), packed(ids, mask), 1e-6, "the last states")


# What PyTorch cannot differentiate, or batch


class InPlace(Recurrent):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids += 1
        ids %= WORDS
        return super().forward(ids, mask)


class ByNumPy(Recurrent):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        share = torch.from_numpy(self.out.bias.detach().numpy().copy())
        return super().forward(ids, mask) + share


class Remembered(Recurrent):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = checkpoint(self.embed, ids, use_reentrant=False)
        out: Tensor = self.out(self.lstm(h)[0][:, 0])
        return out


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope


class OldFunction(Recurrent):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = Straight.apply(super().forward(ids, mask))
        return out


class SparseEmbedding(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 3, sparse=True)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Packed, "pad_sequences"),
        (InPlace, "in place"),
        (ByNumPy, r"without \.numpy\(\)"),
        (Remembered, "checkpoint"),
        (OldFunction, "setup_context"),
        (SparseEmbedding, "sparse=False"),
    ],
)
def test_a_model_that_cannot_be_differentiated_is_refused_with_what_to_write(
    model: type[nn.Module], advice: str
) -> None:
    task = text_task(model())
    before = trees.map(torch.clone, task.data.x)
    with pytest.raises(SettingsError, match=advice) as refusal:
        task.check()
    assert "\n" not in str(refusal.value)
    assert equal(task.data.x, before)
    if model is not SparseEmbedding:
        assert "test_inputs.py line" in str(refusal.value)


class Averaging(nn.Module):
    """The mean over each sequence, by its mask: a model that could be batched."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 3), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        there = mask[..., None]
        mean = (self.embed(ids) * there).sum(1) / there.sum(1).clamp(min=1)
        out: Tensor = self.out(torch.cat([mean, mask[:, :1]], 1))
        return out


class Branching(Averaging):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = super().forward(ids, mask)
        return 2 * h if self.out.bias.sum() > 0 else h


class Counting(Averaging):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids, mask) * self.out.weight.abs().mean().item()


class Selecting(Averaging):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        means = [h[i][mask[i] > 0].mean(0) for i in range(len(h))]
        out: Tensor = self.out(torch.cat([torch.stack(means), mask[:, :1]], 1))
        return out


def unbatched(e: Experiment) -> Task:
    return text_task(globals()[e.options["kind"]]())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Branching", "looks at values"),
        ("Counting", "looks at values"),
        ("Selecting", "makes shapes of values"),
    ],
)
def test_a_model_that_cannot_be_batched_runs_as_written_with_one_note(
    kind: str,
    reason: str,
    chunk: int | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    e = small(
        "fedavg",
        task="tests.test_inputs:unbatched",
        options={"kind": kind},
        population=len(SIZES),
        rounds=2,
        participation__cohort=len(SIZES),
    )
    oracle = run(e, out=tmp_path / "sequential")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedcore"):
        engine = {"name": "vectorised", "chunk": chunk}
        batched = e.model_copy(update={"engine": e.engine.model_copy(update=engine)})
        result = run(batched, out=tmp_path / "vectorised")
    notes = [r.getMessage() for r in caplog.records if "batched" in r.getMessage()]
    assert len(notes) == 1, notes
    assert reason in notes[0]
    assert "one after another" in notes[0]
    assert "\n" not in notes[0]
    assert_close(result.params, oracle.params, 1e-6, kind)


# Losses, and buffers


def test_a_loss_that_averages_gets_the_hint_of_its_reduction() -> None:
    task = text_task(Recurrent(), loss=nn.CrossEntropyLoss())
    with pytest.raises(SettingsError, match=r'CrossEntropyLoss\(reduction="none"\)'):
        task.check()
    text_task(Recurrent(), loss=nn.CrossEntropyLoss(reduction="none")).check()


class Buffered(Recurrent):
    """A positional table, a mask and weights of classes, none of which changes."""

    table: Tensor
    causal: Tensor
    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 3 * LENGTH).view(LENGTH, 3))
        self.register_buffer("causal", torch.ones(LENGTH, 3).tril(), persistent=False)
        self.register_buffer("weights", torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h, _ = self.lstm((self.embed(ids) + self.table) * self.causal)
        out: Tensor = self.out((h * mask[..., None]).sum(1)) * self.weights
        return out


class AsParameters(Buffered):
    """The oracle: the same numbers, without a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("table", "causal", "weights"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value, requires_grad=False))


def buffered(e: Experiment) -> Task:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none")
    return text_task(globals()[e.options["kind"]](), loss=loss)


@pytest.mark.parametrize("engine", ["sequential", "vectorised", slow("ray")])
def test_buffers_that_do_not_change_are_there_in_every_engine(
    engine: str, tmp_path: Path
) -> None:
    results = []
    for kind in ("Buffered", "AsParameters"):
        e = small(
            "fedavg",
            task="tests.test_inputs:buffered",
            options={"kind": kind},
            population=len(SIZES),
            rounds=2,
            participation__cohort=len(SIZES),
            engine__name=engine,
            **CHUNKS.get(engine, {}),
        )
        results.append(run(e, out=tmp_path / kind))
    assert equal(results[0].params, results[1].params)
    assert not {"table", "causal", "weights"} & results[0].params.keys()


def test_buffers_of_the_model_and_of_the_loss_go_where_the_task_goes() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3), reduction="none")
    task = text_task(Buffered(), loss=loss).to(torch.device("meta"))
    outputs = task.predict(task.init_params(), task.data.x)
    assert outputs.is_meta
    assert task.metrics["loss"](outputs, task.data.y).is_meta
    assert cross_entropy(outputs, task.data.y).is_meta
