"""Shares of a secret: any t of them give it back, fewer tell nothing (Shamir, 1979).

    p  2^255 - 19        f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1} mod p

The share at x is f(x), and the secret is f(0) by Lagrange's formula. Coefficients come
from the operating system. Python's integers do not take constant time: a secret lives
for one round, and a remote party sees the time of whole exchanges only.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedcore.messages.secure.primitives import KEY, Secret

__all__ = ["PRIME", "new_secret", "recover", "split", "weights_at_zero"]

PRIME = 2**255 - 19


def new_secret() -> Secret:
    """A uniform element of the field; 32 bytes, the lowest first."""
    return _written(secrets.randbelow(PRIME))


def split(secret: bytes, t: int, places: Sequence[int]) -> dict[int, Secret]:
    """Shares of a secret by place; any `t` of them give it back.

    Places are distinct and in 1 ... p - 1.

    >>> shares = split(bytes(31) + b"\\x07", 2, [1, 2, 3])
    >>> del shares[2]
    >>> bytes(recover(shares, 2))[-1]
    7
    """
    if not 1 <= t <= len(places):
        raise ValueError(f"a threshold of {t}, and {len(places)} places")
    if len({place % PRIME for place in places} - {0}) != len(places):
        raise ValueError("places are not distinct, or one is 0")
    falling = [secrets.randbelow(PRIME) for _ in range(t - 1)]
    falling.append(_read(secret))
    shares = {}
    for place in places:
        value = 0
        for coefficient in falling:  # Horner
            value = (value * place + coefficient) % PRIME
        shares[place] = _written(value)
    return shares


def recover(shares: Mapping[int, bytes], t: int) -> Secret:
    """The secret of `t` or more shares by place. Raises ValueError for fewer."""
    if len(shares) < t:
        raise ValueError(f"{len(shares)} shares, expected {t}")
    places = tuple(sorted(shares)[:t])
    value = 0
    for place, weight in zip(places, weights_at_zero(places), strict=True):
        value += weight * _read(shares[place])
    return _written(value % PRIME)


@lru_cache(maxsize=1024)  # the same clients hold shares of many secrets
def weights_at_zero(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at 0: f(0) = sum of weight times f(place).

    >>> [weight - PRIME if weight > 9 else weight for weight in weights_at_zero((1, 2))]
    [2, -1]
    """
    above, below = [], []
    for place in places:
        numerator = denominator = 1
        for other in places:
            if other != place:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - place) % PRIME
        above.append(numerator)
        below.append(denominator)
    inverses = _inverses(below)
    pairs = zip(above, inverses, strict=True)
    return tuple(numerator * inverse % PRIME for numerator, inverse in pairs)


def _inverses(values: list[int]) -> list[int]:
    """1 / value of each, with one inversion for all (Montgomery, 1987)."""
    before, product = [], 1
    for value in values:
        before.append(product)
        product = product * value % PRIME
    inverse = pow(product, -1, PRIME)
    inverses = [0] * len(values)
    for i in reversed(range(len(values))):
        inverses[i] = inverse * before[i] % PRIME
        inverse = inverse * values[i] % PRIME
    return inverses


def _read(value: bytes) -> int:
    """The element in 32 bytes. Raises ValueError for a number that is none."""
    number = int.from_bytes(value, "little")
    if len(value) != KEY or number >= PRIME:
        raise ValueError("not an element of the field")
    return number


def _written(number: int) -> Secret:
    return Secret(number.to_bytes(KEY, "little"))
