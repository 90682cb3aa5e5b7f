"""A picture of a partition."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

COLUMNS = 200  # clients drawn one by one; more are averaged in groups


def partition_figure(counts: np.ndarray, title: str) -> Figure:
    """Class shares of the clients, sorted by their largest class, above a histogram of their sizes.

    `counts` [population, classes], examples of each class that each client holds.
    """
    population, classes = counts.shape
    sizes = counts.sum(1)
    shares = counts / np.maximum(sizes[:, None], 1)
    main = np.where(
        sizes > 0, shares.argmax(1), classes
    )  # clients without examples come last
    ordered = shares[np.lexsort((-shares.max(1), main))]
    groups = np.array_split(ordered, min(population, COLUMNS))
    columns = np.array([group.mean(0) for group in groups])
    figure = Figure(figsize=(9, 5), layout="constrained")
    bars, sizes_axis = figure.subplots(2, 1, height_ratios=[2, 1])
    bottom = np.zeros(len(columns))
    for label in range(classes):
        bars.bar(
            np.arange(len(columns)),
            columns[:, label],
            1.0,
            bottom,
            color=f"C{label % 10}",
            label=str(label),
            linewidth=0,
        )
        bottom += columns[:, label]
    bars.set(
        xlim=(-0.5, len(columns) - 0.5),
        ylim=(0, 1),
        xticks=[],
        ylabel="share of classes",
        title=title,
    )
    each = (
        "one column a client"
        if population <= COLUMNS
        else f"one column {population // COLUMNS} or so clients"
    )
    bars.set_xlabel(f"{population} clients, sorted by their main class; {each}")
    if classes <= 20:
        bars.legend(
            title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    sizes_axis.hist(
        sizes, bins=min(40, max(int(sizes.max() - sizes.min()), 1)), color="0.5"
    )
    sizes_axis.set(xlabel="examples a client", ylabel="clients")
    for axis in (bars, sizes_axis):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
