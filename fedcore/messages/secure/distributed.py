"""Distributed noise: each client adds a little, and their secret sum has all of it.

The distributed discrete Gaussian mechanism (Kairouz, Liu, Steinke, ICML 2021).

    C   bound on the norm of a message    z      noise multiplier of the whole noise
    n0  honest clients whose noise is     s      deviation of a client's own noise, in
        counted on: t - a                        steps, a whole number
    d   numbers of a message              gamma  one step, z C / (sqrt(n0) s)

    x <- x min(1, C / |x|)
    q <- x / gamma, rounded up or down at random, again until |q| <= Delta_2 / gamma
    q <- q + N_Z(0, s^2), in every entry, mod 2^32

    Delta_2^2 = min{ (C + gamma sqrt d)^2,                                  (Theorem 1)
        C^2 + gamma^2 d / 4 + sqrt(2 ln(1 / beta)) gamma (C + gamma sqrt(d) / 2) }
    tau       = 10 sum_{k=1}^{n0-1} exp(-2 pi^2 s^2 k / (k + 1))
    epsilon   = min{ sqrt(Delta_2^2 / (n0 s^2 gamma^2) + tau d / 2),
                     Delta_2 / (gamma sqrt(n0) s) + tau sqrt d }

A sum is then 1/2 epsilon^2-concentrated private, as a Gaussian mechanism of noise
multiplier 1 / epsilon would be. Choice: beta = exp(-1/2), so that rounding is accepted
with a chance above 0.39. The norm of q is checked in whole numbers: what one client
adds to a sum is bounded whatever the rounding did, so that only the noise has to be
secret. No rotation of the message: 32 bits hold every entry as it is.

A sum is divided by the number of clients that is expected, never by those that came.

On devices the noise comes from the operating system. They know C, z and a by their
settings, and are told n0, s and d (`DistributedNoise.terms`). All six are in what
devices sign: one whose settings differ does not take part, as its steps would be of
another size; nor does a client that hears of a threshold below n0 + a. In a simulation
noise has the run's seed, so that whoever knows it can take the noise off: a guarantee
in form alone.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore.messages.secure.discrete import REACH, discrete_gaussian
from fedcore.messages.secure.primitives import Refused
from fedcore.rng import rng, seed_of

if TYPE_CHECKING:
    from fedcore.messages.defence import DistributedSettings

__all__ = ["DistributedNoise", "check_threshold", "deviation_for"]

BETA = math.exp(-0.5)
DEVIATION, FINE_DEVIATION = 1024, 8192  # s, and where messages are long
LONG = 300.0  # sqrt(d / n0) z, from which on the steps are finer
TRIES = 1000  # of rounding, each accepted with a chance of 1 - beta at least
TOLD = ("honest", "colluding", "deviation", "num_entries")
SHARED = ("clip", "noise_multiplier")  # from the settings, the same for all
BLOCK = 1 << 15  # numbers at a time, so that float64 copies of them stay in the cache


@dataclass(frozen=True)
class DistributedNoise:
    """The noise of each client in a secure sum, in place of the ring's rounding.

    >>> noise = DistributedNoise(1.0, 1.0, honest=10, num_entries=10_000)
    >>> round(noise.effective_multiplier, 6)
    0.999724
    """

    clip: float  # C
    noise_multiplier: float  # z
    honest: int  # n0
    num_entries: int  # d, of the longest message
    colluding: int = 0  # a, beside the honest ones
    deviation: int = DEVIATION  # s
    divisor: float = 1.0  # clients that are expected in a round: what a mean divides by
    seed: int = 0  # of the rounding, and in a simulation of the noise
    # Whether noise comes from the operating system, as a guarantee needs it.
    is_secret: bool = False

    @property
    def step(self) -> float:
        """gamma: what one unit of a sum stands for."""
        spread = math.sqrt(self.honest) * self.deviation
        return self.noise_multiplier * self.clip / spread

    @property
    def least(self) -> int:
        """Clients in a sum without which it has too little noise."""
        return self.honest + self.colluding

    def sensitivity(self, num_entries: int) -> float:
        """Delta_2, bound on the norm of a rounded message, in units of the message."""
        root, gamma = math.sqrt(num_entries), self.step
        always = self.clip + gamma * root
        # With a chance of 1 - beta:
        mostly = math.sqrt(
            self.clip**2
            + gamma**2 * num_entries / 4
            + math.sqrt(2 * math.log(1 / BETA)) * gamma * (self.clip + gamma * root / 2)
        )
        return min(always, mostly)

    @property
    def effective_multiplier(self) -> float:
        """1 / epsilon: the noise multiplier of the Gaussian mechanism that it equals.

        For one sum, in which n0 clients add noise.
        """
        spread = math.sqrt(self.honest) * self.deviation
        ratio = self.sensitivity(self.num_entries) / self.step / spread
        gap = _gap(self.honest, self.deviation)
        added = math.sqrt(ratio**2 + gap * self.num_entries / 2)
        return 1 / min(added, ratio + gap * math.sqrt(self.num_entries))

    def largest_sum(self, clients: int) -> float:
        """The largest number that a sum of so many honest clients can hold, in steps.

        A rounded entry is at most C / gamma + 1, and noise at most 14 s: no chance is
        in it.
        """
        entry = self.clip / self.step + 1
        return clients * (entry + REACH * self.deviation)

    def numbers(self, vector: Tensor, function: str, t: int, client: int) -> Tensor:
        """The message of one client as it adds it to a sum, int32 [d].

        `vector` [d] is all its tensors together, float64 on the CPU, and finite.
        """
        key = seed_of(self.seed, f"rounding {function}", t, client)
        numbers = self.rounded(vector, torch.Generator().manual_seed(key))
        return self._noised(numbers, function, t, client)

    def rounded(self, vector: Tensor, draws: torch.Generator) -> Tensor:
        """The message within C, in whole steps and without noise, int32 [d]."""
        if len(vector) > self.num_entries:
            raise ValueError(
                f"a message of {len(vector)} numbers: the noise is made for "
                f"{self.num_entries}"
            )
        norm = float(vector.square().sum().sqrt())
        factor = min(1.0, self.clip / norm) if norm else 1.0
        # By its own length, as devices do not take the server's word for a bound.
        most = math.floor((self.sensitivity(len(vector)) / self.step) ** 2)
        numbers = torch.empty(len(vector), dtype=torch.int32)
        for _ in range(TRIES):
            square = 0
            for start in range(0, len(vector), BLOCK):
                y = vector[start : start + BLOCK] * factor / self.step
                u = torch.rand(len(y), generator=draws, dtype=torch.float64)
                low = y.floor()
                low += u < y - low
                numbers[start : start + BLOCK] = low
                whole = low.long()
                square += int(whole.dot(whole))
            if square <= most:
                return numbers
        raise RuntimeError(f"{TRIES} roundings were too long: the bound is wrong")

    def _noised(self, numbers: Tensor, function: str, t: int, client: int) -> Tensor:
        key = self._key(function, t, client)
        noise = discrete_gaussian(self.deviation).draw(len(numbers), key)
        return numbers.add_(torch.from_numpy(noise))

    def _key(self, function: str, t: int, client: int) -> bytes:
        """The 32 bytes that the noise is drawn from, once."""
        if self.is_secret:
            return os.urandom(32)
        return rng(self.seed, f"noise {function}", t, client).bytes(32)

    def terms(self) -> str:
        """n0, a, s, d, C and z: the text of an agreement of all, which devices sign.

        With another C or z one client's steps would be of another size, and the sum
        of all would be wrong.
        """
        told = {name: getattr(self, name) for name in (*TOLD, *SHARED)}
        return json.dumps(told, sort_keys=True)

    @classmethod
    def on_device(
        cls, settings: DistributedSettings, terms: str, seed: int
    ) -> DistributedNoise:
        """A device's own noise: by its settings, and by what it was told.

        Raises Refused for terms that nobody can agree to.
        """
        told = _told(terms)
        if told["deviation"] not in (DEVIATION, FINE_DEVIATION):
            raise Refused(
                f"a deviation of {told['deviation']} steps: expected {DEVIATION} or "
                f"{FINE_DEVIATION}"
            )
        for name in ("colluding", *SHARED):
            if told[name] != getattr(settings, name):
                raise Refused(
                    f"distributed.{name} of {told[name]:g}, and by this client's "
                    f"settings {getattr(settings, name):g}"
                )
        return cls(**told, seed=seed, is_secret=True)


def check_threshold(terms: str, t: int) -> None:
    """Raises Refused where t clients, that a sum needs, may add too little noise.

    A device calls it with the threshold of the cohort, before it sends shares; terms
    are empty where clients add none.
    """
    if not terms:
        return
    told = _told(terms)
    if t < told["honest"] + told["colluding"]:
        raise Refused(
            f"a threshold of {t} clients: noise is counted on from {told['honest']}, "
            f"and {told['colluding']} may collude"
        )


def _told(terms: str) -> dict[str, Any]:
    """The agreement that `DistributedNoise.terms` wrote. Raises Refused."""
    names = (*TOLD, *SHARED)
    try:
        told = json.loads(terms)
    except ValueError:
        told = None
    if not isinstance(told, dict) or sorted(told) != sorted(names):
        raise Refused(f"noise by terms of {terms[:80]!r}: expected {', '.join(names)}")
    for name in SHARED:
        if type(told[name]) is not float or not 0 < told[name] < math.inf:
            raise Refused(f"{name} of {str(told[name])[:20]}: expected above 0")
    for name in TOLD:
        value, least = told[name], 0 if name == "colluding" else 1
        if type(value) is not int or not least <= value < 2**31:
            raise Refused(f"{name} of {str(value)[:20]}: expected a whole number")
    return told


def deviation_for(num_entries: int, honest: int, noise_multiplier: float) -> int:
    """s: finer steps where rounding would cost more than a little of the noise.

    >>> deviation_for(10**6, honest=100, noise_multiplier=1.0)
    1024
    >>> deviation_for(10**7, honest=10, noise_multiplier=1.0)
    8192
    """
    is_long = math.sqrt(num_entries / honest) * noise_multiplier > LONG
    return FINE_DEVIATION if is_long else DEVIATION


def _gap(honest: int, deviation: int) -> float:
    """tau: how far the sum of discrete Gaussians is from one; 0 in float64 for s > 8.

    >>> _gap(1000, 1024)
    0.0
    """
    k = np.arange(1, honest)
    terms = np.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1))
    return 10 * float(terms.sum())
