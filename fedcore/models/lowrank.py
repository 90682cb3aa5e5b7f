"""Layers whose weight is a product of small factors: FedPara, pFedPara, low rank.

Hyeon-Woo et al., FedPara, ICLR 2022.

    m, n          outputs and inputs of a linear layer
    O, I, k1, k2  outputs, inputs and sides of a convolution
    R             inner rank
    o             elementwise product

    fedpara   W = W1 o W2        rank up to R^2 for the parameters of rank 2R
                                 (Propositions 1 to 3)
    pfedpara  W = W1 o (W2 + 1)  W1 is shared, W2 personal: a method that keeps the part
                                 "factors" (section 2.3)
    lowrank   W = W1             of the same size: the baseline

    linear       W_i = X_i Y_i'
                 X_i [m, R], Y_i [n, R]
    convolution  W_i[o, i] = sum_ab T_i[a, b] X_i[o, a] Y_i[i, b]   (Proposition 3)
                 T_i [R, R, k1, k2], X_i [O, R], Y_i [I, R]
It is only a model: any method trains, sends and averages the factors. Biases stay
dense.
Choice:  R = round((1 - gamma) r_min + gamma r_max), where r_min = min(ceil sqrt m,
         ceil sqrt n), so that full rank is possible (the authors' code has max), and
         r_max is the largest that does not exceed the dense layer; a layer stays dense
         if r_min exceeds it.
         Factors start normal with the variance that gives W that of He's
         initialisation: with the authors' fan-in of each factor W starts near 0. In
         pFedPara Y2 starts at 0, so that W = W1.
         The Jacobian correction of the supplement is off: no gain in the paper's own
         ablation. Its gradient is of second order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import grad, vjp
from torch.nn import functional

from fedcore import trees
from fedcore.split import Parts, split
from fedcore.types import Params

Form = Literal["dense", "fedpara", "pfedpara", "lowrank"]


class LowRank(BaseModel):
    """The form of a model's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    form: Form = Field(
        "dense",
        description="dense: as the model has them; fedpara; pfedpara; "
        "lowrank = one product of the same size",
    )
    gamma: float = Field(
        0.0,
        ge=0,
        le=1,
        description="ranks: 0 = least that full rank allows, "
        "1 = as many parameters as dense",
    )
    keep: Parts = Field(
        (),
        description="parts of the model that stay dense, by name (output, ...) "
        "or patterns of parameter names",
    )
    tanh: bool = Field(
        False,
        description="fedpara: W = tanh(W1) o tanh(W2), as in the paper's experiments "
        "but the personal ones",
    )
    jacobian: float = Field(
        0.0,
        ge=0,
        description="fedpara: lambda of the Jacobian correction, part of the logged "
        "loss; 1 in the paper's experiments",
    )

    @model_validator(mode="after")
    def _has_extras_in_fedpara_alone(self) -> LowRank:
        for name in ("tanh", "jacobian"):
            if getattr(self, name) and self.form not in ("dense", "fedpara"):
                raise ValueError(
                    f'{name} is of the form "fedpara", not of "{self.form}"; '
                    "leave it out"
                )
        return self


class _Factored(nn.Module):
    """Base of the two layers: the factors by name, and W from them.

    W is formed once a forward pass.
    """

    def __init__(
        self,
        settings: LowRank,
        shapes: Mapping[str, tuple[int, ...]],
        fan_in: int,
        dense: nn.Linear | nn.Conv2d,
    ) -> None:
        super().__init__()
        self.form, self.tanh = settings.form, settings.tanh
        self.change: Tensor | None = None  # added to W, to differentiate by W itself
        deviation = self._deviation(shapes, fan_in)
        dtype, device = dense.weight.dtype, dense.weight.device
        for number in "1" if self.form == "lowrank" else "12":
            for name, shape in shapes.items():
                factor = torch.randn(shape, dtype=dtype, device=device) * deviation
                if self.form == "pfedpara" and name + number == "Y2":
                    factor.zero_()
                self.register_parameter(name + number, nn.Parameter(factor))
        self.bias = dense.bias

    def _deviation(self, shapes: Mapping[str, tuple[int, ...]], fan_in: int) -> float:
        """q, the standard deviation of an entry of a factor at the start."""
        rank = shapes["X"][1]
        pairs = 2 if self.form == "fedpara" else 1
        # Products of factors that are summed in an entry of W_i.
        terms = rank if len(shapes) == 2 else rank**2
        # Var W = (terms q^(2 factors))^pairs = 2 / fan_in
        product = math.sqrt(2 / fan_in) ** (1 / pairs) / math.sqrt(terms)
        deviation: float = product ** (1 / len(shapes))
        return deviation

    def product(self, number: str, factors: Mapping[str, Any] | None = None) -> Tensor:
        """W_i, of these factors or the layer's own."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W, as a dense layer holds it: modules that read weights go on working."""
        W = self.composed(self._parameters)
        return W if self.change is None else W + self.change

    def composed(self, factors: Mapping[str, Any]) -> Tensor:
        """W from these factors."""
        first = self.product("1", factors)
        if self.form == "lowrank":
            return first
        second = self.product("2", factors)
        if self.form == "pfedpara":
            return torch.addcmul(first, first, second)  # W1 o (W2 + 1)
        return first.tanh() * second.tanh() if self.tanh else first * second


