"""Participation: an outside process that a method neither chooses nor sees.

The processes follow Wang and Ji (FedAU, ICLR 2024) and its reference code: Bernoulli,
two-state Markov and cyclic participation with a rate p_i for each client, which may be
tied to the client's mix of classes. Uniform cohorts and recorded traces complete them.
A process is two functions, `start() -> state` and `sample(t, state) -> (cohort,
state)`; its state is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedcore.errors import SettingsError
from fedcore.rng import rng
from fedcore.storage.text import read_text
from fedcore.types import Tree

LabelCounts = Callable[[], np.ndarray]
"""() -> [population, classes]; called only by a process that needs it."""

Probability = Annotated[float, Field(gt=0, le=1)]


class Process:
    """Base of the processes: no state, and `members` gives the cohort."""

    # p_i, the long-run share of rounds of each client, float64 [population]; None where
    # it is not known.
    rates: np.ndarray | None = None
    # q, where every client takes part with this probability, independently of all else.
    poisson: float | None = None

    def __init__(self, population: int, seed: int) -> None:
        self.population, self.seed = population, seed

    def start(self) -> Tree:
        """The state before the first round."""
        return {}

    def sample(self, t: int, state: Tree) -> tuple[Tensor, Tree]:
        """(ids of the cohort, ascending int64 [m], state after round t)."""
        return torch.from_numpy(self.members(t)), state

    def members(self, t: int) -> np.ndarray:
        """The ids of the cohort of round t, ascending int64 [m]."""
        raise NotImplementedError

    def check(self, rounds: int) -> None:
        """Raises SettingsError when the process cannot last for this many rounds."""

    @property
    def largest(self) -> int:
        """The largest cohort to expect, in clients.

        Of random cohorts, the mean and six standard deviations.
        """
        if self.rates is None:
            return self.population
        variance = (self.rates * (1 - self.rates)).sum()
        size = self.rates.sum() + 6 * float(np.sqrt(variance))
        return min(self.population, int(np.ceil(size)))


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that a sampled client never answers, in [0, 1)",
    )


class Uniform(_Settings):
    """Every round a cohort of one size, uniformly without replacement."""

    name: Literal["uniform"] = "uniform"
    cohort: int | None = Field(
        None, ge=1, description="clients a round; default: all of them, or `fraction`"
    )
    fraction: Probability | None = Field(
        None,
        description="share of the population a round, in (0, 1], instead of cohort",
    )

    @model_validator(mode="after")
    def _one_of(self) -> Uniform:
        if self.cohort is not None and self.fraction is not None:
            raise ValueError(
                f"cohort = {self.cohort} and fraction = {self.fraction}: "
                "give one of the two"
            )
        return self

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError for a cohort of zero or one above the population."""
        size = self.cohort or population
        if self.fraction is not None:
            size = int(population * self.fraction + 1e-9)  # 100 x 0.29 is 28.999...
            if size == 0:
                raise SettingsError(
                    f"participation: a cohort of 0: population {population} x "
                    f"fraction {self.fraction} rounds down; "
                    "raise the fraction or set cohort = 1"
                )
        if size > population:
            raise SettingsError(
                f"participation.cohort = {size}: the population is {population}; "
                "set a cohort of at most that, or raise population"
            )
        return UniformProcess(population, seed, size)


class UniformProcess(Process):
    """A cohort of `size` clients in every round."""

    def __init__(self, population: int, seed: int, size: int) -> None:
        super().__init__(population, seed)
        self.size = size
        self.rates = np.full(population, size / population)
        self.poisson = 1.0 if size == population else None

    @property
    def largest(self) -> int:
        return self.size

    def members(self, t: int) -> np.ndarray:
        if self.size == self.population:
            return np.arange(self.population)
        draw = rng(self.seed, "participation", t)
        return np.sort(
            draw.choice(self.population, self.size, replace=False, shuffle=False)
        )

    def among(self, t: int, there: np.ndarray) -> np.ndarray:
        """The cohort of round t from `there`, the ids that are there, ascending.

        All of them where they are no more than a cohort; that of `members` where
        everybody is there.
        """
        if len(there) <= self.size:
            return there
        draw = rng(self.seed, "participation", t)
        places = draw.choice(len(there), self.size, replace=False, shuffle=False)
        return np.sort(there[places])


