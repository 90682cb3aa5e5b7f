"""The sections `[clock]` and `[schedule]` of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "Buffered",
    "ClockSettings",
    "Quantity",
    "Replay",
    "ScheduleSettings",
    "Synchronous",
    "buffered_of",
    "goal_of",
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Constant(_Settings):
    """The same for every client."""

    name: Literal["constant"] = "constant"
    value: float = Field(ge=1e-9, le=1e9, description="c")


class LogNormal(_Settings):
    """median exp(sigma z_i), z_i ~ N(0, 1); the mean is median exp(sigma^2 / 2)."""

    name: Literal["lognormal"] = "lognormal"
    median: float = Field(
        ge=1e-9, le=1e9, description="half of the clients are below it"
    )
    sigma: float = Field(1.0, ge=0, le=10, description="of the logarithm")


class Zipf(_Settings):
    """base min(Z_i, cap), Z_i ~ Zipf(a): most clients at the base, few far above."""

    name: Literal["zipf"] = "zipf"
    base: float = Field(ge=1e-9, le=1e9, description="the smallest value")
    a: float = Field(2.0, gt=1, description="exponent: P(Z = k) falls as k^-a")
    cap: int = Field(1000, ge=1, le=10**6, description="the largest Z")


class TwoClass(_Settings):
    """value, and with probability `share` value times `factor`."""

    name: Literal["two_class"] = "two_class"
    value: float = Field(ge=1e-9, le=1e9, description="c, of the usual clients")
    factor: float = Field(10.0, ge=1e-9, le=1e9, description="of the others")
    share: float = Field(0.1, ge=0, le=1, description="q, share of the others")


Quantity = Annotated[
    Constant | LogNormal | Zipf | TwoClass, Field(discriminator="name")
]
"""A number of every client's own, fixed for the run."""

_QUANTITIES = ("step_s", "down_mbps", "up_mbps", "latency_s")


class ClockSettings(_Settings):
    """Simulated time: how long the work of every client takes.

    d = 2 latency_s + 8e-6 bytes_down / down_mbps + step_s steps exp(jitter z)
    + 8e-6 bytes_up / up_mbps, with steps and bytes as the run counts them. Without
    `step_s` and `trace` there is no clock. A plain number stands for a constant.
    """

    step_s: Quantity | None = Field(None, description="seconds of one local step")
    down_mbps: Quantity | None = Field(
        None, description="10^6 bits a second towards the client; default: no limit"
    )
    up_mbps: Quantity | None = Field(
        None, description="10^6 bits a second from the client; default: no limit"
    )
    latency_s: Quantity | None = Field(
        None, description="seconds of one way, whatever the size; default: none"
    )
    jitter: float = Field(
        0.0, ge=0, le=10, description="sigma_j, of the logarithm of one work's step_s"
    )
    trace: Path | None = Field(
        None,
        description="CSV or Parquet with a row a device: step_s or example_s, "
        "down_mbps, up_mbps, latency_s; client i has row i mod rows, or the row of "
        "its own in a column `client`; wins over the settings above",
    )
    windows: Path | None = Field(
        None,
        description="CSV or Parquet with a row a window: client, start_s, end_s; "
        "client i is there in the windows of client i mod the file's clients",
    )
    period_s: float = Field(
        86400.0, gt=0, description="seconds after which the windows come again"
    )
    at_end: Literal["lost", "pause"] = Field(
        "lost", description="work that its window's end finds undone: lost, or paused"
    )
    server_s: float = Field(0.0, ge=0, description="seconds of the server a round")
    stragglers: Literal["finish", "stop"] = Field(
        "finish",
        description="a late client goes on and is busy until it is done, as in the "
        "field, or stops at the round's end",
    )

    @property
    def is_on(self) -> bool:
        """Whether there is a clock."""
        return self.step_s is not None or self.trace is not None

    @field_validator(*_QUANTITIES, mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """A plain number stands for a constant; zero latency for none."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return {"name": "constant", "value": value}

    @model_validator(mode="after")
    def _whole(self) -> ClockSettings:
        given = self.model_dump(exclude_defaults=True)
        if given and not self.is_on:
            raise ValueError(
                f"{', '.join(given)} without a clock: set clock.step_s, the seconds of "
                "one local step, e.g. --set clock.step_s=0.05, or clock.trace"
            )
        return self


class Synchronous(_Settings):
    """The server waits: for all, until a deadline, or for the first answers."""

    name: Literal["synchronous"] = "synchronous"
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which a round goes on without late clients; "
        "default: none with a clock, 3600 on devices",
    )
    goal: int | None = Field(
        None,
        ge=1,
        description="a round ends with this many reports; ask more clients than that "
        "to over-select",
    )


class Buffered(_Settings):
    """The server steps whenever K answers are in; who is done gets work at once."""

    name: Literal["buffered"] = "buffered"
    buffer: int = Field(10, ge=1, description="K, answers of one server update")
    concurrency: int = Field(30, ge=1, description="M, clients that work at a time")
    staleness: Literal["sqrt", "polynomial", "hinge", "constant"] = Field(
        "sqrt",
        description="s(tau), weight of an update tau versions old: (1 + tau)^-1/2, "
        "(1 + tau)^-a, 1 up to b and then 1 / (a (tau - b) + 1), or 1",
    )
    a: float = Field(0.5, ge=0, description="a of polynomial and hinge")
    b: int = Field(6, ge=0, description="b of hinge")
    normalise: Literal["count", "weights"] = Field(
        "count",
        description="what divides the sum: the weights without s, or those with it",
    )
    max_staleness: int | None = Field(
        None, ge=0, description="answers older than this are thrown away"
    )
    max_age_s: float = Field(
        3600.0,
        gt=0,
        description="grid: seconds after which work that was sent is given up",
    )


class Replay(_Settings):
    """The order of answers is that of an earlier run: `fedcore run --replay FILE`."""

    name: Literal["trace"] = "trace"
    file: Path = Field(description="that run's directory, or its arrivals.parquet")
    of: Annotated[Synchronous | Buffered, Field(discriminator="name")] = Field(
        Synchronous(),
        description="the schedule of that run: how a buffer weighs old answers",
    )


ScheduleSettings = Annotated[
    Synchronous | Buffered | Replay, Field(discriminator="name")
]


def goal_of(schedule: Synchronous | Buffered | Replay) -> int | None:
    """The number of reports that a server step waits for; None where it is no setting.

    >>> goal_of(Synchronous(goal=8)), goal_of(Buffered(buffer=4))
    (8, 4)
    """
    if isinstance(schedule, Buffered):
        return schedule.buffer
    return schedule.goal if isinstance(schedule, Synchronous) else None


def buffered_of(schedule: Synchronous | Buffered | Replay) -> Buffered | None:
    """The settings of a buffer, of the run or of one that it follows; else None.

    >>> buffered_of(Synchronous()) is None
    True
    >>> buffered_of(Replay(file=Path("runs/a"), of=Buffered(buffer=4))).buffer
    4
    """
    if isinstance(schedule, Replay):
        schedule = schedule.of
    return schedule if isinstance(schedule, Buffered) else None


def counts_discount(schedule: Synchronous | Buffered | Replay) -> bool:
    """Whether the weight that divides a mean has the discounts of old answers in it."""
    buffered = buffered_of(schedule)
    return buffered is not None and buffered.normalise == "weights"
