"""The outcome of a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fedcore.rounds.history import History
from fedcore.types import Params

LAST = ("test_", "client_", "finetuned_", "nmsd_", "privacy")


@dataclass
class Result:
    """The outcome of a run; `fedcore run --json` prints it."""

    method: str
    engine: str
    seed: int
    rounds: int
    population: int
    cohort: float  # mean clients asked a round
    final: dict[str, Any]
    history: list[dict[str, Any]]
    clients_trained: int
    clients_per_second: float  # `History.clients_per_second`
    first_round_s: float
    bytes_down: int
    bytes_up: int
    dropped: dict[str, int]
    late_answers: int
    params_sha256: str
    run_dir: str
    params: Params = field(repr=False)

    @property
    def measures(self) -> dict[str, bool]:
        """Whether higher is better, by measure; that which judges the run first."""
        return History(self.history).measures

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parameters, ready for JSON."""
        names = [f.name for f in fields(self) if f.name != "params"]
        return {name: getattr(self, name) for name in names}


def params_sha256(params: Params) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def final_measures(history: History, evaluated_on: str) -> dict[str, Any]:
    """The last evaluation: test set, clients, fine-tuning, privacy."""
    final: dict[str, Any] = {
        "test_loss": None,
        "test_accuracy": None,
        "client_accuracy": None,
    }
    for key, value in history.evaluated.items():
        if key == "measures" or key.startswith(LAST):
            final[key] = value
    final["clients_evaluated_on"] = evaluated_on
    return final
