"""Scores of one cell: the comparison of what the attacks found with the truth.

The only part of an audit that holds truths beside reconstructions.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedcore import trees
from fedcore.audit import metrics
from fedcore.audit.attacks import membership
from fedcore.audit.attacks.base import Reconstruction
from fedcore.audit.attacks.rmia import Rows, reference_scores
from fedcore.audit.attacks.tokens import Tokens
from fedcore.audit.observe import CPU, Observation, Subject, Truth
from fedcore.audit.plan import Plan
from fedcore.audit.results import (
    AttackResult,
    AttackSummary,
    ClientResult,
    Distribution,
    Interval,
    LabelResult,
    MembershipResult,
    Pictures,
    Summary,
)
from fedcore.audit.text_scores import non_members, token_result
from fedcore.data.sources import Pixels
from fedcore.rng import rng, seed_of
from fedcore.task import Task

PICTURED = 4  # clients of a cell whose images are shown
SHOWN = 8  # images of a client that are shown
CANDIDATES = 1000  # of a membership test that no client has, at most


@dataclass
class Findings:
    """What the attacks found in one cell, without a look at the truth."""

    labels: list[Tensor | None]  # by client
    unlabelled: dict[int, str]  # clients whose labels were not recovered: why
    tokens: dict[int, Tokens] = field(default_factory=dict)  # of next tokens, by client
    is_text: bool = False  # the task is of next tokens
    images: dict[str, list[Reconstruction]] = field(default_factory=dict)  # by attack
    failed: dict[str, str] = field(default_factory=dict)  # attacks: why
    seconds: dict[str, float] = field(default_factory=dict)  # by attack


class Originals(NamedTuple):
    """One client's images, as they are to be compared."""

    truth: Truth
    pixels: Pixels

    @property
    def images(self) -> Tensor:
        """[N, C, H, W] in [0, 1]."""
        return self.pixels.of(self.truth.x.float()).clamp(0, 1)


