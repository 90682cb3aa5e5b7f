"""Stopping a run from outside: a signal is heeded where nothing is half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import RunError

# Seconds in which two signals are one: a terminal or systemd sends it to all processes,
# and the server to its own.
TOGETHER = 1.0


class Interrupted(RunError):
    """The run was stopped from outside; its checkpoint holds the last whole round."""

    exit_status = 130


class Stoppable(Protocol):
    """What a signal sets, and a run heeds."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...


class StopRequest:
    """Whether a run was told to stop, and the words with which it does."""

    def __init__(self, folder: Path, rounds: int) -> None:
        """The run directory, and the rounds that the run was to have."""
        self._folder, self._rounds = folder, rounds
        self._event = threading.Event()
        self._rounds_done = 0

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def round_done(self, rounds: int) -> None:
        self._rounds_done = rounds

    def heed(self) -> None:
        """Raises Interrupted where the run was told to stop."""
        if self._event.is_set():
            raise Interrupted(
                f"interrupted after round {self._rounds_done} of {self._rounds}; "
                f"go on with: fedcore run --resume {self._folder}"
            )


@contextmanager
def signals(stop: Stoppable) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    begin = 0.0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal begin
        if not stop.is_set():
            begin = time.monotonic()
            stop.set()
        elif time.monotonic() - begin > TOGETHER:
            raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
