"""Faults in settings, in the words of the person who wrote them."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

Section = type[BaseModel]


def explain(
    error: ValidationError, model: Section, source: str, method: Section | None
) -> str:
    """One line a fault: the key as the user typed it, what was found and expected.

    `model` is the whole of the settings, `source` names the file that they come from,
    and `method` is the class of the section "method", where that is known.
    """
    lines = []
    for fault in error.errors():
        lines.append(f"{source}: {_explain_one(dict(fault), model, method)}")
    return "\n".join(lines)


def _explain_one(fault: dict[str, Any], model: Section, method: Section | None) -> str:
    path, section, choices = _locate(fault["loc"], model, method)
    key = ".".join(path)
    match fault["type"]:
        case "extra_forbidden":
            near = _nearest(path[-1], list(section.model_fields), path[:-1])
            return f"unknown key {key}{near}"
        case "missing":
            return f"{key} is missing{_description(section, path[-1])}"
        case "union_tag_invalid":
            expected = fault["ctx"]["expected_tags"].replace("'", '"')
            return f'{key}.name = "{fault["ctx"]["tag"]}": expected one of {expected}'
        case "union_tag_not_found":
            names = ", ".join(str(_tag(choice)) for choice in choices)
            return f"{key}.name is missing: expected one of {names}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(fault["input"], Mapping | BaseModel):
        return f"{key}: {message}"
    return f"{key} = {fault['input']!r}: {message}"


def _locate(
    location: tuple[int | str, ...], model: Section, method: Section | None
) -> tuple[list[str], Section, list[Section]]:
    """(keys of the user down to a fault, section that holds it, kinds it may be of)."""
    section = model
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
        if path == ["method"] and method is not None:
            section = method
        elif len(choices) == 1:
            section = choices[0]
    return path, section, choices


def _nearest(name: str, names: list[str], section: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, 1)
    if nearest:
        return f"; did you mean {'.'.join([*section, *nearest])}?"
    return f"; known: {', '.join(names)}" if names else ""


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
