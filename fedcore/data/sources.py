"""The bundled data sets, from where they lie: inside scikit-learn, a Debian package, a folder of your own, or the hub."""

from __future__ import annotations

import difflib
import gzip
import importlib.util
import io
import math
import os
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


class Pixels(NamedTuple):
    """How pixels in [0, 1] became inputs: x = (pixel - mean) / deviation, by channel."""

    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)

    def inputs(self, pixels: Tensor) -> Tensor:
        """[..., C, H, W] in [0, 1] to what a model takes."""
        mean, deviation = self._like(pixels)
        return (pixels - mean) / deviation

    def of(self, inputs: Tensor) -> Tensor:
        """The inverse of `inputs`."""
        mean, deviation = self._like(inputs)
        return inputs * deviation + mean

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = (
            torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in self
        )
        return mean, deviation


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
    """A data set by name; `folder` is where its files are, if not in a usual place. Raises SettingsError."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1)
        raise SettingsError(
            f'"{name}" is no bundled data set; '
            + (f'did you mean "{near[0]}"?' if near else f"known: {', '.join(SOURCES)}")
        )
    return SOURCES[name](folder)


def digits(folder: Path | None = None) -> Source:
    """1 797 handwritten digits, 8x8 pixels in [0, 1], from scikit-learn (Alpaydin and Kaynak, 1998); every fifth is for testing."""
    found = importlib.util.find_spec(
        "sklearn"
    )  # located, not imported: that alone would take a second
    if found is None or not found.submodule_search_locations:
        raise SettingsError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        )
    file = (
        Path(found.submodule_search_locations[0])
        / "datasets"
        / "data"
        / "digits.csv.gz"
    )
    try:
        table = np.loadtxt(
            io.BytesIO(gzip.decompress(file.read_bytes())),
            delimiter=",",
            dtype=np.float32,
        )
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise SettingsError(
            f"{file}: {e}; expected the digits that scikit-learn carries, install it again"
        ) from e
    x = torch.from_numpy(table[:, :64] / 16).view(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, 64].astype(np.int64))
    order = rng(0, "digits").permutation(len(y))
    held = np.zeros(len(y), dtype=bool)
    for label in range(
        10
    ):  # a fifth of every class, so that the test set is balanced like the data
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
    """60 000 + 10 000 grey images of clothing, 28x28 (Xiao, Rasul, Vollgraf, 2017), normalised by training mean and deviation."""
    own = os.environ.get("FEDCORE_DATA")
    places = [folder] if folder else [Path(own) / "fashion-mnist"] if own else []
    places += [Path("/usr/share/datasets/fashion-mnist")] if folder is None else []
    for place in places:
        if _idx_file(place, IDX["x_train"]):
            arrays = {part: _read_idx(place, name) for part, name in IDX.items()}
            _check_images(place, arrays)
            break
    else:
        if folder is not None:
            raise SettingsError(
                f"data_folder = {folder}: expected the IDX files {', '.join(IDX.values())} there, plain or .gz"
            )
        looked = ", ".join(str(place) for place in places)
        arrays = _from_hub(
            "zalando-datasets/fashion_mnist",
            "image",
            "label",
            f"no IDX files in {looked}; apt-get install dataset-fashion-mnist, or set data_folder to a folder of them",
        )
    pixels = Pixels((0.2860,), (0.3530,))
    x = {
        part: pixels.inputs(torch.from_numpy(arrays[part]).float().div_(255)[:, None])
        for part in ("x_train", "x_test")
    }
    y = {
        part: torch.from_numpy(arrays[part].astype(np.int64))
        for part in ("y_train", "y_test")
    }
    return Source(
        x["x_train"], y["y_train"], x["x_test"], y["y_test"], 10, pixels=pixels
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    return next(
        (f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None
    )


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0x0000080d with d dimensions, d sizes, then the values."""
    file = _idx_file(folder, name)
    if file is None:
        raise SettingsError(
            f"{folder} has no {name} or {name}.gz: expected all of {', '.join(IDX.values())}"
        )
    try:
        content = (
            gzip.decompress(file.read_bytes())
            if file.suffix == ".gz"
            else file.read_bytes()
        )
    except (OSError, EOFError, zlib.error) as e:
        raise SettingsError(f"{file} cannot be read ({e}): fetch it again") from e
    dims = int(
        name[name.index("idx") + 3]
    )  # a file's name says how many dimensions it has
    start = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < start:
        raise SettingsError(
            f"{file} is no IDX file of {dims} dimensions: found {content[:4].hex()}, expected 0000080{dims}"
        )
    sizes = [int(size) for size in np.frombuffer(content, ">u4", dims, 4)]
    if len(content) - start != math.prod(sizes):
        raise SettingsError(
            f"{file}: found {len(content) - start} bytes, expected {math.prod(sizes)} for sizes {sizes}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()


def _check_images(place: Path, arrays: dict[str, np.ndarray]) -> None:
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.shape != (len(y), 28, 28) or len(y) == 0 or y.max() > 9:
            raise SettingsError(
                f"{place}: found {part} images {x.shape} and {len(y)} labels up to {y.max(initial=0)}, expected as many 28x28 "
                "images as labels, in 10 classes: are these files of one data set?"
            )


def cifar10(folder: Path | None = None) -> Source:
    """50 000 + 10 000 colour images, 32x32 (Krizhevsky, 2009), from parquet files as on Hugging Face, normalised per channel."""
    own = os.environ.get("FEDCORE_DATA")
    place = folder or (Path(own) if own else None)
    files = (
        {part: sorted(place.glob(f"*{part}*.parquet")) for part in ("train", "test")}
        if place
        else {}
    )
    if files and all(files.values()):
        arrays: dict[str, np.ndarray] = {}
        for part, found in files.items():
            arrays[f"x_{part}"], arrays[f"y_{part}"] = _read_parquet(found)
    elif folder is not None:
        raise SettingsError(
            f"data_folder = {folder}: expected *train*.parquet and *test*.parquet there, with columns image (or img) and label"
        )
    else:
        arrays = _from_hub(
            "uoft-cs/cifar10",
            "img",
            "label",
            "set data_folder to a folder of its parquet files",
        )
    pixels = Pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    x = {
        p: pixels.inputs(
            torch.from_numpy(arrays[p])
            .permute(0, 3, 1, 2)
            .contiguous()
            .float()
            .div_(255)
        )
        for p in ("x_train", "x_test")
    }
    y = {p: torch.from_numpy(arrays[p].astype(np.int64)) for p in ("y_train", "y_test")}
    return Source(
        x["x_train"], y["y_train"], x["x_test"], y["y_test"], 10, pixels=pixels
    )


def _read_parquet(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 32, 32, 3] uint8, labels [n]), decoded once and kept in the cache."""
    key = cache.key_of(
        "images",
        [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
    )
    known = cache.load(key)
    if known is None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        try:
            # The hub's own files say "img", most mirrors "image".
            names = pq.read_schema(files[0]).names
            column = "img" if "img" in names else "image"
            if not {column, "label"} <= set(names):
                raise ValueError(f"found columns {', '.join(names)}")
            table = pq.read_table(files, columns=[column, "label"]).to_pydict()
            images = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(i["bytes"])).convert("RGB"))
                    for i in table[column]
                ]
            )
            if images.shape[1:] != (32, 32, 3):
                raise ValueError(
                    f"found images of {images.shape[1]}x{images.shape[2]} pixels, expected 32x32"
                )
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as e:
            raise SettingsError(
                f"{files[0]}: {e}; expected parquet with columns image {{bytes, path}} and label"
            ) from e
        known = {"x": images, "y": np.array(table["label"])}
        cache.save(key, **known)
    return known["x"], known["y"]


def _from_hub(
    name: str, image: str, label: str, otherwise: str
) -> dict[str, np.ndarray]:
    """Training and test rows as x_train, y_train, x_test, y_test, decoded once and kept in the cache."""
    key = cache.key_of("hub", name)
    if (known := cache.load(key)) is not None:
        return known
    import datasets

    arrays: dict[str, np.ndarray] = {}
    try:
        for part in ("train", "test"):
            rows: Any = datasets.load_dataset(name, split=part).with_format("numpy")
            arrays[f"x_{part}"], arrays[f"y_{part}"] = (
                np.stack(list(rows[image])),
                np.asarray(rows[label]),
            )
    except (
        Exception
    ) as e:  # whatever the hub's client raises, the user needs to know the other ways
        raise SettingsError(
            f"{name} could not be had from the hub ({type(e).__name__}): {otherwise}"
        ) from e
    cache.save(key, **arrays)
    return arrays


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
}
