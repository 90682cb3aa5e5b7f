"""Terms of a secure sum: all that its clients have to agree on before they send.

`offer` is the first message of a session (E1, server to client), beside the model:

    run       str         "series/t/k/function", another one for each sum
    n_max     int         clients in a sum at most
    reach     float       c, and
    cap       float       W: the ring
    fields    list[str]   fields of the message, [""] for all of it, and for each
    rules     list[str]   "examples", "equally" or "listed" (by the server)
    news      str         the method's function that makes news of a message, or ""
    settings  str         anything else that has to be the same for all
    is_signed int         1: clients sign their keys with certified keys
    weights   bytes       this client's own weight in each "listed" field, float64

Everything but the own weights goes into the digest that clients sign, with the digest
of the model and of the run's settings (`question_digest`): no client adds to a sum of
others that were told something else. With a step size of zero for all but one of them
the sum would be that one's message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import frexp, isfinite
from typing import Any, NamedTuple

import numpy as np

from fedcore.messages.secure.graph import LEAST
from fedcore.messages.secure.primitives import (
    Message,
    Refused,
    bytes_in,
    digest,
    int_in,
    list_in,
    only,
)

__all__ = [
    "LISTED",
    "RULES",
    "Terms",
    "question_digest",
    "read_offer",
    "settings_digest",
    "weights_by_field",
    "weights_from",
    "weights_to",
]

LISTED = "listed"
RULES = ("examples", "equally", LISTED)
NAMES = (
    "run",
    "n_max",
    "reach",
    "cap",
    "fields",
    "rules",
    "news",
    "settings",
    "is_signed",
)


class Terms(NamedTuple):
    """What all clients of a session have to agree on."""

    run: str  # "series/t/k/function"
    n_max: int  # clients in a sum at most
    reach: float  # c, a power of two
    cap: float  # W, a power of two
    fields: tuple[str, ...] = ("",)
    rules: tuple[str, ...] = ("examples",)
    news: str = ""
    settings: str = ""
    is_signed: bool = True

    @property
    def listed(self) -> int:
        """Fields of the message whose weights the server lists."""
        return self.rules.count(LISTED)

    @property
    def is_one_field(self) -> bool:
        """Whether one list of weights is that of the whole message."""
        return self.fields == ("",)

    def digest(self, down: bytes) -> bytes:
        """32 bytes that stand for these terms and the model of digest `down`.

        >>> terms = Terms("series/0/0/train", n_max=10, reach=8.0, cap=64.0)
        >>> terms.digest(b"") == terms._replace(n_max=9).digest(b"")
        False
        """
        return digest("terms", list(self), down)

    def offer(self, weights: Sequence[float] = ()) -> Message:
        """E1 for a client that has these weights in the listed fields."""
        assert len(weights) == self.listed, "a weight for each listed field"
        message: Message = dict(zip(NAMES, self, strict=True))
        message["fields"] = list(self.fields)
        message["rules"] = list(self.rules)
        message["is_signed"] = int(self.is_signed)
        return message | {"weights": weights_to(weights)}

    def fault(self) -> str | None:
        """Why no client can agree to these terms; or None."""
        if not LEAST <= self.n_max < 2**31:
            return f"sums of at most {self.n_max} clients: expected at least {LEAST}"
        for name, value in (("reach", self.reach), ("cap", self.cap)):
            if not _is_power_of_two(value):
                return f"a {name} of {value:g}: expected a power of two"
        if not self.fields or len(self.fields) != len(self.rules):
            return f"{len(self.fields)} fields and {len(self.rules)} rules of weights"
        for rule in self.rules:
            if rule not in RULES:
                return f'weights "{rule[:40]}": expected one of {", ".join(RULES)}'
        return None


def read_offer(message: Message) -> tuple[Terms, list[float]]:
    """The terms, and this client's own weights in the listed fields.

    Raises Refused for a message that has another form, or terms that no client accepts.
    """
    only(message, (*NAMES, "weights"))
    texts = []
    for name in ("run", "news", "settings"):
        if not isinstance(message[name], str):
            raise Refused(f'"{name}" is {type(message[name]).__name__}, expected text')
        texts.append(message[name])
    run, news, settings = texts
    for name in ("reach", "cap"):
        if type(message[name]) is not float:
            raise Refused(f'"{name}" is not a float')
    is_signed = int_in(message, "is_signed")
    if is_signed not in (0, 1):
        raise Refused(f'"is_signed" is {is_signed}, expected 0 or 1')
    terms = Terms(
        run,
        int_in(message, "n_max"),
        message["reach"],
        message["cap"],
        tuple(list_in(message, "fields", str)),
        tuple(list_in(message, "rules", str)),
        news,
        settings,
        bool(is_signed),
    )
    fault = terms.fault()
    if fault is not None:
        raise Refused(fault)
    weights = weights_from(bytes_in(message, "weights", 8 * terms.listed))
    for weight in weights:
        if not isfinite(weight) or not 0 <= weight <= terms.cap:
            raise Refused(f"an own weight of {weight:g}: expected 0 to {terms.cap:g}")
    return terms, weights


def settings_digest(settings: Mapping[str, Any]) -> bytes:
    """32 bytes that stand for the settings of a run, as JSON has them.

    But for `engine`: where the work is done is not the same for server and devices.

    >>> here, there = {"seed": 1, "engine": "grid"}, {"seed": 1, "engine": "ray"}
    >>> settings_digest(here) == settings_digest(there)
    True
    >>> settings_digest(here) == settings_digest({"seed": 2, "engine": "grid"})
    False
    """
    same = {key: value for key, value in settings.items() if key != "engine"}
    return digest("settings", json.dumps(same, sort_keys=True))


def question_digest(content: bytes, settings: bytes) -> bytes:
    """32 bytes that stand for what clients are sent, and the settings of their run.

    `content` are the bytes of the model, `settings` what `settings_digest` gives.
    """
    return digest("question", hashlib.sha256(content).digest(), settings)


def weights_to(weights: Sequence[float]) -> bytes:
    """Weights as a message carries them: float64, the lowest byte first."""
    return np.array(weights, "<f8").tobytes()


def weights_from(content: bytes) -> list[float]:
    """Weights that a message carries."""
    weights: list[float] = np.frombuffer(content, "<f8").tolist()
    return weights


def weights_by_field(content: bytes, n: int) -> list[list[float]]:
    """Weights of `n` clients in each listed field, field by field.

    >>> weights_by_field(weights_to([1, 2, 3, 4]), 2)
    [[1.0, 2.0], [3.0, 4.0]]
    """
    weights = weights_from(content)
    return [weights[begin : begin + n] for begin in range(0, len(weights), n)]


def _is_power_of_two(value: float) -> bool:
    return value > 0 and isfinite(value) and frexp(value)[0] == 0.5
