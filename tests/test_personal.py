"""FedSim, FedAlt, Ditto and pFedMe: the papers' arithmetic, and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.local import local_sgd
from fedcore.metrics import squared_error
from fedcore.rounds.loop import run
from fedcore.split import split
from fedcore.task import Task
from fedcore.tasks import build_task
from fedcore.types import Params
from tests.helpers import LAYERED, assert_close, equal, loop_of, small
from tests.methods import layered
from tests.personal import (
    DIGITS,
    PARTIAL,
    SHARED,
    done,
    model_of,
    plan,
    state_of,
    states_of,
    toy,
)


@pytest.mark.parametrize(
    ("name", "expected"), [("fedsim", (0.7, 1.7)), ("fedalt", (0.73, 1.7))]
)
def test_one_step_on_the_quadratic(
    name: str, expected: tuple[float, float], tmp_path: Path
) -> None:
    e = toy(
        name,
        "coupled",
        options={"c": [0.0]},
        method__local_lr=0.1,
        local__steps=1,
        rounds=1,
    )
    assert model_of(done(e, tmp_path), 0) == {
        key: pytest.approx(value, abs=1e-12)
        for key, value in zip("uv", expected, strict=True)
    }


C, U0, V0, STEPS = (0.0, 4.0), 1.0, 2.0, 2
SETTINGS = {"local_lr": 0.1, "personal_lr": 0.3, "penalty": 0.4, "server_lr": 0.8}


def fedsim(u: float, v: float, c: float) -> tuple[float, float]:
    for _ in range(STEPS):
        u, v = u - 0.1 * (u + v - c), v - 0.3 * (u + v - c + 2 * 0.4 * (v - V0))
    return u, v


def fedalt(u: float, v: float, c: float) -> tuple[float, float]:
    for _ in range(3 * STEPS):
        v = v - 0.3 * (u + v - c + 2 * 0.4 * (v - V0))
    for _ in range(2 * STEPS):
        u = u - 0.1 * (u + v - c)
    return u, v


@pytest.mark.parametrize(
    ("name", "more"),
    [("fedsim", {}), ("fedalt", {"personal_passes": 3, "shared_passes": 2})],
)
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_three_rounds_of_two_clients_are_the_written_out_recursion(
    name: str, more: dict[str, int], engine: str, tmp_path: Path
) -> None:
    u, v, client = U0, [V0, V0], {"fedsim": fedsim, "fedalt": fedalt}[name]
    for _ in range(3):
        ends = [client(u, v[i], C[i]) for i in range(2)]
        u, v = u + 0.8 * (sum(end[0] for end in ends) / 2 - u), [end[1] for end in ends]
    settings = {f"method__{key}": value for key, value in {**SETTINGS, **more}.items()}
    loop = done(
        toy(name, "coupled", options={"c": list(C)}, **settings, engine__name=engine),
        tmp_path,
    )
    assert loop.state.server.params["u"].item() == pytest.approx(u, abs=1e-12)
    assert [state.v["v"].item() for state in states_of(loop)] == pytest.approx(
        v, abs=1e-12
    )


def test_ditto_and_pfedme_are_the_written_out_recursions(tmp_path: Path) -> None:
    """Their model is all of (u, v), whose gradients are equal.

    Their sum s moves by twice the gradient of 1/2 (s - c)^2.
    """
    s, own, lr = 3.0, [3.0, 3.0], 0.1
    for _ in range(3):
        ends = []
        for i, c in enumerate(C):
            end = s
            for _ in range(STEPS):
                end = end - lr * 2 * (end - c)
                own[i] = own[i] - lr * (2 * (own[i] - c) + 0.7 * (own[i] - s))
            ends.append(end)
        s = sum(ends) / 2
    loop = done(
        toy(
            "ditto",
            "coupled",
            options={"c": list(C)},
            method__local_lr=lr,
            method__lam=0.7,
        ),
        tmp_path / "ditto",
    )
    assert float(sum(loop.state.server.params.values())) == pytest.approx(s, abs=1e-12)
    assert [float(sum(model_of(loop, i).values())) for i in range(2)] == pytest.approx(
        own, abs=1e-12
    )

    s, own = 3.0, [3.0, 3.0]
    for _ in range(3):
        ends = []
        for i, c in enumerate(C):
            end = s
            for _ in range(STEPS):
                own[i] = end
                for _ in range(4):
                    own[i] = own[i] - 0.02 * (2 * (own[i] - c) + 15 * (own[i] - end))
                end = end - 0.05 * 15 * (end - own[i])
            ends.append(end)
        s = 0.5 * s + 0.5 * sum(ends) / 2
    settings = {
        "method__local_lr": 0.05,
        "method__personal_lr": 0.02,
        "method__inner_steps": 4,
        "method__server_lr": 0.5,
    }
    loop = done(
        toy("pfedme", "coupled", options={"c": list(C)}, **settings),
        tmp_path / "pfedme",
    )
    assert float(sum(loop.state.server.params.values())) == pytest.approx(s, abs=1e-12)
    assert [float(sum(model_of(loop, i).values())) for i in range(2)] == pytest.approx(
        own, abs=1e-12
    )


def test_with_a_separable_loss_both_updates_agree_and_with_a_coupled_one_they_do_not(
    tmp_path: Path,
) -> None:
    def models(task: str, **settings: Any) -> list[Params]:
        loops = [
            done(toy(name, task, **settings), tmp_path / task / name)
            for name in PARTIAL
        ]
        return [
            {
                f"{i}.{key}": value
                for i in range(2)
                for key, value in model_of(loop, i).items()
            }
            for loop in loops
        ]

    sim, alt = models("separable")
    assert_close(sim, alt, 1e-12, "FedSim and FedAlt")
    sim, alt = models("coupled", options={"c": list(C)}, rounds=1)
    assert abs(sim["0.u"] - alt["0.u"]) > 1e-3


@pytest.mark.parametrize(
    "settings", [{}, {"participation__cohort": 1}], ids=["cohort of 5", "cohort of 1"]
)
@pytest.mark.parametrize("name", PARTIAL)
def test_the_server_takes_the_mean_of_the_shared_parts_by_examples(
    name: str, settings: dict[str, int], tmp_path: Path
) -> None:
    loop = done(small(name, **DIGITS, **settings), tmp_path, 1)
    cohort, _ = loop.process.sample(1, loop.state.participation)
    ids, u = cohort.tolist(), loop.state.server.params
    n = loop.task.data.num_examples(cohort.numpy(), "train")
    ends = [
        loop.engine.work.one(
            loop.method.train, i, loop.state.server, state_of(loop, i), 1
        )[0]
        for i in ids
    ]  # type: ignore[attr-defined]
    assert len(ids) == settings.get("participation__cohort", 5)
    assert len(set(n)) == len(n), "this test needs clients of different sizes"
    loop.round()
    for key, start in u.items():
        u_i = np.stack([(start + end.delta[key]).double().numpy() for end in ends])
        expected = torch.from_numpy(np.average(u_i, axis=0, weights=n))
        assert (loop.state.server.params[key] - expected).abs().max() < 1e-6, key


# Limits in which a method is another


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize("name", PARTIAL)
def test_with_nothing_personal_it_is_fedavg_bit_for_bit(
    name: str, engine: str, tmp_path: Path
) -> None:
    settings = {
        **DIGITS,
        "local__epochs": 2,
        "engine__name": engine,
        "engine__chunk": 3,
    }
    fedavg = run(small("fedavg", **settings), tmp_path / "fedavg")
    found = run(small(name, **settings, method__personal=[]), tmp_path / name)
    assert found.params_sha256 == fedavg.params_sha256
    assert found.final == fedavg.final
    assert (found.bytes_up, found.bytes_down) == (fedavg.bytes_up, fedavg.bytes_down)


@pytest.mark.parametrize("name", PARTIAL)
def test_with_everything_personal_clients_train_alone_on_their_own_batches(
    name: str, tmp_path: Path
) -> None:
    loop = loop_of(small(name, method__personal=["all"]), tmp_path)
    expected = [loop.task.init_params() for _ in range(12)]
    for t in range(4):
        cohort, _ = loop.process.sample(t, loop.state.participation)
        for i in cohort.tolist():
            own = plan(
                loop, i, t, number=0 if name == "fedsim" else 1
            )  # FedAlt's first plan is for u
            expected[i] = local_sgd(loop.task.loss, expected[i], own, 0.05).params
        row = loop.round()
        assert row["bytes_down"] == 0
        assert row["bytes_up"] == 5 * 4  # the mean training loss, for the log
    assert trees.leaves(loop.state.server) == []
    for i, params in enumerate(expected):
        assert equal(state_of(loop, i).v, params), f"client {i}"


@pytest.mark.parametrize("name", PARTIAL)
def test_with_one_client_it_is_sgd_on_the_joint_model(
    name: str, tmp_path: Path
) -> None:
    passes = (
        {"method__shared_passes": 1, "method__personal_passes": 0}
        if name == "fedalt"
        else {}
    )
    loop = done(
        toy(
            name,
            "identical",
            population=1,
            local__batch_size=3,
            local__steps=4,
            **passes,
        ),
        tmp_path,
    )
    model = build_task(loop.experiment).model
    trained = [
        p for key, p in model.named_parameters() if name == "fedsim" or key in SHARED
    ]
    sgd = torch.optim.SGD(trained, lr=0.05)
    for t in range(3):
        for x, y, mask in zip(*plan(loop, 0, t), strict=True):
            sgd.zero_grad()
            (squared_error(model(x), y) * mask).sum().div(mask.sum()).backward()
            sgd.step()
    # not 1e-12: the weight of the client, 1, is a quotient of float32
    assert_close(
        model_of(loop, 0),
        dict(model.named_parameters()),
        1e-8,
        f"{name} with one client",
    )


@pytest.mark.parametrize("name", PARTIAL)
def test_clients_with_the_same_data_stay_equal_and_equal_the_centralised_run(
    name: str, tmp_path: Path
) -> None:
    loop = done(toy(name, "identical", population=4), tmp_path / "four")
    alone = done(toy(name, "identical", population=1), tmp_path / "one")
    for i in range(4):
        assert_close(
            model_of(loop, i),
            model_of(alone, 0),
            1e-12,
            f"client {i} and the client that is alone",
        )


@pytest.mark.parametrize("name", PARTIAL)
def test_a_penalty_of_zero_changes_nothing_and_a_larger_one_holds_v_nearer_to_v0(
    name: str, tmp_path: Path
) -> None:
    loops = [
        done(small(name, **settings), tmp_path / str(i))
        for i, settings in enumerate(
            [
                {},
                {"method__penalty": 0.0},
                {"method__penalty": 1.0},
                {"method__penalty": 8.0},
            ]
        )
    ]
    assert equal(loops[0].state.server, loops[1].state.server)
    assert equal(states_of(loops[0]), states_of(loops[1]))
    v0 = state_of(loops[0], 0)._replace(
        v=split(loops[0].task.init_params(), ["output"])[1]
    )
    away = [
        sum(trees.dot(d, d).item() for d in (trees.sub(s, v0) for s in states_of(loop)))
        for loop in loops
    ]
    assert away[0] == away[1] > away[2] > away[3] > 0


@pytest.mark.parametrize("name", PARTIAL)
def test_a_client_without_examples_keeps_its_v_whatever_the_penalty(
    name: str, tmp_path: Path
) -> None:
    e = small(
        name,
        task="tests.test_personal:with_an_empty_client",
        method__penalty=1.0,
        participation__cohort=12,
    )
    loop = loop_of(e, tmp_path)
    assert loop.engine.states is not None
    moved = trees.map(
        lambda x: x[None] + 1, state_of(loop, 11)
    )  # away from v0, where the penalty has a gradient
    loop.engine.states.put([11], moved)
    loop.round()
    assert equal(state_of(loop, 11), trees.at(moved, 0))


def with_an_empty_client(e: Experiment) -> Task:
    """`layered` with 11 clients that hold something; the twelfth has no example."""
    task = layered(e.model_copy(update={"population": 11}))
    data = task.data
    task.data = FederatedData(
        Examples(data.x, data.y),
        data.test,
        data.order,
        np.append(data.offsets, data.offsets[-1]),
    )
    return task


def test_pfedme_without_lambda_leaves_the_global_model_as_it_is(tmp_path: Path) -> None:
    loop = done(small("pfedme", method__lam=0.0), tmp_path)
    assert equal(loop.state.server.params, loop.task.init_params())


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_ditto_without_lambda_is_local_training_beside_fedavg(
    engine: str, tmp_path: Path
) -> None:
    settings = {"engine__name": engine, "engine__chunk": 3, **LAYERED}
    loop = loop_of(small("ditto", method__lam=0.0, **settings), tmp_path / "ditto")
    own = [loop.task.init_params() for _ in range(12)]
    for t in range(4):
        for i in loop.process.sample(t, loop.state.participation)[0].tolist():
            own[i] = local_sgd(loop.task.loss, own[i], plan(loop, i, t, 1), 0.05).params
        loop.round()
    for i, params in enumerate(own):
        assert_close(
            state_of(loop, i).v,
            params,
            0.0 if engine == "sequential" else 1e-6,
            f"client {i}",
        )
    fedavg = run(small("fedavg", **settings), tmp_path / "fedavg")
    assert equal(loop.state.server.params, fedavg.params), (
        "w is FedAvg's, for it uses the same plan of batches"
    )


@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fedavg", ["all"]),
        ("fedavg", ["output"]),
        ("fedsim", ["output"]),
        ("ditto", ["all"]),
    ],
)
def test_fine_tuning_is_sgd_from_the_clients_own_model_on_these_parts(
    name: str, parts: list[str], penalty: float, tmp_path: Path
) -> None:
    """With parts = all and the penalty it is Ditto after the fact, without the
    penalty full fine-tuning."""
    settings = {
        "finetune__epochs": 2,
        "finetune__lr": 0.03,
        "finetune__parts": parts,
        "finetune__penalty": penalty,
    }
    loop = loop_of(small(name, **settings, **LAYERED), tmp_path)
    found = loop.run().final["finetuned_loss"]
    work, losses = loop.engine.work, []  # type: ignore[attr-defined]
    for i in range(12):
        batches = trees.at(work.batches(loop.method.finetune, [i], 3), 0)
        fixed, start = split(model_of(loop, i), parts)
        v = {key: value.clone().requires_grad_() for key, value in start.items()}
        assert len(batches.train.mask) == 2 * 3, (
            "two epochs of nine examples, four a batch"
        )
        for x, y, mask in zip(*batches.train, strict=True):
            value = loop.task.loss({**fixed, **v}, x, y, mask)
            value = value + penalty * sum(
                (v[key] - start[key]).square().sum() for key in v
            )
            gradients = torch.autograd.grad(value, list(v.values()))
            v = {
                key: (p - 0.03 * g).detach().requires_grad_()
                for (key, p), g in zip(v.items(), gradients, strict=True)
            }
        losses.append(loop.task.evaluate({**fixed, **v}, batches.test)["loss"].item())
    assert found["mean"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert found["p90"] == pytest.approx(np.quantile(losses, 0.9), abs=1e-6)
