"""The Flower ServerApp: the round loop, with Flower nodes as its clients."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcore import loop
from fedcore.config import Experiment
from fedcore.progress import Terminal, show_result
from fedcore.report import write_or_note
from server.grid import GridEngine

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config's `preset` and `set` describe."""
    overrides = [*str(context.run_config["set"]).split(), 'engine.name="grid"']
    e = Experiment.load(str(context.run_config["preset"]), overrides)
    with Terminal() as terminal:
        result = loop.run(e, observer=terminal, engine=lambda work: GridEngine(grid, work, e.engine.round_timeout))
    show_result(result, write_or_note(result.run_dir))
