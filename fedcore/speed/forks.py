"""Forked copies of this process that do its work on all cores.

Threads would wait for the interpreter's lock. A fork has all that this process had when
it was made (data, model, recordings, the function that it is to call), shared as long
as none of them writes to it. After that only small messages pass between them; tensors
lie in memory that both see.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fedcore.errors import RunError
from fedcore.speed.segments import Borrowed, Layout, Lent, Place, Segment

AHEAD = 2  # jobs that a fork has at once, so that it need not wait for the next
BEGUN = 3  # jobs for each fork, at most, begun before the first of them is handed on
SHARED = 0  # number of the segment that all forks see

Answer = tuple[Any, list[Tensor]]
"""(answer, its tensors)."""

Call = Callable[[Any, list[Tensor], list[Tensor]], Answer]
"""(job, tensors given to all jobs, tensors of this one) -> answer; runs in a fork."""

Job = tuple[Any, list[Tensor]]
"""(job, its tensors); the job itself is anything but None."""


def possible() -> bool:
    """Whether this process may be forked.

    Linux does it, before PyTorch has started threads for an accelerator.
    """
    return sys.platform == "linux" and not torch.cuda.is_available()


class Forks:
    """A pool of forks, all of the moment at which it is made."""

    def __init__(self, count: int, call: Call) -> None:
        self._forks: list[Fork] = []
        self._shared: Segment | None = None
        for _ in range(count):
            pipes = [fork.channel.pipe for fork in self._forks]
            self._forks.append(_fork(call, pipes))

    def run(self, jobs: Iterable[Job], given: list[Tensor]) -> Iterator[Answer]:
        """Answers in the order of the jobs; `given` are tensors that all jobs get.

        Of no more jobs than forks, job i is always fork i's. Raises RunError where a
        job raises, or a fork is killed.
        """
        self._drain()
        self._give(given)
        waiting = enumerate(jobs)
        answers: dict[int, Answer] = {}
        begun = handed_on = 0
        while True:
            while begun - handed_on < BEGUN * len(self._forks):
                fork = min(self._forks, key=lambda fork: len(fork.jobs))
                if len(fork.jobs) == AHEAD:
                    break
                numbered = next(waiting, None)
                if numbered is None:
                    break
                number, (job, tensors) = numbered
                fork.begin(number, job, tensors)
                begun += 1
            if begun == handed_on:
                return
            if handed_on in answers:
                yield answers.pop(handed_on)
                handed_on += 1
            else:
                answers.update(self._receive())

    def close(self) -> None:
        """End all forks; what they are doing is lost."""
        for fork in self._forks:
            fork.close()

    def _drain(self) -> None:
        """Wait for jobs of a caller that stopped listening before the end."""
        while any(fork.jobs for fork in self._forks):
            self._receive()

    def _receive(self) -> dict[int, Answer]:
        """The next answers, by the number of their job."""
        busy = {fork.channel.pipe: fork for fork in self._forks if fork.jobs}
        answers = {}
        for pipe in wait(list(busy)):
            number, answer = busy[cast(Connection, pipe)].finish()
            if isinstance(answer[0], Failed):
                raise RunError(answer[0].reason)
            answers[number] = answer
        return answers

    def _give(self, tensors: list[Tensor]) -> None:
        places, size = Layout.of(tensors)
        is_new = self._shared is None or self._shared.size < size
        if self._shared is None or is_new:
            self._shared = Segment(SHARED, size)
        self._shared.write(places, tensors)
        for fork in self._forks:
            fork.give(places, self._shared, is_new)
        if is_new:
            self._shared.close()


class Failed(NamedTuple):
    """The answer to a job that raised."""

    reason: str


class Message(NamedTuple):
    """The part of a message that travels through the pipe."""

    content: Any  # None: its tensors are given to all jobs that follow
    places: list[Place]
    segment: int
    size: int | None  # bytes of the segment, where the receiver does not have it yet
    read: list[int]  # segments of the receiver in which no tensor lies any more
    dropped: list[int]  # segments of the sender that the receiver can forget


class ClosedError(Exception):
    """The other end of a channel is gone."""


class Channel:
    """One end of a line between two processes: messages, and tensors in segments."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self._lent = Lent(SHARED + 1)
        self._borrowed = Borrowed()

    def send(self, content: Any, tensors: list[Tensor]) -> None:
        """Send a message. Raises ClosedError."""
        places, size = Layout.of(tensors)
        segment, is_new = self._lent.take(size)
        segment.write(places, tensors)
        self.announce(content, places, segment, is_new)
        if is_new:
            segment.close()

    def announce(
        self, content: Any, places: list[Place], segment: Segment, is_new: bool
    ) -> None:
        """Send a message whose tensors are written. Raises ClosedError."""
        size = segment.size if is_new else None
        read, dropped = self._borrowed.take_read(), self._lent.take_dropped()
        message = Message(content, places, segment.number, size, read, dropped)
        try:
            self.pipe.send(tuple(message))
            if is_new:
                send_handle(self.pipe, segment.file, 0)
        except OSError as error:
            raise ClosedError from error

    def receive(self) -> tuple[Any, list[Tensor]]:
        """(content, tensors) of the next message. Raises ClosedError."""
        try:
            message = Message(*self.pipe.recv())
            if message.size is not None:
                file = recv_handle(self.pipe)
                segment = Segment(message.segment, message.size, file)
                segment.close()
                self._borrowed.add(segment)
        except (EOFError, OSError) as error:
            raise ClosedError from error
        self._borrowed.drop(message.dropped)
        self._lent.give_back(message.read)
        tensors = self._borrowed.read(message.segment, message.places)
        return message.content, tensors


