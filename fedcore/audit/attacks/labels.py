"""Labels from the output layer: how many examples of each class a client has.

    k_i  examples of class i   N  their number   p_i  mean softmax output of class i
    b    bias of the output layer
    G    gradient of the mean cross-entropy in b:  G_i = p_i - k_i / N   (exact)
Counts (default):  k_i = N (p_i - (b0 - bT)_i / (eta T)), p taken over noise images and
    averaged over w0 and wT; clipped at 0, scaled to N, rounded by largest remainders.
    Exact for one step on all examples with the true p. After DLFA's averaged variant
    (Dimitrov et al., TMLR 2022) with the bias in place of the weights.
Sign (Zhao et al. 2020; without eta T):  a class is there where (b0 - bT)_i < 0; N is
    spread over those by size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.audit.observe import Observation
from fedcore.rng import seed_of
from fedcore.types import Params

PROBES = 3000  # noise images for the mean softmax output, as in DLFA
AT_ONCE = 500  # of them in one batch


def recover(seen: Observation, seed: int = 0) -> Tensor:
    """The labels of the client's examples in ascending order, int64 [M N].

    Labels that the adversary is granted are returned as they are, in order. Raises
    ValueError, with the reason, where the observation allows no recovery.
    """
    if seen.labels is not None:
        return seen.labels.sort().values
    counts = count(seen, seed)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def count(seen: Observation, seed: int = 0) -> Tensor:
    """k, int64 [classes]; sums to M N.

    Raises ValueError, with the reason, where the observation allows no recovery.
    """
    change = -bias_of(seen).double()  # b0 - bT
    n, lr = seen.total_examples, seen.public.lr
    steps = seen.public.local_steps(seen.num_examples)
    if lr is None or steps is None:
        present = (-change).clamp(min=0)
        return whole(present if present.any() else torch.ones_like(present), n)
    p = 0.5 * (mean_output(seen, seen.w0, seed) + mean_output(seen, seen.wT, seed))
    return whole(n * (p - change / (lr * steps)), n)


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
    """Mean softmax output over noise images, float64 [classes]."""
    draw = torch.Generator().manual_seed(seed_of(seed, "audit probes"))
    like = next(iter(params.values()))
    total = torch.zeros(seen.public.outputs, dtype=torch.float64)
    for start in range(0, PROBES, AT_ONCE):
        shape = (min(AT_ONCE, PROBES - start), *seen.public.shape)
        x = torch.randn(shape, generator=draw, dtype=like.dtype)
        total += seen.public.predict(params, x).softmax(1).double().sum(0)
    return total / PROBES


def whole(counts: Tensor, n: int) -> Tensor:
    """Counts as whole numbers that sum to n, int64.

    Clipped at 0, scaled, and rounded by largest remainders; n spread evenly where
    nothing is left.
    """
    counts = counts.double().clamp(min=0)
    if counts.sum() > 0:
        counts = counts * n / counts.sum()
    else:
        counts = torch.full_like(counts, n / len(counts))
    rounded = counts.floor()
    short = n - int(rounded.sum())
    order = (counts - rounded).argsort(descending=True, stable=True)[:short]
    rounded[order] += 1
    return rounded.long()
