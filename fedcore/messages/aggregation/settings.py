"""Settings of what the server makes of a round's messages."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RuleName = Literal[
    "mean",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "meamed",
    "geometric_median",
    "centred_clipping",
    "dnc",
    "caf",
    "fltrust",
    "sign",
]
BeforeName = Literal["none", "nnm", "bucketing", "clip", "arc"]

COUNTS_BYZANTINE = frozenset(
    ("trimmed_mean", "krum", "multi_krum", "bulyan", "meamed", "dnc", "caf")
)
"""The rules whose result depends on f."""

DEVICE_EXAMPLES = 10_000
"""The cap on what a device claims to hold, where the settings name none.

A phone or a machine seldom holds more, and one that claims 10^18 weighs no more than
this. It depends on nothing that a device says, as a multiple of the median would.
"""


class AggregationSettings(BaseModel):
    """The way a round's messages become one: the mean, or a rule that survives liars.

    Sources and formulas are in docs/hostile.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: RuleName = Field("mean", description="what takes the place of the mean")
    byzantine: int | None = Field(
        None,
        ge=0,
        description="f, malicious clients among those that a round asks, at most",
    )
    fraction: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="instead of byzantine: f is this share of the clients asked, "
        "rounded up",
    )
    before: BeforeName = Field(
        "none",
        description="done to the messages before the rule: mixing with their nearest "
        "(nnm), means of random buckets, or a bound on norms (clip: the median norm)",
    )
    bucket: int = Field(
        2, ge=2, description="s, messages a bucket, for before = bucketing"
    )
    weights: Literal["method", "equal"] | None = Field(
        None,
        description="of the clients: the method's, or all the same; default: equal "
        "with a rule, the method's with the mean",
    )
    max_examples: int | None = Field(
        None,
        ge=1,
        description="cap on the number of examples that a client can claim; default: "
        "none, and 10 000 for devices",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="C, bound on the L2 norm of every message, by the server",
    )
    tau: float | None = Field(
        None,
        gt=0,
        description="centred_clipping: radius; sign: step of every entry; default: "
        "the median distance, and the median root mean square of an entry",
    )
    iterations: int | None = Field(
        None,
        ge=1,
        description="steps of geometric_median (default 8) and centred_clipping (3)",
    )
    secure: bool = Field(
        False,
        description="only sums of what clients send can be read: masked on devices, "
        "the same integers without masks in a simulation",
    )
    memory_gb: float = Field(
        2.0,
        gt=0,
        description="messages of a round held in memory for a rule, in GB; beyond "
        "that they are in a file",
    )

    @model_validator(mode="after")
    def _knows_f(self) -> AggregationSettings:
        if self.byzantine is not None and self.fraction is not None:
            raise ValueError(
                f"byzantine = {self.byzantine} and fraction = {self.fraction}: give "
                "one of the two"
            )
        has_f = self.byzantine is not None or self.fraction is not None
        for key, value in (("rule", self.rule), ("before", self.before)):
            if not has_f and value in COUNTS_BYZANTINE | {"nnm", "arc"}:
                raise ValueError(
                    f'{key} = "{value}" without f: say how many of the clients that a '
                    "round asks may be malicious, byzantine = 2, or fraction = 0.1"
                )
        return self

    @model_validator(mode="after")
    def _sums_alone(self) -> AggregationSettings:
        if self.secure and not self.is_mean:
            raise ValueError(
                f'secure = true with rule = "{self.rule}", before = "{self.before}" '
                f'and weights = "{self.weights}": a rule looks at single messages, '
                "which a secure sum hides; leave out one of the two"
            )
        return self

    @property
    def is_mean(self) -> bool:
        """Whether sums are all that is needed."""
        is_method_s = self.weights != "equal"
        return self.rule == "mean" and self.before == "none" and is_method_s

    def f(self, asked: int) -> int:
        """f, for a round that asks this many clients.

        >>> AggregationSettings(rule="median", fraction=0.1).f(asked=25)
        3
        """
        if self.fraction is not None:
            return math.ceil(round(self.fraction * asked, 9))
        return self.byzantine or 0
