"""Earlier checkpoints: which stay, what they cost, kills, and going back to one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcore import RunError, SettingsError
from fedcore.config import Experiment
from fedcore.rounds.history import History
from fedcore.rounds.loop import run
from fedcore.rounds.saving import FULL
from fedcore.storage import checkpoint as module
from fedcore.storage.checkpoint import Checkpoint, _digest
from fedcore.storage.faults import unwritable
from tests.helpers import small

ROOT = Path(__file__).parent.parent
Cli = Callable[..., tuple[int, str, str]]


class Killed(BaseException):
    """The process ended here."""


def parts(number: int, names: str = "ab") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Parts that hold the number of their checkpoint."""
    for name in names:
        yield name, {"x": torch.full((8,), float(number))}


def save(
    checkpoint: Checkpoint, number: int, score: float | None = None, names: str = "ab"
) -> None:
    """A checkpoint whose other parts are those of the one before."""
    unchanged = set("ab") - set(names)
    facts = {"of": number}
    checkpoint.save(number, facts, parts(number, names), unchanged, score)


def contents(folder: Path) -> dict[int, list[float]]:
    """By checkpoint that is there: the first number of its parts."""
    found = {}
    for number in Checkpoint(folder).rounds():
        checkpoint = Checkpoint(folder)
        assert checkpoint.read(number)["of"] == number
        found[number] = [float(checkpoint.part(name)["x"][0]) for name in "ab"]
    return found


# Which stay


def test_the_last_checkpoints_stay_and_the_best(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, keep=2)
    scores = [5.0, 1.0, None, 3.0, 1.0, None]
    for number, score in enumerate(scores, 1):
        save(checkpoint, number, score)
    assert checkpoint.rounds() == [2, 5, 6]
    assert contents(tmp_path) == {n: [n, n] for n in (2, 5, 6)}
    names = {file.name for file in tmp_path.iterdir()}
    kept = {f"{part}-{n:06d}.safetensors" for part in "ab" for n in (2, 5, 6)}
    assert names == kept | {"state.json", "state-000002.json", "state-000005.json"}
    assert Checkpoint(tmp_path).read()["of"] == 6


