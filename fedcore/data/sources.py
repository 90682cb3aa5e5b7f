"""The bundled data sets, from the places where they lie.

That is inside scikit-learn, a Debian package, a folder of the user's, or the hub.
"""

from __future__ import annotations

import difflib
import gzip
import http.client
import importlib.util
import io
import math
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.rng import rng
from fedcore.storage import cache

HUB_SECONDS = 5.0  # for the hub to answer

Arrays = dict[str, np.ndarray]
"""Images and labels: x_train, y_train, x_test, y_test, as they are on disk."""


class Pixels(NamedTuple):
    """The scale of inputs by channel: x = (pixel - mean) / deviation.

    Pixels are in [0, 1].
    """

    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)

    def inputs(self, pixels: Tensor) -> Tensor:
        """The model's inputs for pixels in [0, 1], [..., C, H, W].

        >>> Pixels((0.5,), (0.25,)).inputs(torch.ones(1, 1, 1))
        tensor([[[2.]]])
        """
        mean, deviation = self._like(pixels)
        return (pixels - mean) / deviation

    def of(self, inputs: Tensor) -> Tensor:
        """The inverse of `inputs`."""
        mean, deviation = self._like(inputs)
        return inputs * deviation + mean

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device)
        deviation = torch.tensor(self.deviation, dtype=x.dtype, device=x.device)
        return mean[:, None, None], deviation[:, None, None]


class Source(NamedTuple):
    """A data set as published: training and test rows."""

    x_train: Tensor  # [n, C, H, W] float32, scaled as the loader says
    y_train: Tensor  # [n] int64
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    groups: np.ndarray | None = None  # [n] the natural client of each training row
    pixels: Pixels = Pixels()  # how the rows were scaled


