"""The Flower ClientApp: one handler for every client function of every method.

A node hosts the logical clients i with i mod (number of nodes) = its partition id;
with as many nodes as clients, one each. A device's additions to the run's settings
stand in its node config, for this app is the same on every kind of node:
`partition-id`, `num-partitions` (default: one client a node), `state` (directory of the
clients' states), `certs` (directory of the client's key and certificate), `data` (a
folder, all of whose data are this one client's), `base` (folder of the pretrained
model), `secure` (whether it takes part in secure sums alone, whatever the run's
settings say) and `set` (settings of this device alone). Simulated nodes keep states
where the server says, in its run directory.

A node builds its task before it introduces itself: no round then waits for imports,
data and the partition, which take a small device longer than its training.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from pydantic import BaseModel

from fedcore import __version__
from fedcore.config import Experiment
from fedcore.data.partition import Own
from fedcore.engines.base import Work, device_for, failure
from fedcore.errors import SettingsError
from fedcore.messages.secure.sending import Noising
from fedcore.models import HuggingFace
from fedcore.rounds import refusals, setup
from fedcore.rounds.noise import distributed_noise
from fedcore.storage.faults import Unwritable
from fedcore.tasks import build_task

from . import secure
from .assignment import Assignment

log = logging.getLogger("fedcore")

# Settings in which a device may differ from the others.
DEVICE_SETTINGS = ("data_folder", "base", "model.path", "options", "engine.device")
# Entries of a node config that a simulated node does not have.
DEVICE_KEYS = ("state", "federation", "certs", "data", "base", "set")

app = ClientApp()


@functools.lru_cache(maxsize=1)
def work_of(preset: str, overrides: str, owner: int | None = None) -> Work:
    """Task and method, built once a process; one override a line.

    `owner` is the client whose own data `data_folder` holds, all of them; None where
    the data are those of the whole population, spread by the run's partition.
    """
    experiment = Experiment.load(preset, overrides.splitlines())
    if owner is not None:
        # The server's proxy examples are none of a device's.
        own: dict[str, Any] = {"partition": Own(client=owner), "proxy": 0}
        # `Own` is no setting that a run could have: the copy is not checked.
        experiment = BaseModel.model_copy(experiment, update=own)
    refuse_missing_base(experiment)
    task = build_task(experiment).to(device_for(experiment.engine))
    task.check()
    method = experiment.build_method()
    work = setup.work_of(experiment, task, method, draws_secretly=True)
    noising = own_noise(experiment, work)
    if noising is None:
        return work
    return setup.work_of(experiment, task, method, noising, draws_secretly=True)


def own_noise(experiment: Experiment, work: Work) -> Noising | None:
    """The noise that a device adds to sums, of its operating system; None without."""
    if not experiment.defence.distributed.is_active:
        return None
    process = refusals.participation_process(experiment, work.task)
    params = work.task.init_params()
    noising = distributed_noise(experiment, work, process, params, log.debug)
    if noising is None:
        return None
    return dataclasses.replace(noising, is_secret=True)


def refuse_missing_base(experiment: Experiment) -> None:
    """Raises SettingsError where this machine has no folder of the pretrained model."""
    places = {"base": experiment.base}
    remedies = {"base": "--base DIR", "model.path": "--set model.path=DIR"}
    if isinstance(experiment.model, HuggingFace):
        places["model.path"] = experiment.model.path
    for key, folder in places.items():
        if folder is not None and not folder.is_dir():
            raise SettingsError(
                f"{key} = {folder}: this device has no such folder; copy the "
                f"server's to it, and say where it is with {remedies[key]}"
            )


@functools.lru_cache(maxsize=1)
def refuse_adversary(preset: str, overrides: str) -> None:
    """Raises SettingsError where a device is told to be a malicious client."""
    adversary = Experiment.load(preset, overrides.splitlines()).adversary
    if adversary.is_active:
        raise SettingsError(
            f'adversary.attack = "{adversary.attack}": a device does not play a '
            "malicious client; simulate it with fedcore run"
        )


def device_settings(data: str, assignments: str, base: str = "") -> list[str]:
    """Overrides of a device: where its data and base are, and `key=value` by spaces.

    Raises SettingsError for a setting that every client of a run has to have alike.
    """
    overrides = assignments.split()
    if data:
        overrides.insert(0, f"data_folder={data}")
    if base:
        overrides.insert(0, f"base={base}")
    for override in overrides:
        key = override.partition("=")[0]
        if not any(_is_within(key, setting) for setting in DEVICE_SETTINGS):
            raise SettingsError(
                f"--set {override}: a client may set {', '.join(DEVICE_SETTINGS)} "
                "alone; everything else comes from the server"
            )
    return overrides


def refuse_settings(overrides: list[str]) -> None:
    """Raises SettingsError for a device's settings that no run could take."""
    # The run's model is not known here, so whether it has such settings neither.
    checkable = [text for text in overrides if not text.startswith("model.")]
    experiment = Experiment.parse({"method": {"name": "fedavg"}}, checkable)
    device_for(experiment.engine)


