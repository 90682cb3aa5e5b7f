"""Factors of adapters, B [m, r] and A [r, n] of a layer: their products and means.

Methods that aggregate LoRA are made of these: the mean of the clients' products, as
factors or whole, what the product of the means lacks of it, and the best factors of a
rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedcore.types import Params

__all__ = [
    "Change",
    "Pair",
    "Products",
    "Spectrum",
    "best_pair",
    "cut",
    "fresh_rows",
    "layers_of",
    "name_of",
    "norms",
    "padded",
    "pair_of",
    "spectrum",
]

ALMOST_ZERO = 1e-5  # of the largest singular value: a direction of rounding alone


class Pair(NamedTuple):
    """Two factors whose product is a matrix [m, n]."""

    left: Tensor  # [m, q]
    right: Tensor  # [q, n]

    @property
    def product(self) -> Tensor:
        """[m, n]."""
        return self.left @ self.right


def name_of(layer: str, tensor: str) -> str:
    """The name of a layer's `lora_A`, `lora_B` or `lora_change` among parameters.

    >>> name_of("blocks.0.fc1", "lora_A"), name_of("", "lora_A")
    ('blocks.0.fc1.lora_A', 'lora_A')
    """
    return f"{layer}.{tensor}".removeprefix(".")


def layers_of(params: Iterable[str]) -> list[str]:
    """The layers of which both factors are among these names, in their order.

    >>> layers_of(["0.lora_A", "0.lora_B", "2.lora_B", "3.weight"])
    ['0']
    """
    names = dict.fromkeys(params)
    layers = []
    for name in names:
        layer, _, tensor = name.rpartition(".")
        if tensor == "lora_A" and name_of(layer, "lora_B") in names:
            layers.append(layer)
    return layers


def pair_of(params: Params, layer: str) -> Pair:
    """B and A of a layer among parameters, or among messages of several clients."""
    return Pair(params[name_of(layer, "lora_B")], params[name_of(layer, "lora_A")])


def fresh_rows(shape: tuple[int, ...], draw: np.random.Generator) -> Tensor:
    """A as adapters draw it, uniform in +-1 / sqrt n; [r, n] float32."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.from_numpy(draw.uniform(-bound, bound, shape)).float()


def cut(params: Params, rank: int) -> Params:
    """The parameters with the first `rank` rows of each A, and columns of each B.

    >>> params = {"0.lora_A": torch.ones(8, 3), "0.lora_B": torch.ones(2, 8)}
    >>> [tuple(x.shape) for x in cut(params, 4).values()]
    [(4, 3), (2, 4)]
    """
    smaller = dict(params)
    for layer in layers_of(params):
        A, B = name_of(layer, "lora_A"), name_of(layer, "lora_B")
        smaller[A] = params[A][..., :rank, :].contiguous()
        smaller[B] = params[B][..., :rank].contiguous()
    return smaller


def padded(factors: Pair, rank: int) -> Pair:
    """Factors [..., m, q] and [..., q, n] with zero columns and rows up to `rank`."""
    left, right = factors
    missing = rank - left.shape[-1]
    return Pair(
        functional.pad(left, (0, missing)), functional.pad(right, (0, 0, 0, missing))
    )


def norms(factors: Pair) -> Tensor:
    """|B A|^2 of each of k clients, [k], for factors [k, m, r] and [k, r, n].

    By two products [r, r]: |B A|^2 = tr(B'B A A').
    """
    left, right = factors
    inner = (left.mT @ left) * (right @ right.mT)
    return inner.sum((1, 2)).clamp(min=0)


class Products:
    """The clients' products w_i B_i A_i of one layer, as they come in.

    Kept as factors they are as many columns as all clients have ranks together; else
    they are summed to one matrix [m, n], whatever the number of clients.
    """

    def __init__(self, *, keeps_factors: bool) -> None:
        self.keeps_factors = keeps_factors
        self._factors: list[Pair] = []  # of several clients each, [k, m, r], [k, r, n]
        self._weights: list[Tensor] = []  # [k]
        self._weight = 0.0
        self._sum: Tensor | None = None

    def add(self, factors: Pair, weights: Tensor) -> None:
        """Factors of k clients, [k, m, r] and [k, r, n], with their weights, [k]."""
        weights = weights.to(factors.left)
        self._weight += weights.double().sum().item()
        if self.keeps_factors:
            self._factors.append(factors)
            self._weights.append(weights)
            return
        left, right = _beside(factors, weights)
        product = left @ right
        self._sum = product if self._sum is None else self._sum.add_(product)

    def pair(self) -> Pair:
        """Factors of the mean: the weights are on the left one, and only there."""
        assert self.keeps_factors, "the products were summed"
        lefts, rights = [], []
        for factors, weights in zip(self._factors, self._weights, strict=True):
            left, right = _beside(factors, weights / self._weight)
            lefts.append(left)
            rights.append(right)
        return Pair(torch.cat(lefts, 1), torch.cat(rights, 0))

    def mean(self) -> Tensor:
        """sum_i w_i B_i A_i / sum_i w_i, [m, n]."""
        if self.keeps_factors:
            return self.pair().product
        assert self._sum is not None, "no client has reported"
        return self._sum / self._weight

    def centred_pair(self) -> Pair:
        """Factors of sum_i w_i (B_i - Bbar)(A_i - Abar), for clients of one rank.

        The B_i - Bbar are dependent, for their weighted sum is zero: with A_K in the
        place of Abar the last client's product drops out, and K - 1 ranks are left.
        """
        assert self.keeps_factors, "the products were summed"
        left = torch.cat([factors.left for factors in self._factors])
        right = torch.cat([factors.right for factors in self._factors])
        weights = torch.cat(self._weights) / self._weight
        mean = torch.tensordot(weights, left, 1)
        others = Pair((left - mean)[:-1], (right - right[-1])[:-1])
        return Pair(*_beside(others, weights[:-1]))


