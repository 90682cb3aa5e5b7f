"""Observations: captured updates are those that the server got, no more, no less.

Attacks see nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit import examine, observe
from fedcore.audit.attacks import base as attack
from fedcore.audit.attacks.sme import SME
from fedcore.audit.cells import Cell, Prepared, rounds_of, sweep
from fedcore.audit.observe import (
    Observation,
    Subject,
    Truth,
    aggregate,
    observation,
    public_of,
)
from fedcore.audit.plan import IMAGE_ATTACKS, Plan
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.engines.sequential import Sequential
from fedcore.errors import SettingsError
from fedcore.reports import Reports
from fedcore.rounds import captures, loop
from fedcore.rounds.captures import Exchange, captured
from fedcore.storage.rows import StateStore
from fedcore.tasks import build_task
from fedcore.types import Params, Tree
from tests.helpers import assert_close, equal, loop_of

DIGITS: dict[str, Any] = {
    "task": "digits",
    "population": 8,
    "rounds": 3,
    "seed": 3,
    "holdout": 0.0,
    "model": {"name": "mlp", "hidden": [6]},
    "partition": {"name": "iid"},
    "local": {"batch_size": 64},
    "participation": {"name": "uniform", "cohort": 4},
    "evaluation": {"every": 3, "clients": 0},
    "checkpoint": {"seconds": 0.0},
    "engine": {"name": "sequential"},
    "audit": {"capture": 2},
}
# Methods whose messages differ in kind: the start of a client, and its change of it,
# written out for each.
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": {"name": "fedavg"}},
    "scaffold": {"method": {"name": "scaffold"}},
    "fedsim with a personal output layer": {
        "method": {"name": "fedsim", "personal": ["output"]}
    },
    "fedamd": {"method": {"name": "fedamd", "local_lr": 0.05, "p": 0.5}},
    "rerce": {"method": {"name": "rerce", "rho": 0.1}},
    "fedavg of FedPara factors": {
        "method": {"name": "fedavg"},
        "lowrank": {"form": "fedpara"},
        "model": {"name": "mlp", "hidden": [64]},
    },
    "fedavg over noisy links": {
        "method": {"name": "fedavg"},
        "links": {"uplink": {"snr_db": 20.0}, "downlink": {"variance": 1e-4}},
    },
    "fedavg with clipping and noise": {
        "method": {"name": "fedavg"},
        "defence": {"clip": 0.5, "noise_multiplier": 0.1},
        "participation": {"name": "bernoulli", "mean": 0.5},
    },
}
every = pytest.mark.parametrize("name", METHODS)


def digits(name: str = "fedavg", **settings: Any) -> Experiment:
    return Experiment.parse(
        {**DIGITS, **METHODS[name]},
        {key.replace("__", "."): value for key, value in settings.items()},
    )


def by_hand(down: Any, up: Any) -> tuple[Params, Params] | None:
    """(start, change) of a message, from its fields."""
    if hasattr(up, "delta"):
        return down.params, up.delta
    if hasattr(up, "v"):  # FedAMD's full gradient: a step of size 1
        return down.params, trees.scale(up.v, -1.0)
    if hasattr(up, "w"):  # RERCE sends its whole model
        return down.s, trees.sub(up.w, down.s)
    return None


def record(loop_: loop.Loop) -> list[Exchange]:
    """Everything that the loop's engine brings back from now on."""
    seen: list[Exchange] = []
    each = loop_.engine.each

    def recording(fn: Any, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        for r in each(fn, clients, down, t):
            for row, client in enumerate(r.clients.tolist()):
                if (
                    not fn.__name__.startswith("evaluate")
                    and (found := by_hand(down, trees.at(r.up, row))) is not None
                ):
                    w0, delta = (trees.map(torch.clone, side) for side in found)
                    seen.append(
                        Exchange(
                            t + 1,
                            client,
                            fn.__name__,
                            w0,
                            delta,
                            int(r.num_examples[row]),
                        )
                    )
            yield r

    loop_.engine.each = recording  # type: ignore[method-assign]
    return seen


# Capture


@every
def test_captures_are_exactly_what_the_server_got(name: str, tmp_path: Path) -> None:
    run = loop_of(digits(name), tmp_path)
    seen = record(run)
    run.run()
    found = captured(tmp_path)
    assert {x.round for x in found} == {1, 3}
    for t in (1, 3):
        kept = {x.client for x in found if x.round == t}
        assert 0 < len(kept) <= 2
        of_round = [x for x in found if x.round == t]
        expected = [x for x in seen if x.round == t and x.client in kept]
        assert [(x.client, x.function, x.num_examples) for x in of_round] == [
            (x.client, x.function, x.num_examples) for x in expected
        ]
        for one, other in zip(of_round, expected, strict=True):
            assert equal([one.w0, one.delta], [other.w0, other.delta]), (
                f"{name}: round {t}, client {one.client}"
            )


@every
def test_a_captured_run_trains_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    plain = loop.run(digits(name, audit__capture=0), tmp_path / "plain")
    kept = loop.run(digits(name), tmp_path / "kept")
    assert plain.params_sha256 == kept.params_sha256
    assert not (tmp_path / "plain" / captures.FOLDER).exists()


def test_personal_tensors_never_reach_a_capture(tmp_path: Path) -> None:
    e = digits("fedsim with a personal output layer")
    run = loop_of(e, tmp_path)
    run.run()
    names = list(run.task.init_params())
    shared, personal = names[:2], names[2:]
    for x in captured(tmp_path):
        assert sorted(x.w0) == sorted(x.delta) == sorted(shared)
    for file in (tmp_path / captures.FOLDER).iterdir():
        assert not any(name.encode() in file.read_bytes() for name in personal)
    o = observation(run.method, public_of(e, run.task), captured(tmp_path)[-1])
    assert list(o.delta) == shared
    assert equal(
        {name: o.w0[name] for name in personal},
        {name: run.task.init_params()[name] for name in personal},
    )
    assert equal(
        {name: o.wT[name] for name in personal}, {name: o.w0[name] for name in personal}
    )


def test_factors_are_observed_as_factors(tmp_path: Path) -> None:
    e = digits("fedavg of FedPara factors")
    run = loop_of(e, tmp_path)
    run.run()
    o = observation(run.method, public_of(e, run.task), captured(tmp_path)[0])
    assert list(o.w0) == list(o.delta) == list(run.task.init_params())
    assert {name.rpartition(".")[2] for name in o.delta} == {
        "X1",
        "Y1",
        "X2",
        "Y2",
        "bias",
    }
    x = run.task.data.x[:5]
    assert torch.equal(o.public.predict(o.w0, x), run.task.predict(o.w0, x))


def test_the_client_that_was_met_before_is_chosen_again(tmp_path: Path) -> None:
    e = digits(audit__rounds=[1, 2, 3], audit__capture=1, participation__cohort=8)
    loop.run(e, tmp_path)
    assert len({x.client for x in captured(tmp_path)}) == 1
    assert [x.round for x in captured(tmp_path)] == [1, 2, 3]


def test_a_run_that_was_interrupted_keeps_its_captures(tmp_path: Path) -> None:
    e = digits(audit__rounds=[1, 3])

    class Impatient(loop.Quiet):
        def round_done(self, row: dict[str, Any]) -> None:
            if row["round"] == 2:
                begun._stop.set()

    (tmp_path / "part").mkdir()
    begun = loop.Loop(e, tmp_path / "part", Impatient(), None, False)
    with pytest.raises(loop.Interrupted):
        begun.run()
    begun.close()
    assert {x.round for x in captured(tmp_path / "part")} == {
        1
    }  # a running run can be audited
    loop.run(e, resume=tmp_path / "part")
    loop.run(e, tmp_path / "whole")
    part, whole = (captured(tmp_path / name) for name in ("part", "whole"))
    assert {x.round for x in part} == {1, 3}
    assert [x[:3] for x in part] == [x[:3] for x in whole]
    for one, other in zip(part, whole, strict=True):
        assert equal([one.w0, one.delta], [other.w0, other.delta])


def test_only_the_owner_may_read_captures(tmp_path: Path) -> None:
    loop.run(digits(), tmp_path / "run")
    assert (tmp_path / "run" / captures.FOLDER).stat().st_mode & 0o777 == 0o700


def test_a_run_without_captures_says_how_to_get_them(tmp_path: Path) -> None:
    loop.run(digits(audit__capture=0), tmp_path)
    with pytest.raises(
        SettingsError,
        match=r"holds no captured updates: run it with --set audit\.capture=N",
    ):
        captured(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        "cut short",
        "no tensors at all",
        "empty",
        "another safetensors file",
        "facts that are none",
    ],
)
def test_a_damaged_capture_is_named(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    loop.run(digits(), tmp_path)
    file = sorted((tmp_path / captures.FOLDER).iterdir())[0]
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "no tensors at all": b"\x00" * 100,
            "empty": b"",
            "another safetensors file": save({"w": torch.zeros(2)}),
            "facts that are none": save(
                {"w": torch.zeros(2)}, {"exchanges": json.dumps([{"round": 1}])}
            ),
        }[damage]
    )
    with pytest.raises(SettingsError, match=f"{file.name} is damaged"):
        captured(tmp_path)


