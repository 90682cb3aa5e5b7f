"""The settings `options` and `data_folder`, as bundled tasks read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from fedcore.errors import SettingsError

if TYPE_CHECKING:
    from fedcore.config import Experiment

__all__ = ["Options", "read_options", "refuse_folder", "refuse_options"]

Options = TypeVar("Options", bound=BaseModel)


def refuse_folder(experiment: Experiment, reason: str) -> None:
    """Refuse a folder of data that would not be read."""
    if experiment.data_folder is not None:
        raise SettingsError(
            f"data_folder = {experiment.data_folder}: {reason}; leave it out"
        )


def refuse_options(experiment: Experiment, name: str | None = None) -> None:
    """Refuse options that would not be read."""
    if experiment.options:
        option = next(iter(experiment.options))
        raise SettingsError(
            f'options.{option}: "{name or experiment.task}" has no options; '
            "least-squares and your own tasks have"
        )


def read_options(experiment: Experiment, model: type[Options]) -> Options:
    """The options of a bundled task.

    Raises SettingsError with the key and what it expects.
    """
    try:
        return model(**experiment.options)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(["options", *map(str, fault["loc"])])
        raise SettingsError(
            f"{key} = {fault['input']!r}: {fault['msg'].lower()}; "
            f"{experiment.task} knows {', '.join(model.model_fields)}"
        ) from error
