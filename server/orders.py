"""What messages to nodes say, and how the answers to them are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedcore import trees
from fedcore.clock.settings import Buffered
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.errors import RunError
from fedcore.messages import wire
from fedcore.storage.faults import writing
from fedcore.storage.memory import size_text
from fedcore.types import ClientFunction, Tree

from .flights import Parcels
from .replies import Reader, Reading


class Orders:
    """Messages of one run."""

    def __init__(
        self,
        work: Work,
        limit: float,
        series: str,
        safe: Callable[[], int] | None,
        state: Path | None,
    ) -> None:
        """A message has at most `limit` bytes; for the others see GridEngine."""
        self._work, self._limit, self._series = work, limit, series
        self._safe, self._state = safe, state
        self.now = (-1, -1)  # t, and how often clients were given work in it, from 0
        # Of messages, by client function and the shapes of what it was sent.
        self._shapes: dict[Hashable, Tree] = {}

    def begin(self, t: int) -> None:
        """Count one more time that clients are given work in round t."""
        self.now = (t, self.now[1] + 1 if self.now[0] == t else 0)

    def check_size(self, down: Tree) -> None:
        """Raises RunError for a message over the limit."""
        size = trees.nbytes(down)
        if size > self._limit:
            raise RunError(
                f"a message of {size_text(size)} to every client, over the limit of "
                f"{size_text(int(self._limit))}: use a smaller model, or raise "
                "engine.message_limit_mb, also in the memory of the server "
                "(a copy a client) and of the clients"
            )

    def reader(self, fn: ClientFunction, down: Tree, t: int, timeout: float) -> Reader:
        """A reader of the answers to this message, waited for so many seconds."""
        _, schema = wire.schemas(fn)
        sent = tuple((path, x.shape) for path, x in trees.flatten(down).items())
        key = fn.__name__, sent
        if key not in self._shapes:
            self._shapes[key] = message_shape(self._work, fn, down, t)
        module = type(self._work.method).__module__
        source = module.replace(".", "/") + ".py"
        return Reader(schema, self._shapes[key], t, timeout, source)

    def contents(
        self, fn: ClientFunction, hosted: dict[int, list[int]], down: Tree
    ) -> dict[int, RecordDict]:
        """The message to each node."""
        work, record = self.work_of(fn), wire.encode(down)
        contents = {}
        for node, clients in hosted.items():
            records: dict[str, Any] = {"down": record}
            records["work"] = ConfigRecord({**work, "clients": clients})
            contents[node] = RecordDict(records)
        return contents

    def work_of(self, fn: ClientFunction) -> dict[str, Any]:
        """What every message says of the work that it asks for."""
        t, k = self.now
        safe = self._safe() if self._safe else t
        work: dict[str, Any] = {"function": fn.__name__, "t": t, "k": k}
        work |= {"series": self._series, "safe": safe}
        if self._state is not None:
            with writing(self._state):
                self._state.mkdir(parents=True, exist_ok=True)
            work["state"] = str(self._state.resolve())
        return work

    def parcels(
        self,
        fn: ClientFunction,
        down: Tree,
        t: int,
        settings: Buffered,
        down_of: Callable[[int], Tree],
    ) -> Parcels:
        """The messages of single clients in a buffered schedule."""
        newest, age = wire.encode(down), settings.max_age_s

        def content(client: int, version: int) -> RecordDict:
            record = newest if version == t else wire.encode(down_of(version))
            work = {**self.work_of(fn), "t": version, "k": 0, "clients": [client]}
            return RecordDict({"down": record, "work": ConfigRecord(work)})

        def read(reply: Message, client: int, version: int) -> Reading:
            reader = self.reader(fn, down, version, age)
            return reader.read(reply, [client])

        return Parcels(content, read, age)
