"""Shared and personal parameters: a total, disjoint split of a model.

By parts of the model, or by patterns of parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from fedcore.errors import SettingsError
from fedcore.types import Params

__all__ = [
    "PARTS",
    "SHOWN",
    "Parts",
    "split",
]

SHOWN = 12  # names of parameters that a message lists whole


def _check_patterns(parts: tuple[str, ...]) -> tuple[str, ...]:
    for part in parts:
        try:
            re.compile(part)
        except re.error as error:
            raise ValueError(
                f'"{part}" is no regular expression ({error}); '
                f"expected {', '.join(PARTS)}, or a pattern"
            ) from error
    return parts


Parts = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    AfterValidator(_check_patterns),
]
"""Names of `PARTS`, or regular expressions that match whole parameter names."""


def split(params: Params, parts: Iterable[str]) -> tuple[Params, Params]:
    """(shared, personal), the personal parameters being these parts.

    Every name is in exactly one of the two; order is kept. Raises SettingsError for a
    part that no parameter belongs to.

    >>> import torch
    >>> weights = {"0.weight": torch.zeros(3, 2), "1.weight": torch.zeros(1, 3)}
    >>> shared, personal = split(weights, ["output"])
    >>> list(shared), list(personal)
    (['0.weight'], ['1.weight'])
    """
    names: set[str] = set()
    for part in parts:
        names_of_part = PARTS.get(part) or _matching(part)
        members = names_of_part(params)
        if not members:
            raise SettingsError(
                f'the part "{part}": no parameter of the model belongs to it; '
                f"expected {', '.join(PARTS)}, or a regular expression for whole names "
                f"such as {_some(list(params))}"
            )
        names |= members
    shared: Params = {}
    personal: Params = {}
    for name, value in params.items():
        target = personal if name in names else shared
        target[name] = value
    return shared, personal


def _some(names: list[str]) -> str:
    """The names in a line; of many, the first and the last."""
    if len(names) > SHOWN:
        names = [*names[:6], "...", *names[-5:]]
    return ", ".join(names)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _input(params: Params) -> set[str]:
    """The input: parameters of the model itself (embeddings), and its first layer.

    And a normalisation right behind that, in the same module: the norm of a
    transformer's first block belongs to that block.
    """
    params = _without_adapters(params)
    modules = list(dict.fromkeys(filter(None, map(_module, params))))
    first = {"", *modules[:1]}
    if len(modules) > 1:
        are_siblings = _module(modules[0]) == _module(modules[1])
        if are_siblings and modules[1] in _norms(params):
            first.add(modules[1])
    return {name for name in params if _module(name) in first}


def _without_adapters(params: Params) -> Params:
    """The layers' own parameters.

    Beside adapters most layers are frozen, and not among them: the last adapter is not
    the output.
    """
    return {name: x for name, x in params.items() if ".lora_" not in f".{name}"}


def _output(params: Params) -> set[str]:
    params = _without_adapters(params)
    last = _module(list(params)[-1]) if params else ""
    return {name for name in params if _module(name) == last}


def _norms(params: Params) -> set[str]:
    """Normalisation layers: modules whose weight is a vector, or with statistics."""
    modules = set()
    for name, value in params.items():
        is_vector = name.endswith(".weight") and value.ndim == 1
        if is_vector or name.endswith(".running_mean"):
            modules.add(_module(name))
    return modules


def _norm(params: Params) -> set[str]:
    norms = _norms(params)
    return {name for name in params if _module(name) in norms}


def _adapter(params: Params) -> set[str]:
    """Bottlenecks, and the norms beside them; the shortcuts' norms stay shared."""
    adapters = _matching(r"(.*\.)?adapter\d?\..+")(params)
    if not adapters:
        return set()
    return adapters | {name for name in _norm(params) if "shortcut" not in name}


def _matching(pattern: str) -> Callable[[Params], set[str]]:
    return lambda params: {name for name in params if re.fullmatch(pattern, name)}


PARTS: dict[str, Callable[[Params], set[str]]] = {
    "all": set,
    "input": _input,
    "output": _output,
    "body": lambda params: set(params) - _output(params),
    "norm": _norm,
    "attention": _matching(r"(.*\.)?attn\.(qkv|proj)\.[^.]+"),
    "mlp": _matching(r"(.*\.)?mlp\..+"),
    "adapter": _adapter,
    "prefix": _matching(r"(.*\.)?attn\.prefix\..+"),
    "factors": _matching(r"(.*\.)?(X2|Y2|T2)"),
    "lora_A": _matching(r"(.*\.)?lora_A"),
    "lora_B": _matching(r"(.*\.)?lora_B"),
}
"""Parts of a model by name, found by the names and shapes of its parameters."""
