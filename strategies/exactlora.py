"""FedEx-LoRA - an exact mean of adapters (Singhal et al., ACL 2025); and FLoRA,
FlexLoRA and HetLoRA, for clients of several ranks.

W   [m, n] weight of a layer         A_i [r_i, n], B_i [m, r_i]  factors of client i
s   scale of the layer's adapter     w_i  n_i / sum of n_j, its share of the examples
P   sum_i w_i B_i A_i, the mean of the products: the update that clients mean
R   P - Bbar Abar = sum_i w_i (B_i - Bbar)(A_i - Abar), lost by a mean of the factors

    fedex     Singhal et al., ACL 2025: A <- Abar,  B <- Bbar,  W <- W + s R
    flora     Wang et al., NeurIPS 2024: W <- W + s P; every round starts from an A that
              is drawn anew, and B = 0
    flexlora  Bai et al., NeurIPS 2024: U S V' = P;  B <- U S,  A <- V'; client i gets
              the first r_i columns and rows
    hetlora   Cho et al., EMNLP 2024: A, B <- mean of A_i, of B_i, with zeros up to rank
              r, weighted by |B_i A_i|; client i gets the first r_i rows and columns

The change of W is `lora_change` beside the parameters, so that W itself keeps its
bytes. It goes down to everybody, since a client that missed a round has none of it: by
the factors of all rounds so far while these are fewer numbers than m n, whole
afterwards. R has rank (K - 1) r for K clients, one r less than P.
Choice:  A of flora is the same for all clients, of the key (seed, "lora", round).
         hetlora weighs by the norm of all layers together, and does not prune ranks:
         its self-pruning is left out. flexlora fixes the signs of singular vectors; a
         direction that P has not gets a row of A that is drawn, and zeros in B.
         Parameters that are trained beside the factors (a head): their mean, by
         examples. s is that of the model, whatever r_i.
Reduces: fedex to FedIT (FedAvg of the factors) for one client, and where all send the
         same; hetlora to it for equal ranks and weights = "examples".
Not under a rule or a secure sum: P needs every client's factors, and a robust rule on
factors is not invariant to (B G, G^-1 A).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.factors import (
    Change,
    Pair,
    Products,
    best_pair,
    cut,
    fresh_rows,
    layers_of,
    name_of,
    norms,
    padded,
    pair_of,
    spectrum,
)
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.models.lora import scales
from fedcore.reports import Reports, RunningSum
from fedcore.rng import rng
from fedcore.task import Task
from fedcore.types import Batches, Params, Stateless

CHANGE = "lora_change"
MOVING = ("fedex", "flora")  # forms that move W


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    form: Literal["fedex", "flora", "flexlora", "hetlora"] = Field(
        "fedex", description="what the server makes of the clients' factors"
    )
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="flora, flexlora, hetlora: r_i, the ranks that clients have, each "
        "drawn once from this list; default: the rank of the model's adapters",
    )
    weights: Literal["examples", "norm"] = Field(
        "norm", description="hetlora: w_i by examples, or by the norm of B_i A_i"
    )
    balanced: bool = Field(
        False, description="flexlora: B = U sqrt(S) and A = sqrt(S) V'"
    )

    @model_validator(mode="after")
    def _fits_the_form(self) -> Settings:
        if self.ranks and self.form == "fedex":
            raise ValueError(
                'ranks are of the forms "flora", "flexlora" and "hetlora": the means '
                'of "fedex" need factors of one rank; leave them out'
            )
        if self.weights != "norm" and self.form != "hetlora":
            raise ValueError(
                f'weights = "{self.weights}" is of the form "hetlora", not of '
                f'"{self.form}"; leave it out'
            )
        if self.balanced and self.form != "flexlora":
            raise ValueError(
                f'balanced is of the form "flexlora", not of "{self.form}"; '
                "leave it out"
            )
        return self


class Server(NamedTuple):
    params: Params  # factors, other trained parameters, lora_change [m, n]
    change: Change  # the same change; of no layer where W stays


class Down(NamedTuple):
    params: Params  # factors, of the client's rank, and other trained parameters
    whole: Params  # [m, n] by layer: a change that is sent whole
    left: Params  # [m, q] by layer, and
    right: Params  # [q, n]: a change that is sent as factors


class Up(NamedTuple):
    delta: Params  # change of the factors and the other parameters
    loss: Tensor  # mean training loss, for the log


class Answers(NamedTuple):
    """Reports of k clients of one rank."""

    reports: Reports
    sent: Params  # what they were sent

    def moves(self, layer: str) -> Pair:
        """B_i - B [k, m, r] and A_i - A [k, r, n], from what the clients were sent."""
        return pair_of(self.reports.up.delta, layer)

    def factors(self, layer: str) -> Pair:
        """B_i [k, m, r] and A_i [k, r, n]."""
        B, A = pair_of(self.sent, layer)
        left, right = self.moves(layer)
        return Pair(B + left, A + right)

    def others(self) -> Reports:
        """The same reports, of the parameters beside the factors alone."""
        names = _beside(self.sent)
        delta = {name: self.reports.up.delta[name] for name in names}
        return self.reports._replace(up=delta)


Update = Pair | Tensor
"""A matrix [m, n], as factors or whole."""


class ExactLoRA(Method[Settings]):
    needs_updates = True

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Down, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        change = _change(down)
        y, _, loss = local_sgd(
            task.loss, down.params, batches, self.s.local_lr, fixed=change
        )
        return Up(trees.sub_(y, down.params), loss), state

    def exchanged(self, down: Down, up: Up) -> tuple[Params, Params]:
        return {**down.params, **_change(down)}, up.delta

    # The server

    def init_server(self, params: Params, population: int) -> Server:
        layers = layers_of(params) if self.s.form in MOVING else []
        whole: Params = {}
        for layer in layers:
            B, A = pair_of(params, layer)
            whole[name_of(layer, CHANGE)] = A.new_zeros(len(B), A.shape[1])
        return Server({**params, **whole}, Change.none(params, layers))

    def round(self, server: Server, r: Round) -> Server:
        forms = {
            "fedex": self._fedex,
            "flora": self._flora,
            "flexlora": self._flexlora,
            "hetlora": self._hetlora,
        }
        return forms[self.s.form](server, r)

    def _fedex(self, server: Server, r: Round) -> Server:
        sent, total = _trained(server.params), RunningSum()
        rank = _rank(sent)
        products = _products(server.change, (len(r.cohort) - 1) * rank)
        for answers in self._answers(server, sent, r):
            count = answers.reports.num_examples
            total.add(answers.reports._replace(up=answers.reports.up.delta), count)
            for layer, product in products.items():
                # By the moves: R is the same, and nothing large cancels.
                product.add(answers.moves(layer), count)
        mean = _value(total)
        params = trees.add(sent, mean)  # A <- Abar, B <- Bbar
        lost: dict[str, Update] = {}  # R
        for layer, product in products.items():
            if product.keeps_factors:
                lost[layer] = product.centred_pair()
            else:
                lost[layer] = product.mean() - pair_of(mean, layer).product
        self._log_lost(r, params, lost)
        return _merged(server, params, lost, r)  # W <- W + s R

    def _flora(self, server: Server, r: Round) -> Server:
        trained, total = _trained(server.params), RunningSum()
        groups = self._groups(r, _rank(trained))
        products = _products(
            server.change, sum(rank * len(clients) for rank, clients in groups)
        )
        sent = self._drawn_anew(trained, r)
        for answers in self._answers(server, sent, r):
            count = answers.reports.num_examples
            total.add(answers.others(), count)
            for layer, product in products.items():
                product.add(answers.factors(layer), count)
        mean = _value(total)
        updates: dict[str, Update] = {}  # P
        for layer, product in products.items():
            is_pair = product.keeps_factors
            updates[layer] = product.pair() if is_pair else product.mean()
        return _merged(server, _moved(trained, mean), updates, r)  # W <- W + s P

    def _drawn_anew(self, params: Params, r: Round) -> Params:
        """A of this round, the same for all clients, and B = 0."""
        draw, drawn = rng(r.seed, "lora", r.t), dict(params)
        for layer in layers_of(params):
            B, A = pair_of(params, layer)
            drawn[name_of(layer, "lora_A")] = fresh_rows(tuple(A.shape), draw).to(A)
            drawn[name_of(layer, "lora_B")] = torch.zeros_like(B)
        return drawn

    def _flexlora(self, server: Server, r: Round) -> Server:
        sent, total = server.params, RunningSum()
        rank, layers = _rank(sent), layers_of(sent)
        columns = sum(rank * len(clients) for rank, clients in self._groups(r, rank))
        products: dict[str, Products] = {}
        for layer in layers:
            B, A = pair_of(sent, layer)
            is_small = columns <= min(len(B), A.shape[1])
            products[layer] = Products(keeps_factors=is_small)
        for answers in self._answers(server, sent, r):
            count = answers.reports.num_examples
            total.add(answers.others(), count)
            for layer, product in products.items():
                product.add(answers.factors(layer), count)
        params, lost = _moved(sent, _value(total)), dict[str, Update]()
        draw = rng(r.seed, "lora", r.t)
        for layer, product in products.items():
            P = product.pair() if product.keeps_factors else product.mean()
            A = pair_of(sent, layer).right
            fresh = fresh_rows(tuple(A.shape), draw).to(A)
            best = best_pair(spectrum(P, rank), fresh, is_balanced=self.s.balanced)
            _put(params, layer, best)
            lost[layer] = product.mean() - best.product
        self._log_lost(r, params, lost)
        return server._replace(params=params)

    def _hetlora(self, server: Server, r: Round) -> Server:
        sent, total, weighted = server.params, RunningSum(), RunningSum()
        rank, layers = _rank(sent), layers_of(sent)
        for answers in self._answers(server, sent, r):
            count = answers.reports.num_examples
            total.add(answers.others(), count)
            factors = {layer: answers.factors(layer) for layer in layers}
            weights = count
            if self.s.weights == "norm":
                squares = [norms(pair) for pair in factors.values()]
                weights = torch.stack(squares).sum(0).sqrt()
            whole: Params = {}
            for layer, pair in factors.items():
                _put(whole, layer, padded(pair, rank))
            weighted.add(answers.reports._replace(up=whole), weights)
        params = _moved(sent, _value(total))
        mean = weighted.mean(dict)
        if bool(mean.weight > 0):  # else all products are zero
            params |= mean.value
        return server._replace(params=params)

    def _answers(self, server: Server, sent: Params, r: Round) -> Iterator[Answers]:
        """The reports on `sent`, which goes to each client in its own rank."""
        pairs = server.change.pairs()
        left = {layer: pair.left for layer, pair in pairs.items()}
        right = {layer: pair.right for layer, pair in pairs.items()}
        whole: Params = {}
        for layer in server.change.used:
            if layer not in pairs:
                whole[layer] = server.params[name_of(layer, CHANGE)]
        for rank, clients in self._groups(r, _rank(sent)):
            down = Down(cut(sent, rank), whole, left, right)
            for reports in r.each(self.train, clients, down):
                yield Answers(reports, down.params)

    def _groups(self, r: Round, rank: int) -> list[tuple[int, Tensor]]:
        """(rank, ids of the cohort's clients of this rank); `rank` is the model's."""
        if not self.s.ranks:
            return [(rank, r.cohort)]
        clients: dict[int, list[int]] = {}
        for client in r.cohort.tolist():
            place = rng(r.seed, "lora rank", client).integers(len(self.s.ranks))
            clients.setdefault(self.s.ranks[place], []).append(client)
        return [(rank, torch.tensor(clients[rank])) for rank in sorted(clients)]

    def _log_lost(self, r: Round, params: Params, lost: dict[str, Update]) -> None:
        """Log |R| / |P|, over all layers; the factors hold P - R."""
        squares = [0.0, 0.0]
        for layer, update in lost.items():
            R = update.product if isinstance(update, Pair) else update
            P = pair_of(params, layer).product + R
            squares[0] += R.double().square().sum().item()
            squares[1] += P.double().square().sum().item()
        r.log["residual"] = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0

    # Before the run

    def refuses(self, setting: Setting) -> str | None:
        products = "it takes the product of every client's factors"
        if setting == "buffered":
            return f"{products}, which start from the same ones"
        if setting == "secure":
            return products
        if setting == "rule":
            return f"{products}, and their robust mean depends on how it is written"
        if setting == "moments" and self.s.form != "fedex":
            return (
                "its clients begin each round with other factors than those that the "
                'moments are of (method.form = "fedex" alone keeps them)'
            )
        return super().refuses(setting)

    def check(self, task: Task, cohort: int) -> None:
        params = task.init_params()
        layers = layers_of(params)
        if not layers:
            raise SettingsError(
                'method.name = "exactlora": no layer of the model trains both lora_A '
                "and lora_B; give it adapters (lora.rank) and leave lora.freeze out"
            )
        if any(name.endswith("lora_magnitude_vector") for name in params):
            raise SettingsError(
                'method.name = "exactlora": with lora.form = "dora" the weight is no '
                'sum of products of factors; use "lora" or "rslora"'
            )
        rank = _rank(params)
        if max(self.s.ranks, default=0) > rank:
            raise SettingsError(
                f"method.ranks = {list(self.s.ranks)}: the model's adapters are of "
                f"rank {rank}; raise lora.rank to the largest"
            )
        if self.s.form in MOVING:
            self._check_weights(task, layers)
        if self.s.form == "flora":
            _refuse_products(params, layers)

    def _check_weights(self, task: Task, layers: list[str]) -> None:
        """Refuse a model whose layers take no change of their weights."""
        buffers = dict(task.model.named_buffers())
        scale = scales(task.model)
        for layer in layers:
            if name_of(layer, CHANGE) not in buffers or layer not in scale:
                raise SettingsError(
                    f'method.form = "{self.s.form}": the layer "{layer}" takes no '
                    "change of its weight (lora_change); use adapters of [lora]"
                )


def _change(down: Down) -> Params:
    """The change of W that a client is sent, [m, n] by its name in the model."""
    change: Params = {}
    for layer, whole in down.whole.items():
        change[name_of(layer, CHANGE)] = whole
    for layer, left in down.left.items():
        change[name_of(layer, CHANGE)] = left @ down.right[layer]
    return change


def _refuse_products(params: Params, layers: list[str]) -> None:
    """Refuse factors that flora, which begins with B = 0, would throw away."""
    for layer in layers:
        if bool(pair_of(params, layer).left.any()):
            raise SettingsError(
                f'method.form = "flora": the start has a product B A in "{layer}", '
                "which the first round would throw away; start without `initial`, or "
                'use "fedex"'
            )


def _trained(params: Params) -> Params:
    """What clients train: all but the changes of weights."""
    trained: Params = {}
    for name, value in params.items():
        if name.rpartition(".")[2] != CHANGE:
            trained[name] = value
    return trained


def _beside(params: Params) -> list[str]:
    """Names of the parameters beside the factors of layers that have both."""
    factors = set()
    for layer in layers_of(params):
        factors |= {name_of(layer, "lora_A"), name_of(layer, "lora_B")}
    return [name for name in params if name not in factors]


def _rank(params: Params) -> int:
    return len(pair_of(params, layers_of(params)[0]).right)


def _put(params: Params, layer: str, pair: Pair) -> None:
    params[name_of(layer, "lora_B")], params[name_of(layer, "lora_A")] = pair


def _value(total: RunningSum) -> Params:
    """The mean. Raises TooFewReports where nobody reported."""
    mean: Params = total.mean(dict).value
    return mean


def _moved(params: Params, mean: Params) -> Params:
    """The parameters after these changes of some of them."""
    moved = {name: params[name] + change for name, change in mean.items()}
    return {**params, **moved}


def _products(change: Change, columns: int) -> dict[str, Products]:
    """Products by layer, kept as factors where so many columns can travel."""
    products: dict[str, Products] = {}
    for layer in change.used:
        products[layer] = Products(keeps_factors=change.has_room(layer, columns))
    return products


def _merged(
    server: Server, params: Params, updates: dict[str, Update], r: Round
) -> Server:
    """The server with these parameters, and weights changed by s times the updates."""
    scale, change, merged = scales(r.task.model), server.change, dict(params)
    for layer, update in updates.items():
        name = name_of(layer, CHANGE)
        pair: Pair | None = None
        if isinstance(update, Pair):
            pair = Pair(scale[layer] * update.left, update.right)
            added = pair.product
        else:
            added = scale[layer] * update
        merged[name] = server.params[name] + added
        change = change.plus(layer, pair)
    return Server(merged, change)
