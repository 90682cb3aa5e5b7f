"""Windows: by hand, and against a client that looks at its clock every microsecond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clock.settings import ClockSettings
from fedcore.clock.windows import Windows
from fedcore.errors import SettingsError

Spans = list[tuple[int, int]]


def windows(kinds: list[Spans], period: int, pauses: bool = False) -> Windows:
    """Windows (start, end) of each kind of client."""
    rows = []
    for kind, spans in enumerate(kinds):
        for start, end in spans:
            rows.append((kind, start, end))
    table = np.array(rows, dtype=np.int64)
    return Windows(table[:, 0], table[:, 1], table[:, 2], period, pauses=pauses)


def end_of(found: Windows, client: int, begin: int, duration: int) -> tuple[int, bool]:
    finish, is_lost = found.ends(
        np.array([client]), np.array([begin]), np.array([duration])
    )
    return int(finish[0]), bool(is_lost[0])


# (client, begin, duration) -> (finish, is lost), (finish with pauses). Client 0 is
# there in [2, 5) and [7, 9) of every 10, client 1 in [0, 3) and [8, 10), client 2
# always.
KINDS: list[Spans] = [[(2, 5), (7, 9)], [(0, 3), (8, 10)], [(0, 10)]]
BY_HAND = {
    (0, 2, 3): ((5, False), 5),  # back at its end is back in time
    (0, 2, 4): ((5, True), 8),
    (0, 14, 1): ((15, False), 15),
    (0, 14, 3): ((15, True), 19),
    (0, 14, 4): ((15, True), 23),  # 1 + 2 in this period, 1 in the next
    (0, 14, 104): ((15, True), 223),
    (0, 5, 1): ((5, True), 8),  # not there
    (0, 5, 0): ((5, True), 5),
    (1, 8, 5): ((13, False), 13),  # over the end of the period
    (1, 8, 6): ((13, True), 19),
    (1, 1, 3): ((3, True), 9),
    (2, 7, 1000): ((1007, False), 1007),
    (3, 2, 4): ((5, True), 8),  # client 3 is as client 0
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_ends_are_as_worked_by_hand(case: tuple[int, int, int]) -> None:
    lost, paused = BY_HAND[case]
    assert end_of(windows(KINDS, 10), *case) == lost
    assert end_of(windows(KINDS, 10, pauses=True), *case) == (paused, False)


def test_who_is_there_is_as_worked_by_hand() -> None:
    found = windows(KINDS, 10)
    clients = np.array([0, 1, 2, 3])
    assert found.there(clients, 12).tolist() == [True, True, True, True]
    assert found.there(clients, 15).tolist() == [False, False, True, False]
    assert found.all_there(7, 15).tolist() == [2, 5]
    assert found.all_there(2, 15).tolist() == []
    assert found.all_there(7, 19).tolist() == [1, 2, 4, 5]


def test_the_next_opening_is_that_of_the_earliest_window() -> None:
    found = windows(KINDS, 10)
    # Client 1's window at 0 goes on from 8, and client 2 is always there.
    assert [found.next_opening(now) for now in (0, 2, 6, 7, 8, 12)] == [
        *[2, 7, 7, 8, 12, 17],
    ]
    assert windows([[(0, 10)]], 10).next_opening(3) is None
    assert windows([[(0, 4), (4, 10)]], 10).next_opening(3) is None
    assert windows([[(0, 4)]], 10).next_opening(0) == 10


def is_there(spans: Spans, now: int, period: int) -> bool:
    return any(start <= now % period < end for start, end in spans)


def oracle(
    spans: Spans, period: int, begin: int, duration: int, pauses: bool
) -> tuple[int, bool]:
    now, left = begin, duration
    if not pauses and not is_there(spans, now, period):
        return now, True
    while left > 0:
        if is_there(spans, now, period):
            left -= 1
        elif not pauses:
            return now, True
        now += 1
    return now, False


@st.composite
def calendars(draw: Any) -> tuple[list[Spans], int]:
    """(windows of some kinds, period); all may touch, none overlap."""
    period = draw(st.integers(1, 12))
    kinds = []
    for _ in range(draw(st.integers(1, 4))):
        hours = draw(st.lists(st.booleans(), min_size=period, max_size=period))
        splits = draw(st.lists(st.booleans(), min_size=period, max_size=period))
        if not any(hours):
            hours[draw(st.integers(0, period - 1))] = True
        spans: Spans = []
        for hour in range(period):
            if not hours[hour]:
                continue
            if spans and spans[-1][1] == hour and not splits[hour]:
                spans[-1] = (spans[-1][0], hour + 1)
            else:
                spans.append((hour, hour + 1))
        kinds.append(spans)
    return kinds, period


@settings(max_examples=300, derandomize=True)
@given(
    calendar=calendars(),
    now=st.integers(0, 40),
    work=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1),
    pauses=st.booleans(),
)
def test_windows_are_those_of_a_client_that_looks_at_its_clock(
    calendar: tuple[list[Spans], int],
    now: int,
    work: list[tuple[int, int]],
    pauses: bool,
) -> None:
    kinds, period = calendar
    found = windows(kinds, period, pauses)
    clients = np.arange(len(work))
    begin, durations = np.array(work, dtype=np.int64).T
    finish, is_lost = found.ends(clients, begin, durations)
    there = found.there(clients, now)
    for client, (start, duration) in enumerate(work):
        spans = kinds[client % len(kinds)]
        assert there[client] == is_there(spans, now, period)
        expected = oracle(spans, period, start, duration, pauses)
        assert (finish[client], is_lost[client]) == expected
    assert found.all_there(len(work), now).tolist() == np.flatnonzero(there).tolist()


@settings(max_examples=200, derandomize=True)
@given(calendar=calendars(), now=st.integers(0, 40))
def test_nobody_comes_before_the_next_opening(
    calendar: tuple[list[Spans], int], now: int
) -> None:
    kinds, period = calendar
    opening = windows(kinds, period).next_opening(now)
    came = []
    for later in range(now + 1, now + 2 * period + 1):
        for spans in kinds:
            was_there = is_there(spans, later - 1, period)
            if is_there(spans, later, period) and not was_there:
                came.append(later)
    assert opening == (came[0] if came else None)


HEADER = "client,start_s,end_s\n"
WRONG = {
    "client,start_s\n0,1\n": 'found no column "end_s"',
    HEADER: "found no rows",
    HEADER
    + "0,0,10\n1,0,5\n0,9,20\n": "row 3 has a window of client 0 from 9 on, while",
    HEADER + "0,0,10\n0,0,10\n": "row 2 has a window of client 0 from 0 on, while",
    HEADER + "0,10,5\n": "row 1 has start_s = 10 and end_s = 5, expected an end after",
    HEADER + "0,0,2\n0,5,5\n": "row 2 has start_s = 5 and end_s = 5, expected an end",
    HEADER + "0,0,1e-7\n": "row 1 has start_s = 0 and end_s = 1e-07",
    HEADER + "0,5,61\n": "row 1 has end_s = 61, expected clock.period_s = 60 at most",
    HEADER + "0,-1,5\n": "row 1 has start_s = -1, expected 0 or above",
    HEADER + "0,nan,5\n": "row 1 has start_s = nan, expected a number",
    HEADER + "0,0,5\n2,0,5\n": "found no window of client 1, but of client 2",
    HEADER + "0.5,0,5\n": "row 1 has client = 0.5, expected a whole number",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_of_windows_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "windows.csv"
    file.write_text(text)
    clock = ClockSettings.model_validate(
        {"step_s": 1.0, "windows": file, "period_s": 60}
    )
    with pytest.raises(SettingsError) as caught:
        Windows.of(clock)
    assert f"clock.windows = {file}: {WRONG[text]}" in str(caught.value)


def test_windows_of_a_file_may_touch_and_have_any_order_and_fractions(
    tmp_path: Path,
) -> None:
    file = tmp_path / "windows.csv"
    file.write_text(HEADER + "1,0.5,1.5\n0,50,60\n0,30,50\n0,0,10.000001\n")
    clock = ClockSettings.model_validate(
        {"step_s": 1.0, "windows": file, "period_s": 60, "at_end": "pause"}
    )
    found = Windows.of(clock)
    assert end_of(found, 0, 0, 10_000_002) == (30_000_001, False)
    assert end_of(found, 0, 30_000_000, 40_000_001) == (70_000_001, False)
    assert end_of(found, 1, 500_000, 1_000_001) == (60_500_001, False)


def test_too_many_clients_for_64_bits_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "windows.csv"
    file.write_text(HEADER + "0,0,1\n1,0,1\n")
    clock = ClockSettings.model_validate(
        {"step_s": 1.0, "windows": file, "period_s": 4e12}
    )
    with pytest.raises(SettingsError, match="found 2 clients with a period of 4e"):
        Windows.of(clock)
