"""The plan of a stress test: which rules, attacks and shares of malicious clients."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.messages.adversary.settings import AdversarySettings, AttackName
from fedcore.messages.aggregation.settings import (
    COUNTS_BYZANTINE,
    BeforeName,
    RuleName,
)

__all__ = [
    "ABSENT",
    "BACKDOOR",
    "CLEAN",
    "Attack",
    "Cell",
    "Plan",
    "Rule",
    "cells_of",
    "default_attacks",
    "default_rules",
    "parse_attack",
    "parse_rule",
]

CLEAN = "clean"  # nobody is malicious
ABSENT = "absent"  # the malicious clients never report
BACKDOOR = "backdoor"
REFERENCES = (CLEAN, ABSENT)

RULES: tuple[str, ...] = get_args(RuleName)
BEFORE: tuple[str, ...] = get_args(BeforeName)
ATTACKS = tuple(name for name in get_args(AttackName) if name not in ("none", "absent"))
DIRECTIONS: tuple[str, ...] = get_args(
    AdversarySettings.model_fields["direction"].annotation
)
DIRECTED = ("minmax", "minsum")
COUNTING = COUNTS_BYZANTINE | {"nnm", "arc", "bucketing"}
"""The rules, and what is done before them, that are told f."""

DEFAULT_RULES = (
    "mean",
    "clip+mean",
    "median",
    "trimmed_mean",
    "multi_krum",
    "geometric_median",
    "nnm+multi_krum",
    "nnm+trimmed_mean",
)
DEFAULT_ATTACKS = (
    "sign_flip",
    "sign_flip:10",
    "alie:1.5",
    "ipm:0.5",
    "minmax",
    "mimic",
    "label_flip",
    "backdoor",
)


class Rule(NamedTuple):
    """A rule, and what is done to the messages before it."""

    before: str
    rule: str

    @property
    def name(self) -> str:
        """As it is written on the command line.

        >>> Rule("nnm", "krum").name, Rule("none", "median").name
        ('nnm+krum', 'median')
        """
        return self.rule if self.before == "none" else f"{self.before}+{self.rule}"

    @property
    def counts(self) -> bool:
        """Whether it is told how many clients may be malicious."""
        return bool({self.before, self.rule} & COUNTING)


class Attack(NamedTuple):
    """An attack, and its strength or direction where it is not the default."""

    attack: str
    scale: float | Literal["auto"] | None = None
    direction: str | None = None

    @property
    def name(self) -> str:
        """As it is written on the command line.

        >>> Attack("sign_flip", 10.0).name, Attack("minmax", None, "unit").name
        ('sign_flip:10', 'minmax:unit')
        """
        strength = self.direction if self.scale is None else self.scale
        if strength is None:
            return self.attack
        text = f"{strength:g}" if isinstance(strength, float) else strength
        return f"{self.attack}:{text}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from an adversary's defaults."""
        settings: dict[str, Any] = {"attack": self.attack}
        if self.scale is not None:
            settings["scale"] = self.scale
        if self.direction is not None:
            settings["direction"] = self.direction
        return settings


