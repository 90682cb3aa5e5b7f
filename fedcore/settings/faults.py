"""Faults in settings, in the words of the person who wrote them."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from fedcore import methods
from fedcore.errors import SettingsError
from fedcore.escapes import shortened
from fedcore.settings.overrides import Override

__all__ = ["Origin", "Schema", "explain", "near_keys", "or_text", "shown"]

Section = type[BaseModel]
FEW = 5  # keys that a hint names at most

MOVED = {
    "engine.round_timeout": "schedule.deadline_s",
    "engine.report_goal": "schedule.goal",
}
"""Settings that have another place now."""


class Origin(NamedTuple):
    """Where settings come from."""

    source: str = "Experiment"  # the file, as the user named it
    overrides: Sequence[Override] = ()


@dataclass(frozen=True)
class Schema:
    """The sections that settings may have, for the kinds that their values name."""

    model: Section
    values: Mapping[str, Any]

    def section(self, name: str) -> Section | None:
        """The section of this name, of the kind that the values choose."""
        value = self.values.get(name)
        if name == "method":
            return _settings_of_method(value)
        field = self.model.model_fields.get(name)
        choices = _models_in(field.annotation) if field else []
        if len(choices) < 2:
            return choices[0] if choices else None
        kind = getattr(field.default, "name", None) if field else None
        if isinstance(value, Mapping):
            kind = value.get("name", kind)
        for choice in choices:
            if _tag(choice) == kind:
                return choice
        return None

    def descriptions(self) -> dict[str, str]:
        """The description of every setting, by dotted key."""
        descriptions: dict[str, str] = {}
        for name, field in self.model.model_fields.items():
            section = self.section(name)
            if section is not None:
                descriptions |= _keys_of(section, f"{name}.")
            elif not _models_in(field.annotation):
                descriptions[name] = field.description or ""
        return descriptions

    def kinds_with(self, name: str, key: str) -> list[str]:
        """The kinds of a section that have this key."""
        kinds: dict[str, Section] = {}
        if name == "method":
            for method in methods.names():
                kinds[method] = methods.settings_of(methods.load(method))
        field = self.model.model_fields.get(name)
        for choice in _models_in(field.annotation) if field else []:
            if _tag(choice):
                kinds[_tag(choice)] = choice
        return [kind for kind, section in kinds.items() if key in section.model_fields]


def explain(error: ValidationError, schema: Schema, origin: Origin) -> str:
    """One line a fault: the key as the user typed it, what was found and expected."""
    lines = []
    for fault in error.errors(include_url=False):
        lines.append(_explain_one(dict(fault), schema, origin))
    return "\n".join(dict.fromkeys(lines))


def told(key: str, value: Any, message: str, origin: Origin) -> str:
    """A fault of one key's value, named as the user wrote it."""
    override = _override_of(key, origin.overrides)
    if override is None:
        return f"{origin.source}: {key} = {shown(value)}: {message}"
    if not override.written:
        return f"{key} = {shown(value)}: {message}"
    if override.key == key:
        return f"{shortened(override.written)}: {message}"
    return f"{shortened(override.written)}: {key} = {shown(value)}: {message}"


def _explain_one(fault: dict[str, Any], schema: Schema, origin: Origin) -> str:
    location = _locate(fault["loc"], schema)
    key = ".".join(location.path) or "settings"
    override = _override_of(key, origin.overrides)
    where = origin.source if override is None else shortened(override.written)
    prefix = f"{where}: " if where else ""
    match fault["type"]:
        case "extra_forbidden":
            return f"{prefix}unknown key {key}{_hint(location.path, schema)}"
        case "missing":
            description = _description(location.section, location.path[-1])
            return f"{prefix}{key} is missing{description}"
        case "union_tag_invalid":
            names = re.findall(r"'([^']*)'", fault["ctx"]["expected_tags"])
            tag = fault["ctx"]["tag"]
            message = f"expected one of {', '.join(names)}{_nearest(tag, names)}"
            return told(f"{key}.name", tag, message, origin)
        case "union_tag_not_found":
            tags = ", ".join(str(_tag(choice)) for choice in location.choices)
            return f"{prefix}{key}.name is missing: expected one of {tags}"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            message = "expected a section, such as {name = ...}"
            return told(key, fault["input"], message, origin)
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    message = message[:1].lower() + message[1:]
    if fault["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", str(fault["ctx"]["expected"]))
        message += _nearest(fault["input"], names)
    if isinstance(fault["input"], Mapping | BaseModel):
        return f"{prefix}{key}: {message}"
    return told(key, fault["input"], message, origin)


def _override_of(key: str, overrides: Sequence[Override]) -> Override | None:
    """The override that gave this key, the section it is in, or a part of it."""
    related: Override | None = None
    for override in overrides:
        if override.key == key:
            return override
        if _is_in(key, override.key) or _is_in(override.key, key):
            related = override
    return related


