"""Data that are wrong: used rightly, or refused by array, first bad row and remedy."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcore.arrays import as_examples
from fedcore.checks.data import check_labels
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.partition import (
    Dirichlet,
    Iid,
    Natural,
    Pathological,
    Shards,
    SizeSkew,
)
from fedcore.errors import SettingsError
from fedcore.metrics import cross_entropy, squared_error
from fedcore.task import Task

ROWS, FEATURES = 8, 3
GOOD: dict[str, Any] = {
    "x": torch.arange(ROWS * FEATURES, dtype=torch.float32).view(ROWS, FEATURES),
    "y": torch.arange(ROWS) % 3,
    "order": np.array([5, 0, 1, 2, 3, 4]),
    "offsets": np.array([0, 1, 1, 6]),
}


def data_of(**changes: Any) -> FederatedData:
    given = {**GOOD, "test": None, "holdout": 0.0, **changes}
    train = Examples(given["x"], given["y"])
    return FederatedData(
        train, given["test"], given["order"], given["offsets"], given["holdout"]
    )


def refusal(**changes: Any) -> str:
    """The line with which these arguments are refused."""
    with pytest.raises(SettingsError) as refused:
        data_of(**changes)
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def with_value(array: Any, place: Any, value: float) -> Any:
    changed = array.clone() if isinstance(array, Tensor) else array.copy()
    changed[place] = value
    return changed


HOLDERS = [
    ("too large", {"order": [5, 0, 1, 2, 3, 205]}, r"order\[5\] = 205.*8 rows.*0 to 7"),
    ("one too large", {"order": [0, 8], "offsets": [0, 2]}, r"order\[1\] = 8.*0 to 7"),
    ("negative", {"order": [5, 0, -1, 2, 3, 4]}, r"order\[2\] = -1.*0 to 7"),
    ("twice", {"order": [5, 0, 1, 2, 1, 4]}, r"order\[4\] = 1: client 2 .*twice"),
    ("a mask", {"order": np.ones(6, bool)}, r"order is a mask.*np\.flatnonzero"),
    ("no whole", {"order": [5, 0, 1.5, 2, 3, 4]}, r"order\[2\] = 1\.5.*astype"),
    ("floats", {"order": np.arange(6.0)}, r"order is float64, order\[0\] = 0\.0"),
    ("NaN", {"order": [0, math.nan]}, r"order\[1\] = nan"),
    ("None", {"order": None}, r"order is None"),
    ("None in it", {"order": [5, None, 1, 2, 3, 4]}, r"order holds None, .*row 1"),
    ("text", {"order": ["a"] * 6}, r"order holds text, first in row 0"),
    (
        "lists",
        {"order": [[5], [0, 1, 2]]},
        r"order has rows of different lengths.*row 1",
    ),
    (
        "2-d",
        {"order": [[5, 0, 1], [2, 3, 4]]},
        r"order has shape \(2, 3\).*concatenate",
    ),
    ("unsigned", {"order": np.full(6, 2**63, np.uint64)}, r"order\[0\] = 9223372"),
    ("start", {"offsets": [1, 1, 6]}, r"offsets\[0\] = 1: expected 0"),
    ("descending", {"offsets": [0, 4, 2, 6]}, r"offsets\[2\] = 2 comes after 4"),
    ("beyond", {"offsets": [0, 4, 9]}, r"offsets\[2\] = 9: order has 6 entries"),
    ("short", {"offsets": [0, 4]}, r"offsets end at 4, so that order\[4\]"),
    ("no client", {"offsets": [0]}, r"offsets has 1 entries"),
    ("offsets floats", {"offsets": [0.0, 6.0]}, r"offsets is float64, offsets\[0\]"),
    ("offsets 2-d", {"offsets": [[0, 6]]}, r"offsets has shape \(1, 2\)"),
    ("offsets None", {"offsets": None}, r"offsets is None"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in HOLDERS], ids=[c[0] for c in HOLDERS]
)
def test_who_holds_what_is_refused_where_it_disagrees(
    changes: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal(**changes))


NAN, INF = math.nan, math.inf
ARRAYS = [
    ("longer x", {"y": GOOD["y"][:6]}, r"train\.x has 8 rows and train\.y 6.*row 6 is"),
    ("longer y", {"x": GOOD["x"][:6]}, r"train\.x has 6 rows and train\.y 8.*row 6 is"),
    ("NaN", {"x": with_value(GOOD["x"], (3, 1), NAN)}, r"train\.x holds NaN, .*row 3"),
    ("inf", {"x": with_value(GOOD["x"], (4, 1), INF)}, r"train\.x holds inf.*row 4"),
    ("-inf", {"x": with_value(GOOD["x"], (4, 1), -INF)}, r"train\.x holds inf.*row 4"),
    ("half", {"x": with_value(GOOD["x"].half(), 7, NAN)}, r"train\.x holds NaN.*row 7"),
    ("y NaN", {"y": with_value(torch.ones(8), 2, NAN)}, r"train\.y holds NaN.*row 2"),
    (
        "text",
        {"y": list("abcdefgh")},
        r'train\.y holds text, .*row 0 \("a"\).*np\.unique',
    ),
    ("text array", {"x": np.array(["a"] * 8)}, r"train\.x holds text, first in row 0"),
    (
        "bytes",
        {"y": np.array([b"a"] * 8)},
        r'train\.y holds text, first in row 0 \("a"',
    ),
    ("None", {"y": None}, r"train\.y is None"),
    ("None in it", {"y": [0, 1, None, 1, 0, 1, 2, 1]}, r"train\.y holds None, .*row 2"),
    ("ragged", {"x": [[1.0], [1.0, 2.0]] * 4}, r"train\.x has rows.*row 1 of \(2,\)"),
    ("complex", {"x": GOOD["x"] * 1j}, r"train\.x is complex64.*view_as_real"),
    ("complex array", {"x": np.ones((8, 2)) * 1j}, r"train\.x is complex128"),
    (
        "dates",
        {"x": np.zeros(8, "M8[D]")},
        r"train\.x holds datetime64, first in row 0",
    ),
    ("object", {"x": np.array([{}] * 8)}, r"train\.x holds dict, first in row 0"),
    ("one number", {"x": torch.tensor(3.0)}, r"train\.x is a single number"),
    (
        "sparse",
        {"x": GOOD["x"].to_sparse()},
        r"train\.x is no dense tensor: .*to_dense",
    ),
    ("no rows", {"x": torch.ones(0, 3), "y": torch.ones(0)}, r"train has no rows"),
    ("targets", {"y": (GOOD["y"], GOOD["y"])}, r"train\.y is a tuple.*columns"),
    (
        "in a dict",
        {"x": {"ids": GOOD["y"], "w": [NAN] * 8}},
        r'train\.x\["w"\] holds NaN',
    ),
    ("share", {"holdout": 1.0}, r"holdout = 1\.0: must be in \[0, 1\)"),
    ("negative share", {"holdout": -0.1}, r"holdout = -0\.1: must be in \[0, 1\)"),
    ("no share", {"holdout": NAN}, r"holdout = nan: must be in \[0, 1\)"),
    ("share of text", {"holdout": "half"}, r"holdout = 'half': must be in \[0, 1\)"),
    ("test", {"test": (GOOD["x"], GOOD["y"][:5])}, r"test\.x has 8 rows and test\.y 5"),
    ("a set", {"test": GOOD["x"]}, r"test is a Tensor: expected Examples\(x, y\)"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in ARRAYS], ids=[c[0] for c in ARRAYS]
)
def test_arrays_are_refused_by_name_and_first_bad_row(
    changes: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal(**changes))


def test_arrays_lists_and_small_integers_are_what_torch_makes_of_them() -> None:
    x = GOOD["x"].numpy()
    backwards = x[::-1].copy()[::-1]
    read_only = x.copy()
    read_only.flags.writeable = False
    big_endian = x.astype(">f4")
    listed = [row.tolist() for row in x]
    tensors = list(GOOD["x"])
    boxed = np.array([[float(v) for v in row] for row in x], dtype=object)
    for same in (x, backwards, read_only, big_endian, listed, tensors):
        assert torch.equal(data_of(x=same).x, GOOD["x"])
    assert torch.equal(data_of(x=boxed).x, GOOD["x"].double())
    assert data_of(x=x.astype(np.float64)).x.dtype == torch.float64
    assert data_of(x=(x > 4)).x.dtype == torch.bool
    assert data_of(x=x.astype(np.uint8)).x.dtype == torch.uint8
    assert data_of(x=x.astype(np.uint16)).x.dtype == torch.int64
    for kind in (np.uint8, np.int8, np.int16, np.int32, np.uint32, np.int64):
        y = data_of(y=GOOD["y"].numpy().astype(kind)).y
        assert y.dtype == torch.int64
        assert torch.equal(y, GOOD["y"])
    assert data_of(y=GOOD["y"].tolist()).y.dtype == torch.int64
    assert data_of(y=GOOD["y"] > 0).y.dtype == torch.bool
    assert data_of(x=GOOD["x"].clone().requires_grad_()).x.requires_grad is False


def test_tables_are_taken_by_their_numbers() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(GOOD["x"].numpy())
    data = data_of(x=table, y=pandas.Series(GOOD["y"].numpy()))
    assert torch.equal(data.x, GOOD["x"])
    assert torch.equal(data.y, GOOD["y"])


def test_good_tensors_are_not_copied() -> None:
    array = GOOD["x"].numpy()
    data = data_of()
    assert data.x is GOOD["x"]
    assert data_of(x=array).x.data_ptr() == GOOD["x"].data_ptr()
    assert data.order is GOOD["order"]


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    assert data_of(x=torch.full((8, 3), 3e38)).x.isfinite().all()


def test_two_clients_may_hold_one_row() -> None:
    data = data_of(order=[0, 1, 1, 2], offsets=[0, 2, 4])
    assert [data.rows(i, "train").tolist() for i in range(2)] == [[0, 1], [1, 2]]


def test_row_numbers_may_be_lists_tensors_and_of_any_whole_type() -> None:
    order, offsets = GOOD["order"], GOOD["offsets"]
    for kind in (list, torch.from_numpy, partial(np.asarray, dtype=np.uint8)):
        data = data_of(order=kind(order), offsets=kind(offsets))
        assert data.rows(2, "train").tolist() == [0, 1, 2, 3, 4]
        assert data.order.dtype == data.offsets.dtype == np.int64


def test_inputs_of_several_tensors_are_checked_leaf_by_leaf() -> None:
    x = {"ids": np.arange(4), "pair": (torch.ones(4, 2), [0.5] * 4)}
    inputs, _ = as_examples("train", (x, [0, 1, 0, 1]))
    assert inputs["ids"].dtype == torch.int64
    assert inputs["pair"][1].tolist() == [0.5] * 4
    x["pair"] = (torch.ones(3, 2), [0.5] * 4)
    with pytest.raises(SettingsError, match=r'train\.x\["pair"\]\[0\] has 3 rows'):
        as_examples("train", (x, [0, 1, 0, 1]))


# A fuzz test: success with the right rows, or a line with the array and the first row.


def first(values: list[Any], is_bad: Any) -> int | None:
    return next((i for i, value in enumerate(values) if is_bad(value)), None)


def faults(
    x: list[Any], y: list[Any], order: list[Any], offsets: list[int]
) -> list[tuple[str, ...]]:
    """The faults that a reader finds, each as texts that its line must hold."""
    found: list[tuple[str, ...]] = []
    if len(x) != len(y):
        found.append(("train.x", "train.y", f"row {min(len(x), len(y))}"))
    for name, values in (("train.x", x), ("train.y", y)):
        bad = first(values, lambda v: v is None or not math.isfinite(v))
        if bad is not None:
            found.append((name, f"row {bad}"))
    if not x or not y:
        found.append(("train has no rows",))
    if any(isinstance(v, float) for v in order):
        bad = first(order, lambda v: v != math.floor(v) if v == v else True) or 0
        found.append(("order is float64", f"order[{bad}]"))
    bad = first(order, lambda v: not 0 <= v < len(y))
    if bad is not None:
        found.append((f"order[{bad}]",))
    if offsets[0] != 0:
        found.append(("offsets[0]",))
    for i, (low, high) in enumerate(pairwise(offsets), 1):
        if high < low:
            found.append((f"offsets[{i}]",))
            break
    beyond = first(offsets, lambda v: v > len(order))
    if beyond is not None:
        found.append((f"offsets[{beyond}]",))
    if len(offsets) < 2:
        found.append(("offsets has",))
    if offsets[-1] < len(order):
        found.append((f"offsets end at {offsets[-1]}",))
    for client in range(len(offsets) - 1):
        rows = order[max(offsets[client], 0) : max(offsets[client + 1], 0)]
        if max(Counter(rows).values(), default=0) > 1:
            found.append(("twice", f"client {client}"))
            break
    return found


def agrees(
    x: list[Any], y: list[Any], order: list[Any], offsets: list[int], forms: list[Any]
) -> None:
    """Build data of these and compare with a plain reading of them."""
    expected = faults(x, y, order, offsets)
    try:
        data = data_of(
            x=[[value, 1.0] for value in x] if forms[0] else np.array(x)[:, None],
            y=y if forms[1] else np.array(y),
            order=order if forms[2] else np.array(order, None if order else int),
            offsets=offsets if forms[3] else torch.tensor(offsets),
        )
    except SettingsError as refused:
        text = str(refused)
        assert "\n" not in text
        assert any(all(part in text for part in fault) for fault in expected), (
            f"{text!r} is none of {expected}"
        )
        return
    assert not expected, f"accepted in spite of {expected}"
    for client, (low, high) in enumerate(pairwise(offsets)):
        assert data.rows(client, "train").tolist() == order[low:high]
    assert data.sizes.sum() == len(order)
    assert data.population == len(offsets) - 1
    torch.testing.assert_close(data.x[:, 0].double().tolist(), x, rtol=1e-6, atol=0)
    assert data.y.tolist() == y


number = st.floats(-100, 100, width=32)
value_of_x = st.one_of(number, number, number, st.sampled_from([NAN, INF, -INF]))


@st.composite
def arguments(draw: Any) -> tuple[Any, ...]:
    """Good arguments, of which up to two things are spoiled."""
    rows = draw(st.integers(1, 9))
    x = draw(st.lists(number, min_size=rows, max_size=rows))
    y = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    clients = draw(st.integers(1, 4))
    order: list[Any] = []
    offsets = [0]
    for _ in range(clients):
        held = draw(st.sets(st.integers(0, rows - 1), max_size=rows))
        order += sorted(held, reverse=draw(st.booleans()))
        offsets.append(len(order))
    spoiled = draw(st.lists(st.integers(0, 7), max_size=2))
    for kind in spoiled:
        place = draw(st.integers(0, 8))
        if kind == 0:
            x = x[:place] or x
        elif kind == 1:
            x[place % len(x)] = draw(value_of_x)
        elif kind == 2 and order:
            order[place % len(order)] = draw(st.integers(-2, rows + 2))
        elif kind == 3:
            offsets[place % len(offsets)] = draw(st.integers(-1, len(order) + 2))
        elif kind == 4:
            y = y + [0] * place
        elif kind == 5:
            offsets = offsets[: place + 1]
        elif kind == 6 and order:
            order[place % len(order)] = draw(st.sampled_from([0.5, 1e9, NAN]))
        elif kind == 7:
            y = [float(label) for label in y]
            y[place % len(y)] = draw(value_of_x)
    forms = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    return x, y, order, offsets, forms


@settings(derandomize=True, max_examples=150)
@given(arguments())
def test_data_are_read_rightly_or_refused_by_array_and_row(
    given: tuple[Any, ...],
) -> None:
    agrees(*given)


@pytest.mark.slow
@settings(derandomize=True, max_examples=5000)
@given(arguments())
def test_many_data_are_read_rightly_or_refused_by_array_and_row(
    given: tuple[Any, ...],
) -> None:
    agrees(*given)


# Partitions


LABELS = np.arange(30) % 3
SPOILED = [
    ("None", None, r"labels is None"),
    ("None in it", ["a", None] * 15, r"labels\[1\] is None, beside names of classes"),
    ("mixed", ["a", 1] * 15, r"labels\[1\] is 1, beside names of classes"),
    ("a fraction", LABELS + 0.5, r'labels\[0\] = 0\.5: .*partition\.name = "iid"'),
    ("NaN", np.where(LABELS == 1, NAN, LABELS), r"labels\[1\] = nan"),
    ("one-hot", np.eye(3)[LABELS], r"labels has shape \(30, 3\).*argmax"),
    ("a column", LABELS[:, None], r"labels has shape \(30, 1\).*reshape"),
    (
        "ignored",
        with_value(LABELS, 4, -100),
        r"labels\[4\] = -100.*leave such rows out",
    ),
    ("empty", [], r"labels is empty"),
    ("a number", 3, r"labels has shape \(\)"),
    ("a word", "abc", r"labels is a str"),
    ("a set", {1, 2}, r"labels is a set"),
    ("dates", np.zeros(30, "M8[D]"), r"labels holds datetime64, first in row 0"),
    ("ragged", [[1], [1, 2]] * 15, r"labels has rows of different lengths.*row 1"),
]


@pytest.mark.parametrize(
    ("labels", "message"), [case[1:] for case in SPOILED], ids=[c[0] for c in SPOILED]
)
def test_labels_that_are_no_classes_are_refused(labels: Any, message: str) -> None:
    for partition in (Dirichlet(alpha=10), Shards(), Pathological()):
        with pytest.raises(SettingsError, match=message) as refused:
            partition.split(labels, None, 4, 0)
        assert "\n" not in str(refused.value)


def test_names_tensors_and_lists_are_classes_as_their_numbers_are() -> None:
    names = np.array(["cat", "dog", "eel"])[LABELS]
    expected = Dirichlet(alpha=10).split(LABELS, None, 4, 0)
    for same in (
        names,
        names.tolist(),
        names.astype(object),
        LABELS.tolist(),
        LABELS.astype(object),
        LABELS.astype(np.uint8),
        LABELS.astype(float),
        torch.from_numpy(LABELS),
    ):
        part = Dirichlet(alpha=10).split(same, None, 4, 0)
        np.testing.assert_array_equal(part.order, expected.order)
        np.testing.assert_array_equal(part.offsets, expected.offsets)


def test_targets_that_are_no_classes_are_spread_where_only_their_number_counts() -> (
    None
):
    for targets in (torch.randn(30), torch.randn(30, 2), list(range(30))):
        for partition in (Iid(), SizeSkew()):
            part = partition.split(targets, None, 4, 0)
            assert sorted(part.order.tolist()) == list(range(30))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([1, 2], r"groups has shape \(2,\) and labels 30 rows"),
        ([None] * 30, r"groups holds None, first in row 0"),
        (["a", None] * 15, r"groups\[1\] is None, beside names of clients"),
        ([1.0, NAN] * 15, r"groups\[1\] is NaN"),
        (np.zeros((30, 2)), r"groups has shape \(30, 2\)"),
    ],
)
def test_groups_that_do_not_name_a_client_of_every_row_are_refused(
    groups: Any, message: str
) -> None:
    for partition in (Natural(), Iid()):
        with pytest.raises(SettingsError, match=message):
            partition.split(LABELS, groups, 3, 0)


@pytest.mark.parametrize("population", ["4", 4.0, True, None, 0, -1, 31])
def test_a_population_that_cannot_be_is_refused(population: Any) -> None:
    for partition in (Iid(), Dirichlet(), Shards(), Pathological(), SizeSkew()):
        with pytest.raises(SettingsError, match="population"):
            partition.split(LABELS, None, population, 0)
    part = Iid().split(LABELS, None, np.int64(4), 0)  # type: ignore[arg-type]
    assert len(part.offsets) == 5


@settings(derandomize=True, max_examples=40)
@given(
    labels=st.lists(
        st.one_of(
            st.integers(0, 3),
            st.sampled_from(["a", "b", None, 0.5, NAN, -100, 2.0, True]),
        ),
        max_size=12,
    ),
    groups=st.none()
    | st.lists(st.sampled_from(["x", "y", 3, None]), min_size=9, max_size=12),
    population=st.one_of(st.integers(-1, 6), st.just(2.5), st.none()),
    partition=st.sampled_from(
        [Iid(), Dirichlet(min_size=0), Shards(per_client=1), Pathological(classes=1)]
    )
    | st.just(Natural()),
)
def test_a_split_of_anything_is_a_partition_or_a_line(
    labels: Any, groups: Any, population: Any, partition: Any
) -> None:
    try:
        part = partition.split(labels, groups, population, 0)
    except SettingsError as refused:
        text = str(refused)
        assert "\n" not in text
        assert any(
            word in text for word in ("labels", "groups", "population", "partition")
        )
        return
    clients = len(set(groups)) if isinstance(partition, Natural) else population
    assert len(part.offsets) == clients + 1
    assert part.offsets[-1] == len(part.order) <= len(labels)
    assert len(set(part.order.tolist())) == len(part.order)
    if isinstance(partition, Natural):
        rows = np.split(part.order, part.offsets[1:-1])
        assert all(len({groups[i] for i in own}) == 1 for own in rows)
    else:
        assert isinstance(partition, Shards) or len(part.order) == len(labels)


# Labels and inputs that a model cannot take


def task_of(
    y: Any = (0, 1, 2, 0),
    x: Any = None,
    model: nn.Module | None = None,
    test: Any = None,
    proxy: Any = None,
    loss: Any = cross_entropy,
    metrics: Any = None,
) -> Task:
    """A task of two clients, whose model has four inputs and three outputs."""
    y = y if isinstance(y, Tensor) else torch.tensor(y)
    x = torch.ones(len(y), 4) if x is None else x
    half = len(y) // 2
    data = FederatedData(
        Examples(x, y), test, np.arange(len(y)), np.array([0, half, len(y)])
    )
    return Task(model or nn.Linear(4, 3), data, loss, metrics, proxy)


def examples_of(y: Any) -> Examples:
    return Examples(torch.ones(len(y), 4), torch.tensor(y))


TORCH = nn.CrossEntropyLoss(reduction="none")
IGNORING_ONE = partial(nn.functional.cross_entropy, reduction="none", ignore_index=1)


def own_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return -outputs.log_softmax(1).gather(1, y[:, None])[:, 0]


MISFITS = [
    (
        "large",
        {"y": [0, 1, 2, 7]},
        r"train\.y\[3\] = 7: the model has 3 outputs.* 0 to 2",
    ),
    ("from one", {"y": [1, 2, 3, 1]}, r"train\.y\[2\] = 3.*start at 1\? Write y - 1"),
    (
        "negative",
        {"y": [0, 1, -1, 2]},
        r"train\.y\[2\] = -1.*number the classes from 0",
    ),
    (
        "ignored",
        {"y": [0, 1, 2, -100]},
        r"train\.y\[3\] = -100.*without any other label out",
    ),
    ("test", {"test": examples_of([0, 1, 7])}, r"test\.y\[2\] = 7"),
    ("proxy", {"proxy": examples_of([3])}, r"proxy\.y\[0\] = 3"),
    ("torch", {"y": [0, 1, 2, 7], "loss": TORCH}, r"train\.y\[3\] = 7"),
    ("torch ignored", {"y": [0, -100, 2, 1], "loss": TORCH}, r"train\.y\[1\] = -100"),
    (
        "its own",
        {"y": [0, 2, 1, 2], "loss": TORCH, "model": nn.Linear(4, 2)},
        r"\[1\] = 2",
    ),
    (
        "own loss",
        {"y": [0, 1, 7, 2], "loss": own_loss},
        r'"loss" cannot take train\.y\[2\]',
    ),
    (
        "own loss test",
        {"test": examples_of([9]), "loss": own_loss},
        r"test\.y\[0\] = 9",
    ),
    (
        "floats",
        {"y": [0.0, 1.0]},
        r"train\.y is float32: the loss is over classes.*long",
    ),
    ("bool", {"y": [True, False]}, r"train\.y is bool.*write y\.long\(\)"),
    (
        "double",
        {"x": torch.ones(4, 4).double()},
        r"train\.x is float64.*train\.x\.float\(\)",
    ),
    ("images", {"x": torch.ones(4, 4).byte()}, r"train\.x is uint8.*float\(\) / 255"),
    (
        "counts",
        {"x": torch.ones(4, 4).long()},
        r"train\.x is int64.*write train\.x\.float",
    ),
    (
        "other test",
        {"test": Examples(torch.ones(2, 5), torch.tensor([0, 1]))},
        r"cannot take row 0 of test\.x, of shape \(5,\)",
    ),
    (
        "no proxy",
        {"proxy": Examples(torch.ones(0, 4), torch.ones(0))},
        r"proxy has no rows",
    ),
    ("bad proxy", {"proxy": (torch.ones(2, 4), torch.ones(3))}, r"proxy\.x has 2 rows"),
    (
        "no parameters",
        {"model": nn.Identity()},
        r"Identity has no trainable param.*none",
    ),
    (
        "frozen",
        {"model": nn.Linear(4, 3).requires_grad_(False)},
        r"Linear has no trainable parameters \(all 2 are frozen\)",
    ),
    (
        "tokens",
        {
            "x": torch.tensor([[0, 1], [1, 2], [2, 50], [0, 0]]),
            "model": nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(4, 3)),
        },
        r"row 2 of train\.x, of shape \(2,\) with values from 2 to 50: IndexError",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in MISFITS], ids=[c[0] for c in MISFITS]
)
def test_what_model_and_loss_cannot_take_is_refused_before_a_run(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        task_of(**changes).check()
    assert "\n" not in str(refused.value)


def test_a_label_that_a_loss_ignores_by_its_settings_is_named() -> None:
    with pytest.raises(SettingsError, match=r"train\.y\[2\] = 5"):
        task_of([0, 2, 5, 2], loss=IGNORING_ONE).check()
    with pytest.raises(SettingsError, match=r"= -100.*PyTorch would ignore it"):
        task_of([0, 2, -100, 2]).check()


def test_positions_may_be_ignored_beside_others_of_their_example() -> None:
    y = torch.tensor([[0, 2, -100], [-100, 1, 1]])
    check = partial(check_labels, "train", loss=TORCH, outputs=torch.ones(2, 3, 3))
    check(y)
    for row, column, label in ((1, 0, 3), (0, 2, -1)):
        with pytest.raises(SettingsError, match=rf"train\.y\[{row}\] = {label}"):
            check(with_value(y, (row, column), label))
    with pytest.raises(SettingsError, match=r"train\.y\[1\] = -100"):
        check(with_value(y, (1, slice(None)), -100))


def test_labels_of_any_kind_that_a_task_can_take_are_taken() -> None:
    task_of(torch.tensor([0, 1, 2, 0], dtype=torch.int32)).check()
    task_of(torch.tensor([0, 1, 2, 0], dtype=torch.uint8), loss=TORCH).check()
    task_of(torch.eye(4)[:, :3], metrics={}, loss=TORCH).check()  # probabilities
    task_of(
        [[-100.0], [3.0]], model=nn.Linear(4, 1), loss=squared_error, metrics={}
    ).check()
    # A loss of one's own may have labels of its own.
    task_of([-1, 1], loss=lambda outputs, y: (1 - y * outputs[:, 0]).relu()).check()
    task_of(x=torch.ones(4, 4).double(), model=nn.Linear(4, 3).double()).check()


@settings(derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(-2, 4), min_size=2, max_size=8),
    st.lists(st.integers(-1, 4), max_size=3),
    st.sampled_from([cross_entropy, TORCH, own_loss]),
)
def test_labels_fit_the_model_or_the_first_that_does_not_is_named(
    y: list[int], test: list[int], loss: Any
) -> None:
    task = task_of(y, loss=loss, test=examples_of(test) if test else None)
    bad = {}
    for name, labels in (("train", y), ("test", test)):
        is_bad = [not 0 <= label < 3 for label in labels]
        if any(is_bad):
            bad[name] = [i for i, value in enumerate(is_bad) if value]
    line = ""
    try:
        task.check()
    except SettingsError as refused:
        line = str(refused)
    name = "train" if "train" in bad else "test"
    rows = bad.get(name, [])
    rows = rows if loss is own_loss else rows[:1]
    assert bool(line) == bool(bad)
    assert not bad or any(f"{name}.y[{row}] = " in line for row in rows)