def test_nothing_to_capture_is_said_once(tmp_path: Path) -> None:
    notes: list[str] = []

    class Ears(loop.Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    e = Experiment.parse(
        {**DIGITS, "method": {"name": "tests.methods:Two"}}, {"audit.rounds": [1, 2, 3]}
    )
    loop.run(e, tmp_path, observer=Ears())
    assert len([n for n in notes if "nothing captured" in n]) == 1
    with pytest.raises(SettingsError, match="no captured updates"):
        captured(tmp_path)


# Observations


@every
def test_a_synthetic_round_and_a_captured_run_give_the_same_kind_of_observation(
    name: str, tmp_path: Path
) -> None:
    e = digits(name)
    run = loop_of(e, tmp_path)
    run.run()
    known = public_of(e, run.task)
    real = observation(run.method, known, captured(tmp_path)[0])
    made = simulate(e, build_task(e), clients=2, examples=20)[0].seen
    assert list(real.w0) == list(made.w0)
    assert list(real.delta) == list(made.delta)
    for side in ("w0", "delta"):
        shapes = [
            {key: (x.shape, x.dtype) for key, x in getattr(o, side).items()}
            for o in (real, made)
        ]
        assert shapes[0] == shapes[1], side
    same = {f.name for f in fields(known)} - {"model", "lr", "epochs", "batch_size"}
    assert all(getattr(real.public, f) == getattr(made.public, f) for f in same)
    assert made.round == 1
    assert made.num_examples == 20


def test_a_synthetic_client_does_plain_local_sgd() -> None:
    e = digits(local__epochs=3, local__batch_size=8, method__local_lr=0.05)
    task = build_task(e)
    subject = simulate(e, task, clients=3, examples=8)[1]
    assert subject.truth is not None
    x, y = subject.truth
    w = {name: p.clone().requires_grad_() for name, p in task.init_params().items()}
    for _ in range(3):  # one batch of all: its order is of no account
        loss = torch.nn.functional.cross_entropy(task.predict(w, x), y)
        slopes = torch.autograd.grad(loss, list(w.values()))
        w = {
            name: (p - 0.05 * g).detach().requires_grad_()
            for (name, p), g in zip(w.items(), slopes, strict=True)
        }
    expected = {name: p.detach() - task.init_params()[name] for name, p in w.items()}
    assert_close(subject.seen.delta, expected, 1e-6, "update")
    assert subject.seen.public.local_steps(8) == 3


def test_synthetic_clients_hold_distinct_training_examples() -> None:
    e = digits()
    task = build_task(e)
    subjects = simulate(e, task, clients=4, examples=10)
    rows = torch.cat([s.truth.x.flatten(1) for s in subjects if s.truth is not None])
    assert rows.shape[0] == 40
    assert len({tuple(row) for row in rows.tolist()}) == 40
    public_rows = {tuple(row) for row in task.data.test.x.flatten(1).tolist()}
    assert not public_rows & {tuple(row) for row in rows.tolist()}


def test_more_examples_than_clients_have_are_refused() -> None:
    with pytest.raises(SettingsError, match="only 0 of 8 clients have as many"):
        simulate(digits(), build_task(digits()), clients=2, examples=10_000)


@pytest.mark.parametrize(
    ("settings", "steps"), [({"epochs": 4, "batch_size": 8}, 4 * 3), ({"steps": 7}, 7)]
)
def test_local_steps_follow_from_epochs_and_batches(
    settings: dict[str, int], steps: int
) -> None:
    e = digits(**{f"local__{key}": value for key, value in settings.items()})
    assert public_of(e, build_task(e)).local_steps(20) == steps


def test_what_came_up_leads_from_the_start_to_the_end() -> None:
    o = simulate(digits(), build_task(digits()), 2, 10)[0].seen
    assert_close(trees.sub(o.wT, o.w0), o.delta, 1e-6, "wT - w0")
    assert_close(
        attack.gradient_like(o),
        {name: o.w0[name] - w for name, w in o.wT.items()},
        1e-6,
        "w0 - wT",
    )


def test_a_mean_of_one_client_is_that_client() -> None:
    subject = simulate(digits(), build_task(digits()), 2, 10)[0]
    assert aggregate([subject]) is subject


def test_secure_aggregation_shows_the_mean_by_examples_and_no_client() -> None:
    e = digits()
    task = build_task(e)
    small, large = simulate(e, task, 2, 10)[0], simulate(e, task, 2, 30)[1]
    both = aggregate([small, large])
    mean = trees.add(
        trees.scale(small.seen.delta, 0.25), trees.scale(large.seen.delta, 0.75)
    )
    assert_close(both.seen.delta, mean, 1e-6, "mean")
    assert (both.seen.clients, both.seen.total_examples) == (2, 40)
    assert both.truth is not None
    assert len(both.truth.x) == 40
    assert aggregate([small, Subject(large.seen, None)]).truth is None


def test_secure_aggregation_of_unlike_messages_is_refused() -> None:
    e = digits()
    one, other = simulate(e, build_task(e), 2, 10)
    part = replace(other.seen, delta=dict(list(other.seen.delta.items())[:2]))
    with pytest.raises(SettingsError, match="one kind of message"):
        aggregate([one, Subject(part, None)])


# The sign


def test_an_update_with_its_sign_turned_round_is_noticed_and_warned_of() -> None:
    e = digits()
    task = build_task(e)
    seen = [s.seen for s in simulate(e, task, 4, 20)]
    x, y = task.data.test
    for o in seen:
        assert observe.alignment(o, x, y) > 0
        assert observe.alignment(o.flipped(), x, y) == pytest.approx(
            -observe.alignment(o, x, y)
        )
    assert examine.doubts(seen, task) == []
    (warning,) = examine.doubts([seen[0].flipped(), *seen[1:]], task)
    assert "1 of 4 clients point against the gradient of public data" in warning
    assert f"client {seen[0].client}: cosine -" in warning


def test_the_alignment_is_a_cosine_with_the_public_gradient() -> None:
    e = digits()
    task = build_task(e)
    o = simulate(e, task, 1, 20)[0].seen
    x, y = task.data.test
    w = {name: p.clone().requires_grad_() for name, p in o.w0.items()}
    slope = torch.autograd.grad(
        torch.nn.functional.cross_entropy(task.predict(w, x), y), list(w.values())
    )
    g = torch.cat([s.flatten() for s in slope]).double().numpy()
    d = torch.cat([v.flatten() for v in o.delta.values()]).double().numpy()
    assert observe.alignment(o, x, y) == pytest.approx(
        float(-(g @ d) / np.linalg.norm(g) / np.linalg.norm(d)), abs=1e-5
    )


# The boundary: attacks get observations, and nothing else


@pytest.mark.parametrize("name", IMAGE_ATTACKS)
def test_an_attack_takes_observations_and_labels_and_no_truth(name: str) -> None:
    method = IMAGE_ATTACKS[name].reconstruct
    hints = get_type_hints(method)
    assert list(inspect.signature(method).parameters) == [
        "self",
        "seen",
        "labels",
        "seed",
        "progress",
    ]
    kinds = [str(hints[key]) for key in ("seen", "labels", "seed", "progress")]
    assert kinds[0] == "collections.abc.Sequence[fedcore.audit.observe.Observation]"
    assert kinds[1] == "collections.abc.Sequence[torch.Tensor | None]"
    assert kinds[2] == "<class 'int'>"
    assert not any(
        word in kind for kind in kinds for word in ("Truth", "Subject", "Task")
    )


def test_an_observation_holds_no_example_of_a_client() -> None:
    hints = get_type_hints(Observation)
    names = "public round client function w0 delta num_examples clients together labels"
    assert set(hints) == set(names.split())
    made = simulate(digits(), build_task(digits()), 2, 10)
    assert all(s.seen.labels is None for s in made)  # granted by the plan alone
    held = [
        x for o in (s.seen for s in made) for x in (*o.w0.values(), *o.delta.values())
    ]
    assert {tuple(x.shape) for x in held} == {
        tuple(p.shape) for p in made[0].seen.public.model.parameters()
    }


@pytest.mark.parametrize(
    "module",
    [
        "base",
        "sme",
        "inverting_gradients",
        "dlg",
        "idlg",
        "dlfa",
        "analytic",
        "labels",
        "membership",
        "lanes",
    ],
)
def test_a_module_that_attacks_imports_neither_truths_nor_metrics_nor_data(
    module: str,
) -> None:
    file = Path(observe.__file__).parent / "attacks" / f"{module}.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    forbidden = (
        "metrics",
        "Truth",
        "truth",
        "Subject",
        "fedcore.task",
        "fedcore.data",
        "examine",
        "simulate",
        "captured",
        "loop",
    )
    assert not {name for name in names if any(word in name for word in forbidden)}


