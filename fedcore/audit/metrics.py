"""Where reconstructions meet the truth: image distances, identification, membership.

Images are compared as pixels in [0, 1]. Reconstructions come in no order: they are
assigned to the true images by least total MSE (Hungarian), whatever their labels, and
every metric uses that assignment. PSNR is 10 log10(1 / MSE) of each image, at most
100 dB, and only then averaged.
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
from fedcore.audit.results import Interval
from fedcore.data.sources import Pixels

CAP = 100.0  # dB
# The share of images above each is reported, in dB. DLFA counts an image as recovered
# from 20 (FEMNIST) or 19 (CIFAR-100).
LEVELS = (18, 20, 25)
POOL = 1000  # candidates among which a reconstruction has to find its original
PERFECT = 30.0  # dB from which an image counts as leaked completely


class Score(NamedTuple):
    """One client's reconstruction against its images, in the order of the truth."""

    psnr: Tensor  # [N] dB
    ssim: Tensor  # [N]
    mse: Tensor  # [N]
    order: list[int]  # of the reconstructions, by true image; -1 = none was left for it
    images: Tensor  # [N, C, H, W] the reconstructions in [0, 1]


class Leakage(NamedTuple):
    """How much of a client's inputs came back, in [0, 1]."""

    mean: float  # R, over images: the way from the class mean to PERFECT
    highest: float  # R_max, of one image
    identified: float  # I, how often an image finds its original, above chance


def assign(found: Tensor, true: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(rows of found, rows of true) with the least total MSE, from [m, ...], [n, ...].

    Both have min(m, n) entries.
    """
    rows, columns = linear_sum_assignment(distances(found, true).numpy())
    return rows, columns


def distances(a: Tensor, b: Tensor) -> Tensor:
    """MSE of every pair, float64 [len(a), len(b)]."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, y, compute_mode=exact).square() / x.shape[1]


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most CAP."""
    return (-10 * torch.log10(mse.clamp(min=10 ** (-CAP / 10)))).clamp(max=CAP)


def ssim(found: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of each pair of images in [0, 1], [N].

    Wang et al. 2004, with the Gaussian window of 11, or the largest odd one that fits.
    """
    side = min(true.shape[-2:])
    size = min(11, side if side % 2 else side - 1)
    # torchmetrics makes the window 2 int(3.5 sigma + 0.5) + 1 wide.
    sigma = 1.5 if size == 11 else (size - 1) / 7
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
    """Score images [m, C, H, W] as the model takes them.

    True images for which none was rebuilt, or no finite one, are compared with grey.
    """
    rebuilt = pixels.of(found.detach().float()).nan_to_num(0.5).clamp(0, 1)
    true = pixels.of(truth.x.float()).clamp(0, 1)
    rows, columns = assign(rebuilt, true)
    order = [-1] * len(true)
    images = torch.full_like(true, 0.5)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        order[column], images[column] = row, rebuilt[row]
    mse = (images.double() - true.double()).square().flatten(1).mean(1)
    return Score(psnr(mse), ssim(images, true), mse, order, images)


def identification(
    score: Score, others: Tensor, pixels: Pixels, seed: int
) -> dict[str, float]:
    """How often a reconstruction finds its original among POOL candidates, by MSE.

    The rest of the candidates are drawn from `others` [n, C, H, W], of no client.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(others), generator=draw)[: POOL - 1]
    candidates = pixels.of(others[rows].float()).clamp(0, 1)
    away = distances(score.images, candidates)  # [N, candidates]
    own = score.mse[:, None]
    nearer = (away < own).sum(1) + 0.5 * (away == own).sum(1)  # ties count half
    rank = 1 + nearer.double()
    pool = len(rows) + 1
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
    """Scores of images for which the update is not needed.

    A blank one, the mean image, the mean of each class with the true labels, the
    attack's own start, and another client's images. `public_x` and `public_y` are data
    of the same kind that no client has.
    """
    n, shape = len(truth.x), truth.x.shape[1:]
    grey = pixels.inputs(torch.full((1, *shape), 0.5))
    draw = torch.Generator().manual_seed(seed)
    images = {
        "blank": grey.expand(n, *shape),
        "mean image": public_x.mean(0).expand(n, *shape),
        "class means": _class_means(truth.y, public_x, public_y),
        "start noise": torch.randn((n, *shape), generator=draw),
    }
    if other is not None and len(other.x):
        images["another client"] = other.x
    return {name: score(x, truth, pixels) for name, x in images.items()}


def _class_means(y: Tensor, public_x: Tensor, public_y: Tensor) -> Tensor:
    """The mean public image of the class of each y, [len(y), ...].

    The mean of all of them where targets are no classes, or the class has none.
    """
    mean = public_x.mean(0)
    if y.is_floating_point():
        return mean.expand(len(y), *mean.shape)
    means = {}
    for label in torch.unique(y).tolist():
        of_class = public_x[public_y == label]
        means[label] = of_class.mean(0) if len(of_class) else mean
    return torch.stack([means[label] for label in y.tolist()])


def label_accuracy(found: Tensor, true: Tensor) -> dict[str, float]:
    """1 - |k' - k|_1 / (2 N) of two multisets of labels with counts k' and k.

    Also precision and recall of which classes are there at all.
    """
    classes = int(max(found.max(), true.max())) + 1
    a, b = (torch.bincount(labels, minlength=classes) for labels in (found, true))
    both = ((a > 0) & (b > 0)).sum().item()
    return {
        "accuracy": 1 - 0.5 * (a - b).abs().sum().item() / len(true),
        "precision": both / max(int((a > 0).sum()), 1),
        "recall": both / max(int((b > 0).sum()), 1),
    }


def membership(members: Tensor, others: Tensor) -> dict[str, Any]:
    """AUC of scores [n], [m], and true positives at 1 and 0.1 % false positives."""
    combined = torch.cat([members, others]).double().numpy()
    ranks = stats.rankdata(combined)[: len(members)]
    n, m = len(members), len(others)
    auc = (ranks.sum() - n * (n + 1) / 2) / (n * m)
    return {
        "auc": float(auc),
        "members": n,
        "others": m,
        "tpr_at_1_percent_fpr": true_positives(members, others, 0.01),
        "tpr_at_0.1_percent_fpr": true_positives(members, others, 0.001),
    }


def true_positives(members: Tensor, others: Tensor, rate: float) -> dict[str, float]:
    """Share of members above the threshold that at most `rate` of the others exceed.

    With a 95 % Clopper-Pearson interval, and `fpr_high`: up to where the true rate of
    false positives may lie, at 95 % too. Few others say little of a low rate.
    """
    allowed = int(rate * len(others) + 1e-9)
    highest = others.double().sort(descending=True).values
    hits = len(members)
    if allowed < len(others):
        hits = int((members.double() > highest[allowed]).sum())
    interval = stats.binomtest(hits, len(members)).proportion_ci(0.95, "exact")
    wrong = 0
    if allowed < len(others):
        wrong = int((others.double() > highest[allowed]).sum())
    false = stats.binomtest(wrong, len(others), alternative="less")
    return {
        "value": hits / len(members),
        "low": float(interval.low),
        "high": float(interval.high),
        "fpr_high": float(false.proportion_ci(0.95, "exact").high),
    }


def interval(values: Sequence[float]) -> Interval:
    """Mean over clients, with a 95 % interval by Student's t; none for one client."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {"mean": mean, "low": None, "high": None}
    if np.ptp(x) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))
    return {"mean": mean, "low": float(low), "high": float(high)}


