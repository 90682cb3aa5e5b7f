"""Partial personalisation (FedSim, FedAlt), Ditto and pFedMe: the exact properties that their papers' definitions have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.models import (
    Cnn,
    LeNet,
    Logistic,
    LowRank,
    Mlp,
    ModelSettings,
    ResNet,
    Vit,
)
from fedcore.models.lowrank import lowrank
from fedcore.models.vit import Prefix
from fedcore.rounds.loop import Loop, run, spread
from fedcore.split import PARTS, split
from fedcore.task import Task, squared_error
from fedcore.tasks import build_task
from fedcore.types import Batches, Model, Params
from tests.helpers import LAYERED, assert_close, equal, loop_of, small
from tests.methods import layered

PARTIAL = ["fedsim", "fedalt"]
PERSONAL = [*PARTIAL, "ditto", "pfedme"]
SHARED, OWN = (
    {"0.weight", "0.bias"},
    {"1.weight", "1.bias"},
)  # of the task "layered", with personal = ["output"]
DIGITS: dict[str, Any] = {
    "task": "digits",
    "options": {},
    "population": 10,
    "partition__alpha": 0.3,
    "model__name": "mlp",
    "model__hidden": [8],
    "rounds": 2,
}


# Tasks


class Sum(nn.Module):
    """The output u + v, or the two outputs u x_1 and v x_2, of which neither parameter sees the other's."""

    def __init__(self, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        self.u, self.v = (
            nn.Parameter(torch.tensor(start, dtype=torch.float64))
            for start in (1.0, 2.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.stack([self.u * x[:, 0], self.v * x[:, 1]], 1)
            if self.separate
            else (self.u + self.v).expand(len(x), 1)
        )


def coupled(e: Experiment) -> Task:
    """f_i = 1/2 (u + v - c_i)^2 with c_i the options' `c`, one example a client; u = 1 and v = 2 at the start."""
    c = torch.tensor(e.options["c"], dtype=torch.float64)[:, None]
    rows = Examples(torch.zeros_like(c), c)
    return Task(
        Sum(False),
        FederatedData(rows, rows, np.arange(len(c)), np.arange(len(c) + 1)),
        loss=squared_error,
        metrics={},
    )


def separable(e: Experiment) -> Task:
    """f_i(u) + g_i(v), three clients with 5, 4 and 2 examples."""
    draw = np.random.default_rng(0)
    rows = Examples(
        *(torch.from_numpy(draw.standard_normal((11, 2))) for _ in range(2))
    )
    return Task(
        Sum(True),
        FederatedData(rows, rows, np.arange(11), np.array([0, 5, 9, 11])),
        loss=squared_error,
        metrics={},
    )


def identical(e: Experiment) -> Task:
    """Two linear layers in float64; every client holds the same seven examples."""
    draw, n = np.random.default_rng(1), e.population or 1
    rows = Examples(
        torch.from_numpy(draw.standard_normal((7, 3))),
        torch.from_numpy(draw.standard_normal((7, 1))),
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    return Task(
        model,
        FederatedData(rows, rows, np.tile(np.arange(7), n), np.arange(n + 1) * 7),
        loss=squared_error,
        metrics={},
    )


def toy(name: str, task: str, **settings: Any) -> Experiment:
    """Two local steps on all examples, everybody in every round, nothing held out."""
    everybody = {
        "population": None,
        "participation__fraction": 1.0,
        "participation__cohort": None,
        "holdout": 0.0,
        "rounds": 3,
    }
    batches = {"local__batch_size": 64, "local__steps": 2}
    partial = (
        {"method__personal": ["v"] if task != "identical" else ["output"]}
        if name in PARTIAL
        else {}
    )
    return small(
        name,
        task=f"tests.test_personal:{task}",
        **{**everybody, **batches, **partial, **settings},
    )


def done(e: Experiment, folder: Path, rounds: int | None = None) -> Loop:
    """After its rounds, or so many."""
    loop = loop_of(e, folder)
    for _ in range(e.rounds if rounds is None else rounds):
        loop.round()
    return loop


def state_of(loop: Loop, client: int) -> Any:
    assert loop.engine.states is not None
    return loop.engine.states.get(client)


def states_of(loop: Loop) -> list[Any]:
    return [
        trees.map(torch.clone, state_of(loop, i)) for i in range(loop.task.population)
    ]


def model_of(loop: Loop, client: int) -> Params:
    return loop.method.model_for(loop.state.server, state_of(loop, client))


def train(loop: Loop, batches: Batches, client: int = 0) -> Any:
    """(up, new state) of one client's training on these batches."""
    return loop.method.train(
        loop.task, torch.tensor(0.0), loop.state.server, state_of(loop, client), batches
    )  # type: ignore[attr-defined]


def plan(loop: Loop, client: int, t: int = 0, number: int = 0) -> Batches:
    """The client's own batches, each plan with a shuffle of its own."""
    found: Batches = trees.at(
        loop.task.data.batches(
            np.array([client]),
            "train",
            loop.experiment.local,
            loop.experiment.seed,
            t,
            number,
        ),
        0,
    )
    return found


# Parts: who holds what


def named(
    settings: ModelSettings, rank: LowRank | None = None, classes: int = 10
) -> Params:
    model = settings.build((1, 16, 16), classes)
    return dict((lowrank(model, rank) if rank else model).named_parameters())


MODELS = {
    "logistic": named(Logistic()),
    "mlp": named(Mlp(hidden=(16, 8))),
    "cnn": named(Cnn()),
    "lenet": named(LeNet()),
    "resnet": named(ResNet(depth=10, width=8, groups=2)),
    "resnet with adapters": named(ResNet(depth=10, width=8, groups=2, adapter=True)),
    "vit": named(
        Vit(depth=11, adapter=4, prefix=Prefix(form="additive", bottleneck=3))
    ),
    "pfedpara": named(Mlp(hidden=(16,)), LowRank(form="pfedpara", gamma=0.5)),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_part_of_every_model_splits_it_in_two(model: str) -> None:
    params = MODELS[model]
    for part, members in PARTS.items():
        if not members(params):
            with pytest.raises(
                SettingsError,
                match=f'the part "{part}": no parameter of the model belongs to it',
            ):
                split(params, [part])
            continue
        shared, personal = split(params, [part])
        assert len(personal) > 0
        assert [*shared] == [name for name in params if name not in personal], (
            "every name once, in the order of the model"
        )
        assert [*personal] == [name for name in params if name not in shared]
    assert split(params, []) == (params, {})
    assert split(params, ["all"]) == ({}, params)


def test_the_parts_of_a_vision_transformer_are_those_of_the_fedperfix_table_and_leave_nothing_out() -> (
    None
):
    params = MODELS["vit"]
    block = r"blocks\.\d+\."
    table = {
        "input": r"cls_token|pos_embed|patch_embed\..+",
        "attention": block + r"attn\.(qkv|proj)\.(weight|bias)",
        "prefix": block + r"attn\.prefix\.(down|up)\.(weight|bias)",
        "mlp": block + r"mlp\.(fc1|fc2)\.(weight|bias)",
        "norm": rf"({block}norm[12]|norm)\.(weight|bias)",
        "output": r"head\.(weight|bias)",
    }
    found = {part: set(split(params, [part])[1]) for part in table}
    assert found == {
        part: {name for name in params if re.fullmatch(pattern, name)}
        for part, pattern in table.items()
    }
    adapters = {name for name in params if ".adapter" in name}
    assert sum(map(len, found.values())) + len(adapters) == len(params), (
        "the parts overlap"
    )
    assert set().union(*found.values(), adapters) == set(params)
    assert set(split(params, ["adapter"])[1]) == adapters | found["norm"]
    assert sum(params[name].numel() for name in found["prefix"]) == 11 * (
        3 * 32 * 3 + 3 + 2 * 32
    )  # 3 d r_b + r_b + 2 d a block


def test_patterns_match_whole_names() -> None:
    params = MODELS["vit"]
    assert {name.split(".")[1] for name in split(params, [r"blocks\.1\..+"])[1]} == {
        "1"
    }  # and not block 10
    assert [*split(params, ["cls_token", r"head\.bias"])[1]] == [
        "cls_token",
        "head.bias",
    ]
    for part in ("head", "weight", "blocks", "blocks.1", "token", "Output", ""):
        with pytest.raises(
            SettingsError,
            match=r"no parameter .*; expected all, input, .*, or a regular expression for whole names",
        ):
            split(params, ["output", part])


def test_what_is_shared_depends_on_no_personal_size() -> None:
    """FedPerfix's messages: the same whatever the bottleneck, the scale and the number of classes."""
    found = []
    for bottleneck, scale, classes in ((2, 0.8, 3), (9, 1.5, 60)):
        params = named(
            Vit(prefix=Prefix(form="additive", bottleneck=bottleneck, scale=scale)),
            classes=classes,
        )
        found.append(
            {
                name: p.shape
                for name, p in split(params, ["prefix", "output"])[0].items()
            }
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("name", PARTIAL)
def test_the_server_holds_the_shared_part_alone_and_a_client_the_rest(
    name: str, tmp_path: Path
) -> None:
    loop = done(small(name), tmp_path)
    assert set(trees.flatten(loop.state.server)) == {f"params/{key}" for key in SHARED}
    loop.save()
    assert set(loop.checkpoint.part("server")) == {f"params/{key}" for key in SHARED}
    assert all(
        set(trees.flatten(state)) == {f"v/{key}" for key in OWN}
        for state in states_of(loop)
    )


# The papers' arithmetic


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
    """Their model is all of (u, v), whose gradients are equal: their sum s moves by twice the gradient of 1/2 (s - c)^2."""
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


# Phases of FedAlt


def alternating(folder: Path, **settings: Any) -> Loop:
    """After two rounds of the same run, so that v_i is not v0: what is looked at is the third, with other settings."""
    before = done(small("fedalt"), folder / "before", 2)
    loop = loop_of(small("fedalt", **settings), folder / "now")
    assert loop.engine.states is not None
    loop.state = before.state
    loop.engine.states.put(list(range(12)), trees.stack(states_of(before)))
    loop.engine.states.commit()
    return loop


def test_phase_v_has_u_as_received_and_phase_u_has_the_new_v(tmp_path: Path) -> None:
    both, only_v = (
        alternating(tmp_path / str(i), **s)
        for i, s in enumerate(
            [
                {"method__penalty": 0.3},
                {"method__penalty": 0.3, "method__shared_passes": 0},
            ]
        )
    )
    for_u, for_v = plan(both, 3, 2, 0), plan(both, 3, 2, 1)
    up, new = train(
        both, Batches(*(torch.cat(pair) for pair in zip(for_u, for_v, strict=True))), 3
    )
    still, v = train(only_v, for_v, 3)
    assert equal(new, v)
    assert not equal(v, state_of(both, 3))
    assert all(not bool(x.any()) for x in trees.leaves(still.delta)), (
        "u moved in phase V"
    )
    # Phase U alone, from the new v, with a penalty that would pull v back if it were at work
    only_u = alternating(tmp_path / "u", method__penalty=5.0, method__personal_passes=0)
    assert only_u.engine.states is not None
    only_u.engine.states.put([3], trees.map(lambda x: x[None], v))
    again, kept = train(only_u, for_u, 3)
    assert equal(kept, v)
    assert equal(again.delta, up.delta)
    # and the same by hand: SGD on u with v held fixed
    held = v.v

    def loss(u: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return both.task.loss({**u, **held}, x, y, mask)

    u = both.state.server.params
    assert equal(up.delta, trees.sub(local_sgd(loss, u, for_u, 0.05).params, u))


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_without_a_phase_its_part_never_moves(engine: str, tmp_path: Path) -> None:
    babu = done(
        small("fedalt", method__personal_passes=0, engine__name=engine), tmp_path / "v"
    )
    shared, v0 = split(babu.task.init_params(), ["output"])
    assert all(equal(state.v, v0) for state in states_of(babu)), (
        "FedBABU's heads are as initialised"
    )
    assert not equal(babu.state.server.params, shared)
    frozen = done(
        small("fedalt", method__shared_passes=0, engine__name=engine), tmp_path / "u"
    )
    assert equal(frozen.state.server.params, shared)
    assert sum(not equal(state.v, v0) for state in states_of(frozen)) >= 5


# Who influences whom


@pytest.mark.parametrize("name", PERSONAL)
def test_a_clients_own_part_changes_nothing_of_the_others_nor_u_while_it_is_away(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "trace").write_text("0 1 2 3\n2 3 4\n0 3\n2 4\n1 2 3\n")
    seen = []
    for change in (False, True):
        e = small(
            name,
            rounds=5,
            participation={"name": "trace", "file": str(tmp_path / "trace")},
        )
        loop = done(e, tmp_path / str(change), 1)
        assert loop.engine.states is not None
        if change:
            loop.engine.states.put(
                [1], trees.map(lambda x: x[None] + 1, state_of(loop, 1))
            )
            loop.engine.states.commit()
        for _ in range(3):
            loop.round()
        others = [state_of(loop, i) for i in range(12) if i != 1]
        seen.append(
            (
                loop.state.server,
                [trees.map(torch.clone, s) for s in others],
                [model_of(loop, i) for i in (0, 2, 5)],
            )
        )
        kept = trees.map(torch.clone, state_of(loop, 1))
        loop.round()
        assert not equal(state_of(loop, 1), kept), "client 1 is back, and trains"
        seen[-1] += (loop.state.server,)  # type: ignore[assignment]
    assert equal(seen[0][:3], seen[1][:3])
    if name in PARTIAL:  # Ditto's and pFedMe's own models never touch what they send
        assert not equal(seen[0][3:], seen[1][3:]), (
            "this test would pass whatever is compared"
        )


@pytest.mark.parametrize("name", PARTIAL)
def test_with_everything_personal_other_clients_data_are_of_no_consequence(
    name: str, tmp_path: Path
) -> None:
    loops = [
        loop_of(small(name, method__personal=["all"]), tmp_path / str(i))
        for i in range(2)
    ]
    data = loops[1].task.data
    data.x[data.order[data.offsets[3] : data.offsets[4]]] *= -2  # client 3's
    for loop in loops:
        for _ in range(4):
            loop.round()
    differs = [
        i for i in range(12) if not equal(state_of(loops[0], i), state_of(loops[1], i))
    ]
    assert differs == [3]


@pytest.mark.parametrize("name", PERSONAL)
def test_evaluation_and_fine_tuning_leave_no_trace(name: str, tmp_path: Path) -> None:
    seldom = loop_of(small(name), tmp_path / "seldom")
    seldom.run()
    tuned = loop_of(
        small(name, evaluation__every=1, finetune__epochs=2, finetune__lr=0.3),
        tmp_path / "often",
    )
    final = tuned.run().final
    assert final["finetuned_loss"]["mean"] != final["client_loss"]["mean"]
    assert equal(tuned.state.server, seldom.state.server)
    assert equal(states_of(tuned), states_of(seldom))
    assert tuned.engine.states is not None
    assert set(tuned.engine.states.row_of) == set(seldom.engine.states.row_of)  # type: ignore[union-attr]


# Measures


@pytest.mark.parametrize("name", PERSONAL)
def test_an_unseen_client_predicts_with_the_shared_part_and_v0(
    name: str, tmp_path: Path
) -> None:
    loop = done(small(name), tmp_path, 2)
    assert loop.engine.states is not None
    unseen = next(i for i in range(12) if i not in loop.engine.states.row_of)
    params = {
        **loop.task.init_params(),
        **loop.state.server.params,
    }  # (u, v0); of Ditto and pFedMe, w
    assert equal(model_of(loop, unseen), params)
    (found,) = loop.engine.each(
        loop.method.evaluate, torch.tensor([unseen]), Model(loop.state.server.params), 2
    )
    test = trees.at(loop.engine.work.batches(loop.method.evaluate, [unseen], 2), 0)  # type: ignore[attr-defined]
    assert (
        found.metrics["loss"].item() == loop.task.evaluate(params, test)["loss"].item()
    )
    assert loop.task.test(loop.state.server.params) == loop.task.test(params)
    seen = next(iter(loop.engine.states.row_of))
    assert not equal(model_of(loop, seen), params)


@pytest.mark.parametrize("name", PERSONAL)
def test_pooled_accuracy_is_that_over_all_held_out_examples(
    name: str, tmp_path: Path
) -> None:
    loop = loop_of(small(name, **DIGITS), tmp_path)
    found = loop.run().final["client_accuracy"]
    right = []
    for i in range(10):
        rows = loop.task.data.rows(i, "test")
        with torch.no_grad():
            outputs = loop.task.predict(model_of(loop, i), loop.task.data.x[rows])
        right.append((outputs.argmax(1) == loop.task.data.y[rows]).double().numpy())
    each = [r.mean() for r in right]
    assert len({len(r) for r in right}) > 3, (
        "this test needs clients of different sizes"
    )
    assert found["pooled"] == pytest.approx(np.concatenate(right).mean(), abs=1e-6)
    assert found["mean"] == pytest.approx(np.mean(each), abs=1e-6)
    assert found["p50"] == pytest.approx(np.median(each), abs=1e-6)
    assert found["std"] == pytest.approx(np.std(each), abs=1e-6)
    assert found["p10"] == pytest.approx(np.quantile(each, 0.1), abs=1e-6)
    assert found["lowest_tenth"] == pytest.approx(min(each), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_median_is_the_middle_and_equal_sizes_pool_to_the_mean(n: int) -> None:
    values = torch.from_numpy(np.random.default_rng(n).random(n))
    found = spread(values, torch.full((n,), 3.0, dtype=torch.float64))
    assert found["p50"] == pytest.approx(np.median(values.numpy()))
    assert found["pooled"] == pytest.approx(found["mean"])


# Ditto, pFedMe and fine-tuning in their limits


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
    """With parts = all and the penalty it is Ditto after the fact, without the penalty full fine-tuning."""
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


# Errors


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "fedalt",
            {"method__personal_passes": -1},
            r"method\.personal_passes = -1: .*greater than or equal to 0",
        ),
        (
            "fedalt",
            {"method__shared_passes": -1},
            r"method\.shared_passes = -1: .*greater than or equal to 0",
        ),
        (
            "fedalt",
            {"method__shared_passes": 0, "method__personal_passes": 0},
            "shared_passes and personal_passes are both 0",
        ),
        (
            "fedsim",
            {"method__penalty": -0.1},
            r"method\.penalty = -0\.1: .*greater than or equal to 0",
        ),
        (
            "fedsim",
            {"method__personal_lr": 0.0},
            r"method\.personal_lr = 0\.0: .*greater than 0",
        ),
        (
            "fedsim",
            {"method__personal": ["("]},
            r'method\.personal.*"\(" is no regular expression',
        ),
        (
            "fedsim",
            {"method__personal": ["head"]},
            'the part "head": no parameter of the model belongs to it; expected all, input',
        ),
        (
            "fedalt",
            {"method__personal": ["weight", "output"]},
            'the part "weight": no parameter of the model belongs to it',
        ),
        (
            "fedsim",
            {"method__personal": ["prefix"]},
            'the part "prefix": no parameter .* such as 0.weight, 0.bias, 1.weight, 1.bias',
        ),
        (
            "ditto",
            {"method__lam": -1.0},
            r"method\.lam = -1\.0: .*greater than or equal to 0",
        ),
        (
            "pfedme",
            {"method__lam": -1.0},
            r"method\.lam = -1\.0: .*greater than or equal to 0",
        ),
        (
            "pfedme",
            {"method__inner_steps": 0},
            r"method\.inner_steps = 0: .*greater than or equal to 1",
        ),
        (
            "fedsim",
            {"finetune__epochs": -1},
            r"finetune\.epochs = -1: .*greater than or equal to 0",
        ),
        ("fedsim", {"finetune__lr": 0.0}, r"finetune\.lr = 0\.0: .*greater than 0"),
        (
            "fedsim",
            {"finetune__penalty": -1.0},
            r"finetune\.penalty = -1\.0: .*greater than or equal to 0",
        ),
        (
            "fedsim",
            {"finetune__part": ["all"]},
            r"unknown key finetune\.part; did you mean finetune\.parts",
        ),
        (
            "fedsim",
            {"finetune__parts": ["("]},
            r'finetune\.parts.*"\(" is no regular expression',
        ),
        (
            "fedsim",
            {"finetune__epochs": 1, "finetune__parts": ["heads"]},
            'the part "heads": no parameter of the model belongs to it',
        ),
        ("fedsim", {"finetune__epochs": 1, "finetune__parts": []}, r"finetune\.parts"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(small(name, **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_one_part_may_be_given_as_a_word() -> None:
    assert (
        small("fedsim", method__personal="body").method
        == small("fedsim", method__personal=["body"]).method
    )


RIGHT = {"0.weight": torch.ones(4, 5), "0.bias": torch.ones(4)}
WRONG = {
    "another name": (
        {**RIGHT, "2.weight": torch.ones(1)},
        r'it holds "2\.weight" of shape \(1,\), the model has no such parameter',
    ),
    "another shape": (
        {"0.weight": torch.ones(5, 4)},
        r'it holds "0\.weight" of shape \(5, 4\), the model has of shape \(4, 5\)',
    ),
    "nothing": ({}, "it holds no parameters"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_start_that_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    tensors, message = WRONG[kind]
    save_file(tensors, tmp_path / "start.safetensors")
    with pytest.raises(
        SettingsError, match=r"initial = .*start\.safetensors: " + message
    ):
        run(
            small("fedsim", initial=str(tmp_path / "start.safetensors")), tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "no safetensors",
        "an empty folder",
        "another model's run",
        "a damaged run",
    ],
)
def test_a_start_that_cannot_be_read_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    place = tmp_path / "start"
    if kind == "no safetensors":
        place.write_text("no tensors")
    elif kind == "an empty folder":
        place.mkdir()
    elif kind != "missing":
        run(
            small(
                "fedavg", rounds=1, **({} if kind == "another model's run" else LAYERED)
            ),
            place,
        )
    if kind == "a damaged run":
        next((place / "checkpoint").glob("server-*")).write_bytes(b"no tensors")
    with pytest.raises(SettingsError) as caught:
        run(small("fedsim", initial=str(place)), tmp_path / "r")
    assert f"initial = {place}" in str(caught.value), (
        "a message names the setting that the user typed"
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", PERSONAL)
def test_a_run_starts_from_another_runs_model_and_what_that_lacks_stays_as_it_is(
    name: str, tmp_path: Path
) -> None:
    fedavg = loop_of(small("fedavg", **LAYERED), tmp_path / "fedavg")
    whole = fedavg.run().params
    fedsim = loop_of(small("fedsim"), tmp_path / "fedsim")
    shared = fedsim.run().params
    own = fedsim.task.init_params()
    for source, expected in (
        (tmp_path / "fedavg", whole),
        (tmp_path / "fedsim", {**own, **shared}),
    ):
        loop = loop_of(
            small(name, **LAYERED, initial=str(source)),
            tmp_path / f"from {source.name}",
        )
        assert loop.state.t == 0
        assert equal(model_of(loop, 0), expected), source.name
        assert equal({**loop.task.init_params(), **loop.state.server.params}, expected)


def test_the_penalty_is_centred_on_the_model_that_the_run_started_from(
    tmp_path: Path,
) -> None:
    run(small("fedavg", **LAYERED), tmp_path / "fedavg")
    for name in PARTIAL:
        settings = {
            "method__penalty": 2e5,
            "method__personal_lr": 1e-6,
            "method__local_lr": 1e-6,
        }  # lr 2 lambda = 0.4
        loop = loop_of(
            small(name, initial=str(tmp_path / "fedavg"), **settings), tmp_path / name
        )
        v0, away = state_of(loop, 0).v, trees.map(lambda x: x + 1, state_of(loop, 0).v)
        assert loop.engine.states is not None
        loop.engine.states.put(
            [0], trees.map(lambda x: x[None], state_of(loop, 0)._replace(v=away))
        )
        own = plan(loop, 0)
        batches = (
            own if name == "fedsim" else Batches(*(torch.cat([x, x]) for x in own))
        )
        left = 0.6 ** len(own.mask)
        assert_close(
            train(loop, batches)[1].v,
            trees.map(lambda x, left=left: x + left, v0),
            1e-3,
            name,
        )
