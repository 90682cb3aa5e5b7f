"""Sources, partitions, batches."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcore import cache
from fedcore.data import sources
from fedcore.data.federated import EVALUATION_BATCH, Examples, FederatedData, LocalSettings
from fedcore.data.partition import Dirichlet, Iid, Natural, Partition, Pathological, Shards, SizeSkew
from fedcore.data.plot import partition_figure
from fedcore.errors import SettingsError

LABELS = np.repeat(np.arange(10), 60)


# Sources


def test_the_digits_come_without_importing_scikit_learn() -> None:
    code = "import sys; from fedcore.data import sources; sources.digits(); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_digits_are_all_there_and_the_test_set_is_balanced() -> None:
    s = sources.load("digits")
    assert len(s.x_train) + len(s.x_test) == 1797
    assert s.x_train.shape[1:] == (1, 8, 8)
    assert 0 <= s.x_train.min() < s.x_train.max() <= 1
    assert np.bincount(s.y_test.numpy()).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]


def test_an_unknown_source_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match='did you mean "digits"'):
        sources.load("digit")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder: Path) -> None:
    g = np.random.default_rng(0)
    for part, name in sources.IDX.items():
        n = 20 if "train" in part else 6
        array = g.integers(0, 255, (n, 28, 28)) if part.startswith("x") else g.integers(0, 10, n)
        content = idx(array)
        if part.endswith("test"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def test_fashion_mnist_is_read_from_a_folder_plain_or_compressed(tmp_path: Path) -> None:
    write_idx(tmp_path)
    s = sources.load("fashion-mnist", tmp_path)
    assert s.x_train.shape == (20, 1, 28, 28)
    assert s.x_test.shape == (6, 1, 28, 28)
    assert s.x_train.min() == pytest.approx(-0.2860 / 0.3530, abs=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "not idx", "missing", "not gzip"])
def test_a_damaged_or_missing_file_is_named(damage: str, tmp_path: Path) -> None:
    write_idx(tmp_path)
    file = tmp_path / sources.IDX["y_train"]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "not idx":
        file.write_bytes(b"hello")
    elif damage == "missing":
        file.unlink()
    else:
        file.with_name(file.name + ".gz").write_bytes(b"hello")
    with pytest.raises(SettingsError, match=r"train-labels-idx1-ubyte"):
        sources.load("fashion-mnist", tmp_path)


def test_a_folder_without_the_data_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="train-images-idx3-ubyte"):
        sources.load("fashion-mnist", tmp_path)
    with pytest.raises(SettingsError, match="parquet"):
        sources.load("cifar10", tmp_path)


def write_parquet(file: Path, n: int) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pixels = np.random.default_rng(n).integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    rows = []
    for image in pixels:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        rows.append({"bytes": out.getvalue(), "path": "x.png"})
    pq.write_table(pa.table({"image": rows, "label": list(range(n))}), file)
    return pixels


def test_cifar10_is_read_from_parquet_and_kept_decoded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar10-train.parquet", 5)
    pixels = write_parquet(tmp_path / "cifar10-test.parquet", 3)
    for _ in range(2):
        s = sources.load("cifar10", tmp_path)
        assert s.x_train.shape == (5, 3, 32, 32)
        assert s.y_test.tolist() == [0, 1, 2]
        restored = (s.x_test[:, 0] * 0.2470 + 0.4914) * 255
        assert (restored - torch.tensor(pixels[..., 0])).abs().max() < 0.01
    (tmp_path / "cifar10-train.parquet").write_bytes(b"no parquet")
    with pytest.raises(SettingsError, match="parquet"):
        sources.load("cifar10", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not list(Path(os.environ.get("FEDCORE_DATA", "/nowhere")).glob("*train*.parquet")),
    reason="CIFAR-10 is not in $FEDCORE_DATA",
)
def test_the_real_cifar10_is_whole() -> None:
    s = sources.load("cifar10")
    assert (len(s.x_train), len(s.x_test)) == (50_000, 10_000)
    assert np.bincount(s.y_train.numpy()).tolist() == [5000] * 10


def test_a_damaged_cache_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "c"))
    cache.save("k", a=np.arange(3))
    known = cache.load("k")
    assert known is not None
    assert known["a"].tolist() == [0, 1, 2]
    (tmp_path / "c" / "k.npz").write_bytes(b"PK damaged")
    assert cache.load("k") is None
    monkeypatch.setenv("FEDCORE_CACHE", "/proc/none")
    cache.save("k", a=np.arange(3))
    assert cache.load("k") is None


# Partitions


def check(part: Partition, rows: int, population: int, least: int = 1, whole: bool = True) -> np.ndarray:
    assert len(part.offsets) == population + 1
    assert len(np.unique(part.order)) == len(part.order)
    assert part.order.min() >= 0
    assert part.order.max() < rows
    sizes = np.diff(part.offsets)
    assert sizes.min() >= least
    assert sizes.sum() == rows if whole else sizes.sum() <= rows
    return sizes


ALL = [Iid(), Dirichlet(alpha=1.0), Shards(per_client=2), Pathological(classes=2), SizeSkew(sigma=1.0)]


@pytest.mark.parametrize("partition", ALL, ids=lambda p: p.name)
def test_every_row_has_at_most_one_client_and_the_seed_decides_which(partition) -> None:  # type: ignore[no-untyped-def]
    part = partition.split(LABELS, None, 20, 0)
    check(part, len(LABELS), 20, whole=partition.name in ("iid", "dirichlet", "size_skew", "pathological"))
    again, other = partition.split(LABELS, None, 20, 0), partition.split(LABELS, None, 20, 1)
    assert np.array_equal(part.order, again.order)
    assert not np.array_equal(part.order, other.order)


@pytest.mark.parametrize("partition", ALL, ids=lambda p: p.name)
def test_a_cached_partition_is_the_computed_one(partition, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path))
    computed = partition.split(LABELS, None, 15, 2)
    monkeypatch.setattr(type(partition), "_parts", lambda *_: pytest.fail("computed again"))
    known = partition.split(LABELS, None, 15, 2)
    assert np.array_equal(computed.order, known.order)
    assert np.array_equal(computed.offsets, known.offsets)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(40, 200), st.floats(0, 2), st.integers(0, 5))
def test_iid_and_size_skew_cover_every_row_once(population: int, rows: int, sigma: float, seed: int) -> None:
    labels = np.arange(rows) % 3
    sizes = check(Iid().split(labels, None, population, seed), rows, population)
    assert sizes.max() - sizes.min() <= 1
    check(SizeSkew(sigma=sigma).split(labels, None, population, seed), rows, population)


def test_alpha_is_heterogeneity() -> None:
    def classes(alpha: float) -> float:
        part = Dirichlet(alpha=alpha).split(LABELS, None, 20, 0)
        client = np.repeat(np.arange(20), np.diff(part.offsets))
        return float(np.mean([len(np.unique(LABELS[part.order[client == i]])) for i in range(20)]))

    assert classes(0.1) < classes(1.0) < classes(100.0)
    assert classes(100.0) == 10


def test_pathological_clients_have_exactly_their_classes() -> None:
    part = Pathological(classes=3).split(LABELS, None, 20, 0)
    for i in range(20):
        assert len(np.unique(LABELS[part.order[part.offsets[i] : part.offsets[i + 1]]])) == 3


def test_natural_clients_are_those_of_the_data() -> None:
    groups = np.array(["ann", "bob", "ann", "cy", "bob", "ann"])
    part = Natural().split(np.zeros(6, dtype=int), groups, None, 0)
    assert np.diff(part.offsets).tolist() == [3, 2, 1]
    assert part.order.tolist() == [0, 2, 5, 1, 4, 3]
    with pytest.raises(SettingsError, match="names no clients"):
        Natural().split(np.zeros(6, dtype=int), None, None, 0)
    with pytest.raises(SettingsError, match="3 natural clients"):
        Natural().split(np.zeros(6, dtype=int), groups, 4, 0)


@pytest.mark.parametrize(
    ("partition", "population", "expected"),
    [
        (Iid(), 601, "must be in .1, 600."),
        (Pathological(classes=11), 20, "has 10 classes"),
        (Pathological(classes=1), 3, "go to no client"),
        (Dirichlet(alpha=0.01, min_size=10), 100, "raise partition.alpha"),
        (Iid(), None, "population is missing"),
    ],
)
def test_an_impossible_partition_says_why(partition, population, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError, match=expected):
        partition.split(LABELS, None, population, 0)


def test_two_thousand_clients_at_alpha_one_hundredth_are_refused_in_seconds_or_made_with_empty_ones() -> None:
    labels = np.arange(60_000) % 10
    start = time.monotonic()
    with pytest.raises(SettingsError, match="0 allows empty clients"):
        Dirichlet(alpha=0.01).split(labels, None, 2000, 0)
    assert time.monotonic() - start < 30  # a bound against hanging, not a speed
    sizes = check(Dirichlet(alpha=0.01, min_size=0).split(labels, None, 2000, 0), 60_000, 2000, least=0)
    assert (sizes == 0).any()


def test_the_picture_of_a_partition_is_drawn_for_few_and_for_many_clients() -> None:
    for population in (3, 3000):
        counts = np.random.default_rng(0).integers(0, 9, (population, 10))
        figure = partition_figure(counts, "t")
        figure.savefig(io.BytesIO(), format="svg")
        assert len(figure.axes) == 2


# Batches


def data(holdout: float = 0.0) -> FederatedData:
    x = torch.arange(23.0)[:, None]
    examples = Examples(x, x.clone())
    return FederatedData(examples, examples, np.arange(23), np.array([0, 10, 10, 13, 23]), holdout)


def rows_of(batches, i: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return [
        [int(v) for v, m in zip(x[:, 0], mask, strict=True) if m] for x, mask in zip(batches.x[i], batches.mask[i], strict=True)
    ]


def test_an_epoch_uses_every_example_of_the_client_once() -> None:
    b = data().batches(np.array([0, 2]), "train", LocalSettings(batch_size=4, epochs=2), 0, 5)
    first = rows_of(b, 0)
    assert [len(r) for r in first] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*first[:3])) == sorted(chain(*first[3:])) == list(range(10))
    assert sorted(rows_of(b, 1)[0]) == [10, 11, 12]
    assert rows_of(b, 1)[2:] == [[], [], [], []]


def test_steps_are_counted_and_reshuffled_when_the_examples_run_out() -> None:
    b = data().batches(np.array([0]), "train", LocalSettings(batch_size=4, steps=5), 0, 5)
    assert [len(r) for r in rows_of(b, 0)] == [4, 4, 2, 4, 4]


def test_batches_depend_on_seed_round_and_client_and_not_on_company() -> None:
    d, local = data(), LocalSettings(batch_size=3)
    alone = rows_of(d.batches(np.array([3]), "train", local, 0, 1), 0)
    together = rows_of(d.batches(np.array([0, 2, 3]), "train", local, 0, 1), 2)
    assert alone == together
    assert alone != rows_of(d.batches(np.array([3]), "train", local, 0, 2), 0)
    assert alone != rows_of(d.batches(np.array([3]), "train", local, 1, 1), 0)


def test_held_out_examples_are_never_trained_on() -> None:
    d = data(holdout=0.3)
    assert d.evaluated_on == "test"
    for client in (0, 2, 3):
        held, kept = set(d.rows(client, "test")), set(d.rows(client, "train"))
        assert not held & kept
        assert held | kept == set(range(d.offsets[client], d.offsets[client + 1]))
    assert d.num_examples(np.array([0, 1, 2, 3]), "test").tolist() == [3, 0, 1, 3]
    assert data().evaluated_on == "train"
    assert EVALUATION_BATCH > 1


def test_a_client_without_examples_gets_an_empty_batch() -> None:
    b = data().batches(np.array([1]), "train", LocalSettings(), 0, 0)
    assert b.mask.sum() == 0


def test_data_survives_pickling_without_a_copy_of_its_arrays() -> None:
    import pickle

    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(data(0.2), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) >= 4
    again = pickle.loads(packed, buffers=buffers)
    assert torch.equal(again.x, data(0.2).x)
    assert np.array_equal(again.order, data(0.2).order)


@pytest.mark.parametrize("values", [{"epochs": 3, "steps": 2}, {"batch_size": 0}])
def test_local_work_that_disagrees_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        LocalSettings(**values)  # type: ignore[arg-type]
