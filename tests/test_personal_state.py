"""Personal parameters stay where they are kept.

They are never on the wire, on disk between two runs, and within their memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from fedcore.client.store import Store
from fedcore.server.grid import GridEngine
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.errors import SettingsError
from fedcore.messages import wire
from fedcore.messages.moment import Moment
from fedcore.rounds.loop import Interrupted, Loop, Quiet, Result, run
from fedcore.split import split
from fedcore.tasks import build_task

# Flower makes messages only inside a task of a run.
from tests.flower.conftest import _a_flower_task  # noqa: F401
from tests.flower.fake import FakeGrid
from tests.helpers import (
    LAYERED,
    NOISY,
    STRATEGIES,
    TOYS,
    VARIANTS,
    assert_close,
    equal,
    loop_of,
    small,
)

ROOT = Path(__file__).parent.parent
PARTIAL = ["fedsim", "fedalt"]
PERSONAL = [*PARTIAL, "ditto", "pfedme"]
# Longer steps of pFedMe diverge with two layers.
SHORT = {"pfedme": {"method__personal_lr": 0.01}}
PRESETS = [
    *PARTIAL,
    "fedper",
    "fedrep",
    "fedbabu",
    "lgfedavg",
    "fedbn",
    "pfedpara",
    "fedperfix",
    "local",
]


# The wire


class Sent(NamedTuple):
    """One message, its direction, and what the nodes keep at that time."""

    way: str  # down or up
    function: str
    content: RecordDict
    kept: dict[str, dict[str, Tensor]]  # by record of the nodes' contexts

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in the message, by path."""
        tensors: dict[str, Tensor] = {}
        for record in self.content.values():
            if isinstance(record, ArrayRecord):
                tensors |= wire.unpack(record)
        return tensors

    def raw(self) -> bytes:
        """The bytes that Flower sends."""
        raw: bytes = recorddict_to_proto(self.content).SerializeToString()
        return raw


