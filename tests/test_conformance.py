"""What must hold for every method: each test runs over every file in strategies/, and over the test methods with state."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore import method as methods
from fedcore import trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.base import Work
from fedcore.engines.run_client import run_client
from fedcore.messages import wire
from fedcore.method import data_of
from fedcore.rounds.loop import run
from fedcore.types import Model, Reports, Round, Stateless
from tests import golden
from tests.helpers import (
    NOISY,
    STRATEGIES,
    TOYS,
    VARIANTS,
    assert_close,
    equal,
    loop_of,
    small,
)

every = pytest.mark.parametrize("name", [*STRATEGIES, *TOYS, *VARIANTS])
shipped = pytest.mark.parametrize("name", STRATEGIES)


def client_functions(name: str) -> list[str]:
    """Of the method, whether these settings use them or not."""
    cls = methods.load(small(name).method.name)
    return [
        attribute
        for attribute in dir(cls)
        if hasattr(getattr(cls, attribute), "client_data")
    ]


# Same in every engine


@every
def test_vectorised_computes_what_sequential_computes(
    name: str, tmp_path: Path
) -> None:
    one = run(small(name), tmp_path / "a")
    for chunk in (3, 64):
        other = run(
            small(name, engine__name="vectorised", engine__chunk=chunk),
            tmp_path / f"b{chunk}",
        )
        assert_close(other.params, one.params, 1e-6, f"{name} in chunks of {chunk}")
        assert other.final["test_loss"] == pytest.approx(
            one.final["test_loss"], abs=1e-6
        )
        assert other.dropped == one.dropped == {}


@every
def test_two_runs_of_one_seed_are_identical_and_another_seed_differs(
    name: str, tmp_path: Path
) -> None:
    for engine in ("sequential", "vectorised"):
        shas = [
            run(
                small(name, engine__name=engine, seed=seed), tmp_path / f"{engine}{i}"
            ).params_sha256
            for i, seed in enumerate((3, 3, 4))
        ]
        assert shas[0] == shas[1]
        assert shas[0] != shas[2]


@every
def test_noise_on_the_links_is_the_same_in_every_engine_and_every_run(
    name: str, tmp_path: Path
) -> None:
    e = small(name, **NOISY)
    one, again = (run(e, tmp_path / folder) for folder in "ab")
    batched = run(
        small(name, **NOISY, engine__name="vectorised", engine__chunk=3), tmp_path / "c"
    )
    assert one.params_sha256 == again.params_sha256
    assert_close(batched.params, one.params, 1e-6, f"{name} in chunks of 3")
    silent = run(small(name), tmp_path / "d")
    assert silent.params_sha256 != one.params_sha256
    assert (silent.bytes_up, silent.bytes_down) == (one.bytes_up, one.bytes_down)


@shipped
def test_the_curve_is_the_recorded_one(name: str, tmp_path: Path) -> None:
    recorded = json.loads(golden.FILE.read_text())
    assert name in recorded, "record it: python -m tests.golden"
    assert golden.curve(name, tmp_path / "r") == pytest.approx(recorded[name], rel=1e-5)


# Invariances


@every
def test_padding_a_client_changes_nothing(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    work = Work(loop.task, loop.method, loop.e.local, 0)
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        batches = trees.at(work.batches(fn, [1], 0), 0)
        plans = work.passes(fn)
        padded = trees.map(
            lambda v, n=plans: torch.cat(
                [torch.cat([p, torch.zeros_like(p)]) for p in v.chunk(n)]
            ),
            batches,
        )
        if (found := asked(loop, fn)) is None:
            continue
        down, state = found
        plain = run_client(fn, loop.task, torch.tensor(0.0), down, state, batches)
        more = run_client(fn, loop.task, torch.tensor(0.0), down, state, padded)
        assert_close(
            more, plain, 1e-7, f"{name}.{function} with two more empty batches"
        )


@every
def test_a_client_without_examples_has_no_weight_and_does_no_harm(
    name: str, tmp_path: Path
) -> None:
    loop = loop_of(small(name, participation__cohort=12, rounds=2), tmp_path)
    data = loop.task.data
    offsets = np.append(data.offsets, data.offsets[-1])  # client 12 holds nothing
    loop.task.data = FederatedData(
        Examples(data.x, data.y), data.test, data.order, offsets
    )
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        if (found := asked(loop, fn)) is None:
            continue
        if name in VARIANTS:  # which start every client before its first work
            list(
                loop.engine.each(loop.method.start, torch.tensor([12]), Stateless(), 0)
            )
        (r,) = loop.engine.each(fn, torch.tensor([12]), found[0], 0)
        assert r.failed == {}
        assert r.num_examples.tolist() == [0]
        assert bool(trees.finite(r.up))


@every
def test_the_order_of_clients_does_not_matter(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    cohort = torch.tensor([0, 3, 4, 9])

    def one_round(order: slice) -> torch.Tensor:
        def each(fn, clients, down):  # type: ignore[no-untyped-def]
            yield from list(loop.engine.each(fn, clients, down, 0))[order]

        server = loop.method.round(
            loop.state.server,
            Round(0, cohort, 12, loop.task, each, loop.memory, 0, loop.rates),
        )
        loop.engine.states.rollback()
        loop.memory.rollback()
        return server.params

    assert_close(
        one_round(slice(None, None, -1)),
        one_round(slice(None)),
        1e-6,
        f"{name} in reverse order",
    )


# State


@every
def test_clients_outside_the_cohort_are_untouched(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    cohort, _ = loop.process.sample(0, loop.state.participation)
    loop.round()
    absent = next(i for i in range(12) if i not in cohort.tolist())
    before = {store: store.get(absent) for store in loop.stores.values()}
    if name.startswith("clu"):  # whose clients all work on, heard or not
        return
    if (
        name != "fedamd" and name not in VARIANTS
    ):  # which ask everybody once, before the first round
        assert all(set(store.row_of) <= set(cohort.tolist()) for store in before)
    loop.method.round(
        loop.state.server,
        Round(1, cohort, 12, loop.task, each_of(loop, 1), loop.memory, 0, loop.rates),
    )
    for store, row in before.items():
        store.commit()
        assert equal(store.get(absent), row)


@every
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_stopping_and_resuming_equals_never_having_stopped(
    name: str, engine: str, tmp_path: Path
) -> None:
    whole = run(small(name, engine__name=engine, rounds=5), tmp_path / "whole")
    run(small(name, engine__name=engine, rounds=2), tmp_path / "part")
    resumed = run(small(name, engine__name=engine, rounds=5), resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    assert [row["round"] for row in resumed.history] == [1, 2, 3, 4, 5]
    assert resumed.history[3]["test_loss"] == whole.history[3]["test_loss"]


@every
def test_evaluation_leaves_no_trace(name: str, tmp_path: Path) -> None:
    often = run(small(name, evaluation__every=1), tmp_path / "often")
    seldom = run(small(name, evaluation__every=4), tmp_path / "seldom")
    assert often.params_sha256 == seldom.params_sha256


# Wire


@every
def test_what_is_sent_is_what_is_declared(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    work = Work(loop.task, loop.method, loop.e.local, 0)
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        down_type, up_type = wire.schemas(fn)
        if (found := asked(loop, fn)) is None:
            continue
        down, state = found
        assert equal(wire.decode(wire.encode(down), down_type, down), down)
        up, _ = work.one(fn, 1, down, state, 0)
        assert equal(wire.decode(wire.encode(up), up_type, up), up)
        flat = trees.flatten(up)
        if not flat:  # it works without a message
            continue
        path, x = next(iter(flat.items()))
        with pytest.raises(wire.WireError, match="stowaway"):
            wire.decode(wire.encode({**flat, "stowaway": x}), up_type, up)
        del flat[path]
        with pytest.raises(wire.WireError, match=f'no "{path}"'):
            wire.decode(wire.encode(flat), up_type, up)


# Bad weather


@every
def test_a_cohort_of_one_works(name: str, tmp_path: Path) -> None:
    assert (
        run(small(name, participation__cohort=1), tmp_path / "r").clients_trained >= 4
    )


@every
def test_a_round_that_nobody_attends_is_survived(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("1 2\n\n3\n0 1\n")
    values = {"name": "trace", "file": str(trace)}
    result = run(
        small(name).model_copy(
            update={"participation": experiment_participation(values)}
        ),
        tmp_path / "r",
    )
    assert [row["cohort"] for row in result.history[1:]] == [0, 1, 2]
    assert result.history[0]["cohort"] in (2, 12)  # FedAMD asks everybody once
    assert all(bool(torch.isfinite(p).all()) for p in result.params.values())


@every
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_client_that_sends_nan_is_left_out_and_counted(
    name: str, engine: str, tmp_path: Path
) -> None:
    loop = loop_of(small(name, engine__name=engine, participation__cohort=12), tmp_path)
    loop.task.data.x[loop.task.data.rows(4, "train")] = torch.nan
    row = loop.round()
    assert row["dropped"]["not finite"] >= 1
    assert bool(trees.finite(loop.state.server))
    assert bool(trees.finite(loop.engine.states.get(4)))


@every
def test_a_client_that_raises_is_left_out_and_the_others_count(
    name: str, tmp_path: Path
) -> None:
    loop = loop_of(
        small(
            name, participation__cohort=12, engine__name="vectorised", engine__chunk=4
        ),
        tmp_path,
    )
    rows = loop.task.data.rows

    def broken(client: int, data: str) -> np.ndarray:
        if client == 5:
            raise OSError("disk on fire")
        return rows(client, data)

    loop.task.data.rows = broken  # type: ignore[method-assign]
    row = loop.round()
    assert row["dropped"]["error"] >= 1
    assert row["reports"] >= 11


# Files


@shipped
def test_every_method_has_a_preset_that_loads_and_says_how_to_run_it(name: str) -> None:
    file = Path("strategies") / f"{name}.toml"
    assert file.read_text().startswith(f"# fedcore run strategies/{name}.toml")
    e = Experiment.load(file)
    assert e.method.name == name
    assert Experiment.parse(tomllib.loads(e.to_toml())) == e


@shipped
def test_every_method_says_what_it_is_and_every_setting_what_it_means(
    name: str,
) -> None:
    cls = methods.load(name)
    module = __import__(cls.__module__, fromlist=["_"])
    first = module.__doc__.splitlines()[0]
    assert " - " in first
    assert "(" in first, "the first line names the paper"
    for key, field in methods.settings_of(cls).model_fields.items():
        assert key == "name" or field.description, f"{name}.{key} has no description"
    assert data_of(cls.evaluate) == "test"


@shipped
def test_every_client_function_is_used_by_settings_that_are_tested(
    name: str, tmp_path: Path
) -> None:
    used: set[str] = set()
    for number, variant in enumerate(
        [name, *(v for v, (method, _, _) in VARIANTS.items() if method == name)]
    ):
        loop = loop_of(small(variant), tmp_path / str(number))
        used |= {
            f
            for f in client_functions(variant)
            if asked(loop, getattr(loop.method, f)) is not None
        }
    assert used == set(client_functions(name))


def each_of(loop, t: int):  # type: ignore[no-untyped-def]
    return lambda fn, clients, down: loop.engine.each(fn, clients, down, t)


def experiment_participation(values: dict[str, str]):  # type: ignore[no-untyped-def]
    return small("fedavg", participation=values).participation


def asked(loop, fn):  # type: ignore[no-untyped-def]
    """(what the server sends to `fn` in round 0, client 1's state after it); None where these settings have no use for `fn`."""
    if fn.__name__ in ("evaluate", "finetune"):
        return Model(loop.state.server.params), loop.method.init_client(
            loop.task.init_params()
        )
    caught = {}

    def each(f, clients, down):  # type: ignore[no-untyped-def]
        caught[f.__name__] = down
        for r in loop.engine.each(f, clients, down, 0):
            yield Reports(r.clients, r.up, r.num_examples)

    loop.method.round(
        loop.state.server,
        Round(0, torch.arange(3), 12, loop.task, each, loop.memory, 0, loop.rates),
    )
    state = trees.map(torch.clone, loop.engine.states.get(1))
    loop.engine.states.rollback()
    loop.memory.rollback()
    return (caught[fn.__name__], state) if fn.__name__ in caught else None
