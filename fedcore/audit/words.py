"""An audit in plain words: for the terminal and for the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from fedcore.audit.attacks import labels, membership, tokens
from fedcore.audit.plan import IMAGE_ATTACKS
from fedcore.audit.results import Audit, ClientResult, LabelResult
from fedcore.audit.tables import worst_grade
from fedcore.views.page import Fact

BROKEN = {
    "A": "nothing recognisable came back",
    "B": "little came back",
    "C": "images come back in part",
    "D": "images come back",
}
TONES = {None: "soft", "A": "good", "B": "good", "C": "warn", "D": "bad"}
EXPLAINED = (
    "PSNR and SSIM compare what was rebuilt with the original that it was matched to: "
    "higher is closer. Found: how often an image that was rebuilt is nearer to its "
    "original than to every other of up to 999 images that no client has. The rows "
    "without an attack are what anybody comes to without the update: an attack that is "
    "not above them has learned nothing that they do not know. Objective: 1 - cosine "
    "between the update and what the rebuilt images would have caused, for most "
    "attacks; lower is a better match. Labels: share of the label counts that was "
    "recovered. Members AUC: telling the client's examples from others of the same "
    "classes; 0.5 is guessing. Means over clients."
)
EPSILON = (
    " Epsilon: what an accountant guarantees of the client's own message, against this "
    "adversary; inf: no noise, no guarantee. Where it says 'global model only' the "
    "noise is the server's, added after it has read the update: that epsilon holds "
    "against those who see the models alone, and says nothing of this attack."
)
GRADES = (
    "Grades of inputs by input leakage (the larger of: how far images came from the "
    "mean of their class towards 30 dB, and how often they find their original) and by "
    "the worst image, both out of 100: A below 5 and 20, B below 15 and 40, C below "
    "40, D from there. Labels and membership by their share above guessing: A below "
    "0.05, B below 0.2, C below 0.5. The thresholds are a convention of this project. "
    "A grade says what these attacks did not break at this budget; no grade says that "
    "a client is safe."
)
ADVERSARY = (
    "Somebody who reads what one client sends: the server itself, whoever runs it, or "
    "whoever reads the channel. They keep to the protocol and change nothing (honest "
    "but curious); afterwards they work on what they got, as long as they like."
)
PICTURED = (
    "This page shows images of clients, and what attacks rebuilt of them. Keep it as "
    "you keep the data itself, show it only to those who may see that, and delete it "
    "when it has served."
)
UNPICTURED = (
    "This page shows no images; it still tells labels and quality of single clients' "
    "data. Keep it as you keep the data itself."
)
UNPROVEN = (
    " That is: not broken by these attacks at this budget. It is no proof that no "
    "attack can."
)
KINDS = {
    "sweep": "of synthetic first rounds",
    "captured": "of a run that kept their updates",
    "defences": "of runs with and without defences",
}
TEXT = (
    "Clients hold text, and no attack here rebuilds a sentence of an update: which "
    "tokens occur is looked for, and whose windows were trained on."
)
UNTRIED = (
    "Sentences: attacks that search for tokens in their order (LAMP, FILM, DAGER), and "
    "ask a language model which of them make sense, are not among these.",
    "Text that the model would repeat when it is asked: extraction needs many "
    "questions to the model that was trained, and no update.",
    "Tokens in what comes up of layers that are neither the embedding nor the output, "
    "as the factors of adapters.",
)
ENOUGH = 1000  # non-members from which on a false alarm in a thousand can be seen
SCORES = {
    "loss_drop": "the fall of the loss",
    "gradient": "the gradient",
    "base": "the loss of the published model",
    "rmia": "reference models (RMIA)",
}
LABELS_SEEN = {
    "recovered": "No labels: they were worked out from the update.",
    "oracle": "The true labels, granted for this audit. That makes it an upper bound.",
    "soft": "No labels: they were optimised together with the images.",
}


class Column(NamedTuple):
    """A heading and the points below it."""

    name: str
    points: list[str]


class Mark(NamedTuple):
    """A grade of one client."""

    text: str
    tone: str


def badge(audit: Audit) -> str:
    """The worst grade and its meaning."""
    return grade_text(worst_grade(audit.clients))


def grade_text(grade: str | None) -> str:
    return "unscored" if grade is None else f"grade {grade}: {BROKEN[grade]}"


def summary(audit: Audit) -> str:
    """The audit and its result in a few sentences."""
    clients, worst = audit.clients, audit.worst
    if not clients:
        return "No client has been attacked yet."
    tried: set[str] = set()
    for client in clients:
        tried |= {name for name, found in client["attacks"].items() if found["ok"]}
    names = [name for name in audit.plan["attacks"] if name in tried]
    most = max(len(cell["clients"]) for cell in audit.cells)
    cells = len(audit.cells)
    text = (
        f"{_count(most, 'client')} {KINDS[audit.mode]} "
        f"{'was' if most == 1 else 'were'} attacked in "
        f"{'one setting' if cells == 1 else f'each of {cells} settings'}, with "
        f"{', '.join(names) or 'no attack on images'} "
        f"(budget: {audit.plan['budget']})."
    )
    if worst is None and any(map(is_text, clients)):
        return f"{text} {TEXT} So no grade is given to inputs."
    if worst is None:
        return (
            f"{text} What was rebuilt was not compared with the clients' data, so no "
            "grade is given."
        )
    text += (
        f' Worst is {client_name(worst.client)} of "{worst.cell}": input leakage '
        f"{worst.input_leakage:.0f} out of 100."
    )
    return text + UNPROVEN if (worst_grade(clients) or "D") < "C" else text


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def client_name(client: int, together: int = 1) -> str:
    more = f" and {together - 1} more" if together > 1 else ""
    return f"client {client}{more}"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def threat(audit: Audit) -> list[Column]:
    """The adversary's knowledge, its limits, and the threats that are left open."""
    if not audit.clients:
        return []
    return [
        Column("It saw", _seen(audit)),
        Column("It did not see", _hidden(audit)),
        Column("This audit does not cover", _left_open(audit)),
    ]


