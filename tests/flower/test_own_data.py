"""A folder that a device was given: all of its data are that one client's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import fedcore.client.app
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from fedcore import Examples, Experiment, FederatedData, Task, __version__
from fedcore.messages import wire
from fedcore.types import Model

OWN_IMAGES = 600


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images of a device's own, two of its classes missing, and 40 to test on."""
    place = tmp_path_factory.mktemp("device")
    draw = np.random.default_rng(0)
    for part, number in (("train", OWN_IMAGES), ("t10k", 40)):
        images = draw.integers(0, 256, (number, 28, 28))
        (place / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = idx(draw.integers(0, 8, number))
        (place / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return place


def own_task(e: Experiment) -> Task:
    """A user's task, which spreads what it finds as docs/your-own-task.md says."""
    x, y = torch.zeros(50, 3), torch.arange(50) % 2
    train = Examples(x, y)
    part = e.partition.split(y.numpy(), None, e.population, e.seed)
    data = FederatedData(train, train, part.order, part.offsets, e.holdout, e.seed)
    return Task(nn.Linear(3, 2), data)


def context(number: int, settings: str, **node: Any) -> Context:
    config: dict[str, Any] = {"preset": "fedavg", "set": settings}
    return Context(1, 100, {"partition-id": number, **node}, RecordDict(), config)


def answer(context: Context, kind: str, **records: Any) -> RecordDict:
    message = Message(RecordDict(records), dst_node_id=100, message_type=kind)
    return fedcore.client.app.app(message, context).content


def introduction(context: Context) -> dict[str, Any]:
    hello = ConfigRecord({"fedcore": __version__})
    record = answer(context, "query", server=hello)["node"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def trained_on(context: Context, number: int) -> int:
    """The examples that the client says it has trained on."""
    work = fedcore.client.app._work_for(context)
    down = wire.encode(Model(work.task.init_params()))
    ask = ConfigRecord({"function": "train", "t": 0, "clients": [number]})
    about: Any = answer(context, "train", down=down, work=ask)["about"]
    assert list(about["clients"]) == [number], list(about["reasons"])
    return int(about["num-examples"][0])


IMAGES = "task=fashion-mnist population=10 model.name=mlp local.steps=1"


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "partition.name=iid",
        "partition.name=shards",
        "partition.name=pathological",
        "proxy=20",
        "population=1000",
    ],
)
def test_all_images_of_a_device_are_its_clients_whatever_the_population_and_partition(
    settings: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = context(7, f"{IMAGES} {settings} holdout=0.25", data=str(folder))
    assert "not-ready" not in introduction(device)
    assert trained_on(device, 7) == 450
    data = fedcore.client.app._work_for(device).task.data
    assert data.num_examples(np.array([7]), "test").tolist() == [150]
    said = [line for line in caplog.messages if "is ready" in line]
    assert said == [
        "client 7 is ready: it trains on 450 examples, and 150 are held out"
    ]


def test_a_folder_among_a_devices_settings_is_its_own_as_well(folder: Path) -> None:
    device = context(2, f"{IMAGES} holdout=0", set=f"data_folder={folder}")
    assert trained_on(device, 2) == OWN_IMAGES


def test_a_folder_that_the_run_names_is_everybodys_and_spread_over_the_population(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = context(2, f"{IMAGES} partition.name=iid data_folder={folder} holdout=0")
    introduction(device)
    assert trained_on(device, 2) == 60
    assert "; 540 more are other clients'" in caplog.text


def test_a_users_task_that_spreads_its_data_gives_a_device_all_of_its_own(
    tmp_path: Path,
) -> None:
    task = f"task={__name__}:own_task population=10 holdout=0"
    assert trained_on(context(3, task), 3) < 50
    assert trained_on(context(3, task, data=str(tmp_path)), 3) == 50


def test_data_of_one_client_are_not_those_of_the_several_that_a_node_hosts(
    folder: Path,
) -> None:
    node = {"data": str(folder), "num-partitions": 5}
    said = introduction(context(3, IMAGES, **node))["not-ready"]
    assert "num-partitions = 5 for 10 clients" in said
    node["num-partitions"] = 10
    assert "not-ready" not in introduction(context(3, IMAGES, **node))


def test_a_client_that_the_population_has_not_is_named(folder: Path) -> None:
    said = introduction(context(12, IMAGES, data=str(folder)))["not-ready"]
    assert "--id 12: the run's clients are 0 to 9" in said


@pytest.mark.parametrize("task", ["digits", "least-squares", "weighted-least-squares"])
def test_a_folder_that_a_task_would_not_read_is_refused(
    task: str, folder: Path
) -> None:
    device = context(1, f"task={task} population=10", data=str(folder))
    assert f"data_folder = {folder}: " in introduction(device)["not-ready"]
