"""The guarantee of a run with noise: (epsilon, delta) of differential privacy.

It is for one client, by Opacus' accountants.

    z    noise multiplier: standard deviation of the noise over the clipping bound C
    q    probability to take part in a step
    RDP  Renyi differential privacy, converted as in Balle et al. (AISTATS 2020): an
         upper bound
    PRV  privacy random variables (Gopi, Lee, Wutschitz, NeurIPS 2021): a tighter one,
         within 0.01 of the smallest epsilon

Three views, which must not be mixed up. `client_update`: every client adds noise to its
own message, and the guarantee is against whoever reads that message, the server
included. `global_model`: the server adds noise to a sum, and the guarantee is against
those who see the models alone, not against the server. `secure_sum`: clients add
discrete noise to a sum of which the server sees nothing else, and the guarantee is
against everybody, the server included, as long as not more clients collude than the
settings have it. Its z is the effective one, whose Gaussian mechanism has the same RDP
(zero-concentrated differential privacy is a line, alpha / 2 z^2).
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fedcore.messages.defence import DefenceSettings

__all__ = [
    "Guarantee",
    "Mechanism",
    "central",
    "covers",
    "default_delta",
    "describe",
    "distributed",
    "epsilon_prv",
    "epsilon_rdp",
    "guarantee",
    "local",
]

# Points of PRV's discretised loss; more take longer than an epsilon is worth.
PRV_POINTS = 4_000_000
PRV_REACH = 700.0  # exp of it is still a float64
PRV_ERROR = 0.01  # in epsilon

FROM_SEED = "drawn from the run's seed"
FROM_DEVICES = "drawn by each device from its operating system"

_NOT_COVERED = (
    "It does not cover the clients' evaluation messages, their example counts, who "
    "took part, and this run directory"
)
_SIMULATED = (
    "and the noise is drawn from the run's seed, and whoever knows that can take it "
    "off again: this is the guarantee of a simulation."
)
_COVERS = {
    "client_update": "Privacy: epsilon covers what one client sent to train, each "
    "message by itself and all together.",
    "global_model": "Privacy: epsilon covers the sequence of global models, against "
    "those who see nothing else. It says nothing of a single client's update, which "
    "the server reads without noise.",
    "secure_sum": "Privacy: epsilon covers the sums of clients' messages, and the "
    "models made of them, against everybody, the server too. It holds where clients "
    "mask what they send, and not more of them collude than defence.distributed "
    "allows.",
}


class Mechanism(NamedTuple):
    """One step of a Gaussian mechanism, as the accountant has to know it."""

    noise_multiplier: float  # z
    sample_rate: float  # q
    # What is protected: "client_update", "global_model" or "secure_sum".
    view: str
    neighbours: str  # what two data sets that must look alike differ in
    sampling: str  # of clients, in words
    noise: str = FROM_SEED  # where it comes from, in words

    @property
    def counts_messages(self) -> bool:
        """Whether a step is a message of a client, not a round."""
        return self.view in ("client_update", "secure_sum")


class Guarantee(NamedTuple):
    """The guarantee after `steps` steps. An epsilon without noise is infinite."""

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
    noise: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON, which has no infinity: "inf" stands for it."""
        fields = self._asdict()
        for name, value in fields.items():
            if value == math.inf:
                fields[name] = "inf"
        return fields


def local(settings: DefenceSettings) -> Mechanism:
    """The noise of every client on its own message.

    A message is a Gaussian mechanism on a vector of norm at most C, present or zero.
    """
    return Mechanism(
        settings.noise_multiplier,
        1.0,
        "client_update",
        "one client's message, or zeros in its place",
        "none assumed: every message counts",
    )


def central(noise_multiplier: float, sample_rate: float) -> Mechanism:
    """The noise of the server on a sum of clipped updates.

    Each client takes part with probability `sample_rate`.
    """
    sampling = "every client in every round"
    if sample_rate != 1:
        sampling = f"Poisson, rate {sample_rate:g}"
    return Mechanism(
        noise_multiplier,
        sample_rate,
        "global_model",
        "with or without one client",
        sampling,
    )


def distributed(effective_multiplier: float, is_secret: bool) -> Mechanism:
    """The noise of all clients in a secure sum, by its effective multiplier.

    `is_secret` says that devices draw it themselves.
    """
    return Mechanism(
        effective_multiplier,
        1.0,
        "secure_sum",
        # Who took part is no secret, and a client that was not there adds no noise.
        "one client's message, or zeros in its place",
        "none assumed: every message counts",
        FROM_DEVICES if is_secret else FROM_SEED,
    )


def covers(spent: dict[str, Any]) -> str:
    """What an epsilon is about, and what not, for the report.

    `spent` is a Guarantee's `to_dict`, or that of an older run.
    """
    about = f"{_COVERS[spent['view']]} {_NOT_COVERED}"
    if spent.get("noise", FROM_SEED) == FROM_SEED:
        return f"{about}; {_SIMULATED}"
    return f"{about}."


