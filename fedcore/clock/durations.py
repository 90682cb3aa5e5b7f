"""The time that a piece of a client's work takes, known before it is computed.

    d(i, v) = 2 L_i + 8 bytes_down / down_i + step_s_i steps(i) exp(sigma_j z)
              + 8 bytes_up / up_i

    step_s_i, down_i, up_i, L_i   of client i's own, fixed for the run
    v    version of the model that the work starts from;   z ~ N(0, 1)

Draws are keyed by client, and by (v, client): not by the number of clients, nor by who
else is asked. So they stay the same under other schedules, and cost nothing for clients
that are not asked.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fedcore.clock.devices import Devices
from fedcore.clock.files import Floats, Ints
from fedcore.clock.settings import (
    ClockSettings,
    Constant,
    LogNormal,
    Quantity,
    TwoClass,
    Zipf,
)
from fedcore.errors import SettingsError
from fedcore.rng import uniforms

__all__ = ["LONGEST", "Durations"]

LONGEST = 10**14
"""Microseconds (three years) that a piece of work takes at most, whatever is drawn: a
sum over 90 000 rounds still fits into 64 bits."""

_KEPT = 100_000  # clients whose numbers are kept once they are drawn
_SECOND = 1_000_000  # microseconds
_MEGABITS = 8e-6  # of a byte

# A client's own numbers, and their values where nothing is said: no limit, no latency.
# Each is drawn from the uniform number of its place here.
_DEFAULTS = {
    "step_s": math.nan,
    "down_mbps": math.inf,
    "up_mbps": math.inf,
    "latency_s": 0.0,
}


class Durations:
    """Durations of the work of a population's clients.

    needs_bytes_up: whether the bytes that a client sends matter; where not, 0 will do.
    The columns of the file `clock.trace` win over the other settings. batch_size:
    examples of a step, for a file with seconds of an example. Raises SettingsError for
    a file that cannot be used.

    >>> durations = Durations(ClockSettings(step_s=0.5, latency_s=1), 3, seed=0)
    >>> durations.of(np.array([0, 2]), 0, np.array([4, 6]), 0, 0).tolist()
    [4000000, 5000000]
    """

    def __init__(
        self,
        settings: ClockSettings,
        population: int,
        seed: int,
        batch_size: int | None = None,
    ) -> None:
        self._seed, self._jitter = seed, settings.jitter
        self._devices: Devices | None = None
        names: set[str] = set()
        if settings.trace is not None:
            self._devices = Devices(settings.trace, population, batch_size)
            names = self._devices.names
            if settings.step_s is None and "step_s" not in names:
                raise SettingsError(
                    f"clock.trace = {settings.trace}: found columns "
                    f"{', '.join(sorted(names))}, expected step_s or example_s among "
                    "them; or set clock.step_s"
                )
        self._drawn: dict[str, _Drawn] = {}
        for name in _DEFAULTS:
            quantity = getattr(settings, name)
            if quantity is not None and name not in names:
                self._drawn[name] = _Drawn(quantity)
        self.needs_bytes_up = "up_mbps" in names | self._drawn.keys()
        # A row for each client, of zeros until it is asked. Of many clients few are
        # asked twice, and rows far apart in memory are not found faster than drawn.
        kept = population if population <= _KEPT else 0
        self._rows = np.zeros((kept, len(_DEFAULTS)))

    def of(
        self,
        clients: Ints,
        version: int,
        steps: Ints,
        bytes_down: int,
        bytes_up: int,
    ) -> Ints:
        """Whole microseconds of the work of `clients` [n] on one version: int64 [n].

        steps [n]: local steps of each; bytes of the messages to and from one client.
        """
        work = np.asarray(steps, dtype=np.float64)
        if self._jitter > 0:
            versions = np.full(len(clients), version)
            keys = np.stack([versions, clients], axis=1)
            draws = uniforms(self._seed, "clock work", keys)
            work = work * np.exp(self._jitter * _normal(draws[:, 0]))
        seconds = self._seconds(clients, work, bytes_down, bytes_up)
        microseconds = np.rint(np.minimum(seconds * _SECOND, LONGEST))
        return microseconds.astype(np.int64)

    def expected(
        self, clients: Ints, steps: Ints, bytes_down: int, bytes_up: int
    ) -> Floats:
        """E[d] over versions, in seconds: float64 [n]."""
        work = np.asarray(steps, dtype=np.float64) * math.exp(self._jitter**2 / 2)
        return self._seconds(clients, work, bytes_down, bytes_up)

    def _seconds(
        self, clients: Ints, steps: Floats, bytes_down: int, bytes_up: int
    ) -> Floats:
        step_s, down_mbps, up_mbps, latency_s = self._own(clients).T
        seconds: Floats = 2 * latency_s + _MEGABITS * bytes_down / down_mbps
        seconds += steps * step_s
        seconds += _MEGABITS * bytes_up / up_mbps
        return seconds

    def _own(self, clients: Ints) -> Floats:
        """The numbers of the clients' own, [n, 4] in the order of `_DEFAULTS`."""
        if len(self._rows) == 0:
            return self._found(clients)
        rows = self._rows[clients]
        is_new = rows[:, 0] == 0  # a step takes some time
        if is_new.any():
            new = clients[is_new]
            self._rows[new] = self._found(new)
            rows = self._rows[clients]
        return rows

    def _found(self, clients: Ints) -> Floats:
        """As `_own`, from the file and from draws."""
        is_random = any(drawn.is_random for drawn in self._drawn.values())
        draws = np.empty((len(clients), len(_DEFAULTS)))
        if is_random:
            draws = uniforms(self._seed, "clock", clients[:, None])
        rows = np.empty((len(clients), len(_DEFAULTS)))
        for column, (name, default) in enumerate(_DEFAULTS.items()):
            if name in self._drawn:
                rows[:, column] = self._drawn[name].of(draws[:, column])
            elif self._devices is not None and name in self._devices.names:
                rows[:, column] = self._devices.of(name, clients)
            else:
                rows[:, column] = default
        return rows


class _Drawn:
    """A quantity, as a function of a uniform number in (0, 1) of each client's own."""

    def __init__(self, quantity: Quantity) -> None:
        self._quantity = quantity
        if isinstance(quantity, Zipf):
            # P(Z <= k) for k = 1, 2, ..., cap - 1: what is above it counts as cap.
            exponent = torch.tensor(quantity.a, dtype=torch.float64)
            ranks = np.arange(1, quantity.cap, dtype=np.float64)
            zeta = float(torch.special.zeta(exponent, torch.ones_like(exponent)))
            self._below = np.cumsum(ranks**-quantity.a) / zeta

    @property
    def is_random(self) -> bool:
        return not isinstance(self._quantity, Constant)

    def of(self, uniform: Floats) -> Floats:
        """Values for numbers in (0, 1), [n] each."""
        quantity = self._quantity
        if isinstance(quantity, Constant):
            return np.full(len(uniform), quantity.value)
        if isinstance(quantity, LogNormal):
            spread: Floats = np.exp(quantity.sigma * _normal(uniform))
            return quantity.median * spread
        if isinstance(quantity, TwoClass):
            is_slow = uniform < quantity.share
            factor: Floats = np.where(is_slow, quantity.factor, 1.0)
            return quantity.value * factor
        rank = 1 + np.searchsorted(self._below, uniform)
        return quantity.base * rank.astype(np.float64)


def _normal(uniform: Floats) -> Floats:
    """The standard normal numbers with these probabilities below them."""
    normal: Floats = torch.special.ndtri(torch.from_numpy(uniform.copy())).numpy()
    return normal