def test_a_truth_is_no_field_of_anything_that_attacks_get() -> None:
    for kind in (Observation, observe.Public, attack.Reconstruction):
        assert not any(
            Truth.__name__ in str(hint) for hint in get_type_hints(kind).values()
        )


def test_client_functions_of_a_synthetic_round_run_in_the_sequential_engine_alone() -> (
    None
):
    """So a captured run of `sequential` on the same data has the same updates."""
    e = digits(
        population=4,
        participation__cohort=4,
        audit__capture=4,
        audit__rounds=[1],
        rounds=1,
    )
    task = build_task(e)
    work = Work(task, e.build_method(), e.local, e.seed)
    engine = Sequential(
        work, StateStore(work.method.init_client(task.init_params()), 10**9, Path)
    )
    down = work.method.init_server(task.init_params(), 4)
    reports = list(engine.each(work.method.train, torch.arange(4), down, 0))  # type: ignore[attr-defined]
    sizes = {int(r.num_examples[0]) for r in reports}
    least = min(sizes)
    made = simulate(e, task, 4, least)
    for r, s in zip(reports, made, strict=True):
        if int(r.num_examples[0]) == least:
            assert equal(trees.at(r.up.delta, 0), s.seen.delta)


# An audit, cell by cell


class Silent:
    """An observer of an audit that watches nothing.

    `interrupt`: the number of the cell in which the user presses Ctrl-C.
    """

    def __init__(self, interrupt: int | None = None) -> None:
        self.interrupt, self.now = interrupt, 0

    def cell(self, number: int, cells: int, name: str) -> None:
        self.now = number

    def progress(self, share: float, what: str, objective: float | None) -> None:
        if self.now == self.interrupt:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, message: str) -> None:
        pass

    def training(self) -> loop.Observer:
        return loop.Quiet()