def _is_within(key: str, setting: str) -> bool:
    return key == setting or key.startswith(f"{setting}.")


def _work_for(context: Context) -> Work:
    """The work of this node, by the run's settings and its own."""
    node = context.node_config
    preset = str(context.run_config["preset"])
    overrides = str(context.run_config["set"]).split()
    places = str(node.get("data", "")), str(node.get("base", ""))
    device_overrides = device_settings(places[0], str(node.get("set", "")), places[1])
    text = "\n".join(overrides + device_overrides)
    if any(key in node for key in DEVICE_KEYS):
        refuse_adversary(preset, text)
    if not has_own_data(device_overrides):
        return work_of(preset, text)
    owner = int(str(node["partition-id"]))
    work = work_of(preset, text, owner)
    nodes = int(str(node.get("num-partitions", work.task.population)))
    if nodes < work.task.population:
        raise SettingsError(
            f"a folder of own data, and num-partitions = {nodes} for "
            f"{work.task.population} clients: data that are one client's cannot be "
            "those of several; leave out num-partitions, or the folder"
        )
    return work


def has_own_data(settings: list[str]) -> bool:
    """Whether settings of a device name a folder, whose data are then its own."""
    return any(setting.startswith("data_folder=") for setting in settings)


def _say_ready(work: Work, node: dict[str, Any]) -> None:
    """A line about the data of a device, which is one client."""
    if "num-partitions" in node or "partition-id" not in node:
        return
    client, data = int(str(node["partition-id"])), work.task.data
    if not 0 <= client < data.population:
        return
    kept, held = int(data.kept[client]), int(data.held[client])
    everybody = int(data.sizes.sum())
    share = ""
    if kept + held < everybody:
        share = f"; {everybody - kept - held} more are other clients'"
    log.warning(
        "client %d is ready: it trains on %d examples, and %d are held out%s",
        client,
        kept,
        held,
        share,
    )


@app.query()
def whoami(message: Message, context: Context) -> Message:
    """Introduce this node: the clients it hosts, its fedcore, and whether it is ready.

    And its base, by the SHA-256 of what is frozen: a server with another leaves it out.
    A node that cannot build its task says why, and is left out by the server until it
    can: in a round it would only fail.
    """
    introduction: dict[str, Any] = {"fedcore": __version__}
    for key in ("partition-id", "num-partitions"):
        if key in context.node_config:
            introduction[key] = context.node_config[key]
    if _is_welcome(message):
        try:
            work = _work_for(context)
            warm_up(work)
            introduction["base"] = work.task.base_sha256
            _say_ready(work, context.node_config)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("this client is not ready, and introduced as such: %s", reason)
            introduction["not-ready"] = reason
    return Message(RecordDict({"node": ConfigRecord(introduction)}), reply_to=message)


def _is_welcome(message: Message) -> bool:
    """Whether the server may give this node work.

    It refuses nodes of another version, whose settings this one may not understand.
    """
    server = message.content.get("server")
    if not isinstance(server, ConfigRecord):
        return True
    return server.get("fedcore") == __version__ and "refused" not in server


def warm_up(work: Work) -> None:
    """Do once what a process does at its first gradient: PyTorch imports then."""
    at = torch.ones(1, device=work.task.device)
    torch.func.grad(lambda x: x.square().sum())(at)


@app.train()
def run(message: Message, context: Context) -> Message:
    """Run a client function for some of this node's clients, and send their messages.

    Failures are answered, not raised: Flower would send a traceback instead of the
    reason.
    """
    ask: Any = message.content["work"]
    if "exchange" in ask:
        return secure.take_part(message, context, _work_for)
    clients, t = [int(client) for client in ask["clients"]], int(ask["t"])
    content, counts, failed = RecordDict(), dict[int, int](), dict[int, str]()
    steps, work_us = list[int](), list[int]()
    try:
        assignment = Assignment(message, context, _work_for(context))
    except Exception as error:
        failed.update(failure(clients, error).failed)
        clients = []
    for client in clients:
        try:
            done = assignment.do(client)
            content[f"up-{client}"], counts[client] = done.record, done.num_examples
            steps.append(done.steps)
            work_us.append(done.work_us)
        except Exception as error:  # one client fails, the node's others do not
            failed.update(failure([client], error).failed)
            if isinstance(error, Unwritable):
                log.warning("client %d failed in round %d: %s", client, t + 1, error)
    about: dict[str, Any] = {
        "t": t,
        "clients": [*counts],
        "num-examples": [*counts.values()],
        "steps": steps,
        "work-us": work_us,
        "failed": [*failed],
        "reasons": [*failed.values()],
    }
    content["about"] = ConfigRecord(about)
    return Message(content, reply_to=message)