class FactoredLinear(_Factored):
    """A linear layer with W [m, n] from factors of rank R."""

    def __init__(self, dense: nn.Linear, rank: int, settings: LowRank) -> None:
        shapes = {"X": (dense.out_features, rank), "Y": (dense.in_features, rank)}
        super().__init__(settings, shapes, dense.in_features, dense)

    def product(self, number: str, factors: Mapping[str, Any] | None = None) -> Tensor:
        p: Mapping[str, Any] = factors or self._parameters
        X, Y = p["X" + number], p["Y" + number]
        W: Tensor = X @ Y.T
        return W

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class FactoredConv2d(_Factored):
    """A convolution with W [O, I, k1, k2] from a core and two factors of rank R."""

    def __init__(self, dense: nn.Conv2d, rank: int, settings: LowRank) -> None:
        outputs, inputs, k1, k2 = dense.weight.shape
        shapes = {"X": (outputs, rank), "Y": (inputs, rank), "T": (rank, rank, k1, k2)}
        super().__init__(settings, shapes, inputs * k1 * k2, dense)
        self.stride = dense.stride
        self.padding = dense.padding
        self.dilation = dense.dilation

    def product(self, number: str, factors: Mapping[str, Any] | None = None) -> Tensor:
        p: Mapping[str, Any] = factors or self._parameters
        X, Y, T = p["X" + number], p["Y" + number], p["T" + number]
        core = torch.tensordot(Y, T, dims=([1], [1]))  # [I, R, k1, k2]
        W: Tensor = torch.tensordot(X, core, dims=([1], [1]))
        return W

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation
        )


def size_of(shape: tuple[int, ...], rank: int, form: Form) -> int:
    """Parameters of a factored weight of this dense shape, [m, n] or [O, I, k1, k2]."""
    outputs, inputs, *kernel = shape
    core = rank * rank * math.prod(kernel) if kernel else 0
    return (1 if form == "lowrank" else 2) * (rank * (outputs + inputs) + core)


def rank_of(shape: tuple[int, ...], gamma: float) -> int:
    """FedPara's R for a weight of this dense shape.

    0 where even the least rank would not be smaller than the dense weight.

    >>> rank_of((64, 64, 3, 3), gamma=0.0), rank_of((2, 2), gamma=0.0)
    (8, 0)
    """
    dense = math.prod(shape)
    smaller_side = min(shape[:2])
    least = math.isqrt(smaller_side - 1) + 1  # ceil of the square root
    if size_of(shape, least, "fedpara") >= dense:
        return 0
    largest = least
    while size_of(shape, largest + 1, "fedpara") <= dense:
        largest += 1
    return round((1 - gamma) * least + gamma * largest)


