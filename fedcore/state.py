"""One row for each client that ever took part, in memory up to a cap and in mapped files beyond it.

What clients keep between rounds is in such a store, and what the server keeps of each of them (`Round.memory`) in another.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Tree

ROWS = 64  # clients in a block, the unit of allocation and of checkpointing
CPU = torch.device("cpu")


class StateStore:
    """Rows by client id. A client that never took part costs nothing and reads as the initial row.

    Writes of a round are held back until `commit`, so that an interrupted round leaves no trace.
    """

    def __init__(self, initial: Tree, ram: int, spill: Callable[[], Path], device: torch.device = CPU) -> None:
        """`ram` is the cap in bytes, `spill()` the directory of the mapped files beyond it; `gather` brings rows to `device`."""
        self.initial = initial
        self.row_bytes = trees.nbytes(initial)
        self.blocks: list[Tree] = []  # leaves [ROWS, ...]
        self.row_of: dict[int, int] = {}
        self.changed: set[int] = set()  # blocks written since `saved`
        self._ram, self._spill, self._device = ram, spill, device
        self._maps: dict[int, list[mmap.mmap]] = {}  # of the blocks in files
        self._pending: dict[int, Tree] = {}

    @property
    def stateless(self) -> bool:
        return self.row_bytes == 0

    def get(self, client: int) -> Tree:
        """The row of one client, on the CPU; not to be written to."""
        if client in self._pending:
            return self._pending[client]
        row = self.row_of.get(client)
        return self.initial if row is None else trees.at(self.blocks[row // ROWS], row % ROWS)

    def gather(self, clients: Tensor | list[int]) -> Tree:
        """Rows stacked, [n, ...]."""
        ids = clients.tolist() if isinstance(clients, Tensor) else clients
        return self.initial if self.stateless else trees.to(trees.stack([self.get(i) for i in ids]), self._device)

    def put(self, clients: Tensor | list[int], rows: Tree) -> None:
        """New rows, stacked [n, ...], from any device; they count from now on, and are kept by the next `commit`."""
        if self.stateless:
            return
        rows = trees.to(rows, CPU)
        for i, client in enumerate(clients.tolist() if isinstance(clients, Tensor) else clients):
            self._pending[client] = trees.at(rows, i)

    def commit(self) -> None:
        for client, state in self._pending.items():
            row = self.row_of.setdefault(client, len(self.row_of))
            if row // ROWS == len(self.blocks):
                self.blocks.append(self._allocate())
            self.changed.add(row // ROWS)
            trees.map(lambda block, new, at=row % ROWS: block[at].copy_(new), self.blocks[row // ROWS], state)
        self.rollback()

    def rollback(self) -> None:
        self._pending.clear()
        self._release(self._maps)

    def _allocate(self) -> Tree:
        number, size = len(self.blocks), ROWS * self.row_bytes
        if (number + 1) * size <= self._ram:
            return trees.map(lambda x: torch.empty((ROWS, *x.shape), dtype=x.dtype), self.initial)
        self._maps[number] = []

        def mapped(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((ROWS, *x.shape), dtype=x.dtype)
            length = ROWS * x.numel() * x.element_size()
            with (self._spill() / f"block-{number}-{len(self._maps[number])}.bin").open("wb+") as file:
                file.truncate(length)
                self._maps[number].append(mmap.mmap(file.fileno(), length))
            return torch.frombuffer(self._maps[number][-1], dtype=x.dtype).view(ROWS, *x.shape)

        return trees.map(mapped, self.initial)

    def _release(self, numbers: Iterable[int]) -> None:
        """Give back the memory in which mapped blocks were read and written: the kernel would leave it with us for long."""
        for number in numbers:
            for piece in self._maps.get(number, []):
                piece.madvise(mmap.MADV_DONTNEED)

    # For the checkpoint: blocks as flat tensors, and which client is in which row.

    def save_blocks(self, numbers: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number in sorted(numbers):
            used = min(ROWS, len(self.row_of) - number * ROWS)
            yield number, {path: x[:used] for path, x in trees.flatten(self.blocks[number]).items()}
            self._release([number])

    def load(self, clients: list[int], block: Callable[[int], dict[str, Tensor]]) -> None:
        """`clients` in row order, and `block(number)` as `save_blocks` gave it."""
        self.row_of = {client: row for row, client in enumerate(clients)}
        self.blocks, self.changed = [], set()
        for number in range(-(-len(clients) // ROWS)):
            self.blocks.append(self._allocate())
            saved = trees.unflatten(block(number), self.initial)
            trees.map(lambda target, source: target[: len(source)].copy_(source), self.blocks[number], saved)
            self._release([number])
