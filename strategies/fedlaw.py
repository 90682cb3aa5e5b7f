"""FedLAW - learnable aggregation weights (Li et al., ICML 2023).

They are fitted on proxy data of the server.

w  global model      w_k  local model, D_k = w_k - w      n_k  examples
P  proxy set         lam_k  weights, sum 1                gam  shrinking factor

    client   E epochs of SGD with momentum and L2, at rate eta_t = eta_0 decay^t
    server   for each minibatch of P, E_s epochs:  u = gam sum_k lam_k w_k;
             a step on (x, r) along the gradient of L_P(u), where
             "exp":   lam = softmax(x / tau), x = tau ln(n_k / n);  gam = exp(r), r = 0
             "quad":  lam = x^2 / sum x^2, x = m^(-1/2), so lam starts uniform;
                      gam = r^2, r = 1
             w <- gam sum_k lam_k w_k, the last iterate

Choice:  u = gam (w + sum_k lam_k D_k), the same because the lam_k sum to one. Gradients
         in closed form, with G = grad L_P(u) and s_k = <G, D_k>:
         dL/dlam_k = gam (s_k - sum_j lam_j s_j), dL/dgam = <G, u / gam>; a step is one
         pass of the model and two products with the matrix of the D_k. tau = 1 is the
         paper; x, r and the optimiser start anew every round. Clients keep no momentum
         between rounds, unlike in the authors' code, and the proxy set is the server's
         own: no client has it, nor the test set. `swa` is the authors' two stages: lam
         alone, averaged over its epochs from the seventh on; then gam alone.
Reduces: to FedAvg with no server epochs (from "exp"); learn_gamma = false is attentive
         LAW, learn_lambda = false adaptive GWS, both false a fixed gamma times FedAvg.
Heed:    gam also calibrates: models that are too unsure get gam > 1 round after round
         (see gamma_product). The server needs every single w_k, cohort x parameters in
         memory: no secure aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.func import grad
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torch.optim.swa_utils import SWALR

from fedcore import trees
from fedcore.data.federated import Examples
from fedcore.errors import SettingsError, TooFewReports
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.reports import Reports, RunningSum, by_examples
from fedcore.rng import rng
from fedcore.storage import memory
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless

SWA_FROM = 6  # zero-based epoch from which lam is averaged, as in the authors' code


class Settings(MethodSettings):
    local_lr: float = Field(
        0.08, gt=0, description="eta_0, step size of a local step in the first round"
    )
    lr_decay: float = Field(
        0.99,
        gt=0,
        le=1,
        description="factor on the local step size from round to round, in (0, 1]",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of local SGD, in [0, 1)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 of local SGD")
    server_epochs: int = Field(
        20, ge=0, description="E_s, passes over the proxy set a round; 0 is FedAvg"
    )
    server_batch: int = Field(
        128, ge=1, description="B_s, proxy examples in a server step"
    )
    server_lr: float = Field(
        0.01,
        gt=0,
        description="eta_s, halved after every 20 server epochs; authors: 0.01 on "
        "CIFAR-10, else 0.005",
    )
    server_optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="Adam(0.5, 0.999), or SGD with momentum 0.9"
    )
    parametrisation: Literal["exp", "quad"] = Field("exp", description="of lam and gam")
    temperature: float = Field(
        1.0, gt=0, description="tau of the softmax; large = lam moves less a step"
    )
    learn_lambda: bool = Field(True, description="false: lam_k = n_k / n")
    learn_gamma: bool = Field(True, description="false: gam is `gamma`")
    gamma: float = Field(1.0, gt=0, description="gam where it is not learned")
    gamma_bounds: tuple[float, float] | None = Field(
        None, description="least and largest gam; default: none"
    )
    swa: bool = Field(
        False,
        description="two stages, lam averaged over epochs and then gam; takes 14 "
        "server epochs or more",
    )

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.learn_gamma and self.gamma != 1:
            raise ValueError(
                f"gamma = {self.gamma}, but it is learned: set learn_gamma = false to "
                "hold it there"
            )
        if self.gamma_bounds:
            least, largest = self.gamma_bounds
            if not 0 < least <= 1 <= largest:
                raise ValueError(
                    f"gamma_bounds = {[least, largest]}: expected 0 < least <= 1 <= "
                    "largest, as gam starts at 1"
                )
            if not self.learn_gamma:
                raise ValueError(
                    f"gamma_bounds = {[least, largest]}, but gam is held at gamma: "
                    "leave the bounds out"
                )
        needed = 2 * SWA_FROM + 2
        if self.swa and (self.server_epochs < needed or not self.learn_lambda):
            raise ValueError(
                f"swa averages lam from its {SWA_FROM + 1}th epoch on, of "
                f"server_epochs / 2 = {self.server_epochs // 2}: set server_epochs to "
                f"{needed} or more and learn_lambda = true"
            )
        return self


class Server(NamedTuple):
    params: Params
    gamma_product: Tensor  # 0-d, product of all gam so far


class Up(NamedTuple):
    delta: Params  # D_k
    loss: Tensor  # mean training loss, for the log


class Mixture:
    """u = gam (w + sum_k lam_k D_k), and its derivatives in the variables x and r.

    An optimizer moves x and r in place.
    """

    def __init__(self, s: Settings, w: Tensor, D: Tensor, n: Tensor) -> None:
        """`w` [d], `D` [m, d], `n` [m] float64, all positive."""
        self.s, self.w, self.D, self.lam0 = s, w, D, n / n.sum()
        self.gamma_is_learned = s.learn_gamma
        if s.parametrisation == "exp":
            self.x, self.r = s.temperature * self.lam0.log(), n.new_zeros(())
        else:
            self.x, self.r = torch.full_like(n, len(n) ** -0.5), n.new_ones(())

    def lam(self) -> Tensor:
        if not self.s.learn_lambda:
            return self.lam0
        if self.s.parametrisation == "exp":
            return torch.softmax(self.x / self.s.temperature, 0)
        return self.x.square() / self.x.square().sum()

    def gam(self) -> Tensor:
        if not self.gamma_is_learned:
            return self.r.new_tensor(self.s.gamma)
        return self.r.exp() if self.s.parametrisation == "exp" else self.r.square()

    def mean(self) -> Tensor:
        """sum_k lam_k w_k, [d]."""
        return self.w + self.D.T @ self.lam().to(self.D)

    def model(self) -> Tensor:
        return self.gam().to(self.w) * self.mean()

    def differentiate(self, G: Tensor) -> None:
        """x.grad and r.grad, where G = dL/du, [d]."""
        lam, gam, s = self.lam(), self.gam(), (self.D @ G).double()
        by_lam = gam * (s - lam @ s)  # less a constant, which sum lam_k = 1 hides
        by_gam = (G @ self.mean()).double()
        if self.s.parametrisation == "exp":
            self.x.grad, self.r.grad = lam * by_lam / self.s.temperature, gam * by_gam
        else:
            self.x.grad = 2 * self.x / self.x.square().sum() * by_lam
            self.r.grad = 2 * self.r * by_gam

    def clamp(self) -> None:
        if self.s.gamma_bounds is not None:
            inverse = math.log if self.s.parametrisation == "exp" else math.sqrt
            self.r.clamp_(*map(inverse, self.s.gamma_bounds))


ProxyLoss = Callable[[Tensor, Tensor], Tensor]
"""(flat parameters [d], rows of the proxy set) -> mean loss, 0-d."""


class FedLAW(Method[Settings]):
    needs_updates = True  # weighs every one of them

    def init_server(self, params: Params, population: int) -> Server:
        return Server(params, torch.ones((), dtype=torch.float64))

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(
            task.loss,
            down.params,
            batches,
            lr=self.s.local_lr * self.s.lr_decay**t,
            momentum=self.s.momentum,
            weight_decay=self.s.weight_decay,
        )
        return Up(trees.sub_(w, down.params), loss), state

    def check(self, task: Task, cohort: int) -> str | None:
        if not self._learns():
            return None
        if task.proxy is None:
            raise SettingsError(
                "method fedlaw fits its weights on a proxy set of the server, and the "
                "task has none: set proxy to a number of examples, e.g. proxy = 200, "
                "or give your own Task one"
            )
        # Without copies: they may be large.
        learned = [p.detach() for p in task.model.parameters() if p.requires_grad]
        size = sum(p.numel() for p in learned)
        return memory.require(
            cohort * trees.nbytes(learned),
            task.device,
            f"FedLAW holds the models of a cohort, {cohort:,} x {size:,} parameters",
        )

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return "it fits the weights of all models of one cohort"
        if setting == "optimizer" and self.s.momentum:
            return "method.momentum is SGD's; set it to 0"
        if setting == "secure":
            return "its weights are fitted from inner products with every single update"
        if setting != "rule":
            return super().refuses(setting)
        return (
            "it learns the weights of single updates from proxy data, which is a weak "
            "fltrust itself; aggregation.clip bounds what one update can do"
        )

    def _learns(self) -> bool:
        # "quad" starts elsewhere than FedAvg: at uniform weights.
        starts_elsewhere = self.s.parametrisation == "quad" and self.s.learn_lambda
        moves = self.s.server_epochs > 0 or starts_elsewhere
        return (self.s.learn_lambda or self.s.learn_gamma) and moves

    def round(self, server: Server, r: Round) -> Server:
        reports = r.each(self.train, r.cohort, Model(server.params))
        if self._learns():
            w, gamma = self._fitted(server, r, reports)
        else:
            gamma = self.s.gamma
            w = trees.add(server.params, _mean_delta(reports))
            w = w if gamma == 1 else trees.scale(w, gamma)
        product = server.gamma_product * gamma
        r.log["gamma"] = gamma
        r.log["gamma_product"] = product.item()
        r.log["params_norm"] = trees.dot(w, w).sqrt().item()
        return Server(w, product)

    def _fitted(
        self, server: Server, r: Round, reports: Iterable[Reports]
    ) -> tuple[Params, float]:
        """(new model, gam)."""
        mix, loss = self._stack(server, r, reports), self._proxy_loss(server, r)
        pieces = torch.split(torch.arange(len(_proxy(r).y)), 1000)

        def proxy_loss(u: Tensor) -> float:
            total = sum(loss(u, rows).item() * len(rows) for rows in pieces)
            return total / sum(map(len, pieces))

        r.log["proxy_loss_before"] = proxy_loss(mix.model())
        steps = self._fit(mix, loss, r)
        u, lam = mix.model(), mix.lam()
        r.log["proxy_loss"] = proxy_loss(u)
        r.log["steps"] = steps
        r.log["lambda"] = [round(value, 6) for value in lam.tolist()]
        r.log["lambda_ratio"] = [round(value, 4) for value in (lam / mix.lam0).tolist()]
        if len(lam) > 1:
            r.log["coherence"] = _coherence(mix.D)
        return trees.unravel(u, server.params), mix.gam().item()

    def _fit(self, mix: Mixture, loss: ProxyLoss, r: Round) -> int:
        """Move the variables of `mix`; the number of steps."""
        if not self.s.swa:
            learned = [mix.x] * self.s.learn_lambda + [mix.r] * self.s.learn_gamma
            return self._optimise(mix, learned, loss, r, range(self.s.server_epochs))
        half = self.s.server_epochs // 2
        mix.gamma_is_learned = False  # stage 1: gam = 1
        steps = self._optimise(mix, [mix.x], loss, r, range(half), average=True)
        mix.gamma_is_learned = self.s.learn_gamma
        if self.s.learn_gamma:
            steps += self._optimise(mix, [mix.r], loss, r, range(half, 2 * half))
        return steps

    def _optimise(
        self,
        mix: Mixture,
        variables: list[Tensor],
        loss: ProxyLoss,
        r: Round,
        epochs: range,
        average: bool = False,
    ) -> int:
        """Steps on `variables` over these passes of the proxy set; their number.

        With `average` x ends at its SWA mean.
        """
        gradient = grad(loss)
        optimizer = self._optimizer(variables)
        anneal: LRScheduler
        constant: SWALR | None
        if average:
            anneal = CosineAnnealingLR(optimizer, T_max=100)
            constant = SWALR(optimizer, swa_lr=0.05)
        else:
            anneal, constant = StepLR(optimizer, 20, 0.5), None
        steps, averaged = 0, []
        for epoch in epochs:
            shuffled = rng(r.seed, "proxy", r.t, epoch).permutation(len(_proxy(r).y))
            for rows in torch.split(torch.from_numpy(shuffled), self.s.server_batch):
                mix.differentiate(gradient(mix.model(), rows))
                optimizer.step()
                mix.clamp()
                steps += 1
            if constant is not None and epoch >= SWA_FROM:
                averaged.append(mix.x.clone())
                constant.step()
            else:
                anneal.step()
        if averaged:
            mix.x.copy_(torch.stack(averaged).mean(0))
        return steps

    def _optimizer(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        if self.s.server_optimizer == "adam":
            return torch.optim.Adam(variables, self.s.server_lr, betas=(0.5, 0.999))
        return torch.optim.SGD(variables, self.s.server_lr, momentum=0.9)

    def _proxy_loss(self, server: Server, r: Round) -> ProxyLoss:
        proxy, like = _proxy(r), server.params

        def loss(u: Tensor, rows: Tensor) -> Tensor:
            x, y = trees.at(proxy, rows)
            ones = torch.ones(len(rows), device=y.device)
            with r.task.evaluating():
                return r.task.loss(trees.unravel(u, like), x, y, ones)

        return loss

    def _stack(self, server: Server, r: Round, reports: Iterable[Reports]) -> Mixture:
        """Rows in the order of client ids, without clients that have no example.

        ln 0 is no weight.
        """
        w, cohort = trees.ravel(server.params), len(r.cohort)
        what = f"FedLAW holds the models of a cohort of {cohort:,}"
        memory.require(cohort * trees.nbytes(w), w.device, what)
        D, n = w.new_empty(cohort, len(w)), torch.zeros(cohort, dtype=torch.float64)
        for p in reports:
            if len(p.clients) == 0:
                continue
            rows = torch.searchsorted(r.cohort, p.clients)
            deltas = [x.reshape(len(rows), -1) for x in trees.leaves(p.up.delta)]
            D[rows] = torch.cat(deltas, 1)
            n[rows] = p.num_examples.double().cpu()
        reported = n.nonzero()[:, 0].tolist()
        if not reported:
            raise TooFewReports("no client reported that has an example")
        for row, source in enumerate(reported):  # in place: a copy would need it twice
            if row != source:
                D[row] = D[source]
        return Mixture(self.s, w, D[: len(reported)], n[reported].to(w.device))


def _mean_delta(reports: Iterable[Reports]) -> Params:
    """The mean by number of examples, as FedAvg takes it."""
    total = RunningSum()
    for p in reports:
        total.add(p, by_examples(p.clients, p.num_examples))
    delta: Params = total.mean(lambda: None).value.delta
    return delta


def _proxy(r: Round) -> Examples:
    assert r.task.proxy is not None, (
        "FedLAW.check lets no run without a proxy set begin"
    )
    return r.task.proxy


def _coherence(D: Tensor) -> float:
    """Mean cosine of two different clients' differences.

    From the norm of the sum of their directions.
    """
    inverse = 1 / D.norm(dim=1).clamp(min=torch.finfo(D.dtype).tiny)
    total, m = D.T @ inverse, len(D)
    return float(((total @ total).item() - m) / (m * (m - 1)))
