"""Forked copies of this process that do its work on all cores, where threads would wait for the interpreter's lock.

A fork has all that this process had when it was made (data, model, recordings, the function that it is to call), shared as long as
nobody writes to it. After that only small messages go to it and back; tensors lie in memory that both see.
"""

from __future__ import annotations

import gc
import math
import mmap
import os
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import RunError

ALIGNED = 64  # bytes, as PyTorch aligns its own memory: where numbers lie must not change what is computed from them
AHEAD = 2  # jobs that a fork has at once, so that it need not wait for us
BEGUN = 3  # jobs for each fork, at most, that are begun before the first of them is handed on
SPARE = 4  # pieces of memory that are kept for what is sent next
EVERYBODY = 0  # number of the memory that all forks see

Call = Callable[[Any, list[Tensor], list[Tensor]], tuple[Any, list[Tensor]]]
"""(what to do, tensors given to all jobs, tensors of this one) -> (answer, its tensors); it runs in a fork."""


def possible() -> bool:
    """Whether this process may be forked: by Linux, and before PyTorch has started threads for an accelerator."""
    return sys.platform == "linux" and not torch.cuda.is_available()


class Forks:
    """A pool of forks, all of the moment at which it is made."""

    def __init__(self, count: int, call: Call) -> None:
        self._lines: list[Line] = []
        self._everybody: Memory | None = None
        for _ in range(count):
            self._lines.append(_fork(call, [line.pipe for line in self._lines]))

    def run(
        self, jobs: Iterable[tuple[Any, list[Tensor]]], given: list[Tensor]
    ) -> Iterator[tuple[Any, list[Tensor]]]:
        """Answers in the order of the jobs, each (what to do, its tensors); `given` are the tensors that all of them get.

        Of no more jobs than forks, job i is always fork i's. Raises RunError where a job raises, or a fork is killed.
        """
        while any(
            line.jobs for line in self._lines
        ):  # who listened last has stopped before the end
            self._receive({})
        self._give(given)
        waiting = enumerate(jobs)
        answers: dict[int, tuple[Any, list[Tensor]]] = {}
        begun = handed = 0
        while True:
            while begun - handed < BEGUN * len(self._lines):
                line = min(self._lines, key=lambda line: len(line.jobs))
                if len(line.jobs) == AHEAD or (job := next(waiting, None)) is None:
                    break
                line.jobs.append(job[0])
                line.send(*job[1])
                begun += 1
            if begun == handed:
                return
            if handed in answers:
                yield answers.pop(handed)
                handed += 1
            else:
                self._receive(answers)

    def _receive(self, answers: dict[int, tuple[Any, list[Tensor]]]) -> None:
        busy = {line.pipe: line for line in self._lines if line.jobs}
        for pipe in wait(list(busy)):
            line = busy[pipe]  # type: ignore[index]
            answer = line.receive()
            answers[line.jobs.pop(0)] = answer
            if isinstance(answer[0], Failed):
                raise RunError(answer[0].reason)

    def _give(self, tensors: list[Tensor]) -> None:
        places, size = _layout(tensors)
        new = self._everybody is None or self._everybody.size < size
        if self._everybody is None or new:
            self._everybody = Memory(EVERYBODY, size)
        self._everybody.write(places, tensors)
        for line in self._lines:
            line.tell(None, places, self._everybody, new)
        if new:
            self._everybody.close()

    def close(self) -> None:
        for line in self._lines:
            line.close()


class Failed(NamedTuple):
    """The answer to a job that raised."""

    reason: str