FEW: dict[str, Any] = {"sme": {"iterations": 5}, "ig": {"iterations": 5}}


def plan(*attacks: str, **settings: Any) -> Plan:
    return Plan(
        **{
            "attacks": attacks or ("sme", "labels"),
            "options": FEW,
            "clients": 2,
            **settings,
        }
    )


def timeless(cell: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in cell.items()
        if key not in ("seconds", "attack_seconds")
    }


def test_a_run_without_the_truth_reconstructs_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[list[Tensor]] = []
    reconstruct = SME.reconstruct

    def recorded(self: SME, *arguments: Any) -> list[attack.Reconstruction]:
        found = reconstruct(self, *arguments)
        images.append([r.x for r in found])
        return found

    monkeypatch.setattr(SME, "reconstruct", recorded)
    audits = []
    for truth in (True, False):
        p = plan(truth=truth)
        cells = sweep(digits(), p, [1], [4], [6])
        audits.append(
            examine.examine(
                "sweep", digits(), cells, p, tmp_path / str(truth), Silent()
            )
        )
    for one, other in zip(*images, strict=True):
        assert torch.equal(one, other)
    scored, unscored = (a.cells[0]["clients"] for a in audits)
    for one, other in zip(scored, unscored, strict=True):
        assert one["attacks"]["sme"]["curve"] == other["attacks"]["sme"]["curve"]
        assert one["labels"]["counts"] == other["labels"]["counts"]
        assert one["grade"] is not None
        assert (
            other["grade"],
            other["references"],
            other["best"],
            other["membership"],
        ) == (None, {}, None, None)
        assert "psnr" not in other["attacks"]["sme"]
    assert audits[1].cells[0]["pictures"] == []


