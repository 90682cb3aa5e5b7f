"""The pool of forks, and the engine on it."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore.engines.readout import added
from fedcore.engines.vectorised import Vectorised
from fedcore.errors import RunError
from fedcore.reports import RunningSum
from fedcore.rounds.captures import captured
from fedcore.rounds.loop import run
from fedcore.rounds.observer import Quiet
from fedcore.speed import forks
from fedcore.speed.forks import Answer, Forks, Job
from fedcore.speed.segments import ALIGNED
from tests.helpers import STRATEGIES, loop_of, small

IMAGES: dict[str, Any] = {
    "task": "digits",
    "options": {},
    "model": {"name": "cnn", "channels": [3, 4], "hidden": 8, "kernel": 3},
}

PATIENCE = 600.0  # seconds, for what takes none on an idle machine

pytestmark = pytest.mark.skipif(not forks.possible(), reason="no forks on this system")


class Gate:
    """A door between processes, and a count of those who came to it."""

    def __init__(self) -> None:
        self._arrivals, self._arrive = os.pipe()
        self._opening, self._open = os.pipe()
        os.set_blocking(self._arrivals, False)

    def wait(self) -> None:
        """Come to the door, and stand there until it is opened."""
        os.write(self._arrive, b".")
        os.read(self._opening, 1)

    def open(self) -> None:
        """Let one pass."""
        os.write(self._open, b".")

    def arrived(self) -> int:
        """Those who came since it was asked last."""
        try:
            return len(os.read(self._arrivals, 1000))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        for end in (self._arrivals, self._arrive, self._opening, self._open):
            os.close(end)


def call(job: Any, given: list[Tensor], tensors: list[Tensor]) -> Answer:
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(job, tuple):
        action, gate = job
        gate.wait() if action == "wait" else gate.open()
    return (job, os.getpid()), [x + given[0] for x in tensors]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.close()


@pytest.fixture
def pool(gate: Gate) -> Iterator[Forks]:
    pool = Forks(3, call)  # after the gate, which they are to know
    yield pool
    pool.close()


def jobs(count: int, shape: tuple[int, ...] = (5,)) -> list[Job]:
    return [(i, [torch.full(shape, float(i))]) for i in range(count)]


def test_answers_come_in_the_order_of_the_jobs_from_all_forks(
    pool: Forks, gate: Gate
) -> None:
    first: list[Job] = [(("wait", gate), []), (("open", gate), [])]
    answers = list(pool.run([*first, *jobs(30)], [torch.tensor(0.5)]))
    names = [job for (job, _), _ in answers]
    assert [action for action, _ in names[:2]] == ["wait", "open"]
    assert names[2:] == list(range(30))
    for i, (_, (x,)) in enumerate(answers[2:]):
        assert bool((x == i + 0.5).all())
    pids = {pid for (_, pid), _ in answers}
    assert len(pids) > 1
    assert os.getpid() not in pids


def test_tensors_of_every_kind_arrive_as_they_were() -> None:
    tensors = [
        torch.randn(3, 4),
        torch.tensor(7),
        torch.tensor([True, False, True]),
        torch.empty(0, 3),
        torch.randn(1, 6).expand(5, 6),
        torch.randn(4, 3).t(),
        torch.arange(5, dtype=torch.int8),
        torch.randn(3).half(),
        torch.randn(2).double(),
    ]
    pool = Forks(1, lambda what, given, own: (None, [*given, *own]))
    ((_, found),) = pool.run([("go", tensors)], tensors)
    for x, y in zip(tensors * 2, found, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)
    assert found[4].stride(0) == 0  # one row was sent, not five
    assert all(x.data_ptr() % ALIGNED == 0 for x in found if x.numel())
    pool.close()


def test_answers_that_are_kept_stay_as_they_are(pool: Forks) -> None:
    kept = [
        x
        for t in range(5)
        for _, (x,) in pool.run(jobs(20, (1000,)), [torch.tensor(float(t))])
    ]
    assert all(bool((x == i % 20 + i // 20).all()) for i, x in enumerate(kept))


def test_memory_is_used_again(pool: Forks) -> None:
    def maps() -> int:
        return sum(
            "memfd:fedcore" in line
            for line in Path("/proc/self/maps").read_text().splitlines()
        )

    for t in range(5):
        for _ in pool.run(jobs(20, (1000,)), [torch.tensor(float(t))]):
            pass
    before = maps()
    for t in range(100):
        for _ in pool.run(jobs(20, (1000,)), [torch.tensor(float(t))]):
            pass
    gc.collect()
    assert before > 0
    assert maps() <= before + 3
    kept = [x for _, (x,) in pool.run(jobs(200, (1000,)), [torch.tensor(0.0)])]
    assert maps() > 200
    del kept
    for _ in range(3):
        list(pool.run(jobs(20), [torch.tensor(0.0)]))
    assert maps() < 60  # what was kept has been given back


def test_what_all_get_may_grow(pool: Forks) -> None:
    for size in (1, 10_000, 10, 100_000):
        for (what, _), (x,) in pool.run(jobs(6, (1, size)), [torch.ones(size)]):
            assert torch.equal(x, torch.full((1, size), what + 1.0))


def test_who_stops_listening_leaves_no_work_behind(pool: Forks) -> None:
    answers = pool.run(jobs(20), [torch.tensor(0.0)])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert [what for (what, _), _ in pool.run(jobs(4), [torch.tensor(0.0)])] == [
        0,
        1,
        2,
        3,
    ]


def test_closing_does_not_wait_for_work_that_is_not_done(gate: Gate) -> None:
    pool = Forks(2, call)
    pids = [fork.pid for fork in pool._forks]
    endless: list[Job] = [(("wait", gate), [])] * 20
    answers = pool.run([*jobs(1), *endless], [torch.tensor(0.0)])
    next(answers)
    pool.close()  # the gate stays closed
    assert not any(is_alive(pid) for pid in pids)
    assert gate.arrived() <= 2


def test_what_a_job_raises_is_told_and_the_pool_goes_on() -> None:
    def fails(job: Any, given: list[Tensor], tensors: list[Tensor]) -> Answer:
        if job == 3:
            raise ValueError("three is too many")
        return job, tensors

    pool = Forks(2, fails)
    with pytest.raises(RunError, match="ValueError: three is too many"):
        list(pool.run(jobs(9), []))
    assert [what for what, _ in pool.run(jobs(3), [])] == [0, 1, 2]
    pool.close()


def test_a_system_without_room_for_a_process_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(
        RunError,
        match=r"no further process.*temporarily unavailable.*OMP_NUM_THREADS=1",
    ):
        Forks(1, call)


def test_a_fork_that_is_killed_is_named_with_what_to_do(pool: Forks) -> None:
    with pytest.raises(RunError, match=r"exit status -9.*engine\.chunk.*--resume"):
        list(
            pool.run(
                [*jobs(3), ("die", [torch.zeros(1)]), *jobs(3)], [torch.tensor(0.0)]
            )
        )


def test_forks_end_with_us() -> None:
    script = """
