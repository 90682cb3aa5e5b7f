"""A population's data, and the deterministic batches that clients draw from it."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.arrays import as_examples
from fedcore.data.sampling import Key, epoch_steps, sampled_rows
from fedcore.data.validation import checked_holders, checked_test
from fedcore.local_settings import LocalSettings as LocalSettings
from fedcore.measuring import rows_at_once
from fedcore.rng import rng, streams
from fedcore.types import Batches, Tree

# Examples in one forward pass of one client's evaluation; fewer where each has many
# targets.
EVALUATION_BATCH = 64
LARGEST_TABLE = 10**8  # entries of a table of every client's classes
PADDING = -1  # in place of a row number
ARRAYS = ("order", "offsets", "sizes", "held", "kept")  # of FederatedData


class Examples(NamedTuple):
    """Inputs and targets with the same number of rows.

    `x` is a tensor, or a nested dict, tuple or NamedTuple of tensors; how a model gets
    it is said in `fedcore.inputs`.
    """

    x: Tree  # each tensor [n, ...]
    y: Tensor  # [n, ...]


class Totals(NamedTuple):
    """Sums over the rows of each client, [population]."""

    kept: np.ndarray
    held: np.ndarray


class FederatedData:
    """Training rows and who holds them, and the global test set.

    Client i holds rows `order[offsets[i]:offsets[i+1]]`; the last `round(holdout *
    size)` of them, after a shuffle of its own rows (none where they are `ordered`), are
    held out of training and are what `evaluate` reads. Nothing here is copied per
    client.

    >>> rows = Examples(torch.arange(6.0)[:, None], torch.zeros(6))
    >>> order, offsets = np.array([0, 2, 4, 1, 3, 5]), np.array([0, 3, 6])
    >>> data = FederatedData(rows, rows, order, offsets)
    >>> data.population
    2
    >>> data.rows(1, "train")
    array([1, 3, 5])
    """

    def __init__(
        self,
        train: Examples,
        test: Examples | None,
        order: np.ndarray,
        offsets: np.ndarray,
        holdout: float = 0.0,
        seed: int = 0,
        ordered: bool = False,
    ) -> None:
        """Data of `len(offsets) - 1` clients.

        `order` holds int64 row numbers of `train` grouped by client, `offsets` int64
        [population + 1]; `holdout` is a fraction in [0, 1). Arrays, lists and tables
        of numbers do as well. Without a global test set `test` is None. `ordered`:
        each client's last rows, in the order given, are held out, as text and series
        need it, where neighbours are alike; else rows are shuffled first. Raises
        SettingsError for what disagrees, with the array and its first bad row;
        `fedcore.arrays` and `fedcore.data.validation` say what may be.
        """
        train = Examples(*as_examples("train", train))
        test = Examples(*checked_test(test, train))
        order, offsets = checked_holders(order, offsets, len(train.y), holdout)
        self.x, self.y = train
        self.test = test
        self.offsets = offsets
        self.sizes = np.diff(self.offsets)
        # A client with an example trains on one at least.
        wanted = np.round(holdout * self.sizes).astype(np.int64)
        self.held = np.minimum(wanted, np.maximum(self.sizes - 1, 0))
        self.kept = self.sizes - self.held
        # The examples that `evaluate` reads: those held out, or the training examples
        # where none are held out.
        self.evaluated_on: Literal["train", "test"] = (
            "test" if self.held.any() else "train"
        )
        self.order = order
        if holdout > 0 and not ordered:
            keys = rng(seed, "holdout").random(len(self.order))
            client = np.repeat(np.arange(self.population), self.sizes)
            self.order = self.order[np.lexsort((keys, client))]

    @property
    def population(self) -> int:
        """The number of clients."""
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.y.device

    def to(self, device: torch.device) -> FederatedData:
        """These data, moved to the device: in place, as `nn.Module.to` does it."""
        self.x, self.y = trees.map(lambda x: x.to(device), (self.x, self.y))
        self.test = trees.map(lambda x: x.to(device), self.test)
        return self

    def _reads_held_out(self, data: str) -> bool:
        """Whether work on this kind of data reads the held-out examples."""
        return data == self.evaluated_on == "test"

    def num_examples(
        self, clients: np.ndarray, data: str, totals: Totals | None = None
    ) -> np.ndarray:
        """Examples that a client function of this kind works on, int64 [n].

        Or, of these examples, the totals given, float64.
        """
        of_kind = totals or Totals(self.kept, self.held)
        counts = of_kind.held if self._reads_held_out(data) else of_kind.kept
        asked: np.ndarray = counts[clients]
        return asked

    def totals(self, values: np.ndarray) -> Totals:
        """Sums over each client's rows of one value a row of train, float64.

        >>> rows = Examples(torch.zeros(4, 1), torch.zeros(4))
        >>> holders = np.arange(4), np.array([0, 3, 4])
        >>> data = FederatedData(rows, None, *holders, holdout=0.3, ordered=True)
        >>> data.totals(np.array([1, 2, 3, 4]))
        Totals(kept=array([3., 4.]), held=array([3., 0.]))
        """
        sums = np.zeros(len(self.order) + 1)
        np.cumsum(values[self.order], out=sums[1:])
        begin, end = self.offsets[:-1], self.offsets[1:]
        cut = end - self.held
        return Totals(sums[cut] - sums[begin], sums[end] - sums[cut])

    def rows(self, client: int, data: str) -> np.ndarray:
        """Row numbers of one client, int64."""
        start, end = self.offsets[client], self.offsets[client + 1]
        cut = end - self.held[client]
        if self._reads_held_out(data):
            return self.order[cut:end]
        return self.order[start:cut]

    def num_classes(self) -> int | None:
        """One more than the largest label; None where targets are no classes.

        They are classes where they are one whole number an example, from 0 on, and few
        enough for a table of every client's classes.
        """
        if self.y.is_floating_point() or self.y.ndim != 1 or len(self.y) == 0:
            return None
        classes = int(self.y.max()) + 1
        is_table = classes * self.population <= LARGEST_TABLE
        return classes if int(self.y.min()) >= 0 and is_table else None

    def label_counts(self, num_classes: int) -> np.ndarray:
        """Rows of each class that every client holds, int64 [population, classes]."""
        client = np.repeat(np.arange(self.population), self.sizes)
        labels = self.y.cpu().numpy()[self.order]
        flat = np.bincount(
            client * num_classes + labels, minlength=self.population * num_classes
        )
        return flat.reshape(self.population, num_classes)

    def steps(self, clients: np.ndarray, data: str, local: LocalSettings) -> np.ndarray:
        """Local steps of each client, int64 [n]; 0 for a client without examples."""
        return np.asarray(self._steps(self.num_examples(clients, data), data, local))

    def batches(
        self,
        clients: np.ndarray,
        data: str,
        local: LocalSettings,
        seed: int,
        t: int,
        plan: int = 0,
        even: bool = False,
        is_secret: bool = False,
    ) -> Batches:
        """The work of these clients in round t, stacked.

        x [n, K, B, ...], y [n, K, B, ...], mask [n, K, B]: K and B are the largest that
        one of them needs; the rest is padding (mask 0). A client's own rows and their
        order depend on (seed, t, client, plan) alone, so any grouping of clients gives
        each the same work. `even`: B is one of batch, batch / 2, batch / 4 ..., so that
        few shapes occur. With `local.dp` every step draws each example on its own, as
        `fedcore.data.sampling` says; `is_secret`: by the operating system.
        """
        is_training = data == "train"
        batch = local.batch_size if is_training else self._evaluation_batch()
        held = [self.rows(client, data) for client in clients.tolist()]
        if is_training and local.dp.is_active:
            key = None if is_secret else Key(seed, clients, t, plan)
            lengths = np.array([len(rows) for rows in held], dtype=np.int64)
            steps = self._steps(lengths, data, local)
            return self._taken(sampled_rows(held, steps, local, key, even))
        longest = max(map(len, held), default=0)
        steps = self._steps(longest, data, local)
        width = _width(longest, batch) if even else min(batch, max(longest, 1))
        rows = np.full((len(clients), steps, width), PADDING, dtype=np.int64)
        if is_training:
            keys = [np.full(len(clients), t), clients]
            if plan > 0:
                keys.append(np.full(len(clients), plan))
            draws = streams(seed, "batches", np.stack(keys, 1))
            for batched, mine, draw in zip(rows, held, draws, strict=True):
                if len(mine):
                    fill_train(batched, mine, local, batch, draw)
        else:
            for batched, mine in zip(rows, held, strict=True):
                fill(batched, mine, 0, batch)
        return self._taken(rows)

    def _evaluation_batch(self) -> int:
        return rows_at_once(self.y, EVALUATION_BATCH)

    def _steps(self, n: Any, data: str, local: LocalSettings) -> Any:
        """Steps for n examples; an int, or an array of them."""
        if data != "train":
            return -(-n // self._evaluation_batch())
        if local.steps is None and local.dp.rate is not None:
            return (n > 0) * epoch_steps(local.dp.rate) * local.epochs
        if local.steps is None:
            return -(-n // local.batch_size) * local.epochs
        return (n > 0) * local.steps

    def _taken(self, rows: np.ndarray) -> Batches:
        """The examples of these row numbers, [n, K, B], on the device.

        Step by step in memory, [K, n, B], so that a step of all clients is one block.
        """
        index = np.ascontiguousarray(rows.swapaxes(0, 1))
        is_real = index != PADDING
        mask = torch.from_numpy(is_real.astype(np.float32))
        has_none = np.zeros(len(rows), dtype=bool)
        if not is_real.all():
            index, has_none = _padded(index)
        flat = torch.from_numpy(index).flatten()
        flat, mask = trees.to((flat, mask), self.device)

        def examples(column: Tensor) -> Tensor:
            taken = column.index_select(0, flat).view(*index.shape, *column.shape[1:])
            if has_none.any():
                taken[:, torch.from_numpy(has_none).to(taken.device)] = 0
            return taken.transpose(0, 1)

        x, y = trees.map(examples, (self.x, self.y))
        return Batches(x, y, mask.transpose(0, 1))

    def __getstate__(self) -> dict[str, Any]:
        # As NumPy arrays, which pickle protocol 5 moves out of band: workers on one
        # machine share them instead of copying.
        state: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        state["evaluated_on"] = self.evaluated_on
        state["train"] = trees.map(_shareable, (self.x, self.y))
        state["test"] = trees.map(_shareable, tuple(self.test))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in (*ARRAYS, "evaluated_on"):
            setattr(self, name, state[name])
        self.x, self.y = trees.map(shared_tensor, state["train"])
        self.test = Examples(*trees.map(shared_tensor, state["test"]))


def _width(longest: int, batch: int) -> int:
    """The smallest of batch, batch / 2, batch / 4 ... that holds `longest` examples.

    Halves are rounded up.
    """
    while batch > 1 and -(-batch // 2) >= longest:
        batch = -(-batch // 2)
    return batch


def fill(rows: np.ndarray, own: np.ndarray, first: int, batch: int) -> int:
    """Write `own` into batches of `batch` from step `first` on.

    `rows` [K, B] is written to; B is `batch`, or there is one step. Returns the next
    free step.
    """
    steps = -(-len(own) // batch)
    rows[first : first + steps].reshape(-1)[: len(own)] = own
    return first + steps


def fill_train(
    rows: np.ndarray,
    own: np.ndarray,
    local: LocalSettings,
    batch: int,
    draw: np.random.Generator,
) -> None:
    """Write shuffled epochs of `own` into `rows` [K, B].

    Each is cut into batches of its own; `local.steps` of them, or `local.epochs`
    epochs.
    """
    step = 0
    if local.steps is None:
        for _ in range(local.epochs):
            step = fill(rows, draw.permutation(own), step, batch)
        return
    while step < local.steps:
        epoch = draw.permutation(own)[: (local.steps - step) * batch]
        step = fill(rows, epoch, step, batch)


def _padded(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [K, n, B] without PADDING, and which clients have no example, [n].

    Padding repeats the first row of its batch, so that its loss is finite where the
    batch's is; of a batch without rows, the client's first. For a client that has none,
    any row, whose values are replaced.
    """
    index = np.where(index == PADDING, index[:, :, :1], index)
    first = index[0, :, :1]  # [n, 1]
    if (first == PADDING).any():  # a first step that has drawn no example
        first = np.where(first == PADDING, index.max((0, 2))[:, None], first)
    index = np.where(index == PADDING, first, index)
    return np.maximum(index, 0), first[:, 0] == PADDING


def _shareable(x: Tensor) -> np.ndarray | Tensor:
    """The tensor as an array; as it is where NumPy lacks its type."""
    return x.cpu() if x.dtype == torch.bfloat16 else x.cpu().numpy()


def shared_tensor(array: np.ndarray | Tensor) -> Tensor:
    """A tensor on the array's own memory, which may be read-only.

    That is safe, since data are never written to.
    """
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