def test_the_oracle_alone_gets_true_labels(tmp_path: Path) -> None:
    found = {}
    for mode in ("oracle", "recovered", "soft"):
        p = plan(labels=mode)
        found[mode] = examine.examine(
            "sweep",
            digits(),
            sweep(digits(), p, [1], [4], [6]),
            p,
            tmp_path / mode,
            Silent(),
        )
    clients = {mode: a.cells[0]["clients"][0] for mode, a in found.items()}
    assert clients["oracle"]["labels"]["mode"] == "oracle"
    assert clients["oracle"]["labels"]["accuracy"] == 1.0
    assert clients["recovered"]["labels"]["mode"] == "recovered"
    assert clients["soft"]["labels"] is None


def test_an_interrupted_audit_goes_on_without_doing_a_cell_twice(
    tmp_path: Path,
) -> None:
    p, prepared = plan(), list[str]()

    def cells() -> list[Cell]:
        made = sweep(digits(), p, [1, 2], [4], [4, 6])

        def counted(cell: Cell) -> Cell:
            def prepare(observer: cells.Observer) -> Prepared:
                prepared.append(cell.name)
                return cell.prepare(observer)

            return replace(cell, prepare=prepare)

        return [counted(cell) for cell in made]

    broken = examine.examine(
        "sweep", digits(), cells(), p, tmp_path / "a", Silent(interrupt=2)
    )
    assert broken.interrupted
    names = [cell.name for cell in cells()]
    assert prepared == names[:3]
    assert [cell["name"] for cell in broken.cells][:2] == names[:2]
    prepared.clear()
    whole = examine.examine("sweep", digits(), cells(), p, tmp_path / "a", Silent())
    assert prepared == names[2:]
    assert not whole.interrupted
    prepared.clear()
    backwards = examine.examine(
        "sweep", digits(), cells()[::-1], p, tmp_path / "b", Silent()
    )
    assert prepared == names[::-1]
    assert [timeless(cell) for cell in whole.cells] == [
        timeless(cell) for cell in backwards.cells[::-1]
    ]


