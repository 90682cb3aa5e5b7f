"""decode(encode(x)) is x; what does not fit the schema is refused by name."""

from __future__ import annotations

import json
import pickle
import time
from typing import Any, NamedTuple

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore import trees
from fedcore.messages import wire
from fedcore.messages.wire import WireError, decode, encode
from fedcore.types import Params, Stateless, Tree


class Inner(NamedTuple):
    params: Params
    count: Tensor


class Outer(NamedTuple):
    delta: Params
    inner: Inner
    none: Stateless
    loss: Tensor


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
shapes = st.lists(st.integers(0, 3), max_size=3)
names = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["0.weight", "a/b", "/", ".", "delta", "inner/count"]
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return (torch.randn(draw(shapes), generator=generator) * 100).to(
        draw(st.sampled_from(DTYPES))
    )


params = st.dictionaries(names, tensors(), max_size=4)
outers = st.builds(
    Outer, params, st.builds(Inner, params, tensors()), st.just(Stateless()), tensors()
)
trees_and_schemas = st.one_of(
    st.tuples(outers, st.just(Outer)),
    st.tuples(params, st.just(Params)),
    st.tuples(tensors(), st.just(Tensor)),
    st.tuples(st.just(Stateless()), st.just(Stateless)),
)


def assert_same(a: Tree, b: Tree) -> None:
    assert trees.map(lambda x: (x.dtype, x.shape), a) == trees.map(
        lambda x: (x.dtype, x.shape), b
    )
    for (path, x), y in zip(trees.flatten(a).items(), trees.leaves(b), strict=True):
        bits = (
            [v.contiguous().reshape(-1).view(torch.uint8) for v in (x, y)]
            if x.numel()
            else []
        )
        assert not bits or torch.equal(*bits), f"{path} differs"


@given(trees_and_schemas)
def test_decode_of_encode_is_what_was_sent(sent: tuple[Tree, Any]) -> None:
    tree, schema = sent
    over_the_wire = recorddict_from_proto(
        recorddict_to_proto(RecordDict({"up": encode(tree)}))
    )["up"]
    assert isinstance(over_the_wire, ArrayRecord)
    assert_same(decode(over_the_wire, schema), tree)
    assert_same(decode(over_the_wire, schema, like=tree), tree)


def test_views_and_tensors_that_need_gradients_are_sent_as_values() -> None:
    x = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    back = decode(encode(x), Tensor)
    assert torch.equal(back, x)
    assert not back.requires_grad
    back += 1  # and what arrives may be written to


SENT = Inner(
    {"0.weight": torch.zeros(10, 64), "0.bias": torch.zeros(10)}, torch.tensor(3)
)


W, B = "params/0.weight", "params/0.bias"
TRANSPOSED = {**SENT.params, "0.weight": torch.zeros(64, 10)}
WITHOUT_BIAS = {"0.weight": torch.zeros(10, 64)}
WITH_MORE = {**SENT.params, "1.bias": torch.zeros(2)}
MISFITS: list[tuple[Tree, str]] = [
    (
        SENT._replace(count=torch.tensor(3.0)),
        '"count" of type float32, expected int64',
    ),
    (
        SENT._replace(params=TRANSPOSED),
        f'"{W}" of shape (64, 10), expected (10, 64)',
    ),
    (SENT._replace(params=WITHOUT_BIAS), f'no "{B}", which Inner declares'),
    (
        SENT._replace(params=WITH_MORE),
        '"params/1.bias", which Inner does not declare',
    ),
    (SENT.params, 'no "count", which Inner declares'),
    (
        Outer({}, SENT, Stateless(), torch.tensor(0.0)),
        'no "count", which Inner declares',
    ),
]


@pytest.mark.parametrize(("arrived", "message"), MISFITS)
def test_what_does_not_fit_is_refused_by_name(arrived: Tree, message: str) -> None:
    with pytest.raises(WireError) as caught:
        decode(encode(arrived), Inner, like=SENT)
    assert str(caught.value) == message


def test_without_a_tree_to_compare_with_the_fields_are_still_checked() -> None:
    with pytest.raises(WireError, match='no "count", which is declared'):
        decode(encode({"params": torch.zeros(1)}), Inner)
    with pytest.raises(WireError, match='"extra", which Stateless does not declare'):
        decode(encode({"extra": torch.zeros(1)}), Stateless)


def packed(content: bytes, stype: str = wire.FORMAT) -> Array:
    return Array("uint8", (len(content),), stype, content)


GOOD = encode(torch.zeros(9))[wire.FORMAT].data


