"""Rules that cannot work with the clients that a round asks, and the odds of the rest.

Refused before a run, in one line that says what would do.
"""

from __future__ import annotations

import math

from fedcore.errors import SettingsError
from fedcore.messages.aggregation.rule import MIXES, Rule
from fedcore.messages.aggregation.settings import AggregationSettings

WEIGHTED = frozenset(("mean", "median", "trimmed_mean", "geometric_median"))
"""The rules that have a form with weights."""

LARGEST_COHORT = 10_000  # looked for where no f is given, but a fraction


def takes_weights(settings: AggregationSettings) -> bool:
    """Whether the rule, and what is before it, has a form with weights."""
    return settings.rule in WEIGHTED and settings.before not in MIXES


def uses_weights(settings: AggregationSettings) -> bool:
    """Whether the method's weights are used; by default only for the mean.

    >>> uses_weights(AggregationSettings(rule="median"))
    False
    >>> uses_weights(AggregationSettings(rule="median", weights="method"))
    True
    """
    if settings.weights is not None:
        return settings.weights == "method"
    return settings.rule == "mean" and takes_weights(settings)


def refuse_impossible(
    settings: AggregationSettings,
    asked: int,
    *,
    largest: int | None = None,
    has_proxy: bool = True,
) -> None:
    """SettingsError for a rule that cannot work when a round asks `asked` clients.

    `largest` is the largest participation.cohort that can be set, where that is known.

    >>> settings = AggregationSettings(rule="krum", byzantine=3)
    >>> refuse_impossible(settings, asked=9)
    >>> refuse_impossible(settings, asked=8)
    Traceback (most recent call last):
    fedcore.errors.SettingsError: aggregation.rule = "krum" with f = 3 malicious \
clients needs 2f + 3 = 9 messages, and a round asks 8 clients: set \
participation.cohort = 9 or more, or aggregation.byzantine = 2 or less
    """
    _refuse_weights(settings)
    if settings.rule == "fltrust" and not has_proxy:
        raise SettingsError(
            'aggregation.rule = "fltrust" compares every update with one that the '
            "server trains itself, and there is none: set proxy = 100, or take "
            'rule = "multi_krum" with before = "nnm"'
        )
    f = settings.f(asked)
    need = Rule(settings, seed=0).least(f)
    if need <= asked:
        return
    advice = [_larger_cohort(settings, asked, largest), _smaller_f(settings, asked)]
    raise SettingsError(
        f"{named(settings)} with f = {f} malicious clients needs "
        f"{_formula(settings)} = {need} messages, and a round asks {asked} "
        f"client{'s' * (asked != 1)}: set " + ", or ".join(filter(None, advice))
    )


def _refuse_weights(settings: AggregationSettings) -> None:
    if not uses_weights(settings) or takes_weights(settings):
        return
    raise SettingsError(
        f'aggregation.weights = "method" with {named(settings)}: it has no form with '
        'weights; set aggregation.weights = "equal", or take '
        'rule = "median", "trimmed_mean" or "geometric_median" with before = "none"'
    )


def named(settings: AggregationSettings) -> str:
    """The rule, in the words of the settings."""
    text = f'aggregation.rule = "{settings.rule}"'
    if settings.before != "none":
        text += f' and before = "{settings.before}"'
    if settings.rule == "mean" and settings.weights == "equal":
        text += ' and weights = "equal"'
    return text


def _formula(settings: AggregationSettings) -> str:
    """`Rule.least` as a person writes it.

    It is linear in f once there are malicious clients, so two values tell it.
    """
    rule = Rule(settings, seed=0)
    slope = rule.least(2) - rule.least(1)
    constant = rule.least(1) - slope
    sign = "+" if constant >= 0 else "-"
    return f"{slope}f {sign} {abs(constant)}"


def _larger_cohort(
    settings: AggregationSettings, asked: int, largest: int | None
) -> str:
    rule = Rule(settings, seed=0)
    end = LARGEST_COHORT if largest is None else largest
    for larger in range(asked + 1, end + 1):
        if rule.least(settings.f(larger)) <= larger:
            return f"participation.cohort = {larger} or more"
    return ""


def _smaller_f(settings: AggregationSettings, asked: int) -> str:
    rule = Rule(settings, seed=0)
    largest = settings.f(asked)
    while largest > 0 and rule.least(largest) > asked:
        largest -= 1
    if settings.fraction is None:
        return f"aggregation.byzantine = {largest}" + " or less" * (largest > 0)
    share = math.floor(1000 * largest / asked) / 1000
    return f"aggregation.fraction = {share:g}" + " or less" * (largest > 0)


def odds(population: int, malicious: int, asked: int, f: int) -> float:
    """P(more than f malicious clients in a cohort), drawn without replacement.

    >>> [round(odds(100, 10, 20, f), 3) for f in (2, 3, 4)]
    [0.319, 0.11, 0.025]
    >>> [round(odds(100, 20, 20, f), 3) for f in (6, 8)]
    [0.064, 0.004]
    >>> [float(f"{odds(1000, 100, 100, f):.1g}") for f in (15, 20)]
    [0.03, 0.0004]
    """
    total = 0.0
    for count in range(f + 1, min(malicious, asked) + 1):
        if asked - count > population - malicious:
            continue
        terms = (
            _log_choices(malicious, count),
            _log_choices(population - malicious, asked - count),
            -_log_choices(population, asked),
        )
        total += math.exp(sum(terms))
    return min(total, 1.0)


def _log_choices(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def odds_text(
    settings: AggregationSettings, population: int, asked: int, share: float
) -> str:
    """The odds, in words, of more than f malicious clients in a round.

    A share of all clients is malicious.

    >>> settings = AggregationSettings(rule="median", byzantine=4)
    >>> print(odds_text(settings, population=100, asked=20, share=0.1))
    if 10 of 100 clients are malicious, 2.5 % of the rounds of 20 have more than f = 4
    """
    malicious = math.floor(round(share * population, 9))
    f = settings.f(asked)
    percent = 100 * odds(population, malicious, asked, f)
    shown = f"{percent:.2g}" if percent >= 0.01 else "less than 0.01"
    if percent == 0:
        shown = "0"
    elif percent >= 99.5:
        shown = f"{percent:.4g}"
    return (
        f"if {malicious} of {population} clients are malicious, {shown} % of the "
        f"rounds of {asked} have more than f = {f}"
    )
