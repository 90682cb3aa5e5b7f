"""report.html: what a run did, in one file that opens anywhere, without a network and without scripts."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedcore import __version__
from fedcore.errors import FedcoreError, SettingsError
from fedcore.privacy import COVERS, describe
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.rundir import PERCENTILES, stored
from fedcore.storage.checkpoint import Checkpoint, write_atomically
from fedcore.storage.memory import byte_unit, size_text
from fedcore.views.page import THEME, render

log = logging.getLogger("fedcore")

INK, SOFT, LINE = (THEME[name][0] for name in ("ink", "soft", "line"))
SERIES = [THEME[f"s{n}"][0] for n in range(10)]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "fedcore",  # the same plot has the same bytes
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}
POINTS = 400  # of one curve; a longer one is thinned
BARS = 60  # of one plot; more rounds are averaged in groups
REASONS = 5  # told apart in the plot
LABEL_ROOM = 1.15  # of the last x, for the number beside the last point
PARTITION_LIMIT = 20_000  # clients; a larger partition is not drawn
COUNTS = (
    "round",
    "cohort",
    "reports",
    "bytes_down",
    "bytes_up",
    "seconds",
)  # numbers in every line of metrics.jsonl


class Plot(NamedTuple):
    title: str
    caption: str
    picture: Markup
    wide: bool = False


class Fact(NamedTuple):
    name: str
    value: str
    detail: str


@dataclass
class Run:
    """What a run directory holds, and `notes` on what it should hold and does not."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    clients: dict[str, np.ndarray]  # at the last evaluation, by metric; [clients]
    tuned: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # the same after fine-tuning
    notes: list[str] = field(default_factory=list)
    population: int | None = None
    label_counts: np.ndarray | None = None  # [population, classes]
    reference: str = ""  # what the method is
    personal: bool = False  # whether clients have models of their own

    @property
    def done(self) -> bool:
        return len(self.rows) >= int(self.settings["rounds"])

    @property
    def measure(self) -> str:
        """What the run is judged by."""
        judged = any(
            row.get(f"{kind}_accuracy") is not None
            for row in self.rows
            for kind in ("test", "client")
        )
        return "accuracy" if judged else "loss"

    def last(self, key: str) -> Any:
        return next(
            (row[key] for row in reversed(self.rows) if row.get(key) is not None), None
        )

    def total(self, key: str) -> float:
        return float(sum(row[key] for row in self.rows))


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` of a run, finished or not, and return its path.

    Raises SettingsError for a folder that is no run directory, and for damaged settings or metrics. A missing or damaged
    environment.json or clients.parquet, or data that is not at hand, costs its part of the page.
    """
    r = read_run(Path(run_dir))
    name, task = r.settings["method"]["name"], r.settings["task"]
    with rc_context(STYLE):
        sections = [
            ("Learning", _learning(r)),
            ("Clients", _clients(r)),
            ("Method", _method(r)),
            ("Rounds", _rounds(r)),
            ("Data", _partition(r)),
        ]
    asked = r.total("cohort")
    page = render(
        "report",
        title=f"{name} on {task}",
        done=r.done,
        status="finished"
        if r.done
        else f"unfinished: {len(r.rows)} of {r.settings['rounds']} rounds",
        reference=r.reference,
        summary=_summary(r),
        notes=r.notes,
        facts=_facts(r),
        sections=sections,
        seed=r.settings["seed"],
        command=_command(r),
        sha256=_params_sha256(r),
        dropped=[
            (reason, f"{n:,}", f"{n / max(asked, 1):.1%}")
            for reason, n in _dropped(r.rows).most_common()
        ],
        evaluations=_evaluations(r),
        config=(r.folder / "config.toml").read_text(),
        environment=[
            (key, "-" if value is None else value)
            for key, value in r.environment.items()
        ],
        version=__version__,
        folder=r.folder,
    )
    file = r.folder / "report.html"
    try:
        write_atomically(file, page.encode())
    except OSError as e:
        raise SettingsError(f"{file} cannot be written: {e.strerror}") from e
    return file


def write_or_note(run_dir: Path | str) -> Path | None:
    """`write_report`, for the end of a run: the run is done and saved, so a drawing that fails is a note, not an error."""
    try:
        return write_report(run_dir)
    except Exception as e:
        log.warning(
            "no report (%s: %s); try again with: fedcore report %s",
            type(e).__name__,
            e,
            run_dir,
        )
        log.debug("the report failed", exc_info=e)
        return None


# Reading


def read_run(folder: Path) -> Run:
    """Everything about a run that the report needs. Raises SettingsError when settings or metrics cannot be read."""
    settings = stored(folder)
    expected = {"task": str, "rounds": int, "seed": int, "method": dict}
    wrong = [
        key for key, kind in expected.items() if not isinstance(settings.get(key), kind)
    ]
    if wrong or "name" not in settings["method"]:
        key = wrong[0] if wrong else "method.name"
        raise SettingsError(
            f"{folder / 'config.toml'}: {key} is missing or damaged; expected the settings of a run"
        )
    r = Run(
        folder,
        settings,
        read_rows(folder / "metrics.jsonl"),
        {},
        {},
        population=settings.get("population"),
    )
    if not r.done:
        r.notes.append(
            f"This run is not finished. Go on with: fedcore run --resume {shlex.quote(str(folder))}"
        )
    try:
        r.environment = dict(json.loads((folder / "environment.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        r.notes.append(
            f"environment.json cannot be read ({_brief(e)}): versions and machine of this run are not known."
        )
    if spent := r.last("privacy"):
        r.notes.append(COVERS[spent["view"]])
    r.clients, r.tuned = (
        _last_evaluation(r, "evaluate"),
        _last_evaluation(r, "finetune"),
    )
    _describe(r)
    return r


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be one that a killed process did not finish. Raises SettingsError."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError as e:
        raise SettingsError(
            f"{file.parent} has no metrics.jsonl: its run has not begun"
        ) from e
    except OSError as e:
        raise SettingsError(f"{file} cannot be read: {e.strerror}") from e
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as e:
            if number == len(lines):
                break
            raise SettingsError(
                f"{file}, line {number} is damaged: expected a JSON object"
            ) from e
        row = row if isinstance(row, dict) else {}
        wrong = [key for key in COUNTS if not isinstance(row.get(key), int | float)]
        if wrong or not isinstance(row.get("dropped"), dict) or row["round"] != number:
            expected = (
                f'a number "{wrong[0]}"'
                if wrong
                else f'round {number}, and "dropped" by reason'
            )
            raise SettingsError(
                f"{file}, line {number} is damaged: expected {expected}; is it a run's metrics.jsonl?"
            )
        rows.append(row)
    return rows


def _last_evaluation(r: Run, function: str) -> dict[str, np.ndarray]:
    """What every client measured at the last evaluation, or fine-tuning, that clients.parquet has."""
    import pyarrow as pa

    try:
        table = read_clients(r.folder, function, up_to=len(r.rows))
        columns = {name: table[name].to_numpy() for name in table.column_names}
        if not len(table):
            return {}
        wanted = (columns["round"] == columns["round"].max()) & (
            columns["num_examples"] > 0
        )
    except (OSError, KeyError, pa.ArrowException) as e:
        r.notes.append(
            f"clients.parquet cannot be read ({_brief(e)}): the spread over clients is not drawn."
        )
        return {}
    columns.pop("function")
    return {name: values[wanted] for name, values in columns.items()}


def _describe(r: Run) -> None:
    """Fill in what only the method and the task know, as far as they are at hand."""
    from fedcore import method as methods
    from fedcore.config import Experiment
    from fedcore.tasks import build_task

    try:
        e = Experiment.parse(r.settings, source=str(r.folder / "config.toml"))
        module = sys.modules[methods.load(e.method.name).__module__]
        r.reference = (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        r.personal = e.build_method().personalises()
        if not _at_hand(e.task, e.data_folder):
            return
        data = build_task(e).data
    except (
        FedcoreError
    ) as error:  # the method or the data may lie elsewhere than when the run was made
        r.notes.append(f"Not drawn: how the data is spread over clients. {error}")
        return
    r.population = data.population
    if (
        not data.y.is_floating_point()
        and data.y.ndim == 1
        and data.population <= PARTITION_LIMIT
    ):
        r.label_counts = data.label_counts(int(data.y.max()) + 1)


def _at_hand(task: str, data_folder: Path | None) -> bool:
    """Whether a bundled task can be built in a moment and without asking the hub: a report downloads nothing."""
    if task in ("digits", "least-squares", "weighted-least-squares"):
        return True
    local = (
        data_folder is not None
        or "FEDCORE_DATA" in os.environ
        or Path("/usr/share/datasets", task).exists()
    )
    return task in ("fashion-mnist", "cifar10") and local


def _params_sha256(r: Run) -> str | None:
    """Of the last round's parameters, as `fedcore run --json` prints it; None where the checkpoint is gone or older."""
    from fedcore.rounds.result import params_sha256

    checkpoint = Checkpoint(r.folder / "checkpoint")
    try:
        if (
            not r.done
            or not checkpoint.exists()
            or checkpoint.read()["round"] != len(r.rows)
        ):
            return None
        server = checkpoint.part("server")
    except FedcoreError:
        return None
    params = {
        path.removeprefix("params/"): x
        for path, x in server.items()
        if path.startswith("params/")
    }
    return params_sha256(params) if params else None


# Plots


def new_figure(width: float = 4.7, height: float = 2.9) -> tuple[Figure, Axes]:
    """Small, so that its text stays readable on a phone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def inline(figure: Figure, label: str) -> Markup:
    """The figure as SVG inside a page, in the page's font and colours; `label` is read to those who cannot see it."""
    text = svg(figure)
    text = text[text.index("<svg") :]
    # Ids are unique in a page, not only in a figure.
    prefix = re.sub(r"\W+", "-", label.lower())[:60]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for name, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{name})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(
        r"font: ((?:[a-z]+ )*)([\d.]+px) [^;\"]*", r"font: \1\2 inherit", text
    )
    text = re.sub(r'<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(
        r'<svg ([^>]*?)\bheight="[^"]*"',
        rf'<svg \1role="img" aria-label="{escape(label)}"',
        text,
        count=1,
    )
    return Markup(text)


def svg(figure: Figure, **options: Any) -> str:
    """The figure as an SVG file, without what would change from one drawing to the next."""
    out = io.StringIO()
    figure.savefig(
        out,
        format="svg",
        metadata={"Date": None, "Creator": None},
        **{"transparent": True, **options},
    )
    return out.getvalue()


def plot(figure: Figure, title: str, caption: str, wide: bool = False) -> Plot:
    return Plot(title, caption, inline(figure, f"{title}: {caption}"), wide)


def thin(points: Sequence[Any]) -> list[Any]:
    """At most POINTS of them, evenly, the last one included."""
    if len(points) <= POINTS:
        return list(points)
    return [
        points[i] for i in np.linspace(0, len(points) - 1, POINTS).round().astype(int)
    ]


def ticks(integer: bool) -> MaxNLocator:
    return MaxNLocator(6, integer=integer, steps=[1, 2, 5, 10])


def shape_axes(axes: Axes, measure: str, values: Sequence[float], right: float) -> None:
    """x from 0 to `right`; accuracy in percent, a loss that spans two orders of magnitude on a log scale."""
    if measure == "accuracy":
        low, high = min(values), max(values)
        room = max(0.06 * (high - low), 0.01)
        axes.set_ylim(max(low - room, -0.02), min(high + 1.5 * room, 1.02))
        axes.yaxis.set_major_formatter(
            PercentFormatter(1, decimals=0 if high - low > 0.04 else 1)
        )
    elif min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(ticks(integer=axes.get_xlabel() == "round"))
    axes.set_xlim(0, right)


def value_text(measure: str, value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.{digits}%}"
        if measure == "accuracy"
        else f"{value:.{3 if digits == 0 else 4}g}"
    )


def _learning(r: Run) -> list[Plot]:
    """Every test metric against rounds and against bytes, the one that the run is judged by first."""
    sent = np.cumsum([row["bytes_down"] + row["bytes_up"] for row in r.rows])
    names = {
        key.removeprefix("test_")
        for row in r.rows
        for key in row
        if key.startswith("test_")
    }
    plots = []
    for measure in sorted(names | {"loss"}, key=lambda name: (name != r.measure, name)):
        test = thin(
            [
                (row["round"], row[f"test_{measure}"])
                for row in r.rows
                if row.get(f"test_{measure}") is not None
            ]
        )
        train = thin(
            [
                (row["round"], row[f"train_{measure}"])
                for row in r.rows
                if row.get(f"train_{measure}") is not None
            ]
        )
        if not test and not train:
            continue
        figure, axes = new_figure()
        axes.set(xlabel="round", ylabel=measure)
        if train:
            axes.plot(
                *zip(*train, strict=True),
                color=SERIES[9],
                linewidth=1.1,
                marker="o" if len(train) == 1 else "",
                label="training, mean over the cohort",
            )
        caption = "Training: the cohort's own mean while it trains."
        shape_axes(
            axes,
            measure,
            [value for _, value in test + train],
            LABEL_ROOM * max(t for t, _ in test + train),
        )
        if test:
            _line(axes, test, measure, "test set")
            caption = (
                f"On the test set, {value_text(measure, test[-1][1])} at the end."
                + (f" {caption}" if train else "")
            )
        if train and test:
            figure.legend(loc="outside upper left", ncols=2)
        plots.append(
            plot(
                figure, f"{'Test ' if test else 'Training '}{measure} by round", caption
            )
        )
        if test and sent[-1] > 0:
            figure, axes = new_figure()
            size, name = byte_unit(sent[-1])
            axes.set(xlabel=f"{name} sent", ylabel=measure)
            shape_axes(
                axes,
                measure,
                [value for _, value in test],
                LABEL_ROOM * sent[test[-1][0] - 1] / size,
            )
            _line(
                axes,
                [(sent[t - 1] / size, value) for t, value in test],
                measure,
                "test set",
            )
            caption = "Models and updates of all clients, both directions, without protocol overhead."
            plots.append(plot(figure, f"Test {measure} by {name} sent", caption))
    return plots


def _line(
    axes: Axes, points: Sequence[tuple[float, float]], measure: str, label: str
) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=SERIES[0], marker="o" if len(x) <= 40 else "", label=label)
    axes.annotate(
        value_text(measure, y[-1]),
        (x[-1], y[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        annotation_clip=False,
    )


def _clients(r: Run) -> list[Plot]:
    """The measure on each client's own data: over rounds, and at the last evaluation."""
    plots = []
    on = "held-out examples" if r.settings.get("holdout", 0) else "examples"
    found = [(row["round"], row.get(f"client_{r.measure}") or {}) for row in r.rows]
    points = thin(
        [
            (t, c["p10"], c["mean"], c["p90"])
            for t, c in found
            if None not in (c.get("mean"), c.get("p10"), c.get("p90"))
        ]
    )
    if points:
        x, low, middle, high = zip(*points, strict=True)
        figure, axes = new_figure()
        axes.set(xlabel="round", ylabel=r.measure)
        mark = "o" if len(x) <= 40 else ""
        axes.fill_between(
            x,
            low,
            high,
            color=SERIES[0],
            alpha=0.2,
            linewidth=0,
            label="10th to 90th percentile",
        )
        axes.plot(x, middle, color=SERIES[0], marker=mark, label="mean over clients")
        if len(x) == 1:  # a band needs two points; one gets a bar
            axes.vlines(x, low, high, color=SERIES[0], alpha=0.4, linewidth=6)
        shape_axes(axes, r.measure, [*low, *high], 1.02 * x[-1])
        figure.legend(loc="outside upper left", ncols=2)
        caption = f"The model on every client's own {on}: what a client gets, which the mean over all test examples hides."
        plots.append(
            plot(figure, f"{r.measure.capitalize()} of single clients", caption)
        )
    for measured, after in ((r.clients, ""), (r.tuned, " after fine-tuning")):
        values = measured.get(r.measure, np.array([]))
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        figure, axes = new_figure()
        t = int(measured["round"][0])
        percent = r.measure == "accuracy"
        axes.hist(
            values,
            bins=np.linspace(0, 1, 21).tolist() if percent else 30,
            color=SERIES[0],
            alpha=0.85,
            rwidth=0.92,
        )
        low, high = np.quantile(values, [0.1, 0.9])
        for value, style, label in (
            (values.mean(), "-", "mean"),
            (low, ":", "10th and 90th percentile"),
            (high, ":", None),
        ):
            axes.axvline(
                value, color=SERIES[1], linestyle=style, linewidth=1.6, label=label
            )
        axes.set(xlabel=f"{r.measure} on own {on}", ylabel="clients")
        axes.yaxis.set_major_locator(ticks(integer=True))
        if percent:
            axes.set_xlim(-0.01, 1.01)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        figure.legend(loc="outside upper left", ncols=2)
        caption = f"After round {t}{after and ' and fine-tuning'}, {len(values):,} clients, each counted once: "
        mean, deviation = (
            value_text(r.measure, float(x)) for x in (values.mean(), values.std())
        )
        marks = zip(
            PERCENTILES,
            np.quantile(values, [p / 100 for p in PERCENTILES]).tolist(),
            strict=True,
        )
        percentiles = ", ".join(
            f"{p}: {value_text(r.measure, value)}" for p, value in marks
        )
        caption += (
            f"mean {mean}, standard deviation {deviation}; percentiles {percentiles}."
        )
        if percent:
            worst = np.sort(values)[: -(-len(values) // 10)]
            caption += f" The worst tenth has {value_text(r.measure, float(worst.mean()))} on average."
        plots.append(plot(figure, f"Spread over clients{after}", caption))
    return plots


def _method(r: Run) -> list[Plot]:
    """What the method logged on the server, a plot a number, or a list of them; and the deviation from a known optimum."""
    plots = []
    for key in sorted(
        {
            key
            for row in r.rows
            for key in row
            if key.startswith("server_") or key == "nmsd_db"
        }
    ):
        points = thin(
            [(row["round"], row[key]) for row in r.rows if _drawable(row.get(key))]
        )
        if not points:
            continue
        figure, axes = new_figure()
        name = {"nmsd_db": "NMSD in dB"}.get(key) or key.removeprefix(
            "server_"
        ).replace("_", " ")
        name = name[0].upper() + name[1:]
        axes.set(xlabel="round", ylabel=name)
        mark = "o" if len(points) <= 40 else ""
        if isinstance(points[-1][1], list):
            x = [t for t, _ in points]
            bands = np.array(
                [np.quantile(values, [0, 0.1, 0.5, 0.9, 1]) for _, values in points]
            ).T
            axes.fill_between(
                x,
                bands[0],
                bands[4],
                color=SERIES[4],
                alpha=0.15,
                linewidth=0,
                label="least to largest",
            )
            axes.fill_between(
                x,
                bands[1],
                bands[3],
                color=SERIES[4],
                alpha=0.3,
                linewidth=0,
                label="10th to 90th percentile",
            )
            axes.plot(x, bands[2], color=SERIES[4], marker=mark, label="median")
            figure.legend(loc="outside upper left", ncols=2)
            shape_axes(axes, name, [*bands[0], *bands[4]], 1.02 * x[-1])
            caption = f"Logged by the method, of each client; between {bands[0][-1]:.3g} and {bands[4][-1]:.3g} at the end."
        else:
            axes.plot(*zip(*points, strict=True), color=SERIES[4], marker=mark)
            shape_axes(axes, name, [value for _, value in points], 1.02 * points[-1][0])
            caption = f"Logged by the method; {points[-1][1]:.4g} at the end."
            if key == "nmsd_db":
                caption = f"Mean square deviation of the clients' models from the optimum; {points[-1][1]:.2f} dB at the end."
        plots.append(plot(figure, f"{name} by round", caption))
    return plots


def _drawable(value: Any) -> bool:
    """A number, or a list of them; null stands for what was not finite."""
    return (
        None not in value and value != []
        if isinstance(value, list)
        else value is not None
    )


def _rounds(r: Run) -> list[Plot]:
    """Who took part, and how long it took."""
    if not r.rows:
        return []
    groups = [
        r.rows[part[0] : part[-1] + 1]
        for part in np.array_split(np.arange(len(r.rows)), min(len(r.rows), BARS))
    ]
    x = np.array([np.mean([row["round"] for row in group]) for group in groups])
    width = 0.86 * len(r.rows) / len(groups)
    main = [reason for reason, _ in _dropped(r.rows).most_common(REASONS)]
    figure, axes = new_figure(height=2.9 + 0.12 * len(main))
    bottom = np.zeros(len(groups))
    layers = {"usable update": [row["reports"] for row in r.rows]}
    layers |= {
        reason: [row["dropped"].get(reason, 0) for row in r.rows] for reason in main
    }
    layers["other reasons"] = [
        sum(n for reason, n in row["dropped"].items() if reason not in main)
        for row in r.rows
    ]
    for number, (label, counts) in enumerate(layers.items()):
        heights = np.array(
            [np.mean(group) for group in np.array_split(counts, len(groups))]
        )
        if number == 0 or heights.any():
            axes.bar(
                x,
                heights,
                width,
                bottom,
                color=SERIES[number],
                linewidth=0,
                label=_short(label),
            )
            bottom += heights
    asked = np.array([np.mean([row["cohort"] for row in group]) for group in groups])
    edges = np.append(x - width / 1.72, x[-1] + width / 1.72)
    axes.stairs(asked, edges, color=INK, linewidth=1.2, label="asked", baseline=None)
    skipped = [row["round"] for row in r.rows if row.get("skipped")]
    if skipped:
        axes.plot(
            skipped,
            np.zeros(len(skipped)),
            "x",
            color=SERIES[5],
            clip_on=False,
            label="skipped",
            zorder=4,
        )
    axes.set(
        xlabel="round",
        ylabel="clients",
        xlim=(0, len(r.rows) + 1),
        ylim=(0, max(asked.max(), bottom.max(), 1) * 1.05),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticks(integer=True))
    figure.legend(loc="outside upper left", ncols=2)
    caption = "Each round: clients asked, clients whose update was used, and the others by reason."
    if len(groups) < len(r.rows):
        caption += f" Means over {len(r.rows) // len(groups)} or so rounds."
    plots = [plot(figure, "Who took part", caption)]

    times = thin([(row["round"], row["seconds"]) for row in r.rows])
    figure, axes = new_figure()
    axes.set(xlabel="round", ylabel="seconds")
    axes.plot(
        *zip(*times, strict=True),
        color=SERIES[2],
        marker="o" if len(times) <= 40 else "",
    )
    seconds = np.array([row["seconds"] for row in r.rows])
    middle = float(np.median(seconds))
    if seconds.min() > 0 and seconds.max() > 8 * middle:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, float(seconds.max()) * 1.1 or 1)
    axes.set_xlim(0, len(r.rows) + 1)
    axes.xaxis.set_major_locator(ticks(integer=True))
    caption = f"Median {time_text(middle)}, without evaluation."
    if r.rows[0].get("first_round_s"):
        caption += f" From start to the end of the first round, with everything loaded: {time_text(r.rows[0]['first_round_s'])}."
    return [*plots, plot(figure, "Seconds a round", caption)]


def _partition(r: Run) -> list[Plot]:
    from fedcore.data.plot import partition_figure

    if r.label_counts is None:
        return []
    figure = partition_figure(r.label_counts, "")
    figure.set_size_inches(5.2, 3.9)
    sizes = r.label_counts.sum(1)
    partition = r.settings.get("partition", {})
    caption = f"{_given(partition)}; {sizes.min():,} to {sizes.max():,} examples a client, median {np.median(sizes):,.0f}."
    return [
        plot(
            figure,
            "How classes and examples are spread over clients",
            caption[0].upper() + caption[1:],
            wide=True,
        )
    ]


# Words


def _summary(r: Run) -> str:
    s, rows = r.settings, r.rows
    image = s["task"] in ("digits", "fashion-mnist", "cifar10")
    model = f" ({s['model']['name']})" if image and "name" in s.get("model", {}) else ""
    text = f"{s['method']['name']} trained a model{model} on {s['task']}"
    if r.population:
        text += f", whose examples are spread over {r.population:,} clients"
        text += f" ({_given(s['partition'])})" if image and "partition" in s else ""
    if not rows:
        return f"{text}. No round is done yet."
    cohorts = [row["cohort"] for row in rows]
    same = min(cohorts) == max(cohorts)
    text += (
        f". {cohorts[0]:,}"
        if same
        else f". Between {min(cohorts):,} and {max(cohorts):,}"
    )
    text += f" of them {'was' if cohorts[0] == 1 and same else 'were'} asked in {_each(len(rows))}."
    test, loss = r.last(f"test_{r.measure}"), r.last("test_loss")
    if test is not None:
        whose = (
            "With the server's parameters alone a client that never took part"
            if r.personal
            else "The server's model"
        )
        text += f" {whose} reaches {value_text(r.measure, test)} test {r.measure}"
        text += (
            f" (loss {loss:.4g})." if r.measure != "loss" and loss is not None else "."
        )
    elif (r.last("client_loss") or r.last("client_accuracy")) is None:
        text += " It has not been evaluated yet."
    clients = r.last(f"client_{r.measure}") or {}
    if None not in (clients.get("mean"), clients.get("p10"), clients.get("p90")):
        mean, low, high = (
            value_text(r.measure, clients[key]) for key in ("mean", "p10", "p90")
        )
        text += f" Clients differ: on their own examples the mean {r.measure} is {mean}, a tenth of them are at {low} or below"
        text += f" and a tenth at {high} or above."
        if (worst := clients.get("lowest_tenth")) is not None:
            text += f" The worst tenth has {value_text(r.measure, worst)} on average."
    tuned = r.last(f"finetuned_{r.measure}") or {}
    if None not in (tuned.get("mean"), tuned.get("lowest_tenth")):
        mean, worst = (
            value_text(r.measure, tuned[key]) for key in ("mean", "lowest_tenth")
        )
        text += f" After fine-tuning on each client the mean is {mean}, and that of the worst tenth {worst}."
    asked, used = r.total("cohort"), r.total("reports")
    lost = sum(_dropped(rows).values())
    if lost:
        text += (
            f" Of {asked:,.0f} requests to clients, {lost:,} brought no usable update."
        )
    elif used:
        text += f" All {asked:,.0f} requests to clients brought a usable update."
    if late := sum(row.get("late_answers", 0) for row in rows):
        text += f" {late:,} answer{'s' if late > 1 else ''} came after the round had ended, and changed nothing."
    if skipped := sum(bool(row.get("skipped")) for row in rows):
        text += f" {skipped} round{'s' if skipped > 1 else ''} had too few reports and left the model as it was."
    return text


def _each(rounds: int) -> str:
    return "the one round" if rounds == 1 else f"each of {rounds:,} rounds"


def _facts(r: Run) -> list[Fact]:
    key = f"test_{r.measure}"
    at: dict[str, Any] = next(
        (row for row in reversed(r.rows) if row.get(key) is not None), {}
    )
    detail = f"after round {at['round']}" if at else "not evaluated yet"
    if r.measure != "loss" and at.get("test_loss") is not None:
        detail += f", loss {at['test_loss']:.4g}"
    name = (
        "unseen client"
        if r.personal and at
        else f"test {r.measure if at else 'result'}"
    )
    facts = [
        Fact(
            name,
            value_text(r.measure, at.get(key)),
            f"on the test set {detail}" if r.personal and at else detail,
        )
    ]
    if clients := r.last(f"client_{r.measure}"):
        low, high = (
            value_text(r.measure, clients.get(key), 0) for key in ("p10", "p90")
        )
        mean = value_text(r.measure, clients.get("mean"))
        if r.personal:
            facts.insert(
                0,
                Fact(
                    "single clients",
                    mean,
                    f"on average; 10th to 90th percentile {low} to {high}",
                ),
            )
        else:
            facts.append(
                Fact(
                    "single clients",
                    f"{low} to {high}",
                    f"10th to 90th percentile, mean {mean}",
                )
            )
    cohort = r.total("cohort") / max(len(r.rows), 1)
    of = f" of {r.population:,}" if r.population else ""
    facts.append(
        Fact(
            "rounds",
            f"{len(r.rows):,}"
            if r.done
            else f"{len(r.rows):,} of {r.settings['rounds']:,}",
            f"{count_text(cohort)}{of} clients each",
        )
    )
    down, up = r.total("bytes_down"), r.total("bytes_up")
    facts.append(
        Fact(
            "sent", size_text(down + up), f"{size_text(down)} down, {size_text(up)} up"
        )
    )
    if spent := r.last("privacy"):
        facts.append(Fact("privacy", *describe(spent)))
    seconds = r.total("seconds")
    evaluation = sum(row.get("evaluation_s") or 0 for row in r.rows)
    speed = r.total("reports") / seconds if seconds else 0
    facts.append(
        Fact(
            "time",
            time_text(seconds + evaluation),
            f"{speed:,.0f} clients a second"
            if speed >= 10
            else f"{speed:.2g} clients a second",
        )
    )
    return facts


def count_text(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 or n == round(n) else f"{n:.1f}"


def time_text(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    )


def _command(r: Run) -> str:
    file = str(r.folder / "config.toml")
    if r.settings.get("engine", {}).get("name") == "grid":
        return f"flwr run . --run-config {shlex.quote(f'preset={json.dumps(file)}')}"
    return f"fedcore run {shlex.quote(file)}"


def _evaluations(r: Run) -> list[list[str]]:
    """A table, its head first; empty without an evaluation."""
    tests = sorted({key for row in r.rows for key in row if key.startswith("test_")})
    spreads = sorted(
        {
            key
            for row in r.rows
            for key, value in row.items()
            if key.startswith("client_") and isinstance(value, dict)
        }
    )
    sent = np.cumsum([row["bytes_down"] + row["bytes_up"] for row in r.rows])
    head = ["round", "sent", *(key.replace("_", " ") for key in tests)]
    head += [
        f"{key.replace('_', ' ')} {part}"
        for key in spreads
        for part in ("mean", "p10", "p90")
    ]
    body = []
    for row in thin(
        [row for row in r.rows if any(key in row for key in (*tests, *spreads))]
    ):
        line = [str(row["round"]), size_text(float(sent[row["round"] - 1]))]
        line += [
            value_text(key.removeprefix("test_"), row.get(key), 2) for key in tests
        ]
        for key in spreads:
            line += [
                value_text(
                    key.removeprefix("client_"), (row.get(key) or {}).get(part), 2
                )
                for part in ("mean", "p10", "p90")
            ]
        body.append(line)
    return [head, *body] if body else []


def _dropped(rows: list[dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["dropped"])
    return total


def _given(section: dict[str, Any]) -> str:
    """`dirichlet partition, alpha 0.3`"""
    facts = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in section.items()
        if key != "name"
    ]
    return ", ".join([f"{section.get('name')} partition", *facts])


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _brief(error: Exception) -> str:
    return _short(str(error).partition("\n")[0] or type(error).__name__, 80)
