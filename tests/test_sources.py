"""Data sets: the published numbers, and files that are missing, broken or of another
kind."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
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
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Six training images, black and 0.2 of white in turn, and four test images of
    0.2 of white, compressed."""
    folder = tmp_path / "idx"
    folder.mkdir()
    train, test = np.full((6, 28, 28), 51), np.full((4, 28, 28), 51)
    train[::2] = 0
    (folder / "train-images-idx3-ubyte").write_bytes(idx(train))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(6)))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(test)))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(4))))
    return folder


def test_an_unknown_source_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match='did you mean "digits"'):
        sources.load("digit")


def test_digits_come_without_importing_scikit_learn() -> None:
    code = (
        "import sys; from fedcore.data import sources; sources.digits(); "
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_digits_are_whole_balanced_and_always_split_alike() -> None:
    a, b = sources.load("digits"), sources.load("digits")
    assert len(a.x_train) + len(a.x_test) == 1797
    assert a.x_train.shape[1:] == (1, 8, 8)
    assert a.x_train.dtype == torch.float32
    assert a.y_train.dtype == torch.int64
    assert (a.x_train.min().item(), a.x_train.max().item()) == (0, 1)
    share = a.y_test.bincount() / (a.y_test.bincount() + a.y_train.bincount())
    assert a.y_test.bincount().tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert ((share > 0.19) & (share <= 0.2)).all(), (
        f"a fifth of each class is for testing, found {share}"
    )
    assert torch.equal(a.x_train, b.x_train)
    assert torch.equal(a.y_test, b.y_test)


def test_digits_without_scikit_learn_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install scikit-learn"):
        sources.load("digits")


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
def test_fashion_mnist_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    s = sources.load("fashion-mnist")
    assert s.x_train.shape == (60_000, 1, 28, 28)
    assert s.x_test.shape == (10_000, 1, 28, 28)
    assert abs(float(s.x_train.mean())) < 1e-3
    assert abs(float(s.x_train.std()) - 1) < 1e-3
    assert s.y_train.bincount().tolist() == [6000] * 10


def test_fashion_mnist_is_read_plain_or_compressed_from_a_folder_or_below_fedcore_data(
    idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sources.load("fashion-mnist", idx_folder)
    assert s.x_train.shape == (6, 1, 28, 28)
    torch.testing.assert_close(
        s.x_train[::2], torch.full((3, 1, 28, 28), -0.2860 / 0.3530)
    )
    torch.testing.assert_close(
        s.x_train[1::2], torch.full((3, 1, 28, 28), (0.2 - 0.2860) / 0.3530)
    )
    torch.testing.assert_close(
        s.x_test, torch.full((4, 1, 28, 28), (0.2 - 0.2860) / 0.3530)
    )
    assert s.y_train.tolist() == [0, 1, 2, 3, 4, 5]
    assert s.y_test.tolist() == [0, 1, 2, 3]
    idx_folder.rename(idx_folder.parent / "fashion-mnist")
    monkeypatch.setenv("FEDCORE_DATA", str(idx_folder.parent))
    assert len(sources.load("fashion-mnist").x_train) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "cannot be read"),
        ("train-labels-idx1-ubyte.gz", b"no gzip", "cannot be read"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((6, 28, 28))))[:-20],
            "cannot be read",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"x" * 99)[:12] + b"\xff" * 20,
            "cannot be read",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((6, 28, 28)))[:-1]),
            "found 4703 bytes, expected 4704",
        ),
        (
            "train-labels-idx1-ubyte",
            idx(np.arange(6))[:-3],
            "found 3 bytes, expected 6",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((6, 28)))),
            "found 00000802, expected 00000803",
        ),
        ("train-labels-idx1-ubyte", b"hello", "found 68656c6c, expected 00000801"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b""), "found , expected 00000803"),
    ],
    ids=[
        "no gzip",
        "labels no gzip",
        "cut gzip",
        "broken gzip",
        "cut",
        "labels cut",
        "dimensions",
        "no idx",
        "empty",
    ],
)
def test_a_broken_idx_file_is_named(
    idx_folder: Path, name: str, content: bytes, message: str
) -> None:
    (idx_folder / name).write_bytes(content)
    with pytest.raises(SettingsError, match=f"{name}.*{message}"):
        sources.load("fashion-mnist", idx_folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((6, 32, 32)))),
            "expected as many 28x28 images as labels",
        ),
        (
            "train-labels-idx1-ubyte",
            idx(np.arange(5)),
            "expected as many 28x28 images as labels",
        ),
        ("train-labels-idx1-ubyte", idx(np.arange(6) * 9), "labels up to 45"),
    ],
    ids=["size", "fewer labels", "classes"],
)
def test_idx_files_that_do_not_fit_together_are_refused(
    idx_folder: Path, name: str, content: bytes, message: str
) -> None:
    (idx_folder / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        sources.load("fashion-mnist", idx_folder)


def test_a_missing_idx_file_is_named(idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SettingsError, match="has no t10k-labels-idx1-ubyte"):
        sources.load("fashion-mnist", idx_folder)
    (idx_folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(SettingsError, match="has no train-labels-idx1-ubyte"):
        sources.load("fashion-mnist", idx_folder)


def test_a_folder_without_idx_files_says_which_are_expected(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            SettingsError, match="expected the IDX files train-images-idx3-ubyte"
        ):
            sources.load("fashion-mnist", folder)


def test_without_files_or_network_all_ways_to_the_data_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(sources, "_idx_file", lambda folder, name: None)
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    with pytest.raises(
        SettingsError,
        match=r"fashion-mnist: apt-get install dataset-fashion-mnist \(Debian, "
        r"Ubuntu\), or --set data_folder=DIR .* or run once with a network",
    ):
        sources.load("fashion-mnist")
    with pytest.raises(
        SettingsError, match=r"data_folder=DIR .*with a folder of its parquet files"
    ):
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
def test_cifar10_is_decoded_from_parquet_once(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    write_parquet(tmp_path / "cifar10-train-0.parquet", pixels[:2], column)
    write_parquet(tmp_path / "cifar10-train-1.parquet", pixels[2:4], column)
    write_parquet(tmp_path / "cifar10-test.parquet", pixels[4:], column)
    mean, deviation = (
        np.array([0.4914, 0.4822, 0.4465]),
        np.array([0.2470, 0.2435, 0.2616]),
    )
    expected = ((pixels / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    s = sources.load("cifar10", tmp_path)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "PIL", None)  # the second time nothing is left to decode
        again = sources.load("cifar10", tmp_path)
    for loaded in (s, again):
        assert loaded.y_train.tolist() == [0, 1, 0, 1]
        assert loaded.y_test.tolist() == [0, 1, 2]
        np.testing.assert_allclose(loaded.x_train.numpy(), expected[:4], atol=1e-5)
        np.testing.assert_allclose(loaded.x_test.numpy(), expected[4:], atol=1e-5)
    assert torch.equal(s.x_train, again.x_train)
    assert torch.equal(s.x_test, again.x_test)
    (tmp_path / "cifar10-train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(SettingsError, match=r"train-0\.parquet.*expected parquet"):
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


def test_a_folder_that_is_not_cifar10_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\*train\*.parquet"):
        sources.load("cifar10", tmp_path)
    write_parquet(tmp_path / "test.parquet", np.zeros((2, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(SettingsError, match=r"train\.parquet.*columns image"):
        sources.load("cifar10", tmp_path)
    write_parquet(
        tmp_path / "train.parquet", np.zeros((2, 32, 32, 3), dtype=np.uint8), "picture"
    )
    with pytest.raises(SettingsError, match=r"train\.parquet.*columns image"):
        sources.load("cifar10", tmp_path)
    write_parquet(tmp_path / "train.parquet", np.zeros((2, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(SettingsError, match="16x16 pixels, expected 32x32"):
        sources.load("cifar10", tmp_path)
