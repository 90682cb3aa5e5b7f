"""The guarantee of `[local.dp]`: (epsilon, delta) for one example of one client.

Every step of DP-SGD is a Gaussian mechanism on a Poisson sample of the client's
examples (`fedcore.dpsgd`), and a client takes K of them for every message that it
sends: so client k has spent, after m_k messages, what

    m_k K_k steps at rate q_k with noise multiplier z

cost. Clients differ in q_k and K_k, so that each has an epsilon of its own; a row names
the worst, and the one of the median client.

It holds against whoever reads the client's messages, the server included, and so
against all who see the models. It does not hide that a client took part, or how many
examples it holds: those are taken as known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedcore import privacy, trees
from fedcore.checks.gradient import why_not_batched
from fedcore.data.sampling import epoch_steps
from fedcore.dpsgd import clipped_sum
from fedcore.errors import SettingsError
from fedcore.method import Method
from fedcore.rng import torch_seed
from fedcore.statistics import statistic_names
from fedcore.types import Params, Tree

if TYPE_CHECKING:
    from fedcore.config import Experiment
    from fedcore.rounds.saving import State
    from fedcore.task import Task

__all__ = ["COVERS", "ExamplePrivacy", "described", "refuse", "sent_again"]

COVERS = (
    "Privacy of examples: this epsilon covers one training example of one client, in "
    "all messages that the client sent to train, against whoever reads them, the "
    "server included. It does not cover the clients' evaluation messages and "
    "fine-tuning, who took part, how many examples a client holds, and this run "
    "directory. In a simulation the noise, and which examples a step draws, follow "
    "from the run's seed, and whoever knows that can take the noise off again; a "
    "device draws both from its own system."
)
"""The meaning of the epsilon of one example, for the report."""

RATES = 48  # different q that the accountant is asked for, at most


class ExamplePrivacy:
    """The accountant of all clients."""

    def __init__(self, experiment: Experiment, task: Task, method: Method[Any]) -> None:
        local = experiment.local
        clients = np.arange(task.population)
        counts = task.data.num_examples(clients, "train")
        steps = task.data.steps(clients, "train", local)
        if experiment.engine.name == "grid":
            # Devices count their own examples, on which neither q nor K depends.
            assert local.dp.rate is not None
            counts = np.ones_like(counts)
            steps = np.full_like(
                counts, local.steps or epoch_steps(local.dp.rate) * local.epochs
            )
        self._noise, self._holds = local.dp.noise, counts > 0
        self._delta = delta_for(experiment, counts)
        different, places = np.unique(counts, return_inverse=True)
        rates = np.array([local.example_rate(n) for n in different.tolist()])
        self._rates = _few(rates)[places]
        self._steps = method.passes() * steps

    def spent(self, sent: Tensor, is_last: bool) -> dict[str, Any]:
        """The guarantee after `sent` messages of each client, [population].

        By the slower accountant too after the last round.
        """
        steps = sent.numpy() * self._steps
        epsilons = self._epsilons(steps)
        worst = int(epsilons.argmax())
        mechanism = privacy.Mechanism(
            self._noise,
            float(self._rates[worst]),
            "example",
            "with or without one example of one client",
            f"Poisson, each example with rate {self._rates[worst]:.4g} a step",
        )
        guarantee = privacy.guarantee(
            mechanism, int(steps[worst]), self._delta, prv=is_last
        )
        fields = guarantee._replace(unit="example").to_dict()
        median = float(np.median(epsilons[self._holds])) if self._holds.any() else 0.0
        fields["client"] = worst
        fields["median_epsilon_rdp"] = "inf" if median == math.inf else median
        return {"privacy_examples": fields}

    def _epsilons(self, steps: np.ndarray) -> np.ndarray:
        """Epsilon of each client by RDP, [population]."""
        pairs = np.stack([self._rates, steps.astype(np.float64)], 1)
        kinds, places = np.unique(pairs, axis=0, return_inverse=True)
        epsilons = []
        for rate, count in kinds.tolist():
            epsilons.append(self._epsilon(rate, int(count)))
        return np.array(epsilons)[places.reshape(-1)]

    def _epsilon(self, rate: float, steps: int) -> float:
        return privacy.epsilon_rdp(self._noise, rate, steps, self._delta)


def sent_again(experiment: Experiment, state: State, folder: Path) -> Tensor:
    """Messages of each client up to a state from which the run in `folder` goes on.

    Devices draw anew where they train again, so that messages of rounds that are lost
    count as well; and those of the round that was under way.
    """
    metrics = folder / "metrics.jsonl"
    is_secret = experiment.engine.name == "grid" and experiment.local.dp.is_active
    if not is_secret or not metrics.exists():
        return state.sent
    lost = metrics.read_bytes().count(b"\n") - state.t
    return state.sent + max(lost, 0) + 1


def _few(rates: np.ndarray) -> np.ndarray:
    """The rates; where there are too many, the next of a grid, which is no lower.

    A higher rate has a higher epsilon: it stays an upper bound.

    >>> bool((_few(np.linspace(0.01, 1, 500)) >= np.linspace(0.01, 1, 500)).all())
    True
    """
    if len(np.unique(rates)) <= RATES:
        return rates
    grid = np.geomspace(rates.min(), rates.max(), RATES)
    grid[-1] = rates.max()
    return np.asarray(grid[np.searchsorted(grid, rates).clip(max=RATES - 1)])


def delta_for(experiment: Experiment, counts: np.ndarray) -> float:
    """The delta of the guarantee, below 1/n of the largest client.

    Raises SettingsError where `defence.delta` is not.
    """
    largest, given = int(counts.max(initial=1)), experiment.defence.delta
    if given is None:
        return privacy.default_delta(largest)
    if given * largest >= 1:
        raise SettingsError(
            f"defence.delta = {given:g}: with local.dp it is the probability that a "
            f"guarantee for one example fails, and a client holds {largest} of them: "
            f"set it below 1 / {largest}, or leave it out"
        )
    return given


def described(spent: dict[str, Any]) -> tuple[str, str]:
    """(epsilon, what it means) of `ExamplePrivacy.spent`, for a person."""
    epsilon, meaning = privacy.describe(spent)
    median = spent["median_epsilon_rdp"]
    if median == "inf":
        return epsilon, meaning
    of_median = f"client {spent['client']} has most, the median client {median:.4g}"
    return epsilon, f"{meaning}; {of_median} by RDP"


def refuse(experiment: Experiment, task: Task, method: Method[Any]) -> None:
    """Raises SettingsError where local steps cannot be those of DP-SGD."""
    name = experiment.method.name
    reason = method.refuses("dp")
    if reason is None and method.works_unasked:
        reason = "its clients also train in rounds that nobody counts"
    if reason is not None:
        raise SettingsError(
            f"local.dp does not fit {name}: {reason}; leave it out, or choose another "
            "method, e.g. fedavg"
        )
    _refuse_loss(task)
    if experiment.engine.name == "grid":
        if experiment.local.dp.rate is None:
            raise SettingsError(
                "local.dp.rate is not set, and would be batch_size / a device's number "
                "of examples, which the server does not know, nor its epsilon: set "
                "it, e.g. local.dp.rate = 0.05"
            )
        return
    counts = task.data.num_examples(np.arange(task.population), "train")
    delta_for(experiment, counts)


def _refuse_loss(task: Task) -> None:
    """Refuse a loss that is no mean over examples by themselves."""
    if task.penalty is not None:
        raise SettingsError(
            "local.dp bounds the gradient of single examples, and the model has a "
            "penalty of its own, which is of no example: leave it out, or local.dp"
        )
    if names := statistic_names(task.model):
        raise SettingsError(
            f'local.dp: the model\'s "{min(names)}" is a statistic of batches, which '
            "noise does not protect: convert the model by to_group_norm of "
            "fedcore.models.norms"
        )
    if len(task.data.y) == 0:
        return  # a server without examples
    rows = [0, len(task.data.y) - 1]
    x, y = trees.map(lambda column: column[rows], (task.data.x, task.data.y))
    one, both = torch.ones(1, device=task.device), torch.ones(2, device=task.device)

    def of_one(params: Params, own_x: Tree, own_y: Tensor) -> Tensor:
        return task.loss(params, own_x, own_y, one)

    try:
        with torch_seed(0, "check", device=task.device):
            clipped_sum(of_one, task.init_params(), x, y, both, 1.0)
    except Exception as error:
        raise SettingsError(
            "local.dp takes the gradient of every example by itself, for which this "
            f"model cannot be batched ({why_not_batched(error)}): leave local.dp out, "
            "or write the model in operations that torch.func.vmap knows"
        ) from error
