"""Observers: what a run tells while it goes on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.engines.base import Engine
    from fedcore.rounds.history import History

log = logging.getLogger("fedcore")

NOTES = 20  # at most, of one run: what repeats says nothing new


class Observer(Protocol):
    """Is told of a run as it goes; all of it optional to act on."""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, history: History
    ) -> None:
        """The run begins, or goes on after the rounds in `history`, which grows."""

    def client_done(self, t: int, n: int, cohort: int) -> None:
        """`n` of `cohort` clients have reported in round t."""

    def round_done(self, row: dict[str, Any]) -> None:
        """A round ended; `row` is its line in metrics.jsonl."""

    def note(self, message: str) -> None:
        """Something that the user should know."""


class Quiet:
    """The observer that logs notes and does nothing else."""

    def started(
        self, experiment: Experiment, engine: Engine, population: int, history: History
    ) -> None:
        pass

    def client_done(self, t: int, n: int, cohort: int) -> None:
        pass

    def round_done(self, row: dict[str, Any]) -> None:
        pass

    def note(self, message: str) -> None:
        log.warning(message)


class Notes:
    """Passes on each kind of note once, and at most NOTES of them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._kinds: set[str] = set()

    def once(self, kind: str, message: str) -> None:
        if kind not in self._kinds and len(self._kinds) < NOTES:
            self._kinds.add(kind)
            self._observer.note(message)
