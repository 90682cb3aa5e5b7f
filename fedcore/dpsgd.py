"""DP-SGD on a client: clipped gradients of single examples, and noise (Abadi, 2016).

A step of local training with `[local.dp]` moves along

    ( sum_j m_j g_j min(1, C / |g_j|) + z C N(0, I) ) / B

    g_j   gradient of the loss of example j alone, |g_j| over all parameters
    m_j   1 where the step has drawn example j: each with probability q, on its own
    C, z  `local.dp.clip`, `local.dp.noise`
    B     the number of examples to expect, q n_k: never the number that was drawn

Everything else that a step does (momentum, AdamW, a proximal term, a correction) comes
after it, and learns no more of the examples. Noise and sizes are drawn for a whole
round outside of the step, and are among its inputs: so steps are recorded, batched and
replayed as any other.

In a simulation draws have a key of the run's seed, which protects nobody who knows it.
A device draws the examples of a step, and the noise, from its own system.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.rng import streams
from fedcore.types import Batches, Params, Tree

if TYPE_CHECKING:
    from fedcore.local_settings import LocalSettings
    from fedcore.task import Task

__all__ = [
    "Drawn",
    "ExampleDraws",
    "SampledBatches",
    "clipped_sum",
    "normals_of_system",
    "of_steps",
    "plain",
    "widened",
]

TINY = 1e-12  # in place of a norm of zero
MEMORY = 2**30  # bytes for the gradients and the noise of clients in one batch


class Drawn(NamedTuple):
    """What a step of DP-SGD has beside its examples; of K steps, stacked."""

    size: Tensor  # [K]: B, the examples to expect; 0 where the step is padding
    noise: Tensor  # [K, D], standard normal, D numbers of the model; D = 0 without


class SampledBatches(NamedTuple):
    """The examples of a client's round, each drawn on its own, and its noise.

    A batch may have no example, and is a step all the same: that nothing was drawn
    must not be seen.
    """

    batches: Batches
    drawn: Drawn


def plain(batches: Tree) -> Tree:
    """The batches without what was drawn beside them."""
    return batches.batches if isinstance(batches, SampledBatches) else batches


def widened(plans: list[Batches]) -> list[Batches]:
    """Batches [n, K, B, ...] of several plans, as wide as the widest.

    What is added repeats an example of its batch, with mask 0.
    """
    width = max(plan.mask.shape[2] for plan in plans)
    wide = []
    for plan in plans:
        missing = width - plan.mask.shape[2]
        mask = torch.nn.functional.pad(plan.mask, (0, missing))
        x, y = trees.map(partial(_repeated, missing=missing), (plan.x, plan.y))
        wide.append(Batches(x, y, mask))
    return wide


def _repeated(column: Tensor, missing: int) -> Tensor:
    """[n, K, B, ...] with the first of each batch once more, `missing` times."""
    first = column[:, :, :1]
    return torch.cat([column, *[first] * missing], 2) if missing else column


def clipped_sum(
    loss: Callable[[Params, Tree, Tensor], Tensor],
    params: Params,
    x: Tree,
    y: Tensor,
    mask: Tensor,
    bound: float,
) -> Params:
    """sum_j m_j g_j min(1, C / |g_j|) over the examples of a batch, C = `bound`.

    `loss` (params, x [1, ...], y [1, ...]) is that of one example. One that is left
    out moves the sum by C at most, whatever it holds. The norm is over all parameters.

    >>> loss = lambda params, x, y: (params["w"] * x).sum()
    >>> x, y = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.zeros(2)
    >>> clipped_sum(loss, {"w": torch.zeros(2)}, x, y, torch.ones(2), bound=1.0)
    {'w': tensor([0.9000, 1.2000])}
    """

    def slope_of(own_x: Tree, own_y: Tensor) -> Params:
        alone = trees.map(lambda value: value[None], own_x)
        slope: Params = grad(loss)(params, alone, own_y[None])
        return slope

    slopes = vmap(slope_of, randomness="different")(x, y)  # each [B, ...]
    # Of each by itself first, without its squares in memory.
    flat = [g.reshape(len(mask), -1) for g in slopes.values()]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat])
    norm = norms.square().sum(0).sqrt()
    share = (bound / norm.clamp(min=TINY)).clamp(max=1) * mask
    return {name: torch.tensordot(share.to(g), g, 1) for name, g in slopes.items()}


def of_steps(drawn: Drawn, task: Task, params: Params) -> list[tuple[Tensor, Params]]:
    """(size, noise of each of `params`) step by step; no noise where none is drawn.

    Raises SettingsError where the task's model has no such parameters to train.
    """
    noise: Params = {}
    if drawn.noise.shape[-1]:
        places = _places(task)
        for name, value in params.items():
            place = places.get(name, slice(0, 0))
            # A smaller one, as of an adapter of lower rank, takes some of the numbers.
            if place.stop - place.start < value.numel():
                raise SettingsError(
                    f'local.dp.noise: the method trains "{name}" of shape '
                    f"{tuple(value.shape)}, which the model does not have so: leave "
                    "it out, or choose another method, e.g. fedavg"
                )
            own = slice(place.start, place.start + value.numel())
            numbers = drawn.noise[:, own].to(value.dtype)
            noise[name] = numbers.reshape(-1, *value.shape)
    return trees.unbind((drawn.size, noise))


def _places(task: Task) -> dict[str, slice]:
    """The numbers of each parameter that is trained, among D."""
    places: dict[str, slice] = {}
    start = 0
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
    return places


class ExampleDraws:
    """Sizes and noise of all steps of a client, drawn for a whole round.

    The same in every engine: the key of a draw is (seed, function, round, client, plan
    of batches). `is_secret`: from the operating system instead, as on a device.
    """

    def __init__(
        self, task: Task, local: LocalSettings, seed: int, is_secret: bool
    ) -> None:
        self._task, self._local = task, local
        self._seed, self._is_secret = seed, is_secret

    def add(
        self, batches: Batches, function: str, clients: list[int], t: int, plans: int
    ) -> SampledBatches:
        """Batches [n, K, B, ...] of `plans` plans, with what is drawn beside them."""
        ids = np.asarray(clients, dtype=np.int64)
        steps = self._task.data.steps(ids, "train", self._local).tolist()
        counts = self._task.data.num_examples(ids, "train").tolist()
        whole, numbers, dtype = batches.mask.shape[1], self._numbers(), self._dtype()
        length = whole // plans  # of a plan
        # Step by step in memory, so that a step of all clients is one block.
        size = np.zeros((whole, len(ids)))
        noise = np.zeros((whole, len(ids), numbers), dtype=dtype)
        for plan in range(plans):
            keys = np.stack([np.full_like(ids, t), ids, np.full_like(ids, plan)], 1)
            draws = streams(self._seed, f"example noise {function}", keys)
            for i, draw in enumerate(draws):
                own = slice(plan * length, plan * length + steps[i])
                size[own, i] = self._local.expected_batch(counts[i])
                if numbers:
                    noise[own, i] = self._normals(draw, (steps[i], numbers), dtype)
        drawn = Drawn(torch.from_numpy(size), torch.from_numpy(noise))
        moved: Drawn = trees.to(drawn, self._task.device)
        return SampledBatches(batches, trees.map(lambda x: x.transpose(0, 1), moved))

    def example(self, batches: Batches) -> SampledBatches:
        """The batches [K, B, ...] of one client, with zeros for noise."""
        steps, device = len(batches.mask), batches.mask.device
        size = torch.ones(steps, dtype=torch.float64, device=device)
        return SampledBatches(
            batches, Drawn(size, torch.zeros(steps, self._numbers(), device=device))
        )

    def most_at_once(self, clients: np.ndarray) -> int:
        """Clients of whose gradients and noise MEMORY has room, 1 at least."""
        steps = self._task.data.steps(clients, "train", self._local).max(initial=1)
        longest = self._task.data.num_examples(clients, "train").max(initial=1)
        rows = steps + 2 * self._local.expected_batch(int(longest))
        return max(int(MEMORY / (4 * rows * max(self._size(), 1))), 1)

    def _numbers(self) -> int:
        """D: the numbers that noise is added to; 0 without noise."""
        return self._size() if self._local.dp.noise else 0

    def _size(self) -> int:
        return max((place.stop for place in _places(self._task).values()), default=0)

    def _dtype(self) -> type[np.floating[Any]]:
        parameters = self._task.model.parameters()
        is_double = any(value.dtype == torch.float64 for value in parameters)
        return np.float64 if is_double else np.float32

    def _normals(
        self,
        draw: np.random.Generator,
        shape: tuple[int, int],
        dtype: type[np.floating[Any]],
    ) -> np.ndarray:
        if self._is_secret:
            return normals_of_system(math.prod(shape)).reshape(shape)
        return draw.standard_normal(shape, dtype=dtype)


def normals_of_system(count: int) -> np.ndarray:
    """Standard normal numbers from the operating system's randomness, float64 [count].

    AES-256 in counter mode, of a key that is used once; then Box and Muller's
    transform.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    pairs = -(-count // 2)
    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
    stream = cipher.encryptor().update(bytes(16 * pairs))
    words = np.frombuffer(stream, dtype=np.uint64) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    radius = np.sqrt(-2 * np.log(uniform[:pairs]))
    angle = 2 * np.pi * uniform[pairs:]
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normals[:count]
