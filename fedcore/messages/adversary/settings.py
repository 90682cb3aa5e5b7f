"""Malicious clients that a simulation contains."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

AttackName = Literal[
    "none",
    "absent",
    "sign_flip",
    "scaled",
    "gaussian",
    "zero",
    "stale",
    "alie",
    "ipm",
    "alie_optimised",
    "ipm_optimised",
    "minmax",
    "minsum",
    "mimic",
    "label_flip",
    "backdoor",
]

SCALED = ("sign_flip", "scaled", "gaussian", "alie", "ipm", "backdoor")
"""The attacks that have a strength."""

AUTOMATIC = ("scaled", "alie", "backdoor")
"""Those of them whose strength follows from the cohort, with scale = "auto"."""


class AdversarySettings(BaseModel):
    """Malicious clients, and what they send; none unless something is given.

    Simulated in every engine; `fedcore server` refuses it. Sources and formulas are in
    docs/hostile.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    attack: AttackName = Field(
        "none",
        description='what malicious clients do; "absent": they never report, the '
        "reference beside which damage is measured",
    )
    clients: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="ids of the malicious clients"
    )
    fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="instead: share of the population, rounded down, drawn once",
    )
    scale: float | Literal["auto"] | None = Field(
        None,
        description="strength: gamma of sign_flip (default 1), scaled (auto) and "
        "backdoor (1), z of alie (1.5), epsilon of ipm (0.5), k of gaussian (1); auto: "
        "gamma that replaces the mean, and the z of the paper",
    )
    start: int = Field(1, ge=1, description="first round of the attack, from 1 on")
    direction: Literal["unit", "sign", "std"] = Field(
        "std", description="minmax, minsum: direction of the perturbation"
    )
    target: int = Field(
        0, ge=0, description="backdoor: class that the trigger stands for"
    )
    trigger: int = Field(
        2, ge=1, description="backdoor: side of the white corner square, in pixels"
    )
    share: float = Field(
        0.5, gt=0, le=1, description="backdoor: share of a batch that is stamped"
    )

    @field_validator("scale", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """One line for what is neither, instead of one for each."""
        try:
            is_known = value is None or value == "auto" or math.isfinite(float(value))
        except (TypeError, ValueError, OverflowError):
            is_known = False
        if not is_known:
            raise ValueError('must be a number, or "auto"')
        return value

    @model_validator(mode="after")
    def _somebody(self) -> AdversarySettings:
        if self.clients and self.fraction is not None:
            raise ValueError(
                f"clients = {list(self.clients)} and fraction = {self.fraction}: give "
                "one of the two"
            )
        has_clients = bool(self.clients) or self.fraction is not None
        if has_clients and self.attack == "none":
            raise ValueError("malicious clients without an attack: set attack too")
        if self.attack != "none" and not has_clients:
            raise ValueError(
                f'attack = "{self.attack}" without malicious clients: set clients, or '
                "fraction = 0.1"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> AdversarySettings:
        if len(set(self.clients)) < len(self.clients):
            raise ValueError(f"clients = {list(self.clients)}: name each id once")
        if self.scale is not None and self.attack not in SCALED:
            raise ValueError(
                f'scale = {self.scale}: attack = "{self.attack}" has no strength; '
                f"leave scale out, or choose one of {', '.join(SCALED)}"
            )
        if self.scale == "auto" and self.attack not in AUTOMATIC:
            raise ValueError(
                f'scale = "auto" is for {", ".join(AUTOMATIC)}; for attack = '
                f'"{self.attack}" give a number'
            )
        return self

    @property
    def is_active(self) -> bool:
        """Whether anybody is malicious."""
        return self.attack != "none"
