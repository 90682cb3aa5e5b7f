"""States of runs that are over: listed, deleted, and not silently begun anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fedcore.client.device import Device
from fedcore.client.states import tidy
from fedcore.client.store import StateError, Store
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.errors import SettingsError
from fedcore.messages.moment import Moment

INITIAL = {"c": torch.zeros(3)}
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a client that took part in three runs, 100, 10 and 1 days ago."""
    Device(tmp_path / "state", "f", 4)._lock.close()
    for run, days in (("old", 100), ("middle", 10), ("new", 1)):
        store = Store(tmp_path / "state", "f", run)
        store.save(4, Moment(days, 0), {"c": torch.ones(3)}, safe=0)
        for file in store.folder.glob("client-4/*"):
            os.utime(file, (file.stat().st_mtime - days * DAY,) * 2)
    return tmp_path / "state"


def names(found: list[dict[str, str]]) -> list[str]:
    return [run["run"] for run in found]


def test_runs_are_listed_the_last_used_first(folder: Path) -> None:
    out = CliRunner().invoke(app, ["states", str(folder)]).stdout.splitlines()
    assert [line.split()[2] for line in out] == ["new", "middle", "old"]
    assert "in round 101" in out[2]
    assert all(
        run["clients"] == 1 and int(run["bytes"]) > 12 for run in tidy(folder)["kept"]
    )


def test_a_run_is_deleted_by_name_or_age_and_no_other(folder: Path) -> None:
    found = json.loads(
        CliRunner()
        .invoke(app, ["states", str(folder), "--older-than", "30", "--json"])
        .stdout
    )
    assert (names(found["kept"]), names(found["deleted"])) == (
        ["new", "middle"],
        ["old"],
    )
    found = tidy(folder, ["middle"])
    assert (names(found["kept"]), names(found["deleted"])) == (["new"], ["middle"])
    assert names(tidy(folder)["kept"]) == ["new"]
    assert torch.equal(
        Store(folder, "f", "new").load(4, Moment(200, 0), INITIAL)["c"], torch.ones(3)
    )


def test_a_run_whose_states_were_deleted_is_not_gone_on_with_as_if_there_had_been_none(
    folder: Path,
) -> None:
    tidy(folder, ["new"])
    with pytest.raises(
        StateError,
        match=r"the state of run new was deleted on this device .* delete .*/state/new",
    ):
        Store(folder, "f", "new").load(4, Moment(200, 0), INITIAL)


def test_what_a_client_works_on_is_not_deleted_under_its_hands(folder: Path) -> None:
    device = Device(folder, "f", 4)
    with pytest.raises(SettingsError, match="a client is running on run new"):
        tidy(folder, ["new"])
    assert names(tidy(folder, ["old"])["deleted"]) == ["old"]
    device._lock.close()
    assert names(tidy(folder, ["new"])["deleted"]) == ["new"]


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"--forget other: .* it has those of: new, middle, old"
    ):
        tidy(folder, ["other"])
    with pytest.raises(SettingsError, match="no client has its states there"):
        tidy(tmp_path)