@settings(max_examples=30, deadline=None)
@given(
    keep=st.integers(1, 4),
    scores=st.lists(st.none() | st.integers(0, 5).map(float), max_size=7),
)
def test_what_stays_is_what_was_asked_for_whatever_the_scores(
    keep: int, scores: list[float | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    checkpoint = Checkpoint(folder, keep)
    for number, score in enumerate(scores):
        save(checkpoint, number, score)
        if number % 2:  # as after a kill
            checkpoint = Checkpoint(folder, keep)
            checkpoint.read()
    last = set(range(len(scores))[-keep:])
    judged = [(score, n) for n, score in enumerate(scores) if score is not None]
    best = {min(judged)[1]} if judged else set()
    assert set(checkpoint.rounds()) == last | best
    if judged:
        assert checkpoint.best == min(judged)[0]


def test_parts_that_did_not_change_are_shared_and_written_once(tmp_path: Path) -> None:
    """However many checkpoints stay, one writes what changed, and no more."""
    writes: list[str] = []
    for keep in (1, 4):
        checkpoint = Checkpoint(tmp_path / str(keep), keep)
        save(checkpoint, 1)
        for number in range(2, 7):
            save(checkpoint, number, names="b")
        names = sorted(file.name for file in (tmp_path / str(keep)).glob("*.safe*"))
        writes.append(" ".join(names))
    changed = [f"b-{n:06d}.safetensors" for n in range(3, 7)]
    assert writes[1].split() == ["a-000001.safetensors", *changed]
    assert writes[0].split() == ["a-000001.safetensors", changed[-1]]
    assert contents(tmp_path / "4") == {n: [1, n] for n in (3, 4, 5, 6)}


def test_a_checkpoint_that_is_written_again_takes_its_own_place(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, keep=3)
    for number in (1, 2, 2):
        save(checkpoint, number)
    assert contents(tmp_path) == {1: [1, 1], 2: [2, 2]}


# Kills


def killing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """End the process before operation `after` on files, counted from 0."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > after:
                raise Killed
            return operation(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "link", counted(os.link))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_kill_at_any_instant_leaves_the_old_checkpoints_or_the_new_ones(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = set()
    for after in range(60):
        folder = tmp_path / str(after)
        checkpoint = Checkpoint(folder, keep=2)
        for number, score in ((1, 0.5), (2, None), (3, None)):
            save(checkpoint, number, score)
        with monkeypatch.context() as patch:
            if not has_links:
                patch.setattr(os, "link", without_links)
            killing(patch, after)
            try:
                save(checkpoint, 4, names="b")
                is_done = True
            except Killed:
                is_done = False
        newest = Checkpoint(folder).read()["of"]
        found = contents(folder)
        assert newest in (3, 4)
        assert found[1] == [1, 1], "the best"
        assert found[3] == [3, 3]
        if newest == 4:
            assert found[4] == [3, 4]
        outcomes.add(newest)
        # Whatever was left behind goes with the next one.
        resumed = Checkpoint(folder, keep=2)
        resumed.read()
        save(resumed, 5)
        assert contents(folder) == {1: [1, 1], newest: found[newest], 5: [5, 5]}
        assert len(list(folder.iterdir())) == 9
        if is_done:
            break
    assert is_done
    assert outcomes == {3, 4}


def without_links(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "no links here")


def test_a_kill_while_going_back_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in range(40):
        folder = tmp_path / str(after)
        checkpoint = Checkpoint(folder, keep=3)
        for number in (1, 2, 3):
            save(checkpoint, number)
        back = Checkpoint(folder, keep=3)
        back.read(1)
        with monkeypatch.context() as patch:
            killing(patch, after)
            try:
                back.go_back()
                is_done = True
            except Killed:
                is_done = False
        newest = Checkpoint(folder, keep=3)
        number = newest.read()["of"]
        assert number in (1, 3)
        save(newest, 4)
        expected = (1, 4) if number == 1 else (2, 3, 4)
        assert contents(folder) == {n: [n, n] for n in expected}
        if is_done:
            assert number == 1
            break
    assert is_done


# Going back


def lines(folder: Path) -> list[str]:
    """The rows of a run, without times and sizes of what happened when."""
    kept = []
    for row in History.read(folder / "metrics.jsonl"):
        for key in ("seconds", "evaluation_s", "first_round_s"):
            row.pop(key, None)
        kept.append(json.dumps(row))
    return kept


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_run_that_goes_back_ends_as_one_that_did_not(
    name: str, tmp_path: Path
) -> None:
    """With states of clients, too, of which few change in a round."""
    e = small(name, rounds=6)
    whole = run(e, tmp_path / "whole")
    run(e, tmp_path / "back")
    assert Checkpoint(tmp_path / "back" / "checkpoint").rounds()[-3:] == [4, 5, 6]
    again = run(e, resume=tmp_path / "back", back_to=4)
    assert again.params_sha256 == whole.params_sha256
    assert lines(tmp_path / "back") == lines(tmp_path / "whole")
    tables = []
    for folder in ("whole", "back"):
        table = pq.read_table(tmp_path / folder / "clients.parquet")
        tables.append([json.dumps(row) for row in table.to_pylist()])
    assert tables[0] == tables[1]


def test_what_came_after_the_round_is_gone_before_the_first_new_one(
    tmp_path: Path,
) -> None:
    e = small("fedavg", rounds=6)
    run(e, tmp_path / "r")
    shorter = small("fedavg", rounds=4)
    result = run(shorter, resume=tmp_path / "r", back_to=4)
    assert (result.rounds, len(lines(tmp_path / "r"))) == (4, 4)
    rounds = pq.read_table(tmp_path / "r" / "clients.parquet")["round"].to_pylist()
    assert max(rounds) == 4
    assert max(Checkpoint(tmp_path / "r" / "checkpoint").rounds()) == 4


def test_a_round_without_a_checkpoint_is_refused_with_those_that_are_there(
    tmp_path: Path, cli: Cli
) -> None:
    run(small("fedavg", rounds=6), tmp_path / "r")
    before = {file: file.read_bytes() for file in files(tmp_path / "r")}
    status, out, err = cli("run", "--resume", tmp_path / "r", "--round", 2)
    assert (status, out) == (2, "")
    assert "--round 2: " in err
    assert "no checkpoint of that round" in err
    assert "of rounds: 4, 5, 6" in err
    assert {file: file.read_bytes() for file in files(tmp_path / "r")} == before
    status, _, err = cli("run", "fedavg", "--round", 2)
    assert status == 2
    assert "--round 2 without --resume" in err
    with pytest.raises(SettingsError, match="--round 2 without --resume"):
        run(small("fedavg"), tmp_path / "other", back_to=2)


@pytest.mark.filterwarnings("error")
def test_a_refusal_to_go_back_leaves_no_lock_open(tmp_path: Path) -> None:
    """Closed later, it would take the lock of the next run of this process with it."""
    run(small("fedavg"), tmp_path / "r")
    with pytest.raises(SettingsError, match="no checkpoint of that round") as caught:
        run(small("fedavg"), resume=tmp_path / "r", back_to=99)
    loops = [x.frame.f_locals["self"] for x in caught.traceback if x.name == "__init__"]
    (lock,) = [loop._lock for loop in loops if hasattr(loop, "_lock")]
    assert lock is not None
    assert lock.closed


def files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file.name != "lock"
    )


def test_the_command_goes_back(tmp_path: Path, cli: Cli) -> None:
    run(small("fedavg", rounds=6), tmp_path / "r")
    status, out, _ = cli("run", "--resume", tmp_path / "r", "--round", 5, "--json")
    assert status == 0
    assert json.loads(out)["rounds"] == 6


def test_only_a_run_that_goes_back_may_have_another_rule(tmp_path: Path) -> None:
    run(small("fedavg", rounds=6), tmp_path / "r")
    e = small("fedavg", rounds=6, aggregation={"clip": 3.0})
    with pytest.raises(SettingsError, match=r"aggregation.clip was None and is now 3"):
        run(e, resume=tmp_path / "r")
    result = run(e, resume=tmp_path / "r", back_to=4)
    changes = [row.get("changed") for row in result.history]
    assert changes == [None] * 4 + [{"aggregation.clip": [None, 3.0]}, None]


def test_a_rule_that_comes_later_starts_without_what_another_kept(
    tmp_path: Path,
) -> None:
    rule = {"rule": "centred_clipping", "byzantine": 1}
    run(small("fedavg", rounds=6, aggregation=rule), tmp_path / "r")
    assert Checkpoint(tmp_path / "r" / "checkpoint").read(4)["files"]["aggregation"]
    other = small("fedavg", rounds=6, aggregation={"rule": "median", "byzantine": 1})
    changed = run(other, resume=tmp_path / "r", back_to=4)
    assert changed.history[4]["changed"]["aggregation.rule"][1] == "median"
    newest = Checkpoint(tmp_path / "r" / "checkpoint")
    assert "aggregation" not in newest.read()["files"]


@pytest.mark.parametrize("rule", ["centred_clipping", "nnm"])
def test_a_rule_that_remembers_goes_back_to_the_same_bits(
    rule: str, tmp_path: Path
) -> None:
    settings = {"rule": "centred_clipping", "byzantine": 1}
    if rule == "nnm":
        settings = {"rule": "multi_krum", "before": "nnm", "byzantine": 1}
    e = small("fedavg", rounds=6, aggregation=settings)
    whole = run(e, tmp_path / "r")
    again = run(e, resume=tmp_path / "r", back_to=4)
    assert again.params_sha256 == whole.params_sha256


def test_a_run_with_noise_for_privacy_does_not_go_back_to_other_messages(
    tmp_path: Path,
) -> None:
    """The difference of two messages with the same noise would be bare."""
    noise = {"clip": 1.0, "noise_multiplier": 1.0}
    e = small("fedavg", rounds=6, defence=noise)
    whole = run(e, tmp_path / "r")
    # The same messages with the same noise tell nothing new.
    again = run(e, resume=tmp_path / "r", back_to=5)
    assert again.params_sha256 == whole.params_sha256
    other = small("fedavg", rounds=6, defence=noise, aggregation={"rule": "median"})
    with pytest.raises(SettingsError, match=r"same noise to other messages"):
        run(other, resume=tmp_path / "r", back_to=5)
    assert len(lines(tmp_path / "r")) == 6


# Run directories of an older fedcore, and damage


def rewritten(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a state and its digest."""
    state = json.loads(file.read_bytes())
    del state["sha256"]
    change(state)
    file.write_text(json.dumps({**state, "sha256": _digest(state)}))


def test_a_run_directory_of_an_older_fedcore_goes_on(tmp_path: Path) -> None:
    e = small("fedavg", rounds=6, checkpoint__keep=1)
    whole = run(e, tmp_path / "whole")
    run(small("fedavg", rounds=3, checkpoint__keep=1), tmp_path / "r")
    folder = tmp_path / "r" / "checkpoint"
    for file in folder.glob("state-*"):
        file.unlink()
    rewritten(folder / "state.json", lambda state: state.pop("score"))
    assert run(e, resume=tmp_path / "r").params_sha256 == whole.params_sha256


def test_a_damaged_checkpoint_names_an_earlier_one_that_can_be_taken(
    tmp_path: Path,
) -> None:
    e = small("fedavg", rounds=6)
    whole = run(e, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoint"
    (folder / "state.json").write_text("{")
    with pytest.raises(SettingsError, match=r"is damaged.*such as --round 5"):
        run(e, resume=tmp_path / "r")
    assert Checkpoint(folder).rounds() == [4, 5]
    again = run(e, resume=tmp_path / "r", back_to=5)
    assert again.params_sha256 == whole.params_sha256
    (folder / "state.json").unlink()
    with pytest.raises(SettingsError, match=r"missing, beside.*such as --round 5"):
        run(e, resume=tmp_path / "r")


# When they are written


def test_the_best_model_is_kept_at_its_own_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no checkpoint falls on a round that is evaluated by the clock alone."""
    now = 0.0
    monkeypatch.setattr("fedcore.rounds.saving.time.perf_counter", lambda: now)
    e = small("fedavg", rounds=9, evaluation__every=2, checkpoint__seconds=3.0)
    written: list[tuple[int, bool]] = []
    save = Checkpoint.save

    def noted(self: Checkpoint, number: int, *rest: Any) -> None:
        written.append((number, rest[-1] is not None))
        save(self, number, *rest)

    class Clock:
        def started(self, *_: Any) -> None: ...
        def client_done(self, *_: Any) -> None: ...
        def note(self, message: str) -> None: ...

        def round_done(self, row: dict[str, Any]) -> None:
            nonlocal now
            now += 1

    monkeypatch.setattr(Checkpoint, "save", noted)
    run(e, tmp_path / "r", observer=Clock())
    assert written == [(3, False), (4, True), (7, False), (8, True), (9, True)]


def test_a_full_disk_costs_the_earlier_checkpoints_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = module.write_atomically

    def limited(file: Path, content: bytes, *rest: Any) -> None:
        others = list(file.parent.glob("server-*.safetensors"))
        if file.name.startswith("server-") and len(others) >= 3:
            raise unwritable(file, OSError(FULL[0], "full"), len(content))
        write(file, content, *rest)

    monkeypatch.setattr(module, "write_atomically", limited)
    e = small("fedavg", rounds=6)
    result = run(e, tmp_path / "r")
    assert "its earlier checkpoints were deleted" in caplog.text
    monkeypatch.undo()
    assert result.params_sha256 == run(e, tmp_path / "whole").params_sha256


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from fedcore.rounds.loop import run
from fedcore.storage.checkpoint import Checkpoint
from tests.helpers import small

delete = Checkpoint._delete_others
saves = 0

def killed(self):
    global saves
    saves += 1
    if saves == 5:
        os.kill(os.getpid(), 9)
    delete(self)

Checkpoint._delete_others = killed
run(small("scaffold", rounds=6), sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_before_old_files_were_deleted_goes_on_and_back(
    tmp_path: Path,
) -> None:
    e = small("scaffold", rounds=6)
    whole = run(e, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert done.returncode == -9
    assert Checkpoint(tmp_path / "r" / "checkpoint").read()["round"] == 5
    result = run(e, resume=tmp_path / "r", back_to=3)
    assert result.params_sha256 == whole.params_sha256


# Jumps of the test loss


def diverging(**more: Any) -> Experiment:
    """The loss falls for some rounds, and grows without bound under this step."""
    return small("fedavg", rounds=8, evaluation__every=1, method__local_lr=1.0, **more)


def test_a_jump_is_said_aloud_with_the_clients_and_is_in_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(diverging(), tmp_path / "r")
    row = next(row for row in result.history if "jump" in row)
    number = row["round"]
    table = pq.read_table(tmp_path / "r" / "clients.parquet").to_pylist()
    trained = set()
    for line in table:
        if line["round"] == number and line["function"] == "train":
            trained.add(line["client"])
    assert row["jump"]["clients"] == sorted(trained)
    assert row["jump"]["since"] == number - 1
    assert f"round {number}: THE TEST LOSS JUMPED from" in caplog.text
    assert f"clients {', '.join(map(str, sorted(trained)))}" in caplog.text
    assert f"--resume {tmp_path / 'r'} --round {number - 1}" in caplog.text


def test_a_jump_ends_a_run_that_is_to_stop_there_and_it_goes_back(
    tmp_path: Path, cli: Cli
) -> None:
    e = diverging(checkpoint__stop_on_jump=True)
    with pytest.raises(RunError, match=r"THE TEST LOSS JUMPED.*--round \d+") as stopped:
        run(e, tmp_path / "r")
    assert stopped.value.exit_status == 1
    number = Checkpoint(tmp_path / "r" / "checkpoint").read()["round"]
    assert len(lines(tmp_path / "r")) == number < 8
    words = ["run", "--resume", tmp_path / "r", "--round", number - 1]
    status, _, err = cli(*words)
    assert status == 1, "the same clients do the same"
    assert "THE TEST LOSS JUMPED" in err
    assert len(lines(tmp_path / "r")) == number