def lpips(found: Tensor, true: Tensor) -> list[float] | str:
    """LPIPS of each pair of images in [0, 1], lower = closer; or why there is none.

    With AlexNet (Zhang et al., CVPR 2018). Its weights are never downloaded: they
    count where PyTorch's hub keeps them.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    if not weights.is_file():
        return (
            f"AlexNet's weights are not at {weights.name} in PyTorch's hub folder, "
            "and are never downloaded"
        )
    from torchmetrics.functional.image import lpips as module

    distance = module.learned_perceptual_image_patch_similarity
    values = []
    for a, b in zip(_for_alexnet(found), _for_alexnet(true), strict=True):
        values.append(float(distance(a[None], b[None], normalize=True)))
    return values


def _for_alexnet(images: Tensor) -> Tensor:
    """[N, 3, 64, 64]: AlexNet cannot take 28 x 28."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")


# Scores of a client, as the specification defines them; grades are a convention of
# this project.


def grade(input_leakage: float, worst_image: float) -> str:
    """A to D by what came back of the inputs, both in percent."""
    for letter, most, most_of_worst in (("A", 5, 20), ("B", 15, 40)):
        if input_leakage < most and worst_image < most_of_worst:
            return letter
    return "C" if input_leakage < 40 else "D"


def letter(value: float) -> str:
    """A to D of a share in [0, 1]: labels, membership."""
    for name, most in (("A", 0.05), ("B", 0.2), ("C", 0.5)):
        if value < most:
            return name
    return "D"


def leakage(score: Score, base: Score, top1: float, chance: float) -> Leakage:
    """R, R_max and I of one attack; `base` is the score of class means (b_i).

    r_i = (PSNR_i - b_i) / (30 - b_i),   I = (top1 - chance) / (1 - chance)
    """
    way = (PERFECT - base.psnr).clamp(min=1e-9)
    r = ((score.psnr - base.psnr) / way).clamp(0, 1)
    identified = max(0.0, (top1 - chance) / (1 - chance)) if chance < 1 else 0.0
    return Leakage(r.mean().item(), r.max().item(), identified)