class Fork:
    """A forked process, as its parent sees it."""

    def __init__(self, channel: Channel, pid: int) -> None:
        self.channel = channel
        self.pid = pid  # 0 once it has ended
        self.jobs: list[int] = []  # begun, by number

    def begin(self, number: int, job: Any, tensors: list[Tensor]) -> None:
        """Send a job. Raises RunError where the process is gone."""
        self.jobs.append(number)
        try:
            self.channel.send(job, tensors)
        except ClosedError as error:
            raise self._ended() from error

    def give(self, places: list[Place], segment: Segment, is_new: bool) -> None:
        """Announce tensors for all jobs. Raises RunError where the process is gone."""
        try:
            self.channel.announce(None, places, segment, is_new)
        except ClosedError as error:
            raise self._ended() from error

    def finish(self) -> tuple[int, Answer]:
        """(number of its first job, answer). Raises RunError where it is gone."""
        try:
            answer = self.channel.receive()
        except ClosedError as error:
            raise self._ended() from error
        return self.jobs.pop(0), answer

    def close(self) -> None:
        """End the process; a job that it is doing is cut off."""
        self.channel.pipe.close()
        if self.pid:
            if self.jobs:
                os.kill(self.pid, signal.SIGKILL)
            self._exit_status()

    def _ended(self) -> RunError:
        self.jobs.clear()
        status = self._exit_status() if self.pid else 0
        return RunError(
            f"a process that works for this one ended (exit status {status}); most "
            "often the system killed it for its memory: take a smaller engine.chunk, "
            "or fewer processes by OMP_NUM_THREADS; a run goes on with --resume"
        )

    def _exit_status(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


def _fork(call: Call, others: list[Connection]) -> Fork:
    """A new fork; `others` are the parent's ends of the lines to those before it."""
    parents_end, childs_end = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # From Python 3.12 on: that a fork has one of the parent's threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            pid = os.fork()
        except OSError as error:
            raise RunError(
                f"the system made no further process ({error}): "
                "OMP_NUM_THREADS=1 does with one"
            ) from error
    if pid == 0:
        try:
            # While one process holds the parent's end, none sees it closed.
            for pipe in (parents_end, *others):
                pipe.close()
            _settle()
            _serve(Channel(childs_end), call)
        finally:
            os._exit(0)
    childs_end.close()
    return Fork(Channel(parents_end), pid)


def _settle() -> None:
    """Make this process, a fork, a good worker."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A terminal sends them to every process; the parent decides on the run.
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # some sandboxes forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            # Work that arrives takes no core from the parent, which is still sending.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.freeze()  # a collection would write to what is shared
    torch.set_num_threads(1)


def _serve(channel: Channel, call: Call) -> None:
    """Do job after job, until the other end is closed, or gone with its process."""
    given: list[Tensor] = []
    while True:
        try:
            job, tensors = channel.receive()
        except ClosedError:
            return
        if job is None:
            given = tensors
            continue
        answer = _answer(call, job, given, tensors)
        del tensors  # the other end may use their memory again
        with suppress(ClosedError):  # the next `receive` finds that out
            channel.send(*answer)
        del answer
        sys.stdout.flush()
        sys.stderr.flush()


def _answer(call: Call, job: Any, given: list[Tensor], tensors: list[Tensor]) -> Answer:
    try:
        return call(job, given, tensors)
    except Exception as error:
        traceback.print_exc()
        return Failed(f"{type(error).__name__}: {error}"), []
