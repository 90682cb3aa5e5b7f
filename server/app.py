"""The Flower ServerApp: the round loop, with Flower nodes as its clients."""

from __future__ import annotations

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcore import loop
from fedcore.config import Experiment
from fedcore.errors import FedcoreError, RunError
from fedcore.progress import Terminal, show_result
from fedcore.report import write_or_note
from server.grid import GridEngine

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config's `preset` and `set` describe; what a user can get wrong is one line of the log."""
    try:
        overrides = [*str(context.run_config["set"]).split(), 'engine.name="grid"']
        e = Experiment.load(str(context.run_config["preset"]), overrides)
        with Terminal() as terminal:
            result = loop.run(e, observer=terminal, engine=lambda work: GridEngine(grid, work, e.engine.round_timeout))
    except FedcoreError as error:
        print(f"fedcore: {error}", file=sys.stderr, flush=True)
        # Flower counts a run as failed by an exception alone, which must be no SystemExit, and logs its traceback below our line.
        raise RunError(str(error)) from None
    report = write_or_note(result.run_dir)
    # In full, for the working directory is the SuperLink's.
    show_result(result, report and report.resolve())