def _seen(audit: Audit) -> list[str]:
    clients = audit.clients
    entries = [client["entries_seen"] for client in clients]
    whole = max(client["entries_of_model"] for client in clients)
    sent = f"all {whole:,}"
    if min(entries) < whole:
        sent = f"{_range(entries)} of the {whole:,}"
    points = [
        "What went down to the client: the parameters that it started from.",
        f"What came up, after the client's own defences: the change of {sent} "
        "parameters of the model.",
    ]
    together = max(client["clients_aggregated"] for client in clients)
    if together > 1:
        points.append(
            f"Under secure aggregation only the mean over {together} clients, in the "
            "cells that say so."
        )
    counts = _range([client["num_examples"] for client in clients])
    points += [
        f"How many examples the client has, as it reported: {counts}.",
        "What is public in a federation: the model and its start, the settings of "
        "local training, how pixels are scaled.",
        LABELS_SEEN[audit.plan["labels"]],
    ]
    return points


def _hidden(audit: Audit) -> list[str]:
    clients = audit.clients
    points = [
        "Any example, or the gradient of a single local step.",
        "The order of the examples, and any other draw on the client.",
    ]
    whole = max(client["entries_of_model"] for client in clients)
    unseen = [whole - client["entries_seen"] for client in clients]
    if max(unseen) > 0:
        points.append(
            "The parameters that stay on the client, or were not sent: "
            f"{_range(unseen)}."
        )
    if any(_is_compared(client) for client in clients):
        points.append(
            "The clients' data. It was compared with the results after the attacks had "
            "ended, and for the membership test mixed unmarked among others."
        )
    else:
        points.append("The clients' data; this audit did not look at it either.")
    return points


def _is_compared(client: ClientResult) -> bool:
    """Whether anything of the client was compared with its data."""
    found = client["labels"]
    return bool(client["references"]) or (found is not None and "accuracy" in found)


