"""The plan of an audit: which attacks, with which settings and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from fedcore.audit.attacks.analytic import Analytic
from fedcore.audit.attacks.base import Attack, settings_of
from fedcore.audit.attacks.dlfa import DLFA
from fedcore.audit.attacks.dlg import DLG
from fedcore.audit.attacks.idlg import IDLG
from fedcore.audit.attacks.inverting_gradients import IG
from fedcore.audit.attacks.sme import SME
from fedcore.errors import SettingsError

IMAGE_ATTACKS: dict[str, type[Attack[Any]]] = {
    "sme": SME,
    "ig": IG,
    "dlg": DLG,
    "idlg": IDLG,
    "dlfa": DLFA,
    "analytic": Analytic,
}
ATTACKS = (*IMAGE_ATTACKS, "labels", "membership")
DEFAULT_ATTACKS = ("sme", "ig", "analytic", "labels", "membership")

Budget = Literal["quick", "standard", "thorough", "paper"]
Labels = Literal["recovered", "oracle", "soft"]

# The settings of IG with which the authors of SME compare their attack.
SME_AUTHORS_IG = {"lr": 1.0, "tv": 0.01}
# Reference models of RMIA for each exchange.
REFERENCES: dict[Budget, int] = {
    "quick": 4,
    "standard": 8,
    "thorough": 16,
    "paper": 8,
}
# "paper" is every attack in its own paper's settings.
BUDGETS: dict[Budget, dict[str, dict[str, Any]]] = {
    "quick": {
        "sme": {"iterations": 300},
        "ig": {"iterations": 300, **SME_AUTHORS_IG},
        "dlg": {"iterations": 50},
        "idlg": {"iterations": 50},
        "dlfa": {"iterations": 100},
    },
    "standard": {
        "sme": {"iterations": 1000, "restarts": 2},
        "ig": {"iterations": 1000, "restarts": 2, **SME_AUTHORS_IG},
        "dlg": {"iterations": 150},
        "idlg": {"iterations": 150},
        "dlfa": {"iterations": 200},
    },
    "thorough": {
        "sme": {"iterations": 4000, "restarts": 4},
        "ig": {"iterations": 4000, "restarts": 4, **SME_AUTHORS_IG},
    },
    "paper": {},
}


@dataclass(frozen=True)
class Plan:
    """The treatment of every cell."""

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by attack, over those of the budget."""
    budget: Budget = "quick"
    labels: Labels = "recovered"
    truth: bool = True  # score against the clients' data, where the simulation has it
    flip: bool = False  # messages are global minus local, which is never guessed
    images: bool = True  # show images in the report
    clients: int = 4  # of a cell
    seed: int = 0

    @property
    def references(self) -> int:
        """Reference models of membership inference, for each exchange."""
        return REFERENCES[self.budget]

    @property
    def image_attacks(self) -> list[str]:
        """The attacks that rebuild inputs, in the order of the plan."""
        return [name for name in self.attacks if name in IMAGE_ATTACKS]

    def settings(self, attack: str) -> dict[str, Any]:
        """Settings of one attack that rebuilds inputs, defaults included.

        Raises SettingsError for unknown or impossible ones.
        """
        values = dict(BUDGETS[self.budget].get(attack, {}))
        values |= self.options.get(attack, {})
        model = settings_of(IMAGE_ATTACKS[attack])
        try:
            return model.model_validate(values).model_dump()
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join([attack, *map(str, fault["loc"])])
            raise SettingsError(
                f"--option {key} = {fault['input']!r}: {fault['msg'].lower()}; "
                f"{attack} knows {', '.join(model.model_fields)}"
            ) from error

    def all_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of every attack that rebuilds inputs, by name."""
        return {name: self.settings(name) for name in self.image_attacks}

    def check(self) -> None:
        """Raises SettingsError for attacks and options that do not exist."""
        for name in (*self.attacks, *self.options):
            if name not in ATTACKS:
                raise SettingsError(
                    f'attack "{name}": there is no such attack; '
                    f"known: {', '.join(ATTACKS)}"
                )
        for name in self.options:
            if name not in IMAGE_ATTACKS:
                raise SettingsError(
                    f'--option {name}: the attack "{name}" has no settings'
                )
        self.all_settings()
