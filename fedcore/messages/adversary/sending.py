"""The messages of the malicious clients of a round, by attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.messages.adversary import attacks
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.rng import seed_of

Rule = Callable[[Tensor, Tensor, int], Tensor]
"""(rows [n, d], their weights [n], number of the vector in the message) -> [d].

The rule in force, for optimised attacks. At every call its memory is as it was before
the round; the rows are used again, and may be neither changed nor kept.
"""

WARM_UP = 10  # rounds after which the target of mimic stays


class Crowd(NamedTuple):
    """Those who reported. Places are int64, on the CPU."""

    clients: Tensor  # [n] int64, ascending
    honest: Tensor  # [h] places of those who are honest, and whose message is finite
    hostile: Tensor  # [m] places of the malicious
    weights: Tensor  # [n] float64


class Scene(NamedTuple):
    """One vector of the messages of a round."""

    crowd: Crowd
    rows: Tensor  # [n, d]
    broadcast: Tensor | None  # [d], of the same shapes in what the server sent
    function: str
    t: int
    number: int  # of the vector in the message

    @property
    def honest(self) -> Tensor:
        """H [h, d], a copy."""
        return self.at(self.crowd.honest)

    def at(self, places: Tensor) -> Tensor:
        """The rows at these places, a copy."""
        return self.rows[places.to(self.rows.device)]


class Sender:
    """Makes malicious messages; memory is what it is given, and nothing of its own."""

    def __init__(self, settings: AdversarySettings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def sent(self, scene: Scene, kept: dict[str, Tensor], rule: Rule | None) -> Tensor:
        """The malicious rows: [d], or [m, d]. Puts into `kept` what is remembered."""
        match self.settings.attack:
            case "sign_flip":
                return -self._factor(scene) * scene.at(scene.crowd.hostile).double()
            case "scaled" | "backdoor":
                return self._factor(scene) * scene.at(scene.crowd.hostile).double()
            case "gaussian":
                return self._gaussian(scene)
            case "alie":
                return attacks.alie(scene.honest, self._z(scene))
            case "ipm":
                return attacks.ipm(scene.honest, self._scale(0.5))
            case "alie_optimised" | "ipm_optimised":
                return self._optimised(scene, rule)
            case "minmax":
                return attacks.minmax(scene.honest, self.settings.direction)
            case "minsum":
                return attacks.minsum(scene.honest, self.settings.direction)
            case "mimic":
                return self._mimic(scene, kept)
            case "stale":
                return _stale(scene, kept)
            case _:
                return scene.rows.new_zeros(scene.rows.shape[1])

    def _scale(self, default: float) -> float:
        """The strength, where it is a number."""
        scale = self.settings.scale
        return default if scale is None or scale == "auto" else scale

    def _z(self, scene: Scene) -> float:
        if self.settings.scale == "auto":
            return attacks.z_max(len(scene.rows), len(scene.crowd.hostile))
        return self._scale(1.5)

    def _factor(self, scene: Scene) -> float:
        """gamma of an attack that multiplies the client's own message.

        Model replacement makes the mean that which malicious clients sent, where the
        others send nothing: gamma = sum of all weights / sum of theirs.
        """
        scale, attack = self.settings.scale, self.settings.attack
        if scale != "auto" and (scale is not None or attack != "scaled"):
            return self._scale(1.0)
        weights = scene.crowd.weights
        theirs = float(weights[scene.crowd.hostile].sum())
        return float(weights.sum()) / theirs if theirs > 0 else 1.0

    def _gaussian(self, scene: Scene) -> Tensor:
        crowd, honest, rows = scene.crowd, scene.honest, []
        for client in crowd.clients[crowd.hostile].tolist():
            draw = self._draw(scene, scene.t, client)
            rows.append(attacks.gaussian(honest, self._scale(1.0), draw))
        return torch.stack(rows)

    def _draw(self, scene: Scene, *ids: int) -> torch.Generator:
        purpose = f"{self.settings.attack} {scene.function} {scene.number}"
        return torch.Generator().manual_seed(seed_of(self.seed, purpose, *ids))

    def _optimised(self, scene: Scene, rule: Rule | None) -> Tensor:
        """ALIE or IPM, as strong as hurts most under the rule in force."""
        crowd, honest = scene.crowd, scene.honest
        mu, sigma = attacks.mean(honest), attacks.deviation(honest)
        is_alie = self.settings.attack == "alie_optimised"
        usable = torch.cat([crowd.honest, crowd.hostile]).sort().values
        rows = scene.at(usable)
        hostile = torch.searchsorted(usable, crowd.hostile).to(rows.device)
        weights = crowd.weights[usable].to(rows.device)

        def vector(tau: float) -> Tensor:
            return mu + tau * sigma if is_alie else -tau * mu

        def damage(sent: Tensor) -> float:
            rows[hostile] = sent.to(rows)
            if rule is not None:
                result = rule(rows, weights, scene.number)
            else:
                result = (weights / weights.sum()).to(rows) @ rows
            return float((result.to(mu) - mu).norm())

        return attacks.optimised(vector, damage)

    def _mimic(self, scene: Scene, kept: dict[str, Tensor]) -> Tensor:
        """The message of one honest client, the same one after the warm-up."""
        name = f"mimic {scene.function} {scene.number}"
        steps = int(kept.get(f"{name} steps", torch.tensor(0)))
        target, honest = kept.get(f"{name} target"), scene.honest
        ids = scene.crowd.clients[scene.crowd.honest]
        if steps == WARM_UP and target is not None and bool((ids == target).any()):
            return honest[int((ids == target).nonzero()[0])]
        z = kept.get(f"{name} z")
        if z is None:
            z = torch.randn(scene.rows.shape[1], generator=self._draw(scene))
        z = z.to(scene.rows.device)
        if steps < WARM_UP:
            # In float32 at once: what a resumed run reads is what this one computes.
            z = attacks.mimic_direction(honest, z, steps).float()
            kept[f"{name} z"] = z.cpu()
            kept[f"{name} steps"] = torch.tensor(steps + 1)
        row = attacks.mimicked(honest, z)  # without the target: who is most like it
        if steps < WARM_UP:
            kept[f"{name} target"] = ids[row].clone()
        return honest[row]


def _stale(scene: Scene, kept: dict[str, Tensor]) -> Tensor:
    """The change since the last broadcast that malicious clients heard; at first 0."""
    name = f"stale {scene.function} {scene.number}"
    before, now = kept.get(name), scene.broadcast
    if now is None:
        return scene.rows.new_zeros(scene.rows.shape[1])
    kept[name] = now.cpu()
    return torch.zeros_like(now) if before is None else now - before.to(now)
