"""Where reconstructions meet the truth: numbers against their definitions, in NumPy."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from fedcore.audit import metrics
from fedcore.audit.metrics import Score
from fedcore.audit.observe import Truth
from fedcore.data.sources import Pixels

PLAIN = Pixels()
SCALED = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def images(n: int, seed: int, channels: int = 1, side: int = 12) -> Tensor:
    """Uniform noise in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, side, side, generator=draw)


def noise(like: Tensor, seed: int) -> Tensor:
    """N(0, 1) in the shape of some images."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def scored(rebuilt: Tensor, true: Tensor) -> Score:
    return metrics.score(rebuilt, truth(true), PLAIN)


def truth(x: Tensor, pixels: Pixels = PLAIN) -> Truth:
    return Truth(pixels.inputs(x), torch.arange(len(x)))


def test_the_same_image_has_the_greatest_psnr_and_an_ssim_of_one() -> None:
    x = images(3, 0)
    score = scored(x, x)
    assert score.psnr.tolist() == [metrics.CAP] * 3
    assert score.ssim.tolist() == pytest.approx([1.0] * 3, abs=1e-9)


@pytest.mark.parametrize(("offset", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_a_constant_offset_has_the_psnr_of_its_square(
    offset: float, decibel: float
) -> None:
    true = torch.zeros(2, 1, 12, 12)
    score = scored(true + offset, true)
    assert score.psnr.tolist() == pytest.approx([decibel] * 2, abs=1e-5)
    assert score.mse.tolist() == pytest.approx([offset**2] * 2)


def test_psnr_is_averaged_over_images_and_not_taken_of_a_mean_error() -> None:
    true = torch.zeros(2, 1, 12, 12)
    rebuilt = true + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    # That of the mean error would be 22.97.
    assert scored(rebuilt, true).psnr.mean().item() == pytest.approx(30.0, abs=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (3, 6), (6, 3)])
def test_no_other_assignment_is_cheaper(size: tuple[int, int]) -> None:
    n, m = size
    a, b = images(n, 1, side=3), images(m, 2, side=3)
    cost = ((a[:, None] - b[None]).double().numpy() ** 2).mean((2, 3, 4))
    rows, columns = metrics.assign(a, b)
    short, few, many = (cost, n, m) if n <= m else (cost.T, m, n)
    orders = itertools.permutations(range(many), few)
    best = min(short[np.arange(few), list(order)].sum() for order in orders)
    assert len(rows) == few
    assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-12)


def test_the_order_of_reconstructions_changes_nothing() -> None:
    true = images(6, 3)
    rebuilt = (true + 0.2 * noise(true, 4)).roll(2, 0)
    one = scored(rebuilt, true)
    other = scored(rebuilt[torch.tensor([5, 2, 0, 1, 4, 3])], true)
    for name in ("psnr", "ssim", "mse", "images"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    public = images(40, 5)
    first, second = (
        metrics.identification(score, public, PLAIN, 0) for score in (one, other)
    )
    assert first == second


def test_labels_do_not_matter_to_the_assignment() -> None:
    x = images(4, 6)
    labelled = Truth(x, torch.tensor([7, 7, 1, 0]))
    score = metrics.score(x.flip(0), labelled, PLAIN)
    assert score.order == [3, 2, 1, 0]
    assert score.psnr.tolist() == [metrics.CAP] * 4


def test_images_are_compared_as_pixels_and_not_as_inputs() -> None:
    true = images(3, 7, channels=3)
    rebuilt = true + 0.1 * noise(true, 8)
    plain = scored(rebuilt, true)
    scaled = metrics.score(SCALED.inputs(rebuilt), truth(true, SCALED), SCALED)
    assert torch.allclose(plain.psnr, scaled.psnr, atol=1e-4)
    mse = ((rebuilt.clamp(0, 1) - true).double().numpy() ** 2).mean((1, 2, 3))
    assert plain.psnr.numpy() == pytest.approx(-10 * np.log10(mse), abs=1e-4)


def test_pixels_outside_the_range_count_as_black_or_white() -> None:
    true = torch.ones(1, 1, 12, 12)
    assert scored(true * 1000, true).psnr.item() == metrics.CAP


def test_an_attack_that_ran_away_is_scored_as_grey() -> None:
    true = images(2, 22)
    rebuilt = torch.stack([true[0], torch.full_like(true[1], torch.nan)])
    score = scored(rebuilt, true)
    assert score.order == [0, 1]
    assert score.psnr[0].item() == metrics.CAP
    grey = (true[1] - 0.5).square().mean().item()
    assert score.mse[1].item() == pytest.approx(grey)


def test_an_image_that_nothing_was_reconstructed_of_is_compared_with_grey() -> None:
    true = torch.stack([torch.zeros(1, 12, 12), torch.ones(1, 12, 12)])
    score = scored(torch.ones(1, 1, 12, 12), true)
    assert score.order == [-1, 0]
    assert score.psnr.tolist() == pytest.approx([10 * math.log10(4), metrics.CAP])


def test_one_client_is_scored_by_its_best_matches_among_all_dummies() -> None:
    true, others = images(2, 9), images(5, 10)
    dummies = torch.cat([others[:3], true, others[3:]])
    assert scored(dummies, true).order == [3, 4]


def ssim_by_its_definition(
    a: np.ndarray, b: np.ndarray, size: int, sigma: float
) -> float:
    """Wang et al. 2004, equation 13, of one channel.

    Around every pixel of an image that is mirrored at its edges.
    """
    at = np.arange(size) - size // 2
    line = np.exp(-(at**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        values: np.ndarray = ndimage.correlate(x, window, mode="mirror")
        return values

    mu, nu = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu * mu, mean(b * b) - nu * nu
    covariance = mean(a * b) - mu * nu
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mu * nu + c1) * (2 * covariance + c2)
    below = (mu**2 + nu**2 + c1) * (var_a + var_b + c2)
    return float((above / below).mean())


@pytest.mark.parametrize(
    ("side", "size", "sigma"), [(28, 11, 1.5), (8, 7, 6 / 7), (9, 9, 8 / 7)]
)
def test_ssim_is_that_of_wang_with_a_window_that_fits(
    side: int, size: int, sigma: float
) -> None:
    a, b = images(3, 11, channels=3, side=side), images(3, 12, channels=3, side=side)
    a = 0.5 * a + 0.5 * b
    expected = []
    for one, other in zip(a.double().numpy(), b.double().numpy(), strict=True):
        channels = zip(one, other, strict=True)
        values = [ssim_by_its_definition(x, y, size, sigma) for x, y in channels]
        expected.append(np.mean(values))
    assert metrics.ssim(a, b).numpy() == pytest.approx(expected, abs=1e-6)


def test_exact_copies_are_all_identified() -> None:
    x = images(5, 13)
    found = metrics.identification(scored(x, x), images(2000, 14), PLAIN, 0)
    assert (found["top1"], found["mrr"]) == (1.0, 1.0)
    assert (found["pool"], found["chance"]) == (metrics.POOL, 1 / metrics.POOL)


def test_noise_is_identified_as_often_as_chance_has_it() -> None:
    pool, trials = 10, 400
    hits = 0.0
    for trial in range(trials):
        x, other = images(1, 2 * trial, side=4), images(1, 2 * trial + 1, side=4)
        public = images(pool - 1, 10**6 + trial, side=4)
        found = metrics.identification(scored(other, x), public, PLAIN, 0)
        hits += found["top1"]
    low, high = stats.binom.interval(0.999, trials, 1 / pool)
    assert low <= hits <= high, f"{hits} of {trials} at a chance of 1 in {pool}"


def test_the_rank_of_the_original_gives_the_reciprocal_rank() -> None:
    x = torch.zeros(1, 1, 12, 12)
    public = torch.tensor([0.3, 0.4, 0.9]).view(3, 1, 1, 1).expand(3, 1, 12, 12)
    # 0.3 and 0.4 are nearer to 0.33 than the original, 0.
    found = metrics.identification(scored(x + 0.33, x), public, PLAIN, 0)
    assert (found["top1"], found["pool"]) == (0.0, 4)
    assert found["mrr"] == pytest.approx(1 / 3)


def test_reference_levels_are_what_anybody_could_say_without_the_update() -> None:
    x, y = images(6, 15, side=8), torch.tensor([0, 0, 1, 1, 2, 2])
    public_x, public_y = images(60, 16, side=8), torch.arange(60) % 3
    client, other = Truth(x, y), Truth(images(4, 17, side=8), y[:4])
    levels = metrics.references(client, public_x, public_y, other, PLAIN, 0)
    without_update = {"blank", "mean image", "class means", "start noise"}
    assert set(levels) == without_update | {"another client"}

    def psnr(of: Tensor | float) -> Any:
        mse = ((x - of).numpy() ** 2).mean((1, 2, 3))
        return pytest.approx(-10 * np.log10(mse), abs=1e-4)

    assert levels["blank"].psnr.numpy() == psnr(0.5)
    assert levels["mean image"].psnr.numpy() == psnr(public_x.mean(0))
    means = torch.stack([public_x[public_y == label].mean(0) for label in y.tolist()])
    expected = metrics.score(means, client, PLAIN).psnr
    assert torch.equal(levels["class means"].psnr, expected)
    alone = metrics.references(client, public_x, public_y, None, PLAIN, 0)
    assert set(alone) == without_update


def test_a_class_without_public_images_is_compared_with_the_mean_of_all() -> None:
    x, public_x = images(2, 23, side=8), images(20, 24, side=8)
    client = Truth(x, torch.tensor([0, 3]))
    levels = metrics.references(
        client, public_x, torch.arange(20) % 3, None, PLAIN, seed=0
    )
    by_class, by_mean = levels["class means"].psnr, levels["mean image"].psnr
    assert by_class[0] != by_mean[0]
    assert by_class[1] == by_mean[1]


def test_class_means_are_worth_nothing() -> None:
    x, y = images(6, 18, side=8), torch.tensor([0, 0, 1, 1, 2, 2])
    public_x, public_y = images(60, 19, side=8), torch.arange(60) % 3
    levels = metrics.references(Truth(x, y), public_x, public_y, None, PLAIN, 0)
    base = levels["class means"]
    assert metrics.leakage(base, base, 0.1, 0.1) == (0.0, 0.0, 0.0)


def test_leakage_is_the_way_from_the_class_mean_to_30_decibel() -> None:
    def of(*psnr: float) -> Score:
        x = torch.tensor(psnr, dtype=torch.float64)
        return Score(x, x, x, [], x)

    leak = metrics.leakage(of(20, 10, 40), of(10, 15, 20), top1=0.5, chance=0.01)
    assert leak.mean == pytest.approx((0.5 + 0 + 1) / 3)
    assert leak.highest == 1.0
    assert leak.identified == pytest.approx((0.5 - 0.01) / 0.99)
    assert metrics.leakage(of(20), of(10), top1=0.0, chance=0.01).identified == 0.0


@pytest.mark.parametrize(
    ("leak", "worst", "grade"),
    [
        (4.9, 19.9, "A"),
        (5, 0, "B"),
        (0, 20, "B"),
        (14.9, 39.9, "B"),
        (15, 0, "C"),
        (0, 40, "C"),
        (39.9, 100, "C"),
        (40, 0, "D"),
    ],
)
def test_grades_change_where_the_specification_says(
    leak: float, worst: float, grade: str
) -> None:
    assert metrics.grade(leak, worst) == grade


@pytest.mark.parametrize(
    ("value", "letter"), [(0.049, "A"), (0.05, "B"), (0.2, "C"), (0.5, "D"), (1.0, "D")]
)
def test_labels_and_membership_have_grades_of_their_own(
    value: float, letter: str
) -> None:
    assert metrics.letter(value) == letter


def test_label_accuracy_counts_what_two_multisets_share() -> None:
    recovered, true = torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1, 1, 2])
    # Counts 2 1 0 0 0 1 against 1 2 1: differences 1 1 1 1, half of them over 4.
    shares = {"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3}
    assert metrics.label_accuracy(recovered, true) == shares
    turned = metrics.label_accuracy(torch.tensor([3, 1]), torch.tensor([1, 3]))
    assert turned["accuracy"] == 1.0


def test_auc_counts_pairs_and_ties_half() -> None:
    members, others = torch.tensor([3.0, 2.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 4.0])
    above, equal = members[:, None] > others, members[:, None] == others
    expected = (above + 0.5 * equal).mean().item()
    assert metrics.membership(members, others)["auc"] == pytest.approx(expected)


def test_equal_scores_tell_nothing_of_membership() -> None:
    x = torch.linspace(0, 1, 200)
    found = metrics.membership(x, x)
    assert found["auc"] == pytest.approx(0.5)
    assert found["tpr_at_1_percent_fpr"]["value"] <= 0.01
    assert metrics.membership(torch.zeros(5), torch.zeros(50))["auc"] == 0.5


def test_more_false_positives_bring_no_fewer_true_ones() -> None:
    draw = torch.Generator().manual_seed(20)
    members = torch.randn(100, generator=draw) + 1
    others = torch.randn(1000, generator=draw)
    false = (others[None] > others[:, None]).double().mean(1)  # by threshold
    true = (members[None] > others[:, None]).double().mean(1)
    values = []
    for rate in (0.001, 0.01, 0.1, 0.5):
        values.append(metrics.true_positives(members, others, rate)["value"])
        # Of the thresholds that let through at most this share of the others, none
        # lets through more of the members.
        assert values[-1] == pytest.approx(true[false <= rate].max().item())
    values.append(metrics.true_positives(members, others, 1.0)["value"])
    assert values == sorted(values)


def test_a_true_positive_rate_has_its_clopper_pearson_interval() -> None:
    members, others = torch.tensor([0.0] * 7 + [9.0] * 3), torch.linspace(0, 1, 1000)
    found = metrics.membership(members, others)["tpr_at_1_percent_fpr"]
    assert found["value"] == 0.3
    assert found["low"] == pytest.approx(stats.beta.ppf(0.025, 3, 8))
    assert found["high"] == pytest.approx(stats.beta.ppf(0.975, 4, 7))


def test_a_mean_over_clients_has_an_interval_and_one_client_has_none() -> None:
    x = np.array([1.0, 2.0, 4.0])
    t = 4.302652729911275  # of 2 degrees of freedom at 0.975
    half = t * x.std(ddof=1) / math.sqrt(3)
    found = metrics.interval(x.tolist())
    assert found["mean"] == pytest.approx(x.mean())
    assert found["low"] == pytest.approx(x.mean() - half)
    assert found["high"] == pytest.approx(x.mean() + half)
    assert metrics.interval([3.0]) == {"mean": 3.0, "low": None, "high": None}
    assert metrics.interval([3.0, 3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_lpips_says_why_there_is_none_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    x = images(1, 21)
    why = metrics.lpips(x, x)
    assert isinstance(why, str)
    assert "not installed" in why or "never downloaded" in why
