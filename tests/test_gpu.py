"""On a CUDA device: the numbers of the CPU, CUDA graphs, no waiting inside a round.

Skipped where there is none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fedcore.strategies.fedavg import FedAvg, Up
from torch import Tensor
from torch.func import vmap

from fedcore import trees
from fedcore.audit import examine
from fedcore.audit.attacks.analytic import Analytic
from fedcore.audit.attacks.analytic import Settings as AnalyticSettings
from fedcore.audit.attacks.base import Attack
from fedcore.audit.attacks.dlfa import DLFA
from fedcore.audit.attacks.dlfa import Settings as DLFASettings
from fedcore.audit.attacks.dlg import DLG
from fedcore.audit.attacks.dlg import Settings as DLGSettings
from fedcore.audit.attacks.idlg import IDLG
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.inverting_gradients import Settings as IGSettings
from fedcore.audit.attacks.sme import SME, SurrogateSettings
from fedcore.audit.cells import sweep
from fedcore.audit.observe import moved
from fedcore.engines.readout import read_finite
from fedcore.local import local_sgd, steps_run_by
from fedcore.method import on_client
from fedcore.rounds.loop import Loop, run
from fedcore.speed.cuda_graphs import EAGER, Graphs, waiting_refused
from fedcore.speed.recording import Recorder
from fedcore.storage.checkpoint import Checkpoint
from fedcore.types import Batches, Model, Stateless, Tree
from tests.attacks import cnn, data, mlp, see
from tests.audits import Silent
from tests.helpers import STRATEGIES, TOYS, VARIANTS, assert_close, loop_of, small
from tests.test_audit_captures import digits
from tests.test_audit_examine import plan
from tests.test_engines import DIGITS
from tests.test_recording import (
    BUILDERS,
    CLIENTS,
    HOOKS,
    SHAPE,
    batches,
    task_of,
    train,
)
from tests.test_recording_checks import Fading

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA: dict[str, Any] = {"engine__device": "cuda", "engine__name": "vectorised"}


@pytest.mark.parametrize("engine", ["sequential", "vectorised", "ray"])
def test_a_gpu_computes_what_the_cpu_computes(engine: str, tmp_path: Path) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    cpu = run(small("fedavg", **DIGITS, engine__device="cpu"), tmp_path / "cpu")
    gpu = run(
        small("fedavg", **DIGITS, engine__name=engine, engine__device="cuda"),
        tmp_path / "gpu",
    )
    assert gpu.final["test_loss"] == pytest.approx(cpu.final["test_loss"], abs=1e-3)


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
@pytest.mark.parametrize("name", [*STRATEGIES, *VARIANTS, *TOYS])
def test_every_method_runs_on_a_gpu(name: str, engine: str, tmp_path: Path) -> None:
    more: dict[str, Any] = (
        {"rounds": EAGER + 5, "engine__chunk": 5} if engine == "vectorised" else {}
    )
    cpu = run(
        small(name, engine__device="cpu", **({"rounds": EAGER + 5} if more else {})),
        tmp_path / "cpu",
    )
    gpu = run(
        small(name, engine__name=engine, engine__device="cuda", **more),
        tmp_path / "gpu",
    )
    assert gpu.final["test_loss"] == pytest.approx(cpu.final["test_loss"], rel=1e-3)
    assert gpu.dropped == cpu.dropped
    if name not in VARIANTS:  # which keep eigenvectors, whose signs are free
        rows = [checkpoint_rows(tmp_path / device) for device in ("gpu", "cpu")]
        assert name != "scaffold" or rows[0]
        assert_close(*rows, 1e-3, "what clients keep")


@pytest.mark.parametrize(
    ("settings", "hooks"),
    [(model, "plain") for model in BUILDERS] + [(BUILDERS[1], h) for h in HOOKS],
)
def test_recordings_and_graphs_compute_what_the_cpu_does(
    settings: Any, hooks: str
) -> None:
    torch.manual_seed(0)
    task = task_of(settings.build(SHAPE, 10).double())
    expected = trees.stack(
        [
            train(task, task.init_params(), trees.at(batches(), i), HOOKS[hooks])
            for i in range(CLIENTS)
        ]
    )
    task.to(torch.device("cuda"))
    b, params = trees.to(batches(), torch.device("cuda")), task.init_params()
    there = {
        key: value.cuda() if isinstance(value, Tensor) else value
        for key, value in HOOKS[hooks].items()
    }

    def client(params: Tree, b: Batches) -> Tree:
        return train(task, params, b, there)

    recorder = Recorder("the loss")
    graphs = Graphs(recorder)
    with steps_run_by(recorder):
        for i in range(EAGER + 3):
            ends = graphs.run(
                "train",
                lambda inputs: vmap(client, in_dims=(None, 0))(*inputs),
                (params, b),
            )
            ends = trees.to(ends, torch.device("cpu"))
            assert_close(ends, expected, 1e-9, f"use {i + 1}")
    assert len(graphs._graphs) == 1


def checkpoint_rows(run_dir: Path) -> Tree:
    """The state of each client after the last round, by its number; of one block."""
    checkpoint = Checkpoint(run_dir / "checkpoint")
    ids: list[int] = checkpoint.read().get("clients", [])
    block = checkpoint.part("clients-0") if ids else {}
    return {str(i): trees.at(block, row) for row, i in enumerate(ids) if i >= 0}


def after_rounds(
    name: str, folder: Path, rounds: int = EAGER + 3, **settings: Any
) -> Loop:
    values = {
        **DIGITS,
        **CUDA,
        "partition__name": "iid",
        "engine__chunk": 4,
        "evaluation__every": 100,
        "participation__cohort": 8,
        **settings,
    }
    del values["partition__alpha"]
    loop = loop_of(small(name, **values), folder)
    for _ in range(rounds):
        loop.round()
    return loop


def has_graphs(loop: Loop) -> dict[str, bool]:
    """For each client function, whether all shapes that came often have one."""
    graphs = loop.engine._chunks.graphs  # type: ignore[attr-defined]
    tried = {key[0][0]: True for key in graphs._graphs}
    return tried | {key[0][0]: False for key in graphs._refused}


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_nothing_waits_for_the_device_inside_a_round(name: str, tmp_path: Path) -> None:
    loop = after_rounds(name, tmp_path, participation__cohort=12)
    fn, chunks = loop.method.train, 0  # type: ignore[attr-defined]
    down = Model(loop.state.server.params) if name == "fedavg" else loop.state.server
    with waiting_refused():  # to wait for an event is allowed
        reports = loop.engine.each(fn, torch.arange(12), down, 9)
        for r, _ in read_finite(reports):
            trees.weighted_sum(r.up, r.num_examples)
            chunks += 1
    assert chunks == 3
    loop.close()


def test_a_chunk_is_read_while_the_next_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = after_rounds("fedavg", tmp_path, participation__cohort=12)
    order: list[str] = []
    one, add = loop.engine._chunks, loop.clients.add  # type: ignore[attr-defined]
    run_piece = one.run

    def computed(*arguments: Any) -> Any:
        order.append("computed")
        return run_piece(*arguments)

    def read(*arguments: Any) -> Any:
        order.append("read")
        return add(*arguments)

    monkeypatch.setattr(one, "run", computed)
    monkeypatch.setattr(loop.clients, "add", read)
    loop.round()
    loop.close()
    assert order == ["computed", "computed", "read", "computed", "read", "read"]


def test_a_plain_methods_work_becomes_a_graph(tmp_path: Path) -> None:
    loop = after_rounds("fedavg", tmp_path)
    assert has_graphs(loop)["train"]
    loop.close()


class Copies(FedAvg):
    """Makes a constant on the device in its client function.

    The host waits for it: no graph can hold that.
    """

    @on_client
    def train(
        self, task: Any, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        lr = torch.tensor([0.05]).to(task.device)[0]
        w, _, loss = local_sgd(task.loss, down.params, batches, lr)
        return Up(trees.sub(w, down.params), loss), state


def test_a_graph_that_would_keep_an_old_value_is_noticed_and_left() -> None:
    factor, x = [2.0], torch.ones(4, device="cuda")
    graphs = Graphs(None)
    values = []
    for use in range(20):
        if use == EAGER + 5:
            factor[0] = 3.0
        values.append(float(graphs.run("f", lambda x: factor[0] * x, x)[0]))
    first_check = values.index(3.0)
    assert first_check == EAGER + 10  # captured at use 3, and its tenth replay
    assert values[first_check:] == [3.0] * (20 - first_check)
    assert graphs._graphs == {}


def test_a_loss_that_changes_is_noticed_on_a_gpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    norms = {}
    for engine in ("sequential", "vectorised"):
        values = {**CUDA, "engine__name": engine, "participation__cohort": 12}
        if engine == "vectorised":
            values["engine__chunk"] = 4
        loop = loop_of(small("fedavg", rounds=12, **values), tmp_path / engine)
        fading = loop.task.metrics["loss"] = Fading()
        for t in range(12):
            if t == 8:  # graphs are there, and this round's check comes in time
                fading.weight = 0.5
            loop.round()
        params = loop.state.server.params
        norms[engine] = float(trees.dot(params, params))
        loop.close()
    assert norms["vectorised"] == pytest.approx(norms["sequential"], rel=1e-4)
    assert len([r for r in caplog.records if "depends on" in r.message]) == 1


def test_what_no_graph_can_hold_runs_as_it_is_written(tmp_path: Path) -> None:
    plain = after_rounds("fedavg", tmp_path / "plain", method__local_lr=0.05)
    copies = after_rounds(
        "tests.test_gpu:Copies", tmp_path / "copies", method__local_lr=0.05
    )
    assert not has_graphs(copies)["train"]
    assert_close(
        copies.state.server.params, plain.state.server.params, 1e-5, "parameters"
    )
    plain.close()
    copies.close()


def test_graphs_can_be_dropped_and_made_again() -> None:
    graphs, x = Graphs(None), torch.ones(4, device="cuda")
    for _ in range(2):
        for i in range(EAGER + 3):
            assert (
                graphs.run("double", lambda x: 2 * x, i * x).tolist() == [2.0 * i] * 4
            )
        assert len(graphs._graphs) == 1
        graphs.clear()


@pytest.mark.parametrize(
    "waits",
    [lambda x: x * x.sum().item(), lambda x: torch.linalg.eigvalsh(x[:, None] * x)],
)
def test_work_that_waits_is_refused_before_it_spoils_the_stream(waits: Any) -> None:
    graphs, x = Graphs(None), torch.ones(4, device="cuda")
    for _ in range(EAGER + 2):
        assert_close(graphs.run("waits", waits, x), waits(x), 1e-6, "what it computes")
    assert graphs._graphs == {}
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()


def test_functions_of_other_structure_have_graphs_of_their_own() -> None:
    graphs, x = Graphs(None), torch.ones(4, device="cuda")
    for _ in range(EAGER + 2):
        for name, expected in (("a", 2.0), ("b", 3.0)):
            found = graphs.run(
                "f",
                lambda inputs: inputs["a"] * 2 if "a" in inputs else inputs["b"] * 3,
                {name: x},
            )
            assert found.tolist() == [expected] * 4
    assert len(graphs._graphs) == 2


def test_a_chunk_too_large_for_the_gpu_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, _ = torch.cuda.mem_get_info()
    expected = after_rounds("fedavg", tmp_path / "whole", 2, engine__chunk=8)
    loop = loop_of(expected.experiment, tmp_path / "cut")
    one, held = loop.engine._chunks, []  # type: ignore[attr-defined]
    batched = one.batched

    def hungry(
        fn: Any, down: Tree, states: Tree, b: Tree, t: int, chunk: Any = None
    ) -> Any:
        held.append(
            # More than there is, for three.
            torch.empty(free // 3 * len(b.mask), dtype=torch.uint8, device="cuda")
        )
        held.clear()
        return batched(fn, down, states, b, t, chunk)

    monkeypatch.setattr(one, "batched", hungry)
    loop.round()
    loop.round()
    assert one._room == {"train": 2}
    assert_close(
        loop.state.server.params, expected.state.server.params, 1e-5, "parameters"
    )
    loop.close()
    expected.close()


ATTACKS: dict[str, Attack[Any]] = {
    "sme": SME(SurrogateSettings(iterations=EAGER + 8, lr=0.1, restarts=2)),
    "soft": SME(
        SurrogateSettings(iterations=EAGER + 8, lr=0.1)
    ),  # labels optimised with the images
    "ig": IG(IGSettings(iterations=EAGER + 8)),
    "dlfa": DLFA(DLFASettings(iterations=EAGER + 8)),
    "dlg": DLG(DLGSettings(iterations=4, lr=0.1)),
    "idlg": IDLG(DLGSettings(iterations=4, lr=0.1)),
    "analytic": Analytic(AnalyticSettings()),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks_find_on_a_gpu_what_they_find_on_the_cpu(name: str) -> None:
    torch.manual_seed(1)
    model = (mlp() if name == "analytic" else cnn()).double()
    n = 1 if name == "idlg" else 4
    examples = [data(n, i, dtype=torch.float64) for i in range(3)]
    seen = [
        see(model, x, y, epochs=1 if "dlg" in name else 2, batch=2, client=i)
        for i, (x, y) in enumerate(examples)
    ]
    seen = [replace(o, public=seen[0].public) for o in seen]
    y = [None if name == "soft" else y for _, y in examples]
    cpu = ATTACKS[name].reconstruct(seen, y, 0)
    gpu = ATTACKS[name].reconstruct(moved(seen, torch.device("cuda")), y, 0)
    for a, b in zip(gpu, cpu, strict=True):
        assert a.x.is_cuda
        assert_close(a.cpu().x, b.x, 1e-6, "inputs")
        assert a.objective == pytest.approx(b.objective, rel=1e-6)


def test_an_audit_uses_the_gpu_that_the_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    reconstruct = SME.reconstruct

    def watched(self: SME, seen: Any, *more: Any) -> Any:
        where.append(seen[0].device.type)
        return reconstruct(self, seen, *more)

    monkeypatch.setattr(SME, "reconstruct", watched)
    found = []
    for device in ("auto", "cpu"):
        e = digits(engine__device=device)
        swept = sweep(e, plan("sme", "labels"), [1], [3], [6])
        found.append(
            examine.examine(
                "sweep", e, swept, plan("sme", "labels"), tmp_path / device, Silent()
            ).cells[0]
        )
    assert where == ["cuda", "cpu"]
    assert found[0]["clients"][0]["labels"] == found[1]["clients"][0]["labels"]
