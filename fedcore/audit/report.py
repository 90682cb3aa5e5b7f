"""audit.json and audit.html: what an audit found, for scripts and for people. The terminal shows the page's table and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.audit.examine import Audit
from fedcore.checkpoint import write_atomically
from fedcore.errors import SettingsError
from fedcore.privacy import describe

LEVELS = {  # in the order of the table
    "class means": "class means, labels known",
    "mean image": "mean image",
    "another client": "another client's images",
    "blank": "blank image",
    "start noise": "start noise",
}


def write(a: Audit, folder: Path, command: Sequence[str]) -> Path:
    """Write both files, for the owner alone, and return audit.html. Raises SettingsError when they cannot be written."""
    files = {"audit.json": json.dumps(ready(a), indent=1, allow_nan=False)}
    try:
        for name, content in files.items():
            write_atomically(folder / name, content.encode())
            (folder / name).chmod(0o600)
    except OSError as e:
        raise SettingsError(f"{folder} cannot be written to: {e.strerror}") from e
    return folder / "audit.html"


def ready(a: Audit) -> dict[str, Any]:
    """The audit as JSON, which has no NaN and no infinity: null stands for them."""
    found: dict[str, Any] = _finite(a.to_dict())
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def too_high(a: Audit, limit: float) -> str | None:
    """Why --fail-above fails; None where it does not."""
    worst = a.worst
    if worst["input_leakage"] is None:
        return f"--fail-above {limit:g}: nothing was scored, so nothing can be said of input leakage"
    if worst["input_leakage"] <= limit:
        return None
    return (
        f"input leakage {worst['input_leakage']:.1f} of client {worst['client']} ({worst['cell']}) is above --fail-above {limit:g}"
    )


def show(a: Audit, file: Path) -> None:
    """The table and the verdict, on stdout."""
    body = table(a)
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    for first, *others in body:
        print("  ".join([first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(others, widths[1:], strict=True))]).rstrip())
    print(f"report: {file}")


# Tables


def table(a: Audit) -> list[list[str]]:
    """Its head first."""
    return _by_defence(a) if a.mode == "defences" else _by_attack(a)


def _by_attack(a: Audit) -> list[list[str]]:
    """A row a cell and attack, then what nobody needs the update for; columns that nobody fills are left out."""
    head = ["", "attack", "PSNR dB [95 % CI]", "SSIM", "found", "alpha", "objective", "labels", "members AUC"]
    body = []
    for cell in a.cells:
        beside = [_stat(cell["summary"].get("labels"), "{:.0%}"), _stat(cell["summary"].get("membership"), "{:.2f}")]
        lines = [[name, *_attack(cell, name)] for name in attacks(cell)]
        lines += [
            [LEVELS[name], f"{level['psnr']:.1f}", f"{level['ssim']:.2f}", "", "", ""]
            for name in LEVELS
            if (level := cell["summary"]["references"].get(name)) is not None
        ]
        lines = lines or [["-", *[""] * 5]]
        body += [[cell["name"] if i == 0 else "", *line, *(beside if i == 0 else ["", ""])] for i, line in enumerate(lines)]
    used = [i for i in range(len(head)) if i < 2 or any(row[i].strip("-") for row in body)]
    return [[row[i] for i in used] for row in (head, *body)]


def attacks(cell: dict[str, Any]) -> list[str]:
    """Those that rebuilt images of a cell, in the order of the plan."""
    return list(dict.fromkeys(name for c in cell["clients"] for name, facts in c["attacks"].items() if facts["ok"]))


def _attack(cell: dict[str, Any], name: str) -> list[str]:
    """PSNR, SSIM, top-1, alpha, objective of one attack, means over the cell's clients."""
    rows = of_attack(cell, name)
    scores = cell["summary"]["attacks"].get(name, {})
    optimised = any(facts["curve"] for facts in rows)
    alpha = _average([facts.get("alpha") for facts in rows])
    objective = _average([facts["objective"] for facts in rows]) if optimised else None
    return [
        psnr_text(scores.get("psnr")),
        _stat(scores.get("ssim"), "{:.2f}"),
        _stat(scores.get("top1"), "{:.0%}"),
        "-" if alpha is None else f"{alpha:.2f}",
        "-" if objective is None else f"{objective:.4f}",
    ]


def of_attack(cell: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What the attack found, by client."""
    return [c["attacks"][name] for c in cell["clients"] if c["attacks"].get(name, {}).get("ok")]


def _by_defence(a: Audit) -> list[list[str]]:
    """A row a defence."""
    head = ["defence", "best attack", "PSNR dB", "SSIM", "labels", "members AUC", "grade", "accuracy", "epsilon"]
    body = []
    for cell in a.cells:
        s = cell["summary"]
        best = s["attacks"].get(s["best"], {})
        body.append(
            [
                cell["name"],
                s["best"] or "-",
                psnr_text(best.get("psnr")),
                _stat(best.get("ssim"), "{:.2f}"),
                _stat(s.get("labels"), "{:.0%}"),
                _stat(s.get("membership"), "{:.2f}"),
                worst_grade(cell["clients"]) or "unscored",
                "-" if cell["accuracy"] is None else f"{cell['accuracy']:.1%}",
                epsilon_text(cell["privacy"]),
            ]
        )
    return [head, *body]


def epsilon_text(privacy: dict[str, Any] | None) -> str:
    """What an accountant says of the view under audit: an epsilon of the global model says nothing of a client's update."""
    if privacy is None:
        return "-"
    if privacy["view"] != "client_update":
        return "global model only"
    return describe(privacy)[0].removeprefix("epsilon ")


def worst_grade(clients: Sequence[dict[str, Any]], of: str | None = None) -> str | None:
    """Of inputs, or of "labels" or "membership"; A is best. None where nothing was scored."""
    found = [c if of is None else c[of] or {} for c in clients]
    return max((grade for facts in found if (grade := facts.get("grade"))), default=None)


def psnr_text(stat: dict[str, Any] | None) -> str:
    if stat is None:
        return "-"
    if stat["low"] is None:
        return f"{stat['mean']:.1f}"
    return f"{stat['mean']:.1f} [{stat['low']:.1f}, {stat['high']:.1f}]"


def _stat(stat: dict[str, Any] | None, form: str) -> str:
    return "-" if stat is None else form.format(stat["mean"])


def _average(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
