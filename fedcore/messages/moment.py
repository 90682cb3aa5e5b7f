"""When a client worked: the name of what it keeps of that work, on any machine."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Moment"]

CALLS = 1 << 16  # calls of clients in a round, at most


class Moment(NamedTuple):
    """A client's work: in round t, the k-th that it was given in it; both from 0."""

    t: int
    k: int

    @property
    def number(self) -> int:
        """The moment as one number, t 2^16 + k, as messages and checkpoints have it.

        >>> Moment(3, 1).number
        196609
        """
        return self.t * CALLS + self.k

    @classmethod
    def of(cls, number: int) -> Moment:
        """The moment of a number.

        >>> Moment.of(196609)
        Moment(t=3, k=1)
        """
        return cls(number // CALLS, number % CALLS)
