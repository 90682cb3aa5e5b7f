"""audit.json and audit.html: what an audit found, for scripts and for people; and the same in short for the terminal."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter

from fedcore import __version__
from fedcore.audit.examine import IMAGE_ATTACKS, Audit
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.privacy import describe
from fedcore.storage.checkpoint import write_atomically
from fedcore.views.figures import (
    INK,
    SERIES,
    SOFT,
    STYLE,
    Plot,
    new_figure,
    plot,
    ticks,
)
from fedcore.views.page import Fact, render
from fedcore.views.text import time_text

LEVELS = {  # in the order of the table
    "class means": "class means, labels known",
    "mean image": "mean image",
    "another client": "another client's images",
    "blank": "blank image",
    "start noise": "start noise",
}


def write(a: Audit, folder: Path, command: Sequence[str]) -> Path:
    """Write both files, for the owner alone, and return audit.html. Raises SettingsError when they cannot be written."""
    files: dict[str, Callable[[], str]] = {
        "audit.json": lambda: json.dumps(ready(a), indent=1, allow_nan=False),
        "audit.html": lambda: page(a, command),
    }
    try:
        for name, content in files.items():
            write_atomically(folder / name, content().encode())
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
    return f"input leakage {worst['input_leakage']:.1f} of client {worst['client']} ({worst['cell']}) is above --fail-above {limit:g}"


def show(a: Audit, file: Path) -> None:
    """The table and the verdict, on stdout."""
    body = table(a)
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    for row in body:
        cells = [
            text.ljust(w) if i < 2 else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    badge = _badge(a)
    print(f"\n{badge[0].upper()}{badge[1:]}. {_summary(a)}")
    for line in _measured(a):
        print(line)
    if names := [remedy.short for remedy in _advice(a)]:
        print(f"To switch on: {', '.join(names)}.")
    for name, why in a.failed.items():
        print(f"Left out: {name}: {why}")
    for warning in a.warnings:
        print(f"Note: {warning}.")
    print(f"Report: {file}")


# Tables


def table(a: Audit) -> list[list[str]]:
    """Its head first."""
    return _by_defence(a) if a.mode == "defences" else _by_attack(a)


def _by_attack(a: Audit) -> list[list[str]]:
    """A row a cell and attack, then what nobody needs the update for; columns that nobody fills are left out."""
    head = [
        "",
        "attack",
        "PSNR dB [95 % CI]",
        "SSIM",
        "found",
        "alpha",
        "objective",
        "labels",
        "members AUC",
    ]
    body = []
    for cell in a.cells:
        beside = [
            _stat(cell["summary"].get("labels"), "{:.0%}"),
            _stat(cell["summary"].get("membership"), "{:.2f}"),
        ]
        lines = [[name, *_attack(cell, name)] for name in attacks(cell)]
        lines += [
            [LEVELS[name], f"{level['psnr']:.1f}", f"{level['ssim']:.2f}", "", "", ""]
            for name in LEVELS
            if (level := cell["summary"]["references"].get(name)) is not None
        ]
        lines = lines or [["-", *[""] * 5]]
        body += [
            [cell["name"] if i == 0 else "", *line, *(beside if i == 0 else ["", ""])]
            for i, line in enumerate(lines)
        ]
    used = [
        i for i in range(len(head)) if i < 2 or any(row[i].strip("-") for row in body)
    ]
    return [[row[i] for i in used] for row in (head, *body)]


def _grouped(a: Audit) -> list[list[str]]:
    """The table for the page: what begins a cell is a row of its own, of one entry."""
    head, *body = table(a)
    if a.mode == "defences":
        return [head, *body]
    return [
        head[1:],
        *(
            line
            for first, *row in body
            for line in ([[first]] if first else []) + [row]
        ),
    ]


def attacks(cell: dict[str, Any]) -> list[str]:
    """Those that rebuilt images of a cell, in the order of the plan."""
    return list(
        dict.fromkeys(
            name
            for c in cell["clients"]
            for name, facts in c["attacks"].items()
            if facts["ok"]
        )
    )


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
    return [
        c["attacks"][name]
        for c in cell["clients"]
        if c["attacks"].get(name, {}).get("ok")
    ]


ACCURACY = {"accuracy": "accuracy", "client_accuracy": "clients' accuracy"}


def _by_defence(a: Audit) -> list[list[str]]:
    """A row a defence."""
    head = [
        "defence",
        "best attack",
        "PSNR dB",
        "SSIM",
        "labels",
        "members AUC",
        "grade",
        ACCURACY[a.judged_by],
        "epsilon",
    ]
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
                "-" if cell[a.judged_by] is None else f"{cell[a.judged_by]:.1%}",
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
    return max(
        (grade for facts in found if (grade := facts.get("grade"))), default=None
    )


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


# Words

BROKEN = {
    "A": "nothing recognisable came back",
    "B": "little came back",
    "C": "images come back in part",
    "D": "images come back",
}
GIVEN = {
    "A": "not given away",
    "B": "hardly given away",
    "C": "given away in part",
    "D": "given away",
}
TONES = {None: "soft", "A": "good", "B": "good", "C": "warn", "D": "bad"}
EXPLAINED = (
    "PSNR and SSIM compare what was rebuilt with the original that it was matched to: higher is closer. Found: how often an "
    "image that was rebuilt is nearer to its original than to every other of up to 999 images that no client has. The rows "
    "without an attack are what anybody comes to without the update: an attack that is not above them has learned nothing that "
    "they do not know. Objective: 1 - cosine between the update and what the rebuilt images would have caused, for most attacks; "
    "lower is a better match. Labels: share of the label counts that was recovered. Members AUC: telling the client's examples "
    "from others of the same classes; 0.5 is guessing. Means over clients."
)
EPSILON = (
    " Epsilon: what an accountant guarantees of the client's own message, against this adversary; inf: no noise, no guarantee. "
    "Where it says 'global model only' the noise is the server's, added after it has read the update: that epsilon holds against "
    "those who see the models alone, and says nothing of this attack."
)
GRADES = (
    "Grades of inputs by input leakage (the larger of: how far images came from the mean of their class towards 30 dB, and how "
    "often they find their original) and by the worst image, both out of 100: A below 5 and 20, B below 15 and 40, C below 40, D "
    "from there. Labels and membership by their share above guessing: A below 0.05, B below 0.2, C below 0.5. The thresholds are "
    "a convention of this project. A grade says what these attacks did not break at this budget; no grade says that a client is "
    "safe."
)


class Remedy(NamedTuple):
    name: str
    short: str
    against: str
    why: str
    how: str


def _badge(a: Audit) -> str:
    grade = worst_grade(_clients(a))
    return "unscored" if grade is None else f"grade {grade}: {BROKEN[grade]}"


def _clients(a: Audit) -> list[dict[str, Any]]:
    return [c for cell in a.cells for c in cell["clients"]]


def _summary(a: Audit) -> str:
    """What was done and what came of it, in plain words."""
    clients = _clients(a)
    if not clients:
        return "No client has been attacked yet."
    what = {
        "sweep": "of synthetic first rounds",
        "captured": "of a run that kept their updates",
        "defences": "of runs with and without defences",
    }[a.mode]
    names = [
        name for name in a.plan["attacks"] if any(name in c["attacks"] for c in clients)
    ]
    each = max(len(cell["clients"]) for cell in a.cells)
    text = (
        f"{_count(each, 'client')} {what} {'was' if each == 1 else 'were'} attacked in "
    )
    text += "one setting" if len(a.cells) == 1 else f"each of {len(a.cells)} settings"
    text += f", with {', '.join(names) or 'no attack on images'} (budget: {a.plan['budget']})."
    worst = a.worst
    if worst["input_leakage"] is None:
        return f"{text} What was rebuilt was not compared with the clients' data, so no grade is given."
    text += f' Worst is {_name(worst["client"])} of "{worst["cell"]}":'
    text += f" input leakage {worst['input_leakage']:.0f} out of 100."
    if (worst_grade(clients) or "D") < "C":
        text += " That is: not broken by these attacks at this budget. It is no proof that no attack can."
    return text


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _name(client: int, together: int = 1) -> str:
    return f"client {client}" + (f" and {together - 1} more" if together > 1 else "")


def _range(values: Sequence[int]) -> str:
    return (
        f"{min(values):,}"
        if min(values) == max(values)
        else f"{min(values):,} to {max(values):,}"
    )


ADVERSARY = (
    "Somebody who reads what one client sends: the server itself, whoever runs it, or whoever reads the channel. They keep to "
    "the protocol and change nothing (honest but curious); afterwards they work on what they got, as long as they like."
)


def _threat(a: Audit) -> list[tuple[str, list[str]]]:
    """What the adversary saw, what it did not see, and what that leaves open."""
    clients = _clients(a)
    if not clients:
        return []
    seen, whole = (
        [c["entries_seen"] for c in clients],
        max(c["entries_of_model"] for c in clients),
    )
    together = max(c["clients_aggregated"] for c in clients)
    saw = ["What went down to the client: the parameters that it started from."]
    part = (
        f"all {whole:,}" if min(seen) == whole else f"{_range(seen)} of the {whole:,}"
    )
    saw.append(
        f"What came up, after the client's own defences: the change of {part} parameters of the model."
    )
    if together > 1:
        saw.append(
            f"Under secure aggregation only the mean over {together} clients, in the cells that say so."
        )
    saw.append(
        f"How many examples the client has, as it reported: {_range([c['num_examples'] for c in clients])}."
    )
    saw.append(
        "What is public in a federation: the model and its start, the settings of local training, how pixels are scaled."
    )
    saw.append(
        {
            "recovered": "No labels: they were worked out from the update.",
            "oracle": "The true labels, granted for this audit. That makes it an upper bound.",
            "soft": "No labels: they were optimised together with the images.",
        }[a.plan["labels"]]
    )
    hidden = [
        "Any example, or the gradient of a single local step.",
        "The order of the examples, and any other draw on the client.",
    ]
    if min(seen) < whole:
        hidden.append(
            f"The parameters that stay on the client, or were not sent: {_range([whole - n for n in seen])}."
        )
    scored = any(
        c["references"] or (c["labels"] or {}).get("accuracy") is not None
        for c in clients
    )
    hidden.append(
        "The clients' data. It was compared with the results after the attacks had ended, and for the membership test mixed "
        "unmarked among others."
        if scored
        else "The clients' data; this audit did not look at it either."
    )
    left = [
        "A stronger attack, or more iterations: what did not come back was not broken by these attacks at this budget."
    ]
    left.append(
        "A server that does not keep to the protocol, and sends a model made for spying."
    )
    left.append(
        "Several rounds of one client inverted together: images are sought in each round by itself."
    )
    if a.mode == "sweep":
        left.append(
            "Later rounds: a synthetic first round starts from an untrained model, which tends to give most away."
        )
    return [
        ("It saw", saw),
        ("It did not see", hidden),
        ("This audit does not cover", left),
    ]


def _attacks_in_words(a: Audit) -> list[tuple[str, str]]:
    """Each attack with the first line of its file, which names the paper."""
    modules = {
        name: IMAGE_ATTACKS[name].__module__
        for name in a.plan["attacks"]
        if name in IMAGE_ATTACKS
    }
    for name in ("labels", "membership"):
        modules[name] = f"fedcore.audit.attacks.{name}"
    return [
        (
            name,
            (sys.modules[modules[name]].__doc__ or "").partition("\n")[0].rstrip("."),
        )
        for name in a.plan["attacks"]
    ]


def _facts(a: Audit) -> list[Fact]:
    clients = _clients(a)
    facts = []
    if a.worst["input_leakage"] is not None:
        where = f"out of 100, worst of {_count(len(clients), 'target')}"
        facts.append(Fact("input leakage", f"{a.worst['input_leakage']:.0f}", where))
        top = max(
            (f["psnr"]["max"], name)
            for c in clients
            for name, f in c["attacks"].items()
            if "psnr" in f
        )
        facts.append(
            Fact(
                "closest image",
                f"{top[0]:.1f} dB",
                f"PSNR, rebuilt by {top[1]}; from about 20 dB on an image is easily recognised",
            )
        )
    known = [
        c["labels"] for c in clients if (c["labels"] or {}).get("accuracy") is not None
    ]
    if known:
        most = max(known, key=lambda found: found["accuracy"])
        facts.append(
            Fact(
                "labels recovered",
                f"{most['accuracy']:.0%}",
                f"of the worst client; guessing comes to {most['chance']:.0%}",
            )
        )
    tested = [
        c["membership"]["auc"] for c in clients if (c["membership"] or {}).get("ok")
    ]
    if tested:
        facts.append(
            Fact(
                "membership", f"{max(tested):.2f}", "AUC, worst client; 0.5 is guessing"
            )
        )
    if clients:
        share = max(c["entries_seen"] / c["entries_of_model"] for c in clients)
        facts.append(
            Fact(
                "model that is sent",
                f"{share:.0%}",
                "of its parameters come up from a client",
            )
        )
    return facts


def _verdict(c: dict[str, Any]) -> list[str]:
    """What came back of one client, a line each of inputs, labels and membership."""
    lines = []
    n = f"{_count(c['num_examples'], 'example')}"
    n += (
        f" of {c['clients_aggregated']} clients together"
        if c["clients_aggregated"] > 1
        else ""
    )
    n += (
        f", {_count(c['local_steps'], 'local step')}"
        if c["local_steps"] is not None
        else ""
    )
    if c["best"] is not None:
        best, level = c["best"], c["references"].get("class means", {}).get("psnr")
        line = f"Inputs ({n}): {best['attack']} comes closest, to {best['psnr']['mean']:.1f} dB on average"
        line += (
            f" and {best['psnr']['max']:.1f} for its best image"
            if c["num_examples"] > 1
            else ""
        )
        good = round(c["attacks"][best["attack"]]["above"]["20"] * c["num_examples"])
        line += (
            f" ({good} of {c['num_examples']:,} above 20)"
            if good and c["num_examples"] > 1
            else ""
        )
        line += (
            f"; the mean image of each class, which needs no update, has {level:.1f}"
            if level is not None
            else ""
        )
        top, found = max(
            (f["identification"]["top1"], name)
            for name, f in c["attacks"].items()
            if "identification" in f
        )
        pool = best["identification"]["pool"]
        lines.append(
            f"{line}. Among {pool:,} images {top:.0%} of those rebuilt by {found} find their original."
        )
    else:
        ends = [
            f"{name} {f['objective']:.4f}"
            for name, f in c["attacks"].items()
            if f["ok"] and f["curve"] and f["objective"] is not None
        ]
        agree = [
            f["agreement_of_restarts"]
            for f in c["attacks"].values()
            if f.get("agreement_of_restarts") is not None
        ]
        line = f"Inputs ({n}): unscored" + (
            f"; objective at the end: {', '.join(ends)}" if ends else ""
        )
        lines.append(
            line
            + (f"; two restarts agree to {max(agree):.1f} dB" if agree else "")
            + "."
        )
    labels = c["labels"]
    if labels and labels.get("accuracy") is not None:
        told = " (they were given to the attacks)" if labels["mode"] == "oracle" else ""
        lines.append(
            f"Labels: {labels['accuracy']:.0%} of the counts are right{told}; guessing comes to {labels['chance']:.0%}."
        )
    elif labels and labels["ok"]:
        counts = ", ".join(
            f"{n} of class {label}" for label, n in enumerate(labels["counts"]) if n
        )
        lines.append(f"Labels, as far as the update tells: {counts}.")
    elif labels:
        lines.append(f"Labels: not recovered, {labels['error']}.")
    members = c["membership"]
    if members and members["ok"]:
        rate = members[members["best"]]["tpr_at_1_percent_fpr"]
        low = f"{rate['value']:.0%} of the members at 1% false alarms ({rate['low']:.0%} to {rate['high']:.0%})"
        lines.append(
            f"Membership: AUC {members['auc']:.2f} where 0.5 is guessing; {low}."
        )
    elif members:
        lines.append(f"Membership: not tested, {members['error']}.")
    return lines


def _marks(c: dict[str, Any]) -> list[dict[str, str]]:
    grades = {
        "inputs": c["grade"],
        "labels": (c["labels"] or {}).get("grade"),
        "membership": (c["membership"] or {}).get("grade"),
    }
    if grades["labels"] and c["labels"]["mode"] == "oracle":
        del grades["labels"]  # told, not recovered
    return [
        {"text": f"{name} {grade or 'unscored'}", "tone": TONES[grade]}
        for name, grade in grades.items()
        if grade or name == "inputs"
    ]


REMEDIES = {
    "noise": Remedy(
        "Clipping and noise on the client",
        "clipping and noise",
        "against all of it; the only one with a guarantee (epsilon)",
        "The update is cut to a fixed length and gets noise before it leaves. Costs accuracy, less the more clients are "
        "averaged: raise it step by step. Noise that stops these attacks may still have an epsilon in the thousands: read the "
        "epsilon, not the picture. Noise that the server adds (dpfedavg) does nothing against this adversary.",
        "fedcore run PRESET --set defence.clip=1 --set defence.noise_multiplier=0.01",
    ),
    "secagg": Remedy(
        "Secure aggregation",
        "secure aggregation",
        "against all of it; better the more clients are summed",
        "The server gets the sum over many clients and no single update. Costs no accuracy. With few clients, or a server that "
        "controls the others, it protects little. See what it would do here:",
        "fedcore audit PRESET --defence none --defence secagg=4",
    ),
    "partial": Remedy(
        "Keeping part of the model on the clients",
        "personal layers",
        "against inputs and labels",
        "What is not sent cannot be inverted. A personal output layer hides its bias, from which labels are counted; a personal "
        "first layer hides what the inputs are read from. Often helps accuracy where clients differ.",
        "fedcore audit fedper  # or fedsim, fedalt",
    ),
    "steps": Remedy(
        "More local work between two exchanges",
        "more local steps",
        "against inputs; may raise membership",
        "The update then mixes many steps, none of which the attacker sees. Less traffic too; clients that differ drift apart, "
        "and examples that are seen more often are remembered better.",
        "fedcore run PRESET --set local.epochs=20",
    ),
    "batches": Remedy(
        "Larger batches, and clients with more examples",
        "larger batches",
        "against inputs and membership",
        "One image is a smaller part of an average over many. Cheap, and weak alone.",
        "fedcore run PRESET --set local.batch_size=64",
    ),
    "first layer": Remedy(
        "A first layer that is not linear on the raw input",
        "another first layer",
        "against inputs",
        "From a linear first layer with a bias single inputs are read off by a division, after any number of steps. A "
        "convolution, or a first layer that stays on the client, ends that.",
        "fedcore run PRESET --set model.name=cnn",
    ),
    "memorise": Remedy(
        "Less training on the same examples",
        "less training on the same examples",
        "against membership",
        "Who was in the training data shows in how well it is remembered. Fewer local epochs, a smaller model or regularisation "
        "narrow the gap; this pulls against more local work.",
        "fedcore run PRESET --set local.epochs=1",
    ),
}
FEW_STEPS = 20
SMALL_BATCH = 32


def _remedies(c: dict[str, Any], e: dict[str, Any]) -> list[str]:
    """What to switch on for one client, by what it gave away; names of REMEDIES."""
    inputs = (c["grade"] or "A") >= "C"
    labels = ((c["labels"] or {}).get("grade") or "A") >= "C" and c["labels"][
        "mode"
    ] != "oracle"
    members = ((c["membership"] or {}).get("grade") or "A") >= "C"
    found = []
    if inputs and c["best"]["attack"] == "analytic":
        found.append("first layer")
    if inputs or labels or members:
        found.append("noise")
    if (inputs or labels or members) and c["clients_aggregated"] == 1:
        found.append("secagg")
    if (inputs or labels) and c["entries_seen"] == c["entries_of_model"]:
        found.append("partial")
    if inputs and c["local_steps"] is not None and c["local_steps"] < FEW_STEPS:
        found.append("steps")
    if (inputs or members) and e["local"]["batch_size"] < SMALL_BATCH:
        found.append("batches")
    if members and not inputs:
        found.append("memorise")
    return found


def _advice(a: Audit) -> list[Remedy]:
    wanted = {name for c in _clients(a) for name in _remedies(c, a.experiment)}
    return [remedy for name, remedy in REMEDIES.items() if name in wanted]


COST = 0.02  # of accuracy that a defence may cost before it is not called cheap


def _measured(a: Audit) -> list[str]:
    """Of the defences that ran: the one that leaves least, and the one that leaves least at little cost."""
    known = [
        cell
        for cell in a.cells
        if cell["summary"].get("input_leakage") and cell[a.judged_by] is not None
    ]
    plain = next((cell for cell in known if cell["name"] == "none"), None)
    if a.mode != "defences" or plain is None or len(known) < 2:
        return []

    def leak(cell: dict[str, Any]) -> float:
        return float(cell["summary"]["input_leakage"]["mean"])

    def told(cell: dict[str, Any], what: str) -> str:
        cost = 100 * (plain[a.judged_by] - cell[a.judged_by])
        change = (
            "at no cost in accuracy"
            if cost < 0.05
            else f"at {cost:.1f} points of accuracy"
        )
        found = f"takes input leakage from {leak(plain):.0f} to {leak(cell):.0f} out of 100, {change}."
        return f'Measured here, {what}: "{cell["name"]}" {found}'

    best = min(known, key=leak)
    cheap = min(
        (cell for cell in known if plain[a.judged_by] - cell[a.judged_by] <= COST),
        key=leak,
    )
    if leak(best) >= leak(plain):
        return ["None of the defences measured here lowers the input leakage."]
    lines = [told(best, "lowest leakage")]
    if cheap is not best and leak(cheap) < leak(plain):
        lines.append(
            told(cheap, f"lowest of those that cost at most {100 * COST:.0f} points")
        )
    return lines


# The page

PICTURED = (
    "This page shows images of clients, and what attacks rebuilt of them. Keep it as you keep the data itself, show it to nobody "
    "who may not see that, and delete it when it has served."
)
UNPICTURED = "This page shows no images; it still tells labels and quality of single clients' data. Keep it as you keep the data itself."


def page(a: Audit, command: Sequence[str]) -> str:
    """audit.html. The same audit gives the same page."""
    e = Experiment.parse(a.experiment)
    grade = worst_grade(_clients(a))
    notes = []
    if a.interrupted:
        notes.append(
            "This audit was interrupted: what is missing, or attacked with fewer iterations than asked, is filled in by the same "
            "command with --out."
        )
    notes += [f"Left out: {name}: {why}" for name, why in a.failed.items()]
    with rc_context(STYLE):
        plots = _plots(a)
    return render(
        "audit",
        title=f"{e.method.name} on {e.task}",
        badge=_badge(a),
        tone=TONES[grade],
        summary=_summary(a),
        personal=PICTURED if any(cell["pictures"] for cell in a.cells) else UNPICTURED,
        notes=[
            *notes,
            *(f"{warning[0].upper()}{warning[1:]}." for warning in a.warnings),
        ],
        facts=_facts(a),
        adversary=ADVERSARY,
        threat=_threat(a),
        attacks=_attacks_in_words(a),
        advice=_advice(a),
        measured=_measured(a),
        grades=GRADES,
        cells=_cells(a),
        plots=plots,
        results=_grouped(a),
        explained=EXPLAINED + (EPSILON if a.mode == "defences" else ""),
        seed=a.plan["seed"],
        command=shlex.join(command),
        settings=[
            ("labels", a.plan["labels"]),
            ("clients in a cell", a.plan["clients"]),
            *(
                (name, ", ".join(f"{key} = {value}" for key, value in s.items()))
                for name, s in a.plan["settings"].items()
            ),
        ],
        config=e.to_toml(),
        environment=[
            ("fedcore", __version__),
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("numpy", np.__version__),
            ("finished", a.created),
            ("this call took", time_text(a.seconds)),
            *(
                (
                    cell["name"],
                    ", ".join(
                        [time_text(cell["seconds"]), *_times(cell["attack_seconds"])]
                    ),
                )
                for cell in a.cells
            ),
        ],
        version=__version__,
    )


def _times(seconds: dict[str, float]) -> list[str]:
    return [f"{name} {time_text(value)}" for name, value in seconds.items()]


OPEN = 3  # with more cells than that only the worst is unfolded


def _cells(a: Audit) -> list[dict[str, Any]]:
    """What the page says of each cell and each of its clients."""
    found = []
    for cell in a.cells:
        grade = worst_grade(cell["clients"])
        pictures = {shown["client"]: shown for shown in cell["pictures"]}
        clients = []
        for c in cell["clients"]:
            shown = pictures.get(c["client"])
            names = [REMEDIES[name].short for name in _remedies(c, a.experiment)]
            clients.append(
                {
                    "name": _name(c["client"], c["clients_aggregated"]),
                    "marks": _marks(c),
                    "lines": _verdict(c),
                    "advice": ", ".join(names),
                    "pairs": [
                        (original, rebuilt, f"{psnr:.1f}")
                        for original, rebuilt, psnr in shown["pairs"]
                    ]
                    if shown
                    else [],
                    "attack": shown and shown["attack"],
                    "without": "No images: " + _without(cell, c),
                }
            )
        found.append(
            {
                "name": cell["name"],
                "open": len(a.cells) <= OPEN
                or cell["name"] == (a.worst["cell"] or a.cells[0]["name"]),
                "tone": TONES[grade],
                "badge": "unscored"
                if grade is None
                else f"grade {grade}: {BROKEN[grade]}",
                "clients": clients,
            }
        )
    return found


def _without(cell: dict[str, Any], c: dict[str, Any]) -> str:
    if cell["pictures"]:
        return "those of the first clients of each cell are shown."
    return (
        "they were switched off."
        if c["best"] is not None
        else "nothing was compared with the client's data."
    )


# Plots

FACTORS = {
    "epochs": "local epochs",
    "batch_size": "batch size",
    "examples": "examples of a client",
    "round": "round",
}
DASHED = (
    "class means",
    "mean image",
    "blank",
    "start noise",
)  # of the levels, those that a plot shows


def _plots(a: Audit) -> list[Plot]:
    plots = (
        [_trade_off(a)]
        if a.mode == "defences"
        else [drawn for factor in _varied(a) for drawn in _against(a, factor)]
    )
    found = [drawn for drawn in plots if drawn is not None]
    last = _along(a, wide=sum(not drawn.wide for drawn in found) % 2 == 0)
    return found + ([last] if last is not None else [])


def _varied(a: Audit) -> list[str]:
    return [
        factor
        for factor in FACTORS
        if len({cell["factors"].get(factor) for cell in a.cells}) > 1
    ]


def _against(a: Audit, factor: str) -> list[Plot]:
    """PSNR of each attack, and labels and membership, against one factor; means over the cells that share its value."""
    steps = factor == "epochs" and _varied(a) == ["epochs"]
    key, name = ("local_steps", "local steps") if steps else (factor, FACTORS[factor])
    groups: dict[int, list[dict[str, Any]]] = {}
    for cell in sorted(a.cells, key=lambda cell: cell["factors"][key]):
        groups.setdefault(cell["factors"][key], []).append(cell["summary"])
    alone = all(len(cells) == 1 for cells in groups.values())
    others = "" if alone else " Means over the other factors of the sweep."
    plots = []
    names = list(
        dict.fromkeys(
            name for cells in groups.values() for s in cells for name in s["attacks"]
        )
    )
    if names:
        figure, axes = new_figure(height=3.5)
        for number, attack in enumerate(names):
            _curve(
                axes,
                {
                    x: [s["attacks"].get(attack, {}).get("psnr") for s in cells]
                    for x, cells in groups.items()
                },
                attack,
                number,
            )
        for number, level in enumerate(DASHED):
            at = {
                x: _average([s["references"].get(level, {}).get("psnr") for s in cells])
                for x, cells in groups.items()
            }
            values = [value if value is not None else math.nan for value in at.values()]
            axes.plot(
                list(at),
                values,
                color=(INK, SOFT)[number % 2],
                linestyle=("--", ":")[number // 2],
                linewidth=1.1,
                label=level,
            )
        axes.set(xlabel=name, ylabel="PSNR, dB")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
        _scale(axes, list(groups))
        figure.legend(loc="outside upper left", ncols=3)
        caption = f"Dashed: what anybody comes to without the update. The bands are 95 % over clients.{others}"
        plots.append(plot(figure, f"What comes back, by {name}", caption))
    beside = {"label counts recovered": "labels", "membership AUC": "membership"}
    if any(
        s.get(part)
        for cells in groups.values()
        for s in cells
        for part in beside.values()
    ):
        figure, axes = new_figure(height=3.5)
        for number, (label, part) in enumerate(beside.items()):
            _curve(
                axes,
                {x: [s.get(part) for s in cells] for x, cells in groups.items()},
                label,
                number + 5,
            )
        axes.axhline(
            0.5, color=SOFT, linestyle="--", linewidth=1.1, label="membership, guessing"
        )
        axes.set(xlabel=name, ylabel="share", ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _scale(axes, list(groups))
        figure.legend(loc="outside upper left", ncols=2)
        plots.append(
            plot(
                figure,
                f"Labels and membership, by {name}",
                f"They can leak where no image does.{others}",
            )
        )
    return plots


def _curve(
    axes: Axes, found: dict[int, list[dict[str, Any] | None]], label: str, number: int
) -> None:
    """A line of means, with the 95 % band over clients where a point is one cell."""
    points = {x: [s for s in stats if s is not None] for x, stats in found.items()}
    points = {x: stats for x, stats in points.items() if stats}
    if not points:
        return
    axes.plot(
        list(points),
        [_average([s["mean"] for s in stats]) or 0.0 for stats in points.values()],
        color=SERIES[number],
        marker="o",
        label=label,
    )
    if all(
        len(stats) == 1 and stats[0]["low"] is not None for stats in points.values()
    ):
        low, high = (
            [stats[0][end] for stats in points.values()] for end in ("low", "high")
        )
        axes.fill_between(
            list(points), low, high, color=SERIES[number], alpha=0.13, linewidth=0
        )


def _scale(axes: Axes, values: Sequence[int]) -> None:
    """x with a tick at every value, on a log scale where they span much."""
    if max(values) >= 8 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _trade_off(a: Audit) -> Plot | None:
    """Privacy against accuracy: one point a defence."""
    points = [
        (
            cell["name"],
            cell[a.judged_by],
            cell["summary"]["attacks"][cell["summary"]["best"]]["psnr"]["mean"],
            cell["summary"]["references"],
        )
        for cell in a.cells
        if cell["summary"]["best"] and cell[a.judged_by] is not None
    ]
    if not points:
        return None
    figure, axes = new_figure(5.4, 3.8)
    for number, (name, accuracy, psnr, _) in enumerate(points):
        axes.plot(
            accuracy,
            psnr,
            "os^Dv"[number // 10 % 5],
            color=SERIES[number % 10],
            markersize=9,
            label=name,
        )
    for number, level in enumerate(("class means", "mean image")):
        value = _average([levels.get(level, {}).get("psnr") for *_, levels in points])
        if value is not None:
            axes.axhline(
                value,
                color=(INK, SOFT)[number],
                linestyle="--",
                linewidth=1.1,
                label=level,
            )
    axes.set(xlabel=ACCURACY[a.judged_by], ylabel="PSNR of the best attack, dB")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(ticks(integer=False))
    axes.margins(0.12, 0.15)
    figure.legend(loc="outside lower left", ncols=2)
    caption = "Right is a better model, down is less of the clients' images. Under the dashed lines attacks know less than anybody does "
    caption += "without the update."
    return plot(figure, "Privacy against accuracy", caption, wide=True)


def _along(a: Audit, wide: bool) -> Plot | None:
    """The objective along the way, in the worst cell."""
    name = a.worst["cell"]
    cell = next((cell for cell in a.cells if name in (None, cell["name"])), None)
    curves = (
        {}
        if cell is None
        else {
            n: [f["curve"] for f in of_attack(cell, n) if f["curve"]]
            for n in attacks(cell)
        }
    )
    curves = {n: found for n, found in curves.items() if found}
    if cell is None or not curves:
        return None
    figure, axes = new_figure(5.4 if wide else 4.7, 3.5)
    for number, (attack, found) in enumerate(curves.items()):
        rows = np.array(
            [
                [math.nan if v is None else v for v in row]
                for row in found
                if len(row) == len(found[0])
            ]
        )
        x = np.linspace(0, 1, rows.shape[1])
        axes.plot(x, rows.mean(0), color=SERIES[number], label=attack)
        axes.fill_between(
            x, rows.min(0), rows.max(0), color=SERIES[number], alpha=0.13, linewidth=0
        )
    axes.set(xlabel="share of the iterations", ylabel="objective", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    if all(v > 0 for n in curves.values() for row in n for v in row if v is not None):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside upper left", ncols=3)
    caption = f'Mean and range over the clients of "{cell["name"]}". A low objective is a good match of the update, which need not '
    caption += "be a good image."
    return plot(figure, "Objective along the way", caption, wide)
