"""Settings given beside a preset: how they are written, and what they replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from pydantic import BaseModel

from fedcore.errors import SettingsError
from fedcore.storage.text import parse_toml

__all__ = [
    "DEEPEST",
    "Override",
    "merged",
    "read_overrides",
    "refuse_depth",
    "value_of",
]

# Sections whose keys depend on their name.
KINDS = ("method", "model", "partition", "participation")
# Of these pairs of keys one replaces the other.
ALTERNATIVES = (
    ("local.epochs", "local.steps"),
    ("participation.cohort", "participation.fraction"),
    ("links.downlink.variance", "links.downlink.snr_db"),
    ("links.uplink.variance", "links.uplink.snr_db"),
)
DEEPEST = 32  # sections within sections; the settings themselves have three


class Override(NamedTuple):
    """A setting given beside a preset."""

    key: str  # dotted
    value: Any
    written: str  # by the user, for messages; "" for one from Python


def read_overrides(
    overrides: Sequence[str | Override] | Mapping[str, Any],
) -> list[Override]:
    """Overrides from `key=value`, as `--set` takes them, or from values by dotted key.

    Raises SettingsError for anything else.

    >>> read_overrides(["rounds=5"])
    [Override(key='rounds', value=5, written='--set rounds=5')]
    """
    if isinstance(overrides, Mapping):
        pairs = []
        for key, value in overrides.items():
            if not isinstance(key, str):
                raise SettingsError(
                    f"{key!r} is no key: expected the dotted name of a setting, "
                    'e.g. {"participation.cohort": 10}'
                )
            pairs.append(Override(key, value, ""))
        return pairs
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise SettingsError(
            f"overrides {overrides!r}: expected a dict of values by dotted key, or a "
            'list of key=value, e.g. {"rounds": 5} or ["rounds=5"]'
        )
    return [_override(item) for item in overrides]


def _override(item: str | Override) -> Override:
    """One override; a value that is no TOML is a word, hence a string."""
    if isinstance(item, Override):
        return item
    if not isinstance(item, str):
        raise SettingsError(
            f'override {item!r}: expected text such as "participation.cohort=10"'
        )
    key, equals, text = item.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not all(key.split(".")):
        raise SettingsError(
            f'--set "{item}": expected key=value, e.g. --set participation.cohort=10'
        )
    return Override(key, value_of(text, f"--set {key}"), f"--set {key}={text}")


def value_of(text: str, name: str) -> Any:
    """The value that TOML makes of the text; the text itself where it is no TOML.

    Raises SettingsError, in which the text is called `name`, for one that cannot be
    read whole.

    >>> value_of("[1, 2]", "x"), value_of("fedavg", "x")
    ([1, 2], 'fedavg')
    """
    try:
        table = parse_toml(f"value = {text}")
    except ValueError as error:
        # Of a number with thousands of digits, Python says that it has too many.
        if isinstance(error.__cause__, RecursionError) or "digits" in str(error):
            raise SettingsError(f"{name}: {error}") from None
        return text
    return table["value"] if len(table) == 1 else text


def refuse_depth(values: Any, source: str) -> None:
    """Raise SettingsError for values nested deeper than DEEPEST, or in themselves."""
    level = [values]
    for _ in range(DEEPEST):
        inner: dict[int, Any] = {}  # by identity: what is there twice is seen once
        for value in level:
            parts: Iterable[Any] = ()
            if isinstance(value, Mapping):
                parts = value.values()
            elif isinstance(value, list | tuple):
                parts = value
            inner |= {id(part): part for part in parts}
        level = list(inner.values())
        if not level:
            return
    raise SettingsError(
        f"{source}: nested more than {DEEPEST} deep; expected settings such as "
        "participation.cohort"
    )


def merged(
    values: Mapping[str, Any], overrides: Sequence[Override], model: type[BaseModel]
) -> dict[str, Any]:
    """The values with their overrides, as nested dicts of their own.

    `model` is the whole of the settings. Raises SettingsError for an override within
    what is no section.
    """
    result: dict[str, Any] = _copy(values)
    _drop_replaced(result, {override.key for override in overrides})
    # A kind first: another method or model drops the settings of the one before.
    for override in sorted(overrides, key=lambda override: not _is_kind(override)):
        _set(result, override, model)
    return result


def _is_kind(override: Override) -> bool:
    """Whether an override names the kind of a section."""
    is_name = override.key.removesuffix(".name") in KINDS
    return is_name and isinstance(override.value, str)


def _drop_replaced(values: dict[str, Any], given: Set[str]) -> None:
    """Drop what an override replaces: of two alternatives, the one not `given`."""
    for one, other in ALTERNATIVES:
        if one in given and other not in given:
            _drop(values, other)
        if other in given and one not in given:
            _drop(values, one)


def _set(values: dict[str, Any], override: Override, model: type[BaseModel]) -> None:
    key = override.key
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "method":
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise SettingsError(
                f"{override.written or key}: {section} is a value, not a section; "
                f"set {section} itself"
            )
        values = inner
    if last == "name" and key.removesuffix(".name") in KINDS:
        default = model.model_fields[sections[0]].default
        if values.get("name", getattr(default, "name", None)) != override.value:
            values.clear()
    values[last] = override.value


def _drop(values: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(last, None)


def _copy(values: Any) -> Any:
    """The same values, with dicts of their own."""
    if not isinstance(values, Mapping):
        return values
    return {key: _copy(value) for key, value in values.items()}