def test_what_lacks_something_is_said_and_the_rest_is_run(tmp_path: Path) -> None:
    e = digits(local__steps=3)
    cells = [
        Cell(
            "steps",
            {},
            lambda observer: Prepared(simulate(e, build_task(e), 2, 6), build_task(e)),
            "steps",
        )
    ]
    found = examine.examine(
        "sweep",
        e,
        cells,
        plan("dlfa", "idlg", "analytic", "labels"),
        tmp_path,
        Silent(),
    ).cells[0]
    for client in found["clients"]:
        assert not client["attacks"]["dlfa"]["ok"]
        assert client["attacks"]["dlfa"]["error"].startswith(
            "needs the local step size, epochs and batch size"
        )
        assert (
            client["attacks"]["idlg"]["error"]
            == f"is for one example; client {found['clients'][0]['client']} has 6"
        )
        assert client["attacks"]["analytic"]["ok"]
        assert client["labels"]["ok"]
    assert any(w.startswith("dlfa was not run: needs") for w in found["warnings"])


def test_a_sign_turned_round_is_corrected_under_a_flag_alone(tmp_path: Path) -> None:
    e = digits()
    task = build_task(e)
    made = simulate(e, task, 2, 6)
    turned = [s._replace(seen=s.seen.flipped()) for s in made]

    def of(name: str, subjects: list[Subject], **settings: Any) -> dict[str, Any]:
        cells = [Cell("cell", {}, lambda observer: Prepared(subjects, task), name)]
        return examine.examine(
            "sweep",
            e,
            cells,
            plan("sme", "analytic", "labels", **settings),
            tmp_path / name,
            Silent(),
        ).cells[0]

    clean, wrong, corrected = (
        of("clean", made),
        of("wrong", turned),
        of("corrected", turned, flip=True),
    )
    assert timeless(clean) == timeless(corrected)
    assert [w for w in clean["warnings"] if "linear on the raw input" not in w] == []
    assert any(
        "point against the gradient of public data" in w for w in wrong["warnings"]
    )
    assert (
        wrong["clients"][0]["labels"]["counts"]
        != clean["clients"][0]["labels"]["counts"]
    )  # it was not turned back


