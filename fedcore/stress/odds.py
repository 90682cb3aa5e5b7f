"""Rounds with more malicious clients than a rule is told of, and what to do then."""

from __future__ import annotations

import math

from fedcore.messages.aggregation.checks import odds, odds_text
from fedcore.messages.aggregation.settings import AggregationSettings

__all__ = ["odds_line"]

RARE = 0.001  # probability up to which nothing is said
SMALL = 0.01  # probability that counts as small


def odds_line(
    settings: AggregationSettings, population: int, asked: int, share: float
) -> str:
    """The odds, in words, of more than f malicious clients, and the f that holds.

    "" where that is rare, or the rule is not told f.

    >>> settings = AggregationSettings(rule="trimmed_mean", fraction=0.1)
    >>> line = odds_line(settings, population=100, asked=20, share=0.1)
    >>> line.partition("; ")[2]
    'f = 5 holds in 99 % of them: --set aggregation.byzantine=5'
    """
    if settings.byzantine is None and settings.fraction is None:
        return ""
    malicious, f = math.floor(round(share * population, 9)), settings.f(asked)
    if asked >= population or odds(population, malicious, asked, f) <= RARE:
        return ""
    text = odds_text(settings, population, asked, share)
    for larger in range(f + 1, (asked + 1) // 2):
        if odds(population, malicious, asked, larger) <= SMALL:
            advice = f"--set aggregation.byzantine={larger}"
            return f"{text}; f = {larger} holds in 99 % of them: {advice}"
    return f"{text}; no f below half of them holds: ask more clients"
