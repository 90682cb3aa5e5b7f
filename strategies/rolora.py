"""RoLoRA - the factors of LoRA in turn (Chen et al., NeurIPS 2025).

W0  frozen weight of a layer      s B A  what an adapter adds to it
A   [r, n], drawn at the start    B  [m, r], zero at the start
t   round, from 0 on              n_i  examples of client i

    t even   clients move B, with A fixed;  B <- mean of the B_i
    t odd    clients move A, with B fixed;  A <- mean of the A_i   (first = "B")

The mean is exact in every round: with one factor fixed, the mean of the products is the
product of the means, and half the floats come up. Both factors go down, for a client
that missed a round has neither of them.
Choice:  B is first: while B = 0 the gradient of A is zero, and a round of A would be
         lost. Parameters that are trained beside the factors (a head, biases) move in
         every round. Weights n_i.
Reduces: to FFA-LoRA where rounds of A are left out.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.factors import layers_of
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, Setting, on_client
from fedcore.split import PARTS
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless


class Settings(MethodSettings):
    local_lr: float = Field(0.1, gt=0, description="eta, step size of a local step")
    server_lr: float = Field(
        1.0, gt=0, description="step size of the server; 1 is the mean of the factors"
    )
    first: Literal["A", "B"] = Field(
        "B", description="the factor that moves in the first round"
    )


class Up(NamedTuple):
    delta: Params  # change of the parameters that moved
    loss: Tensor  # mean training loss, for the log


class RoLoRA(Method[Settings]):
    @on_client
    def train_B(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        return self._trained(task, down.params, "lora_A", batches), state

    @on_client
    def train_A(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        return self._trained(task, down.params, "lora_B", batches), state

    def _trained(self, task: Task, params: Params, part: str, batches: Batches) -> Up:
        """Local training of all parameters but the factors of this part."""
        names = PARTS[part](params)
        fixed: Params = {}
        start: Params = {}
        for name, value in params.items():
            target = fixed if name in names else start
            target[name] = value
        lr = self.s.local_lr
        y, _, loss = local_sgd(task.loss, start, batches, lr, fixed=fixed)
        return Up(trees.sub_(y, start), loss)

    def refuses(self, setting: Setting) -> str | None:
        if setting == "buffered":
            return (
                "it trains another factor in every second round, and a buffer would "
                "hold changes of both"
            )
        if setting == "moments":
            return "it trains other parameters in every second round"
        return super().refuses(setting)

    def check(self, task: Task, cohort: int) -> None:
        if not layers_of(task.init_params()):
            raise SettingsError(
                'method.name = "rolora": no layer of the model trains both lora_A and '
                "lora_B; give it adapters (lora.rank) and leave lora.freeze out"
            )

    def round(self, server: Model, r: Round) -> Model:
        is_B = (r.t % 2 == 0) == (self.s.first == "B")
        train = self.train_B if is_B else self.train_A
        mean = r.mean(train, r.cohort, server).value.delta  # weights n_i
        start = {name: server.params[name] for name in mean}
        moved = trees.axpy(self.s.server_lr, mean, start)
        return Model({**server.params, **moved})
