"""Models that PyTorch cannot differentiate as functions, or batch over clients.

Clients train by `torch.func`: the loss is a function of parameters, and its gradient
batches over clients. Some models cannot be differentiated so, and are refused; some
cannot be batched, and their clients run one after another.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.func import grad

from fedcore.errors import SettingsError
from fedcore.inputs import num_rows
from fedcore.rng import torch_seed

if TYPE_CHECKING:
    from fedcore.task import Task
    from fedcore.types import Tree

__all__ = ["check_gradient", "in_short", "place_of", "why_not_batched"]

PLACES = (Path(torch.__file__).parent, Path(__file__).parent)
LONGEST = 160  # characters of PyTorch's own words

CAPTURED = "mutate a captured Tensor"
UNPACKED = (
    "without pack_padded_sequence: fedcore.pad_sequences gives a mask; give the layer "
    "the padded batch, and take each sequence's last state by the mask"
)
REMEDIES = {
    "pack_padded_sequence": UNPACKED,
    "pack_sequence": UNPACKED,
    "rnn.py": UNPACKED,
    "checkpoint": "leave out torch.utils.checkpoint",
    "doesn't have storage": "write it in operations of torch, without .numpy(), and "
    "without pack_padded_sequence (pad_sequences pads with a mask)",
    CAPTURED: "do not change inputs in place: x = x + 1 in place of "
    "x += 1, nn.ReLU() in place of nn.ReLU(inplace=True)",
    "setup_context": "give its autograd.Function a setup_context, and "
    "generate_vmap_rule = True",
    "saved tensor hooks": "leave out torch.utils.checkpoint and saved-tensor hooks",
}
"""By the function or file that failed, or words of the message: what to do instead."""

UNBATCHED = {
    ".item()": "it looks at values, by .item(), float() or an if on a tensor; with "
    "torch.where it would be batched",
    "data-dependent control flow": "it looks at values, by .item(), float() or an if "
    "on a tensor; with torch.where it would be batched",
    "dynamic shape": "it makes shapes of values, as x[mask] and nonzero do; with "
    "torch.where or x * mask it would be batched",
    "Batching rule not implemented for": "PyTorch has no batched form of {}",
}
"""By words of PyTorch's message: the reason in our words."""


def check_gradient(task: Task, x: Tree, y: torch.Tensor) -> None:
    """Differentiate the task's loss at a few examples, x [B, ...] and y [B, ...].

    Raises SettingsError, with what to write instead, where PyTorch cannot do it.
    """
    params = task.init_params()
    ones = torch.ones(num_rows(x), device=y.device)
    try:
        with torch_seed(0, "check"):
            slope = grad(lambda at: task.loss(at, x, y, ones))(params)
    except Exception as error:
        if CAPTURED in str(error) and not _changes_inputs(task, x, y):
            return  # it changes a buffer, which is found and named elsewhere
        remedy = _remedy(error) or "write it in operations that torch.func knows"
        raise SettingsError(
            "PyTorch cannot differentiate the loss as a function of the model's "
            f"parameters ({in_short(error)}{place_of(error)}): {remedy}"
        ) from error
    for name, value in slope.items():
        if value.is_sparse:
            raise SettingsError(
                f'the gradient of "{name}" is sparse, and clients send whole '
                "updates: build its layer with sparse=False"
            )


def _changes_inputs(task: Task, x: Tree, y: torch.Tensor) -> bool:
    """Whether the loss can be differentiated where its inputs are arguments as well."""
    ones = torch.ones(num_rows(x), device=y.device)
    try:
        with torch_seed(0, "check"):
            grad(task.loss)(task.init_params(), x, y, ones)
    except Exception:
        return False
    return True


def why_not_batched(error: BaseException) -> str:
    """The reason why a client function could not be batched, in one line."""
    text = str(error)
    for words, reason in UNBATCHED.items():
        if words in text:
            operator = text.partition(words)[2].split(".")[0].strip()
            return reason.format(operator) + place_of(error)
    return in_short(error) + place_of(error)


def _remedy(error: BaseException) -> str | None:
    names = set()
    for frame in traceback.extract_tb(error.__traceback__):
        names |= {frame.name, Path(frame.filename).name}
    for words, remedy in REMEDIES.items():
        if words in names or words in str(error):
            return remedy
    return None


def in_short(error: BaseException) -> str:
    """Type and first line of an error, whose message may have many."""
    lines = str(error).strip().splitlines() or [""]
    words = lines[0] if len(lines[0]) <= LONGEST else f"{lines[0][:LONGEST]}..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def place_of(error: BaseException) -> str:
    """The last line of the user's own code that led to the error; "" without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if not any(file.is_relative_to(place) for place in PLACES) and file.exists():
            return f", at {file.name} line {frame.lineno}"
    return ""
