"""The progress of a pretraining on stderr: a bar, or a line now and then."""

from __future__ import annotations

import time

from rich.console import Console

from fedcore.escapes import escaped
from fedcore.views.terminal import DRAWN, EVERY, progress_bar

__all__ = ["Progress"]


class Progress:
    """An observer of a pretraining (`fedcore.pretraining.pretrain.Observer`)."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = progress_bar(self.console)
        self._task = self._bar.add_task("step", total=None, facts="")
        self._steps = 0
        self._printed = time.monotonic()

    def started(self, text: str, steps: int) -> None:
        self._steps = steps
        self.console.print(escaped(text), highlight=False, soft_wrap=True, markup=False)
        self._bar.reset(self._task, total=steps)
        self._bar.start()

    def stepped(self, step: int, loss: float) -> None:
        every = DRAWN if self.console.is_terminal else EVERY
        is_last = step == self._steps
        if not is_last and time.monotonic() - self._printed <= every:
            return
        self._printed = time.monotonic()
        facts = f"loss {loss:.4f}"
        self._bar.update(self._task, completed=step, facts=facts)
        if not self.console.is_terminal:
            line = f"step {step}/{self._steps}: {facts}"
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
