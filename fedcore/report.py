"""report.html: what a run did, in one file that opens anywhere, without a network and without scripts."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore.checkpoint import write_atomically
from fedcore.errors import FedcoreError, SettingsError
from fedcore.report_page import PAGE
from fedcore.rundir import stored

log = logging.getLogger("fedcore")

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcore",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
}
PARTITION_LIMIT = 20_000  # clients; a larger partition is not drawn


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run, finished or not, and return its path. Raises SettingsError for no run directory."""
    run_dir = Path(run_dir)
    settings = stored(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl")
    plots: list[tuple[str, str, Markup]] = []

    def plot(title: str, caption: str, draw: Callable[[Axes], bool]) -> None:
        with rc_context(STYLE):
            figure = Figure(figsize=(6.4, 3.4), layout="constrained")
            if draw(figure.add_subplot()):
                plots.append((title, caption, svg(figure)))

    measure, name = ("test_accuracy", "test accuracy") if _series(rows, "test_accuracy")[0] else ("test_loss", "test loss")
    plot(f"Global {name}", "On the test set, which no client holds.", lambda a: _curve(a, rows, measure, name, "round"))
    plot("Loss", "Training loss is the cohort's own mean; test loss is on the test set.", lambda a: _losses(a, rows))
    plot(
        "Accuracy of single clients",
        "Each on its own data: mean, and the band from the 10th to the 90th percentile.",
        lambda a: _band(a, rows),
    )
    plot("Spread over clients", "At the last evaluation; one count a client.", lambda a: _histogram(a, run_dir))
    plot(
        f"{name.capitalize()} for what it costs",
        "Bytes of updates and models, both directions, without protocol overhead.",
        lambda a: _curve(a, rows, measure, name, "MB"),
    )
    plot(
        "Who took part",
        "Clients whose update was used, and those left out, each round.",
        lambda a: _participation(a, rows),
    )
    partition = _partition(settings)
    if partition is not None:
        plots.append(("Data of the clients", "How the training examples are spread.", partition))
    page = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=f"{settings['method']['name']} on {settings.get('task', 'digits')}",
            facts=_facts(settings, rows),
            summary=_summary(settings, rows),
            plots=plots,
            dropped=Counter(_merged(rows)).most_common(),
            command=f"fedcore run {run_dir}/config.toml",
            config=(run_dir / "config.toml").read_text(),
            environment=_json(run_dir / "environment.json"),
        )
    )
    file = run_dir / "report.html"
    write_atomically(file, page.encode())
    return file


def write_or_note(run_dir: Path | str) -> Path | None:
    """`write_report`, for the end of a run: the run is done and saved, so a drawing that fails is a note, not an error."""
    try:
        return write_report(Path(run_dir))
    except Exception as e:
        log.warning("no report (%s: %s); try again with: fedcore report %s", type(e).__name__, e, run_dir)
        log.debug("the report failed", exc_info=e)
        return None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl up to the first that is not whole. Raises SettingsError when the file is missing or no such file."""
    rows: list[dict[str, Any]] = []
    try:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or "round" not in row:
                raise SettingsError(f"{file}, line {len(rows) + 1}: expected a JSON object with a round; is it a metrics.jsonl?")
            rows.append(row)
    except FileNotFoundError as e:
        raise SettingsError(f"{file.parent} has no metrics.jsonl: the run has not started") from e
    except ValueError:
        log.warning("%s ends in a line that is not whole; it is left out", file)
    return rows


def svg(figure: Figure) -> Markup:
    """The figure as inline SVG, without what would change from one drawing to the next."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
    return [r for r, _ in found], [v for _, v in found]


def _curve(axes: Axes, rows: list[dict[str, Any]], key: str, name: str, against: str) -> bool:
    rounds, values = _series(rows, key)
    if not rounds:
        return False
    sent = np.cumsum([row["bytes_down"] + row["bytes_up"] for row in rows]) / 1e6
    by_round = {row["round"]: total for row, total in zip(rows, sent, strict=True)}
    x = rounds if against == "round" else [by_round[r] for r in rounds]
    axes.plot(x, values, marker="o", markersize=3)
    axes.set(xlabel="round" if against == "round" else "MB sent", ylabel=name)
    axes.annotate(f"{values[-1]:.4g}", (x[-1], values[-1]), xytext=(0, 6), textcoords="offset points", ha="right")
    return True


