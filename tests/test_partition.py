"""Partitions: rows where they belong, seeds, the cache, refusals and the picture."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedcore.data.partition import (
    Dirichlet,
    Iid,
    Natural,
    Partition,
    PartitionSettings,
    Pathological,
    Shards,
    SizeSkew,
)
from fedcore.data.plot import partition_figure
from fedcore.errors import SettingsError
from fedcore.storage import cache
from tests.helpers import PATIENCE

LABELS = np.random.default_rng(0).permutation(np.arange(6000) % 10)
ALL = [
    Iid(),
    Dirichlet(),
    Dirichlet(alpha=0.05, min_size=0),
    Shards(),
    Pathological(),
    SizeSkew(),
    Natural(),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "cache"))


def label_counts(part: Partition, labels: np.ndarray) -> np.ndarray:
    """[population, classes]"""
    client = np.repeat(np.arange(len(part.offsets) - 1), np.diff(part.offsets))
    counts = np.zeros((len(part.offsets) - 1, labels.max() + 1), dtype=np.int64)
    np.add.at(counts, (client, labels[part.order]), 1)
    return counts


def groups_of(labels: np.ndarray, population: int) -> np.ndarray:
    return np.array([f"writer {i}" for i in np.arange(len(labels)) % population])


def split(
    partition: object, labels: np.ndarray, population: int, seed: int = 0
) -> Partition:
    groups = groups_of(labels, population)
    return partition.split(labels, groups, population, seed)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("partition", ALL, ids=repr)
def test_every_row_is_with_exactly_one_client_in_ascending_order(
    partition: object,
) -> None:
    part = split(partition, LABELS, 50)
    assert part.offsets[0] == 0
    assert part.offsets[-1] == len(part.order)
    assert len(part.offsets) == 51
    assert part.order.dtype == part.offsets.dtype == np.int64
    assert np.diff(part.offsets).min() >= (
        partition.min_size if isinstance(partition, Dirichlet) else 1
    )
    np.testing.assert_array_equal(np.sort(part.order), np.arange(len(LABELS)))
    for i in range(50):
        assert (np.diff(part.order[part.offsets[i] : part.offsets[i + 1]]) > 0).all(), (
            f"rows of client {i} are not ascending"
        )


@pytest.mark.parametrize("partition", ALL, ids=repr)
def test_the_seed_decides_and_the_cache_changes_nothing(
    partition: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = split(partition, LABELS, 50, 2)
    assert isinstance(partition, Natural) or not np.array_equal(
        computed.order, split(partition, LABELS, 50, 3).order
    )
    with monkeypatch.context() as m:
        m.setattr(type(partition), "_parts", lambda *_: pytest.fail("computed again"))
        known = split(partition, LABELS, 50, 2)
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "another"))
    for again in (known, split(partition, LABELS, 50, 2)):
        np.testing.assert_array_equal(again.order, computed.order)
        np.testing.assert_array_equal(again.offsets, computed.offsets)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    partition=st.one_of(
        st.just(Iid()),
        st.builds(SizeSkew, sigma=st.floats(0, 20)),
        st.builds(Dirichlet, alpha=st.floats(1e-3, 100), min_size=st.integers(0, 3)),
        st.builds(Shards, per_client=st.integers(1, 4)),
        st.builds(Pathological, classes=st.integers(1, 5)),
        st.just(Natural()),
    ),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    population=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_a_split_is_a_partition_or_a_settings_error(
    partition: object, labels: np.ndarray, population: int, seed: int
) -> None:
    try:
        part = split(partition, labels, population, seed)
    except SettingsError:
        return
    sizes = np.diff(part.offsets)
    # The data say how many natural clients there are.
    assert len(sizes) == population or isinstance(partition, Natural)
    assert sizes.min() >= (
        partition.min_size if isinstance(partition, Dirichlet) else 1
    )
    assert np.bincount(part.order, minlength=len(labels)).max() == 1
    if isinstance(partition, Shards):
        shards = population * partition.per_client
        assert len(part.order) == len(labels) // shards * shards
    else:
        assert len(part.order) == len(labels)
    again = split(partition, labels, population, seed)
    np.testing.assert_array_equal(part.order, again.order)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    population=st.integers(1, 40),
    rows=st.integers(40, 200),
    sigma=st.floats(0, 2),
    seed=st.integers(0, 5),
)
def test_iid_and_size_skew_always_cover_every_row_and_iid_in_equal_numbers(
    population: int, rows: int, sigma: float, seed: int
) -> None:
    for partition in (Iid(), SizeSkew(sigma=sigma)):
        part = partition.split(np.arange(rows) % 3, None, population, seed)
        sizes = np.diff(part.offsets)
        assert len(sizes) == population
        assert sizes.min() >= 1
        assert isinstance(partition, SizeSkew) or np.ptp(sizes) <= 1
        np.testing.assert_array_equal(np.sort(part.order), np.arange(rows))


def test_alpha_is_heterogeneity() -> None:
    def classes(alpha: float) -> float:
        return float(
            (label_counts(split(Dirichlet(alpha=alpha), LABELS, 50), LABELS) > 0)
            .sum(1)
            .mean()
        )

    assert classes(0.1) < classes(1.0) < classes(100.0)
    assert classes(100.0) == 10


def test_pathological_clients_have_exactly_their_classes() -> None:
    counts = label_counts(split(Pathological(classes=3), LABELS, 50), LABELS)
    assert ((counts > 0).sum(1) == 3).all()


def test_two_shards_a_client_are_few_classes() -> None:
    counts = label_counts(split(Shards(per_client=2), LABELS, 50), LABELS)
    assert (counts.sum(1) == 120).all()
    assert (counts > 0).sum(1).max() <= 2, (
        "100 shards of 60 rows, 600 rows a class: a shard is of one class"
    )


def test_shards_that_do_not_divide_the_rows_leave_the_rest_out() -> None:
    part = split(Shards(per_client=7), LABELS, 100)
    assert len(part.order) == 700 * (6000 // 700)


def test_size_skew_without_spread_is_equal_sizes() -> None:
    assert np.ptp(np.diff(split(SizeSkew(sigma=0), LABELS, 50).offsets)) <= 1
    assert np.ptp(np.diff(split(SizeSkew(sigma=2), LABELS, 50).offsets)) > 500


def test_natural_clients_are_the_groups_in_order_of_their_names_and_no_others() -> None:
    labels, groups = (
        np.zeros(6, dtype=np.int64),
        np.array(["bob", "ann", "bob", "cy", "ann", "bob"]),
    )
    for same in (groups, groups.astype(object)):
        part = Natural().split(labels, same, None, 0)
        assert part.order.tolist() == [1, 4, 0, 2, 5, 3]
        assert part.offsets.tolist() == [0, 2, 5, 6]
    with pytest.raises(SettingsError, match="names no clients"):
        Natural().split(labels, None, None, 0)
    assert Natural().split(labels, groups, 4, 0).offsets.tolist() == [0, 2, 5, 6], (
        "the data says how many clients it has, not the preset"
    )


@pytest.mark.parametrize(
    ("partition", "population", "message"),
    [
        (Iid(), None, "population is missing"),
        (Iid(), 0, r"population = 0: must be in \[1, 6000\]"),
        (Iid(), 6001, r"population = 6001: must be in \[1, 6000\]"),
        (
            Shards(per_client=40),
            200,
            "200 clients need 8000 shards of 6000 examples; lower the population",
        ),
        (
            Pathological(classes=2),
            5,
            "of 6000 examples go to no client; raise the population",
        ),
        (Pathological(classes=2), 5000, r"lower the population or partition\.classes"),
        (Pathological(classes=11), 20, "has 10 classes"),
        (Dirichlet(alpha=0.01), 500, r"raise partition\.alpha"),
        (Dirichlet(min_size=13), 500, r"lower partition\.min_size"),
    ],
    ids=repr,
)
def test_what_cannot_be_split_is_refused_in_one_line_with_advice(
    partition: Iid, population: int | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        partition.split(LABELS, None, population, 0)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_settings_are_told_apart_by_name_and_unknown_keys_are_refused() -> None:
    parse = TypeAdapter(PartitionSettings).validate_python
    assert parse({"name": "dirichlet", "alpha": 0.1}) == Dirichlet(alpha=0.1)
    for wrong in (
        {"name": "dirichlet", "beta": 1},
        {"name": "nearly"},
        {"name": "dirichlet", "alpha": 0},
        {"name": "size_skew", "sigma": float("inf")},
    ):
        with pytest.raises(ValidationError):
            parse(wrong)


def test_pathological_with_all_classes_ends() -> None:
    part = Pathological(classes=100).split(np.arange(20_000) % 100, None, 200, 0)
    assert (np.diff(part.offsets) == 100).all()


def test_two_thousand_clients_at_the_default_alpha_all_have_examples() -> None:
    part = Dirichlet().split(np.repeat(np.arange(10), 6000), None, 2000, 0)
    assert np.diff(part.offsets).min() >= 1
    assert len(np.unique(part.order)) == 60_000


def test_two_thousand_clients_at_alpha_one_hundredth_have_empty_ones_or_none() -> None:
    """Refused with advice, and made where empty clients are allowed."""
    labels = np.arange(60_000) % 10
    with pytest.raises(SettingsError, match="0 allows empty clients"):
        Dirichlet(alpha=0.01).split(labels, None, 2000, 0)
    part = Dirichlet(alpha=0.01, min_size=0).split(labels, None, 2000, 0)
    np.testing.assert_array_equal(np.sort(part.order), np.arange(60_000))
    assert len(part.offsets) == 2001
    assert np.diff(part.offsets).min() == 0


def test_a_hopeless_draw_is_stopped_at_its_first_try_after_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a clock that goes on by two seconds whenever it is read."""
    clock = itertools.count(step=2)
    stand_in = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("fedcore.data.partition.time", stand_in)
    with pytest.raises(SettingsError, match="not found within 5 s"):
        Dirichlet(alpha=0.01).split(LABELS, None, 500, 0)
    # Read at the start (0), and after the first three tries (2, 4, 6).
    assert next(clock) == 8


