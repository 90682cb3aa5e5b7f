"""DP-FedAvg - client-level differential privacy (McMahan et al., ICLR 2018, Alg. 1).

theta_t  global parameters       Delta^k  clipped update of client k
S  clipping bound (here C)       z  noise multiplier
q  probability that a client takes part in a round
W  total weight, here N with w_k = 1       sigma  z C / (q N)

Choices: flat clipping, over all tensors of the update together; uniform weights; the
         estimator with the fixed denominator q W, whose sensitivity is C / (q N) (the
         paper's other one divides by who came, at least q W_min).
Noise:   N(0, sigma^2) on the mean of every round, on one that nobody attended too.
         Drawn from the run's seed: a simulation.
Sends:   the clipped difference and nothing else: a loss would be neither clipped nor
         noised.
Guards:  the sequence of global models; the server itself reads every update. For noise
         on the clients: `defence`, with fedavg.
Reduces: to FedAvg with uniform weights when z = 0, C is large, and everybody takes
         part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.local import local_sgd
from fedcore.messages.defence import clip
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.privacy import Mechanism, central
from fedcore.reports import equally
from fedcore.rng import rng
from fedcore.rounds.participation import Process
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    server_lr: float = Field(
        1.0, gt=0, description="step size of the server; 1 is the paper's"
    )
    clip: float = Field(
        1.0,
        gt=0,
        description="C (the paper's S), bound on the L2 norm of a client's update",
    )
    noise_multiplier: float = Field(
        1.0,
        ge=0,
        description="z, standard deviation of the noise on the sum over C; "
        "0 = no guarantee",
    )


class Up(NamedTuple):
    delta: Params  # Delta^k, of norm at most C


class DPFedAvg(Method[Settings]):
    def mechanism(self, process: Process) -> Mechanism:
        if self.s.noise_multiplier == 0:  # no guarantee
            return central(0.0, 1.0)._replace(sampling="any")
        if process.poisson is None:
            raise SettingsError(
                "the accountant of dpfedavg assumes that every client takes part with "
                "one known probability, independently: set participation.name = "
                '"bernoulli" and participation.mean (the rate q), or let everybody '
                "take part always"
            )
        # Clients that drop out make the true rate smaller still.
        return central(self.s.noise_multiplier, process.poisson)

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        theta, _, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(clip(trees.sub_(theta, down.params), self.s.clip)), state  # ClipFn

    def round(self, server: Model, r: Round) -> Model:
        total = r.mean(self.train, r.cohort, server, equally).total.delta
        deviation = self.s.noise_multiplier * self.s.clip
        draw = rng(r.seed, "dp noise", r.t)

        def noisy(x: Tensor) -> Tensor:
            noise = torch.as_tensor(draw.standard_normal(x.shape)).to(x)
            return x + deviation * noise

        step = self.s.server_lr / self._expected_clients(r)
        return Model(trees.axpy(step, trees.map(noisy, total), server.params))

    def refuses(self, setting: Setting) -> str | None:
        if setting == "distributed":
            return (
                "its server adds noise already: take fedavg with method.weighting = "
                '"participating"'
            )
        if setting != "rule":
            return super().refuses(setting)
        return (
            "its accountant assumes a sum of clipped messages; set aggregation.clip to "
            "method.clip, so that the server clips too"
        )

    def _expected_clients(self, r: Round) -> float:
        """q N, without those that drop out; a trace has no rate, and no noise."""
        if r.rates is None:
            return max(len(r.cohort), 1)
        return float(r.rates.sum())
