"""What a run with noise guarantees: (epsilon, delta) of differential privacy for one client, by Opacus' accountants.

    z  noise multiplier: standard deviation of the noise over the clipping bound C   q  probability to take part in a step
    RDP  Renyi differential privacy, converted as in Balle et al. (AISTATS 2020): an upper bound
    PRV  privacy random variables (Gopi, Lee, Wutschitz, NeurIPS 2021): a tighter one, within 0.01 of the smallest epsilon

Two views, which must not be mixed up. `client_update`: every client adds noise to its own message, and the guarantee is against
whoever reads that message, the server included. `global_model`: the server adds noise to a sum, and the guarantee is against those
who see the models alone, not against the server.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedcore.messages.defence import DefenceSettings

PRV_POINTS = (
    4_000_000  # of the discretised loss; more takes longer than an epsilon is worth
)
PRV_REACH = 700.0  # exp of it is still a float64
PRV_ERROR = 0.01  # in epsilon

_BESIDE = (
    "It does not cover the clients' evaluation messages, their example counts, who took part, and this run directory; and the "
    "noise is drawn from the run's seed, and whoever knows that can take it off again: this is the guarantee of a simulation."
)
COVERS = {
    "client_update": f"Privacy: epsilon covers what one client sent to train, each message by itself and all together. {_BESIDE}",
    "global_model": "Privacy: epsilon covers the sequence of global models, against those who see nothing else. It says nothing of "
    f"a single client's update, which the server reads without noise. {_BESIDE}",
}
"""What an epsilon of either view is about, for the report."""


class Mechanism(NamedTuple):
    """One step of a Gaussian mechanism, as the accountant has to know it."""

    noise_multiplier: float  # z
    sample_rate: float  # q
    view: str  # what is protected: "client_update" or "global_model"
    neighbours: str  # what two data sets that must look alike differ in
    sampling: str  # of clients, in words


class Guarantee(NamedTuple):
    """What was spent after `steps` steps. An epsilon without noise is infinite."""

    epsilon_rdp: float
    epsilon_prv: float | None  # None: `prv_failed` says why
    prv_failed: str | None
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    unit: str
    neighbours: str
    sampling: str
    view: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no infinity: "inf" stands for it."""
        return {
            key: "inf" if value == math.inf else value
            for key, value in self._asdict().items()
        }


def local(s: DefenceSettings) -> Mechanism:
    """Every client's own noise: a message is a Gaussian mechanism on a vector of norm at most C, present or zero."""
    return Mechanism(
        s.noise_multiplier,
        1.0,
        "client_update",
        "one client's message, or zeros in its place",
        "none assumed: every message counts",
    )


def central(noise_multiplier: float, sample_rate: float) -> Mechanism:
    """Noise on the sum of the clipped updates of clients that each take part with probability `sample_rate`."""
    sampling = (
        "every client in every round"
        if sample_rate == 1
        else f"Poisson, rate {sample_rate:g}"
    )
    return Mechanism(
        noise_multiplier,
        sample_rate,
        "global_model",
        "with or without one client",
        sampling,
    )


def default_delta(population: int) -> float:
    """Well below one in N: with delta = 1/N a mechanism may publish one client whole."""
    return min(1e-5, math.exp(-1.1 * math.log(population)))


def guarantee(m: Mechanism, steps: int, delta: float, prv: bool = True) -> Guarantee:
    """What `steps` steps of `m` spend. `prv = False` leaves the slower accountant out."""
    epsilon = epsilon_rdp(m.noise_multiplier, m.sample_rate, steps, delta)
    found, failed = (
        epsilon_prv(m.noise_multiplier, m.sample_rate, steps, delta)
        if prv
        else (None, "computed after the last round")
    )
    facts = (
        delta,
        m.noise_multiplier,
        m.sample_rate,
        steps,
        "client",
        m.neighbours,
        m.sampling,
        m.view,
    )
    return Guarantee(epsilon, found, failed, *facts)


def epsilon_rdp(z: float, q: float, steps: int, delta: float) -> float:
    """By the RDP accountant, at its default orders. 0 without a step, infinite without noise."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if steps == 0 or z == 0:
        return math.inf if steps else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the best order is the largest or smallest: still an upper bound
        epsilon, _ = get_privacy_spent(
            orders=RDPAccountant.DEFAULT_ALPHAS, rdp=steps * _rdp(z, q), delta=delta
        )
    return max(float(epsilon), 0.0)


@lru_cache(maxsize=8)
def _rdp(z: float, q: float) -> np.ndarray:
    """Of one step, at every order."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    with np.errstate(all="ignore"):
        rdp: np.ndarray = np.asarray(
            compute_rdp(
                q=q, noise_multiplier=z, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS
            )
        )
    return rdp


def epsilon_prv(
    z: float, q: float, steps: int, delta: float
) -> tuple[float | None, str | None]:
    """(epsilon by the PRV accountant, None), or (None, why there is none): it fails on extreme parameters."""
    from opacus.accountants import PRVAccountant

    if steps == 0 or z == 0:
        return (math.inf if steps else 0.0), None
    error = delta / 1000
    # Its grid, as it will choose it: asked here, for it would fill the memory, or overflow without a word.
    reach = 3 + max(
        epsilon_rdp(z, q, steps, error / 4), epsilon_rdp(z, q, 1, error / (8 * steps))
    )
    points = 2 * reach / PRV_ERROR * math.sqrt(steps * math.log(12 / error) / 2)
    if reach > PRV_REACH or points > PRV_POINTS:
        return (
            None,
            f"epsilon is too large for it: its grid would reach to {reach:.3g} in {points:.2g} points",
        )
    accountant = PRVAccountant()
    accountant.history = [(z, q, steps)]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            epsilon = float(
                accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=error)
            )
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as e:
        return None, f"{type(e).__name__}: {e}"
    return (epsilon, None) if math.isfinite(epsilon) else (None, f"it found {epsilon}")


def describe(found: dict[str, Any]) -> tuple[str, str]:
    """(epsilon, what it means) of a Guarantee's `to_dict`, for a person."""
    scope = (
        f"delta {found['delta']:.3g}; unit: one {found['unit']} ({found['neighbours']}); sampling: {found['sampling']}; "
        f"view: {found['view']}, {found['steps']} steps"
    )
    if found["epsilon_rdp"] == "inf":
        return "epsilon inf", f"no noise; {scope}"
    rdp, prv = found["epsilon_rdp"], found.get("epsilon_prv")
    if prv is None:
        return f"epsilon {rdp:.4g}", f"by RDP, {scope}"
    return f"epsilon {prv:.4g}", f"by PRV, {rdp:.4g} by RDP, {scope}"
