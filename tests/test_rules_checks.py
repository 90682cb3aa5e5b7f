"""Rules that cannot work are refused before a run, with what would work."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import hypergeom

from fedcore.errors import SettingsError
from fedcore.messages.aggregation.checks import (
    odds,
    odds_text,
    refuse_impossible,
    uses_weights,
)
from fedcore.messages.aggregation.rule import Rule
from fedcore.messages.aggregation.settings import AggregationSettings


def settings(rule: str, **more: Any) -> AggregationSettings:
    return AggregationSettings(**{"rule": rule, "byzantine": 3, **more})


@pytest.mark.parametrize(
    ("rule", "ahead", "least"),
    [
        ("median", "none", 7),
        ("trimmed_mean", "none", 7),
        ("meamed", "none", 7),
        ("geometric_median", "none", 7),
        ("centred_clipping", "none", 7),
        ("dnc", "none", 7),
        ("caf", "none", 7),
        ("sign", "none", 7),
        ("krum", "none", 9),
        ("multi_krum", "none", 9),
        ("bulyan", "none", 15),
        ("fltrust", "none", 1),
        ("mean", "clip", 7),
        ("mean", "arc", 7),
        ("fltrust", "nnm", 7),
        # 2 f < ceil(n / 2), and so on with the rule's own need of buckets.
        ("median", "bucketing", 13),
        ("krum", "bucketing", 17),
        ("bulyan", "bucketing", 29),
        ("multi_krum", "nnm", 9),
    ],
)
def test_a_cohort_below_the_least_is_refused(rule: str, ahead: str, least: int) -> None:
    chosen = settings(rule, before=ahead)
    refuse_impossible(chosen, least)
    assert Rule(chosen, 0).least(3) == least
    if least == 1:
        return
    with pytest.raises(SettingsError) as caught:
        refuse_impossible(chosen, least - 1)
    message = str(caught.value)
    assert "\n" not in message
    assert f"= {least} messages, and a round asks {least - 1} clients" in message
    assert f"set participation.cohort = {least} or more" in message
    assert "byzantine = 2 or less" in message


def test_what_a_refusal_advises_is_accepted() -> None:
    for rule in ("median", "krum", "bulyan"):
        for fraction in (0.1, 0.2, 0.3):
            for asked in (1, 4, 7, 13):
                chosen = AggregationSettings(rule=rule, fraction=fraction)
                try:
                    refuse_impossible(chosen, asked)
                except SettingsError as error:
                    _accepts_advice(chosen, asked, str(error))


def _accepts_advice(chosen: AggregationSettings, asked: int, message: str) -> None:
    advice = message.partition(": set ")[2]
    if "cohort = " in advice:
        refuse_impossible(chosen, int(advice.split()[2]))
    else:
        assert chosen.rule == "bulyan", "4 f + 3 grows as fast as the cohort"
    share = float(advice.partition("fraction = ")[2].split()[0])
    refuse_impossible(chosen.model_copy(update={"fraction": share}), asked)


def test_a_cohort_that_cannot_be_set_is_no_advice() -> None:
    chosen = settings("krum")
    with pytest.raises(SettingsError, match="cohort = 9 or more, or aggregation"):
        refuse_impossible(chosen, 8, largest=9)
    with pytest.raises(SettingsError, match="clients: set aggregation"):
        refuse_impossible(chosen, 8, largest=8)


def test_nothing_is_asked_of_a_round_without_malicious_clients() -> None:
    for rule in ("median", "krum", "bulyan"):
        refuse_impossible(settings(rule, byzantine=0), asked=1)


def test_a_rule_without_weights_does_not_take_the_methods() -> None:
    with pytest.raises(SettingsError, match="no form with weights"):
        refuse_impossible(settings("krum", weights="method"), 20)
    with pytest.raises(SettingsError, match='before = "nnm"'):
        refuse_impossible(settings("median", weights="method", before="nnm"), 20)
    refuse_impossible(settings("geometric_median", weights="method"), 20)


def test_only_a_mean_of_messages_themselves_weighs_by_default() -> None:
    assert uses_weights(AggregationSettings())
    assert uses_weights(settings("mean", before="clip"))
    assert not uses_weights(settings("mean", before="nnm"))
    assert not uses_weights(settings("median"))
    refuse_impossible(settings("mean", before="nnm"), 20)


def test_fltrust_needs_proxy_data() -> None:
    refuse_impossible(settings("fltrust"), 5)
    with pytest.raises(SettingsError, match="proxy = 100"):
        refuse_impossible(settings("fltrust"), 5, has_proxy=False)


@pytest.mark.parametrize(
    ("population", "malicious", "asked", "f", "expected"),
    [
        (100, 10, 20, 2, "0.32"),
        (100, 10, 20, 3, "0.11"),
        (100, 10, 20, 4, "0.025"),
        (100, 20, 20, 6, "0.064"),
        (100, 20, 20, 8, "0.0039"),
        (1000, 100, 100, 15, "0.032"),
        (1000, 100, 100, 20, "0.00038"),
    ],
)
def test_odds_of_a_cohort_with_more_than_f(
    population: int, malicious: int, asked: int, f: int, expected: str
) -> None:
    found = odds(population, malicious, asked, f)
    assert f"{found:.2g}" == expected
    exact = hypergeom.sf(f, population, malicious, asked)
    assert found == pytest.approx(exact, rel=1e-9)


def test_odds_at_the_ends() -> None:
    assert odds(20, 4, 20, 4) == 0
    assert odds(20, 4, 20, 3) == pytest.approx(1)
    assert odds(10, 10, 5, 4) == pytest.approx(1)
    all_asked = odds_text(settings("median", byzantine=4), 20, 20, 0.2)
    assert all_asked.endswith("0 % of the rounds of 20 have more than f = 4")
    none = odds_text(settings("median", byzantine=4), 20, 20, 0.3)
    assert "100 %" in none
