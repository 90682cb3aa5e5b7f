"""The probability that a cohort holds more malicious clients than a rule is told of."""

from __future__ import annotations

from math import comb

__all__ = ["odds_text", "too_many"]

FEW = 0.01  # probability that counts as small


def too_many(population: int, malicious: int, asked: int, f: int) -> float:
    """P(more than f of `asked` clients are malicious), drawn without replacement.

    >>> [round(too_many(100, 10, 20, f), 3) for f in (2, 3, 4)]
    [0.319, 0.11, 0.025]
    """
    whole = comb(population, asked)
    least = max(0, asked - (population - malicious))
    within = 0
    for bad in range(least, min(f, malicious, asked) + 1):
        within += comb(malicious, bad) * comb(population - malicious, asked - bad)
    return 1 - within / whole


def odds_text(population: int, malicious: int, asked: int, f: int) -> str:
    """The probability in words, and the f with which it is small.

    >>> odds_text(100, 10, 20, 2).partition("; ")[2]
    'with f = 5 that is 0.0039: --set aggregation.byzantine=5'
    """
    here = too_many(population, malicious, asked, f)
    text = (
        f"with {malicious} of {population} clients malicious, a round of {asked} holds "
        f"more than f = {f} of them with probability {here:.2g}"
    )
    for larger in range(f + 1, (asked + 1) // 2):
        odds = too_many(population, malicious, asked, larger)
        if odds <= FEW:
            text += f"; with f = {larger} that is {odds:.2g}"
            return f"{text}: --set aggregation.byzantine={larger}"
    return f"{text}; no f below half of the cohort makes that small: ask more clients"
