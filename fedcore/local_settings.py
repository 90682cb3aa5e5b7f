"""`[local]`: how much a client trains in a round, and by which steps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["LocalSettings"]


class ExampleSettings(BaseModel):
    """DP-SGD on the client: every example's gradient is clipped, and noise is added."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float | None = Field(
        None, gt=0, description="C, bound on the L2 norm of one example's gradient"
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="z: a step's sum of clipped gradients gets N(0, (z C)^2) in every "
        "entry",
    )
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="q, probability of an example to be in a step; default: "
        "batch_size / the client's number of examples",
    )

    @property
    def is_active(self) -> bool:
        """Whether gradients are those of single examples."""
        return self.clip is not None

    @model_validator(mode="after")
    def _has_clip(self) -> ExampleSettings:
        for name, value in (("noise", self.noise), ("rate", self.rate)):
            if value and self.clip is None:
                raise ValueError(
                    f"{name} = {value:g} without clip: noise is z times the bound on "
                    "one example's gradient, and nothing is sampled without it; set "
                    "clip too, e.g. local.dp.clip = 1.0"
                )
        return self


class LocalSettings(BaseModel):
    """How much a client trains in a round it takes part in, and by which steps.

    >>> LocalSettings(optimizer="adamw", clip=1.0).has_plain_steps
    False
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(20, ge=1, description="B, examples in a local step")
    epochs: int = Field(
        1,
        ge=1,
        description="E, passes over the client's training examples; the last batch of "
        "each may be smaller",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="K, local steps instead of epochs, reshuffling whenever the "
        "examples run out",
    )

    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="of the local steps; the method says the step size"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="adamw: of the second moment")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the root")
    weight_decay: float = Field(
        0.0, ge=0, description="adamw: decoupled, times the step size"
    )
    moments: Literal["fresh", "kept"] = Field(
        "fresh",
        description="adamw: zero at the start of every round, or kept by the client",
    )
    clip: float | None = Field(
        None, gt=0, description="most that a step's gradient may have as its norm"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="of the step size over the rounds, down to zero after the last; "
        "fine-tuning has none",
    )
    warmup: int = Field(
        0,
        ge=0,
        description="local steps over which the step size rises, whenever local "
        "training begins",
    )
    micro: int = Field(
        1,
        ge=1,
        description="pieces into which a batch is cut, one after another in memory; "
        "their gradients are one step",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the forward pass in training; parameters, steps and "
        "evaluations stay as they are",
    )

    dp: ExampleSettings = ExampleSettings()

    def example_rate(self, num_examples: int) -> float:
        """q: how often a step of DP-SGD draws each of a client's examples.

        >>> LocalSettings(batch_size=20).example_rate(80)
        0.25
        """
        if self.dp.rate is not None:
            return self.dp.rate
        return min(self.batch_size / max(num_examples, 1), 1.0)

    def expected_batch(self, num_examples: int) -> float:
        """B: the examples to expect in a step of DP-SGD, 1 at least."""
        return max(self.example_rate(num_examples) * num_examples, 1.0)

    @property
    def has_plain_steps(self) -> bool:
        """Whether local steps are those of SGD with a constant step size."""
        is_sgd = self.optimizer == "sgd" and self.clip is None
        is_constant = self.schedule == "constant" and self.warmup == 0
        is_whole = self.micro == 1 and not self.dp.is_active
        return is_sgd and is_constant and is_whole and not self.is_rounded

    @property
    def is_rounded(self) -> bool:
        """Whether the forward pass has less precision than the parameters."""
        return self.precision != "float32"

    @property
    def keeps_moments(self) -> bool:
        """Whether clients keep the optimizer's moments from round to round."""
        return self.moments == "kept"

    @model_validator(mode="after")
    def _has_one_length(self) -> LocalSettings:
        has_epochs = "epochs" in self.model_fields_set and self.epochs != 1
        if self.steps is not None and has_epochs:
            raise ValueError("give epochs or steps, not both")
        return self

    @model_validator(mode="after")
    def _has_pieces(self) -> LocalSettings:
        if self.micro > self.batch_size:
            raise ValueError(
                f"micro = {self.micro}: a batch has batch_size = {self.batch_size} "
                "examples; lower it"
            )
        return self

    @model_validator(mode="after")
    def _has_moments(self) -> LocalSettings:
        if self.optimizer == "adamw":
            return self
        if self.keeps_moments:
            raise ValueError(
                'moments = "kept": sgd has none; set optimizer = "adamw", or leave '
                "moments out"
            )
        if self.weight_decay:
            raise ValueError(
                f"weight_decay = {self.weight_decay:g} is adamw's; set optimizer = "
                '"adamw", or leave it out'
            )
        return self
