"""Ctrl-C while libraries are imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["importing"]


@contextmanager
def importing() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once.

    While libraries are imported, an exception may be swallowed, and leaves them half
    imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        os.write(2, b"fedcore: interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
