"""The treatment of single clients by a rule, malicious and honest, over a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.rounds.client_table import read_clients

__all__ = ["Treatment", "treatment_of"]

COLUMNS = ("weight", "norm_ratio", "distance")


@dataclass(frozen=True)
class Treatment:
    """Means over the rounds in which a client's message came to the rule."""

    clients: np.ndarray  # [clients], ids, ascending
    is_malicious: np.ndarray  # [clients]
    weights: np.ndarray  # [clients], 1 = an equal share; NaN where the rule has none
    norm_ratios: np.ndarray  # [clients], norm over the median norm of its call
    distances: np.ndarray  # [clients], to the result, over the median of its call

    def to_dict(self) -> dict[str, Any]:
        """Means over malicious and honest clients, ready for JSON."""
        values: dict[str, Any] = {}
        for name, who in (
            ("malicious", self.is_malicious),
            ("honest", ~self.is_malicious),
        ):
            values[name] = {
                "clients": int(who.sum()),
                "weight": _mean(self.weights[who]),
                "norm_ratio": _mean(self.norm_ratios[who]),
                "distance": _mean(self.distances[who]),
            }
        return values


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def treatment_of(folder: Path, malicious: Collection[int]) -> Treatment | None:
    """The treatment of clients in a run; None where no rule judged them."""
    table = read_clients(folder)
    if len(table) == 0 or not set(COLUMNS) <= set(table.column_names):
        return None
    clients = table["client"].to_numpy()
    # Two client functions of a round are two calls, and two results.
    functions = np.unique(table["function"].to_numpy(), return_inverse=True)[1]
    calls = table["round"].to_numpy().astype(np.int64) * (functions.max() + 1)
    calls += functions
    columns = [table[name].to_numpy().astype(np.float64) for name in COLUMNS]
    weights, ratios, distances = columns
    is_judged = np.isfinite(ratios) | np.isfinite(distances)
    if not is_judged.any():
        return None
    clients, calls = clients[is_judged], calls[is_judged]
    weights, ratios = weights[is_judged], ratios[is_judged]
    distances = distances[is_judged]
    _, index = np.unique(calls, return_inverse=True)
    counts = np.bincount(index)
    middle = _medians(distances, index, len(counts))
    ids, place = np.unique(clients, return_inverse=True)
    is_malicious = np.isin(ids, list(malicious))
    return Treatment(
        ids,
        is_malicious,
        _by_client(weights * counts[index], place, len(ids)),
        _by_client(ratios, place, len(ids)),
        _by_client(distances / middle[index], place, len(ids)),
    )


def _medians(values: np.ndarray, index: np.ndarray, groups: int) -> np.ndarray:
    """The median of the values of each group, [groups]; at least a tiny number."""
    order = np.argsort(index, kind="stable")
    pieces = np.split(
        values[order], np.cumsum(np.bincount(index, minlength=groups))[:-1]
    )
    medians = [np.nanmedian(piece) if len(piece) else 0.0 for piece in pieces]
    return np.array(medians).clip(min=1e-300)


def _by_client(values: np.ndarray, place: np.ndarray, clients: int) -> np.ndarray:
    """The mean of a client's values that are numbers; NaN where it has none."""
    is_number = np.isfinite(values)
    sums = np.bincount(place[is_number], values[is_number], minlength=clients)
    counts = np.bincount(place[is_number], minlength=clients)
    means = np.full(clients, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
