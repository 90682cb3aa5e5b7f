"""Where reconstructions meet the truth: matching, image distances, identification, membership, and reference levels beside them.

Images are compared as pixels in [0, 1]. Reconstructions come in no order: they are assigned to the true images by least total MSE
(Hungarian), whatever their labels, and every metric uses that assignment. PSNR is 10 log10(1 / MSE) of each image, at most 100 dB,
and only then averaged.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from fedcore.audit.observe import Truth
from fedcore.data.sources import Pixels

CAP = 100.0  # dB
LEVELS = (
    18,
    20,
    25,
)  # dB: the share of images above each is reported; DLFA counts from 20 (FEMNIST) and 19 (CIFAR-100)
POOL = 1000  # candidates among which a reconstruction has to find its original


class Score(NamedTuple):
    """One client's reconstruction against its images; per image in the order of the truth."""

    psnr: Tensor  # [N] dB
    ssim: Tensor  # [N]
    mse: Tensor  # [N]
    order: list[
        int
    ]  # of the reconstructions, for each true image; -1 = none was left for it
    images: Tensor  # [N, C, H, W] the reconstructions in the truth's order, in [0, 1]


def assign(found: Tensor, true: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(rows of found, rows of true) with the least total MSE; of both as many as the fewer. [m, ...], [n, ...]."""
    rows, columns = linear_sum_assignment(distances(found, true).numpy())
    return rows, columns


def distances(a: Tensor, b: Tensor) -> Tensor:
    """MSE of every pair, float64 [len(a), len(b)]."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    return (
        torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        / x.shape[1]
    )


def psnr(mse: Tensor) -> Tensor:
    """dB, at most CAP."""
    return (-10 * torch.log10(mse.clamp(min=10 ** (-CAP / 10)))).clamp(max=CAP)


def ssim(found: Tensor, true: Tensor) -> Tensor:
    """Of each pair of images in [0, 1] (Wang et al. 2004), [N]; the Gaussian window of 11, or the largest odd one that fits."""
    side = min(true.shape[-2:])
    size = min(11, side if side % 2 else side - 1)
    sigma = (
        1.5 if size == 11 else (size - 1) / 7
    )  # torchmetrics makes the window 2 int(3.5 sigma + 0.5) + 1 wide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = structural_similarity_index_measure(
            found.double(),
            true.double(),
            sigma=sigma,
            kernel_size=size,
            reduction="none",
            data_range=1.0,
        )
    assert isinstance(value, Tensor)
    return value.reshape(len(true))


def score(found: Tensor, truth: Truth, pixels: Pixels) -> Score:
    """Of images as the model takes them. True images for which none was reconstructed, or no finite one, are compared with grey."""
    a, b = (
        pixels.of(found.detach().float()).nan_to_num(0.5).clamp(0, 1),
        pixels.of(truth.x.float()).clamp(0, 1),
    )
    rows, columns = assign(a, b)
    order = [-1] * len(b)
    images = torch.full_like(b, 0.5)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        order[column], images[column] = row, a[row]
    mse = (images.double() - b.double()).square().flatten(1).mean(1)
    return Score(psnr(mse), ssim(images, b), mse, order, images)


def identification(
    s: Score, truth: Truth, others: Tensor, pixels: Pixels, seed: int
) -> dict[str, float]:
    """Does a reconstruction find its original among POOL candidates, the rest being `others` that no client had? By least MSE."""
    true = pixels.of(truth.x.float()).clamp(0, 1)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(others), generator=draw)[: POOL - 1]
    away = distances(
        s.images, pixels.of(others[rows].float()).clamp(0, 1)
    )  # [N, others]
    better = (away < s.mse[:, None]).sum(1) + 0.5 * (away == s.mse[:, None]).sum(
        1
    )  # ties count half
    rank = 1 + better.double()
    pool = len(rows) + 1
    assert len(true) == len(rank)
    return {
        "top1": (rank < 1.5).double().mean().item(),
        "mrr": (1 / rank).mean().item(),
        "pool": pool,
        "chance": 1 / pool,
    }


def references(
    truth: Truth,
    public_x: Tensor,
    public_y: Tensor,
    other: Truth | None,
    pixels: Pixels,
    seed: int,
) -> dict[str, Score]:
    """What nobody needs the update for: blank, the mean image, the mean of each class with the true labels, another client's
    images, and the attack's own start. `public_x`, `public_y` are data of the same kind that no client has."""
    n, shape = len(truth.x), truth.x.shape[1:]
    grey = pixels.inputs(torch.full((1, *shape), 0.5))
    classes = (
        {int(c): public_x[public_y == c].mean(0) for c in torch.unique(truth.y)}
        if not truth.y.is_floating_point()
        else {}
    )
    mean = public_x.mean(0)
    draw = torch.Generator().manual_seed(seed)
    made = {
        "blank": grey.expand(n, *shape),
        "mean image": mean.expand(n, *shape),
        "class means": torch.stack([classes.get(int(c), mean) for c in truth.y])
        if classes
        else mean.expand(n, *shape),
        "start noise": torch.randn((n, *shape), generator=draw),
    }
    if other is not None and len(other.x):
        made["another client"] = other.x
    return {name: score(x, truth, pixels) for name, x in made.items()}