# What is found, in few characters


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of thousands of digits
            return f"a number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long.

    >>> shown("x" * 999)[:4], len(shown("x" * 999))
    ("'xxx", 100)
    """
    return _Short().repr(value)


# Hints


def near_keys(typed: str, keys: Mapping[str, str]) -> list[str]:
    """The keys that a person may have meant, those of the section typed first.

    `keys` are descriptions by dotted key. A key is near whose last word is the one
    typed, or holds it, or whose description begins with it; where there is none, one
    that is spelled alike.

    >>> keys = {"population": "N, clients", "local.epochs": "E, passes"}
    >>> near_keys("epochs", keys), near_keys("clients", keys)
    (['local.epochs'], ['population'])
    """
    typed = typed.replace("-", "_")
    if typed in keys:
        return [typed]
    section, dot, _ = typed.rpartition(".")
    if dot:
        inside = {key: text for key, text in keys.items() if _is_in(key, section)}
        found = _near(typed, inside)
        if found:
            return found
    return _near(typed, keys)


def _near(typed: str, keys: Mapping[str, str]) -> list[str]:
    word = typed.rpartition(".")[2]
    phrase = word.replace("_", " ")
    near: list[str] = []
    words: dict[str, str] = {}  # keys by their last word
    for key, description in keys.items():
        last = key.rpartition(".")[2]
        words.setdefault(last, key)
        is_named = word in (last, *last.split("_")) or key == f"{word}.name"
        start = " ".join(re.findall(r"\w+", description)[:4])
        if is_named or re.search(rf"\b{re.escape(phrase)}\b", start):
            near.append(key)
    if near:
        return near[:FEW]
    alike = difflib.get_close_matches(typed, keys, 1, 0.7)
    spelled = [words[last] for last in difflib.get_close_matches(word, words, 1, 0.6)]
    return list(dict.fromkeys([*alike, *spelled]))[:1]


def _is_in(key: str, section: str) -> bool:
    return key.startswith(f"{section}.")


def _hint(path: list[str], schema: Schema) -> str:
    """What a person may have meant by a key that is unknown."""
    if (key := ".".join(path)) in MOVED:
        return f"; it is now {MOVED[key]}, for every engine"
    if len(path) > 1:
        kinds = schema.kinds_with(path[0], path[-1]) if len(path) == 2 else []
        if kinds:
            names = or_text([f'"{kind}"' for kind in kinds])
            return f"; it is a setting of {path[0]}.name = {names}"
    keys = schema.descriptions()
    sections = {key.rpartition(".")[0]: "" for key in keys if "." in key}
    near = near_keys(".".join(path), keys if len(path) > 1 else keys | sections)
    if near:
        return f"; did you mean {or_text(near)}?"
    section = ".".join(path[:-1])
    known = [key for key in keys if _is_in(key, section)] if section else []
    return f"; known: {', '.join(known or schema.model.model_fields)}"


def _nearest(value: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(names), 1) if _is_text(value) else []
    return f'; did you mean "{near[0]}"?' if near else ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 100


def or_text(words: Sequence[str]) -> str:
    """Words as alternatives.

    >>> or_text(["a", "b", "c"])
    'a, b or c'
    """
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


# The settings' own structure


class _Location(NamedTuple):
    """The place of a fault."""

    path: list[str]  # keys of the user
    section: Section  # that holds it
    choices: list[Section]  # kinds that it may be of


def _locate(location: tuple[int | str, ...], schema: Schema) -> _Location:
    section = schema.model
    path: list[str] = []
    choices: list[Section] = []
    for part in location:
        chosen = None
        for choice in choices:
            if _tag(choice) == part:
                chosen = choice
        if chosen is not None:  # the tag of a union is no key of the user's
            section, choices = chosen, []
            continue
        path.append(str(part))
        field = section.model_fields.get(str(part))
        choices = _models_in(field.annotation) if field else []
        if path == ["method"]:
            section = schema.section("method") or section
        elif len(choices) == 1:
            section = choices[0]
    return _Location(path, section, choices)


def _settings_of_method(value: Any) -> Section | None:
    """The settings class of the method that a section names; None without a name."""
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        return None
    try:
        return methods.settings_of(methods.load(name))
    except SettingsError:
        return None


def _keys_of(section: Section, prefix: str) -> dict[str, str]:
    descriptions: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = _models_in(field.annotation)
        if len(inner) == 1:
            descriptions |= _keys_of(inner[0], f"{prefix}{name}.")
        else:
            descriptions[f"{prefix}{name}"] = field.description or ""
    return descriptions


def _description(section: Section, name: str) -> str:
    field = section.model_fields.get(name)
    return f": {field.description}" if field and field.description else ""


def _tag(model: Section) -> Any:
    """The value of `name` by which a union tells this kind of section from others."""
    field = model.model_fields.get("name")
    return field.default if field else None


def _models_in(annotation: Any) -> list[Section]:
    """The sections among the types of a field."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    models: list[Section] = []
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            models += _models_in(argument)
    return models
