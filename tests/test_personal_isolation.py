"""Phases of FedAlt, the influence of clients on each other, and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.local import local_sgd
from fedcore.rounds.evaluation import Measured, over_clients
from fedcore.rounds.loop import Loop
from fedcore.split import split
from fedcore.types import Batches, Model, Params
from tests.helpers import equal, loop_of, small
from tests.personal import (
    DIGITS,
    PARTIAL,
    PERSONAL,
    done,
    model_of,
    plan,
    state_of,
    states_of,
    train,
)


def alternating(folder: Path, **settings: Any) -> Loop:
    """After two rounds of the same run, so that v_i is not v0.

    What is looked at is the third, with other settings.
    """
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
    # Phase U alone, from the new v, with a penalty that would pull v back if it were at
    # work
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
    assert found["worst_tenth"] == pytest.approx(min(each), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_median_is_the_middle_and_equal_sizes_pool_to_the_mean(n: int) -> None:
    values = torch.from_numpy(np.random.default_rng(n).random(n))
    num_examples = torch.full((n,), 3.0, dtype=torch.float64)
    found = over_clients(Measured(values, num_examples), is_higher_better=True)
    assert found["p50"] == pytest.approx(np.median(values.numpy()))
    assert found["pooled"] == pytest.approx(found["mean"])