@pytest.mark.parametrize(
    "record",
    [
        {wire.FORMAT: packed(pickle.dumps({"/": [1.0]}))},
        {wire.FORMAT: packed(b"no tensors")},
        {wire.FORMAT: packed(GOOD[:-8])},
        {wire.FORMAT: packed(GOOD, "numpy.ndarray")},
        {wire.FORMAT: packed(GOOD.replace(b"F32", b"XYZ"))},
        {wire.FORMAT: packed(GOOD), "more": packed(GOOD)},
        {"/loss": packed(GOOD)},
        {},
    ],
    ids=[
        "a pickle",
        "noise",
        "cut short",
        "another serialisation",
        "an unknown type",
        "two arrays",
        "another name",
        "nothing",
    ],
)
def test_what_is_no_tensor_is_refused_and_never_unpickled(
    record: dict[str, Array],
) -> None:
    with pytest.raises(WireError, match="arrays that"):
        decode(ArrayRecord(record), Tensor)


def lie(header: Any, values: bytes = bytes(36)) -> ArrayRecord:
    """A message with any header; a tensor of nine numbers is expected."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + values
    return ArrayRecord({wire.FORMAT: packed(content)})


def line(begin: int = 0, end: int = 36, dtype: str = "F32", *shape: Any) -> Any:
    return {"dtype": dtype, "shape": shape or [9], "data_offsets": [begin, end]}


def test_a_header_that_is_made_by_hand_is_read() -> None:
    tensor = decode(lie({"0/": line()}), Tensor, like=torch.zeros(9))
    assert torch.equal(tensor, torch.zeros(9))


@pytest.mark.parametrize(
    "record",
    [
        lie({"0/": line(0, 40)}, bytes(40)),
        lie({"0/": line(4, 40)}, bytes(40)),
        lie({"0/": line(-36, 0)}),
        lie({"0/": line(0, 2**70)}),
        lie({"0/": line()}, bytes(32)),
        lie({"0/": line()}, bytes(40)),
        lie({"0/": line(), "1/": line()}),
        lie({"0": line(), "0/": line()}),
        lie({"0/": line(0, 36, "F32", 9.0)}),
        lie({"0/": line(0, 36, "F32", True, 9)}),
        lie({"0/": {"dtype": "F32"}}),
        lie({"0/": line(0, 36, "OBJECT")}),
        lie({"0/": None}),
        lie({"/": line()}),
        lie({"__metadata__": {}, "0/": line()}),
        lie([1, 2, 3]),
        lie(b"[" * 10_000),
        lie(b'{"0/": {"dtype": "F32", "shape": [' + b"9" * 9_000 + b"]}}"),
        lie(b"\xff\xfe{}"),
        lie(b""),
        ArrayRecord({wire.FORMAT: packed(b"\xff" * 8)}),
        ArrayRecord({wire.FORMAT: packed(b"\0\0\0")}),
        ArrayRecord({wire.FORMAT: packed(b"")}),
    ],
)
def test_a_header_that_lies_is_refused(record: ArrayRecord) -> None:
    with pytest.raises(WireError, match="arrays that cannot be read") as caught:
        decode(record, Tensor, like=torch.zeros(9))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_values_that_overlap_are_refused() -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(2)}
    header = {"0/a": line(0, 8, "F32", 2), "1/b": line(0, 8, "F32", 2)}
    with pytest.raises(WireError, match="from 0 to 8, expected from 8 on"):
        decode(lie(header, bytes(8)), Params, like)


@pytest.mark.parametrize("name", ["{}/", "", "{}/a"])
def test_a_message_of_many_names_costs_what_reading_a_length_costs(
    name: str,
) -> None:
    names = ",".join(f'"{name.format(i)}":{{}}' for i in range(200_000))
    record = lie(f"{{{names}}}".encode())
    begin = time.process_time()
    with pytest.raises(WireError, match=r"a header of \d+ bytes, expected at most"):
        decode(record, Tensor, like=torch.zeros(9))
    assert time.process_time() - begin < 0.01


def test_names_that_steer_a_terminal_are_written_out() -> None:
    like = {"a": torch.zeros(1)}
    nasty = {"a": torch.zeros(1), "\x1b[2J\u202e\n": torch.zeros(1)}
    with pytest.raises(WireError, match=r'"\\x1b\[2J\\u202e\\n", which') as caught:
        decode(encode(nasty), Params, like)
    assert str(caught.value).isprintable()
    with pytest.raises(WireError) as caught:
        decode(ArrayRecord({"\x1b[2J": packed(GOOD)}), Tensor, like=torch.zeros(9))
    assert str(caught.value).isprintable()


def test_a_schema_that_cannot_be_sent_is_an_error_of_the_method() -> None:
    for schema in (int, list[Tensor], dict[str, int], Any):
        with pytest.raises(TypeError, match="cannot be sent"):
            decode(encode({}), schema)


def test_schemas_are_read_off_the_annotations() -> None:
    def fn(
        task: Any, t: Tensor, down: Inner, state: Stateless, batches: Any
    ) -> tuple[Outer, Stateless]: ...

    assert wire.schemas(fn) == (Inner, Outer)
