"""The work that one message of the server asks for, and where clients keep state."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedcore import trees
from fedcore.engines.base import Work, one_thread
from fedcore.errors import RunError
from fedcore.escapes import escaped
from fedcore.messages import wire
from fedcore.messages.moment import Moment
from fedcore.method import evaluates
from fedcore.types import ClientFunction, Tree

from .store import Store

SERIES = re.compile(r"[A-Za-z0-9_-]*")  # names of runs, which name folders


class Done(NamedTuple):
    """One client's work, as its message has it."""

    record: ArrayRecord
    num_examples: int
    steps: int  # local ones
    work_us: int  # microseconds that it took


class Assignment:
    """A client function, with what the server sent for it."""

    def __init__(self, message: Message, context: Context, work: Work) -> None:
        """Raises whatever is wrong with the message, or with this node."""
        ask: Any = message.content["work"]
        self.t = int(ask["t"])
        self.moment = Moment(self.t, int(ask.get("k", 0)))
        self.safe = int(ask.get("safe", self.t))
        self.work = work
        self.fn = client_function(work, str(ask["function"]))
        down, _ = wire.schemas(self.fn)
        self.record = arrays_in(message.content, "down")
        arrived = wire.decode(self.record, down)
        self.down = trees.to(arrived, work.task.device)
        self.initial = work.first_state(work.task.init_params())
        keeps_state = bool(trees.leaves(self.initial))
        self.store = store_of(context, ask) if keeps_state else None
        # By the run's settings, which are the server's, or by this device's own.
        self.sums_alone = bool(context.node_config.get("secure", False))
        self.sums_alone |= work.sending is not None

    def do(self, client: int) -> Done:
        """The client's message, and what goes with it; its state is kept."""
        begin = time.perf_counter()
        up, state = self.run(client)
        if self.sums_alone and trees.leaves(up):
            raise RunError(
                "this client sends what it has learned into secure sums alone, by the "
                "run's settings or its own (--secure), and was asked for it in the "
                "clear: the server needs aggregation.secure = true"
            )
        record = wire.encode(up)
        self.keep_state(client, state)
        if self.sums_alone:
            # Work without a message tells nothing, nor how many examples there are.
            return Done(record, 0, 0, 0)
        steps = int(self.work.steps(self.fn, np.array([client]))[0])
        work_us = round(1e6 * (time.perf_counter() - begin))
        return Done(record, self.count(client), steps, work_us)

    def run(self, client: int) -> tuple[Tree, Tree]:
        """(the client's message, its new state, which is not kept yet)."""
        state = self.initial
        if self.store is not None:
            state = self.store.load(client, self.moment, self.initial)
        state = trees.to(state, self.work.task.device)
        with one_thread():
            return self.work.one(self.fn, client, self.down, state, self.t)

    def keep_state(self, client: int, state: Tree) -> None:
        """Write the state after this work, where the method has one."""
        if self.store is not None and not evaluates(self.fn):
            self.store.save(client, self.moment, state, self.safe)

    def count(self, client: int) -> int:
        """The number of the client's examples, or the sum of their sizes."""
        count = float(self.work.num_examples(self.fn, [client]))
        if not count.is_integer():
            raise RunError(
                f"the sizes of its examples add up to {count:g}: devices count in "
                "whole numbers; give the task a size of whole numbers"
            )
        return int(count)


def client_function(work: Work, name: str) -> ClientFunction:
    """The method's function of this name. Raises RunError where it is none."""
    fn: Any = getattr(work.method, name, None)
    if not hasattr(fn, "client_data"):
        module = type(work.method).__module__
        raise RunError(f'{module} has no client function "{name}"')
    function: ClientFunction = fn
    return function


def store_of(context: Context, ask: Any) -> Store:
    """The states of this node's clients.

    They are in the directory of this device, or in the server's if that is here.
    """
    node = context.node_config
    series = str(ask.get("series", ""))
    if not SERIES.fullmatch(series):
        raise RunError(
            f"the run's name is {escaped(series[:40])!r}: expected letters, digits, "
            "- and _, as it names a folder on this device"
        )
    if folder := str(node.get("state", "")):
        return Store(Path(folder), str(node.get("federation", "")), series)
    folder = str(ask.get("state", ""))
    if not folder or not Path(folder).is_dir():
        raise RunError(
            "this method keeps state on clients, or its sums are secret ones, and "
            'this node has no directory for it: add state="DIR" to --node-config'
        )
    return Store(Path(folder), "", "", sync=False)  # it goes when the run ends


def arrays_in(records: RecordDict, key: str) -> ArrayRecord:
    """The arrays under a name. Raises WireError."""
    record = records.get(key)
    if not isinstance(record, ArrayRecord):
        raise wire.WireError(f'no arrays under "{key}"')
    return record