class _Rates(_Settings):
    """Settings of the processes with a rate p_i for each client."""

    mean: Probability = Field(
        0.1,
        description="mean rate, in (0, 1]; the rate of every client unless alpha or p "
        "is given",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="alpha_p: rates follow the class mix, weighted by one draw of "
        "Dirichlet(alpha_p); small = uneven",
    )
    floor: float = Field(
        0.02, ge=0, le=1, description="p_min, the lowest rate when alpha is given"
    )
    p: tuple[Probability, ...] | None = Field(
        None, description="the rate of every client, instead of mean and alpha"
    )

    def rates(self, population: int, seed: int, counts: LabelCounts) -> np.ndarray:
        """p_i, float64 [population].

        Raises SettingsError when `p` does not fit the population.
        """
        if self.p is not None:
            if len(self.p) != population:
                raise SettingsError(
                    f"participation.p has {len(self.p)} rates, the population is "
                    f"{population}: give one a client"
                )
            return np.array(self.p)
        if self.alpha is None:
            return np.full(population, self.mean)
        count = counts()
        classes = count.shape[1]
        kappa = rng(seed, "rates").dirichlet(np.full(classes, self.alpha))
        shares = count / np.maximum(count.sum(1, keepdims=True), 1)
        # p_n = max(p_min, mean C sum_c kappa_c L_nc), at most 1; the reference code
        # leaves that out, and exceeds 1 with many classes.
        rates = self.mean * classes * np.einsum("nc,c->n", shares, kappa)
        clipped: np.ndarray = np.clip(rates, self.floor, 1.0)
        return clipped


class Bernoulli(_Rates):
    """Client i takes part with probability p_i, independently of all else."""

    name: Literal["bernoulli"] = "bernoulli"

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError when `p` does not fit the population."""
        rates = self.rates(population, seed, counts)
        return _BernoulliProcess(population, seed, rates)


class _BernoulliProcess(Process):
    def __init__(self, population: int, seed: int, rates: np.ndarray) -> None:
        super().__init__(population, seed)
        self.p = self.rates = rates
        self.poisson = float(rates[0]) if bool((rates == rates[0]).all()) else None

    def members(self, t: int) -> np.ndarray:
        draws = rng(self.seed, "participation", t).random(self.population)
        return np.flatnonzero(draws < self.p)


class Markov(_Rates):
    """Client i switches between taking part and not, with a long-run rate of p_i.

    q01 = q from out to in, q10 = q (1/p_i - 1) from in to out. Where q10 would exceed
    1, both are divided by it, so that the long-run rate stays p_i.
    """

    name: Literal["markov"] = "markov"
    q: Probability = Field(
        0.05,
        description="probability a round that an absent client comes in, in (0, 1]",
    )

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError when `p` does not fit the population."""
        rates = self.rates(population, seed, counts)
        return _MarkovProcess(population, seed, rates, self.q)


class _MarkovProcess(Process):
    def __init__(self, population: int, seed: int, rates: np.ndarray, q: float) -> None:
        super().__init__(population, seed)
        self.p = self.rates = rates
        leave = q * (1 / rates - 1)
        shrink = np.maximum(leave, 1.0)
        self.enter, self.leave = q / shrink, leave / shrink

    def start(self) -> Tree:
        draws = rng(self.seed, "participation start").random(self.population)
        return {"active": torch.from_numpy(draws < self.p)}

    def sample(self, t: int, state: Tree) -> tuple[Tensor, Tree]:
        # One transition comes before the first observed round, as in the reference.
        draws = rng(self.seed, "participation", t).random(self.population)
        was_active = state["active"].numpy()
        active = np.where(was_active, draws >= self.leave, draws < self.enter)
        cohort = torch.from_numpy(np.flatnonzero(active))
        return cohort, {"active": torch.from_numpy(active)}


class Cyclic(_Rates):
    """Client i takes part in a_i rounds of every cycle, in one block, after r_i rounds.

    a_i = max(1, round(cycle p_i)), b_i = max(1, cycle - a_i) absent rounds, and r_i
    uniform on 0 .. b_i - 1.
    """

    name: Literal["cyclic"] = "cyclic"
    cycle: int = Field(100, ge=2, description="C, rounds in a cycle")

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError when `p` does not fit the population."""
        rates = self.rates(population, seed, counts)
        return _CyclicProcess(population, seed, rates, self.cycle)


class _CyclicProcess(Process):
    def __init__(
        self, population: int, seed: int, rates: np.ndarray, cycle: int
    ) -> None:
        super().__init__(population, seed)
        self.active = np.maximum(1, np.round(cycle * rates).astype(np.int64))
        absent = np.maximum(1, cycle - self.active)
        self.period = self.active + absent
        self.delay = rng(seed, "participation").integers(0, absent)
        self.rates = self.active / self.period

    @property
    def largest(self) -> int:
        """The largest cohort of one cycle, after the longest delay."""
        start, rounds = int(self.delay.max()), int(self.period.max())
        return max(len(self.members(t)) for t in range(start, start + rounds))

    def members(self, t: int) -> np.ndarray:
        since = t - self.delay
        return np.flatnonzero((since >= 0) & (since % self.period < self.active))


class Trace(_Settings):
    """Cohorts are read from a file: one line a round, client ids separated by spaces.

    An empty line is an empty round.
    """

    name: Literal["trace"] = "trace"
    file: Path = Field(
        description="text file with at least as many lines as the run has rounds"
    )

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError for a missing file, or ids outside the population."""
        name = f"participation.file = {self.file}"
        text = read_text(self.file, name, "a text file, one line a round")
        lines = text.removesuffix("\n").split("\n") if text else []
        cohorts = []
        for number, line in enumerate(lines, 1):
            where = f"{self.file}, line {number}"
            cohorts.append(_ids_in(line, population, where))
        return _TraceProcess(population, seed, cohorts, self.file)


