"""Figures as they are drawn on every page and in every picture file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from fedcore.escapes import printable
from fedcore.views.page import THEME
from fedcore.views.text import PERCENT

__all__ = [
    "INK",
    "LABEL_ROOM",
    "LINE",
    "SERIES",
    "SOFT",
    "STYLE",
    "Plot",
    "log_scale",
    "mark_of",
    "new_figure",
    "plot",
    "shape_axes",
    "svg",
    "thin",
    "ticks",
    "time_unit",
]

T = TypeVar("T")

INK, SOFT, LINE = (THEME[name][0] for name in ("ink", "soft", "line"))
SERIES = [THEME[f"s{n}"][0] for n in range(10)]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text can be selected, and takes the page's font
    "svg.hashsalt": "fedcore",  # the same plot has the same bytes
    "text.parse_math": False,  # a name may hold a dollar sign
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
MARKED = 40  # points of a curve up to which each has a mark
LABEL_ROOM = 1.15  # of the last x, for the number beside the last point


class Plot(NamedTuple):
    """A figure in a page."""

    title: str
    caption: str
    picture: Markup
    wide: bool = False


def new_figure(width: float = 4.7, height: float = 2.9) -> tuple[Figure, Axes]:
    """A figure of `width` by `height` inches and its only axes.

    Small, so that its text stays readable on a phone.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plot(figure: Figure, title: str, caption: str, wide: bool = False) -> Plot:
    return Plot(title, caption, _inline(figure, f"{title}: {caption}"), wide)


def svg(figure: Figure, **options: Any) -> str:
    """The figure as an SVG file that is the same each time it is drawn."""
    out = io.StringIO()
    settings: dict[str, Any] = {"transparent": True} | options
    undated = {"Date": None, "Creator": None}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(printable(text.get_text()))
    with warnings.catch_warnings():
        # The reader's fonts show the text; those here only measure it.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(out, format="svg", metadata=undated, **settings)
    return out.getvalue()


def _inline(figure: Figure, label: str) -> Markup:
    """The figure as SVG in the page's font and colours.

    `label` is read to those who cannot see the figure.
    """
    text = svg(figure)
    text = text[text.index("<svg") :]
    # Ids are unique in a page, not only in a figure.
    prefix = re.sub(r"\W+", "-", label.lower())[:60]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for name, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{name})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    font = r"font: ((?:[a-z]+ )*)([\d.]+px) [^;\"]*"
    text = re.sub(font, r"font: \1\2 inherit", text)
    # The page sets the width, and the height follows.
    text = re.sub(r'<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", text, count=1)

    def described(before: str) -> str:
        return f'<svg {before}role="img" aria-label="{escape(label)}"'

    tall = r'<svg ([^>]*?)\bheight="[^"]*"'
    text = re.sub(tall, lambda found: described(found[1]), text, count=1)
    return Markup(text)


def thin(points: Sequence[T]) -> list[T]:
    """At most POINTS of them, evenly spaced, with the last one."""
    if len(points) <= POINTS:
        return list(points)
    kept = np.linspace(0, len(points) - 1, POINTS).round().astype(int)
    return [points[i] for i in kept]


def mark_of(points: Sequence[Any]) -> str:
    """The marker of a curve's points; none where there are many."""
    return "o" if len(points) <= MARKED else ""


def ticks(integer: bool) -> MaxNLocator:
    return MaxNLocator(6, integer=integer, steps=[1, 2, 5, 10])


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds of the unit in which this long a time is drawn, its name).

    >>> time_unit(90.0), time_unit(9000.0)
    ((1.0, 's'), (60.0, 'minutes'))
    """
    units = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0}
    for name, size in units.items():
        if seconds >= 4 * size:
            return size, name
    return 1.0, "s"


def log_scale(axes: Axes, of: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis whose numbers are written out."""
    axes.set(**{f"{of}scale": "log"})
    axis = axes.xaxis if of == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def shape_axes(axes: Axes, measure: str, values: Sequence[float], right: float) -> None:
    """Set x from 0 to `right`, and y as `measure` and its values need it.

    An accuracy is in percent, and a measure that spans two orders of magnitude on a
    logarithmic scale.
    """
    low, high = min(values), max(values)
    if measure in PERCENT:
        room = max(0.06 * (high - low), 0.01)
        axes.set_ylim(max(low - room, -0.02), min(high + 1.5 * room, 1.02))
        decimals = 0 if high - low > 0.04 else 1
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))
    elif low > 0 and high > 100 * low:
        log_scale(axes)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(ticks(integer=axes.get_xlabel() == "round"))
    axes.set_xlim(0, right)
