"""What must hold for every method: each test runs over all files in strategies/.

`make test` runs most of it for representatives only, `make test-all` for all methods.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore import methods, trees
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.base import Work
from fedcore.engines.run_client import run_client
from fedcore.messages import wire
from fedcore.method import data_of
from fedcore.reports import Reports
from fedcore.rounds.loop import Loop, run
from fedcore.types import ClientFunction, Model, Tree
from tests import golden
from tests.helpers import (
    NOISY,
    STRATEGIES,
    TOYS,
    VARIANTS,
    Reference,
    answers,
    assert_close,
    equal,
    loop_of,
    loop_round,
    per_method,
    small,
)

POPULATION = 12
every = per_method([*STRATEGIES, *TOYS, *VARIANTS])
every_quickly = pytest.mark.parametrize("name", [*STRATEGIES, *TOYS, *VARIANTS])
shipped = pytest.mark.parametrize("name", STRATEGIES)


def client_functions(name: str) -> list[str]:
    """All of the method's, whether these settings use them or not."""
    cls = methods.load(small(name).method.name)
    attributes = dir(cls)
    return [a for a in attributes if hasattr(getattr(cls, a), "client_data")]


class Asked(NamedTuple):
    """What the server sends to a client function in round 0."""

    down: Tree
    state: Tree  # the client's, after what the round asks of everybody


