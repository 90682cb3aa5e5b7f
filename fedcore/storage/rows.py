"""Rows by client: one for each client that ever took part.

Client states are in such a store, and what the server keeps of single clients
(`Round.memory`) in another.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedcore import trees
from fedcore.storage.faults import writing
from fedcore.types import Tree

ROWS = 64  # clients in a block, the unit of allocation and of checkpointing
LARGE = 1 << 15  # bytes of a row of a tensor that are not worth a copy in between
CPU = torch.device("cpu")


class StateStore:
    """Rows by client id. A client that never took part costs nothing.

    It reads as the initial row. A round writes to rows of its own, which take the place
    of the old ones at `commit`: so an interrupted round leaves no trace, and a round of
    any size stays within the cap on memory.
    """

    def __init__(
        self,
        initial: Tree,
        ram: int,
        spill: Callable[[], Path],
        device: torch.device = CPU,
    ) -> None:
        """`ram` is the cap in bytes; blocks beyond it are in mapped files.

        `spill()` is the directory of these files. `gather` brings rows to `device`.
        """
        self.initial = initial
        self.row_bytes = trees.nbytes(initial)
        self.blocks = Blocks(initial, ram, spill)
        self.row_of: dict[int, int] = {}
        # Blocks that are not in the last checkpoint as they are now.
        self.changed: set[int] = set()
        self._device = device
        # The row that this round wrote, by client.
        self._pending: dict[int, int] = {}
        # Rows that this round wrote anew; until its end they may still be read.
        self._replaced: list[int] = []
        self._free: list[int] = []

    @property
    def is_stateless(self) -> bool:
        """Whether a row is empty, so that there is nothing to keep."""
        return self.row_bytes == 0

    def get(self, client: int) -> Tree:
        """The row of one client."""
        return trees.at(self.gather([client]), 0)

    def gather(self, clients: Tensor | list[int]) -> Tree:
        """Rows stacked, [n, ...], in the order of `clients`."""
        if self.is_stateless:
            return self.initial
        places: dict[
            int, list[int]
        ] = {}  # of rows, by number of the block; -1: initial
        inside: dict[int, list[int]] = {}
        ids = _ids(clients)
        for place, client in enumerate(ids):
            row = self._pending.get(client, self.row_of.get(client))
            number, at = (-1, 0) if row is None else divmod(row, ROWS)
            places.setdefault(number, []).append(place)
            inside.setdefault(number, []).append(at)
        stacked = trees.map(lambda x: x.new_empty((len(ids), *x.shape)), self.initial)
        for number, targets in places.items():
            source, rows = self._one_block, inside[number]
            if number >= 0:
                source = self.blocks[number]
            _copy_rows(stacked, targets, source, rows)
        self.blocks.release(number for number in places if number >= 0)
        return trees.to(stacked, self._device)

    @property
    def _one_block(self) -> Tree:
        """The initial row, as a block of its own."""
        return trees.map(lambda x: x[None], self.initial)

    def put(
        self,
        clients: Tensor | list[int],
        rows: Tree,
        of: Sequence[int] | None = None,
    ) -> None:
        """New rows, stacked [n, ...], from any device.

        `of` says which of the rows are the clients'; None: they are in their order.
        They count from now on, and are kept by the next `commit`.
        """
        if self.is_stateless:
            return
        rows = trees.to(rows, CPU)
        places: dict[int, list[int]] = {}  # of new rows, by number of the block
        inside: dict[int, list[int]] = {}
        ids = _ids(clients)
        for place, client in zip(of or range(len(ids)), ids, strict=True):
            if client in self._pending:
                self._replaced.append(self._pending[client])
            row = self._pending[client] = self._take_free_row()
            places.setdefault(row // ROWS, []).append(place)
            inside.setdefault(row // ROWS, []).append(row % ROWS)
        for number, targets in inside.items():
            _copy_rows(self.blocks[number], targets, rows, places[number])
        self.blocks.release(places)

    def commit(self) -> None:
        """Keep what was written since the last `commit`."""
        for client, row in self._pending.items():
            if client in self.row_of:
                self._replaced.append(self.row_of[client])
            self.row_of[client] = row
            self.changed.add(row // ROWS)
        self._pending.clear()
        self.rollback()

    def rollback(self) -> None:
        """Forget what was written since the last `commit`."""
        self._free += [*self._pending.values(), *self._replaced]
        self._pending.clear()
        self._replaced.clear()

    def _take_free_row(self) -> int:
        if not self._free:
            number = self.blocks.add()
            self.changed.add(number)
            self._free = list(range((number + 1) * ROWS - 1, number * ROWS - 1, -1))
        return self._free.pop()

    # For the checkpoint: blocks as flat tensors, and the client of each row.

    def clients(self) -> list[int]:
        """The client of each row, -1 where there is none."""
        clients = [-1] * (max(self.row_of.values(), default=-1) + 1)
        for client, row in self.row_of.items():
            clients[row] = client
        return clients

    def in_use(self) -> range:
        """Numbers of the blocks up to the last row that a client has."""
        return range(-(-len(self.clients()) // ROWS))

    def save_blocks(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(number, flat tensors) of each block in use that has changed."""
        num_rows = len(self.clients())
        for number in sorted(self.changed & set(self.in_use())):
            flat = trees.flatten(self.blocks[number])
            end = num_rows - number * ROWS
            yield number, {path: x[:end] for path, x in flat.items()}
            self.blocks.release([number])

    def saved(self) -> None:
        """Note that the last checkpoint has the blocks that `save_blocks` gave."""
        self.changed = set(range(len(self.blocks))) - set(self.in_use())

    def load(
        self, clients: list[int], block: Callable[[int], dict[str, Tensor]]
    ) -> None:
        """Fill an empty store from a checkpoint.

        `clients` are as `clients()` gave them, `block(number)` as `save_blocks` did.
        """
        assert not self.row_of, "this store holds rows already"
        for row, client in enumerate(clients):
            if client >= 0:
                self.row_of[client] = row
        for number in range(-(-len(clients) // ROWS)):
            self.blocks.add()
            saved = trees.unflatten(block(number), self.initial)
            trees.map(
                lambda target, source: target[: len(source)].copy_(source),
                self.blocks[number],
                saved,
            )
            self.blocks.release([number])
        taken = set(self.row_of.values())
        free = set(range(len(self.blocks) * ROWS)) - taken
        self._free = sorted(free, reverse=True)


class Blocks:
    """Blocks of ROWS rows, in memory up to a cap and in mapped files beyond it."""

    def __init__(self, row: Tree, ram: int, spill: Callable[[], Path]) -> None:
        """`row` is like a row of a block; for `ram` and `spill` see StateStore."""
        self._row, self._ram, self._spill = row, ram, spill
        self._size = ROWS * trees.nbytes(row)
        self._blocks: list[Tree] = []  # leaves [ROWS, ...]
        self._maps: dict[int, list[mmap.mmap]] = {}  # by number, of those in files

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> Tree:
        return self._blocks[number]

    def add(self) -> int:
        """Add a block of zeros; its number is returned."""
        number = len(self._blocks)
        if (number + 1) * self._size <= self._ram:
            block = trees.map(_zeros, self._row)
        else:
            self._maps[number] = []
            block = trees.map(lambda x: self._mapped(number, x), self._row)
        self._blocks.append(block)
        return number

    def _mapped(self, number: int, row: Tensor) -> Tensor:
        """Zeros for ROWS rows of one leaf, in a file of their own."""
        if row.numel() == 0:
            return _zeros(row)
        pieces = self._maps[number]
        file = self._spill() / f"block-{number}-{len(pieces)}.bin"
        length = ROWS * row.numel() * row.element_size()
        with writing(file, length), file.open("wb+") as opened:
            # All room at once: a page that the disk has no room for would later end
            # the process when it is written to.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(opened.fileno(), 0, length)
            opened.truncate(length)
            pieces.append(mmap.mmap(opened.fileno(), length))
        flat = torch.frombuffer(pieces[-1], dtype=row.dtype)
        return flat.view(ROWS, *row.shape)

    def release(self, numbers: Iterable[int]) -> None:
        """Give back the memory in which mapped blocks were read and written.

        The kernel would leave it with this process for long.
        """
        for number in numbers:
            for piece in self._maps.get(number, []):
                piece.madvise(mmap.MADV_DONTNEED)


def _copy_rows(to: Tree, targets: list[int], source: Tree, rows: list[int]) -> None:
    """Copy these rows of `source` over those of `to`; each tensor [n, ...]."""
    if len(rows) == 1:
        target, row = targets[0], rows[0]
        trees.map(lambda x, new: x[target].copy_(new[row]), to, source)
        return
    into, of = torch.tensor(targets), torch.tensor(rows)

    def copy(x: Tensor, new: Tensor) -> None:
        if x.nbytes < LARGE * len(x):
            x.index_copy_(0, into, new.index_select(0, of))
            return
        for target, row in zip(targets, rows, strict=True):
            x[target].copy_(new[row])

    trees.map(copy, to, source)


def _zeros(row: Tensor) -> Tensor:
    return torch.zeros((ROWS, *row.shape), dtype=row.dtype)


def _ids(clients: Tensor | list[int]) -> list[int]:
    return clients.tolist() if isinstance(clients, Tensor) else clients
