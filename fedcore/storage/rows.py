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

    What a round writes goes into rows of its own, which take the place of the old ones at `commit`: so an interrupted round leaves
    no trace, and a round of any size stays within the cap.
    """

    def __init__(
        self,
        initial: Tree,
        ram: int,
        spill: Callable[[], Path],
        device: torch.device = CPU,
    ) -> None:
        """`ram` is the cap in bytes, `spill()` the directory of the mapped files beyond it; `gather` brings rows to `device`."""
        self.initial = initial
        self.row_bytes = trees.nbytes(initial)
        self.blocks: list[Tree] = []  # leaves [ROWS, ...]
        self.row_of: dict[int, int] = {}
        self.changed: set[int] = (
            set()
        )  # blocks that are not in the last checkpoint as they are now
        self._ram, self._spill, self._device = ram, spill, device
        self._maps: dict[int, list[mmap.mmap]] = {}  # of the blocks in files
        self._pending: dict[int, int] = {}  # row of what this round wrote, by client
        self._replaced: list[
            int
        ] = []  # rows that this round wrote twice; they may still be read
        self._free: list[int] = []

    @property
    def stateless(self) -> bool:
        return self.row_bytes == 0

    def get(self, client: int) -> Tree:
        """The row of one client."""
        return trees.at(self.gather([client]), 0)

    def gather(self, clients: Tensor | list[int]) -> Tree:
        """Rows stacked, [n, ...]."""
        if self.stateless:
            return self.initial
        ids = clients.tolist() if isinstance(clients, Tensor) else clients
        found = [self._pending.get(i, self.row_of.get(i)) for i in ids]
        blocks = {row // ROWS for row in found if row is not None}
        rows = trees.stack(
            [
                self.initial
                if row is None
                else trees.at(self.blocks[row // ROWS], row % ROWS)
                for row in found
            ]
        )
        self._release(blocks)
        return trees.to(rows, self._device)

    def put(self, clients: Tensor | list[int], rows: Tree) -> None:
        """New rows, stacked [n, ...], from any device; they count from now on, and are kept by the next `commit`."""
        if self.stateless:
            return
        rows, touched = trees.to(rows, CPU), set[int]()
        for i, client in enumerate(
            clients.tolist() if isinstance(clients, Tensor) else clients
        ):
            if client in self._pending:
                self._replaced.append(self._pending[client])
            if not self._free:
                self._free = list(
                    reversed(
                        range(len(self.blocks) * ROWS, (len(self.blocks) + 1) * ROWS)
                    )
                )
                self.changed.add(len(self.blocks))
                self.blocks.append(self._allocate())
            row = self._pending[client] = self._free.pop()
            touched.add(row // ROWS)
            trees.map(
                lambda block, new, at=row % ROWS, i=i: block[at].copy_(new[i]),
                self.blocks[row // ROWS],
                rows,
            )
        self._release(touched)

    def commit(self) -> None:
        for client, row in self._pending.items():
            if client in self.row_of:
                self._replaced.append(self.row_of[client])
            self.row_of[client] = row
            self.changed.add(row // ROWS)
        self._pending.clear()
        self.rollback()

    def rollback(self) -> None:
        self._free += [*self._pending.values(), *self._replaced]
        self._pending.clear()
        self._replaced.clear()

    def _allocate(self) -> Tree:
        number, size = len(self.blocks), ROWS * self.row_bytes
        if (number + 1) * size <= self._ram:
            return trees.map(
                lambda x: torch.zeros((ROWS, *x.shape), dtype=x.dtype), self.initial
            )
        self._maps[number] = []

        def mapped(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((ROWS, *x.shape), dtype=x.dtype)
            length = ROWS * x.numel() * x.element_size()
            with (self._spill() / f"block-{number}-{len(self._maps[number])}.bin").open(
                "wb+"
            ) as file:
                file.truncate(length)
                self._maps[number].append(mmap.mmap(file.fileno(), length))
            return torch.frombuffer(self._maps[number][-1], dtype=x.dtype).view(
                ROWS, *x.shape
            )

        return trees.map(mapped, self.initial)

    def _release(self, numbers: Iterable[int]) -> None:
        """Give back the memory in which mapped blocks were read and written: the kernel would leave it with us for long."""
        for number in numbers:
            for piece in self._maps.get(number, []):
                piece.madvise(mmap.MADV_DONTNEED)

    # For the checkpoint: blocks as flat tensors, and which client is in which row.

    def clients(self) -> list[int]:
        """The client of each row, -1 where there is none."""
        found = [-1] * (max(self.row_of.values(), default=-1) + 1)
        for client, row in self.row_of.items():
            found[row] = client
        return found

    def in_use(self) -> range:
        """Numbers of the blocks up to the last row that a client has."""
        return range(-(-len(self.clients()) // ROWS))

    def save_blocks(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The changed ones of the blocks in use."""
        rows = len(self.clients())
        for number in sorted(self.changed & set(self.in_use())):
            yield (
                number,
                {
                    path: x[: rows - number * ROWS]
                    for path, x in trees.flatten(self.blocks[number]).items()
                },
            )
            self._release([number])

    def saved(self) -> None:
        """What `save_blocks` gave is now in the last checkpoint."""
        self.changed = set(range(len(self.blocks))) - set(self.in_use())

    def load(
        self, clients: list[int], block: Callable[[int], dict[str, Tensor]]
    ) -> None:
        """`clients` as `clients()` gave them, and `block(number)` as `save_blocks` did."""
        self.row_of = {client: row for row, client in enumerate(clients) if client >= 0}
        self.blocks, self.changed = [], set()
        for number in range(-(-len(clients) // ROWS)):
            self.blocks.append(self._allocate())
            saved = trees.unflatten(block(number), self.initial)
            trees.map(
                lambda target, source: target[: len(source)].copy_(source),
                self.blocks[number],
                saved,
            )
            self._release([number])
        self._free = sorted(
            set(range(len(self.blocks) * ROWS)) - set(self.row_of.values()),
            reverse=True,
        )