class Scoring:
    """Compares the findings in one cell with its clients' data."""

    def __init__(
        self, plan: Plan, task: Task, subjects: Sequence[Subject], findings: Findings
    ) -> None:
        self.plan, self.pixels = plan, task.pixels
        self.subjects, self.findings = subjects, findings
        self.public_x, self.public_y = trees.to(tuple(task.data.test), CPU)

    def clients(self) -> tuple[list[ClientResult], list[Pictures]]:
        """Every client's part of audit.json, and the pictures of the first of them."""
        results: list[ClientResult] = []
        pictures: list[Pictures] = []
        for i in range(len(self.subjects)):
            result = self._untold(i)
            best = self._score_images(i, result)
            original = self._originals(i)
            if best is not None and original is not None and len(pictures) < PICTURED:
                pictures.append(_pictures(result, best, original))
            results.append(result)
        return results, pictures

    def _untold(self, i: int) -> ClientResult:
        """The client's part without a score of its images."""
        seen = self.subjects[i].seen
        squares = [float(x.double().square().sum()) for x in seen.delta.values()]
        attacks: dict[str, AttackResult] = {}
        for name, why in self.findings.failed.items():
            attacks[name] = {"ok": False, "error": why}
        for name, reconstructions in self.findings.images.items():
            attacks[name] = self._told(reconstructions[i])
        result: ClientResult = {
            "client": seen.client,
            "round": seen.round,
            "function": seen.function,
            "num_examples": seen.total_examples,
            "clients_aggregated": seen.clients,
            "local_steps": seen.public.local_steps(seen.num_examples),
            "delta_norm": math.sqrt(sum(squares)),
            "entries_seen": sum(x.numel() for x in seen.delta.values()),
            "entries_of_model": sum(x.numel() for x in seen.public.model.parameters()),
            "attacks": attacks,
            "labels": self._labels(i),
            "membership": self._membership(i),
            "references": {},
            "best": None,
            "input_leakage": None,
            "worst_image": None,
            "grade": None,
        }
        if seen.public.length is not None:
            result["unit"] = "token"
        return result

    def _told(self, found: Reconstruction) -> AttackResult:
        """Everything that the attack itself tells, without the truth."""
        result: AttackResult = {
            "ok": True,
            "iterations": found.iterations,
            "objective": _finite(found.objective),
        }
        result |= cast(AttackResult, found.facts)
        result["curve"] = [_finite(value) for value in found.curve]
        if found.others and self.pixels is not None:
            unlabelled = Truth(found.x, found.x[:, 0, 0, 0])
            again = metrics.score(found.others[0], unlabelled, self.pixels)
            result["agreement_of_restarts"] = _mean(again.psnr)
        return result

    def _originals(self, i: int) -> Originals | None:
        truth = self.subjects[i].truth
        if truth is None or self.pixels is None:
            return None
        return Originals(truth, self.pixels)

    def _score_images(self, i: int, result: ClientResult) -> metrics.Score | None:
        """Put the scores of the client's images into its part; the best attack's."""
        original = self._originals(i)
        if original is None:
            return None
        levels = self._levels(i, original)
        for name, level in levels.items():
            psnr, ssim = _mean(level.psnr), _mean(level.ssim)
            result["references"][name] = {"psnr": psnr, "ssim": ssim}
        scores = {}
        for name, reconstructions in self.findings.images.items():
            score = metrics.score(reconstructions[i].x, *original)
            base = levels["class means"]
            scored = self._scored(score, base, original, result["client"])
            result["attacks"][name] |= scored
            scores[name] = score
        if not scores:
            return None
        attacks = [result["attacks"][name] for name in scores]
        best = max(scores, key=lambda name: float(scores[name].psnr.mean()))
        closest = result["attacks"][best]
        result["best"] = {
            "attack": best,
            "psnr": closest["psnr"],
            "ssim": closest["ssim"],
            "identification": closest["identification"],
        }
        leakage = 100 * max(max(attack["R"], attack["I"]) for attack in attacks)
        worst = 100 * max(attack["R_max"] for attack in attacks)
        result["input_leakage"], result["worst_image"] = leakage, worst
        result["grade"] = metrics.grade(leakage, worst)
        return scores[best]

    def _levels(self, i: int, original: Originals) -> dict[str, metrics.Score]:
        """The reference levels of the client."""
        seen = self.subjects[i].seen
        others = self.subjects[i + 1 :] or self.subjects[:1]
        other = others[0].truth if len(self.subjects) > 1 else None
        seed = seed_of(self.plan.seed, "audit reference", seen.round, seen.client)
        return metrics.references(
            original.truth, self.public_x, self.public_y, other, original.pixels, seed
        )

    def _scored(
        self,
        score: metrics.Score,
        base: metrics.Score,
        original: Originals,
        client: int,
    ) -> AttackResult:
        """The scores of one attack on one client; `base` is that of class means."""
        pool_seed = seed_of(self.plan.seed, "audit pool", client)
        found = metrics.identification(score, self.public_x, original.pixels, pool_seed)
        lpips = metrics.lpips(score.images, original.images)
        above = {}
        for level in metrics.LEVELS:
            above[str(level)] = _mean(score.psnr > level)
        leakage = metrics.leakage(score, base, found["top1"], found["chance"])
        return {
            "ok": True,
            "psnr": _distribution(score.psnr),
            "ssim": _distribution(score.ssim),
            "mse": _mean(score.mse),
            "lpips": lpips if isinstance(lpips, str) else sum(lpips) / len(lpips),
            "above": above,
            "identification": found,
            "per_image_psnr": [round(value, 3) for value in score.psnr.tolist()],
            "R": leakage.mean,
            "R_max": leakage.highest,
            "I": leakage.identified,
        }

    def _labels(self, i: int) -> LabelResult | None:
        seen, truth = self.subjects[i].seen, self.subjects[i].truth
        found = self.findings.labels[i]
        if i in self.findings.unlabelled:
            failed: LabelResult = {"ok": False, "error": self.findings.unlabelled[i]}
            if self.findings.is_text:
                failed["kind"] = "tokens"
            return failed
        if i in self.findings.tokens:
            return token_result(self.findings.tokens[i], truth, self._public())
        if found is None:
            return None
        outputs = seen.public.outputs
        result: LabelResult = {
            "ok": True,
            "mode": "recovered" if seen.labels is None else "oracle",
            "counts": torch.bincount(found, minlength=outputs).tolist(),
        }
        if truth is not None:
            shares = metrics.label_accuracy(found, truth.y)
            chance = _chance(truth.y, outputs, self.public_y)
            accuracy = shares["accuracy"]
            above = max(0.0, (accuracy - chance) / max(1 - chance, 1e-9))
            result["accuracy"] = accuracy
            result["precision"] = shares["precision"]
            result["recall"] = shares["recall"]
            result["chance"] = chance
            result["grade"] = metrics.letter(above)
        return result

    def _membership(self, i: int) -> MembershipResult | None:
        seen, truth, before, own = self.subjects[i]
        if "membership" not in self.plan.attacks or truth is None:
            return None
        others = self._others(seen, truth, own)
        if isinstance(others, str):
            return {"ok": False, "error": others}
        x = trees.map(lambda a, b: torch.cat([a, b]), truth.x, others.x)
        y = torch.cat([truth.y, others.y])
        n = len(truth.y)
        exchanges, left_out = [*before, seen], {}
        scores = membership.scores(exchanges, x, y)
        wanted, seed = self.plan.references, self.plan.seed
        public = Rows(self.public_x, self.public_y)
        found = reference_scores(exchanges, x, y, public, wanted, seed)
        if isinstance(found, str):
            left_out["rmia"] = found
        else:
            scores["rmia"] = found
        strange = ~torch.stack(list(scores.values())).isfinite().all(0)
        if strange.any():
            why = (
                f"the loss of {int(strange.sum())} of {len(y)} candidates, or its "
                "gradient, is no finite number"
            )
            return {"ok": False, "error": why}
        by_score = {}
        for name, values in scores.items():
            by_score[name] = metrics.membership(values[:n], values[n:])
        best = max(by_score, key=lambda name: float(by_score[name]["auc"]))
        auc = by_score[best]["auc"]
        result = {"ok": True, "best": best, "auc": auc, "exchanges": len(before) + 1}
        result["grade"] = metrics.letter(max(0.0, 2 * auc - 1))
        if left_out:
            result["left_out"] = left_out
        return cast(MembershipResult, result | by_score)

    def _public(self) -> Truth:
        return Truth(self.public_x, self.public_y)

    def _others(
        self, seen: Observation, truth: Truth, own: Truth | None
    ) -> Truth | str:
        """Examples that the client did not train on, or why there are none."""
        draw = rng(self.plan.seed, "audit candidates", seen.round, seen.client)
        if seen.public.vocabulary is not None:
            return non_members(truth, own or self._public(), CANDIDATES, draw)
        classes = seen.public.classes
        if classes is None:
            return "the targets are no classes, by which non-members could be matched"
        rows = self._of_their_classes(draw, truth.y, classes)
        if not rows:
            return "the test set has no example of the client's classes"
        chosen = torch.tensor(rows)
        return Truth(*trees.at((self.public_x, self.public_y), chosen))

    def _of_their_classes(
        self, draw: np.random.Generator, y: Tensor, classes: int
    ) -> list[int]:
        """Rows of public examples, of each class as many times its members.

        So that the classes alone give nothing away.
        """
        counts = torch.bincount(y, minlength=classes)
        times = max(1, min(CANDIDATES, len(self.public_y)) // len(y))
        rows: list[int] = []
        for label in counts.nonzero().flatten().tolist():
            of_class = (self.public_y == label).nonzero().flatten().numpy()
            if len(of_class):
                many = min(times * int(counts[label]), len(of_class))
                rows += draw.choice(of_class, many, replace=False).tolist()
        return rows


def _chance(y: Tensor, outputs: int, public_y: Tensor) -> float:
    """The label accuracy of a guess by the classes of public data."""
    guess = torch.bincount(public_y, minlength=outputs).double()
    if len(public_y) == 0:
        guess = torch.ones(outputs, dtype=torch.float64)  # nothing is known
    even = (guess / guess.sum() * len(y)).round()
    counts = torch.bincount(y, minlength=len(guess))
    return float(1 - 0.5 * (even - counts).abs().sum().item() / len(y))


def summarise(clients: Sequence[ClientResult]) -> Summary:
    """Means over the cell's clients, with 95 % intervals."""
    attacks: dict[str, AttackSummary] = {}
    for name in _names(clients, "attacks"):
        results = [client["attacks"][name] for client in clients]
        scored = [result for result in results if "psnr" in result]
        if scored:
            attacks[name] = _attack_summary(scored)
    references = {}
    for name in _names(clients, "references"):
        levels = [client["references"].get(name) for client in clients]
        references[name] = _mean_level([level for level in levels if level])
    labels = [client["labels"] for client in clients]
    tests = [client["membership"] for client in clients]
    return {
        "attacks": attacks,
        "references": references,
        "best": max(attacks, key=lambda name: attacks[name]["psnr"]["mean"])
        if attacks
        else None,
        "labels": _interval([found and found.get("accuracy") for found in labels]),
        "membership": _interval([test and test.get("auc") for test in tests]),
        "input_leakage": _interval([client["input_leakage"] for client in clients]),
        "worst_image": _interval([client["worst_image"] for client in clients]),
    }


def _names(
    clients: Sequence[ClientResult], part: Literal["attacks", "references"]
) -> list[str]:
    """Names of the attacks or of the levels of all clients, each once."""
    names: dict[str, None] = {}
    for client in clients:
        names |= dict.fromkeys(client[part])
    return list(names)


def _attack_summary(results: Sequence[AttackResult]) -> AttackSummary:
    interval = metrics.interval
    objectives = [result["objective"] for result in results]
    finite = [value for value in objectives if value is not None]
    summary: AttackSummary = {
        "psnr": interval([result["psnr"]["mean"] for result in results]),
        "ssim": interval([result["ssim"]["mean"] for result in results]),
        "top1": interval([result["identification"]["top1"] for result in results]),
        "objective": interval(finite or [0.0]),
    }
    if all("alpha" in result for result in results):
        summary["alpha"] = interval([result["alpha"] for result in results])
    return summary


def _mean_level(levels: Sequence[dict[str, float]]) -> dict[str, float]:
    n = len(levels)
    psnr = sum(level["psnr"] for level in levels) / n
    ssim = sum(level["ssim"] for level in levels) / n
    return {"psnr": psnr, "ssim": ssim}


def _interval(values: Sequence[float | None]) -> Interval | None:
    """Of the values that are there; None where there is none."""
    there = [value for value in values if value is not None]
    return metrics.interval(there) if there else None


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _distribution(values: Tensor) -> Distribution:
    x = values.double()
    return {
        "mean": x.mean().item(),
        "median": x.median().item(),
        "min": x.min().item(),
        "max": x.max().item(),
    }


def _finite(value: float) -> float | None:
    """The value, or None, for JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _pictures(
    result: ClientResult, score: metrics.Score, original: Originals
) -> Pictures:
    """Originals and reconstructions of the best attack, the closest first."""
    assert result["best"] is not None
    true = original.images
    order = score.psnr.argsort(descending=True)[:SHOWN].tolist()
    pairs = []
    for j in order:
        psnr = round(float(score.psnr[j]), 1)
        pairs.append([_png(true[j]), _png(score.images[j]), psnr])
    attack = result["best"]["attack"]
    return {"client": result["client"], "attack": attack, "pairs": pairs}


def _png(x: Tensor) -> str:
    """An image [C, H, W] in [0, 1] as PNG in base64."""
    from PIL import Image

    array = (x * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