def asked(loop: Loop, fn: ClientFunction, client: int = 1) -> Asked | None:
    """What `fn` is sent, or None where these settings have no use for it."""
    if fn.__name__ in ("evaluate", "finetune"):
        initial = loop.method.init_client(loop.task.init_params())
        return Asked(Model(loop.state.server.params), initial)
    sent = {}

    def each(f: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
        sent[f.__name__] = down
        return answers(loop.engine, f, clients, down, 0)

    loop.method.round(loop.state.server, loop_round(loop, 0, range(3), each))
    state = trees.map(torch.clone, loop.engine.states.get(client))
    loop.engine.states.rollback()
    loop.memory.rollback()
    return Asked(sent[fn.__name__], state) if fn.__name__ in sent else None


# Same in every engine


@every
def test_vectorised_computes_what_sequential_computes(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    one = reference(name)
    for chunk in (3, 64):
        settings = {"engine__name": "vectorised", "engine__chunk": chunk}
        other = run(small(name, **settings), tmp_path / str(chunk))
        assert_close(other.params, one.params, 1e-6, f"{name} in chunks of {chunk}")
        expected = one.final["test_loss"]
        assert other.final["test_loss"] == pytest.approx(expected, abs=1e-6)
        assert other.dropped == one.dropped == {}


@every
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_two_runs_of_one_seed_are_identical_and_another_seed_differs(
    name: str, engine: str, reference: Reference, tmp_path: Path
) -> None:
    one = reference(name, engine__name=engine)
    again = run(small(name, engine__name=engine), tmp_path / "again")
    other = run(small(name, engine__name=engine, seed=4), tmp_path / "other")
    assert again.params_sha256 == one.params_sha256
    assert other.params_sha256 != one.params_sha256


@every
def test_noise_on_the_links_is_the_same_in_every_engine_and_every_run(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    one, again = (run(small(name, **NOISY), tmp_path / folder) for folder in "ab")
    chunks = {"engine__name": "vectorised", "engine__chunk": 3}
    batched = run(small(name, **NOISY, **chunks), tmp_path / "c")
    assert one.params_sha256 == again.params_sha256
    assert_close(batched.params, one.params, 1e-6, f"{name} in chunks of 3")
    quiet = reference(name)
    assert quiet.params_sha256 != one.params_sha256
    assert quiet.bytes_up == one.bytes_up
    assert quiet.bytes_down == one.bytes_down


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_curve_is_the_recorded_one(name: str, tmp_path: Path) -> None:
    recorded = json.loads(golden.FILE.read_text())
    assert name in recorded, "record it: python -m tests.golden"
    curve = golden.curve(name, tmp_path / "r")
    assert curve == pytest.approx(recorded[name], rel=1e-5)


# Invariances


def with_empty_batches(batches: Tree, plans: int) -> Tree:
    """Twice as many batches in each plan, the new ones without an example."""

    def padded(values: Tensor) -> Tensor:
        pieces = []
        for plan in values.chunk(plans):
            pieces += [plan, torch.zeros_like(plan)]
        return torch.cat(pieces)

    return trees.map(padded, batches)


@every_quickly
def test_padding_a_client_changes_nothing(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    work = Work(loop.task, loop.method, loop.experiment.local, 0)
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        use = asked(loop, fn)
        if use is None:
            continue
        batches = trees.at(work.batches(fn, [1], 0), 0)
        padded = with_empty_batches(batches, work.passes(fn))
        now = torch.tensor(0.0)
        plain = run_client(fn, loop.task, now, use.down, use.state, batches)
        more = run_client(fn, loop.task, now, use.down, use.state, padded)
        what = f"{name}.{function} with as many empty batches"
        assert_close(more, plain, 1e-7, what)


@every_quickly
def test_a_client_without_examples_has_no_weight_and_does_no_harm(
    name: str, tmp_path: Path
) -> None:
    loop, empty = loop_of(small(name), tmp_path), POPULATION - 1
    data = loop.task.data
    offsets = data.offsets.copy()
    offsets[empty + 1] = offsets[empty]
    order = data.order[: offsets[-1]]
    rows = Examples(data.x, data.y)
    loop.task.data = FederatedData(rows, data.test, order, offsets)
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        use = asked(loop, fn, empty)
        if use is None:
            continue
        loop.engine.states.put([empty], trees.map(lambda x: x[None], use.state))
        (report,) = answers(loop.engine, fn, [empty], use.down, 0)
        assert report.failed == {}
        assert report.num_examples.tolist() == [0]
        assert bool(trees.finite(report.up))


@every_quickly
def test_the_order_of_clients_does_not_matter(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)

    def one_round(order: slice) -> Tensor:
        def each(fn: ClientFunction, clients: Tensor, down: Tree) -> Iterator[Reports]:
            return iter(list(answers(loop.engine, fn, clients, down, 0))[order])

        r = loop_round(loop, 0, [0, 3, 4, 9], each)
        server = loop.method.round(loop.state.server, r)
        loop.engine.states.rollback()
        loop.memory.rollback()
        return server.params

    forwards, backwards = one_round(slice(None)), one_round(slice(None, None, -1))
    assert_close(backwards, forwards, 1e-6, f"{name} in reverse order")


# State


@every_quickly
def test_clients_outside_the_cohort_are_untouched(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    if loop.method.works_unasked:
        return
    cohort, _ = loop.process.sample(0, loop.state.participation)
    present = set(cohort.tolist())
    absent = min(set(range(POPULATION)) - present)
    loop.round()
    before = {store: store.get(absent) for store in loop.stores.values()}
    if not loop.method.asks_everybody_first():
        assert all(set(store.row_of) <= present for store in before)
    loop.method.round(loop.state.server, loop_round(loop, 1, cohort))
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
    longer = small(name, engine__name=engine, rounds=5)
    resumed = run(longer, resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    assert [row["round"] for row in resumed.history] == [1, 2, 3, 4, 5]
    assert resumed.history[3]["test_loss"] == whole.history[3]["test_loss"]


@every
def test_evaluation_leaves_no_trace(
    name: str, reference: Reference, tmp_path: Path
) -> None:
    often = run(small(name, evaluation__every=1), tmp_path / "often")
    assert often.params_sha256 == reference(name).params_sha256


# Wire


@every_quickly
def test_what_is_sent_is_what_is_declared(name: str, tmp_path: Path) -> None:
    loop = loop_of(small(name), tmp_path)
    work = Work(loop.task, loop.method, loop.experiment.local, 0)
    for function in client_functions(name):
        fn = getattr(loop.method, function)
        use = asked(loop, fn)
        if use is None:
            continue
        down_type, up_type = wire.schemas(fn)
        down, _ = use
        assert equal(wire.decode(wire.encode(down), down_type, down), down)
        up, _ = work.one(fn, 1, down, use.state, 0)
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
    result = run(small(name, participation__cohort=1), tmp_path / "r")
    assert result.clients_trained >= 4


@every
def test_a_round_that_nobody_attends_is_survived(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("1 2\n\n3\n0 1\n")
    participation = {"name": "trace", "file": str(trace)}
    e = small(name, participation=participation)
    result = run(e, tmp_path / "r")
    cohorts = [row["cohort"] for row in result.history]
    assert cohorts[1:] == [0, 1, 2]
    # Clients that work without being sent anything are not counted as asked.
    first = {2, POPULATION} if e.build_method().asks_everybody_first() else {2}
    assert cohorts[0] in first
    assert all(bool(torch.isfinite(p).all()) for p in result.params.values())


@every
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_client_that_sends_nan_is_left_out_and_counted(
    name: str, engine: str, tmp_path: Path
) -> None:
    e = small(name, engine__name=engine, participation__cohort=POPULATION)
    loop = loop_of(e, tmp_path)
    loop.task.data.x[loop.task.data.rows(4, "train")] = torch.nan
    row = loop.round()
    assert row["dropped"]["not finite"] >= 1
    assert bool(trees.finite(loop.state.server))
    assert bool(trees.finite(loop.engine.states.get(4)))


@every
def test_a_client_that_raises_is_left_out_and_the_others_count(
    name: str, tmp_path: Path
) -> None:
    chunks = {"engine__name": "vectorised", "engine__chunk": 4}
    e = small(name, participation__cohort=POPULATION, **chunks)
    loop = loop_of(e, tmp_path)
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


PRESETS = sorted(file.stem for file in Path("strategies").glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_says_how_to_run_it(name: str) -> None:
    file = Path("strategies") / f"{name}.toml"
    assert file.read_text().startswith(f"# fedcore run strategies/{name}.toml")
    experiment = Experiment.load(file)
    assert Experiment.parse(tomllib.loads(experiment.to_toml())) == experiment


def test_every_method_has_a_preset() -> None:
    files = [Path("strategies") / f"{name}.toml" for name in PRESETS]
    assert {Experiment.load(file).method.name for file in files} == set(STRATEGIES)


@shipped
def test_every_method_says_what_it_is_and_every_setting_what_it_means(
    name: str,
) -> None:
    cls = methods.load(name)
    module: Any = __import__(cls.__module__, fromlist=["_"])
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
    variants = [name]
    variants += [v for v, (method, _, _) in VARIANTS.items() if method == name]
    used = set()
    for variant in variants:
        loop = loop_of(small(variant), tmp_path / variant)
        for function in client_functions(variant):
            if asked(loop, getattr(loop.method, function)) is not None:
                used.add(function)
    assert used == set(client_functions(name))