def _beside(factors: Pair, weights: Tensor) -> Pair:
    """[k, m, r] and [k, r, n] as [m, k r] and [k r, n]; the weights on the left one."""
    left = factors.left * weights[:, None, None]
    return Pair(left.transpose(0, 1).flatten(1), factors.right.flatten(0, 1))


class Change(NamedTuple):
    """What was added to the weights [m, n] of layers so far, as factors, by layer.

    There is room for as many columns as are fewer numbers than m n.
    """

    left: Params  # [m, room]
    right: Params  # [room, n]
    used: dict[str, Tensor]  # 0-d int64, columns that count; -1: there were too many

    @classmethod
    def none(cls, params: Params, layers: Iterable[str]) -> Change:
        """No change so far of these layers, whose factors are among `params`."""
        change = cls({}, {}, {})
        for layer in layers:
            B, A = pair_of(params, layer)
            m, n = len(B), A.shape[-1]
            room = (m * n - 1) // (m + n)
            change.left[layer] = A.new_zeros(m, room)
            change.right[layer] = A.new_zeros(room, n)
            change.used[layer] = torch.tensor(0, device=A.device)
        return change

    def has_room(self, layer: str, columns: int) -> bool:
        """Whether a change by this many columns can be kept beside the earlier ones."""
        used = int(self.used[layer])
        return used >= 0 and used + columns <= self.left[layer].shape[1]

    def plus(self, layer: str, pair: Pair | None) -> Change:
        """This change and one more of a layer; None: one that is no pair of factors."""
        left, right, used = self.left[layer], self.right[layer], -1
        if pair is not None:
            used = int(self.used[layer])
            columns = slice(used, used + pair.left.shape[1])
            left, right = left.clone(), right.clone()
            left[:, columns], right[columns] = pair
            used = columns.stop
        count = torch.full_like(self.used[layer], used)
        return Change(
            {**self.left, layer: left},
            {**self.right, layer: right},
            {**self.used, layer: count},
        )

    def pairs(self) -> dict[str, Pair]:
        """The factors of the layers that have all of them."""
        pairs = {}
        for layer, used in self.used.items():
            columns = int(used)
            if columns >= 0:
                left, right = self.left[layer], self.right[layer]
                pairs[layer] = Pair(left[:, :columns].contiguous(), right[:columns])
        return pairs


class Spectrum(NamedTuple):
    """U diag(S) V', the parts of a matrix [m, n] by size, in float64."""

    U: Tensor  # [m, k]
    S: Tensor  # [k], descending
    V: Tensor  # [k, n]


def spectrum(matrix: Tensor | Pair, rank: int) -> Spectrum:
    """The `rank` largest singular values, and their vectors.

    The largest entry of each column of U is positive, for signs are free. Of factors
    it takes no more than their columns need. All are NaN where an entry is not finite.
    """
    if isinstance(matrix, Pair):
        Q, R = torch.linalg.qr(matrix.left.double())
        Z, T = torch.linalg.qr(matrix.right.double().mT)
        U, S, V = _svd(R @ T.mT)
        U, V = Q @ U, V @ Z.mT
    else:
        U, S, V = _svd(matrix.double())
    U, S, V = U[:, :rank], S[:rank], V[:rank]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return Spectrum(U * signs, S, V * signs.mT)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if bool(matrix.isfinite().all()):
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        return U, S, V
    m, n = matrix.shape
    shapes = (m, min(m, n)), (min(m, n),), (min(m, n), n)
    U, S, V = (matrix.new_full(shape, torch.nan) for shape in shapes)
    return U, S, V


def best_pair(found: Spectrum, fresh: Tensor, *, is_balanced: bool) -> Pair:
    """Factors of U diag(S) V', in the shape and type of the rows `fresh` [r, n].

    U S and V', or U sqrt(S) and sqrt(S) V' where they are balanced. A direction that is
    not there, or of rounding alone, has no row of its own: it gets one of `fresh`, and
    zeros beside it, so that clients can train it.
    """
    count, rank = len(found.S), len(fresh)
    largest = found.S.max() if count else found.S.sum()
    is_there = ALMOST_ZERO * largest < found.S
    S = torch.where(is_there, found.S, 0)
    on_left, on_right = (S.sqrt(), S.sqrt()) if is_balanced else (S, torch.ones_like(S))
    left = found.U.new_zeros(found.U.shape[0], rank)
    left[:, :count] = found.U * on_left
    right = fresh.clone().double()
    rows = torch.where(is_there[:, None], on_right[:, None] * found.V, right[:count])
    right[:count] = rows
    return Pair(left.to(fresh), right.to(fresh))
