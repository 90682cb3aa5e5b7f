"""The picture in the README, of accuracy by round:

python -m benchmarks.picture LABEL=RUN_DIR ... > docs/fashion.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore.views.figures import STYLE, svg


def main() -> None:
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for argument in sys.argv[1:]:
            label, _, folder = argument.partition("=")
            draw(axes, label, Path(folder))
        axes.set(xlabel="round", ylabel="accuracy", ylim=(0, 1))
        axes.legend(frameon=False, loc="lower right")
        print(svg(figure))


def draw(axes: Axes, label: str, run_dir: Path) -> None:
    """One run: the test set as a line, the middle 80 % of the clients as a band."""
    rounds, accuracy, low, high = [], [], [], []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "test_accuracy" in row:
            rounds.append(row["round"])
            accuracy.append(row["test_accuracy"])
            low.append(row["client_accuracy"]["p10"])
            high.append(row["client_accuracy"]["p90"])
    (curve,) = axes.plot(rounds, accuracy, label=f"{label}, test set")
    axes.fill_between(
        rounds,
        low,
        high,
        alpha=0.15,
        linewidth=0,
        color=curve.get_color(),
        label=f"{label}, clients' 10th to 90th percentile",
    )


if __name__ == "__main__":
    main()
