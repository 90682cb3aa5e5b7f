"""A stress test in plain words: for the terminal and for the page."""

from __future__ import annotations

from typing import NamedTuple

from fedcore.stress.plan import CLEAN
from fedcore.stress.results import Stress, Worst
from fedcore.stress.tables import points_text, text_of, worst_text
from fedcore.views.page import Fact
from fedcore.views.text import value_text

__all__ = ["Advice", "advice", "badge", "facts", "measured", "reading", "summary"]

STOPPED = 0.2  # success of a backdoor up to which it counts as stopped


class Advice(NamedTuple):
    """Something to choose."""

    name: str
    against: str
    why: str
    how: str


BOUNDS = Advice(
    "A cap on counts, and a bound on norms",
    "always; costs next to nothing",
    "A client says itself how many examples it has, and that is its weight in the "
    "mean. One that claims a billion is the mean. A cap on the count and a bound on "
    "the norm of a message limit what a single client can do in a round, with any "
    "method and without a rule. They do not stop clients that act together.",
    "fedcore run PRESET --set aggregation.max_examples=1000 --set aggregation.clip=1",
)
WITHOUT_PROXY = Advice(
    "Nearest-neighbour mixing, and Multi-Krum or the trimmed mean",
    "where the server has no data of its own",
    "Each message is first mixed with its nearest neighbours, so that honest clients "
    "with rare data look less like attackers; then the outliers go. Needs a bound on "
    "how many clients of a round are malicious: too low a bound costs everything, "
    "too high a bound costs accuracy.",
    "fedcore run PRESET --set aggregation.before=nnm "
    "--set aggregation.rule=multi_krum --set aggregation.fraction=0.2",
)
WITH_PROXY = Advice(
    "FLTrust",
    "where the server has some labelled data of its own",
    "The server trains on its own examples as a client does, and weighs every message "
    "by how well it agrees in direction. There is no bound on how many clients may be "
    "malicious. A hundred clean examples can be enough; they must look like the "
    "clients' data.",
    "fedcore run PRESET --set proxy=100 --set aggregation.rule=fltrust",
)
IDENTITY = Advice(
    "Clients that are who they say they are",
    "against one machine that plays many clients",
    "Every rule counts heads. Node keys make a head cost something; without them one "
    "machine can be a majority.",
    "fedcore certs",
)


def advice(stress: Stress) -> tuple[Advice, ...]:
    """The choices, those that fit the settings first."""
    rules = (WITHOUT_PROXY, WITH_PROXY)
    if stress.experiment.proxy:
        rules = (WITH_PROXY, WITHOUT_PROXY)
    return (BOUNDS, *rules, IDENTITY)


def badge(stress: Stress) -> tuple[str, str]:
    """(a few words on the best worst case, the tone of their colour)."""
    found = _best_of_all(stress)
    if found is None:
        return "not done yet", "soft"
    worst = found[1]
    value = "ruined" if worst.value is None else _value(stress, worst.value)
    text = f"best worst case: {value}"
    lost = _lost(stress, worst)
    if lost is None:
        return text, "bad"
    tone = "good" if lost <= 0.05 else "warn" if lost <= 0.15 else "bad"
    return text, tone


def _value(stress: Stress, value: float) -> str:
    return value_text(stress.judge.measure, value)


def _best_of_all(stress: Stress) -> tuple[str, Worst] | None:
    """The best rule at the largest share of malicious clients."""
    ranked = stress.ranked(max(stress.plan.fractions))
    return ranked[0] if ranked else None


def _lost(stress: Stress, worst: Worst) -> float | None:
    """The part of the best clean value that the worst attack takes; None for all."""
    fraction = max(stress.plan.fractions)
    clean = []
    for rule in stress.rules():
        cell = stress.cell(fraction, rule, CLEAN)
        if cell is not None and cell.mean is not None:
            clean.append(cell.mean)
    if worst.value is None or not clean:
        return None
    best = stress.judge.best(clean)
    return stress.judge.loss(best, worst.value) / max(abs(best), 1e-12)