def default_delta(population: int) -> float:
    """A delta well below 1/N, at which a mechanism may publish one client whole.

    >>> default_delta(1000)
    1e-05
    """
    return min(1e-5, math.exp(-1.1 * math.log(population)))


def guarantee(
    mechanism: Mechanism, steps: int, delta: float, prv: bool = True
) -> Guarantee:
    """The guarantee after `steps` steps of a mechanism.

    `prv = False` leaves the slower accountant out.
    """
    z, q = mechanism.noise_multiplier, mechanism.sample_rate
    tight: float | None = None
    failed: str | None = "computed after the last round"
    if mechanism.view == "secure_sum":
        failed = "it is about continuous noise, and this noise is discrete"
    elif prv:
        tight, failed = epsilon_prv(z, q, steps, delta)
    return Guarantee(
        epsilon_rdp=epsilon_rdp(z, q, steps, delta),
        epsilon_prv=tight,
        prv_failed=failed,
        delta=delta,
        noise_multiplier=z,
        sample_rate=q,
        steps=steps,
        unit="client",
        neighbours=mechanism.neighbours,
        sampling=mechanism.sampling,
        view=mechanism.view,
        noise=mechanism.noise,
    )


def epsilon_rdp(z: float, q: float, steps: int, delta: float) -> float:
    """Epsilon by the RDP accountant, at its default orders.

    0 without a step, infinite without noise.

    >>> round(epsilon_rdp(z=1.1, q=0.01, steps=1000, delta=1e-5), 2)
    1.71
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if steps == 0 or z == 0:
        return math.inf if steps else 0.0
    orders = RDPAccountant.DEFAULT_ALPHAS
    rdp = steps * _rdp(z, q)
    with warnings.catch_warnings():
        # That the best order is the largest or smallest: still an upper bound.
        warnings.simplefilter("ignore")
        epsilon, _ = get_privacy_spent(orders=orders, rdp=rdp, delta=delta)
    return max(float(epsilon), 0.0)


@lru_cache(maxsize=64)
def _rdp(z: float, q: float) -> np.ndarray:
    """The RDP of one step, at every order."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    with np.errstate(all="ignore"):
        rdp = compute_rdp(q=q, noise_multiplier=z, steps=1, orders=orders)
    return np.asarray(rdp)


def epsilon_prv(
    z: float, q: float, steps: int, delta: float
) -> tuple[float | None, str | None]:
    """(epsilon by the PRV accountant, None), or (None, why there is none).

    It fails on extreme parameters.
    """
    from opacus.accountants import PRVAccountant

    if steps == 0 or z == 0:
        return (math.inf if steps else 0.0), None
    error = delta / 1000
    reach, points = _prv_grid(z, q, steps, error)
    if reach > PRV_REACH or points > PRV_POINTS:
        return (
            None,
            "epsilon is too large for it: "
            f"its grid would reach to {reach:.3g} in {points:.2g} points",
        )
    accountant = PRVAccountant()
    accountant.history = [(z, q, steps)]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            epsilon = accountant.get_epsilon(
                delta, eps_error=PRV_ERROR, delta_error=error
            )
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as failure:
        return None, f"{type(failure).__name__}: {failure}"
    if not math.isfinite(epsilon):
        return None, f"it found {float(epsilon)}"
    return float(epsilon), None


def _prv_grid(z: float, q: float, steps: int, error: float) -> tuple[float, float]:
    """(reach, number of points) of the grid that the PRV accountant will choose.

    It would otherwise fill the memory, or overflow without a word.
    """
    whole = epsilon_rdp(z, q, steps, error / 4)
    one = epsilon_rdp(z, q, 1, error / (8 * steps))
    reach = 3 + max(whole, one)
    points = 2 * reach / PRV_ERROR * math.sqrt(steps * math.log(12 / error) / 2)
    return reach, points


def describe(spent: dict[str, Any]) -> tuple[str, str]:
    """(epsilon, what it means) of a Guarantee's `to_dict`, for a person."""
    scope = (
        f"delta {spent['delta']:.3g}; "
        f"unit: one {spent['unit']} ({spent['neighbours']}); "
        f"sampling: {spent['sampling']}; "
        f"view: {spent['view']}, {spent['steps']} steps"
    )
    if spent["view"] == "secure_sum":
        scope += f"; noise: {spent['noise']}"
    if spent["epsilon_rdp"] == "inf":
        return "epsilon inf", f"no noise; {scope}"
    rdp, prv = spent["epsilon_rdp"], spent.get("epsilon_prv")
    if prv is None:
        return f"epsilon {rdp:.4g}", f"by RDP, {scope}"
    return f"epsilon {prv:.4g}", f"by PRV, {rdp:.4g} by RDP, {scope}"
