"""A few short texts of a few clients, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcore import Experiment
from fedcore.data.text.shakespeare import whole_text

CLIENTS = 6
SMALL_MODEL = {"name": "gpt", "width": 8, "layers": 1, "heads": 2}
SETTINGS: dict[str, Any] = {
    "method": {"name": "fedavg", "local_lr": 0.5},
    "task": "texts",
    "model": SMALL_MODEL,
    "text": {"length": 8},
    "rounds": 2,
    "participation": {"cohort": 3},
    "local": {"steps": 2, "batch_size": 3},
    "engine": {"name": "sequential"},
}


def rows(clients: int = CLIENTS, characters: int = 120) -> list[dict[str, Any]]:
    """Two texts of each client, of growing lengths, the first of class 0."""
    whole, made = whole_text(), []
    for client in range(clients):
        size = characters + 20 * client
        start = 1000 * client
        for part in (
            whole[start : start + size],
            whole[start + size : start + 2 * size],
        ):
            made.append({"client": f"c{client}", "text": part, "label": len(made) % 2})
    return made


def lines_in(folder: Path, made: list[dict[str, Any]]) -> Path:
    """A file of these rows, as lines of JSON."""
    file = folder / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, made)), "utf-8")
    return file


def speakers(folder: Path, **settings: Any) -> Experiment:
    """A run on a few texts; `settings` are dotted keys with __ for the dot."""
    values = {**SETTINGS, "data_folder": str(lines_in(folder, rows()))}
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return Experiment.parse(values, overrides)