def summary(stress: Stress) -> str:
    """The test and its outcome in a few sentences."""
    plan = stress.plan
    shares = " and ".join(f"{fraction:.0%}" for fraction in plan.fractions)
    rules, attacks = len(plan.rules), len(plan.attacks)
    text = (
        f"{_count(rules, 'rule')} against {_count(attacks, 'attack')} by {shares} of "
        f"the clients, on {_count(plan.seeds, 'seed')}, {stress.experiment.rounds} "
        "rounds each."
    )
    for fraction in plan.fractions:
        ranked = stress.ranked(fraction)
        if not ranked:
            continue
        rule, worst = ranked[0]
        share = f"With {fraction:.0%} malicious the"
        text += (
            f" {share} best worst case is that of {rule}: "
            f"{worst_text(stress.judge, worst)}."
        )
        plain = stress.worst(fraction, "mean")
        if plain is not None and rule != "mean":
            text += f" The plain mean: {worst_text(stress.judge, plain)}."
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def facts(stress: Stress) -> list[Fact]:
    """The boxes at the top of the page, for the largest share of malicious clients."""
    fraction, judge = max(stress.plan.fractions), stress.judge
    ranked = stress.ranked(fraction)
    if not ranked:
        return []
    rule, worst = ranked[0]
    value = "ruined" if worst.value is None else _value(stress, worst.value)
    clean = text_of(judge, stress.cell(fraction, rule, CLEAN))
    boxes = [
        Fact("Best worst case", value, f"{rule}, under {worst.attack}"),
        Fact("The same rule, no attack", clean, f"{judge.measure} of the last round"),
    ]
    plain = stress.worst(fraction, "mean")
    if plain is not None:
        text = "ruined" if plain.value is None else _value(stress, plain.value)
        boxes.append(Fact("Plain mean, worst case", text, f"under {plain.attack}"))
    success = stress.backdoor(fraction, rule)
    if success is not None:
        boxes.append(Fact("Its backdoor", f"{success:.0%}", "of stamped examples"))
    return boxes


def measured(stress: Stress) -> list[str]:
    """Sentences on what the test says for the choice of a rule."""
    lines = []
    for fraction in stress.plan.fractions:
        ranked = stress.ranked(fraction)
        if ranked:
            lines += _measured_at(stress, fraction, ranked)
    if lines and stress.plan.seeds == 1:
        lines.append(
            "One seed: under attack another partition can differ by ten points; "
            "--seeds 3 shows it."
        )
    return lines


def _measured_at(
    stress: Stress, fraction: float, ranked: list[tuple[str, Worst]]
) -> list[str]:
    judge, (rule, worst) = stress.judge, ranked[0]
    line = f"At {fraction:.0%}: {rule} has the best worst case, "
    if len(ranked) == 1:
        line = f"At {fraction:.0%}: the worst case of {rule} is "
    line += worst_text(judge, worst)
    cost = stress.cost(fraction, rule)
    if cost is not None and rule != "mean":
        points = points_text(judge.measure, cost)
        unit = " points" if judge.measure == "accuracy" else ""
        line += f"; without an attacker it costs {points}{unit}"
    return [f"{line}.", *_of_backdoors(stress, fraction, ranked)]


def _of_backdoors(
    stress: Stress, fraction: float, ranked: list[tuple[str, Worst]]
) -> list[str]:
    """Sentences on the rules that let a backdoor in, and the best of the others."""
    opened: list[str] = []
    shut: list[tuple[str, Worst]] = []
    for rule, worst in ranked:
        success = stress.backdoor(fraction, rule)
        if success is not None and success > STOPPED:
            opened.append(rule)
        elif success is not None:
            shut.append((rule, worst))
    if not opened:
        return []
    text = f"At {fraction:.0%} a backdoor passes {', '.join(opened)}"
    if not shut:
        return [f"{text}."]
    lines = [f"{text}; it is stopped by {', '.join(rule for rule, _ in shut)}."]
    if ranked[0][0] in opened:
        rule, worst = shut[0]
        value = worst_text(stress.judge, worst)
        lines.append(f"Of those that stop it, {rule} has the best worst case, {value}.")
    return lines


def reading(stress: Stress) -> str:
    """Instructions to read the heat map."""
    measure = stress.judge.measure
    seeds = " Means over seeds." if stress.plan.seeds > 1 else ""
    return (
        f"{measure.capitalize()} after the last round.{seeds} clean: nobody is "
        "malicious. absent: the malicious clients never report; what an attack does "
        "is the difference to this column, as their data are missing either way. "
        "worst: the worst of the attacks. backdoor success: share of stamped test "
        "examples that become the attacker's class. ruined: the run ended without a "
        "model. stuck: no round had enough messages for the rule, which then leaves "
        "the model as it is. The colour is the distance to the best cell of the "
        "table. A rule that holds here held against these attacks, at this share, on "
        "this data; no rule is the best everywhere."
    )
