"""Parts that methods with personal parameters share.

Their settings, messages and states, and the model that a client uses.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from fedcore import trees
from fedcore.method import Method, MethodSettings
from fedcore.split import Parts, split
from fedcore.task import Task
from fedcore.types import Model, Params

__all__ = [
    "Own",
    "Partial",
    "Personal",
    "PersonalSettings",
    "Update",
    "initial",
    "used",
]


class PersonalSettings(MethodSettings):
    """Settings of a method that keeps parts of the model on the clients."""

    personal: Parts = Field(
        ("output",),
        description="v, the parameters that stay on the client: parts by name (input, "
        "output, body, norm, adapter, attention, mlp, prefix, factors, lora_A, lora_B, "
        "all), or patterns of whole parameter names; [] = nothing",
    )


class Personal(NamedTuple):
    """The state of a client: its own parameters."""

    v: Params


class Update(NamedTuple):
    """The message of a client: the change of the shared parameters."""

    delta: Params  # u_i - u
    loss: Tensor  # mean training loss, for the log


S = TypeVar("S", bound=PersonalSettings)


class Partial(Method[S], Generic[S]):
    """A method whose server holds the shared parameters u, and client i its v_i.

    Neither ever has the other's. Every v_i starts at v0, the personal part of the
    initial model, and the server's own model is (u, v0): a client that has never taken
    part uses that.
    """

    def init_server(self, params: Params, population: int) -> Model:
        return Model(split(params, self.s.personal)[0])

    def init_client(self, params: Params) -> Personal:
        return Personal(split(params, self.s.personal)[1])

    def model_for(self, server: Any, state: Personal) -> Params:
        return {**server.params, **state.v}

    def personalises(self) -> bool:
        return bool(self.s.personal)


def initial(task: Task, params: Params) -> Params:
    """The parameters of these names as the model was built: v0."""
    whole = dict(task.model.named_parameters())
    return {name: whole[name].detach() for name in whole if name in params}


class Own(NamedTuple):
    """A whole model of the client's own."""

    v: Params
    seen: Tensor  # 0-d, 1 once the client has trained it

    @classmethod
    def start(cls, params: Params) -> Own:
        return cls(params, torch.zeros(()))

    def after(self, v: Params, steps: Tensor) -> Own:
        """This state after training to v; after 0 steps it is as before."""
        trained = steps > 0
        kept = trees.where(trained, v, self.v)
        return Own(kept, torch.where(trained, 1.0, self.seen))


def used(state: Own, w: Params) -> Params:
    """The client's own model where it has one, else the global parameters."""
    params: Params = trees.where(state.seen > 0, state.v, w)
    return params
