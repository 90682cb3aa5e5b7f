"""`[secure]`: the ring and the graph of `aggregation.secure = true`."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["SecureSettings"]


class SecureSettings(BaseModel):
    """How numbers become integers, and how clients mask them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reach: float = Field(
        8.0,
        gt=0,
        description="c, entries of a message beyond it are cut off; a power of two",
    )
    neighbours: int | None = Field(
        None,
        ge=2,
        description="k, clients with which each client shares masks; default: all, "
        "and 100 in cohorts of more than 128",
    )
    threshold: int | None = Field(
        None,
        ge=2,
        description="t, neighbours that have to stay to the end of a round; default, "
        "and in evaluations: two thirds",
    )

    @model_validator(mode="after")
    def _a_power_of_two(self) -> SecureSettings:
        mantissa, exponent = math.frexp(self.reach)
        if mantissa != 0.5:
            raise ValueError(
                f"reach = {self.reach:g}: expected a power of two, so that numbers "
                f"are exact in every engine; take {2.0 ** (exponent - 1):g} or "
                f"{2.0**exponent:g}"
            )
        return self