def test_a_known_partition_needs_no_import_of_flwr_datasets() -> None:
    Iid().split(LABELS, None, 10, 0)
    code = (
        "import sys, numpy as np; from fedcore.data.partition import Iid\n"
        "labels = np.random.default_rng(0).permutation(np.arange(6000) % 10)\n"
        "Iid().split(labels, None, 10, 0)\n"
        "sys.exit('datasets' in sys.modules or 'flwr_datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE)
    assert done.returncode == 0


def test_a_damaged_or_unwritable_cache_is_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Iid().split(LABELS, None, 10, 0)
    (file,) = (tmp_path / "cache").glob("*.npz")
    whole = file.read_bytes()
    known = cache.load(file.stem)
    assert known is not None
    np.testing.assert_array_equal(known["order"], first.order)
    for damaged in (
        b"",
        b"nonsense",
        b"PK damaged",
        whole[:-100],
        whole[:200] + b"\xff" + whole[201:],
    ):
        file.write_bytes(damaged)
        assert cache.load(file.stem) is None
        np.testing.assert_array_equal(
            Iid().split(LABELS, None, 10, 0).order, first.order
        )
        assert file.read_bytes() == whole, "the damaged file should have been replaced"
    (tmp_path / "file").touch()
    for unwritable in (str(tmp_path / "file"), "/proc/none"):
        monkeypatch.setenv("FEDCORE_CACHE", unwritable)
        np.testing.assert_array_equal(
            Iid().split(LABELS, None, 10, 0).order, first.order
        )
        assert cache.load(file.stem) is None


def test_a_partition_is_drawn_for_few_and_for_many_clients() -> None:
    for population in (3, 3000):
        counts = np.random.default_rng(0).integers(0, 9, (population, 10))
        figure = partition_figure(counts, "a partition")
        figure.savefig(io.BytesIO(), format="svg")
        assert len(figure.axes) == 2


def test_one_client_and_clients_without_examples_can_be_drawn() -> None:
    for counts in (np.array([[3, 4]]), np.array([[0, 0], [3, 4], [0, 0]])):
        columns = partition_figure(counts, "a partition").axes[0].containers[0]
        assert columns[0].get_height() > 0, "the client with examples comes first"