class Place(NamedTuple):
    """Where a tensor lies in memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    alike: bool  # all its rows are one, which is there once


def _layout(tensors: list[Tensor]) -> tuple[list[Place], int]:
    """Places one after another, and the bytes that they take."""
    places, end = [], 0
    for x in tensors:
        alike = x.ndim > 0 and len(x) > 1 and x.stride(0) == 0
        places.append(Place(end, tuple(x.shape), x.dtype, alike))
        end += -(-(x.nbytes // len(x) if alike else x.nbytes) // ALIGNED) * ALIGNED
    return places, end


class Memory:
    """Memory that several processes see. It is given back when no tensor lies in it any more in any of them."""

    def __init__(self, number: int, size: int, file: int | None = None) -> None:
        """New, or with `file` what another process made."""
        self.number, self.size = number, size
        self.file = os.memfd_create("fedcore") if file is None else file
        if file is None:
            os.ftruncate(self.file, max(size, 1))
        self._map = mmap.mmap(self.file, max(size, 1))

    def bytes(self) -> np.ndarray:
        """All of it; a new object each time, whose end is the end of the tensors that were made of it."""
        return np.frombuffer(self._map, dtype=np.uint8)

    def write(self, places: list[Place], tensors: list[Tensor]) -> None:
        for target, place, x in zip(
            self.read(self.bytes(), places), places, tensors, strict=True
        ):
            (target[:1] if place.alike else target).copy_(x[:1] if place.alike else x)

    @staticmethod
    def read(memory: np.ndarray, places: list[Place]) -> list[Tensor]:
        everything, found = torch.from_numpy(memory), []
        for offset, shape, dtype, alike in places:
            rows = (1, *shape[1:]) if alike else shape
            flat = everything[offset : offset + math.prod(rows) * dtype.itemsize]
            found.append(flat.view(dtype).view(rows).expand(shape))
        return found

    def close(self) -> None:
        """Nobody else will get it."""
        os.close(self.file)


class Line:
    """One end of the line between us and a fork.

    The memory of what is sent belongs to the end that sends it; the other tells, with what it sends next, when it needs it no more.
    """

    def __init__(self, pipe: Connection, pid: int = 0) -> None:
        self.pipe, self.pid = pipe, pid  # of the fork, at our end
        self.jobs: list[int] = []
        self._made = EVERYBODY
        self._lent: dict[int, Memory] = {}
        self._spare: list[Memory] = []
        self._theirs: dict[int, Memory] = {}
        self._read: list[int] = []  # theirs, in which no tensor lies any more
        self._dropped: list[int] = []  # ours, which they can forget

    def send(self, what: Any, tensors: list[Tensor]) -> None:
        """Raises RunError where the other end is gone."""
        places, size = _layout(tensors)
        memory, new = self._memory(size)
        memory.write(places, tensors)
        self._lent[memory.number] = memory
        self.tell(what, places, memory, new)
        if new:
            memory.close()

    def _memory(self, size: int) -> tuple[Memory, bool]:
        while self._spare:
            memory = self._spare.pop()
            if memory.size >= size:
                return memory, False
            self._dropped.append(memory.number)
        self._made += 1
        return Memory(self._made, size), True

    def tell(self, what: Any, places: list[Place], memory: Memory, new: bool) -> None:
        """That `places` in `memory` are written."""
        read, dropped, self._read, self._dropped = self._read, self._dropped, [], []
        try:
            self.pipe.send(
                (
                    what,
                    places,
                    memory.number,
                    memory.size if new else None,
                    read,
                    dropped,
                )
            )
            if new:
                send_handle(self.pipe, memory.file, self.pid)
        except OSError as e:
            raise self._ended() from e

    def receive(self) -> tuple[Any, list[Tensor]]:
        """What was sent. Raises RunError where the other end is gone."""
        try:
            what, places, number, size, read, dropped = self.pipe.recv()
            if size is not None:
                self._theirs[number] = Memory(number, size, recv_handle(self.pipe))
                self._theirs[number].close()
        except (EOFError, OSError) as e:
            raise self._ended() from e
        for old in dropped:
            del self._theirs[old]
        for old in read:
            self._returned(self._lent.pop(old, None))
        memory = self._theirs[number].bytes()
        tensors = Memory.read(memory, places)
        weakref.finalize(memory, self._over, number).atexit = False
        return what, tensors

    def _over(self, number: int) -> None:
        self._read.append(number)

    def _returned(self, memory: Memory | None) -> None:
        if memory is None:  # everybody's
            return
        if len(self._spare) < SPARE:
            self._spare.append(memory)
        else:
            self._dropped.append(memory.number)

    def _ended(self) -> RunError:
        self.jobs.clear()
        status = (
            os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) if self.pid else 0
        )
        self.pid = 0
        return RunError(
            f"a process that works for this one ended (exit status {status}); most often the system killed it for its memory: "
            "take a smaller engine.chunk, or fewer processes by OMP_NUM_THREADS; a run goes on with --resume"
        )

    def close(self) -> None:
        self.pipe.close()
        if self.pid:
            if self.jobs:  # nobody waits for them
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def _fork(call: Call, others: list[Connection]) -> Line:
    """A new fork; `others` are our ends of the lines to those that there are."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # from 3.12 on: that a fork has one of our threads
        try:
            pid = os.fork()
        except OSError as e:
            raise RunError(
                f"the system made no further process ({e}): OMP_NUM_THREADS=1 does with one"
            ) from e
    if pid == 0:
        try:
            for pipe in (ours, *others):
                pipe.close()  # as long as anybody holds our end, nobody sees that we are gone
            _serve(Line(theirs), call)
        finally:
            os._exit(0)
    theirs.close()
    return Line(ours, pid)


def _serve(line: Line, call: Call) -> None:
    """A fork's life: job after job, until the other end is closed, or gone with its process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # a terminal sends it to all of us; what becomes of the run is not ours to decide
    with suppress(OSError):  # some sandboxes forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(
                0, os.SCHED_BATCH, os.sched_param(0)
            )  # who is sent work takes no core from who is still sending
    gc.freeze()  # a collection would write to what is shared
    torch.set_num_threads(1)
    given: list[Tensor] = []
    while True:
        try:
            what, tensors = line.receive()
        except RunError:
            return
        if what is None:
            given = tensors
        else:
            try:
                found = call(what, given, tensors)
            except Exception as e:
                traceback.print_exc()
                found = Failed(f"{type(e).__name__}: {e}"), []
            del tensors  # the other end may use their memory again
            line.send(*found)
            del found
            sys.stdout.flush()
            sys.stderr.flush()