def _losses(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    for key, label in (("train_loss", "training"), ("test_loss", "test")):
        rounds, values = _series(rows, key)
        if rounds:
            axes.plot(rounds, values, label=label)
    axes.set(xlabel="round", ylabel="loss")
    drawn = bool(axes.lines)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _band(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    found = [(row["round"], row["client_accuracy"]) for row in rows if row.get("client_accuracy")]
    if not found:
        return False
    x = [r for r, _ in found]
    low, middle, high = ([c[key] for _, c in found] for key in ("p10", "mean", "p90"))
    axes.fill_between(x, low, high, alpha=0.25, linewidth=0, label="10th to 90th percentile")
    axes.plot(x, middle, marker="o", markersize=3, label="mean")
    axes.set(xlabel="round", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    return True


def _histogram(axes: Axes, run_dir: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(run_dir / "clients.parquet", filters=[("function", "==", "evaluate")])
    except (OSError, pa.ArrowException):
        return False
    if "accuracy" not in table.column_names or len(table) == 0:
        return False
    rounds, counts = table["round"].to_numpy(), table["num_examples"].to_numpy()
    values = table["accuracy"].to_numpy()[(rounds == rounds.max()) & (counts > 0)]
    axes.hist(values, bins=np.linspace(0, 1, 21).tolist())
    axes.axvline(float(values.mean()), color="C1", label=f"mean {values.mean():.1%}")
    axes.set(xlabel=f"accuracy on own data, round {rounds.max()}", ylabel="clients", xlim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return True


def _participation(axes: Axes, rows: list[dict[str, Any]]) -> bool:
    if not rows:
        return False
    x = [row["round"] for row in rows]
    reasons = sorted({reason for row in rows for reason in row["dropped"]})
    heights = [
        [row["reports"] for row in rows],
        *([row["dropped"].get(reason, 0) for row in rows] for reason in reasons),
    ]
    axes.stackplot(x, heights, labels=["used", *reasons], alpha=0.8, step="mid", linewidth=0)
    axes.set(xlabel="round", ylabel="clients", ylim=(0, None))
    if reasons:
        axes.legend(frameon=False, loc="lower right")
    return True


def _partition(settings: dict[str, Any]) -> Markup | None:
    """The partition's picture, where the task is a bundled one with classes."""
    from fedcore.config import Experiment
    from fedcore.data.plot import partition_figure
    from fedcore.tasks import TASKS, build_task

    try:
        e = Experiment.parse(settings)
        if e.task not in TASKS:
            return None
        data = build_task(e).data
        if data.y.is_floating_point() or data.population > PARTITION_LIMIT:
            return None
        with rc_context(STYLE):
            return svg(partition_figure(data.label_counts(int(data.y.max()) + 1), ""))
    except FedcoreError as e_:  # the data may lie elsewhere than when the run was made
        log.warning("the partition is not drawn: %s", e_)
        return None


def _merged(rows: list[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["dropped"])
    return dict(total)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _last(rows: list[dict[str, Any]], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _facts(settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    clients = _last(rows, "client_accuracy") or {}
    accuracy, loss = _last(rows, "test_accuracy"), _last(rows, "test_loss")
    sent = sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    trained = sum(row["reports"] for row in rows)
    headline = (
        ("test accuracy", _percent(accuracy)) if accuracy is not None else ("test loss", "-" if loss is None else f"{loss:.4g}")
    )
    facts = [headline]
    if clients:
        facts.append(("clients, 10th - 90th percentile", f"{_percent(clients['p10'])} - {_percent(clients['p90'])}"))
    facts += [("rounds", f"{len(rows)} of {settings['rounds']}"), ("sent", f"{sent / 1e6:,.1f} MB")]
    facts.append(("clients a second", f"{trained / seconds:,.0f}" if seconds else "-"))
    return facts


def _summary(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    e = settings
    asked = np.mean([row["cohort"] for row in rows]) if rows else 0
    text = f"{e['method']['name']} trained {e['model']['name']} on {e['task']}"
    text += f" with {asked:.4g} clients a round" if rows else ", not yet a round"
    text += f" of {e['population']}" if e.get("population") else ""
    text += f", for {len(rows)} of {e['rounds']} rounds, from seed {e['seed']}."
    skipped = sum(row["skipped"] for row in rows)
    if skipped:
        text += f" {skipped} rounds had too few reports and left the model as it was."
    if len(rows) < e["rounds"]:
        text += " The run is not finished."
    return text


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found
