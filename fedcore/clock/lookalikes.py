"""Files for `[clock]` that look like those of the field, for examples and benchmarks.

Real traces may not be passed on. Here speeds, bandwidths and latencies are log-normal,
and clients charge their devices by night, most of them, and now and then by day. The
numbers are made up; only their shape is that of what was published (a few devices many
times slower than most, and far fewer of them there at noon than at midnight).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedcore.clock.files import Floats
from fedcore.rng import rng

__all__ = ["lookalike_devices", "lookalike_windows"]

_DAY_H = 24.0
_SPREAD_H = 1.5  # standard deviation of when the night's charging begins


class _Quantity(NamedTuple):
    name: str
    median: float
    sigma: float  # of the logarithm
    format: str


_QUANTITIES = (
    _Quantity("step_s", 0.1, 1.0, "%.4g"),
    _Quantity("down_mbps", 20.0, 1.0, "%.4g"),
    _Quantity("up_mbps", 5.0, 1.0, "%.4g"),
    _Quantity("latency_s", 0.05, 0.5, "%.3g"),
)


def lookalike_devices(file: Path | str, rows: int, seed: int = 0) -> Path:
    """Write a file for `clock.trace` with so many devices, and return its path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = lookalike_devices(Path(folder) / "devices.csv", rows=3)
    ...     file.read_text().splitlines()[0]
    'step_s,down_mbps,up_mbps,latency_s'
    """
    draws = rng(seed, "lookalike devices").standard_normal((rows, len(_QUANTITIES)))
    lines = [",".join(quantity.name for quantity in _QUANTITIES)]
    for row in draws.tolist():
        values = []
        for draw, quantity in zip(row, _QUANTITIES, strict=True):
            value = quantity.median * np.exp(quantity.sigma * draw)
            values.append(quantity.format % value)
        lines.append(",".join(values))
    return _written(file, lines)


def lookalike_windows(file: Path | str, clients: int, seed: int = 0) -> Path:
    """Write a file for `clock.windows`, period a day, and return its path.

    A night's charging begins at 23:00 or some hours off it and lasts six hours, more or
    less; up to three short ones by day are added, and one device in twenty is always
    there.
    """
    lines = ["client,start_s,end_s"]
    for client in range(clients):
        for start, end in _day(rng(seed, "lookalike windows", client)):
            lines.append(f"{client},{start},{end}")
    return _written(file, lines)


def _day(generator: np.random.Generator) -> list[tuple[int, int]]:
    """The windows of one client's day, in whole seconds, ascending and apart."""
    day = round(_DAY_H * 3600)
    if generator.random() < 0.05:
        return [(0, day)]
    begins: Floats = np.r_[
        23.0 + _SPREAD_H * generator.standard_normal(),
        generator.uniform(7, 22, size=generator.integers(0, 4)),
    ]
    lasts: Floats = np.r_[6.0, np.full(len(begins) - 1, 0.5)]
    lasts = lasts * np.exp(0.4 * generator.standard_normal(len(begins)))
    is_charging = np.zeros(day, dtype=bool)
    for begin, length in zip(begins.tolist(), lasts.tolist(), strict=True):
        seconds = np.arange(round(begin * 3600), round((begin + length) * 3600))
        is_charging[seconds % day] = True
    changes = np.flatnonzero(np.diff(np.r_[False, is_charging, False].astype(np.int8)))
    pairs = changes.reshape(-1, 2).tolist()
    return [(start, end) for start, end in pairs]


def _written(file: Path | str, lines: list[str]) -> Path:
    path = Path(file)
    path.write_text("\n".join(lines) + "\n")
    return path
