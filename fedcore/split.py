"""Shared and personal parameters: a total, disjoint split by parts of a model, or by patterns of parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from fedcore.errors import SettingsError
from fedcore.types import Params


def _patterns(parts: tuple[str, ...]) -> tuple[str, ...]:
    for part in parts:
        try:
            re.compile(part)
        except re.error as e:
            raise ValueError(
                f'"{part}" is no regular expression ({e}); expected {", ".join(PARTS)}, or a pattern'
            ) from e
    return parts


Parts = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    AfterValidator(_patterns),
]
"""Names of `PARTS`, or regular expressions that match whole parameter names."""


def split(params: Params, parts: Iterable[str]) -> tuple[Params, Params]:
    """(shared, personal), the personal being these parts: every name is in exactly one of the two; order is kept.

    Raises SettingsError for a part that no parameter belongs to.
    """
    personal: set[str] = set()
    for part in parts:
        found = (
            PARTS[part](params)
            if part in PARTS
            else {name for name in params if re.fullmatch(part, name)}
        )
        if not found:
            some = (
                list(params)
                if len(params) <= 12
                else [*list(params)[:6], "...", *list(params)[-5:]]
            )
            raise SettingsError(
                f'the part "{part}": no parameter of the model belongs to it; expected {", ".join(PARTS)}, or a regular expression '
                f"for whole names such as {', '.join(some)}"
            )
        personal |= found
    shared = {name: value for name, value in params.items() if name not in personal}
    return shared, {name: value for name, value in params.items() if name in personal}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _input(params: Params) -> set[str]:
    """What the model itself holds (embeddings of a transformer), its first layer, and a normalisation right behind that, in the
    same module: the norm of a transformer's first block belongs to that block."""
    modules = list(dict.fromkeys(_module(name) for name in params if _module(name)))
    first = {"", *modules[:1]}
    if (
        len(modules) > 1
        and modules[1] in _norms(params)
        and _module(modules[0]) == _module(modules[1])
    ):
        first.add(modules[1])
    return {name for name in params if _module(name) in first}


def _output(params: Params) -> set[str]:
    last = _module(list(params)[-1]) if params else ""
    return {name for name in params if _module(name) == last}


def _norms(params: Params) -> set[str]:
    """Modules whose weight is a vector: normalisation layers."""
    return {
        _module(name)
        for name, value in params.items()
        if name.endswith(".weight") and value.ndim == 1
    }


def _norm(params: Params) -> set[str]:
    return {name for name in params if _module(name) in _norms(params)}


def _adapter(params: Params) -> set[str]:
    """Bottlenecks, and the norms beside them; the shortcuts' norms stay shared."""
    adapters = _named(r"(.*\.)?adapter\d?\..+")(params)
    return (
        adapters | {name for name in _norm(params) if "shortcut" not in name}
        if adapters
        else set()
    )


def _named(pattern: str) -> Callable[[Params], set[str]]:
    return lambda params: {name for name in params if re.fullmatch(pattern, name)}


PARTS: dict[str, Callable[[Params], set[str]]] = {
    "all": set,
    "input": _input,
    "output": _output,
    "body": lambda params: set(params) - _output(params),
    "norm": _norm,
    "attention": _named(r"(.*\.)?attn\.(qkv|proj)\.[^.]+"),
    "mlp": _named(r"(.*\.)?mlp\..+"),
    "adapter": _adapter,
    "prefix": _named(r"(.*\.)?attn\.prefix\..+"),
    "factors": _named(r"(.*\.)?(X2|Y2|T2)"),
}
"""Parts of a model by name, found by the names and shapes of its parameters."""
