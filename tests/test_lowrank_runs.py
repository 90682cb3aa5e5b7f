"""Federated runs of models with layers of factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.metrics import squared_error
from fedcore.models import LowRank
from fedcore.models.lowrank import (
    FactoredLinear,
    Form,
    lowrank,
)
from fedcore.rounds.loop import Loop, run
from fedcore.task import Task
from fedcore.tasks import TASKS, build_task
from fedcore.types import Batches, Params
from tests.helpers import assert_close, equal, loop_of, small
from tests.lowrank import DIGITS, FORMS, layer_of, values


def identical(e: Experiment) -> Task:
    """Two layers of factors in float64; every client holds the same nine examples."""
    draw, n = np.random.default_rng(1), e.population or 1
    rows = Examples(
        torch.from_numpy(draw.standard_normal((9, 12))),
        torch.from_numpy(draw.standard_normal((9, 4))),
    )
    s = LowRank(form=e.options["form"])
    model = nn.Sequential(
        FactoredLinear(nn.Linear(12, 6), 2, s),
        nn.Tanh(),
        FactoredLinear(nn.Linear(6, 4), 2, s),
    ).double()
    return Task(
        model,
        FederatedData(rows, rows, np.tile(np.arange(9), n), np.arange(n + 1) * 9),
        loss=squared_error,
        metrics={},
    )


def everybody(form: Form, population: int, folder: Path, batch: int) -> Loop:
    """FedAvg on `identical`, everybody in every round, four local steps."""
    settings = {
        "participation__cohort": None,
        "participation__fraction": 1.0,
        "holdout": 0.0,
        "local__steps": 4,
    }
    task = {
        "task": "tests.test_lowrank_runs:identical",
        "options": {"form": form},
        "population": population,
    }
    return loop_of(small("fedavg", **settings, **task, local__batch_size=batch), folder)


@pytest.mark.parametrize("form", FORMS)
def test_one_client_in_every_round_is_sgd_on_the_factors(
    form: Form, tmp_path: Path
) -> None:
    loop = everybody(form, 1, tmp_path, batch=4)
    model = build_task(loop.experiment).model
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for t in range(3):
        plan = trees.at(
            loop.task.data.batches(
                np.array([0]), "train", loop.experiment.local, loop.experiment.seed, t
            ),
            0,
        )
        for x, y, mask in zip(*plan, strict=True):
            sgd.zero_grad()
            ((squared_error(model(x), y) * mask).sum() / mask.sum()).backward()
            sgd.step()
        loop.round()
    assert not equal(loop.state.server.params, loop.task.init_params())
    # not bit for bit: clients send y - x, and x + (y - x) is rounded; the weight of the
    # client, 1, is a quotient of float32
    assert_close(
        loop.state.server.params, values(model), 1e-8, f"{form} with one client"
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_equal_factors_is_what_each_client_has(
    form: Form, tmp_path: Path
) -> None:
    found = [everybody(form, n, tmp_path / str(n), batch=64) for n in (1, 4)]
    for loop in found:
        loop.round()
    assert_close(
        found[1].state.server.params,
        found[0].state.server.params,
        1e-12,
        f"four equal clients and one, {form}",
    )


# The others differ from FedAvg on the server alone, or by a term of the local step.
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("fedprox", "fedadam", "fedau")
]


@pytest.mark.parametrize("method", ["fedavg", "scaffold", *SLOW])
def test_methods_train_factors_as_they_train_weights(
    method: str, tmp_path: Path
) -> None:
    rates = {"method__server_lr": 0.03} if method == "fedadam" else {}
    e = small(
        method,
        **DIGITS,
        **{"method__local_lr": 0.1, **rates},
        lowrank__form="fedpara",
        local__epochs=4,
    )
    loop = loop_of(e, tmp_path / "s")
    start = loop.task.test(loop.task.init_params())["loss"]
    one = loop.run()
    assert {name for name in one.params if name.startswith("1.")} == {
        "1.X1",
        "1.Y1",
        "1.X2",
        "1.Y2",
        "1.bias",
    }
    assert one.dropped == {}
    assert one.final["test_loss"] < 0.95 * start
    batched = run(
        e.model_copy(
            update={
                "engine": e.engine.model_copy(update={"name": "vectorised", "chunk": 3})
            }
        ),
        tmp_path / "v",
    )
    assert_close(
        batched.params, one.params, 1e-5, f"{method}, in chunks and one by one"
    )


def test_every_factor_is_sent_both_ways_and_nothing_else(tmp_path: Path) -> None:
    """2 C 4 P bytes a round, and of each client its training loss."""
    P = 2 * 6 * (64 + 32) + 32 + (32 * 10 + 10)  # R = 6; the output layer stays dense
    row = loop_of(
        small("fedavg", **DIGITS, lowrank__form="fedpara"), tmp_path / "f"
    ).round()
    assert (row["bytes_down"], row["bytes_up"]) == (5 * 4 * P, 5 * 4 * (P + 1))
    own = {"lowrank__form": "pfedpara", "method__personal": ["factors"]}
    row = loop_of(small("fedsim", **DIGITS, **own), tmp_path / "p").round()
    half = P - 6 * (64 + 32)  # X2 and Y2 stay: half of the factors
    assert (row["bytes_down"], row["bytes_up"]) == (5 * 4 * half, 5 * 4 * (half + 1))


@pytest.mark.parametrize(
    "model",
    [{}, {"model__name": "cnn", "model__hidden": None}],
    ids=["linear", "convolutions"],
)
def test_pfedpara_shares_the_first_product_and_clients_keep_the_second(
    model: dict[str, Any], tmp_path: Path
) -> None:
    settings = {k: v for k, v in {**DIGITS, **model}.items() if v is not None}
    loop = loop_of(
        small(
            "fedsim", **settings, lowrank__form="pfedpara", method__personal=["factors"]
        ),
        tmp_path,
    )
    states = loop.engine.states
    assert states is not None
    start = states.get(0).v
    assert {name.rpartition(".")[2] for name in start} == (
        {"X2", "Y2", "T2"} if model else {"X2", "Y2"}
    )
    assert (
        start.keys() | loop.state.server.params.keys() == loop.task.init_params().keys()
    )
    assert not start.keys() & loop.state.server.params.keys()
    cohort = set(loop.process.sample(0, loop.state.participation)[0].tolist())
    before = loop.state.server.params
    loop.round()
    after = {i: trees.map(torch.clone, states.get(i).v) for i in range(12)}
    assert {i for i in range(12) if not equal(after[i], start)} == cohort
    assert not equal(loop.state.server.params, before)
    away = set(range(12)) - set(
        loop.process.sample(1, loop.state.participation)[0].tolist()
    )
    loop.round()
    assert all(equal(states.get(i).v, after[i]) for i in away), (
        "a round that a client sits out changed its own factors"
    )


def frozen(e: Experiment) -> Task:
    """pFedPara whose second product is at zero and stays there.

    X2 and Y2 have each other in their gradients.
    """
    task = TASKS["digits"](e)
    lowrank(task.model, LowRank(form="pfedpara", gamma=0.5))
    for name, p in task.model.named_parameters():
        if name.endswith("X2"):
            p.data.zero_()
    return task


def first_alone(e: Experiment) -> Task:
    """The same without the second factors: low rank, of rank R."""
    task = frozen(e)
    for layer in task.model.modules():
        if isinstance(layer, FactoredLinear):
            layer.form = "lowrank"
            del layer.X2, layer.Y2
    return task


def test_pfedpara_with_its_second_product_at_zero_is_fedavg_on_the_first(
    tmp_path: Path,
) -> None:
    tasks = {
        name: {**DIGITS, "task": f"tests.test_lowrank_runs:{name}"}
        for name in ("frozen", "first_alone")
    }
    personal = loop_of(
        small("fedsim", **tasks["frozen"], method__personal=["factors"]), tmp_path / "p"
    )
    shared = loop_of(small("fedavg", **tasks["first_alone"]), tmp_path / "s")
    for _ in range(3):
        personal.round()
        shared.round()
    assert equal(personal.state.server.params, shared.state.server.params)
    assert personal.engine.states is not None
    assert not any(
        v.any() for i in range(12) for v in personal.engine.states.get(i).v.values()
    )


def test_a_task_that_knows_its_optimum_takes_no_factors() -> None:
    with pytest.raises(
        SettingsError,
        match=r'lowrank\.form = "fedpara": least-squares knows its optimum',
    ):
        build_task(small("fedavg", lowrank__form="fedpara"))


def federated_regression(form: Form, target: Tensor) -> float:
    """Relative squared error of W, of 2,048 parameters, for y = W* x.

    10 clients of 200 examples, 5 a round, 150 rounds.
    """
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = layer_of((64, 64), 8 if form == "fedpara" else 16, form)
    layer.bias = None
    assert sum(p.numel() for p in layer.parameters()) == 2048
    x = torch.randn(10, 200, 64, generator=draw)
    y = x @ target.T

    def loss(p: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = (functional_call(layer, p, (x,)) - y).square().sum(1).mean() / 2
        return found

    params = values(layer)
    for t in range(150):
        cohort = torch.randperm(10, generator=draw)[:5]
        rows = (
            torch.rand(5, 5, 200, generator=draw).argsort(-1).view(5, 20, 50)
        )  # five epochs of four batches
        batches = Batches(
            x[cohort[:, None, None], rows],
            y[cohort[:, None, None], rows],
            torch.ones(5, 20, 50),
        )

        def client(b: Batches, t: int = t, params: Params = params) -> Params:
            return local_sgd(loss, params, b, 0.02 * 0.992**t, momentum=0.9).params

        params = trees.map(lambda p: p.mean(0), vmap(client)(batches))
    layer.load_state_dict(params)
    return float(
        (layer.weight.detach() - target).square().sum() / target.square().sum()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("target", "bound"), [("identity", 0.05), ("orthogonal", 0.4)])
def test_fedpara_fits_a_matrix_of_full_rank_that_low_rank_of_its_size_cannot(
    target: str, bound: float
) -> None:
    draw = torch.Generator().manual_seed(1)
    W = (
        torch.eye(64)
        if target == "identity"
        else torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    )
    assert (
        federated_regression("lowrank", W) >= 0.75
    )  # rank 16 of 64 equal singular values
    assert federated_regression("fedpara", W) < bound
