"""Checkpoints of a run: its whole state on disk in one step, and back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore import __version__, trees
from fedcore.engines.base import Engine
from fedcore.errors import SettingsError
from fedcore.rounds.client_table import ClientTable
from fedcore.storage.checkpoint import Checkpoint
from fedcore.storage.faults import Lines
from fedcore.storage.rows import StateStore
from fedcore.types import Tree


class State(NamedTuple):
    """A run between two rounds; rows of single clients are in the stores."""

    t: int  # rounds done
    server: Any
    participation: Tree
    # Messages that each client has sent, int64 [population], where clients add noise;
    # else [0].
    sent: Tensor
    # Of a robust rule, and of malicious clients that are simulated, by name; a round
    # that is skipped leaves them as they were.
    aggregation: dict[str, Tensor]
    adversary: dict[str, Tensor]


class Start(NamedTuple):
    """The parameters that a run was given to start from, where it was given some."""

    source: Path
    sha256: str


class Saving:
    """Writes and reads the checkpoints of one run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: Engine,
        stores: dict[str, StateStore],
        table: ClientTable,
        start: Start | None,
    ) -> None:
        self._checkpoint, self._engine = checkpoint, engine
        self._stores, self._table, self._start = stores, table, start
        self._saved = time.perf_counter()
        self.rounds_kept: int | None = None  # in the checkpoint; None without one

    @property
    def age(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.perf_counter() - self._saved

    def save(self, state: State, metrics: Lines) -> None:
        """Write the whole state, in one step.

        `metrics` comes first, so that no checkpoint knows more rounds than it.
        """
        metrics.sync()
        header: dict[str, Any] = {
            "round": state.t,
            "engine": self._engine.choices,
            "fedcore": __version__,
            "initial": self._start.sha256 if self._start else None,
        }
        unchanged: set[str] = set()
        for name, store in self._stores.items():
            if store.is_stateless:
                continue
            header[name] = store.clients()
            kept = set(store.in_use()) - store.changed
            unchanged |= {f"{name}-{number}" for number in kept}
        self._table.write(state.t)
        self._checkpoint.save(state.t, header, self._parts(state), unchanged)
        for store in self._stores.values():
            store.saved()
        self._saved = time.perf_counter()
        self.rounds_kept = state.t

    def _parts(self, state: State) -> Iterator[tuple[str, dict[str, Tensor]]]:
        # Cloned: two fields of a method's server may be the same tensor, which
        # safetensors does not take.
        server = trees.flatten(state.server)
        yield "server", {path: x.clone() for path, x in server.items()}
        yield "participation", trees.flatten(state.participation)
        if len(state.sent):
            yield "sent", {"": state.sent}
        for name in ("aggregation", "adversary"):
            if kept := getattr(state, name):
                yield name, kept
        for name, store in self._stores.items():
            for number, block in store.save_blocks():
                yield f"{name}-{number}", block

    def restore(
        self, header: dict[str, Any], like: State, device: torch.device
    ) -> State:
        """The state of the checkpoint with this header; the stores are filled.

        Raises SettingsError where it does not fit the run; `like` is the run's state
        before its first round.
        """
        t = int(header["round"])
        if header.get("initial") != (self._start.sha256 if self._start else None):
            source = self._start.source if self._start else None
            raise SettingsError(
                f"initial = {source}: its parameters are not the ones that the run in "
                f"{self._checkpoint.folder.parent} started from, which it still needs: "
                "put them back there, or start the run anew without --resume"
            )
        self.rounds_kept = t
        self._engine.choices.update(header["engine"])
        server = self._part("server", like.server)
        participation = self._part("participation", like.participation)
        sent = self._part("sent", like.sent) if len(like.sent) else like.sent
        for name, store in self._stores.items():
            if name in header:
                store.load(header[name], partial(self._block, name))
        aggregation, adversary = self._kept("aggregation"), self._kept("adversary")
        server = trees.to(server, device)
        return State(t, server, participation, sent, aggregation, adversary)

    def _kept(self, name: str) -> dict[str, Tensor]:
        """What a rule or an attack keeps; empty before it keeps anything."""
        return self._checkpoint.part(name) if self._checkpoint.has(name) else {}

    def _block(self, name: str, number: int) -> dict[str, Tensor]:
        return self._checkpoint.part(f"{name}-{number}")

    def _part(self, name: str, like: Tree) -> Tree:
        flat, expected = self._checkpoint.part(name), trees.flatten(like)
        fits = flat.keys() == expected.keys()
        if fits:
            fits = all(flat[path].shape == x.shape for path, x in expected.items())
        if not fits:
            raise SettingsError(
                f"{self._checkpoint.folder}: its {name} state does not fit this method "
                "and model: is it another fedcore's?"
            )
        return trees.unflatten(flat, like)


def read_header(
    checkpoint: Checkpoint, folder: Path, rounds: int
) -> dict[str, Any] | None:
    """The header of a run to be resumed; None where it has no checkpoint yet.

    Raises SettingsError for a damaged one, and one of more than `rounds` rounds.
    """
    if not checkpoint.exists():
        return None
    header = checkpoint.read()
    if header["round"] > rounds:
        raise SettingsError(
            f"rounds = {rounds}, but {folder} has done {header['round']}: set rounds "
            "to at least that"
        )
    return header
