"""Windows: when clients are there, period after period.

A client is there at time x if x modulo the period lies in [start, end) of one of its
windows. Windows that touch, the end of a period and the start of the next one included,
are one. All is in whole microseconds, and found by binary search.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedcore.clock.files import (
    Ints,
    read_numbers,
    refuse_row,
    refuse_values,
    whole_numbers,
)
from fedcore.clock.settings import ClockSettings
from fedcore.errors import SettingsError

__all__ = ["WINDOW_COLUMNS", "Windows"]

Bools = npt.NDArray[np.bool_]

WINDOW_COLUMNS = ("client", "start_s", "end_s")
_SETTING = "clock.windows"
_SECOND = 1_000_000  # microseconds


class Windows:
    """The windows of `kinds` kinds of clients; client i is of kind i mod kinds.

    kinds, starts, ends: int64 [windows], ascending by (kind, start), without overlap;
    each kind has one at least.

    >>> windows = Windows(np.array([0, 1]), np.array([0, 5]), np.array([4, 10]), 10)
    >>> windows.all_there(4, now=12).tolist(), windows.next_opening(12)
    ([0, 2], 15)
    >>> finish, is_lost = windows.ends(np.array([0]), np.array([12]), np.array([3]))
    >>> finish.tolist(), is_lost.tolist()
    ([14], [True])
    """

    def __init__(
        self,
        kinds: Ints,
        starts: Ints,
        ends: Ints,
        period: int,
        *,
        pauses: bool = False,
    ) -> None:
        self._period, self._pauses = period, pauses
        joins = (kinds[1:] == kinds[:-1]) & (starts[1:] == ends[:-1])
        begins = np.r_[True, ~joins]
        self._starts, kind_of = starts[begins], kinds[begins]
        self._ends = ends[np.r_[~joins, True]]
        self._kinds = int(kinds[-1]) + 1
        self._first = np.searchsorted(kind_of, np.arange(self._kinds))
        last = np.searchsorted(kind_of, np.arange(self._kinds), side="right") - 1
        # One sorted axis for all kinds: those of kind f lie in f period ... (f + 1)
        # period.
        self._keys = kind_of * period + self._starts
        lengths = self._ends - self._starts
        # Time in windows before each one, of all windows in one line; and a period's.
        self._before = np.cumsum(lengths) - lengths
        self._each = np.add.reduceat(lengths, self._first)
        wraps = (self._starts[self._first] == 0) & (self._ends[last] == period)
        # Where a window goes on into the next period, its end is there.
        self._closes = self._ends.copy()
        self._closes[last[wraps]] += self._ends[self._first[wraps]]
        self._is_always = self._each == period
        is_opening = np.ones(len(self._starts), dtype=bool)
        is_opening[self._first[wraps]] = False
        self._openings = np.unique(self._starts[is_opening])

    @classmethod
    def of(cls, settings: ClockSettings) -> Windows:
        """The windows of a file. Raises SettingsError with the first bad row."""
        assert settings.windows is not None, "there are no windows"
        period = max(round(settings.period_s * _SECOND), 1)
        kinds, starts, ends = _read(settings.windows, period)
        return cls(kinds, starts, ends, period, pauses=settings.at_end == "pause")

    def there(self, clients: Ints, now: int) -> Bools:
        """Whether each of `clients` [n] is there at `now`: bool [n]."""
        window, offset = self._window(clients % self._kinds, np.asarray(now))
        is_there: Bools = (window >= 0) & (offset < self._ends[window])
        return is_there

    def all_there(self, population: int, now: int) -> Ints:
        """Those of the clients 0 ... population - 1 that are there: ids, ascending."""
        kinds = min(self._kinds, population)
        is_there = self.there(np.arange(kinds), now)
        return np.flatnonzero(np.resize(is_there, population))

    def ends(self, clients: Ints, begin: Ints, durations: Ints) -> tuple[Ints, Bools]:
        """(when the work of each client ends, whether it is lost): [n] each.

        begin: when each begins its work. Work that is lost ends where its window does,
        or at once where the client is not there. Work that pauses goes on in the
        following windows, and is never lost.
        """
        kinds = clients % self._kinds
        if self._pauses:
            return self._paused(kinds, begin, durations), np.zeros(len(clients), bool)
        window, offset = self._window(kinds, begin)
        close = begin - offset + self._closes[window]
        is_there = (window >= 0) & (offset < self._ends[window])
        close = np.where(is_there, close, begin)
        finish = begin + durations
        is_lost = (finish > close) & ~self._is_always[kinds] | ~is_there
        return np.where(is_lost, close, finish), is_lost

    def next_opening(self, now: int) -> int | None:
        """The earliest time after `now` at which a window begins; None: never."""
        if len(self._openings) == 0:
            return None
        offset = now % self._period
        place = int(np.searchsorted(self._openings, offset, side="right"))
        if place == len(self._openings):
            return now - offset + self._period + int(self._openings[0])
        return now - offset + int(self._openings[place])

    def _window(self, kinds: Ints, times: Ints) -> tuple[Ints, Ints]:
        """(the last window that has begun, in this period; the time in the period).

        The window is -1 where none has begun.
        """
        offset = times % self._period
        window = np.searchsorted(self._keys, kinds * self._period + offset, "right") - 1
        return np.where(window >= self._first[kinds], window, -1), offset

    def _paused(self, kinds: Ints, begin: Ints, durations: Ints) -> Ints:
        """When so much time in windows has passed since `begin`: int64 [n]."""
        window, offset = self._window(kinds, begin)
        first, each = self._first[kinds], self._each[kinds]
        in_window = np.minimum(offset, self._ends[window]) - self._starts[window]
        passed = self._before[window] - self._before[first] + in_window
        passed = np.where(window >= 0, passed, 0)
        # Microsecond `wanted` of the windows' time, counted from 1 on, is the last.
        wanted = begin // self._period * each + passed + durations
        periods, rest = (wanted - 1) // each, (wanted - 1) % each + 1
        place = self._before[first] + rest
        window = np.searchsorted(self._before, place, side="left") - 1
        last = self._starts[window] + place - self._before[window]
        finish: Ints = np.maximum(begin, periods * self._period + last)
        return finish


def _read(file: Path, period: int) -> tuple[Ints, Ints, Ints]:
    """(kinds, starts, ends) of a file, sorted. Raises SettingsError."""
    columns = read_numbers(_SETTING, file, WINDOW_COLUMNS)
    for name in WINDOW_COLUMNS:
        if name not in columns:
            raise SettingsError(
                f'{_SETTING} = {file}: found no column "{name}", expected '
                f"{', '.join(WINDOW_COLUMNS)}"
            )
    start_s, end_s = columns["start_s"], columns["end_s"]
    kinds = whole_numbers(_SETTING, file, columns["client"])
    refuse_values(_SETTING, file, "start_s", start_s, start_s >= 0, "0 or above")
    is_inside = end_s * _SECOND <= period + 0.5
    expected = f"clock.period_s = {period / _SECOND:g} at most"
    refuse_values(_SETTING, file, "end_s", end_s, is_inside, expected)
    starts = np.rint(start_s * _SECOND).astype(np.int64)
    ends = np.minimum(np.rint(end_s * _SECOND), period).astype(np.int64)
    for row in np.flatnonzero(starts >= ends)[:1].tolist():
        problem = f"start_s = {start_s[row]:g} and end_s = {end_s[row]:g}"
        expected = (
            "expected an end after the start; a window over the end of the period is "
            "two rows"
        )
        raise refuse_row(_SETTING, file, row + 1, f"{problem}, {expected}")
    _refuse_gaps(file, kinds, period)
    order = np.lexsort((starts, kinds))
    kinds, starts, ends = kinds[order], starts[order], ends[order]
    overlaps = order[1:][(kinds[1:] == kinds[:-1]) & (starts[1:] < ends[:-1])]
    if len(overlaps) > 0:
        row = int(overlaps.min())
        problem = (
            f"a window of client {int(columns['client'][row])} from {start_s[row]:g} "
            "on, while another one of its windows lasts; expected windows apart"
        )
        raise refuse_row(_SETTING, file, row + 1, problem)
    return kinds, starts, ends


def _refuse_gaps(file: Path, kinds: Ints, period: int) -> None:
    present = np.unique(kinds)
    missing = np.setdiff1d(np.arange(len(present)), present)
    if len(missing) > 0:
        raise SettingsError(
            f"{_SETTING} = {file}: found no window of client {missing[0]}, but of "
            f"client {present[-1]}; expected clients numbered from 0 on without a gap"
        )
    if len(present) * period >= 2**62:
        raise SettingsError(
            f"{_SETTING} = {file}: found {len(present)} clients with a period of "
            f"{period / _SECOND:g} s, expected less than {2**62 / 1e6:.0e} s in all; "
            "fewer clients will do: client i has the windows of i mod their number"
        )
