"""The command line's own words: its help, and hints for what was typed wrong."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from fedcore.errors import SettingsError

__all__ = ["App", "call", "open_streams"]

MEANT = {"train": "run"}
"""Commands of other tools, and ours that does the like."""


class _Command(TyperCommand):
    """A command whose help describes its arguments."""

    def get_help(self, ctx: click.Context) -> str:
        if self.callback is not None:
            _describe_arguments(self)
        # Typer escapes brackets for a markup that is switched off.
        return super().get_help(ctx).replace("\\[", "[")

    def format_arguments(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write nothing: Click 8.5 has a section for what Typer's own says already."""


class _Group(TyperGroup):
    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")


def _describe_arguments(command: click.Command) -> None:
    """Give arguments the help of their annotations, which Click 8.5 takes from them."""
    function = inspect.unwrap(command.callback or _describe_arguments)
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in command.params:
        if not isinstance(parameter, TyperArgument) or parameter.help:
            continue
        for detail in getattr(hints.get(str(parameter.name)), "__metadata__", ()):
            parameter.help = getattr(detail, "help", None)


class App(typer.Typer):
    """The command line, with help as plain text."""

    def __init__(self, help: str) -> None:
        super().__init__(
            cls=_Group,
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            help=help,
        )

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return super().command(*args, **{"cls": _Command, **kwargs})


def open_streams() -> None:
    """Give output that was closed a place to go, so that writing to it is no fault."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115


def call(app: typer.Typer) -> int:
    """Run the command that was given: its exit status.

    Raises SettingsError, with the hint that helps, for what is no command of ours.
    """
    command = typer.main.get_command(app)
    try:
        status = command.main(prog_name="fedcore", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except click.UsageError as error:
        raise SettingsError(_fault(error, sys.argv[1:])) from None
    except click.ClickException as error:
        raise SettingsError(error.format_message()) from None
    return status if isinstance(status, int) else 0


def _fault(error: click.UsageError, typed: Sequence[str]) -> str:
    """The fault in one line, and what to type instead."""
    context = error.ctx
    is_group = context is None or isinstance(context.command, click.Group)
    command = "fedcore" if context is None else context.command_path
    if isinstance(error, click.NoSuchOption):
        return f"{error.option_name}: {_no_option(error, command, typed)}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        wanted = error.param.make_metavar(context) if context else error.param.name
        if error.param.param_type_name == "option":
            wanted = f"{error.param.opts[0]} {wanted}"
        return f"expected {wanted}; see {command} --help"
    message = error.format_message().rstrip(".")
    extra = re.search(r"unexpected extra arguments? \((.*)\)", message)
    if extra is not None:
        return f"{extra[1]}: {_no_argument(extra[1], command, typed)}"
    is_top = is_group and (context is None or context.parent is None)
    if is_top and message.startswith("No such command"):
        word = typed[0] if typed else ""
        return f"{word}: {_no_command(word, context)}"
    return f"{message[:1].lower()}{message[1:]}; see {command} --help"


def _no_option(error: click.NoSuchOption, command: str, typed: Sequence[str]) -> str:
    flags: list[str] = []
    for parameter in error.ctx.command.params if error.ctx else ():
        flags += [flag for flag in parameter.opts if flag.startswith("--")]
    near = difflib.get_close_matches(error.option_name, flags, 1, 0.75)
    # --rounds is the setting, and not --round with a letter too many.
    if near and not _is_setting(error.option_name.lstrip("-")):
        return f"{command} has no such option; did you mean {near[0]}?"
    if "--set" in flags:
        from fedcore.settings.faults import or_text

        value = _value_after(error.option_name, typed)
        keys = _near_settings(error.option_name.lstrip("-"), typed)
        hints = [f"--set {key}={value}" for key in keys]
        if hints:
            return f"{command} has no such option; did you mean {or_text(hints)}?"
    return f"{command} has no such option; it has {', '.join(flags)}"


def _is_setting(word: str) -> bool:
    """Whether there is a setting of just this name."""
    from fedcore.config import Experiment

    return word in Experiment.model_fields


def _value_after(option: str, typed: Sequence[str]) -> str:
    """The value that was typed with an option; ... without one."""
    for number, word in enumerate(typed):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and number + 1 < len(typed):
            following = typed[number + 1]
            return "..." if following.startswith("--") else following
    return "..."


def _near_settings(word: str, typed: Sequence[str]) -> list[str]:
    """Settings that a word may stand for, of the preset that was typed with it."""
    from fedcore.config import Experiment
    from fedcore.settings.faults import Schema, near_keys
    from fedcore.settings.presets import is_preset, read_preset

    values: dict[str, Any] = {"method": {"name": "fedavg"}}
    for argument in typed[1:]:
        if is_preset(argument):
            values = read_preset(argument)
            break
    return near_keys(word, Schema(Experiment, values).descriptions())


def _no_argument(extra: str, command: str, typed: Sequence[str]) -> str:
    from fedcore.settings.presets import is_preset

    words = extra.split()
    settings = [word for word in words if re.match(r"[\w.]+=.", word)]
    if settings:
        hint = " ".join(f"--set {setting}" for setting in settings)
        return f"{command} takes settings after --set; did you mean {hint}?"
    first = typed.index(words[0]) if words and words[0] in typed else 0
    if first >= 2 and typed[first - 2] == "--set" and "=" not in typed[first - 1]:
        hint = f"--set {typed[first - 1]}={words[-1]}"
        return f"--set takes one word; did you mean {hint}?"
    presets = [word for word in typed[1:] if is_preset(word)]
    if len(presets) > 1:
        hint = f"fedcore compare {' '.join(presets)}"
        return f"{command} takes one PRESET; did you mean {hint}?"
    return f"{command} takes no such argument; see {command} --help"


def _no_command(word: str, context: click.Context | None) -> str:
    """The hint for what is no command: one of a like name, or that does the like."""
    from fedcore.settings.presets import is_preset

    if word and (is_preset(word) or Path(word).suffix == ".toml"):
        return f"this is no command; did you mean fedcore run {word}?"
    group = context.command if context is not None else None
    commands = group.commands if isinstance(group, click.Group) else {}
    near = difflib.get_close_matches(word, commands, 1)
    if word.lower() in MEANT:
        near = [MEANT[word.lower()]]
    if not near:
        stem = re.escape(word[:4].lower())
        for name, command in commands.items():
            if len(word) > 2 and re.search(rf"\b{stem}", (command.help or "").lower()):
                near.append(name)
    if near:
        return f"there is no such command; did you mean fedcore {near[0]}?"
    return f"there is no such command; there are {', '.join(commands)}"
