"""Data sets: the published numbers, and files that are missing, broken or of another kind."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.data import sources
from fedcore.errors import SettingsError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "cache"))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Six training and four test images of one grey each, half of the files compressed."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, n in (("train", 6), ("t10k", 4)):
        images = np.full((n, 28, 28), 51)  # 0.2 of white
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n)))
    return folder


def test_digits_are_whole_balanced_and_always_split_alike() -> None:
    a, b = sources.load("digits"), sources.load("digits")
    assert len(a.x_train) + len(a.x_test) == 1797
    assert a.x_train.shape[1:] == (1, 8, 8)
    assert a.x_train.dtype == torch.float32
    assert a.y_train.dtype == torch.int64
    assert (a.x_train.min().item(), a.x_train.max().item()) == (0, 1)
    share = a.y_test.bincount() / (a.y_test.bincount() + a.y_train.bincount())
    assert ((share > 0.19) & (share <= 0.2)).all(), f"a fifth of each class is for testing, found {share}"
    assert torch.equal(a.x_train, b.x_train)
    assert torch.equal(a.y_test, b.y_test)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install scikit-learn"):
        sources.load("digits")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    s = sources.load("fashion-mnist")
    assert s.x_train.shape == (60_000, 1, 28, 28)
    assert s.x_test.shape == (10_000, 1, 28, 28)
    assert abs(float(s.x_train.mean())) < 1e-3
    assert abs(float(s.x_train.std()) - 1) < 1e-3
    assert s.y_train.bincount().tolist() == [6000] * 10


def test_fashion_mnist_is_read_from_a_folder_or_below_fedcore_data(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = sources.load("fashion-mnist", idx_folder)
    assert s.x_train.shape == (6, 1, 28, 28)
    torch.testing.assert_close(s.x_test, torch.full((4, 1, 28, 28), (0.2 - 0.2860) / 0.3530))
    assert s.y_train.tolist() == [0, 1, 2, 3, 4, 5]
    idx_folder.rename(idx_folder.parent / "fashion-mnist")
    monkeypatch.setenv("FEDCORE_DATA", str(idx_folder.parent))
    assert len(sources.load("fashion-mnist").x_train) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((6, 28, 28))))[:-20], "cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"x" * 99)[:12] + b"\xff" * 20, "cannot be read"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((6, 28, 28)))[:-1]), "found 4703 bytes, expected 4704"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((6, 28)))), "found 00000802, expected 00000803"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b""), "found , expected 00000803"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((6, 32, 32)))), "expected as many 28x28 images as labels"),
        ("train-labels-idx1-ubyte", idx(np.arange(5)), "expected as many 28x28 images as labels"),
        ("train-labels-idx1-ubyte", idx(np.arange(6) * 9), "labels up to 45"),
    ],
    ids=["no gzip", "cut gzip", "broken gzip", "cut", "dimensions", "empty", "size", "fewer labels", "classes"],
)
def test_a_broken_idx_file_is_named(idx_folder: Path, name: str, content: bytes, message: str) -> None:
    (idx_folder / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        sources.load("fashion-mnist", idx_folder)


def test_a_missing_idx_file_is_named(idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SettingsError, match=r"has no t10k-labels-idx1-ubyte"):
        sources.load("fashion-mnist", idx_folder)
    with pytest.raises(SettingsError, match="expected the IDX files"):
        sources.load("fashion-mnist", idx_folder / "nowhere")


def test_without_files_or_network_all_ways_to_the_data_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(sources, "_idx_file", lambda folder, name: None)
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    with pytest.raises(SettingsError, match="fashion-mnist; apt-get install dataset-fashion-mnist, or set data_folder"):
        sources.load("fashion-mnist")
    with pytest.raises(SettingsError, match="set data_folder to a folder of its parquet files"):
        sources.load("cifar10")


def write_parquet(file: Path, images: np.ndarray, column: str = "image") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(png := io.BytesIO(), "png")
        rows.append({"bytes": png.getvalue(), "path": f"{i}.png"})
    pq.write_table(pa.table({column: rows, "label": list(range(len(images)))}), file)


@pytest.mark.parametrize("column", ["image", "img"])
def test_cifar10_is_decoded_from_parquet_once(tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    write_parquet(tmp_path / "train-0.parquet", pixels[:2], column)
    write_parquet(tmp_path / "train-1.parquet", pixels[2:4], column)
    write_parquet(tmp_path / "test.parquet", pixels[4:], column)
    s = sources.load("cifar10", tmp_path)
    assert s.y_train.tolist() == [0, 1, 0, 1]
    mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = ((pixels[:4] / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(s.x_train.numpy(), expected, atol=1e-5)
    monkeypatch.setitem(sys.modules, "PIL", None)  # the second time nothing is left to decode
    assert torch.equal(sources.load("cifar10", tmp_path).x_test, s.x_test)


def test_a_folder_that_is_not_cifar10_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\*train\*.parquet"):
        sources.load("cifar10", tmp_path)
    write_parquet(tmp_path / "test.parquet", np.zeros((2, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(SettingsError, match=r"train\.parquet.*columns image"):
        sources.load("cifar10", tmp_path)
    write_parquet(tmp_path / "train.parquet", np.zeros((2, 32, 32, 3), dtype=np.uint8), "picture")
    with pytest.raises(SettingsError, match=r"train\.parquet.*columns image"):
        sources.load("cifar10", tmp_path)
    write_parquet(tmp_path / "train.parquet", np.zeros((2, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(SettingsError, match="16x16 pixels, expected 32x32"):
        sources.load("cifar10", tmp_path)
