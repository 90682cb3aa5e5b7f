"""The one function that every engine calls for a client's work."""

from __future__ import annotations

from torch import Tensor

from fedcore import trees
from fedcore.dpsgd import SampledBatches
from fedcore.errors import SettingsError
from fedcore.method import data_of
from fedcore.optimizers import Kept, Training
from fedcore.task import Task
from fedcore.types import Batches, ClientFunction, Tree, Tuning


def run_client(
    fn: ClientFunction,
    task: Task,
    t: Tensor,
    down: Tree,
    state: Tree,
    batches: Batches | SampledBatches | Tuning,
    training: Training | None = None,
) -> tuple[Tree, Tree]:
    """The client function: (what is sent, the client's new state).

    `training` says how its local training goes; None: by steps of SGD.
    """
    up, new, _ = run_checked(fn, task, t, down, state, batches, training)
    return up, new


def run_checked(
    fn: ClientFunction,
    task: Task,
    t: Tensor,
    down: Tree,
    state: Tree,
    batches: Batches | SampledBatches | Tuning,
    training: Training | None = None,
) -> tuple[Tree, Tree, Tree]:
    """(what is sent, the client's new state, whether both are finite: 0-d).

    A client whose work is not finite keeps its old state: one diverged round must not
    stay with it for good. Without a state nothing is checked, and the last is ().
    """
    if training is None:
        up, new = fn(task, t, down, state, batches)
    else:
        up, new = _trained(training, fn, task, t, down, state, batches)
    if not trees.leaves(new):
        return up, new, ()
    is_finite = trees.finite(up) & trees.finite(new)
    return up, trees.where(is_finite, new, state), is_finite


def _trained(
    training: Training,
    fn: ClientFunction,
    task: Task,
    t: Tensor,
    down: Tree,
    state: Tree,
    batches: Batches | SampledBatches | Tuning,
) -> tuple[Tree, Tree]:
    """(what is sent, new state) with local training of this kind.

    Moments that the client keeps are beside the method's own state, and move where it
    trains in a round; fine-tuning has its own.
    """
    own, moments = state, None
    if training.keeps_moments:
        assert isinstance(state, Kept)
        own, moments = state
    is_in_round = data_of(fn) == "train"
    used = moments if is_in_round else None
    given, drawn = batches, None
    if isinstance(batches, SampledBatches):
        given, drawn = batches
    with training.inside(task, t if is_in_round else None, used, drawn) as session:
        up, new = fn(task, t, down, own, given)
    if is_in_round and session.trainings == 0:
        name = getattr(fn, "__qualname__", fn)
        raise SettingsError(
            f"{name} trains without fedcore.local.local_sgd, which alone knows the "
            "steps that [local] asks for: leave them out (optimizer, clip, schedule, "
            "warmup, micro, precision, dp)"
        )
    if moments is None:
        return up, new
    return up, Kept(new, moments if session.moments is None else session.moments)
