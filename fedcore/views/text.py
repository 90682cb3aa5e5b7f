"""Numbers and tables as text, for terminals and pages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from fedcore.escapes import escaped

__all__ = [
    "PERCENT",
    "count_text",
    "direction_text",
    "rate_text",
    "share_text",
    "shortened",
    "table_text",
    "time_text",
    "value_text",
]


PERCENT = ("accuracy", "token_accuracy")  # measures that are shown in percent


def table_text(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The rows as lines, in columns that are two spaces apart.

    The first `left` columns are flush left and the others flush right. Nothing is cut
    or wrapped, so that a program reads the lines as well as a person.

    >>> print(table_text([["", "accuracy"], ["fedavg", "81.2%"], ["fedau", "9.5%"]]))
            accuracy
    fedavg     81.2%
    fedau       9.5%
    """
    rows = [[escaped(text) for text in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (text, width) in enumerate(zip(row, widths, strict=True)):
            room = " " * (width - cell_len(text))
            cells.append(text + room if number < left else room + text)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def value_text(measure: str, value: float | None, digits: int = 1) -> str:
    """An accuracy in percent, any other measure to four digits; three without decimals.

    >>> value_text("accuracy", 0.8123), value_text("loss", 0.81234)
    ('81.2%', '0.8123')
    >>> value_text("loss", None)
    '-'
    """
    if value is None:
        return "-"
    if measure in PERCENT:
        return f"{value:.{digits}%}"
    significant = 3 if digits == 0 else 4
    return f"{value:.{significant}g}"


def count_text(n: float) -> str:
    """A mean number of things, with a decimal only where it says something.

    >>> count_text(1234.5), count_text(20.0), count_text(3.25)
    ('1,234', '20', '3.2')
    """
    return f"{n:,.0f}" if n >= 100 or n == round(n) else f"{n:.1f}"


def direction_text(measure: str, is_higher_better: bool) -> str:
    """The measure, and which way is better where its name does not say so.

    >>> direction_text("accuracy", True), direction_text("mae", False)
    ('accuracy', 'mae (lower is better)')
    """
    if measure in ("accuracy", "loss"):
        return measure
    return f"{measure} ({'higher' if is_higher_better else 'lower'} is better)"


def share_text(share: float | None) -> str:
    """A share in percent.

    >>> share_text(0.166), share_text(0.0), share_text(None)
    ('16.6%', '0%', '-')
    """
    if share is None:
        return "-"
    return f"{100 * share:.3g}%"


def rate_text(clients_per_second: float) -> str:
    """`History.clients_per_second` as every view shows it.

    >>> rate_text(1234.5), rate_text(0.123), rate_text(293.4996)
    ('1,234', '0.12', '294')
    """
    # To the digits that a result keeps: else its last one could be rounded otherwise.
    rate = round(clients_per_second, 2)
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def time_text(seconds: float) -> str:
    """Seconds in the unit that a person would choose.

    >>> time_text(0.0123), time_text(90), time_text(9000)
    ('12.3 ms', '90 s', '2 h 30 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def shortened(text: str, most: int = 24) -> str:
    """The text, or its beginning and an ellipsis where it is longer than `most`.

    >>> shortened("a reason of many words", most=9)
    'a reason…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"
