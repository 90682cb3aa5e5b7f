"""DP-FedAvg - client-level differential privacy (McMahan et al., ICLR 2018, Alg. 1);
with a bound that follows a quantile of the norms (Andrew et al., NeurIPS 2021, Alg. 1).

theta_t  global parameters       Delta^k  clipped update of client k
S  clipping bound (here C)       z  noise multiplier
q  probability that a client takes part in a round
W  total weight, here N with w_k = 1       sigma  z C / (q N)

With `quantile` (gamma), C_t the bound of round t, and m = q N:

    client   b^k = [|Delta^k| <= C_t], of the update before it is clipped
    server   b = 1/2 + (sum of (b^k - 1/2) + N(0, sigma_b^2)) / m
             C_{t+1} = C_t exp(-eta_C (b - gamma))
    z_Delta  (z^-2 - (2 sigma_b)^-2)^(-1/2) in the place of z, so that both releases
             together cost what z costs (Theorem 1)

Choices: flat clipping, over all tensors of the update together; uniform weights; the
         estimator with the fixed denominator q W, whose sensitivity is C / (q N) (the
         paper's other one divides by who came, at least q W_min).
Noise:   N(0, sigma^2) on the mean of every round, on one that nobody attended too.
         Drawn from the run's seed: a simulation. In a secure sum messages are rounded
         after they are clipped, and may be longer than C by that: noise is z times as
         large as the longest one.
Sends:   the clipped difference and nothing else: a loss would be neither clipped nor
         noised.
Guards:  the sequence of global models; the server itself reads every update. For noise
         on the clients: `defence`, with fedavg.
Reduces: to FedAvg with uniform weights when z = 0, C is large, and everybody takes
         part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
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
    quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="gamma: the bound moves to this quantile of the updates' norms; "
        "clip is its start. Default: it stays",
    )
    clip_lr: float = Field(0.2, gt=0, description="eta_C, step size of the bound")
    bit_noise: float | None = Field(
        None,
        gt=0,
        description="sigma_b, standard deviation of the noise on the count of updates "
        "within the bound; default: q N / 20",
    )

    @model_validator(mode="after")
    def _adapts(self) -> Settings:
        if self.quantile is None and self.bit_noise is not None:
            raise ValueError(
                f"bit_noise = {self.bit_noise:g} is of a bound that moves: set "
                "quantile, e.g. 0.5, or leave it out"
            )
        return self


class Server(NamedTuple):
    params: Params  # theta_t
    clip: Tensor | Stateless  # C_t, 0-d; Stateless where it stays


class Down(NamedTuple):
    params: Params
    clip: Tensor  # C_t, 0-d


class Up(NamedTuple):
    delta: Params  # Delta^k, of norm at most C


class UpWithBit(NamedTuple):
    delta: Params  # Delta^k, of norm at most C_t
    within: Tensor  # b^k - 1/2


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
        self._refuse_bit_noise(process)
        # Clients that drop out make the true rate smaller still.
        return central(self.s.noise_multiplier, process.poisson)

    def _refuse_bit_noise(self, process: Process) -> None:
        """Refuse a count of bits that costs all of the privacy, or more."""
        if self.s.quantile is None or process.rates is None:
            return
        expected = float(process.rates.sum())
        z, bits = self.s.noise_multiplier, self._bit_noise(expected)
        if z >= 2 * bits:
            raise SettingsError(
                f"method.bit_noise = {bits:g}: the count of updates within the bound "
                f"has to cost less than method.noise_multiplier = {z:g} allows; set "
                f"bit_noise above {z / 2:g}, or ask more clients"
            )

    def init_server(self, params: Params, population: int) -> Server:
        if self.s.quantile is None:
            return Server(params, Stateless())
        return Server(params, torch.tensor(self.s.clip))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        theta, _, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(clip(trees.sub_(theta, down.params), self.s.clip)), state  # ClipFn

    @on_client
    def train_within(
        self, task: Task, t: Tensor, down: Down, state: Stateless, batches: Batches
    ) -> tuple[UpWithBit, Stateless]:
        theta, _, _ = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        delta = trees.sub_(theta, down.params)
        norm = trees.dot(delta, delta).sqrt()
        within = (norm <= down.clip).to(norm.dtype) - 0.5
        return UpWithBit(clip(delta, down.clip), within), state

    def round(self, server: Server, r: Round) -> Server:
        if isinstance(server.clip, Stateless):
            mean = r.mean(self.train, r.cohort, Model(server.params), equally)
            largest = self.s.clip + mean.rounding
            params = self._moved(server.params, mean.total.delta, largest, r)
            return server._replace(params=params)
        guide = Down(server.params, server.clip)
        mean = r.mean(self.train_within, r.cohort, guide, equally)
        total, bound = mean.total, server.clip.item()
        largest = bound + mean.rounding
        params = self._moved(server.params, total.delta, largest, r)
        expected = self._expected_clients(r)
        noise = rng(r.seed, "dp bit noise", r.t).standard_normal()
        if self.s.noise_multiplier == 0:
            noise = 0.0
        count = total.within.item() + self._bit_noise(expected) * noise
        b = 0.5 + count / expected
        assert self.s.quantile is not None
        factor = math.exp(-self.s.clip_lr * (b - self.s.quantile))
        r.log["clip"] = bound
        return Server(params, server.clip * factor)

    def _moved(self, params: Params, total: Params, largest: float, r: Round) -> Params:
        """theta_t + the mean of the updates with its noise.

        `largest` bounds the norm of one client's part of the sum.
        """
        deviation = self._multiplier(self._expected_clients(r)) * largest
        draw = rng(r.seed, "dp noise", r.t)

        def noisy(x: Tensor) -> Tensor:
            noise = torch.as_tensor(draw.standard_normal(x.shape)).to(x)
            return x + deviation * noise

        step = self.s.server_lr / self._expected_clients(r)
        moved: Params = trees.axpy(step, trees.map(noisy, total), params)
        return moved

    def _bit_noise(self, expected: float) -> float:
        """sigma_b."""
        return self.s.bit_noise or expected / 20

    def _multiplier(self, expected: float) -> float:
        """z of the updates: z, or z_Delta where the count of bits is released too."""
        z = self.s.noise_multiplier
        if self.s.quantile is None or z == 0:
            return z
        return float((z**-2 - (2 * self._bit_noise(expected)) ** -2) ** -0.5)

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "its accountant assumes that a client joins a round by a coin of its "
                "own, and who comes into a buffer depends on who is fast"
            )
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
