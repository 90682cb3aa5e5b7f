"""The picture in the README.

`python -m benchmarks.picture LABEL=RUN_DIR ... > docs/fashion.svg`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedcore.views.figures import STYLE, svg


def main() -> None:
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for argument in sys.argv[1:]:
            label, _, folder = argument.partition("=")
            rows = [
                json.loads(line)
                for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
            ]
            rows = [row for row in rows if "test_accuracy" in row]
            x = [row["round"] for row in rows]
            (line,) = axes.plot(
                x, [row["test_accuracy"] for row in rows], label=f"{label}, test set"
            )
            spread = [row["client_accuracy"] for row in rows]
            axes.fill_between(
                x,
                [c["p10"] for c in spread],
                [c["p90"] for c in spread],
                alpha=0.15,
                linewidth=0,
                color=line.get_color(),
                label=f"{label}, clients' 10th to 90th percentile",
            )
        axes.set(xlabel="round", ylabel="accuracy", ylim=(0, 1))
        axes.legend(frameon=False, loc="lower right")
        print(svg(figure))


if __name__ == "__main__":
    main()
