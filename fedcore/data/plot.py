"""A picture of a partition."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 200  # clients drawn one by one; more are averaged in groups


def partition_figure(counts: np.ndarray, title: str) -> Figure:
    """Class shares of the clients, above a histogram of their sizes.

    Clients are sorted by their largest class.
    `counts` [population, classes], examples of each class that each client holds.
    """
    population, classes = counts.shape
    figure = Figure(figsize=(9, 5), layout="constrained")
    shares, sizes = figure.subplots(2, 1, height_ratios=[2, 1])
    _draw_shares(shares, _columns(counts))
    width = "one column a client"
    if population > COLUMNS:
        width = f"one column {population // COLUMNS} or so clients"
    shares.set_title(title)
    shares.set_xlabel(f"{population} clients, sorted by their main class; {width}")
    if classes <= 20:
        shares.legend(
            title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    examples = counts.sum(1)
    bins = min(40, max(int(np.ptp(examples)), 1))
    sizes.hist(examples, bins=bins, color="0.5")
    sizes.set(xlabel="examples a client", ylabel="clients")
    for axis in (shares, sizes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _columns(counts: np.ndarray) -> np.ndarray:
    """Class shares, [columns, classes], of clients sorted by their largest class."""
    population, classes = counts.shape
    sizes = counts.sum(1)
    shares = counts / np.maximum(sizes[:, None], 1)
    # Clients without examples come last.
    main = np.where(sizes > 0, shares.argmax(1), classes)
    ordered = shares[np.lexsort((-shares.max(1), main))]
    groups = np.array_split(ordered, min(population, COLUMNS))
    return np.array([group.mean(0) for group in groups])


def _draw_shares(axis: Axes, columns: np.ndarray) -> None:
    x, bottom = np.arange(len(columns)), np.zeros(len(columns))
    for label, shares in enumerate(columns.T):
        colour = f"C{label % 10}"
        axis.bar(x, shares, 1.0, bottom, color=colour, label=str(label), linewidth=0)
        bottom += shares
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(0, 1), xticks=[])
    axis.set_ylabel("share of classes")
