"""The Flower ClientApp: one handler for every client function of every method.

A node hosts the logical clients i with i mod (number of nodes) = its partition id; with as many nodes as clients, one each.
"""

from __future__ import annotations

import functools
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore import trees, wire
from fedcore.config import Experiment
from fedcore.engines.base import Work, device_for, failure, one_thread
from fedcore.errors import RunError
from fedcore.method import evaluates
from fedcore.tasks import build_task

app = ClientApp()


@functools.lru_cache(maxsize=1)
def work_of(preset: str, overrides: str) -> Work:
    """Task and method, built once a process."""
    e = Experiment.load(preset, overrides.split())
    return Work(build_task(e).to(device_for(e.engine)), e.build_method(), e.local, e.seed, e.links, e.defence)


@app.query()
def whoami(message: Message, context: Context) -> Message:
    """Which clients this node hosts."""
    me = {key: context.node_config[key] for key in ("partition-id", "num-partitions") if key in context.node_config}
    return Message(RecordDict({"node": ConfigRecord(me)}), reply_to=message)  # type: ignore[arg-type]


@app.train()
def run(message: Message, context: Context) -> Message:
    """Run the named client function for some of this node's clients, and answer with what each sends."""
    ask: Any = message.content["work"]
    clients, t = [int(client) for client in ask["clients"]], int(ask["t"])
    content, counts, failed = RecordDict(), dict[int, int](), dict[int, str]()
    try:
        work = work_of(str(context.run_config["preset"]), str(context.run_config["set"]))
        fn: Any = getattr(work.method, str(ask["function"]), None)
        if not hasattr(fn, "client_data"):
            raise RunError(f'{type(work.method).__module__} has no client function "{ask["function"]}"')
        down = trees.to(wire.decode(_arrays(message.content, "down"), wire.schemas(fn)[0]), work.task.device)
        initial = work.method.init_client(work.task.init_params())
    except Exception as e:  # answered, not raised: Flower would send a traceback instead of the reason
        failed.update(failure(clients, e).failed)
        clients = []
    for client in clients:
        key = f"state-{client}"
        try:
            state = wire.decode(_arrays(context.state, key), type(initial), initial) if key in context.state else initial
            with one_thread():
                up, state = work.one(fn, client, down, trees.to(state, work.task.device), t)
            content[f"up-{client}"] = wire.encode(up)
            if trees.leaves(state) and not evaluates(fn):
                context.state[key] = wire.encode(state)
            counts[client] = int(work.num_examples(fn, [client]))
        except Exception as e:  # one client fails, the node's others do not
            failed.update(failure([client], e).failed)
    about = {"t": t, "clients": [*counts], "num-examples": [*counts.values()], "failed": [*failed], "reasons": [*failed.values()]}
    content["about"] = ConfigRecord(about)  # type: ignore[arg-type]
    return Message(content, reply_to=message)


def _arrays(records: RecordDict, key: str) -> ArrayRecord:
    record = records.get(key)
    if not isinstance(record, ArrayRecord):
        raise wire.WireError(f'no arrays under "{key}"')
    return record