@dataclass(frozen=True)
class Plan:
    """The rules and attacks to try on every seed."""

    rules: tuple[Rule, ...]
    attacks: tuple[Attack, ...]
    fractions: tuple[float, ...] = (0.2,)  # malicious share of the population
    seeds: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The references, and the attacks."""
        return (*REFERENCES, *(attack.name for attack in self.attacks))

    @property
    def backdoors(self) -> tuple[str, ...]:
        """The attacks that leave a backdoor."""
        return tuple(a.name for a in self.attacks if a.attack == BACKDOOR)


class Cell(NamedTuple):
    """One rule against one attack."""

    rule: str
    fraction: float
    column: str  # an attack, or a reference
    label: str  # of its run directories
    settings: dict[str, Any]  # by dotted key, over those of the preset
    experiment: Experiment


def parse_rule(text: str) -> Rule:
    """A rule as it is written on the command line. Raises SettingsError.

    >>> parse_rule("nnm+multi_krum")
    Rule(before='nnm', rule='multi_krum')
    """
    before, plus, rule = text.strip().rpartition("+")
    if not plus:
        before = "none"
    _refuse_unknown("--rules", text, rule, RULES)
    _refuse_unknown("--rules", text, before, BEFORE)
    return Rule(before, rule)


def parse_attack(text: str) -> Attack:
    """An attack as it is written on the command line. Raises SettingsError.

    >>> parse_attack("alie:1.5")
    Attack(attack='alie', scale=1.5, direction=None)
    >>> parse_attack("minmax:sign").settings
    {'attack': 'minmax', 'direction': 'sign'}
    """
    name, colon, value = text.strip().partition(":")
    if name in (*REFERENCES, "none"):
        raise SettingsError(
            f"--attacks {text}: {CLEAN} and {ABSENT} are always there; leave it out"
        )
    _refuse_unknown("--attacks", text, name, ATTACKS)
    if not colon:
        return Attack(name)
    if name in DIRECTED:
        _refuse_unknown("--attacks", text, value, DIRECTIONS)
        return Attack(name, direction=value)
    if value == "auto":
        return Attack(name, "auto")
    try:
        return Attack(name, float(value))
    except ValueError as error:
        raise SettingsError(
            f"--attacks {text}: expected a number after the colon, e.g. {name}:2"
        ) from error


def _refuse_unknown(flag: str, text: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SettingsError(
        f'{flag} {text}: there is no "{name}"; {hint}known: {", ".join(known)}'
    )


def default_rules(experiment: Experiment) -> tuple[Rule, ...]:
    """The rules to try where none are named: the preset's own is one of them."""
    names = list(DEFAULT_RULES)
    if experiment.proxy:
        names.append("fltrust")
    own = Rule(experiment.aggregation.before, experiment.aggregation.rule)
    if own.name not in names:
        names.insert(0, own.name)
    return tuple(map(parse_rule, names))


def default_attacks() -> tuple[Attack, ...]:
    """The attacks to try where none are named."""
    return tuple(map(parse_attack, DEFAULT_ATTACKS))


def cells_of(experiment: Experiment, plan: Plan) -> list[Cell]:
    """Every cell of the plan, fraction by fraction and rule by rule.

    Cells with equal settings have one label: a rule that is not told f has one clean
    run for all fractions. Raises SettingsError, with the rule, for settings that
    cannot be.
    """
    if experiment.adversary.is_active:
        raise SettingsError(
            f'adversary.attack = "{experiment.adversary.attack}": the stress test sets '
            "the attack and the malicious clients of every run itself; leave attack, "
            "clients and fraction out of [adversary], and give --attacks and --fraction"
        )
    cells = []
    for fraction in plan.fractions:
        for rule in plan.rules:
            columns: list[Attack | None] = [None, Attack(ABSENT), *plan.attacks]
            cells += [_cell(experiment, rule, fraction, each) for each in columns]
    return cells


def _cell(
    experiment: Experiment, rule: Rule, fraction: float, attack: Attack | None
) -> Cell:
    settings: dict[str, Any] = {
        "aggregation.rule": rule.rule,
        "aggregation.before": rule.before,
    }
    given = experiment.aggregation
    has_f = given.byzantine is not None or given.fraction is not None
    parts = [rule.name]
    if rule.counts and not has_f:
        settings["aggregation.fraction"] = fraction
        parts.append(f"f{fraction:g}")
    column = CLEAN
    if attack is not None:
        column = attack.name
        for key, value in attack.settings.items():
            settings[f"adversary.{key}"] = value
        settings["adversary.fraction"] = fraction
        parts.append(f"{column}-{fraction:g}")
    else:
        parts.append(CLEAN)
    # Every run goes on to its last round: that is what is compared.
    changes = {**settings, "checkpoint.stop_on_jump": False}
    try:
        changed = experiment.model_copy(update=changes)
    except SettingsError as error:
        raise SettingsError(f"{rule.name} against {column}: {error}") from error
    label = "-".join(parts)
    return Cell(rule.name, fraction, column, label, settings, changed)