def load(name: str, folder: Path | None = None) -> Source:
    """A data set by name; `folder` holds its files, if not in a usual place.

    Raises SettingsError for a name that is unknown, and files that are missing or no
    such data.

    >>> load("digits").x_train.shape
    torch.Size([1442, 1, 8, 8])
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1)
        advice = f"known: {', '.join(SOURCES)}"
        if near:
            advice = f'did you mean "{near[0]}"?'
        raise SettingsError(f'"{name}" is no bundled data set; {advice}')
    return SOURCES[name](folder)


def digits(folder: Path | None = None) -> Source:
    """1 797 handwritten digits, 8x8 pixels in [0, 1], from scikit-learn.

    Alpaydin and Kaynak, 1998. Every fifth is for testing.
    """
    # Located, not imported: that alone would take a second.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise SettingsError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        )
    place = Path(package.submodule_search_locations[0])
    file = place / "datasets" / "data" / "digits.csv.gz"
    try:
        text = io.BytesIO(gzip.decompress(file.read_bytes()))
        table = np.loadtxt(text, delimiter=",", dtype=np.float32, ndmin=2)
        if table.shape[1] != 65 or not np.isin(table[:, 64], range(10)).all():
            raise ValueError(f"found {table.shape[1]} columns, or labels beyond 9")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise SettingsError(
            f"{file}: {error}; expected the digits that scikit-learn carries, "
            "install it again"
        ) from error
    x = torch.from_numpy(table[:, :64] / 16).view(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, 64].astype(np.int64))
    order = rng(0, "digits").permutation(len(y))
    held = np.zeros(len(y), dtype=bool)
    for label in range(10):
        # A fifth of every class, so that the test set is balanced like the data.
        rows = order[y.numpy()[order] == label]
        held[rows[: len(rows) // 5]] = True
    test = torch.from_numpy(held)
    return Source(x[~test], y[~test], x[test], y[test], 10)


IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def fashion_mnist(folder: Path | None = None) -> Source:
    """60 000 + 10 000 grey images of clothing, 28x28 (Xiao, Rasul, Vollgraf, 2017).

    Normalised by training mean and deviation.
    """
    places = _places_of_fashion_mnist() if folder is None else [folder]
    for place in places:
        if _idx_file(place, IDX["x_train"]):
            arrays = {part: _read_idx(place, name) for part, name in IDX.items()}
            _check_images(place, arrays)
            break
    else:
        if folder is not None:
            raise SettingsError(
                f"data_folder = {folder}: expected the IDX files "
                f"{', '.join(IDX.values())} there, plain or .gz"
            )
        arrays = _from_hub(
            "zalando-datasets/fashion_mnist",
            "image",
            "label",
            f"its IDX files are not in {', '.join(map(str, places))}: apt-get install "
            "dataset-fashion-mnist (Debian, Ubuntu), or --set data_folder=DIR with a "
            "folder of them, or run once with a network, which downloads them",
        )
    pixels = Pixels((0.2860,), (0.3530,))

    def scaled(images: np.ndarray) -> Tensor:
        return pixels.inputs(torch.from_numpy(images).float().div_(255)[:, None])

    return _source(arrays, scaled, pixels)


def _places_of_fashion_mnist() -> list[Path]:
    """Folders that may hold the files, the first that does being taken."""
    places = [Path("/usr/share/datasets/fashion-mnist")]
    folder = os.environ.get("FEDCORE_DATA")
    if folder:
        places.insert(0, Path(folder) / "fashion-mnist")
    return places


def _source(
    arrays: Arrays, scaled: Callable[[np.ndarray], Tensor], pixels: Pixels
) -> Source:
    """Images in ten classes, with `scaled` pixels."""
    return Source(
        scaled(arrays["x_train"]),
        torch.from_numpy(arrays["y_train"].astype(np.int64)),
        scaled(arrays["x_test"]),
        torch.from_numpy(arrays["y_test"].astype(np.int64)),
        10,
        pixels=pixels,
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    return None


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of an IDX file of unsigned bytes.

    Its bytes are the magic number 0x0000080d with d dimensions, d sizes, then the
    values.
    """
    file = _idx_file(folder, name)
    if file is None:
        raise SettingsError(
            f"{folder} has no {name} or {name}.gz: "
            f"expected all of {', '.join(IDX.values())}"
        )
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(
            f"{file} cannot be read ({error}): fetch it again"
        ) from error
    # A file's name says how many dimensions it has.
    dims = int(name[name.index("idx") + 3])
    start = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < start:
        raise SettingsError(
            f"{file} is no IDX file of {dims} dimensions: found {content[:4].hex()}, "
            f"expected 0000080{dims}"
        )
    sizes = [int(size) for size in np.frombuffer(content, ">u4", dims, 4)]
    if len(content) - start != math.prod(sizes):
        raise SettingsError(
            f"{file}: found {len(content) - start} bytes, expected "
            f"{math.prod(sizes)} for sizes {sizes}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()


def _check_images(place: Path, arrays: Arrays) -> None:
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.shape != (len(y), 28, 28) or len(y) == 0 or y.max() > 9:
            raise SettingsError(
                f"{place}: found {part} images {x.shape} and {len(y)} labels up to "
                f"{y.max(initial=0)}, expected as many 28x28 images as labels, in 10 "
                "classes: are these files of one data set?"
            )


def cifar10(folder: Path | None = None) -> Source:
    """50 000 + 10 000 colour images, 32x32 (Krizhevsky, 2009).

    From parquet files as on Hugging Face, normalised per channel.
    """
    place = folder or os.environ.get("FEDCORE_DATA")
    arrays = _parquet_arrays(Path(place)) if place else None
    if arrays is None and folder is not None:
        raise SettingsError(
            f"data_folder = {folder}: expected *train*.parquet and *test*.parquet "
            "there, with columns image (or img) and label"
        )
    if arrays is None:
        arrays = _from_hub(
            "uoft-cs/cifar10",
            "img",
            "label",
            "--set data_folder=DIR (or FEDCORE_DATA=DIR) with a folder of its parquet "
            "files, or run once with a network, which downloads them",
        )
    pixels = Pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    def scaled(images: np.ndarray) -> Tensor:
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return pixels.inputs(channels_first.float().div_(255))

    return _source(arrays, scaled, pixels)


def _parquet_arrays(place: Path) -> Arrays | None:
    """Training and test rows of a folder; None where one of the two is missing."""
    arrays: Arrays = {}
    for part in ("train", "test"):
        files = sorted(place.glob(f"*{part}*.parquet"))
        if not files:
            return None
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _read_parquet(files)
    return arrays


def _read_parquet(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 32, 32, 3] uint8, labels [n]), decoded once and kept in the cache."""
    stats = []
    for file in files:
        status = file.stat()
        stats.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    key = cache.key_of("images", stats)
    arrays = cache.load(key)
    if arrays is None:
        parts = [_decoded(file) for file in files]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        arrays = {"x": images, "y": labels}
        cache.save(key, **arrays)
    return arrays["x"], arrays["y"]


def _decoded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 32, 32, 3] uint8, labels [n]) of one parquet file.

    Raises SettingsError with the file, and the row, that is no such thing.
    """
    import pyarrow.parquet as pq
    from PIL import Image

    place, decoded, labels = str(file), [], []
    try:
        names = pq.read_schema(file).names
        # The hub's own files say "img", most mirrors "image".
        column = "img" if "img" in names else "image"
        if not {column, "label"} <= set(names):
            raise ValueError(f"found columns {', '.join(names)}")
        table = pq.read_table(file, columns=[column, "label"]).to_pydict()
        for number, row in enumerate(table[column]):
            place = f"{file}, row {number}"
            label = table["label"][number]
            if not isinstance(label, int) or not 0 <= label <= 9:
                raise ValueError(f"found label {label!r}, expected 0 to 9")
            image = np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
            if image.shape != (32, 32, 3):
                raise ValueError(
                    f"found an image of {image.shape[0]}x{image.shape[1]} pixels, "
                    "expected 32x32"
                )
            decoded.append(image)
            labels.append(label)
        if not decoded:
            raise ValueError("found no rows")
    except Exception as error:
        # Damaged bytes bring about whatever pyarrow and Pillow raise.
        text = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"{place}: {text or type(error).__name__}; expected parquet with columns "
            "image {bytes, path} and label"
        ) from error
    return np.stack(decoded), np.array(labels)


