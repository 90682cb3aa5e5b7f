"""Noise on the links, down to clients and up to the server: white and Gaussian.

An analogue channel, as the noise-robust methods assume it: the tensors of a message are
disturbed, by a variance or at a signal-to-noise ratio (SNR), and its scalars (a loss, a
counter) are not. Noise is independent over clients, rounds, links and client functions,
and drawn from that key on the CPU: the same bits in every engine, on every device. A
client keeps what it sent undisturbed; evaluation is a measurement, and hears no noise.
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
        description="sigma^2, variance of the noise on every entry of a message's "
        "tensors",
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
                f"variance = {self.variance} and snr_db = {self.snr_db}: "
                "give one of the two"
            )
        return self

    @property
    def is_silent(self) -> bool:
        """Whether messages arrive as they were sent."""
        return self.variance == 0 and self.snr_db is None

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
        self.seed = seed
        self._links: dict[Direction, LinkSettings] = {
            "downlink": settings.downlink,
            "uplink": settings.uplink,
        }

    def is_silent(self, direction: Direction, fn: ClientFunction) -> bool:
        """Whether messages of a client function arrive as they were sent."""
        return self._links[direction].is_silent or evaluates(fn)

    def carry(
        self,
        message: Tree,
        direction: Direction,
        fn: ClientFunction,
        t: int,
        client: int,
    ) -> Tree:
        """The message as it arrives."""
        if self.is_silent(direction, fn):
            return message
        disturbed = [x for x in trees.leaves(message) if _is_disturbed(x)]
        sigma = self._links[direction].deviation(disturbed)
        key = seed_of(self.seed, f"{direction} {fn.__name__}", t, client)
        draw = torch.Generator().manual_seed(key)

        def disturb(x: Tensor) -> Tensor:
            if not _is_disturbed(x):
                return x
            noise = torch.randn(x.shape, generator=draw, dtype=x.dtype)
            return torch.add(x, noise.to(x.device), alpha=sigma)

        return trees.map(disturb, message)


def _is_disturbed(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim > 0
