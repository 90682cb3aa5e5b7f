"""Flower's own Ray simulation with the same model, data, cohort and batches: what `benchmarks.engines` compares with.

Written as Flower's examples are: a ClientApp with one handler and a ServerApp that sends the model to the cohort and averages.
Prints SECONDS and a JSON list, one number a round.
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

client_app, server_app = ClientApp(), ServerApp()


@functools.cache
def work() -> Work:
    e = Experiment.model_validate_json(
        Path(os.environ["FEDCORE_BENCH_SETTINGS"]).read_text()
    )
    return Work(build_task(e), e.build_method(), e.local, e.seed, e.links, e.defence)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    w, t = work(), int(message.content["config"]["t"])  # type: ignore[index,call-overload]
    model = w.task.model
    model.load_state_dict(message.content["model"].to_torch_state_dict())  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=w.method.s.local_lr)
    batches = w.batches(w.method.train, [int(context.node_config["partition-id"])], t)
    if type(w.method).__name__ == "Noop":
        batches = batches._replace(
            x=batches.x[:, :0], y=batches.y[:, :0], mask=batches.mask[:, :0]
        )
    for x, y, mask in zip(batches.x[0], batches.y[0], batches.mask[0], strict=True):
        n = int(mask.sum())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
    about = ConfigRecord({"num-examples": max(int(batches.mask.sum()), 1)})
    return Message(
        RecordDict({"model": ArrayRecord(model.state_dict()), "about": about}),
        reply_to=message,
    )


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    e = Experiment.model_validate_json(
        Path(os.environ["FEDCORE_BENCH_SETTINGS"]).read_text()
    )
    while len(nodes := sorted(grid.get_node_ids())) < e.population:
        time.sleep(0.1)
    params = ArrayRecord(work().task.model.state_dict())
    seconds = []
    for t in range(int(os.environ["FEDCORE_BENCH_ROUNDS"])):
        begin = time.perf_counter()
        cohort = rng(e.seed, "bench", t).choice(len(nodes), 100, replace=False)
        content = RecordDict({"model": params, "config": ConfigRecord({"t": t})})
        messages = [
            Message(content, dst_node_id=nodes[i], message_type="train") for i in cohort
        ]
        total: dict[str, torch.Tensor] = {}
        weight = 0
        for reply in grid.send_and_receive(messages):
            if reply.has_error():
                raise SystemExit(reply.error.reason)
            n = int(reply.content["about"]["num-examples"])  # type: ignore[index,call-overload]
            weight += n
            for name, value in reply.content["model"].to_torch_state_dict().items():  # type: ignore[union-attr]
                total[name] = total.get(name, 0) + n * value
        params = ArrayRecord({name: value / weight for name, value in total.items()})
        seconds.append(round(time.perf_counter() - begin, 4))
    print("SECONDS", json.dumps(seconds), flush=True)


def simulate() -> None:
    run_simulation(
        server_app,
        client_app,
        num_supernodes=1000,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    # Ray's workers find the app by its module's name and its settings in the environment.
    os.environ["FEDCORE_BENCH_SETTINGS"], os.environ["FEDCORE_BENCH_ROUNDS"] = sys.argv[
        1:
    ]
    from benchmarks import flower_simulation  # noqa: PLW0406

    flower_simulation.simulate()
