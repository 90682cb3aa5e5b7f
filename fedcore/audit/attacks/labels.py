"""Labels from the output layer: how many examples of each class a client has.

k_i  examples of class i   N  their number
p_i  mean softmax output of class i   b  bias of the output layer
G    gradient of the mean cross-entropy with respect to b:  G_i = p_i - k_i / N, exact
Counts (default):  k_i = N (p_i - (b0 - bT)_i / (eta T)), p taken over noise images and
averaged over w0 and wT; clipped at 0, scaled to N, rounded by largest remainders. Exact
for one step on all examples with the true p. After DLFA's averaged variant (Dimitrov et
al., TMLR 2022) with the bias in place of the weights.
Sign (Zhao et al. 2020; without eta T):  a class is there where (b0 - bT)_i < 0; N is
spread over those by size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit.observe import Observation
from fedcore.rng import seed_of
from fedcore.types import Params

PROBES = 3000  # noise images for the mean softmax output, as in DLFA
PROBES_AT_ONCE = 500


def recover(seen: Observation, seed: int = 0) -> Tensor:
    """The labels of the client's examples in ascending order, int64 [M N].

    Those given, where they are. Raises ValueError, with the reason, where the
    observation does not allow it.
    """
    if seen.labels is not None:
        return seen.labels.sort().values
    counts = count(seen, seed)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def count(seen: Observation, seed: int = 0) -> Tensor:
    """k, int64 [classes]; sums to M N.

    Raises ValueError, with the reason, where the observation does not allow it.
    """
    change = -bias_of(seen).double()  # b0 - bT
    lr, steps = seen.public.lr, seen.public.local_steps(seen.num_examples)
    if lr is None or steps is None:
        present = (-change).clamp(min=0)
        if not present.any():
            present = torch.ones_like(present)
        return whole(present, seen.total_examples)
    before = mean_output(seen, seen.w0, seed)
    after = mean_output(seen, seen.wT, seed)
    p = 0.5 * (before + after)
    return whole(seen.total_examples * (p - change / (lr * steps)), seen.total_examples)


def bias_of(seen: Observation) -> Tensor:
    """The change of the output layer's bias, [classes].

    Raises ValueError where it was not sent.
    """
    classes = seen.public.classes
    if classes is None:
        raise ValueError("the targets are no classes")
    last = list(seen.w0)[-1]
    if not last.endswith("bias") or seen.w0[last].shape != (classes,):
        raise ValueError(
            f'the model ends with "{last}", expected the bias of an output layer with '
            f"{classes} classes"
        )
    if last not in seen.delta:
        raise ValueError(f'the output layer\'s "{last}" never left the client')
    return seen.delta[last]


@torch.no_grad()
def mean_output(seen: Observation, params: Params, seed: int) -> Tensor:
    """Mean softmax output over noise images, float64 [classes].

    Over public examples where noise may be no input. Raises ValueError where there are
    none of them.
    """
    if seen.public.examples is not None:
        return _mean_over_examples(seen, params)
    draw = torch.Generator().manual_seed(seed_of(seed, "audit probes"))
    like = next(iter(params.values()))
    total = torch.zeros(seen.public.outputs, dtype=torch.float64)
    for start in range(0, PROBES, PROBES_AT_ONCE):
        shape = (min(PROBES_AT_ONCE, PROBES - start), *seen.public.shape)
        x = torch.randn(shape, generator=draw, dtype=like.dtype)
        total += seen.public.predict(params, x).softmax(1).double().sum(0)
    return total / PROBES


@torch.no_grad()
def _mean_over_examples(seen: Observation, params: Params) -> Tensor:
    number = len(next(iter(trees.leaves(seen.public.examples)), ()))
    if number == 0:
        raise ValueError("there is no public example to estimate the mean output on")
    total = torch.zeros(seen.public.outputs, dtype=torch.float64)
    for start in range(0, number, PROBES_AT_ONCE):
        rows = slice(start, start + PROBES_AT_ONCE)
        x = trees.at(seen.public.examples, rows)
        total += seen.public.predict(params, x).softmax(1).double().sum(0)
    return total / number


def whole(counts: Tensor, total: int) -> Tensor:
    """Whole numbers that sum to `total`, rounded by largest remainders; int64.

    Negative counts become 0, and the others are scaled to that sum first.
    """
    counts = counts.double().clamp(min=0)
    if counts.sum() > 0:
        counts = counts * total / counts.sum()
    else:
        counts = torch.full_like(counts, total / len(counts))
    rounded = counts.floor()
    short = total - int(rounded.sum())
    order = (counts - rounded).argsort(descending=True, stable=True)
    rounded[order[:short]] += 1
    return rounded.long()
