"""Advice: what to switch on against what leaked, and what the measured defences do."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedcore.audit.results import Audit, CellResult, ClientResult


class Remedy(NamedTuple):
    """Something to switch on."""

    name: str
    short: str
    against: str
    why: str
    how: str


REMEDIES = {
    "noise": Remedy(
        "Clipping and noise on the client",
        "clipping and noise",
        "against all of it; the only one with a guarantee (epsilon)",
        "The update is cut to a fixed length and gets noise before it leaves. Costs "
        "accuracy, less the more clients are averaged: raise it step by step. Noise "
        "that stops these attacks may still have an epsilon in the thousands: read the "
        "epsilon, not the picture. Noise that the server adds (dpfedavg) does nothing "
        "against this adversary.",
        "fedcore run PRESET --set defence.clip=1 --set defence.noise_multiplier=0.01",
    ),
    "secagg": Remedy(
        "Secure aggregation",
        "secure aggregation",
        "against all of it; better the more clients are summed",
        "The server gets the sum over many clients and no single update. Costs no "
        "accuracy. With few clients, or a server that controls the others, it protects "
        "little. See what it would do here:",
        "fedcore audit PRESET --defence none --defence secagg=4",
    ),
    "partial": Remedy(
        "Keeping part of the model on the clients",
        "personal layers",
        "against inputs and labels",
        "What is not sent cannot be inverted. A personal output layer hides its bias, "
        "from which labels are counted; a personal first layer hides what the inputs "
        "are read from. Often helps accuracy where clients differ.",
        "fedcore audit fedper  # or fedsim, fedalt",
    ),
    "steps": Remedy(
        "More local work between two exchanges",
        "more local steps",
        "against inputs; may raise membership",
        "The update then mixes many steps, none of which the attacker sees. Less "
        "traffic too; clients that differ drift apart, and examples that are seen more "
        "often are remembered better.",
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
        "From a linear first layer with a bias single inputs are read off by a "
        "division, after any number of steps. A convolution, or a first layer that "
        "stays on the client, ends that.",
        "fedcore run PRESET --set model.name=cnn",
    ),
    "memorise": Remedy(
        "Less training on the same examples",
        "less training on the same examples",
        "against membership",
        "Membership of the training data shows in how well it is remembered. Fewer "
        "local epochs, a smaller model or regularisation narrow the gap; this pulls "
        "against more local work.",
        "fedcore run PRESET --set local.epochs=1",
    ),
}
FEW_STEPS = 20
SMALL_BATCH = 32
CHEAP = 0.02  # of accuracy that a defence may cost before it is not called cheap
FREE = 0.05  # points of accuracy below which a cost is not named


class Leaks(NamedTuple):
    """The parts of a client that were given away, grade C or worse."""

    inputs: bool
    labels: bool
    membership: bool


def leaks_of(client: ClientResult) -> Leaks:
    """Labels that the attacks were told have not leaked."""
    labels, membership = client["labels"], client["membership"]
    return Leaks(
        inputs=_is_bad(client["grade"]),
        labels=labels is not None
        and _is_bad(labels.get("grade"))
        and labels["mode"] != "oracle",
        membership=membership is not None and _is_bad(membership.get("grade")),
    )


def _is_bad(grade: str | None) -> bool:
    return grade is not None and grade >= "C"


def remedies_for(client: ClientResult, experiment: dict[str, Any]) -> list[str]:
    """Names in REMEDIES of what to switch on for one client, by what it gave away."""
    leaks, best = leaks_of(client), client["best"]
    steps, sent = client["local_steps"], client["entries_seen"]
    is_whole = sent == client["entries_of_model"]
    is_small = experiment["local"]["batch_size"] < SMALL_BATCH
    is_alone = client["clients_aggregated"] == 1
    is_analytic = best is not None and best["attack"] == "analytic"
    helps = {
        "first layer": leaks.inputs and is_analytic,
        "noise": any(leaks),
        "secagg": any(leaks) and is_alone,
        "partial": (leaks.inputs or leaks.labels) and is_whole,
        "steps": leaks.inputs and steps is not None and steps < FEW_STEPS,
        "batches": (leaks.inputs or leaks.membership) and is_small,
        "memorise": leaks.membership and not leaks.inputs,
    }
    return [name for name, wanted in helps.items() if wanted]


def advice(audit: Audit) -> list[Remedy]:
    """The remedies for all clients, each once."""
    wanted: set[str] = set()
    for client in audit.clients:
        wanted |= set(remedies_for(client, audit.experiment))
    return [remedy for name, remedy in REMEDIES.items() if name in wanted]


def measured(audit: Audit) -> list[str]:
    """The defence that leaves least, and the one that leaves least at little cost."""
    if audit.mode != "defences":
        return []
    scored = [cell for cell in audit.cells if _is_comparable(audit, cell)]
    plain = next((cell for cell in scored if cell["name"] == "none"), None)
    if plain is None or len(scored) < 2:
        return []

    def leak(cell: CellResult) -> float:
        leakage = cell["summary"]["input_leakage"]
        assert leakage is not None
        return leakage["mean"]

    def cost(cell: CellResult) -> float:
        """Accuracy that the defence costs, in [0, 1]."""
        with_it, without = cell[audit.judged_by], plain[audit.judged_by]
        assert with_it is not None
        assert without is not None
        return without - with_it

    def told(cell: CellResult, what: str) -> str:
        points = 100 * cost(cell)
        change = f"at {points:.1f} points of accuracy"
        if points < FREE:
            change = "at no cost in accuracy"
        return (
            f'Measured here, {what}: "{cell["name"]}" takes input leakage from '
            f"{leak(plain):.0f} to {leak(cell):.0f} out of 100, {change}."
        )

    best = min(scored, key=leak)
    cheap = min((cell for cell in scored if cost(cell) <= CHEAP), key=leak)
    if leak(best) >= leak(plain):
        return ["None of the defences measured here lowers the input leakage."]
    lines = [told(best, "lowest leakage")]
    if cheap is not best and leak(cheap) < leak(plain):
        most = f"lowest of those that cost at most {100 * CHEAP:.0f} points"
        lines.append(told(cheap, most))
    return lines


def _is_comparable(audit: Audit, cell: CellResult) -> bool:
    """Whether both leakage and accuracy of the cell were measured."""
    has_leakage = cell["summary"]["input_leakage"] is not None
    return has_leakage and cell[audit.judged_by] is not None
