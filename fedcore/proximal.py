"""The local problem of ADMM, min_w J(w) - <g, w> + rho/2 |w - s|^2.

Solved exactly here, where J is quadratic. For other losses `local_sgd` takes steps on
it: correction = -g, prox = rho, center = s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.local import Loss, Weigh
from fedcore.task import Task
from fedcore.types import Batches, Params

__all__ = [
    "CHUNK",
    "Quadratic",
    "hessian_memory",
    "quadratic",
    "unknown",
]

LARGEST = 2000  # parameters: their Hessian is factored in a second or so
CHUNK = 16  # clients that an engine may batch


class Quadratic(NamedTuple):
    """J(w) = 1/2 w'Hw - b'w + const, w in the order of `trees.ravel`.

    A client keeps it, so as to factor its Hessian once.
    """

    Q: Tensor  # [d, d], H = Q diag(h) Q'
    h: Tensor  # [d], ascending
    b: Tensor  # [d]

    def solve(self, rho: float, v: Params) -> Params:
        """N v with N = (H + rho I)^-1."""
        return trees.unravel(self._scaled(1 / (self.h + rho), trees.ravel(v)), v)

    def ridge(self, rho: float, like: Params) -> Params:
        """argmin J(w) + rho/2 |w|^2 = N b."""
        return trees.unravel(self._scaled(1 / (self.h + rho), self.b), like)

    def least_squares(self, like: Params) -> Params:
        """The minimiser of J of least norm, H^+ b."""
        # Rounding makes up to this of an eigenvalue 0.
        zero = self.h[-1] * len(self.h) * torch.finfo(self.h.dtype).eps
        inverse = torch.where(self.h > zero, 1 / self.h, 0.0)
        return trees.unravel(self._scaled(inverse, self.b), like)

    def _scaled(self, by: Tensor, v: Tensor) -> Tensor:
        """Q diag(by) Q'v.

        A client that could not look at its data has Q = 0: its result is not finite,
        and left out of the round.
        """
        valid = torch.where(self.Q.any(), 1.0, torch.nan)
        return valid * (self.Q @ (by * (v @ self.Q)))


def quadratic(
    loss: Loss, params: Params, batches: Batches, weights: Weigh
) -> Quadratic:
    """J, the sum of the losses of all real examples of `batches`, expanded at zero.

    Each as often as `weights` says, which is how it counts in the mean `loss`. Exact
    where the loss is quadratic in the parameters, as least squares with a linear model
    is.
    """
    x, y, mask = trees.map(lambda b: b.flatten(0, 1), batches)
    zero = torch.zeros_like(trees.ravel(params))

    def total(w: Tensor) -> Tensor:
        value: Tensor = loss(trees.unravel(w, params), x, y, mask)
        return value * weights(y, mask).sum()

    h, Q = torch.linalg.eigh(jacrev(grad(total))(zero))
    return Quadratic(Q, h.clamp(min=0), -grad(total)(zero))


def unknown(params: Params) -> Quadratic:
    """The place holder for J before a client has looked at its data."""
    b = torch.zeros_like(trees.ravel(params))
    return Quadratic(b.new_zeros(len(b), len(b)), b, b)


def hessian_memory(task: Task) -> tuple[int, torch.device, str]:
    """(bytes that the clients' Hessians take, where, and the reason in words).

    For `storage.memory.require`. Raises SettingsError for a model whose Hessians take
    too long.
    """
    params = trees.ravel(task.init_params())
    purpose = (
        f"method.solver = exact takes the Hessian of {len(params):,} parameters for "
        f"each of {task.population:,} clients"
    )
    if len(params) > LARGEST:
        raise SettingsError(
            f"{purpose}: expected at most {LARGEST:,} parameters, as in least squares; "
            'use method.solver = "sgd"'
        )
    # Q of every client; H, Q and what making the two takes, of a chunk of clients
    # side by side.
    matrices = task.population + 4 * CHUNK
    num_bytes = matrices * len(params) ** 2 * params.element_size()
    return num_bytes, task.device, purpose
