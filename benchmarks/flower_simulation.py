"""Flower's own Ray simulation with the same model, data, cohort and batches.

`benchmarks.engines` compares with it. Written as Flower's examples are: a ClientApp
with one handler and a ServerApp that sends the model to the cohort and averages. Prints
SECONDS and a JSON list, one number a round.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import nn

from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.rng import rng
from fedcore.tasks import build_task
from fedcore.types import Batches

SETTINGS, ROUNDS = "FEDCORE_BENCH_SETTINGS", "FEDCORE_BENCH_ROUNDS"

client_app, server_app = ClientApp(), ServerApp()


def read_settings() -> Experiment:
    return Experiment.model_validate_json(Path(os.environ[SETTINGS]).read_text())


@functools.cache
def shared_work() -> Work:
    """Task and method, made once a process."""
    settings = read_settings()
    return Work(
        build_task(settings),
        settings.build_method(),
        settings.local,
        settings.seed,
        settings.links,
        settings.defence,
    )


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    work, content = shared_work(), message.content
    t = int(content["config"]["t"])  # type: ignore[arg-type]
    client = int(context.node_config["partition-id"])
    model, method = work.task.model, work.method
    model.load_state_dict(content["model"].to_torch_state_dict())  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=method.s.local_lr)
    batches = work.batches(method.train, [client], t)  # type: ignore[attr-defined]
    assert isinstance(batches, Batches)
    x, y, mask = batches.x, batches.y, batches.mask
    if type(method).__name__ == "Noop":
        x, y, mask = x[:, :0], y[:, :0], mask[:, :0]
    for batch_x, batch_y, real in zip(x[0], y[0], mask[0], strict=True):
        n = int(real.sum())
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch_x[:n]), batch_y[:n])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    about = ConfigRecord({"num-examples": max(int(mask.sum()), 1)})
    reply = RecordDict({"model": ArrayRecord(model.state_dict()), "about": about})
    return Message(reply, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    settings = read_settings()
    assert settings.population is not None
    while len(nodes := sorted(grid.get_node_ids())) < settings.population:
        time.sleep(0.1)
    params = ArrayRecord(shared_work().task.model.state_dict())
    seconds = []
    for t in range(int(os.environ[ROUNDS])):
        begin = time.perf_counter()
        params = run_round(grid, nodes, params, settings.seed, t)
        seconds.append(round(time.perf_counter() - begin, 4))
    print("SECONDS", json.dumps(seconds), flush=True)


def run_round(
    grid: Grid, nodes: list[int], params: ArrayRecord, seed: int, t: int
) -> ArrayRecord:
    """The mean of the models of 100 clients, by their numbers of examples."""
    cohort = rng(seed, "bench", t).choice(len(nodes), 100, replace=False)
    content = RecordDict({"model": params, "config": ConfigRecord({"t": t})})
    messages = []
    for i in cohort:
        messages.append(Message(content, dst_node_id=nodes[i], message_type="train"))
    total: dict[str, torch.Tensor] = {}
    weight = 0
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise SystemExit(reply.error.reason)
        num_examples = int(reply.content["about"]["num-examples"])  # type: ignore[arg-type]
        weight += num_examples
        model = reply.content["model"].to_torch_state_dict()  # type: ignore[union-attr]
        for name, value in model.items():
            total[name] = total.get(name, 0) + num_examples * value
    return ArrayRecord({name: value / weight for name, value in total.items()})


def simulate() -> None:
    run_simulation(
        server_app,
        client_app,
        num_supernodes=1000,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    # Ray's workers find the app by its module's name, and its settings in the
    # environment.
    os.environ[SETTINGS], os.environ[ROUNDS] = sys.argv[1:]
    from benchmarks import flower_simulation  # noqa: PLW0406

    flower_simulation.simulate()
