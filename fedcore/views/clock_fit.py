"""The command `fedcore clock fit`: the devices of a recorded run, as a clock."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedcore.clock.arrivals import read_arrivals
from fedcore.clock.fit import Fit, fit
from fedcore.rounds.recordings import folder_of
from fedcore.rounds.rundir import stored
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import writing

CSV, TOML = "clock.csv", "clock.toml"


class Files(NamedTuple):
    """Where a fit was written."""

    csv: Path  # a row a client
    toml: Path  # the section of a preset


def write_fit(
    recording: Path, out: Path | None = None, population: int | None = None
) -> tuple[Fit, Files]:
    """Fit a recording; (the fit, the files in `out`, or beside the recording)."""
    if population is None:
        population = _population(folder_of(recording))
    found = fit(read_arrivals(recording), population)
    folder = out or (recording if recording.is_dir() else recording.parent)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = ["client,step_s,latency_s"]
    pairs = zip(found.step_s.tolist(), found.latency_s.tolist(), strict=True)
    for client, (step_s, latency_s) in enumerate(pairs):
        rows.append(f"{client},{step_s:.9g},{latency_s:.9g}")
    files = Files(folder / CSV, folder / TOML)
    write_atomically(files.csv, ("\n".join(rows) + "\n").encode())
    section = _section(found, files.csv)
    write_atomically(files.toml, ("\n".join(section) + "\n").encode())
    return found, files


def _population(folder: Path) -> int | None:
    """The population of a recorded run, where its settings say it."""
    if not (folder / "config.toml").is_file():
        return None
    population = stored(folder).get("population")
    return population if isinstance(population, int) else None


def _section(found: Fit, csv: Path) -> list[str]:
    """The section of a preset."""
    lines = ["[clock]", f"trace = {json.dumps(str(csv))}"]
    for name in ("jitter", "server_s"):
        value = getattr(found, name)
        if value:
            lines.append(f"{name} = {value:.9g}")
    return lines


def facts(found: Fit, files: Files) -> dict[str, Any]:
    """What `--json` prints."""
    errors = {}
    for name in ("error", "error_90", "bias"):
        value = getattr(found, name)
        errors[name] = None if math.isnan(value) else value
    return {
        "trace": str(files.csv),
        "clock": str(files.toml),
        "population": len(found.step_s),
        "works": int(found.num_works.sum()),
        "unheard": np.flatnonzero(found.num_works == 0).tolist(),
        "is_measured": found.is_measured,
        "step_s": {"median": float(np.median(found.step_s)), "max": _most(found)},
        "latency_s": {"median": float(np.median(found.latency_s))},
        "jitter": found.jitter,
        "server_s": found.server_s,
        **errors,
    }


def _most(found: Fit) -> float:
    return float(found.step_s.max())


def lines(found: Fit, files: Files) -> list[str]:
    """What the command prints for people."""
    heard = int((found.num_works > 0).sum())
    told = [
        f"{heard} clients, {int(found.num_works.sum())} works: a step takes "
        f"{np.median(found.step_s):.3g} s (median), {found.step_s.min():.3g} to "
        f"{_most(found):.3g} s; one way {np.median(found.latency_s):.3g} s",
    ]
    unheard = len(found.step_s) - heard
    if unheard:
        told.append(
            f"{unheard} clients never answered: they have the medians of the others"
        )
    if not found.is_measured:
        told.append(
            "No client said how long it worked: all of its time counts as local steps"
        )
    if math.isnan(found.error):
        told.append("No client worked twice: nothing says how well this predicts")
    else:
        told.append(
            f"The later half of each client's works, predicted by the earlier: half "
            f"within {found.error:.1%}, nine in ten within {found.error_90:.1%}, "
            f"{found.bias:+.1%} in sum"
        )
    settings = []
    for line in _section(found, files.csv)[1:]:
        name, _, value = line.partition(" = ")
        settings.append(f"--set clock.{name}={value}")
    return [
        *told,
        f"{files.csv}  a row a client",
        f"{files.toml}  the section of a preset",
        f"fedcore run PRESET {' '.join(settings)}",
    ]