def _ids_in(line: str, population: int, where: str) -> np.ndarray:
    """The ids in one line of a trace, ascending int64 [m]."""
    try:
        ids = np.unique(np.array(line.split(), dtype=np.int64))
    except (ValueError, OverflowError) as error:
        raise SettingsError(
            f"{where}: {error}; expected client ids separated by spaces"
        ) from error
    if len(ids) and not (ids[0] >= 0 and ids[-1] < population):
        raise SettingsError(
            f"{where}: ids {ids[0]} to {ids[-1]}, "
            f"expected ids from 0 to {population - 1}"
        )
    return ids


class _TraceProcess(Process):
    def __init__(
        self, population: int, seed: int, cohorts: list[np.ndarray], file: Path
    ) -> None:
        super().__init__(population, seed)
        self.cohorts, self.file = cohorts, file

    def check(self, rounds: int) -> None:
        if rounds > len(self.cohorts):
            raise SettingsError(
                f"rounds = {rounds}, but {self.file} has {len(self.cohorts)} lines, "
                "one a round: set rounds to at most that"
            )

    @property
    def largest(self) -> int:
        return max(map(len, self.cohorts))

    def members(self, t: int) -> np.ndarray:
        return self.cohorts[t]


class Tiers(_Settings):
    """Cohorts of clients that are about equally fast (TiFL, Chai et al., HPDC 2020).

    Clients are sorted by the seconds that the clock expects of their work, and cut into
    q tiers; every round draws a tier, uniformly, and its cohort from that tier.
    """

    name: Literal["tiers"] = "tiers"
    tiers: int = Field(5, ge=1, description="q, tiers of about equally many clients")
    cohort: int = Field(10, ge=1, description="clients a round, of one tier")

    def process(self, population: int, seed: int, counts: LabelCounts) -> Process:
        """Raises SettingsError: without a clock nobody is faster than others."""
        raise SettingsError(
            'participation.name = "tiers" sorts clients by the time that a simulated '
            "clock expects of them: set clock.step_s, the seconds of one local step"
        )

    def of_speeds(self, seconds: np.ndarray, seed: int) -> Process:
        """The process for clients that need so many seconds each, [population].

        Raises SettingsError where a tier has fewer clients than a cohort.
        """
        smallest = len(seconds) // self.tiers
        if smallest < self.cohort:
            raise SettingsError(
                f"participation.cohort = {self.cohort}: {len(seconds)} clients in "
                f"{self.tiers} tiers are {smallest} in the smallest; lower it, or "
                "participation.tiers"
            )
        return _TiersProcess(seconds, seed, self.tiers, self.cohort)


class _TiersProcess(Process):
    def __init__(self, seconds: np.ndarray, seed: int, q: int, size: int) -> None:
        super().__init__(len(seconds), seed)
        self.size, by_speed = size, np.argsort(seconds, kind="stable")
        self.tiers = [np.sort(tier) for tier in np.array_split(by_speed, q)]
        self.rates = np.empty(self.population)
        for tier in self.tiers:
            self.rates[tier] = size / len(tier) / q

    @property
    def largest(self) -> int:
        return self.size

    def members(self, t: int) -> np.ndarray:
        draw = rng(self.seed, "participation", t)
        tier = self.tiers[int(draw.integers(len(self.tiers)))]
        return np.sort(draw.choice(tier, self.size, replace=False, shuffle=False))


ParticipationSettings = Annotated[
    Uniform | Bernoulli | Markov | Cyclic | Trace | Tiers, Field(discriminator="name")
]


def answering(cohort: Tensor, dropout: float, seed: int, t: int) -> Tensor:
    """The clients of the cohort that answer in round t: each drops out with `dropout`.

    The draws are keyed by seed and round.
    """
    if dropout == 0:
        return cohort
    draws = rng(seed, "dropout", t).random(len(cohort))
    return cohort[torch.from_numpy(draws >= dropout)]