def _left_open(audit: Audit) -> list[str]:
    points = [
        "A stronger attack, or more iterations: what did not come back was not broken "
        "by these attacks at this budget.",
        "A server that does not keep to the protocol, and sends a model made for "
        "spying.",
        "Several rounds of one client inverted together: images are sought in each "
        "round by itself.",
    ]
    if any(map(is_text, audit.clients)):
        points += UNTRIED
    if audit.mode == "sweep":
        points.append(
            "Later rounds: a synthetic first round starts from an untrained model, "
            "which tends to give most away."
        )
    return points


def attacks_in_words(audit: Audit) -> list[tuple[str, str]]:
    """Each attack with the first line of its file, which names the paper."""
    texts: dict[str, str | None] = {
        "labels": tokens.__doc__
        if any(map(is_text, audit.clients))
        else labels.__doc__,
        "membership": membership.__doc__,
    }
    for name, attack in IMAGE_ATTACKS.items():
        texts[name] = sys.modules[attack.__module__].__doc__
    lines = []
    for name in audit.plan["attacks"]:
        first, _, _ = (texts[name] or "").partition("\n")
        lines.append((name, first.rstrip(".")))
    return lines


def facts(audit: Audit) -> list[Fact]:
    """The numbers in boxes at the top of the page."""
    clients, worst = audit.clients, audit.worst
    boxes = []
    if worst is not None:
        where = f"out of 100, worst of {_count(len(clients), 'target')}"
        boxes.append(Fact("input leakage", f"{worst.input_leakage:.0f}", where))
        boxes.append(_closest(clients))
    scored = [c["labels"] for c in clients if c["labels"] and "accuracy" in c["labels"]]
    if scored:
        most = max(scored, key=lambda found: found["accuracy"])
        guess = f"of the worst client; guessing comes to {most['chance']:.0%}"
        what = "tokens found, F1" if "kind" in most else "labels recovered"
        boxes.append(Fact(what, f"{most['accuracy']:.0%}", guess))
    tests = [c["membership"] for c in clients if c["membership"]]
    areas = [test["auc"] for test in tests if test["ok"]]
    if areas:
        meaning = "AUC, worst client; 0.5 is guessing"
        boxes.append(Fact("membership", f"{max(areas):.2f}", meaning))
    if clients:
        share = max(c["entries_seen"] / c["entries_of_model"] for c in clients)
        meaning = "of its parameters come up from a client"
        boxes.append(Fact("model that is sent", f"{share:.0%}", meaning))
    return boxes


def _closest(clients: Sequence[ClientResult]) -> Fact:
    """The image that came closest to its original, of all clients."""
    closest = []
    for client in clients:
        for name, result in client["attacks"].items():
            if "psnr" in result:
                closest.append((result["psnr"]["max"], name))
    psnr, attack = max(closest)
    return Fact(
        "closest image",
        f"{psnr:.1f} dB",
        f"PSNR, rebuilt by {attack}; from about 20 dB on an image is easily recognised",
    )


def marks(client: ClientResult) -> list[Mark]:
    """The grades of one client; labels that the attacks were told have none."""
    found, test = client["labels"], client["membership"]
    grade = client["grade"]
    graded = [Mark(f"inputs {grade or 'unscored'}", TONES[grade])]
    if found and "grade" in found and found["mode"] != "oracle":
        graded.append(Mark(f"labels {found['grade']}", TONES[found["grade"]]))
    if test and "grade" in test:
        graded.append(Mark(f"membership {test['grade']}", TONES[test["grade"]]))
    return graded


def verdict(client: ClientResult) -> list[str]:
    """What came back of one client: a line each of inputs, labels and membership."""
    size = _count(client["num_examples"], client.get("unit", "example"))
    if client["clients_aggregated"] > 1:
        size += f" of {client['clients_aggregated']} clients together"
    if client["local_steps"] is not None:
        size += f", {_count(client['local_steps'], 'local step')}"
    inputs = _unscored(client) if client["best"] is None else _scored(client)
    if is_text(client):
        inputs = "text, which no attack here rebuilds."
    lines = [f"Inputs ({size}): {inputs}", _labels(client), _membership(client)]
    return [line for line in lines if line]


