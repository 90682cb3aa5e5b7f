"""Where reconstructions meet the truth: numbers against their definitions, in NumPy."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

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
    return torch.rand(
        n, channels, side, side, generator=torch.Generator().manual_seed(seed)
    )


def truth(x: Tensor, pixels: Pixels = PLAIN) -> Truth:
    return Truth(pixels.inputs(x), torch.arange(len(x)))


def test_the_same_image_has_the_greatest_psnr_and_an_ssim_of_one() -> None:
    x = images(3, 0)
    s = metrics.score(x, truth(x), PLAIN)
    assert s.psnr.tolist() == [metrics.CAP] * 3
    assert torch.allclose(
        s.ssim.double(), torch.ones(3, dtype=torch.float64), atol=1e-9
    )


@pytest.mark.parametrize(("offset", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_a_constant_offset_has_the_psnr_of_its_square(
    offset: float, decibel: float
) -> None:
    true = torch.zeros(2, 1, 12, 12)
    s = metrics.score(true + offset, truth(true), PLAIN)
    assert s.psnr.tolist() == pytest.approx([decibel] * 2, abs=1e-5)
    assert s.mse.tolist() == pytest.approx([offset**2] * 2)


def test_psnr_is_averaged_over_images_and_not_taken_of_a_mean_error() -> None:
    true = torch.zeros(2, 1, 12, 12)
    found = torch.stack([torch.full((1, 12, 12), 0.1), torch.full((1, 12, 12), 0.01)])
    s = metrics.score(found, truth(true), PLAIN)
    assert s.psnr.mean().item() == pytest.approx(
        30.0, abs=1e-4
    )  # the mean error's would be 22.97


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (3, 6), (6, 3)])
def test_no_other_assignment_is_cheaper(size: tuple[int, int]) -> None:
    n, m = size
    a, b = images(n, 1, side=3), images(m, 2, side=3)
    cost = ((a[:, None] - b[None]).double().numpy() ** 2).mean((2, 3, 4))
    rows, columns = metrics.assign(a, b)
    short, wide = (cost, m) if n <= m else (cost.T, n)
    best = min(
        sum(short[i, j] for i, j in enumerate(order))
        for order in itertools.permutations(range(wide), min(n, m))
    )
    assert len(rows) == min(n, m)
    assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-12)


def test_the_order_of_reconstructions_changes_nothing() -> None:
    true = images(6, 3)
    found = (
        true + 0.2 * torch.randn(true.shape, generator=torch.Generator().manual_seed(4))
    ).roll(2, 0)
    one = metrics.score(found, truth(true), PLAIN)
    other = metrics.score(found[torch.tensor([5, 2, 0, 1, 4, 3])], truth(true), PLAIN)
    for name in ("psnr", "ssim", "mse", "images"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    public = images(40, 5)
    same = [
        metrics.identification(s, truth(true), public, PLAIN, 0) for s in (one, other)
    ]
    assert same[0] == same[1]


def test_labels_do_not_matter_to_the_assignment() -> None:
    x = images(4, 6)
    s = metrics.score(x.flip(0), Truth(x, torch.tensor([7, 7, 1, 0])), PLAIN)
    assert s.order == [3, 2, 1, 0]
    assert s.psnr.tolist() == [metrics.CAP] * 4


def test_images_are_compared_as_pixels_and_not_as_inputs() -> None:
    true = images(3, 7, channels=3)
    found = true + 0.1 * torch.randn(
        true.shape, generator=torch.Generator().manual_seed(8)
    )
    plain = metrics.score(found, truth(true), PLAIN)
    scaled = metrics.score(SCALED.inputs(found), truth(true, SCALED), SCALED)
    assert torch.allclose(plain.psnr, scaled.psnr, atol=1e-4)
    mse = ((found.clamp(0, 1) - true).double().numpy() ** 2).mean((1, 2, 3))
    assert plain.psnr.numpy() == pytest.approx(-10 * np.log10(mse), abs=1e-4)


def test_pixels_outside_the_range_count_as_black_or_white() -> None:
    true = torch.ones(1, 1, 12, 12)
    assert metrics.score(true * 1000, truth(true), PLAIN).psnr.item() == metrics.CAP


def test_an_attack_that_ran_away_is_scored_as_grey() -> None:
    true = images(2, 22)
    found = torch.stack([true[0], torch.full_like(true[1], torch.nan)])
    s = metrics.score(found, truth(true), PLAIN)
    assert s.order == [0, 1]
    assert s.psnr[0].item() == metrics.CAP
    assert s.mse[1].item() == pytest.approx((true[1] - 0.5).square().mean().item())


def test_an_image_that_nothing_was_reconstructed_of_is_compared_with_grey() -> None:
    true = torch.stack([torch.zeros(1, 12, 12), torch.ones(1, 12, 12)])
    s = metrics.score(torch.ones(1, 1, 12, 12), truth(true), PLAIN)
    assert s.order == [-1, 0]
    assert s.psnr.tolist() == pytest.approx([10 * math.log10(4), metrics.CAP])


def test_one_client_is_scored_by_its_best_matches_among_the_dummies_of_several() -> (
    None
):
    true, others = images(2, 9), images(5, 10)
    s = metrics.score(torch.cat([others[:3], true, others[3:]]), truth(true), PLAIN)
    assert s.order == [3, 4]


def ssim_by_its_definition(
    a: np.ndarray, b: np.ndarray, size: int, sigma: float
) -> float:
    """Wang et al. 2004, equation 13, around every pixel, of an image that is mirrored at its edges; one channel."""
    at = np.arange(size) - size // 2
    line = np.exp(-(at**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = ndimage.correlate(x, window, mode="mirror")
        return found

    mu, nu = mean(a), mean(b)
    vary, other, both = (
        mean(a * a) - mu * mu,
        mean(b * b) - nu * nu,
        mean(a * b) - mu * nu,
    )
    c1, c2 = 0.01**2, 0.03**2
    return float(
        (
            ((2 * mu * nu + c1) * (2 * both + c2))
            / ((mu**2 + nu**2 + c1) * (vary + other + c2))
        ).mean()
    )


@pytest.mark.parametrize(
    ("side", "size", "sigma"), [(28, 11, 1.5), (8, 7, 6 / 7), (9, 9, 8 / 7)]
)
def test_ssim_is_that_of_wang_with_a_window_that_fits(
    side: int, size: int, sigma: float
) -> None:
    a, b = images(3, 11, channels=3, side=side), images(3, 12, channels=3, side=side)
    a = 0.5 * a + 0.5 * b
    found = metrics.ssim(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    expected = [
        np.mean(
            [ssim_by_its_definition(x[i, c], y[i, c], size, sigma) for c in range(3)]
        )
        for i in range(3)
    ]
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


def test_exact_copies_are_all_identified() -> None:
    x = images(5, 13)
    s = metrics.score(x, truth(x), PLAIN)
    found = metrics.identification(s, truth(x), images(2000, 14), PLAIN, 0)
    assert found == {
        "top1": 1.0,
        "mrr": 1.0,
        "pool": metrics.POOL,
        "chance": 1 / metrics.POOL,
    }


def test_noise_is_identified_as_often_as_chance_has_it() -> None:
    pool, trials = 10, 400
    hits = 0.0
    for trial in range(trials):
        x, noise = images(1, 2 * trial, side=4), images(1, 2 * trial + 1, side=4)
        s = metrics.score(noise, truth(x), PLAIN)
        hits += metrics.identification(
            s, truth(x), images(pool - 1, 10**6 + trial, side=4), PLAIN, 0
        )["top1"]
    low, high = stats.binom.interval(0.999, trials, 1 / pool)
    assert low <= hits <= high, f"{hits} of {trials} at a chance of 1 in {pool}"


def test_the_rank_of_the_original_gives_the_reciprocal_rank() -> None:
    x = torch.zeros(1, 1, 12, 12)
    public = torch.stack([torch.full((1, 12, 12), v) for v in (0.3, 0.4, 0.9)])
    s = metrics.score(
        torch.full((1, 1, 12, 12), 0.33), truth(x), PLAIN
    )  # 0.3 and 0.4 are nearer than the original, 0
    found = metrics.identification(s, truth(x), public, PLAIN, 0)
    assert (found["top1"], found["pool"]) == (0.0, 4)
    assert found["mrr"] == pytest.approx(1 / 3)


def test_reference_levels_are_what_anybody_could_say_without_the_update() -> None:
    x, y = images(6, 15, side=8), torch.tensor([0, 0, 1, 1, 2, 2])
    public_x, public_y = images(60, 16, side=8), torch.arange(60) % 3
    own, other = Truth(x, y), Truth(images(4, 17, side=8), y[:4])
    levels = metrics.references(own, public_x, public_y, other, PLAIN, 0)
    assert set(levels) == {
        "blank",
        "mean image",
        "class means",
        "start noise",
        "another client",
    }
    assert levels["blank"].psnr.numpy() == pytest.approx(
        -10 * np.log10(((x - 0.5).numpy() ** 2).mean((1, 2, 3))), abs=1e-4
    )
    away = ((x - public_x.mean(0)).numpy() ** 2).mean((1, 2, 3))
    assert levels["mean image"].psnr.numpy() == pytest.approx(
        -10 * np.log10(away), abs=1e-4
    )
    means = torch.stack([public_x[public_y == label].mean(0) for label in y.tolist()])
    assert torch.equal(
        levels["class means"].psnr, metrics.score(means, own, PLAIN).psnr
    )
    alone = metrics.references(own, public_x, public_y, None, PLAIN, 0)
    assert "another client" not in alone


def test_class_means_are_worth_nothing() -> None:
    x, y = images(6, 18, side=8), torch.tensor([0, 0, 1, 1, 2, 2])
    base = metrics.references(
        Truth(x, y), images(60, 19, side=8), torch.arange(60) % 3, None, PLAIN, 0
    )["class means"]
    assert metrics.leakage(base, base, 0.1, 0.1) == {"R": 0.0, "R_max": 0.0, "I": 0.0}


def test_leakage_is_the_way_from_the_class_mean_to_30_decibel() -> None:
    def of(*psnr: float) -> Score:
        x = torch.tensor(psnr, dtype=torch.float64)
        return Score(x, x, x, [], x)

    found = metrics.leakage(of(20, 10, 40), of(10, 15, 20), top1=0.5, chance=0.01)
    assert found["R"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["R_max"] == 1.0
    assert found["I"] == pytest.approx((0.5 - 0.01) / 0.99)
    assert metrics.leakage(of(20), of(10), top1=0.0, chance=0.01)["I"] == 0.0


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
    assert metrics.grade({"input_leakage": leak, "worst_image": worst}) == grade


@pytest.mark.parametrize(
    ("value", "letter"), [(0.049, "A"), (0.05, "B"), (0.2, "C"), (0.5, "D"), (1.0, "D")]
)
def test_labels_and_membership_have_grades_of_their_own(
    value: float, letter: str
) -> None:
    assert metrics.letter(value) == letter


def test_label_accuracy_counts_what_two_multisets_share() -> None:
    found = metrics.label_accuracy(
        torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1, 1, 2])
    )
    # counts 2 1 0 0 0 1 against 1 2 1: differences 1 1 1 1, half of them over 4
    assert found == {"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3}
    assert (
        metrics.label_accuracy(torch.tensor([3, 1]), torch.tensor([1, 3]))["accuracy"]
        == 1.0
    )


def test_auc_counts_pairs_and_ties_half() -> None:
    members, others = torch.tensor([3.0, 2.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 4.0])
    pairs = [
        (m > o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist()
    ]
    assert metrics.membership(members, others)["auc"] == pytest.approx(np.mean(pairs))


def test_equal_scores_tell_nothing_of_membership() -> None:
    x = torch.linspace(0, 1, 200)
    found = metrics.membership(x, x)
    assert found["auc"] == pytest.approx(0.5)
    assert found["tpr_at_1_percent_fpr"]["value"] <= 0.01
    assert metrics.membership(torch.zeros(5), torch.zeros(50))["auc"] == 0.5


def test_more_false_positives_bring_no_fewer_true_ones() -> None:
    draw = torch.Generator().manual_seed(20)
    members, others = (
        torch.randn(100, generator=draw) + 1,
        torch.randn(1000, generator=draw),
    )
    rates = [0.001, 0.01, 0.1, 0.5, 1.0]
    found = [metrics.true_positives(members, others, rate) for rate in rates]
    assert [f["value"] for f in found] == sorted(f["value"] for f in found)
    for rate, f in zip(rates[:-1], found[:-1], strict=True):
        # no threshold that lets through at most this share of the others lets through more of the members
        allowed = [t for t in others.tolist() if (others > t).double().mean() <= rate]
        assert f["value"] == max((members > t).double().mean().item() for t in allowed)


def test_a_true_positive_rate_has_its_clopper_pearson_interval() -> None:
    members, others = torch.tensor([0.0] * 7 + [9.0] * 3), torch.linspace(0, 1, 1000)
    found = metrics.membership(members, others)["tpr_at_1_percent_fpr"]
    assert found["value"] == 0.3
    assert found["low"] == pytest.approx(stats.beta.ppf(0.025, 3, 8))
    assert found["high"] == pytest.approx(stats.beta.ppf(0.975, 4, 7))


def test_a_mean_over_clients_has_an_interval_and_one_client_has_none() -> None:
    x = np.array([1.0, 2.0, 4.0])
    half = (
        4.302652729911275 * x.std(ddof=1) / math.sqrt(3)
    )  # t of 2 degrees of freedom at 0.975
    found = metrics.interval(x.tolist())
    assert found["mean"] == pytest.approx(x.mean())
    assert (found["low"], found["high"]) == (
        pytest.approx(x.mean() - half),
        pytest.approx(x.mean() + half),
    )
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
