"""Tables of an audit, as lists of rows of text, the head first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcore.audit.results import (
    AttackResult,
    Audit,
    CellResult,
    ClientResult,
    Interval,
    Measure,
)
from fedcore.privacy import describe

# Names of the reference levels, in the order of the table.
LEVELS = {
    "class means": "class means, labels known",
    "mean image": "mean image",
    "another client": "another client's images",
    "blank": "blank image",
    "start noise": "start noise",
}
ACCURACY: dict[Measure, str] = {
    "accuracy": "accuracy",
    "client_accuracy": "clients' accuracy",
}
NAMED = 2  # first columns, which stay where they have nothing to say
BY_ATTACK = (
    "",
    "attack",
    "PSNR dB [95 % CI]",
    "SSIM",
    "found",
    "alpha",
    "objective",
    "labels",
    "members AUC",
)


def table(audit: Audit) -> list[list[str]]:
    """A row a defence, or a row a cell and attack."""
    if audit.mode == "defences":
        return _by_defence(audit)
    return _by_attack(audit)


def grouped_table(audit: Audit) -> list[list[str]]:
    """The table for the page: a cell begins with a row of one entry, its name."""
    head, *body = table(audit)
    if audit.mode == "defences":
        return [head, *body]
    rows = [head[1:]]
    for cell, *row in body:
        if cell:
            rows.append([cell])
        rows.append(row)
    return rows


def _by_attack(audit: Audit) -> list[list[str]]:
    """A row a cell and attack, then the levels for which the update is not needed.

    Columns without an entry are left out.
    """
    body = []
    for cell in audit.cells:
        labels = _mean_text(cell["summary"]["labels"], "{:.0%}")
        members = _mean_text(cell["summary"]["membership"], "{:.2f}")
        first = True
        for line in _lines(cell) or [["-", *[""] * 5]]:
            if first:
                body.append([cell["name"], *line, labels, members])
            else:
                body.append(["", *line, "", ""])
            first = False
    rows = [list(BY_ATTACK), *body]
    used = [i for i in range(len(BY_ATTACK)) if i < NAMED or _is_filled(body, i)]
    return [[row[i] for i in used] for row in rows]


def _is_filled(body: Sequence[Sequence[str]], column: int) -> bool:
    return any(row[column].strip("-") for row in body)


def _lines(cell: CellResult) -> list[list[str]]:
    """Name, PSNR, SSIM, top-1, alpha and objective of each attack and each level."""
    lines = [[name, *_attack(cell, name)] for name in attacks_of(cell)]
    for name, text in LEVELS.items():
        level = cell["summary"]["references"].get(name)
        if level is not None:
            lines.append(
                [text, f"{level['psnr']:.1f}", f"{level['ssim']:.2f}", "", "", ""]
            )
    return lines


def _attack(cell: CellResult, name: str) -> list[str]:
    """Means over the cell's clients."""
    results = results_of(cell, name)
    summary = cell["summary"]["attacks"].get(name)
    alpha = mean([result.get("alpha") for result in results])
    objective = None
    if any(result["curve"] for result in results):
        objective = mean([result["objective"] for result in results])
    return [
        psnr_text(summary and summary["psnr"]),
        _mean_text(summary and summary["ssim"], "{:.2f}"),
        _mean_text(summary and summary["top1"], "{:.0%}"),
        "-" if alpha is None else f"{alpha:.2f}",
        "-" if objective is None else f"{objective:.4f}",
    ]


def _by_defence(audit: Audit) -> list[list[str]]:
    head = [
        "defence",
        "best attack",
        "PSNR dB",
        "SSIM",
        "labels",
        "members AUC",
        "grade",
        ACCURACY[audit.judged_by],
        "epsilon",
    ]
    return [head, *[_defence(cell, audit.judged_by) for cell in audit.cells]]


def _defence(cell: CellResult, judged_by: Measure) -> list[str]:
    summary, accuracy = cell["summary"], cell[judged_by]
    best = summary["attacks"].get(summary["best"] or "")
    return [
        cell["name"],
        summary["best"] or "-",
        psnr_text(best and best["psnr"]),
        _mean_text(best and best["ssim"], "{:.2f}"),
        _mean_text(summary["labels"], "{:.0%}"),
        _mean_text(summary["membership"], "{:.2f}"),
        worst_grade(cell["clients"]) or "unscored",
        "-" if accuracy is None else f"{accuracy:.1%}",
        epsilon_text(cell["privacy"]),
    ]


def attacks_of(cell: CellResult) -> list[str]:
    """The attacks that rebuilt images of a cell, in the order of the plan."""
    names: dict[str, None] = {}
    for client in cell["clients"]:
        names |= dict.fromkeys(client["attacks"])
    return [name for name in names if results_of(cell, name)]


def results_of(cell: CellResult, attack: str) -> list[AttackResult]:
    """The results of one attack, by client; of those on which it worked."""
    results = []
    for client in cell["clients"]:
        result = client["attacks"].get(attack)
        if result is not None and result["ok"]:
            results.append(result)
    return results


def epsilon_text(privacy: dict[str, Any] | None) -> str:
    """An accountant's word on the view under audit.

    An epsilon of the global model, or of sums, says nothing of a client's update.
    """
    if privacy is None:
        return "-"
    if privacy["view"] == "secure_sum":
        return "sums only"
    if privacy["view"] != "client_update":
        return "global model only"
    return describe(privacy)[0].removeprefix("epsilon ")


def worst_grade(clients: Sequence[ClientResult]) -> str | None:
    """The worst grade of inputs; A is best. None where nothing was scored."""
    grades = [client["grade"] for client in clients]
    return max((grade for grade in grades if grade is not None), default=None)


def psnr_text(psnr: Interval | None) -> str:
    if psnr is None:
        return "-"
    if psnr["low"] is None:
        return f"{psnr['mean']:.1f}"
    return f"{psnr['mean']:.1f} [{psnr['low']:.1f}, {psnr['high']:.1f}]"


def _mean_text(value: Interval | None, form: str) -> str:
    return "-" if value is None else form.format(value["mean"])


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
