"""The messages of a round as rows of numbers, in memory or in a file.

A rule looks at all rows at once, so they have to be somewhere: below a cap in memory,
beyond it in a file that is written a row at a time and read a block of columns at a
time. Memory then does not grow with the number of columns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from fedcore.storage.faults import writing

BLOCK_COLUMNS = 2**16
BLOCK_VALUES = 2**24  # 64 MB of float32: blocks of many rows have fewer columns


class Rows:
    """One row of `dimension` numbers for each client that arrived, in order of id.

    `clients` are those expected, ascending. Rows that need more than `memory` bytes
    are in a file of `folder()` that has no name, so that it is gone when it is closed,
    and when the process is killed.

    >>> rows = Rows(torch.tensor([2, 5, 7]), 2, torch.float32, 1000, Path.cwd)
    >>> rows.put(torch.tensor([7, 2]), [torch.tensor([[7.0, 7.5], [2.0, 2.5]])])
    >>> rows.clients, next(rows.blocks())
    (tensor([2, 7]), tensor([[2.0000, 2.5000],
            [7.0000, 7.5000]]))
    """

    def __init__(
        self,
        clients: Tensor,
        dimension: int,
        dtype: torch.dtype,
        memory: int,
        folder: Callable[[], Path],
    ) -> None:
        self._expected = clients.cpu()
        self._arrived = torch.zeros(len(clients), dtype=torch.bool)
        self.d, self.dtype = dimension, dtype
        self._matrix: Tensor | None = None
        self._file: _RowFile | None = None
        size = len(clients) * dimension * dtype.itemsize
        if size <= memory:
            self._matrix = torch.empty((len(clients), dimension), dtype=dtype)
        else:
            self._file = _RowFile(folder(), len(clients), dimension, dtype)

    @classmethod
    def of(cls, matrix: Tensor) -> Rows:
        """The rows of a matrix [n, d] of clients 0 to n - 1. It is not copied."""
        n, d = matrix.shape
        rows = cls(torch.arange(n), 0, matrix.dtype, 0, Path.cwd)
        rows.d, rows._matrix = d, matrix.cpu()
        rows._arrived[:] = True
        return rows

    @property
    def clients(self) -> Tensor:
        """The clients that arrived, ascending."""
        return self._expected[self._arrived]

    @property
    def n(self) -> int:
        """The number of clients that arrived."""
        return int(self._arrived.sum())

    @property
    def is_in_file(self) -> bool:
        """Whether the rows are in a file."""
        return self._file is not None

    def put(self, clients: Tensor, rows: list[Tensor]) -> None:
        """Add the rows of clients, as leaves [k, ...] that together have d columns."""
        clients = clients.cpu()
        places = torch.searchsorted(self._expected, clients)
        places = places.clamp_max(len(self._expected) - 1)
        assert torch.equal(self._expected[places], clients), (
            f"rows of clients {clients.tolist()}, which are not all expected"
        )
        assert not self._arrived[places].any(), "a client has a row already"
        # An index of several rows would make a copy of all of them.
        for k, place in enumerate(places.tolist()):
            row = torch.cat([leaf[k].reshape(-1) for leaf in rows])
            assert len(row) == self.d, f"{len(row)} columns, expected {self.d}"
            if self._matrix is not None:
                self._matrix[place] = row
            else:
                cast(_RowFile, self._file).write(place, row.cpu().to(self.dtype))
            self._arrived[place] = True

    def blocks(self, width: int = BLOCK_COLUMNS) -> Iterator[Tensor]:
        """The rows that arrived, [n, up to width], from the first column to the last.

        A block may be a view: it is read, and not changed.
        """
        places = torch.nonzero(self._arrived).flatten()
        width = max(1, min(width, BLOCK_VALUES // max(len(places), 1)))
        for start in range(0, self.d, width):
            stop = min(start + width, self.d)
            if self._file is not None:
                yield self._file.read(places.tolist(), start, stop)
            elif len(places) == len(self._expected):
                yield cast(Tensor, self._matrix)[:, start:stop]
            else:
                yield cast(Tensor, self._matrix)[places, start:stop]

    def close(self) -> None:
        """Give the memory, or the file, back."""
        self._matrix = None
        if self._file is not None:
            self._file.close()


class _RowFile:
    """A matrix in a file, read and written by plain calls.

    A mapped file would do as well, but its pages count as memory of this process until
    the kernel takes them back, and a disk that fills up would end the process.
    """

    def __init__(self, folder: Path, n: int, d: int, dtype: torch.dtype) -> None:
        self._d, self._dtype = d, dtype
        self._name = folder / "rows of a round"
        self._size = n * d * dtype.itemsize
        with writing(self._name, self._size):
            folder.mkdir(parents=True, exist_ok=True)
            opened = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self._file = cast(BinaryIO, opened)
            # All room at once: a disk that is too small is found out before a round
            # of training is on it.
            if self._size and hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._file.fileno(), 0, self._size)

    def write(self, place: int, row: Tensor) -> None:
        """Write the row of number `place`."""
        rest = memoryview(row.contiguous().view(torch.uint8).numpy().tobytes())
        with writing(self._name, self._size):
            self._file.seek(place * len(rest))
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, places: list[int], start: int, stop: int) -> Tensor:
        """Columns from `start` to `stop` of some rows."""
        size = self._dtype.itemsize
        buffer = np.empty((len(places), (stop - start) * size), dtype=np.uint8)
        for number, place in enumerate(places):
            self._file.seek((place * self._d + start) * size)
            rest = memoryview(buffer[number])
            while rest:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                assert count, "the file of rows ended early"
                rest = rest[count:]
        return torch.from_numpy(buffer).view(self._dtype)

    def close(self) -> None:
        self._file.close()
