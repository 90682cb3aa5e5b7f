"""Checkpoints of a run: its whole state on disk in one step, and back."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedcore import __version__, trees
from fedcore.clock.arrivals import Arrivals
from fedcore.errors import SettingsError
from fedcore.rounds.client_table import ClientTable
from fedcore.rounds.rundir import refuse_other_base
from fedcore.rounds.setup import Parts
from fedcore.storage.checkpoint import Checkpoint
from fedcore.storage.faults import Lines, Unwritable
from fedcore.types import Tree

log = logging.getLogger("fedcore")

KEPT = ("aggregation", "adversary", "timing")  # parts of the state, tensors by name
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors that room helps against


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
    timing: dict[str, Tensor]  # where time stands; a round that is skipped takes some


def oldest_in_flight(state: State) -> int:
    """The oldest version from which work is under way, t where none is.

    Clients are not asked for work of earlier rounds again.
    """
    versions = []
    if "queue" in state.timing:
        versions = state.timing["queue"][:, 3].tolist()
    return int(min([*versions, state.t]))


class Saving:
    """Writes and reads the checkpoints of one run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Parts,
        tables: Sequence[ClientTable | Arrivals],
    ) -> None:
        self._checkpoint, self._engine = checkpoint, parts.engine
        self._stores, self._tables, self._start = parts.stores, tables, parts.start
        self._base = parts.task.base_sha256
        self._saved = self._best_saved = time.perf_counter()
        self._best: float | None = None  # the lowest score of a checkpoint
        self.rounds_kept: int | None = None  # in the checkpoint; None without one

    @property
    def age(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.perf_counter() - self._saved

    def is_due(self, seconds: float, score: float | None) -> bool:
        """Whether a checkpoint is to be written after this round.

        `seconds` is the least time between two. A model that is better than all before
        has a clock of its own: otherwise the best would be one that was never kept.
        `score` is its test loss, None where it was not evaluated.
        """
        if self.age >= seconds:
            return True
        if score is None or (self._best is not None and score >= self._best):
            return False
        return time.perf_counter() - self._best_saved >= seconds

    def save(self, state: State, metrics: Lines, score: float | None = None) -> None:
        """Write the whole state, in one step; `score` is its test loss, if known.

        `metrics` comes first, so that no checkpoint knows more rounds than it.
        """
        metrics.sync()
        header: dict[str, Any] = {
            "round": state.t,
            "safe": oldest_in_flight(state),
            "engine": self._engine.choices,
            "fedcore": __version__,
            "initial": self._start.sha256 if self._start else None,
            "base": self._base,
        }
        unchanged: set[str] = set()
        for name, store in self._stores.items():
            if store.is_stateless:
                continue
            header[name] = store.clients()
            kept = set(store.in_use()) - store.changed
            unchanged |= {f"{name}-{number}" for number in kept}
        for table in self._tables:
            table.write(state.t)
        try:
            parts = self._parts(state)
            self._checkpoint.save(state.t, header, parts, unchanged, score)
        except Unwritable as error:
            if error.errno not in FULL or not self._checkpoint.make_room():
                raise
            log.warning("%s; its earlier checkpoints were deleted", error)
            parts = self._parts(state)
            self._checkpoint.save(state.t, header, parts, unchanged, score)
        for store in self._stores.values():
            store.saved()
        self._saved = time.perf_counter()
        if score is not None and (self._best is None or score < self._best):
            self._best, self._best_saved = score, self._saved
        self.rounds_kept = state.t

    def _parts(self, state: State) -> Iterator[tuple[str, dict[str, Tensor]]]:
        # Cloned: two fields of a method's server may be the same tensor, which
        # safetensors does not take.
        server = trees.flatten(state.server)
        yield "server", {path: x.clone() for path, x in server.items()}
        yield "participation", trees.flatten(state.participation)
        if len(state.sent):
            yield "sent", {"": state.sent}
        for name in KEPT:
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
        self._best = self._checkpoint.best
        if header.get("initial") != (self._start.sha256 if self._start else None):
            source = self._start.source if self._start else None
            raise SettingsError(
                f"initial = {source}: its parameters are not the ones that the run in "
                f"{self._checkpoint.folder.parent} started from, which it still needs: "
                "put them back there, or start the run anew without --resume"
            )
        if "base" in header:  # not in one of an earlier fedcore
            refuse_other_base(
                self._checkpoint.folder.parent, self._base, header["base"]
            )
        self.rounds_kept = t
        self._engine.choices.update(header["engine"])
        server = self._part("server", like.server)
        participation = self._part("participation", like.participation)
        sent = self._part("sent", like.sent) if len(like.sent) else like.sent
        for name, store in self._stores.items():
            if name in header:
                store.load(header[name], partial(self._block, name))
        server = trees.to(server, device)
        kept = [self._kept(name) for name in KEPT]
        return State(t, server, participation, sent, *kept)

    def go_back(self) -> None:
        """Forget the checkpoints after the one that was restored."""
        self._checkpoint.go_back()

    def rounds(self) -> list[int]:
        """The rounds that the run can go back to, ascending."""
        return self._checkpoint.rounds()

    def _kept(self, name: str) -> dict[str, Tensor]:
        """The tensors that a rule or an attack keeps; none before it keeps any."""
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
    checkpoint: Checkpoint, folder: Path, rounds: int, back_to: int | None = None
) -> dict[str, Any] | None:
    """The header of a run to be resumed; None where it has no checkpoint yet.

    `back_to` is the round of an earlier checkpoint, where the newest is not wanted.
    Raises SettingsError for one that is damaged or not there, and one of more than
    `rounds` rounds.
    """
    if back_to is None and not checkpoint.exists():
        return None
    header = checkpoint.read(back_to)
    if header["round"] > rounds:
        raise SettingsError(
            f"rounds = {rounds}, but {folder} has done {header['round']}: set rounds "
            "to at least that"
        )
    return header