def _from_hub(name: str, image: str, label: str, otherwise: str) -> Arrays:
    """Training and test rows of a data set on the hub, `image` and `label` its columns.

    Decoded once and kept in the cache. `otherwise` is the advice for a user whom the
    hub does not serve.
    """
    key = cache.key_of("hub", name)
    cached = cache.load(key)
    if cached is not None:
        return cached
    reason = unreachable()
    if reason is not None:
        raise SettingsError(f"{name} is not here, and {reason}: {otherwise}")
    import datasets

    arrays: Arrays = {}
    try:
        for part in ("train", "test"):
            rows: Any = datasets.load_dataset(name, split=part).with_format("numpy")
            arrays[f"x_{part}"] = np.stack(list(rows[image]))
            arrays[f"y_{part}"] = np.asarray(rows[label])
    except Exception as error:
        # Whatever the hub's client raises, the user needs to know the other ways.
        raise SettingsError(
            f"{name} could not be had from the hub ({type(error).__name__}): "
            f"{otherwise}"
        ) from error
    cache.save(key, **arrays)
    return arrays


def unreachable() -> str | None:
    """Why the hub cannot be asked, found in HUB_SECONDS; None where it can.

    Its own client tries again and again for most of a minute. With HF_HUB_OFFLINE set
    it looks in its cache and nowhere else, at once.
    """
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return None
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(hub, timeout=HUB_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"{hub} cannot be reached ({reason})"


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
}
