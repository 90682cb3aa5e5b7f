"""Client state between rounds: one row a client that ever took part, in memory up to a cap and in mapped files beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fedcore import trees
from fedcore.types import Tree

ROWS = 64  # clients in a block, the unit of allocation and of checkpointing


class StateStore:
    """States by client id. A client that never took part costs nothing and reads as the initial state.

    Writes of a round are held back until `commit`, so that an interrupted round leaves no trace.
    """

    def __init__(self, initial: Tree, ram: int, spill: Callable[[], Path]) -> None:
        """`ram` is the cap in bytes; `spill()` names a directory for the mapped files beyond it."""
        self.initial = initial
        self.row_bytes = trees.nbytes(initial)
        self.blocks: list[Tree] = []  # leaves [ROWS, ...]
        self.row_of: dict[int, int] = {}
        self.changed: set[int] = set()  # blocks written since `saved`
        self._ram, self._spill = ram, spill
        self._pending: dict[int, Tree] = {}

    @property
    def stateless(self) -> bool:
        return self.row_bytes == 0

    def get(self, client: int) -> Tree:
        """The state of one client; not to be written to."""
        if client in self._pending:
            return self._pending[client]
        row = self.row_of.get(client)
        return self.initial if row is None else trees.at(self.blocks[row // ROWS], row % ROWS)

    def gather(self, clients: list[int]) -> Tree:
        """States stacked, [n, ...]."""
        return self.initial if self.stateless else trees.stack([self.get(i) for i in clients])

    def put(self, clients: list[int], states: Tree) -> None:
        """New states, stacked [n, ...]; they count from now on, and are kept by the next `commit`."""
        if self.stateless:
            return
        for i, client in enumerate(clients):
            self._pending[client] = trees.at(states, i)

    def commit(self) -> None:
        for client, state in self._pending.items():
            row = self.row_of.setdefault(client, len(self.row_of))
            if row // ROWS == len(self.blocks):
                self.blocks.append(self._allocate())
            self.changed.add(row // ROWS)
            trees.map(lambda block, new, at=row % ROWS: block[at].copy_(new), self.blocks[row // ROWS], state)
        self._pending.clear()

    def rollback(self) -> None:
        self._pending.clear()

    def _allocate(self) -> Tree:
        number, size = len(self.blocks), ROWS * self.row_bytes
        if (number + 1) * size <= self._ram:
            return trees.map(lambda x: torch.empty((ROWS, *x.shape), dtype=x.dtype), self.initial)
        leaf = iter(range(len(trees.leaves(self.initial))))
        folder = self._spill()

        def mapped(x: Tensor) -> Tensor:
            file = folder / f"block-{number}-{next(leaf)}.bin"
            file.unlink(missing_ok=True)
            flat = torch.from_file(str(file), shared=True, size=ROWS * x.numel(), dtype=x.dtype)
            return flat.view(ROWS, *x.shape)

        return trees.map(mapped, self.initial)

    # For the checkpoint: blocks as flat tensors, and which client is in which row.

    def save_blocks(self, numbers: set[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number in sorted(numbers):
            used = min(ROWS, len(self.row_of) - number * ROWS)
            yield number, {path: x[:used].contiguous() for path, x in trees.flatten(self.blocks[number]).items()}

    def load(self, clients: list[int], block: Callable[[int], dict[str, Tensor]]) -> None:
        """`clients` in row order, and `block(number)` as `save_blocks` gave it."""
        self.row_of = {client: row for row, client in enumerate(clients)}
        self.blocks, self.changed = [], set()
        for number in range(-(-len(clients) // ROWS)):
            self.blocks.append(self._allocate())
            saved = trees.unflatten(block(number), self.initial)
            trees.map(lambda target, source: target[: len(source)].copy_(source), self.blocks[number], saved)
