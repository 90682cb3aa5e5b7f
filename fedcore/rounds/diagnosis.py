"""Why clients bring no usable update: found by doing one client's work again.

It is done on the server, step by step, until something is not finite. So the advice at
the end of a hopeless run fits the cause, or there is none.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fedcore import trees
from fedcore.dpsgd import plain
from fedcore.engines.base import Work
from fedcore.engines.run_client import run_client
from fedcore.rounds.history import History
from fedcore.rounds.tally import Exchange
from fedcore.storage.rows import StateStore
from fedcore.types import Batches, Params, Tree

log = logging.getLogger("fedcore")

HUGE = 1e6  # times what a message was: it is lost in noise, or has exploded
OVERFLOWING = 1e30  # a sum of such numbers may be none that float32 holds
GROWN = 1e2  # times what the model was at the start
NO_LR = "a smaller step size does not help"


def fruitless_text(history: History, problem: str) -> str:
    """The rounds without a usable update at the end of a run, and their reasons.

    `problem` is what the last one was skipped for: it is said where no client is at
    fault.
    """
    counts = history.rows[-1]["dropped"].items()
    reasons = ", ".join(f"{reason} ({n})" for reason, n in counts) or problem
    return (
        f"round {len(history)}: no usable update in {history.fruitless} round(s) in a "
        f"row; the last: {reasons}"
    )


def causes(
    work: Work, states: StateStore | None, exchange: Exchange | None, t: int
) -> list[str]:
    """Phrases on why the work of round t came to nothing, as far as it is known.

    `states` are the clients'; without them clients run elsewhere, and may have other
    data than the server. Changes nothing.
    """
    if exchange is None:
        return []
    phrases = []
    kind, _, text = exchange.reason.partition(": ")
    if kind == "error":
        phrases.append(f"client {exchange.client}: {text}")
    if states is not None and kind in ("not finite", "error", ""):
        state = trees.to(states.gather([exchange.client]), work.task.device)
        own = trees.at(state, 0) if trees.leaves(state) else state
        try:
            phrases.append(_cause(work, exchange, own, t))
        except Exception as error:  # the work itself fails, and its reason is told
            log.debug("no cause was found", exc_info=error)
    return [phrase for phrase in phrases if phrase]


def _cause(work: Work, exchange: Exchange, state: Tree, t: int) -> str:
    fn, client, task = exchange.fn, exchange.client, work.task
    given = trees.at(work.batches(fn, [client], t), 0)
    batches = plain(given)
    if not isinstance(batches, Batches) or not bool(batches.mask.any()):
        return ""
    params = task.init_params()
    with work.model_noise(fn, t, client):
        fault = _fault_of_data(work, client) or _fault_at_start(work, params, batches)
        if fault:
            return f"client {client}: {fault}"
        now = work.now(t)
        up, _ = run_client(fn, task, now, exchange.down, state, given, work.training)
    if bool(trees.finite(up)):
        return _fault_after_work(work, exchange, up, t)
    # Noise may have made of the model what training cannot start from.
    lost = _lost_on_the_way(work, exchange, trees.map(torch.ones_like, up), t)
    if lost:
        return lost
    # The model itself has grown from round to round, so that the server's steps count.
    grown = _largest(exchange.down) > GROWN * max(_largest(params), 1.0)
    return (
        f"client {client}: numbers grow in training: its loss is finite with the "
        f"initial model, and its update is not: {_smaller_steps(work, batches, grown)}"
    )


def _fault_of_data(work: Work, client: int) -> str:
    """Values that are not finite among the client's examples."""
    data = work.task.data
    rows = torch.from_numpy(data.rows(client, "train"))
    for name, array in (("x", data.x), ("y", data.y)):
        if not isinstance(array, Tensor) or not array.is_floating_point():
            continue
        own = array[rows.to(array.device)]
        is_bad = ~own.reshape(len(own), -1).isfinite().all(1)
        if bool(is_bad.any()):
            row = int(rows[int(is_bad.nonzero()[0])])
            return (
                f"its data hold NaN or infinity, first in row {row} of {name}: leave "
                "such rows out, or fill them"
            )
    return ""


def _fault_at_start(work: Work, params: Params, batches: Batches) -> str:
    """What is not finite with the initial model, before any step."""
    task = work.task
    for x, y, mask in trees.unbind(batches):
        slope, value = grad_and_value(task.loss)(params, x, y, mask)
        if not bool(value.isfinite()):
            return (
                f"its loss is {value.item():.3g} with the initial model, before any "
                f"training: check model and loss on its examples; {NO_LR}"
            )
        for name, gradient in slope.items():
            if not bool(gradient.isfinite().all()):
                return (
                    f'the gradient of "{name}" is not finite with the initial model, '
                    f"at a loss of {value.item():.3g}: is there the root, norm or "
                    f"logarithm of 0? {NO_LR.capitalize()}"
                )
    return ""


def _fault_after_work(work: Work, exchange: Exchange, up: Tree, t: int) -> str:
    """What becomes of a finite update on its way, or at the server."""
    lost = _lost_on_the_way(work, exchange, up, t)
    if lost or exchange.reason:
        return lost
    if _largest(up) > OVERFLOWING:
        advice = _smaller_steps(work, None, with_server=True)
        return f"updates grow to {_largest(up):.1g}: {advice}"
    return (
        "the updates are finite, and the server's own step makes a model that is not: "
        "check the method's settings for the server, such as method.server_lr"
    )


def _lost_on_the_way(work: Work, exchange: Exchange, up: Tree, t: int) -> str:
    """What drowns a finite message between client and server; "" where nothing does."""
    fn, client = exchange.fn, exchange.client
    settings = work.defence.settings

    def spoils(change: Any, message: Tree) -> bool:
        try:
            changed = change(message)
        except RuntimeError:  # a number that the tensor's type cannot hold
            return True
        return _largest(changed) > HUGE * max(_largest(message), 1.0)

    if spoils(lambda m: work.links.carry(m, "downlink", fn, t, client), exchange.down):
        return "links.downlink: the noise drowns the model: lower its variance"
    if spoils(lambda m: work.defence.protect(m, fn, t, client), up):
        deviation = settings.noise_multiplier * (settings.clip or 0.0)
        if deviation:
            return (
                "the updates are fine until noise of standard deviation defence.clip x "
                f"defence.noise_multiplier = {deviation:.3g} is added: lower one of "
                "the two"
            )
        return "the updates are fine until the defence acts on them: check [defence]"
    if spoils(lambda m: work.links.carry(m, "uplink", fn, t, client), up):
        return "links.uplink: the noise drowns the updates: lower its variance"
    return ""


def _largest(tree: Tree) -> float:
    """The largest magnitude; infinity where an entry is not finite."""
    largest = 0.0
    for x in trees.leaves(tree):
        if x.numel():
            value = x.double().abs().nan_to_num(nan=torch.inf).max().item()
            largest = max(largest, value)
    return largest


def _smaller_steps(work: Work, batches: Batches | None, with_server: bool) -> str:
    """The advice for numbers that grow."""
    names = []
    for name in type(work.method.s).model_fields:
        if name.endswith("lr") and (with_server or name != "server_lr"):
            names.append(f"method.{name}")
    advice = f"lower the learning rate ({' or '.join(names) or 'the step size'})"
    if batches is not None and isinstance(batches.x, Tensor):
        largest = _largest(batches.x)
        if batches.x.is_floating_point() and largest > 100:
            advice += f", or scale the inputs, which go up to {largest:.3g}"
    return advice
