"""Secure sums of a run, in words."""

from __future__ import annotations

from typing import Any

from fedcore.rounds.history import History

__all__ = ["average_of_training", "secret_text"]


def secret_text(history: History, engine: str) -> str:
    """What could be read of clients' messages; empty where single ones could.

    `engine` is the name of the run's.

    >>> first = {"clients": 9, "threshold": 6, "clipped": 0.0, "capped": 2}
    >>> first["tolerated"] = 2
    >>> rows = [{"round": 1, "secure": {"train": first}}]
    >>> print(secret_text(History(rows), "vectorised"))
    sums of 9 clients or more alone, of whom 6 have to stay, and 2 may help a server \
that lies, if clients have certificates; added without masks in this simulation; \
examples capped 2 times
    """
    sums: list[dict[str, Any]] = []
    for row in history.rows:
        sums += row.get("secure", {}).values()
    if not sums:
        return ""
    smallest = min(sums, key=lambda one: one["clients"])
    text = (
        f"sums of {smallest['clients']:,} clients or more alone, of whom "
        f"{smallest['threshold']:,} have to stay"
    )
    if "tolerated" in smallest:
        text += (
            f", and {smallest['tolerated']:,} may help a server that lies, if clients "
            "have certificates"
        )
    if engine != "grid":
        text += "; added without masks in this simulation"
    capped = sum(one["capped"] for one in sums)
    if capped:
        text += f"; examples capped {capped:,} times"
    clipped = max(one["clipped"] for one in sums)
    if clipped:
        text += f"; up to {clipped:.2g} of a round's entries cut off at the reach"
    return text


def average_of_training(history: History) -> str:
    """The average over clients that a row's training measures are."""
    is_secret = any("secure" in row for row in history.rows)
    return "mean" if is_secret else "median"
