"""The results of an audit, as `audit.json` holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, Required, TypedDict

from fedcore import __version__

SCHEMA = 1

Mode = Literal["sweep", "captured", "defences"]
Measure = Literal["accuracy", "client_accuracy"]


class Interval(TypedDict):
    """A mean over clients with its 95 % interval; no interval for one client."""

    mean: float
    low: float | None
    high: float | None


class Distribution(TypedDict):
    """The images of one client."""

    mean: float
    median: float
    min: float
    max: float


class AttackResult(TypedDict, total=False):
    """One attack on one client; from `psnr` on only where it was scored."""

    ok: Required[bool]
    error: str  # where not ok
    iterations: int
    objective: float | None
    alpha: float  # of SME, as are its other findings
    path_scale: float
    rows: int  # of analytic recovery: active rows, distinct inputs
    inputs: int
    curve: list[float | None]  # the objective along the way
    agreement_of_restarts: float  # PSNR of one restart's images against another's
    psnr: Distribution  # dB
    ssim: Distribution
    mse: float
    lpips: float | str  # or why there is none
    above: dict[str, float]  # share of images above a PSNR in dB
    identification: dict[str, float]
    per_image_psnr: list[float]
    R: float  # the way from the class mean to 30 dB, mean over images
    R_max: float
    I: float  # noqa: E741 - the specification's name; identification above chance


class LabelResult(TypedDict, total=False):
    """Labels of one client; from `accuracy` on only where they were scored."""

    ok: Required[bool]
    error: str
    kind: Literal["tokens"]  # of next tokens: which occur at all; else counts of labels
    source: str  # the parameter that tells the tokens
    found: int  # tokens
    mode: Literal["recovered", "oracle"]
    counts: list[int]
    accuracy: float
    precision: float
    recall: float
    chance: float
    grade: str


class MembershipResult(TypedDict, total=False):
    """Membership inference on one client, by each score and by the best of them."""

    ok: Required[bool]
    error: str
    best: Literal["loss_drop", "gradient", "base", "rmia"]
    auc: float
    exchanges: int
    grade: str
    loss_drop: dict[str, Any]
    gradient: dict[str, Any]
    base: dict[str, Any]  # of text
    rmia: dict[str, Any]  # with reference models
    left_out: dict[str, str]  # scores that there are not: why


class Best(TypedDict):
    """The attack that came closest to a client's images."""

    attack: str
    psnr: Distribution
    ssim: Distribution
    identification: dict[str, float]


class ClientResult(TypedDict):
    """One client of a cell."""

    client: int
    round: int
    function: str
    num_examples: int
    unit: NotRequired[Literal["token"]]  # that num_examples counts; else examples
    clients_aggregated: int
    local_steps: int | None
    delta_norm: float
    entries_seen: int
    entries_of_model: int
    attacks: dict[str, AttackResult]
    labels: LabelResult | None
    membership: MembershipResult | None
    references: dict[str, dict[str, float]]
    best: Best | None
    input_leakage: float | None  # out of 100
    worst_image: float | None  # out of 100
    grade: str | None


class AttackSummary(TypedDict, total=False):
    """One attack on all clients of a cell."""

    psnr: Required[Interval]
    ssim: Required[Interval]
    top1: Required[Interval]
    objective: Required[Interval]
    alpha: Interval


class Summary(TypedDict):
    """Means over the clients of a cell."""

    attacks: dict[str, AttackSummary]
    references: dict[str, dict[str, float]]
    best: str | None
    labels: Interval | None
    membership: Interval | None
    input_leakage: Interval | None
    worst_image: Interval | None


class Pictures(TypedDict):
    """A client's images."""

    client: int
    attack: str
    pairs: list[list[Any]]  # [original, rebuilt, PSNR in dB], PNG in base64


class CellResult(TypedDict):
    """One cell; `pictures` are left out of audit.json."""

    name: str
    factors: dict[str, Any]
    accuracy: float | None
    client_accuracy: float | None
    personal: bool
    privacy: dict[str, Any] | None
    clients: list[ClientResult]
    summary: Summary
    attack_seconds: dict[str, float]
    warnings: list[str]
    interrupted: bool
    pictures: list[Pictures]
    seconds: float


class Worst(NamedTuple):
    """The client with the highest input leakage."""

    input_leakage: float
    cell: str
    client: int


@dataclass
class Audit:
    """Everything that an audit found."""

    mode: Mode
    experiment: dict[str, Any]
    plan: dict[str, Any]
    cells: list[CellResult]
    warnings: list[str]
    interrupted: bool
    created: str
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)
    """Cells that could not be made, with the reason."""

    @property
    def clients(self) -> list[ClientResult]:
        """All clients of all cells."""
        return [client for cell in self.cells for client in cell["clients"]]

    @property
    def judged_by(self) -> Measure:
        """The accuracy that is set against privacy, in every cell the same.

        Where a method personalises it is that of the clients' own models.
        """
        personal = any(cell["personal"] for cell in self.cells)
        return "client_accuracy" if personal else "accuracy"

    @property
    def worst(self) -> Worst | None:
        """The highest input leakage over cells and clients; None without scores."""
        scored = []
        for cell in self.cells:
            for client in cell["clients"]:
                if client["input_leakage"] is not None:
                    leakage, number = client["input_leakage"], client["client"]
                    scored.append(Worst(leakage, cell["name"], number))
        return max(scored, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON, without pictures."""
        cells = []
        for cell in self.cells:
            without = dict(cell)
            del without["pictures"]
            cells.append(without)
        unscored = dict.fromkeys(Worst._fields)
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "mode": self.mode,
            "experiment": self.experiment,
            "plan": self.plan,
            "view": "client_update",
            "cells": cells,
            "worst": unscored if self.worst is None else self.worst._asdict(),
            "failed": self.failed,
            "warnings": self.warnings,
            "interrupted": self.interrupted,
            "created": self.created,
            "seconds": self.seconds,
        }
