"""A clock that is fitted to a recording has the devices of its run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator

from fedcore import cli
from fedcore.clock.arrivals import Arrival, Arrivals, read_arrivals
from fedcore.clock.durations import Durations
from fedcore.clock.fit import Fit, fit
from fedcore.clock.settings import ClockSettings
from fedcore.errors import SettingsError
from fedcore.views.clock_fit import write_fit

STEP_S = np.array([0.1, 0.4, 2.0])
LATENCY_S = np.array([0.05, 0.0, 0.3])


def works_of(
    client: int, number: int, jitter: float, rng: Generator, measured: bool = True
) -> list[Arrival]:
    """Works of a device, each sent half a second after the one before is back."""
    arrivals, now = [], 0
    for version in range(number):
        work = STEP_S[client] * 5 * np.exp(jitter * rng.standard_normal())
        back = now + round(1e6 * (work + 2 * LATENCY_S[client]))
        work_us = round(1e6 * work) if measured else 0
        row = (client, version, "train", now, back, "", 9, 9, 5, work_us)
        arrivals.append(Arrival(version + 1, 0, *row))
        now = back + 500_000
    return arrivals


def fitted(
    folder: Path, jitter: float = 0.0, number: int = 9, measured: bool = True
) -> Fit:
    rng, rows = np.random.default_rng(0), list[Arrival]()
    for client in range(3):
        rows += works_of(client, number, jitter, rng, measured)
    rows.sort(key=lambda row: (row.update, row.back_us))
    arrivals = Arrivals(folder)
    arrivals.add([row._replace(order=order) for order, row in enumerate(rows)])
    arrivals.write(number)
    return fit(read_arrivals(folder), 5)


def test_speeds_and_latencies_are_found_to_the_microsecond(tmp_path: Path) -> None:
    found = fitted(tmp_path)
    assert found.step_s[:3] == pytest.approx(STEP_S, abs=1e-6)
    assert found.latency_s[:3] == pytest.approx(LATENCY_S, abs=1e-6)
    # Nobody heard of clients 3 and 4: the medians of the others.
    assert found.step_s[3:].tolist() == pytest.approx([0.4, 0.4])
    assert found.latency_s[3:].tolist() == pytest.approx([0.05, 0.05])
    assert found.num_works.tolist() == [9, 9, 9, 0, 0]
    assert found.is_measured
    assert found.jitter == 0.0
    assert found.error == pytest.approx(0, abs=1e-6)


def test_without_a_measure_all_time_is_of_steps(tmp_path: Path) -> None:
    found = fitted(tmp_path, measured=False)
    assert found.step_s[:3] == pytest.approx(STEP_S + 2 * LATENCY_S / 5, abs=1e-6)
    assert not found.is_measured
    assert not found.latency_s.any()


def test_jitter_is_found_and_how_well_it_predicts_is_said(tmp_path: Path) -> None:
    found = fitted(tmp_path, jitter=0.3, number=400)
    assert found.jitter == pytest.approx(0.3, rel=0.1)
    assert found.step_s[:3] == pytest.approx(STEP_S, rel=0.05)
    # The median of |exp(0.3 z) - 1|, less where latency is in it.
    assert 0.15 < found.error < 0.25
    assert found.error_90 > 2 * found.error


def arrivals_of(folder: Path, *rows: Arrival) -> Fit:
    arrivals = Arrivals(folder)
    arrivals.add([row._replace(order=order) for order, row in enumerate(rows)])
    arrivals.write(rows[-1].update)
    return fit(read_arrivals(folder))


def test_work_that_waited_for_the_work_before_took_only_its_own_time(
    tmp_path: Path,
) -> None:
    late = Arrival(1, 0, 0, 0, "train", 0, 10_000_000, "timeout", 1, 1, 5, 0)
    waited = late._replace(update=2, version=1, sent_us=3_000_000, back_us=20_000_000)
    assert arrivals_of(tmp_path, late, waited).step_s.tolist() == [2.0]


def test_the_time_of_the_server_is_the_pause_before_new_work(tmp_path: Path) -> None:
    rows = []
    for t in range(5):
        sent = 3_250_000 * t
        row = (0, t, "train", sent, sent + 3_000_000, "", 1, 1, 3, 0)
        rows.append(Arrival(t + 1, 0, *row))
    assert arrivals_of(tmp_path, *rows).server_s == 0.25


def test_a_recording_that_says_nothing_is_refused(tmp_path: Path) -> None:
    lost = Arrival(1, 0, 7, 0, "train", 0, -1, "dropout", 1, 0, 5, 0)
    with pytest.raises(SettingsError, match="no work with local steps"):
        arrivals_of(tmp_path, lost)
    with pytest.raises(SettingsError, match="has a client 7; expected at least 8"):
        fit(read_arrivals(tmp_path), 4)


def test_the_files_are_a_clock(tmp_path: Path) -> None:
    found = fitted(tmp_path, jitter=0.1)
    _, files = write_fit(tmp_path, tmp_path / "out", population=5)
    clock = ClockSettings(trace=files.csv, jitter=found.jitter)
    durations = Durations(clock, 5, 0, None)
    clients, steps = np.arange(5), np.full(5, 10)
    mean = np.exp(found.jitter**2 / 2)
    expected = 2 * found.latency_s + 10 * found.step_s * mean
    assert durations.expected(clients, steps, 9, 9) == pytest.approx(expected)
    assert f"jitter = {found.jitter:.9g}" in files.toml.read_text()


def command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: object,
) -> str:
    monkeypatch.setattr("sys.argv", ["fedcore", "clock", "fit", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    return capsys.readouterr().out


def test_the_command_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(tmp_path)
    said = command(monkeypatch, capsys, tmp_path, "--population", 4)
    assert "3 clients, 27 works" in said
    assert "1 clients never answered" in said
    assert "half within 0.0%" in said
    assert f'--set clock.trace="{tmp_path}/clock.csv"' in said
    file, out = tmp_path / "arrivals.parquet", tmp_path / "o"
    facts = json.loads(command(monkeypatch, capsys, file, "--out", out, "--json"))
    assert facts["population"] == 3
    assert facts["unheard"] == []
    assert Path(facts["trace"]).read_text().splitlines()[1] == "0,0.1,0.05"
