"""A population's data, resident on the device, and the deterministic batches that clients draw from it."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.rng import rng, streams
from fedcore.types import Batches

EVALUATION_BATCH = 64  # examples in one forward pass of one client's evaluation


class Examples(NamedTuple):
    """Inputs and targets with the same number of rows."""

    x: Tensor  # [n, ...]
    y: Tensor  # [n, ...]


class LocalSettings(BaseModel):
    """How much a client trains in a round it takes part in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(20, ge=1, description="B, examples in a local step")
    epochs: int = Field(
        1,
        ge=1,
        description="E, passes over the client's training examples; the last batch of each may be smaller",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="K, local steps instead of epochs, reshuffling whenever the examples run out",
    )

    @model_validator(mode="after")
    def _one_of(self) -> LocalSettings:
        if (
            self.steps is not None
            and "epochs" in self.model_fields_set
            and self.epochs != 1
        ):
            raise ValueError("give epochs or steps, not both")
        return self


class FederatedData:
    """Training rows and who holds them, and the global test set.

    Client i holds rows `order[offsets[i]:offsets[i+1]]`; the last `round(holdout * size)` of them, after a shuffle of its own
    rows, are held out of training and are what `evaluate` reads. Nothing here is copied per client.
    """

    def __init__(
        self,
        train: Examples,
        test: Examples,
        order: np.ndarray,
        offsets: np.ndarray,
        holdout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`order` int64 row numbers grouped by client, `offsets` int64 [population + 1], `holdout` in [0, 1)."""
        self.x, self.y = train
        self.test = test
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        self.order = np.ascontiguousarray(order, dtype=np.int64)
        self.sizes = np.diff(self.offsets)
        self.held = np.minimum(
            np.round(holdout * self.sizes).astype(np.int64),
            np.maximum(self.sizes - 1, 0),
        )
        self.kept = self.sizes - self.held
        # What `evaluate` reads: held-out examples, or the training examples where none are held out.
        self.evaluated_on: Literal["train", "test"] = (
            "test" if self.held.any() else "train"
        )
        if holdout > 0:
            keys = rng(seed, "holdout").random(len(self.order))
            client = np.repeat(np.arange(self.population), self.sizes)
            self.order = self.order[np.lexsort((keys, client))]

    @property
    def population(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> None:
        self.x, self.y = self.x.to(device), self.y.to(device)
        self.test = Examples(self.test.x.to(device), self.test.y.to(device))

    def num_examples(self, clients: np.ndarray, data: str) -> np.ndarray:
        """Examples that a client function of this kind works on, int64 [n]."""
        counts: np.ndarray = (
            self.held if data == self.evaluated_on == "test" else self.kept
        )[clients]
        return counts

    def rows(self, client: int, data: str) -> np.ndarray:
        """Row numbers of one client, int64."""
        start, end = self.offsets[client], self.offsets[client + 1]
        cut = end - self.held[client]
        return (
            self.order[cut:end]
            if data == self.evaluated_on == "test"
            else self.order[start:cut]
        )

    def label_counts(self, num_classes: int) -> np.ndarray:
        """How many rows of each class every client holds, int64 [population, classes]."""
        client = np.repeat(np.arange(self.population), self.sizes)
        labels = self.y.cpu().numpy()[self.order]
        flat = np.bincount(
            client * num_classes + labels, minlength=self.population * num_classes
        )
        return flat.reshape(self.population, num_classes)

    def steps(self, clients: np.ndarray, data: str, local: LocalSettings) -> np.ndarray:
        """Local steps that each client has to do, int64 [n]; 0 for a client without examples."""
        return np.asarray(_steps(self.num_examples(clients, data), data, local))

    def batches(
        self,
        clients: np.ndarray,
        data: str,
        local: LocalSettings,
        seed: int,
        t: int,
        plan: int = 0,
        even: bool = False,
    ) -> Batches:
        """What these clients work through in round t, stacked: x [n, K, B, ...], y [n, K, B, ...], mask [n, K, B].

        K and B are the largest that one of them needs; the rest is padding (mask 0). A client's own rows and their order depend on
        (seed, t, client, plan) alone, so any grouping of clients gives each the same work. `even`: B is one of batch, batch / 2,
        batch / 4 ..., so that few shapes occur.
        """
        batch = local.batch_size if data == "train" else EVALUATION_BATCH
        own = [self.rows(client, data) for client in clients.tolist()]
        longest = max(map(len, own), default=0)
        shape = (
            len(clients),
            max(_steps(longest, data, local), 1),
            _width(longest, batch) if even else min(batch, max(longest, 1)),
        )
        rows = np.full(shape, -1, dtype=np.int64)  # -1 is padding
        if data == "train":
            keys = [
                np.full(len(clients), t),
                clients,
                *[np.full(len(clients), plan)][: plan > 0],
            ]
            for steps, mine, draw in zip(
                rows, own, streams(seed, "batches", np.stack(keys, 1)), strict=True
            ):
                if len(mine):
                    fill_train(steps, mine, local, batch, draw)
        else:
            for steps, mine in zip(rows, own, strict=True):
                fill(steps, mine, 0, batch)
        # Step by step in memory, [K, n, B], so that a step of all clients is one block.
        index = np.ascontiguousarray(rows.swapaxes(0, 1))
        mask = (index >= 0).astype(np.float32)
        flat, real = trees.to(
            (torch.from_numpy(np.maximum(index, 0)).flatten(), torch.from_numpy(mask)),
            self.x.device,
        )
        x = self.x.index_select(0, flat).view(*index.shape, *self.x.shape[1:])
        y = self.y.index_select(0, flat).view(*index.shape, *self.y.shape[1:])
        return Batches(*(v.transpose(0, 1) for v in (x, y, real)))

    def __getstate__(self) -> dict[str, Any]:
        # As NumPy arrays, which pickle protocol 5 moves out of band: workers on one machine share them instead of copying.
        tensors = {
            "x": self.x,
            "y": self.y,
            "test_x": self.test.x,
            "test_y": self.test.y,
        }
        arrays = {
            "order": self.order,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "held": self.held,
            "kept": self.kept,
        }
        pixels = {name: value.cpu().numpy() for name, value in tensors.items()}
        return {**pixels, **arrays, "evaluated_on": self.evaluated_on}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.x, self.y = shared_tensor(state["x"]), shared_tensor(state["y"])
        self.test = Examples(
            shared_tensor(state["test_x"]), shared_tensor(state["test_y"])
        )
        for name in ("order", "offsets", "sizes", "held", "kept", "evaluated_on"):
            setattr(self, name, state[name])


def _steps(n: Any, data: str, local: LocalSettings) -> Any:
    """Steps for n examples; an int, or an array of them."""
    if data != "train":
        return -(-n // EVALUATION_BATCH)
    return (
        -(-n // local.batch_size) * local.epochs
        if local.steps is None
        else (n > 0) * local.steps
    )


def _width(longest: int, batch: int) -> int:
    """The smallest of batch, batch / 2, batch / 4 ... (rounded up) that holds `longest` examples."""
    while batch > 1 and -(-batch // 2) >= longest:
        batch = -(-batch // 2)
    return batch


def fill(rows: np.ndarray, own: np.ndarray, first: int, batch: int) -> int:
    """Write `own` into batches of `batch` from step `first` on; returns the next free step."""
    steps = -(-len(own) // batch)
    rows[first : first + steps].reshape(-1)[: len(own)] = (
        own  # B is `batch`, or there is one step
    )
    return first + steps


def fill_train(
    rows: np.ndarray,
    own: np.ndarray,
    local: LocalSettings,
    batch: int,
    draw: np.random.Generator,
) -> None:
    """Shuffled epochs, each cut into batches of its own; `local.steps` of them, or `local.epochs` epochs."""
    step = 0
    if local.steps is None:
        for _ in range(local.epochs):
            step = fill(rows, draw.permutation(own), step, batch)
        return
    while step < local.steps:
        step = fill(
            rows, draw.permutation(own)[: (local.steps - step) * batch], step, batch
        )


def shared_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory, which may be read-only: nobody writes to data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
