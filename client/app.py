"""The Flower ClientApp: one handler for every client function of every method.

A node hosts the logical clients i with i mod (number of nodes) = its partition id; with as many nodes as clients, one each.
"""

from __future__ import annotations

import functools

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore import trees, wire
from fedcore.config import Experiment
from fedcore.engines.base import Work, failure, one_thread
from fedcore.method import data_of
from fedcore.tasks import build_task

app = ClientApp()


@functools.cache
def work_of(preset: str, overrides: str) -> Work:
    """Task and method, built once a process."""
    experiment = Experiment.load(preset, overrides.split())
    return Work(build_task(experiment), experiment.build_method(), experiment.local, experiment.seed)


@app.query()
def whoami(message: Message, context: Context) -> Message:
    """Which clients this node hosts."""
    about = {key: int(context.node_config[key]) for key in ("partition-id", "num-partitions")}
    return Message(RecordDict({"node": ConfigRecord(dict(about))}), reply_to=message)


@app.train()
def run(message: Message, context: Context) -> Message:
    """Run the named client function for some of this node's clients, and answer with what each sends."""
    work = work_of(str(context.run_config["preset"]), str(context.run_config["set"]))
    ask = message.content["work"]
    assert isinstance(ask, ConfigRecord)
    name, t = str(ask["function"]), int(ask["t"])  # type: ignore[arg-type]
    fn = getattr(work.method, name)
    data = data_of(fn)  # refuses a function that is not for clients
    down_type, _ = wire.schemas(fn)
    down = wire.decode(_arrays(message.content, "down"), down_type)
    initial = work.method.init_client(work.task.init_params())
    content = RecordDict()
    done, counts, failed, reasons = [], [], [], []
    for client in [int(i) for i in ask["clients"]]:  # type: ignore[union-attr]
        key = f"state-{client}"
        state = trees.unflatten(wire.flat(_arrays(context.state, key)), initial) if key in context.state else initial
        try:
            with one_thread():
                up, state = work.one(fn, client, down, state, t)
        except Exception as e:  # one client fails, the node's others do not
            failed.append(client)
            reasons.append(failure([client], e).failed[client])
            continue
        content[f"up-{client}"] = wire.encode(up)
        done.append(client)
        counts.append(int(work.num_examples(fn, [client])))
        if trees.leaves(state) and data == "train":
            context.state[key] = wire.encode(state)
    about = {"t": t, "clients": done, "num-examples": counts, "failed": failed, "reasons": reasons}
    content["about"] = ConfigRecord(about)  # type: ignore[arg-type]
    return Message(content, reply_to=message)


def _arrays(records: RecordDict, key: str) -> ArrayRecord:
    record = records[key]
    if not isinstance(record, ArrayRecord):
        raise wire.WireError(f'"{key}" holds no arrays')
    return record


torch.set_num_threads(1)  # nodes share the machine; client work is on one thread in any case