import signal
from fedcore.speed.forks import Forks
pool = Forks(3, lambda job, given, tensors: (job, []))
print(*(fork.pid for fork in pool._forks), flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        ends = [os.pidfd_open(pid) for pid in pids]
        process.kill()
    for end in ends:
        assert select.select([end], [], [], PATIENCE)[0]
        os.close(end)


def is_alive(pid: int) -> bool:
    """A zombie is not: its parent may be slow to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_closing_leaves_no_process() -> None:
    pool = Forks(2, call)
    pids = {pid for (_, pid), _ in pool.run(jobs(8), [torch.tensor(0.0)])}
    pool.close()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# The engine


@pytest.fixture
def three() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def single() -> None:
    assert torch.get_num_threads() == 1


# Without and with client states, with personal parameters, with data of the server's
# own: to an engine the others are as one of these.
FEW = ["fedavg", "scaffold", "fedalt", "fedlaw"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in [*STRATEGIES, "tests.methods:Two"]
    ],
)
def test_processes_change_no_bit(name: str, tmp_path: Path) -> None:
    found = []
    for processes in (1, 3):
        torch.set_num_threads(processes)
        try:
            e = small(
                name,
                engine__name="vectorised",
                engine__chunk=2,
                participation__cohort=12,
                rounds=2,
            )
            loop = loop_of(e, tmp_path / f"{processes}")
            loop.engine.choices["processes"] = 3
            found.append(loop.run().params_sha256)
            assert loop.engine.processes == processes  # type: ignore[attr-defined]
            assert (loop.engine._forks is None) == (processes == 1)  # type: ignore[attr-defined]
        finally:
            loop.close()
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_a_client_function_that_draws_repeats_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    found = []
    for processes in (1, 3, 3):
        torch.set_num_threads(processes)
        try:
            e = small(
                "fedavg",
                engine__name="vectorised",
                engine__chunk=2,
                participation__cohort=12,
                rounds=2,
            )
            loop = loop_of(e, tmp_path / f"{len(found)}")
            loop.engine.choices["processes"] = 3
            squared = loop.task.metrics["loss"]
            loop.task.metrics["loss"] = lambda out, y, of=squared: (
                of(out, y) * torch.rand(len(out))
            )  # type: ignore[misc]
            found.append(loop.run().params_sha256)
        finally:
            loop.close()
            torch.set_num_threads(1)
    assert len(set(found)) == 1


def test_a_client_that_fails_in_a_fork_is_left_out_with_its_reason(
    three: None, tmp_path: Path
) -> None:
    loop = loop_of(
        small(
            "fedavg",
            engine__name="vectorised",
            engine__chunk=2,
            participation__cohort=12,
        ),
        tmp_path,
    )
    loop.round()
    batches = loop.engine._chunks.work.batches  # type: ignore[attr-defined]

    def fails(fn: Any, clients: list[int], t: int) -> Any:
        if 3 in clients:
            raise ValueError("no such client")
        return batches(fn, clients, t)

    loop.engine._chunks.work.batches = fails  # type: ignore[attr-defined]
    loop.engine._forks.close()  # type: ignore[attr-defined]
    loop.engine._forks = None  # type: ignore[attr-defined]
    reports = list(
        loop.engine.each(loop.method.train, torch.arange(12), loop.state.server, 1)
    )
    loop.close()
    failed = {client: why for r in reports for client, why in r.failed.items()}
    assert failed == {3: "error: ValueError: no such client"}
    assert sorted(i for r in reports for i in r.clients.tolist()) == [
        i for i in range(12) if i != 3
    ]


def test_a_fork_that_does_not_know_a_structure_leaves_the_work_to_us(
    three: None, tmp_path: Path
) -> None:
    loop = loop_of(
        small(
            "fedavg",
            engine__name="vectorised",
            engine__chunk=2,
            participation__cohort=12,
        ),
        tmp_path,
    )
    loop.round()
    engine: Any = loop.engine
    expected = list(
        engine.each(loop.method.train, torch.arange(12), loop.state.server, 1)
    )
    known = engine._forms["train"]
    engine._forms["train"] = known._replace(up=known.new)
    found = list(engine.each(loop.method.train, torch.arange(12), loop.state.server, 1))
    loop.close()
    assert [r.clients.tolist() for r in found] == [r.clients.tolist() for r in expected]
    assert all(
        torch.equal(a.up.loss, b.up.loss) for a, b in zip(found, expected, strict=True)
    )


def test_a_killed_fork_ends_the_run_which_can_be_resumed(
    three: None, tmp_path: Path
) -> None:
    e = small(
        "scaffold",
        engine__name="vectorised",
        engine__chunk=2,
        participation__cohort=12,
        rounds=4,
    )
    whole = run(e, tmp_path / "whole").params_sha256

    class Killer(Quiet):
        """Kills a fork after the first round."""

        def round_done(self, row: dict[str, Any]) -> None:
            if row["round"] == 1:
                engine: Any = loop.engine
                os.kill(engine._forks._forks[0].pid, signal.SIGKILL)

    loop = loop_of(e, tmp_path / "killed", observer=Killer())
    with pytest.raises(RunError, match="ended"):
        loop.run()
    loop.close()
    loop = loop_of(e, tmp_path / "killed", resume=True)
    assert loop.run().params_sha256 == whole
    loop.close()


def test_a_method_that_stops_listening_leaves_no_work_behind(
    three: None, tmp_path: Path
) -> None:
    loop = loop_of(
        small(
            "fedavg",
            engine__name="vectorised",
            engine__chunk=1,
            participation__cohort=12,
        ),
        tmp_path,
    )
    loop.round()
    reports = loop.engine.each(
        loop.method.train, torch.arange(12), loop.state.server, 1
    )
    next(reports)
    del reports
    again = list(
        loop.engine.each(loop.method.train, torch.arange(12), loop.state.server, 1)
    )
    assert sorted(i for r in again for i in r.clients.tolist()) == list(range(12))
    assert torch.get_num_threads() == 3
    loop.close()


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        ("fedavg", "three"),
        ("pfedme", "three"),
        ("tests.methods:Two", "three"),
        ("tests.methods:BadWeather", "three"),
        ("tests.methods:BadWeather", "single"),
        ("images", "single"),
        pytest.param("images", "three", marks=pytest.mark.slow),
    ],
)
def test_sums_that_are_made_where_clients_run_change_no_bit(
    name: str,
    threads: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    found, sums = [], []
    add_sum = RunningSum.add_sum

    def counted(total: RunningSum, *arguments: Any) -> None:
        sums.append(arguments)
        add_sum(total, *arguments)

    def from_single_updates(
        engine: Vectorised, fn: Any, clients: Any, down: Any, t: int, *mean: Any
    ) -> Any:
        return added(engine.each(fn, clients, down, t), *mean)

    monkeypatch.setattr(RunningSum, "add_sum", counted)
    request.getfixturevalue(threads)
    method, more = ("fedavg", IMAGES) if name == "images" else (name, {})
    experiment = small(
        method,
        engine__name="vectorised",
        engine__chunk=4,
        participation__cohort=12,
        rounds=2,  # in the second all clients are the work of forks
        **more,
    )
    for folder in ("summed", "whole"):
        sums.clear()
        loop = loop_of(experiment, tmp_path / folder)
        try:
            loop.engine.choices["processes"] = 3
            if name.endswith("BadWeather"):  # one client that sends NaN
                loop.task.data.x[loop.task.data.rows(2, "train")] = 667.0
            result = loop.run()
        finally:
            loop.close()
        rows = []
        for row in result.history:
            timeless = [key for key in row if not key.endswith(("seconds", "_s"))]
            rows.append({key: row[key] for key in timeless})
        found.append((result.params_sha256, rows))
        assert bool(sums) == (folder == "summed")
        monkeypatch.setattr(Vectorised, "mean", from_single_updates)
    assert found[0] == found[1]
    if name.endswith("BadWeather"):
        assert found[0][1][0]["dropped"] == {"not finite": 1}


def test_a_round_that_an_audit_captures_gives_whole_updates(
    three: None, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "engine__name": "vectorised",
        "engine__chunk": 4,
        "participation__cohort": 12,
        "rounds": 3,
    }
    plain = run(small("fedavg", **settings), tmp_path / "plain")
    audited = run(
        small("fedavg", **settings, audit__capture=12, audit__rounds=[2]),
        tmp_path / "captured",
    )
    assert audited.params_sha256 == plain.params_sha256
    exchanges = captured(tmp_path / "captured")
    assert sorted(x.client for x in exchanges) == list(range(12))
    assert all(x.delta["weight"].shape == (1, 5) for x in exchanges)
