"""Devices of a trace: speed, bandwidth and latency of each, read from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedcore.clock.files import (
    Floats,
    Ints,
    read_numbers,
    refuse_row,
    refuse_values,
    whole_numbers,
)
from fedcore.errors import SettingsError

__all__ = ["DEVICE_COLUMNS", "Devices"]

DEVICE_COLUMNS = ("client", "step_s", "example_s", "down_mbps", "up_mbps", "latency_s")
_SETTING = "clock.trace"
_LEAST, _MOST = 1e-9, 1e9  # as in the settings: no product of such numbers overflows


class Devices:
    """The devices of a file, one for each of a population's clients.

    Client i has row i mod rows, or the row with `client` = i where the file has that
    column. `example_s`, seconds of one example, are times `batch_size` those of a step.
    Raises SettingsError with the first row that cannot be used.
    """

    def __init__(self, file: Path, population: int, batch_size: int | None) -> None:
        columns = read_numbers(_SETTING, file, DEVICE_COLUMNS)
        for name, values in columns.items():
            if name != "client":
                least = 0 if name == "latency_s" else _LEAST
                is_good = (values >= least) & (values <= _MOST)
                expected = f"{_MOST:g} at most, and "
                expected += "0 or above" if least == 0 else f"above 0 ({least:g})"
                refuse_values(_SETTING, file, name, values, is_good, expected)
        self._columns = columns
        self._row_of: Ints | None = None
        if "client" in columns:
            clients = whole_numbers(_SETTING, file, columns.pop("client"))
            self._row_of = _rows_by_client(file, clients, population)
        if "example_s" in columns:
            columns["step_s"] = _step_seconds(file, columns, batch_size)
        if not columns:
            raise SettingsError(
                f'{_SETTING} = {file}: found the column "client" alone, expected '
                f"others out of {', '.join(DEVICE_COLUMNS[1:])}"
            )

    @property
    def names(self) -> set[str]:
        """Which of step_s, down_mbps, up_mbps and latency_s the file has."""
        return set(self._columns)

    def of(self, name: str, clients: Ints) -> Floats:
        """The values of `clients` [n] in the column `name`: float64 [n]."""
        values = self._columns[name]
        if self._row_of is None:
            return values[clients % len(values)]
        return values[self._row_of[clients]]


def _rows_by_client(file: Path, clients: Ints, population: int) -> Ints:
    """The row of each of the population's clients. Raises SettingsError."""
    order = np.argsort(clients, kind="stable")
    ranked = clients[order]
    twice = order[1:][ranked[1:] == ranked[:-1]]
    if len(twice) > 0:
        row = int(twice.min())
        raise refuse_row(
            _SETTING,
            file,
            row + 1,
            f"client = {clients[row]} as a row above it, expected each client once",
        )
    missing = np.setdiff1d(np.arange(population), clients)
    if len(missing) > 0:
        raise SettingsError(
            f"{_SETTING} = {file}: found no row for client {missing[0]}, expected one "
            f"for each of {population} clients, 0 to {population - 1}; add it, or take "
            'out the column "client": then the rows are dealt out in turn'
        )
    return order[:population]


def _step_seconds(
    file: Path, columns: dict[str, Floats], batch_size: int | None
) -> Floats:
    if "step_s" in columns:
        raise SettingsError(
            f"{_SETTING} = {file}: found columns step_s and example_s, expected one of "
            "the two"
        )
    if batch_size is None:
        raise SettingsError(
            f"{_SETTING} = {file}: found a column example_s, and no number of examples "
            "in a step is known here; expected step_s"
        )
    return columns.pop("example_s") * batch_size