def _scored(client: ClientResult) -> str:
    """How close the attacks came to the client's inputs."""
    best, n = client["best"], client["num_examples"]
    assert best is not None
    psnr = best["psnr"]
    text = f"{best['attack']} comes closest, to {psnr['mean']:.1f} dB on average"
    if n > 1:
        text += f" and {psnr['max']:.1f} for its best image"
        good = round(client["attacks"][best["attack"]]["above"]["20"] * n)
        text += f" ({good} of {n:,} above 20)" if good else ""
    level = client["references"].get("class means")
    if level is not None:
        text += (
            "; the mean image of each class, which needs no update, has "
            f"{level['psnr']:.1f}"
        )
    finds = []
    for name, result in client["attacks"].items():
        if "identification" in result:
            finds.append((result["identification"]["top1"], name))
    top1, attack = max(finds)
    return (
        f"{text}. Among {best['identification']['pool']:,} images {top1:.0%} of those "
        f"rebuilt by {attack} find their original."
    )


def _unscored(client: ClientResult) -> str:
    """What can be said of the inputs without the truth."""
    text, ends, agreements = "unscored", [], []
    for name, result in client["attacks"].items():
        if result["ok"] and result["curve"] and result["objective"] is not None:
            ends.append(f"{name} {result['objective']:.4f}")
        if "agreement_of_restarts" in result:
            agreements.append(result["agreement_of_restarts"])
    if ends:
        text += f"; objective at the end: {', '.join(ends)}"
    if agreements:
        text += f"; two restarts agree to {max(agreements):.1f} dB"
    return f"{text}."


def _labels(client: ClientResult) -> str:
    found = client["labels"]
    if found is None:
        return ""
    if not found["ok"]:
        what = "Tokens" if is_text(client) else "Labels"
        return f"{what}: not recovered, {found['error']}."
    if is_text(client):
        return _tokens(found)
    if "accuracy" in found:
        told = ""
        if found["mode"] == "oracle":
            told = " (they were given to the attacks)"
        return (
            f"Labels: {found['accuracy']:.0%} of the counts are right{told}; "
            f"guessing comes to {found['chance']:.0%}."
        )
    counts = enumerate(found["counts"])
    there = [f"{n} of class {label}" for label, n in counts if n]
    return f"Labels, as far as the update tells: {', '.join(there)}."


def is_text(client: ClientResult) -> bool:
    """Whether the client's examples are text, of which the next token is learned."""
    found = client["labels"]
    return found is not None and found.get("kind") == "tokens"


def _tokens(found: LabelResult) -> str:
    there = f'Tokens: {found["found"]:,} are found in "{found["source"]}"'
    if "accuracy" not in found:
        return f"{there}."
    return (
        f"{there}; {found['precision']:.0%} of them occur in the client's text, and "
        f"{found['recall']:.0%} of its tokens are found: F1 {found['accuracy']:.2f}, "
        f"guessing by public text comes to {found['chance']:.2f}."
    )


def _membership(client: ClientResult) -> str:
    test = client["membership"]
    if test is None:
        return ""
    if not test["ok"]:
        return f"Membership: not tested, {test['error']}."
    best = test[test["best"]]
    rate, low = best["tpr_at_1_percent_fpr"], best.get("tpr_at_0.1_percent_fpr")
    text = (
        f"Membership: AUC {test['auc']:.2f} where 0.5 is guessing; "
        f"{rate['value']:.0%} of the members at 1% false alarms "
        f"({rate['low']:.0%} to {rate['high']:.0%})"
    )
    if low is not None and best["others"] >= ENOUGH:
        text += f", {low['value']:.0%} at 0.1% ({low['low']:.0%} to {low['high']:.0%})"
    return f"{text}, by {SCORES[test['best']]}."