def test_membership_is_told_from_all_rounds_in_which_a_client_was_captured(
    tmp_path: Path,
) -> None:
    e = digits(participation__cohort=8, audit__rounds=[1, 2, 3])
    loop.run(e, tmp_path / "run")
    p = plan("membership")
    e, cells = rounds_of(tmp_path / "run", p)
    found = examine.examine("captured", e, cells, p, tmp_path / "audit", Silent())
    assert [cell["name"] for cell in found.cells] == ["round 1", "round 2", "round 3"]
    assert [
        [c["membership"]["exchanges"] for c in cell["clients"]] for cell in found.cells
    ] == [[1, 1], [2, 2], [3, 3]]
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700


def test_captured_clients_are_attacked_with_what_the_server_saw(tmp_path: Path) -> None:
    e = digits("fedsim with a personal output layer", audit__rounds=[3])
    run = loop_of(e, tmp_path / "run")
    run.run()
    p = plan("sme", "labels", truth=False)
    e, (cell,) = rounds_of(tmp_path / "run", p)
    (one, other), known = cell.prepare(Silent()).subjects, public_of(e, run.task)
    kept = {x.client: x for x in captured(tmp_path / "run")}
    for s in (one, other):
        expected = observation(run.method, known, kept[s.seen.client])
        assert equal([s.seen.w0, s.seen.delta], [expected.w0, expected.delta])
    found = examine.examine(
        "captured", e, [cell], p, tmp_path / "audit", Silent()
    ).cells[0]
    assert found["clients"][0]["labels"] == {
        "ok": False,
        "error": 'the output layer\'s "3.bias" never left the client',
    }
    assert found["clients"][0]["attacks"]["sme"]["ok"]
    assert found["clients"][0]["entries_seen"] < found["clients"][0]["entries_of_model"]


def test_attacks_and_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        SettingsError, match='attack "smee": there is no such attack; known: sme, ig'
    ):
        plan("smee").check()
    with pytest.raises(
        SettingsError, match=r"--option sme\.iterations = 0: .*; sme knows iterations"
    ):
        plan("sme", options={"sme": {"iterations": 0}}).check()
    with pytest.raises(SettingsError, match='the attack "labels" has no settings'):
        plan("sme", options={"labels": {"n": 1}}).check()
