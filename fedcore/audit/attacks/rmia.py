"""RMIA: membership inference with reference models (Zarifzadeh et al., ICML 2024).

    w        parameters at the end of the client's training
    w'       those of a reference: the same training, from the same start, on public
             examples instead of the client's
    Pr(x|w)  exp(-loss) of an example x
    Pr(x)    1/2 ((1 + a) mean of Pr(x|w') + 1 - a), over the references that did not
             train on x; the mean over those that did is guessed by a (their offline
             form)
    LR(x, z) = (Pr(x|w) / Pr(x)) / (Pr(z|w) / Pr(z)),   z a public example
    score    the share of examples z with LR(x, z) >= gamma

Choices: a = 0.3 and gamma = 1; one round of training moves a model little, so that few
         ratios reach the paper's gamma = 2. All candidates meet the same z, so that
         beyond the last z the ratio itself orders them.
         References and z have the candidates' mix of classes, where there are classes:
         a model that learned them is no better known by its examples for that.
Knows:   what other attacks know (start, end, settings of the local training) and public
         examples of the same kind. The clip of an update is taken as known: references
         are as long as the update that was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from fedcore import trees
from fedcore.audit.attacks.membership import losses
from fedcore.audit.observe import Observation
from fedcore.rng import seed_of
from fedcore.types import Params, Tree

__all__ = ["Rows", "reference_scores"]

OFFLINE = 0.3  # a
GAMMA = 1.0
POPULATION = 500  # public examples z, at most
MOST_STEPS = 20_000  # of all reference models of one exchange
TIE = 1e-6  # far below one z of POPULATION


class Rows(NamedTuple):
    """Public examples, or candidates without a mark which of them are members."""

    x: Tree  # [n, ...]
    y: Tensor  # [n, ...]


class _Likelihoods(NamedTuple):
    """Logarithms, of candidates and then of z, float64."""

    target: Tensor  # [n] of Pr(x|w)
    references: Tensor  # [m, n] of Pr(x|w')
    is_out: Tensor  # [m, n] whether the reference did not train on the example


def reference_scores(
    seen: Sequence[Observation],
    x: Tree,
    y: Tensor,
    public: Rows,
    wanted: int,
    seed: int,
) -> Tensor | str:
    """One score a candidate, float64 [n], higher for members; or why there is none.

    `seen` are one client's exchanges in one or more rounds, `wanted` the number of
    reference models for each.
    """
    scores, candidates = [], Rows(x, y)
    for exchange in seen:
        pool = Pool.of(exchange, candidates, public)
        steps = exchange.public.local_steps(exchange.num_examples)
        if exchange.public.lr is None or steps is None:
            return "the client's step size, or its number of steps, is not known"
        if pool.size == 0:
            return "there are no public examples to train reference models on"
        number = min(wanted, MOST_STEPS // max(steps * exchange.clients, 1))
        if number == 0:
            return (
                f"one reference model takes {steps * exchange.clients:,} steps, more "
                f"than {MOST_STEPS:,}"
            )
        key = seed_of(seed, "rmia", exchange.round, exchange.client)
        draw = torch.Generator().manual_seed(key)
        scores.append(_scores(exchange, candidates, pool, number, draw))
    return torch.stack(scores).mean(0)


class Pool(NamedTuple):
    """Public examples, of which references get their own."""

    examples: Rows
    weights: Tensor  # [n] float64, of a draw with the candidates' mix of classes
    size: int  # of one reference's share: as the client has, at most half

    @classmethod
    def of(cls, seen: Observation, candidates: Rows, public: Rows) -> Pool:
        """The pool of one exchange."""
        weights = torch.ones(len(public.y), dtype=torch.float64)
        classes = seen.public.classes
        if classes is not None and len(public.y):
            wanted = torch.bincount(candidates.y, minlength=classes).double()
            there = torch.bincount(public.y, minlength=classes).clamp(min=1)
            weights = (wanted / there)[public.y]
        rows = math.ceil(seen.num_examples / (seen.public.length or 1)) * seen.clients
        return cls(public, weights, min(rows, int((weights > 0).sum()) // 2))

    def drawn(self, number: int, draw: torch.Generator) -> Rows:
        """So many of the examples, each once."""
        rows = torch.multinomial(self.weights, number, generator=draw)
        return Rows(*trees.at(tuple(self.examples), rows))

    def population(self, draw: torch.Generator) -> Rows:
        """The examples z."""
        return self.drawn(min(POPULATION, int((self.weights > 0).sum())), draw)


def _scores(
    seen: Observation,
    candidates: Rows,
    pool: Pool,
    number: int,
    draw: torch.Generator,
) -> Tensor:
    """The scores of one exchange, float64 [n]."""
    z = pool.population(draw)
    everything = Rows(
        trees.map(lambda a, b: torch.cat([a, b]), candidates.x, z.x),
        torch.cat([candidates.y, z.y]),
    )
    found = _likelihoods(seen, everything, pool, number, draw)
    ratios = found.target - _prior(found)
    n = len(candidates.y)
    return _shares(ratios[:n], ratios[n:])


def _shares(candidates: Tensor, population: Tensor) -> Tensor:
    """The share of z that each candidate beats, from the logarithms of ratios."""
    ordered = population.sort().values
    # LR(x, z) >= gamma: the ratio of z is at most that of x over gamma.
    reached = candidates - math.log(GAMMA)
    places = torch.searchsorted(ordered, reached, right=True)
    return places.double() / len(ordered) + TIE * candidates / (1 + candidates.abs())


def _prior(found: _Likelihoods) -> Tensor:
    """The logarithm of Pr(x), [n]."""
    is_out = found.is_out | ~found.is_out.any(0)  # of an example that all trained on
    outside = found.references.masked_fill(~is_out, -math.inf)
    mean = (outside.logsumexp(0) - is_out.sum(0).log()).exp()
    return (((1 + OFFLINE) * mean + 1 - OFFLINE) / 2).log()


def _likelihoods(
    seen: Observation,
    examples: Rows,
    pool: Pool,
    number: int,
    draw: torch.Generator,
) -> _Likelihoods:
    keys = list(_keys(examples))
    target = -losses(seen, seen.wT, *examples)
    references, is_out = [], []
    for _ in range(number):
        trained_on = pool.drawn(pool.size, draw)
        end = _reference(seen, trained_on, draw)
        references.append(-losses(seen, end, *examples))
        known = set(_keys(trained_on))
        is_out.append(torch.tensor([key not in known for key in keys]))
    return _Likelihoods(target, torch.stack(references), torch.stack(is_out))


def _keys(examples: Rows) -> Iterator[bytes]:
    """The bytes of each example, by which the same one is known again."""
    leaves = trees.leaves(tuple(examples))
    for row in range(len(examples.y)):
        yield b"".join(leaf[row].numpy().tobytes() for leaf in leaves)


def _reference(seen: Observation, rows: Rows, draw: torch.Generator) -> Params:
    """Parameters at the end of the training of M clients on these rows, in mean."""
    parts = torch.arange(len(rows.y)).tensor_split(seen.clients)
    ends = []
    for part in parts:
        own = part if len(part) else torch.arange(len(rows.y))
        ends.append(_trained(seen, Rows(*trees.at(tuple(rows), own)), draw))
    moved: Params = {}
    for name in seen.delta:
        mean = torch.stack([end[name] for end in ends]).mean(0)
        moved[name] = mean - seen.w0[name]
    if seen.public.clipped:
        moved = _as_long_as(moved, seen.delta)
    end = dict(seen.w0)
    for name, change in moved.items():
        end[name] = end[name] + change
    return end


def _as_long_as(delta: Params, observed: Params) -> Params:
    """The update, at most as long as the one that was seen."""
    bound = trees.dot(observed, observed).sqrt()
    norm = trees.dot(delta, delta).sqrt().clamp(min=1e-30)
    scaled: Params = trees.scale(delta, (bound / norm).clamp(max=1))
    return scaled


def _trained(seen: Observation, rows: Rows, draw: torch.Generator) -> Params:
    """Parameters after the local training on these rows, by plain SGD from w0."""
    public = seen.public
    assert public.lr is not None
    names = [name for name, _ in public.model.named_parameters() if name in seen.delta]

    def loss(moving: Params, x: Tree, y: Tensor) -> Tensor:
        return public.loss(public.predict({**seen.w0, **moving}, x), y).mean()

    w: Params = {name: seen.w0[name] for name in names}
    for batch in _batches(seen, len(rows.y), draw):
        slope = grad(loss)(w, *trees.at(tuple(rows), batch))
        w = trees.axpy(-public.lr, slope, w)
    return {**seen.w0, **w}


def _batches(seen: Observation, n: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of each step: shuffled passes over n rows."""
    public = seen.public
    size = public.batch_size or n
    per_pass = math.ceil(n / size)
    steps = public.steps
    if steps is None:
        steps = (public.epochs or 1) * per_pass
    for step in range(steps):
        place = step % per_pass
        if place == 0:
            order = torch.randperm(n, generator=draw)
        yield order[place * size : (place + 1) * size]
