"""Membership inference: whether an example was in a client's training data.

It scores examples by what the server saw of the client over rounds.
w_t  the start of the client in a captured round   w_t'  its end   l  loss of one (x, y)
    loss drop   mean over rounds of l(w_t) - l(w_t'): training lowers the loss of the
                examples that it saw (after Yeom et al., IEEE CSF 2018)
    gradient    mean over rounds of the cosine of w_t - w_t' and of l's gradient at w_t
    base        of text: mean over rounds of l(w) - l(w_t'), w the parameters as they
                were published, a model that never saw the client (after Carlini et al.,
                USENIX Security 2021, who compare with another model's perplexity)
Higher: rather a member. The candidates come without a mark which of them are members.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedcore import trees
from fedcore.audit.attacks.base import gradient_like
from fedcore.audit.observe import Observation
from fedcore.types import Params, Tree

CHUNK = 64  # gradients held at once


def scores(seen: Sequence[Observation], x: Tree, y: Tensor) -> dict[str, Tensor]:
    """One score a candidate by name, float64 [n].

    `seen` are one client's exchanges in one or more rounds.
    """
    drops, cosines = [], []
    for exchange in seen:
        before = losses(exchange, exchange.w0, x, y)
        after = losses(exchange, exchange.wT, x, y)
        drops.append(before - after)
        cosines.append(gradient_cosines(exchange, x, y))
    found = {
        "loss_drop": torch.stack(drops).mean(0),
        "gradient": torch.stack(cosines).mean(0),
    }
    if seen[-1].public.vocabulary is not None:
        # In the first round they are the client's start, and say what loss_drop says.
        published = losses(seen[-1], {}, x, y)
        ends = [losses(exchange, exchange.wT, x, y) for exchange in seen]
        found["base"] = published - torch.stack(ends).mean(0)
    return found


@torch.no_grad()
def losses(seen: Observation, params: Params, x: Tree, y: Tensor) -> Tensor:
    """The loss of each candidate, float64 [n]."""
    return seen.public.loss(seen.public.predict(params, x), y).double()


def gradient_cosines(seen: Observation, x: Tree, y: Tensor) -> Tensor:
    """Cosine of the update, gradient-like, and each candidate's gradient at w0.

    float64 [n].
    """
    D = gradient_like(seen)
    start = {name: seen.w0[name] for name in D}

    def loss(moving: Params, x: Tree, y: Tensor) -> Tensor:
        outputs = seen.public.predict({**seen.w0, **moving}, alone(x))
        return seen.public.loss(outputs, y[None])[0]

    def products(x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        g = grad(loss)(start, x, y)
        return trees.dot(D, g), trees.dot(g, g)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            inner, squares = vmap(products, chunk_size=CHUNK)(x, y)
    except RuntimeError:  # the model has something that vmap cannot do
        pairs = [products(trees.at(x, i), y[i]) for i in range(len(y))]
        inner, squares = trees.stack(pairs)
    norms = (trees.dot(D, D) * squares).double().sqrt().clamp(min=1e-30)
    cosines: Tensor = inner.double() / norms
    return cosines


def alone(x: Tree) -> Tree:
    """One example as a batch of one."""
    return trees.map(lambda leaf: leaf[None], x)