def lowrank(
    model: nn.Module, settings: LowRank | None = None, *, gamma: float = 0.0
) -> nn.Module:
    """The model with its linear layers and convolutions factored, in place.

    Without settings they become FedPara layers of this gamma; `layers` lists them
    before and after. A layer stays dense that would not get smaller, is in `keep`,
    shares its weight with another, is a convolution in groups or with another padding
    than zeros, or is of a subclass of the two layers, which may do anything with its
    weight. Draws from torch's generator. Raises SettingsError for a part in `keep` that
    the model has not.

    >>> model = lowrank(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2)))
    >>> [name for name, _ in model[0].named_parameters()]
    ['X1', 'Y1', 'X2', 'Y2', 'bias']
    >>> model[0].X1.shape
    torch.Size([100, 10])
    >>> type(model[1]).__name__
    'Linear'
    """
    if settings is None:
        settings = LowRank(form="fedpara", gamma=gamma)
    if settings.form == "dense":
        return model
    _, kept = split(dict(model.named_parameters()), settings.keep)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in list(model.named_modules()):
        if type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        is_kept = f"{name}.weight".removeprefix(".") in kept
        if is_kept or uses[id(layer.weight)] > 1:
            continue
        new = _factored(layer, settings)
        if new is None:
            continue
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def _factored(layer: nn.Module, settings: LowRank) -> _Factored | None:
    """The layer that takes the place of this one; None where it stays."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    shape = tuple(layer.weight.shape)
    rank = rank_of(shape, settings.gamma)
    if rank and settings.form == "lowrank":
        budget = size_of(shape, rank, "fedpara")
        while size_of(shape, rank + 1, "lowrank") <= budget:
            rank += 1
    if rank == 0:
        return None
    if isinstance(layer, nn.Linear):
        return FactoredLinear(layer, rank, settings)
    if layer.groups == 1 and layer.padding_mode == "zeros":
        return FactoredConv2d(layer, rank, settings)
    return None


@dataclass(frozen=True)
class JacobianCorrection:
    """lambda/2 |W' - (W - eta J)|^2, summed over the factored layers.

    From the supplement of the paper. J = dL/dW, and W' is W after a step of plain SGD
    on the factors: they should move W as a step on W itself would.
    """

    model: nn.Module
    strength: float  # lambda
    step: float  # eta

    def __call__(self, loss: Callable[[Params], Tensor], params: Params) -> Tensor:
        """The penalty at these parameters of the model, whose loss is given. 0-d."""
        layers: dict[str, _Factored] = {}
        factors: dict[str, Params] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, _Factored):
                layers[name] = layer
                factors[name] = _factors_of(layer, name, params)
        W = {name: layer.composed(factors[name]) for name, layer in layers.items()}

        def moved(change: Params) -> Tensor:
            """The loss with each W moved by this change."""
            try:
                for name, layer in layers.items():
                    layer.change = change[name]
                return loss(params)
            finally:
                for layer in layers.values():
                    layer.change = None

        J = grad(moved)(trees.zeros_like(W))
        like = next(iter(params.values()))
        total = torch.zeros((), dtype=like.dtype, device=like.device)
        for name, layer in layers.items():
            (slope,) = vjp(layer.composed, factors[name])[1](J[name])
            after = layer.composed(trees.axpy(-self.step, slope, factors[name]))  # W'
            total = total + (after - (W[name] - self.step * J[name])).square().sum()
        return self.strength / 2 * total


def _factors_of(layer: _Factored, name: str, params: Params) -> Params:
    """The factors of the layer of this name among the parameters of a model."""
    factors = {}
    for factor, _ in layer.named_parameters():
        if factor != "bias":
            factors[factor] = params[f"{name}.{factor}".removeprefix(".")]
    return factors


class Layer(NamedTuple):
    """A layer before and after."""

    name: str
    dense: int  # parameters
    size: int  # parameters
    rank: int | None  # R; None where it stayed dense


def layers(dense: nn.Module, factored: nn.Module) -> list[Layer]:
    """Every layer that holds parameters of its own, in both forms of the model.

    >>> import copy
    >>> dense = nn.Sequential(nn.Linear(100, 100))
    >>> layers(dense, lowrank(copy.deepcopy(dense)))
    [Layer(name='0', dense=10100, size=4100, rank=10)]
    """
    sizes = _sizes(factored)
    pairs = []
    for name, number in _sizes(dense).items():
        layer = factored.get_submodule(name)
        rank = None
        if isinstance(layer, _Factored) and isinstance(layer.X1, Tensor):
            rank = layer.X1.shape[1]
        pairs.append(Layer(name or "(the model itself)", number, sizes[name], rank))
    return pairs


def _sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of the layers that have any of their own."""
    sizes = {}
    for name, layer in model.named_modules():
        number = sum(p.numel() for p in layer.parameters(recurse=False))
        if number:
            sizes[name] = number
    return sizes
