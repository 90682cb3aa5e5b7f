"""Five rounds of every method on small data, recorded.

After a change that is meant to move a curve: `python -m tests.golden`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from fedcore.rounds.loop import run
from tests.helpers import OPTIMIZERS, STRATEGIES, small

NAMES = sorted({*STRATEGIES, *OPTIMIZERS} - {"fedopt"})
FILE = Path(__file__).with_name("golden.json")


def curve(name: str, folder: Path) -> list[float]:
    """Test loss after each of five rounds, with clients that come at unequal rates."""
    unequal = {"name": "bernoulli", "p": [0.2 + 0.06 * i for i in range(12)]}
    e = small(name, rounds=5, min_reports=0, evaluation__every=1, participation=unequal)
    return [row["test_loss"] for row in run(e, folder).history]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, Path(folder) / name) for name in NAMES}
    FILE.write_text(json.dumps(curves, indent=1) + "\n")