def label_accuracy(found: Tensor, true: Tensor) -> dict[str, float]:
    """1 - |k' - k|_1 / (2 N) of two multisets of labels, and precision and recall of which classes are there at all."""
    classes = int(max(found.max(), true.max())) + 1
    a, b = (torch.bincount(labels, minlength=classes) for labels in (found, true))
    both = ((a > 0) & (b > 0)).sum().item()
    return {
        "accuracy": 1 - 0.5 * (a - b).abs().sum().item() / len(true),
        "precision": both / max(int((a > 0).sum()), 1),
        "recall": both / max(int((b > 0).sum()), 1),
    }


def membership(members: Tensor, others: Tensor) -> dict[str, Any]:
    """AUC, and the true positive rate at 1 % false positives, with a 95 % Clopper-Pearson interval; scores [n], [m]."""
    combined = torch.cat([members, others]).double().numpy()
    ranks = stats.rankdata(combined)[: len(members)]
    n, m = len(members), len(others)
    auc = (ranks.sum() - n * (n + 1) / 2) / (n * m)
    return {
        "auc": float(auc),
        "members": n,
        "others": m,
        "tpr_at_1_percent_fpr": true_positives(members, others, 0.01),
    }


def true_positives(members: Tensor, others: Tensor, rate: float) -> dict[str, float]:
    """Share of members above the threshold that at most `rate` of the others exceed, with a 95 % Clopper-Pearson interval."""
    allowed = int(rate * len(others) + 1e-9)
    highest = others.double().sort(descending=True).values
    hits = (
        int((members.double() > highest[allowed]).sum())
        if allowed < len(others)
        else len(members)
    )
    interval = stats.binomtest(hits, len(members)).proportion_ci(0.95, "exact")
    return {
        "value": hits / len(members),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over clients, with a 95 % interval by Student's t; none for one client."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        low = high = float(x.mean()) if len(x) > 1 else None
    else:
        low, high = map(
            float, stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
        )
    return {"mean": float(x.mean()), "low": low, "high": high}


def lpips(found: Tensor, true: Tensor) -> list[float] | str:
    """LPIPS with AlexNet (Zhang et al., CVPR 2018) of each pair of images in [0, 1], lower = closer; or why there is none.

    Weights are never downloaded: they count where PyTorch's hub keeps them.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    if not weights.is_file():
        return f"AlexNet's weights are not at {weights.name} in PyTorch's hub folder, and are never downloaded"
    from torchmetrics.functional.image.lpips import (
        learned_perceptual_image_patch_similarity as distance,
    )

    def prepared(x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return torch.nn.functional.interpolate(
            x, (64, 64), mode="bilinear"
        )  # AlexNet cannot take 28 x 28

    return [
        float(distance(prepared(a[None]), prepared(b[None]), normalize=True))
        for a, b in zip(found, true, strict=True)
    ]


# Scores of a client, as the specification defines them; grades are a convention of this project.


def grade(values: dict[str, float | None]) -> str:
    """A to D by what came back of the inputs: `input_leakage` and `worst_image`, in percent."""
    leak, worst = values["input_leakage"] or 0.0, values["worst_image"] or 0.0
    for letter, (most, worst_most) in {"A": (5, 20), "B": (15, 40)}.items():
        if leak < most and worst < worst_most:
            return letter
    return "C" if leak < 40 else "D"


def letter(value: float) -> str:
    """A to D of a share in [0, 1]: labels, membership."""
    return next(
        (name for name, most in (("A", 0.05), ("B", 0.2), ("C", 0.5)) if value < most),
        "D",
    )


def leakage(s: Score, base: Score, top1: float, chance: float) -> dict[str, float]:
    """R, R_max, I: how far images came from their class mean (b_i) to 30 dB, and how often they find their original; in [0, 1]."""
    r = ((s.psnr - base.psnr) / (30 - base.psnr).clamp(min=1e-9)).clamp(0, 1)
    found = max(0.0, (top1 - chance) / (1 - chance)) if chance < 1 else 0.0
    return {"R": r.mean().item(), "R_max": r.max().item(), "I": found}
