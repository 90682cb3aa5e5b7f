"""The Flower ClientApp: one handler for every client function of every method.

A node hosts the logical clients i with i mod (number of nodes) = its partition id; with as many nodes as clients, one each.
What a device adds to the run's settings stands in its node config, for this app is the same on every kind of node:
`partition-id`, `num-partitions` (default: one client a node), `state` (directory of the clients' states), `data` and `set`
(settings of this device's own). Simulated nodes keep states where the server says, in its run directory.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.store import Moment, Store
from fedcore import __version__, trees
from fedcore.config import Experiment
from fedcore.engines.base import Work, device_for, failure, one_thread
from fedcore.errors import RunError, SettingsError
from fedcore.messages import wire
from fedcore.method import evaluates
from fedcore.tasks import build_task

OWN = (
    "data_folder",
    "options",
    "engine.device",
)  # settings that a device may have its own way

app = ClientApp()


@functools.lru_cache(maxsize=1)
def work_of(preset: str, overrides: str) -> Work:
    """Task and method, built once a process."""
    e = Experiment.load(preset, overrides.splitlines())
    return Work(
        build_task(e).to(device_for(e.engine)),
        e.build_method(),
        e.local,
        e.seed,
        e.links,
        e.defence,
    )


def own_settings(data: str, set_: str) -> list[str]:
    """Overrides of a device: where its data are, and `key=value` separated by spaces.

    Raises SettingsError for a setting that every client of a run has to have alike.
    """
    given = [f"data_folder={data}"] * bool(data) + set_.split()
    for text in given:
        key = text.partition("=")[0]
        if not any(key == own or key.startswith(f"{own}.") for own in OWN):
            raise SettingsError(
                f"--set {text}: a client may set {', '.join(OWN)} alone; everything else comes from the server"
            )
    return given


@app.query()
def whoami(message: Message, context: Context) -> Message:
    """Which clients this node hosts, and which fedcore runs them."""
    me: dict[str, Any] = {
        key: context.node_config[key]
        for key in ("partition-id", "num-partitions")
        if key in context.node_config
    }
    me["fedcore"] = __version__
    return Message(RecordDict({"node": ConfigRecord(me)}), reply_to=message)


@app.train()
def run(message: Message, context: Context) -> Message:
    """Run the named client function for some of this node's clients, and answer with what each sends."""
    ask: Any = message.content["work"]
    clients, t = [int(client) for client in ask["clients"]], int(ask["t"])
    content, counts, failed = RecordDict(), dict[int, int](), dict[int, str]()
    try:
        node = context.node_config
        overrides = [
            *str(context.run_config["set"]).split(),
            *own_settings(str(node.get("data", "")), str(node.get("set", ""))),
        ]
        work = work_of(str(context.run_config["preset"]), "\n".join(overrides))
        fn: Any = getattr(work.method, str(ask["function"]), None)
        if not hasattr(fn, "client_data"):
            raise RunError(
                f'{type(work.method).__module__} has no client function "{ask["function"]}"'
            )
        down = trees.to(
            wire.decode(_arrays(message.content, "down"), wire.schemas(fn)[0]),
            work.task.device,
        )
        initial = work.method.init_client(work.task.init_params())
        store = _store(context, ask) if trees.leaves(initial) else None
        now, safe = Moment(t, int(ask.get("k", 0))), int(ask.get("safe", t))
    except (
        Exception
    ) as e:  # answered, not raised: Flower would send a traceback instead of the reason
        failed.update(failure(clients, e).failed)
        clients = []
    for client in clients:
        try:
            state = store.load(client, now, initial) if store else initial
            with one_thread():
                up, state = work.one(
                    fn, client, down, trees.to(state, work.task.device), t
                )
            content[f"up-{client}"] = wire.encode(up)
            if store and not evaluates(fn):
                store.save(client, now, state, safe)
            counts[client] = int(work.num_examples(fn, [client]))
        except Exception as e:  # one client fails, the node's others do not
            failed.update(failure([client], e).failed)
    about: dict[str, Any] = {
        "t": t,
        "clients": [*counts],
        "num-examples": [*counts.values()],
        "failed": [*failed],
        "reasons": [*failed.values()],
    }
    content["about"] = ConfigRecord(about)
    return Message(content, reply_to=message)


def _store(context: Context, ask: Any) -> Store:
    """Where the clients of this node keep their state: in the directory of this device, or in the server's, if that is here."""
    node = context.node_config
    if own := str(node.get("state", "")):
        return Store(
            Path(own), str(node.get("federation", "")), str(ask.get("series", ""))
        )
    if not (folder := str(ask.get("state", ""))) or not Path(folder).is_dir():
        raise RunError(
            'this method keeps state on clients, and this node has no directory for it: add state="DIR" to --node-config'
        )
    return Store(Path(folder), "", "", sync=False)  # it goes when the run ends


def _arrays(records: RecordDict, key: str) -> ArrayRecord:
    record = records.get(key)
    if not isinstance(record, ArrayRecord):
        raise wire.WireError(f'no arrays under "{key}"')
    return record
