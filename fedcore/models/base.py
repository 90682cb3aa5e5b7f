"""A base: the folder of a pretrained model.

    base.safetensors   its parameters and buffers, by name
    tokenizer.json     the tokenizer that it was trained with
    base.json          the sha256 of the first, and how it was made

`fedcore pretrain` writes it; devices are given a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedcore.errors import SettingsError
from fedcore.storage.faults import writing

__all__ = ["check_tokenizer", "load_base", "read_facts", "refuse_used", "save_base"]

WEIGHTS, FACTS = "base.safetensors", "base.json"
# First parts of names: layers that read out classes, and those that read out tokens.
CLASSES = frozenset(("classifier", "score"))
TOKENS = frozenset(("head", "lm_head"))
HOW = "`fedcore pretrain PRESET` writes such a folder; copy all of it"


def read_facts(folder: Path) -> dict[str, Any]:
    """How a base was made, as its base.json says.

    Raises SettingsError when there is no such folder, or it is damaged.
    """
    file = folder / FACTS
    if not folder.is_dir():
        raise SettingsError(f"base = {folder}: there is no such folder; {HOW}")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            raise ValueError("it holds no sha256")
        _refuse_facts(facts)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"base = {folder}: {FACTS} cannot be read ({error}); {HOW}"
        ) from error
    return facts


def _refuse_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError where facts are of another kind than they are written."""
    settings = facts.get("settings", {})
    whole = settings if isinstance(settings, dict) else {"settings": settings}
    for name in ("settings", "text", "model"):
        if not isinstance(whole.get(name, {}), dict):
            raise ValueError(f'its "{name}" is no object')
    if not isinstance(facts.get("texts", []), list):
        raise ValueError('its "texts" is no list')


def load_base(model: nn.Module, folder: Path) -> None:
    """Give the model the weights that `fedcore pretrain` wrote to `folder`.

    A layer that reads out classes stays as it was drawn: the base has none. Raises
    SettingsError for a folder that is damaged, and for weights of another model.
    """
    values = _weights(folder, str(read_facts(folder)["sha256"]))
    own = _state(model)
    has_classes = False
    for name in own:
        has_classes = has_classes or _part(name) in CLASSES
    for name in dict.fromkeys((*own, *values)):
        is_fresh = name not in values and _part(name) in CLASSES
        is_unused = name not in own and has_classes and _part(name) in TOKENS
        if not is_fresh and not is_unused:
            _refuse_other(folder, name, own.get(name), values.get(name))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in values:
                tensor.copy_(values[name])


def check_tokenizer(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise SettingsError for a tokenizer that the base was not written with."""
    file = folder / "tokenizer.json"
    if "tokenizer_sha256" not in facts or not file.is_file():
        return
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != facts["tokenizer_sha256"]:
        raise SettingsError(
            f"base = {folder}: {file.name}: its sha256 is {found[:16]}, and {FACTS} "
            f"says {str(facts['tokenizer_sha256'])[:16]}; {HOW}"
        )


def _weights(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a base, which must be those that it was written with."""
    file = folder / WEIGHTS
    try:
        with file.open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"its sha256 is {found[:16]}, and {FACTS} says {sha256[:16]}"
            )
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"base = {folder}: {WEIGHTS}: {error}; {HOW}") from error


def _refuse_other(
    folder: Path, name: str, own: Tensor | None, value: Tensor | None
) -> None:
    """Raises SettingsError where a tensor of the model and of the base do not fit."""
    if own is not None and value is not None and own.shape == value.shape:
        return
    found = "none" if value is None else f"one of shape {list(value.shape)}"
    wanted = "none" if own is None else f"one of shape {list(own.shape)}"
    raise SettingsError(
        f'base = {folder}: of "{name}" it has {found} and the model {wanted}; '
        f"expected the model and text settings that {FACTS} names"
    )


def save_base(
    folder: Path, model: nn.Module, tokenizer: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a base, whole or not at all: what base.json says.

    `tokenizer` is its JSON. Raises SettingsError for a folder that holds something, and
    Unwritable where it cannot be written.
    """
    refuse_used(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        made.mkdir()
    try:
        content = save(_saved(model))
        whole = {"sha256": hashlib.sha256(content).hexdigest()}
        whole["tokenizer_sha256"] = hashlib.sha256(tokenizer.encode()).hexdigest()
        whole |= facts
        with writing(folder / WEIGHTS, len(content)):
            (made / WEIGHTS).write_bytes(content)
        with writing(folder / FACTS):
            (made / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            text = json.dumps(whole, indent=2)
            (made / FACTS).write_text(f"{text}\n", encoding="utf-8")
            made.replace(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return whole


def _saved(model: nn.Module) -> dict[str, Tensor]:
    values = {}
    for name, tensor in _state(model).items():
        values[name] = tensor.detach().cpu().contiguous()
    return values


def refuse_used(folder: Path) -> None:
    """Raise SettingsError for a folder that a base cannot be written to."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    for parent in folder.absolute().parents:
        if parent.is_dir():
            break
        if os.path.lexists(parent):
            raise SettingsError(
                f"{folder}: {parent.name} is a file; give a folder with --out DIR"
            )
    if os.path.lexists(folder):
        raise SettingsError(
            f"{folder} is there already: delete it, or give another with --out DIR"
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied one has the first of its names.

    Tensors of the model itself, no copies.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters:
            tensors[name] = tensor
    return tensors


def _part(name: str) -> str:
    return name.partition(".")[0]
