"""What happens to a message on its way, down to a client and up to the server: white Gaussian noise, by its power or by the SNR.

An analogue channel, as the noise-robust methods assume it: the tensors of a message are disturbed, its scalars (a loss, a counter)
are not. Noise is independent over clients, rounds, links and client functions, and drawn from that key on the CPU: the same bits
in every engine, on every device. A client keeps what it sent undisturbed; evaluation is a measurement, and hears no noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedcore import trees
from fedcore.method import evaluates
from fedcore.rng import seed_of
from fedcore.types import ClientFunction, Tree

Direction = Literal["downlink", "uplink"]


class LinkSettings(BaseModel):
    """The channel in one direction; silent unless one of the two is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    variance: float = Field(
        0.0,
        ge=0,
        description="sigma^2, variance of the noise on every entry of a message's tensors",
    )
    snr_db: float | None = Field(
        None,
        ge=-200,
        le=200,
        description="instead: mean power of a message's entries over sigma^2, in dB",
    )

    @model_validator(mode="after")
    def _one_of(self) -> LinkSettings:
        if self.variance and self.snr_db is not None:
            raise ValueError(
                f"variance = {self.variance} and snr_db = {self.snr_db}: give one of the two"
            )
        return self

    def deviation(self, tensors: list[Tensor]) -> float:
        """sigma for a message with these tensors."""
        if self.snr_db is None:
            return math.sqrt(self.variance)
        entries = max(sum(x.numel() for x in tensors), 1)
        power = sum(float(x.double().square().sum()) for x in tensors) / entries
        return math.sqrt(power / 10 ** (self.snr_db / 10))


class LinksSettings(BaseModel):
    """Noise between the server and its clients."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    downlink: LinkSettings = LinkSettings()
    uplink: LinkSettings = LinkSettings()


class Links:
    """The two channels of a run."""

    def __init__(self, settings: LinksSettings, seed: int) -> None:
        self.s, self.seed = settings, seed

    def silent(self, direction: Direction, fn: ClientFunction) -> bool:
        """Whether messages of this client function arrive in this direction as they were sent."""
        link: LinkSettings = getattr(self.s, direction)
        return (link.variance == 0 and link.snr_db is None) or evaluates(fn)

    def carry(
        self,
        message: Tree,
        direction: Direction,
        fn: ClientFunction,
        t: int,
        client: int,
    ) -> Tree:
        """The message as it arrives."""
        if self.silent(direction, fn):
            return message
        link: LinkSettings = getattr(self.s, direction)
        sigma = link.deviation([x for x in trees.leaves(message) if _carried(x)])
        draw = torch.Generator().manual_seed(
            seed_of(self.seed, f"{direction} {fn.__name__}", t, client)
        )

        def disturb(x: Tensor) -> Tensor:
            if not _carried(x):
                return x
            return torch.add(
                x,
                torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device),
                alpha=sigma,
            )

        return trees.map(disturb, message)


def _carried(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 0
