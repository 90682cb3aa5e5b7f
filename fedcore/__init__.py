"""fedcore: federated learning, simulated, deployed and audited with one method file."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

from fedcore.escapes import PrintableRecords

# As in pyproject.toml, where Flower wants to read it; inside a Flower app there is no
# installed version.
__version__ = "0.1.0"

# What is installed is one name: fedcore.strategies, fedcore.server and fedcore.client.
# In the source tree, and in a Flower app, those folders lie beside this one.
if not (Path(__file__).parent / "strategies").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# PyTorch's threads would spin for milliseconds when they wait, on cores that clients
# need. Heard only before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Whoever hears of it: a terminal, a file, or Python where nothing is set up.
logging.getLogger("fedcore").addFilter(PrintableRecords())

_HOME = {
    "Experiment": "config",
    "FedcoreError": "errors",
    "RunError": "errors",
    "SettingsError": "errors",
    "run": "views.running",
    "Result": "rounds.loop",
    "Task": "task",
    "Examples": "data.federated",
    "FederatedData": "data.federated",
    "pad_sequences": "inputs",
    "Metric": "metrics",
    "Ratio": "metrics",
    "absolute_error": "metrics",
    "accuracy": "metrics",
    "binary_accuracy": "metrics",
    "binary_cross_entropy": "metrics",
    "cross_entropy": "metrics",
    "squared_error": "metrics",
    "nats_a_character": "token_metrics",
    "next_token_loss": "token_metrics",
    "num_targets": "token_metrics",
    "perplexity": "token_metrics",
    "token_accuracy": "token_metrics",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the command line answers --help without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module fedcore has no attribute {name}")
    return getattr(importlib.import_module(f"fedcore.{_HOME[name]}"), name)