class Tapped(FakeGrid):
    """A grid that keeps every message."""

    def __init__(self, e: Experiment, folder: Path, nodes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preset.toml").write_text(e.to_toml())
        super().__init__(str(folder / "preset.toml"), nodes)
        self.traffic: list[Sent] = []
        self.e, self.folder = e, folder

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """What the nodes keep now, by file."""
        files = (self.folder / "kept").rglob("*.safetensors")
        return {str(file): load_file(file) for file in files}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed, before = list(messages), self.kept()
        names = []
        for message in pushed:
            work = message.content.get("work", {})
            names.append(str(work.get("function", "")))
        contents = [message.content for message in pushed]
        ids = super().push_messages(pushed)
        for name, content in zip(names, contents, strict=True):
            self.traffic.append(Sent("down", name, content, before))
        for name, i in zip(names, ids, strict=True):
            for reply in self.replies[i]:
                self.traffic.append(Sent("up", name, reply.content, self.kept()))
        return ids

    def run(self) -> Result:
        def engine(work: Work) -> GridEngine:
            return GridEngine(self, work, 60, state=self.folder / "kept")  # type: ignore[arg-type]

        return run(self.e, self.folder / "run", engine=engine)

    def states(self, e: Experiment) -> list[Any]:
        """The state of every client, as its node keeps it."""
        task = build_task(e)
        initial = e.build_method().init_client(task.init_params())
        store = Store(self.folder / "kept", "", "")
        moment = Moment(e.rounds, 0)
        return [store.load(i, moment, initial) for i in range(task.population)]


def bits(x: Tensor) -> bytes:
    return bytes(x.numpy(force=True).tobytes())


def secrets(sent: Sent) -> list[bytes]:
    """The bytes of every tensor that a client keeps, where they are telling."""
    found = []
    for record in sent.kept.values():
        for tensor in record.values():
            found += telling(tensor)
    return found


def telling(x: Tensor) -> list[bytes]:
    """The bytes of a tensor, unless they are all zero or may be found by chance."""
    return [bits(x)] if x.nbytes >= 16 and bool(x.any()) else []


@pytest.mark.parametrize("preset", PRESETS)
def test_no_message_of_a_preset_holds_a_name_or_a_value_of_a_personal_parameter(
    preset: str, tmp_path: Path
) -> None:
    few = {
        "population": 6,
        "participation.cohort": 4,
        "rounds": 2,
        "partition.name": "dirichlet",
    }
    short = {
        "local.epochs": 1,
        "local.batch_size": 64,
        "finetune.epochs": 0,
        "engine.name": "sequential",
    }
    e = Experiment.load(preset, {**few, **short})
    grid = Tapped(e, tmp_path, 6)
    result = grid.run()
    shared, personal = split(build_task(e).init_params(), e.method.personal)  # type: ignore[attr-defined]
    d_u = sum(p.numel() for p in shared.values())
    v0 = [bits(p) for p in personal.values() if p.numel() >= 4 and bool(p.any())]
    assert v0, "nothing to find"
    assert {sent.function for sent in grid.traffic} == {"", "train", "evaluate"}
    for sent in grid.traffic:
        raw = sent.raw()
        assert not any(value in raw for value in [*v0, *secrets(sent)]), (
            f"{sent.way}: a personal tensor is in the message"
        )
        names = {path.rpartition(trees.SEPARATOR)[2] for path in sent.tensors()}
        assert not names & personal.keys(), f"{sent.way}: {names & personal.keys()}"
        if sent.function == "train":
            assert names - {"loss"} == shared.keys()
            scalars = 1 if sent.way == "up" else 0  # the mean training loss
            size = 4 * (d_u + scalars)
            # Name, type and shape of each array; clients, and their counts.
            header = 350 * (len(shared) + scalars) + 300
            assert size <= len(raw) <= size + header, (
                f"{sent.way}: {len(raw)} bytes for {d_u} shared parameters"
            )
    assert any(secrets(sent) for sent in grid.traffic), "no client keeps anything"
    first = next(sent for sent in grid.traffic if sent.function == "train")
    assert all(bits(value) in first.raw() for value in shared.values()), (
        "this is how a tensor in a message would be found"
    )
    assert (result.bytes_down, result.bytes_up) == (
        2 * 4 * 4 * d_u,
        2 * 4 * (4 * d_u + 4),
    )


@pytest.mark.parametrize("noise", [{}, NOISY], ids=["", "noisy links"])
@pytest.mark.parametrize("name", PERSONAL)
def test_no_message_holds_what_a_client_keeps_nor_how_it_changed(
    name: str, noise: dict[str, float], tmp_path: Path
) -> None:
    e = small(name, **noise, finetune__epochs=1, **SHORT.get(name, {}))
    grid = Tapped(e, tmp_path, 5)  # fewer nodes than clients: several in one message
    grid.run()
    assert {sent.function for sent in grid.traffic} == {
        "",
        "train",
        "evaluate",
        "finetune",
    }
    seen = 0
    for before, after in zip(grid.traffic, grid.traffic[1:], strict=False):
        raw = after.raw()
        hidden = secrets(after)
        for key in before.kept.keys() & after.kept.keys():
            for path, x in after.kept[key].items():
                hidden += telling(x - before.kept[key][path])
        seen += len(hidden)
        assert not any(value in raw for value in hidden), after.way
        if name not in PARTIAL:
            # Ditto's and pFedMe's models have the names of what is sent, under
            # another field.
            fields = {path.split(trees.SEPARATOR)[0] for path in after.tensors()}
            assert not fields & {"v", "seen"}
    assert seen > 50


# Clients of RERCE-Fed send the w_k that they keep.
PUBLIC = {"rerce": {"w"}, "rerce exact": {"w"}}


@pytest.mark.parametrize("name", [*STRATEGIES, *TOYS, *VARIANTS])
def test_every_message_of_every_method_holds_what_is_declared_and_no_client_state(
    name: str, tmp_path: Path
) -> None:
    e = small(name)
    grid = Tapped(e, tmp_path, 12)
    grid.run()
    method: Any = e.build_method()
    params = build_task(e).init_params()
    state = trees.flatten(method.init_client(params))
    kept = {path.split(trees.SEPARATOR)[0] for path in state} - params.keys()
    assert len(grid.traffic) > 2 * 12
    for sent in grid.traffic:
        records = {key for key in sent.content if not re.fullmatch(r"up-\d+", key)}
        if not sent.function:
            assert records <= {"node", "server"}
            assert not sent.tensors()
            continue
        assert records == ({"down", "work"} if sent.way == "down" else {"about"})
        down, up = wire.schemas(getattr(method, sent.function))
        schema = down if sent.way == "down" else up
        found = {path.split(trees.SEPARATOR)[0] for path in sent.tensors()}
        assert found <= set(getattr(schema, "_fields", params)), (
            f"{sent.function}, {sent.way}"
        )
        if sent.way == "up":
            assert found & kept <= PUBLIC.get(name, set()), (
                f"{sent.function}: a field of the client's state"
            )


@pytest.mark.parametrize(
    "settings",
    [{}, {"method__personal": ["all"]}, {"method__personal": []}],
    ids=["output", "all", "nothing"],
)
@pytest.mark.parametrize("name", PARTIAL)
def test_flower_keeps_and_measures_what_sequential_does(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    e = small(name, **settings)
    loop = loop_of(e, tmp_path / "s")
    final = loop.run().final
    grid = Tapped(e, tmp_path / "g", 5)
    result = grid.run()
    assert_close(result.params, loop.state.server.params, 1e-6, "u")
    for i, state in enumerate(grid.states(e)):
        assert_close(state, loop.engine.states.get(i), 1e-6, f"client {i}")  # type: ignore[union-attr]
    assert result.final["client_loss"] == pytest.approx(final["client_loss"], abs=1e-6)


@pytest.mark.parametrize("name", ["fedavg", *PERSONAL])
def test_fine_tuning_over_flower_measures_what_it_does_in_process_and_leaves_no_trace(
    name: str, tmp_path: Path
) -> None:
    e = small(name, rounds=1, finetune__epochs=2, **LAYERED, **SHORT.get(name, {}))
    here = run(e, tmp_path / "s").final
    grid = Tapped(e, tmp_path / "g", 12)
    assert grid.run().final["finetuned_loss"] == pytest.approx(
        here["finetuned_loss"], abs=1e-6
    )
    trained = max(i for i, sent in enumerate(grid.traffic) if sent.function == "train")
    before, after = grid.traffic[trained].kept, grid.kept()
    assert after.keys() == before.keys(), (
        "a client that never took part keeps something"
    )
    for key, record in after.items():
        assert equal(record, before[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedalt", "ditto"])
def test_ray_keeps_the_bits_that_sequential_keeps(name: str, tmp_path: Path) -> None:
    loops = [
        loop_of(small(name, engine__name=engine, engine__workers=2), tmp_path / engine)
        for engine in ("sequential", "ray")
    ]
    found = [final_of(loop) for loop in loops]
    loops[1].close()
    assert equal(found[0][:2], found[1][:2])
    assert found[0][2] == found[1][2]


# Stopping and going on


class Stopper(Quiet):
    """Stops the run after the second client of the third round, as Ctrl-C does."""

    loop: Loop

    def client_done(self, t: int, n: int, cohort: int) -> None:
        if t == 2 and n >= 2:
            self.loop._stop.set()


def final_of(loop: Loop) -> tuple[Any, list[Any], Any]:
    """(server, states of all clients, measures) at the end of the run."""
    found = loop.run().final
    assert loop.engine.states is not None
    return (
        loop.state.server,
        [trees.map(torch.clone, loop.engine.states.get(i)) for i in range(12)],
        found,
    )


@pytest.mark.parametrize(
    ("engine", "ram"), [("sequential", 1e-9), ("vectorised", 1e-9), ("vectorised", 4.0)]
)
@pytest.mark.parametrize("name", [*PERSONAL, "fedsim all"])
def test_a_run_that_is_stopped_within_a_round_goes_on_with_the_same_bits(
    name: str, engine: str, ram: float, tmp_path: Path
) -> None:
    method, _, everything = name.partition(" ")
    settings: dict[str, Any] = {
        "engine__name": engine,
        "engine__chunk": 3,
        **LAYERED,
        **SHORT.get(method, {}),
        "rounds": 6,
        "finetune__epochs": 1,
        "checkpoint__seconds": 1e6,  # a checkpoint where it is stopped, and no other
    }
    if everything:
        settings["method__personal"] = ["all"]
    e = small(method, **settings, checkpoint__state_ram_gb=ram)
    whole = final_of(loop_of(small(method, **settings), tmp_path / "whole"))
    (tmp_path / "part").mkdir()
    stopper = Stopper()
    stopper.loop = Loop(e, tmp_path / "part", stopper, None, False)
    with pytest.raises(Interrupted, match="after round 2 of 6"):
        stopper.loop.run()
    assert (tmp_path / "part/state/clients").exists() == (ram < 1)
    stopper.loop.close()
    assert not (tmp_path / "part/state").exists(), "what is kept is in the checkpoint"
    resumed = loop_of(e, tmp_path / "part", resume=True)
    assert resumed.state.t == 2
    found = final_of(resumed)
    assert equal(found[:2], whole[:2])
    assert found[2] == whole[2]
    resumed.close()


def test_a_start_that_has_changed_meanwhile_is_no_start_of_a_stopped_run(
    tmp_path: Path,
) -> None:
    """v0 belongs to the run, like u and the v_i.

    It is what an unseen client has, and what the penalty holds v to.
    """
    start = tmp_path / "start.safetensors"
    params = build_task(small("fedsim")).init_params()
    save_file(params, start)
    settings = {"initial": str(start), "method__penalty": 0.5}
    whole = final_of(loop_of(small("fedsim", **settings), tmp_path / "whole"))
    run(small("fedsim", **settings, rounds=1), tmp_path / "part")
    # As a run that goes on changes its checkpoint.
    save_file({name: p + 1 for name, p in params.items()}, start)
    e = small("fedsim", **settings)
    try:
        found = final_of(loop_of(e, tmp_path / "part", resume=True))
    except SettingsError:
        return  # refused is as good
    assert equal(found[:2], whole[:2])


# Memory


CLIENTS = 10_000
ROW = 64_000  # bytes, of tests/crowd.py
CAP = 50_000_000  # bytes
PATIENCE = 1800.0  # seconds; on a free machine a crowd takes less than a minute


def crowd(engine: str, cohort: int, evaluated: int, population: int = CLIENTS) -> Loop:
    """All clients take part once, `cohort` at a time; then `evaluated` are measured."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("CROWD")))
    trace = ""
    for start in range(0, population, cohort):
        trace += " ".join(map(str, range(start, start + cohort))) + "\n"
    (folder / "trace").write_text(trace)
    values = {
        "method": {
            "name": "fedsim",
            "personal": ["own"],
            "local_lr": 1e-9,
            "personal_lr": 16.0,  # mean of v <- v + 0.001 (id - v)
        },
        "task": "tests.crowd:wide",
        "population": population,
        "rounds": trace.count("\n"),
        "participation": {"name": "trace", "file": str(folder / "trace")},
        "evaluation": {"every": 1000, "clients": evaluated},
        "checkpoint": {"seconds": 1e6, "state_ram_gb": CAP / 1e9},
        "engine": {"name": engine, "workers": 2},
    }
    loop = loop_of(Experiment.parse(values), folder / "run")
    loop.run()
    return loop


def peak(pid: int) -> int:
    """Bytes of memory that the process ever had at a time."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def measure(engine: str, cohort: int, evaluated: int) -> None:
    """Print how much more memory than before each process of a crowd needed.

    And what some clients have in the end.
    """
    # What is imported late, and PyTorch's own buffers.
    crowd(engine, 512, 512, 512).close()
    this = psutil.Process()
    before = this.memory_info().rss
    loop = crowd(engine, cohort, evaluated)
    grown = {}
    for process in [this, *this.children(recursive=True)]:
        grown[f"{process.name()} {process.pid}"] = peak(process.pid) - before
    states = loop.engine.states
    assert states is not None
    own = [states.get(i).v["own"].mean().item() for i in range(0, CLIENTS, 999)]
    files = sum(f.stat().st_size for f in (loop.folder / "state").rglob("*"))
    loop.close()
    print(json.dumps({"grown": grown, "own": own, "files": files}))


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 100)
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads the peak of a process from /proc",
)
@pytest.mark.parametrize(
    ("engine", "cohort", "evaluated"),
    [
        ("sequential", 500, 500),
        ("vectorised", 500, 500),
        ("ray", 500, 500),
        ("vectorised", 500, CLIENTS),
        ("vectorised", CLIENTS, 500),
    ],
)
def test_ten_thousand_clients_keep_their_state_within_the_memory_that_it_may_take(
    engine: str, cohort: int, evaluated: int, tmp_path: Path
) -> None:
    """640 MB of state under a cap of 50 MB: the peak of every process of the run."""
    code = (
        "from tests.test_personal_state import measure; "
        f"measure({engine!r}, {cohort}, {evaluated})"
    )
    environment = {
        **os.environ,
        "CROWD": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        # glibc otherwise keeps what a chunk of clients has freed: some hundred
        # megabytes, whatever the number of clients.
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    finally:
        for folder in tmp_path.iterdir():  # a gigabyte a run, which pytest would keep
            shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [0.001 * i for i in range(0, CLIENTS, 999)]
    kept = "every client kept its own"
    assert found["own"] == pytest.approx(expected, rel=1e-3), kept
    assert found["files"] >= CLIENTS * ROW - CAP
    grown = f"bytes over what there was before: {found['grown']}"
    # Chunks of clients take 310 to 360 MB of it, from one run to the next.
    assert max(found["grown"].values()) < CAP + 350_000_000, grown
