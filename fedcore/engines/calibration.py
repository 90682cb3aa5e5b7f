"""How many clients make a chunk: measured once, and remembered on disk.

Too few waste the batching, too many fall out of the cache, and no rule predicts it. The
choice is kept by (method, model, batches, device), so that two runs of one seed compute
the same bits.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcore import __version__, trees
from fedcore.engines.chunks import Chunks, row
from fedcore.engines.run_client import run_client
from fedcore.local import steps_run_by
from fedcore.models.lstm import Lstm
from fedcore.storage import cache
from fedcore.types import ClientFunction, Tree

log = logging.getLogger("fedcore")

SIZES = (4, 8, 16, 32, 64, 128, 256)  # chunks to try, after 1 = one after another
BUDGET = 1.0  # seconds of this thread after which no larger chunk is tried
# Of the time of a smaller chunk, at most, for a larger one: it needs more memory.
WORTH = 0.97
STEPS = 2  # local steps in a trial
TRIES = 5  # the first two record, and compare the recording with the step
# Seconds that it takes to send a report, of however many clients, and to hand it on.
HANDLING = 1e-3


def _example(x: Tree) -> Any:
    """The shape of one example; of several inputs by name."""
    if isinstance(x, Tensor):
        return list(x.shape[1:])
    return {path: list(leaf.shape[1:]) for path, leaf in trees.flatten(x).items()}


class Choice(NamedTuple):
    """A chunk size."""

    size: int  # clients
    is_measured: bool  # a failure of a client is no measurement


class Calibration:
    """Chooses the chunk size of one process by trials on a round's own clients."""

    def __init__(self, chunks: Chunks, states: Callable[[list[int]], Tree]) -> None:
        """`states(clients)` are the stacked states, on the task's device."""
        self.chunks, self.work, self._states = chunks, chunks.work, states

    def chunk_size(
        self, fn: ClientFunction, clients: np.ndarray, down: Tree, t: int
    ) -> int:
        """Clients in a chunk of this function, as measured now or remembered."""
        if self._is_fused():
            return 1
        key = self._key(fn, clients, down)
        remembered = cache.load(key)
        if remembered is None:
            try:
                choice = self._measure(fn, clients, down, t)
            finally:
                if self.chunks.graphs is not None:
                    self.chunks.graphs.clear()  # trials have fewer steps than rounds
            if not choice.is_measured:
                return choice.size
            cache.save(key, chunk=np.array(choice.size))
            # Of two runs that measured at once, both take the number written last.
            remembered = cache.load(key) or {"chunk": np.array(choice.size)}
        return int(remembered["chunk"])

    def _key(self, fn: ClientFunction, clients: np.ndarray, down: Tree) -> str:
        method, data = self.work.method, self.work.task.data
        sent = []
        for path, x in trees.flatten(down).items():
            sent.append((path, list(x.shape), str(x.dtype)))
        settings = [method.s, method.finetuning, self.work.local]
        subject = {
            "function": f"{type(method).__module__}.{fn.__qualname__}",
            "settings": [part.model_dump(mode="json") for part in settings],
            "model": str(self.work.task.model),
            "down": sent,
            "example": _example(data.x),
            "clients": 1 << len(clients).bit_length(),
            "machine": [
                str(self.work.task.device),
                platform.processor(),
                os.cpu_count(),
                torch.get_num_threads(),
                torch.__version__,
                __version__,
            ],
        }
        return cache.key_of("chunk", subject)

    def _measure(
        self, fn: ClientFunction, clients: np.ndarray, down: Tree, t: int
    ) -> Choice:
        """The chunk size with the least time a client, from a few steps of each.

        An exception is no measurement: it may be the client's own fault, which the loop
        will name.
        """
        if len(clients) == 1:
            return Choice(1, is_measured=False)
        if drawing := self.chunks.drawing:
            log.warning(
                "%s draws for each client on its own: clients run one after another",
                drawing,
            )
            return Choice(1, is_measured=True)
        longest_first = np.argsort(-self.work.steps(fn, clients), kind="stable")
        ids: list[int] = clients[longest_first].tolist()
        try:
            alone = self._trial(fn, ids[:2], down, t, batched=False)
        except Exception:
            return Choice(1, is_measured=False)
        return self._best(fn, ids, down, t, alone)

    def _is_fused(self) -> bool:
        """Whether a recurrent layer runs in a kernel that takes one client.

        On a CPU. Batched, PyTorch has a way around it that takes three to seven times
        as long, and gigabytes: a trial of it would be longer than the round.
        """
        if self.work.task.device.type != "cpu":
            return False
        modules = self.work.task.model.modules()
        return any(isinstance(module, nn.RNNBase | Lstm) for module in modules)

    def _best(
        self, fn: ClientFunction, ids: list[int], down: Tree, t: int, alone: float
    ) -> Choice:
        """The best of growing chunks; one after another takes `alone` s a client."""
        start = time.thread_time()  # without the imports of PyTorch's first gradient
        best, best_time = 1, alone
        for size in self._sizes(len(ids)):
            draws = self.work.draws
            if draws is not None and size > draws.most_at_once(np.array(ids)):
                break
            try:
                seconds = self._trial(fn, ids[:size], down, t, batched=True)
            except torch.OutOfMemoryError:
                break
            except Exception as error:
                self.chunks.note_unbatched(fn, error)
                return Choice(1, is_measured=False)
            if seconds < WORTH * best_time:
                best, best_time = size, seconds
            elif seconds > 1.3 * best_time or time.thread_time() - start > BUDGET:
                break
        return Choice(best, is_measured=True)

    def _sizes(self, clients: int) -> list[int]:
        sizes = {size for size in SIZES if size <= max(clients, SIZES[0])}
        if self.work.task.device.type == "cuda" and clients <= SIZES[-1]:
            sizes.add(clients)  # in one process the whole cohort may be a chunk
        return sorted(sizes)

    def _trial(
        self, fn: ClientFunction, ids: list[int], down: Tree, t: int, batched: bool
    ) -> float:
        """Seconds a client, the best of several tries."""
        few = STEPS * self.work.passes(fn)
        states, is_cpu = self._states(ids), self.work.task.device.type == "cpu"
        # On a CPU this thread's own time: other programs do not choose for us.
        clock = time.thread_time if is_cpu else time.perf_counter
        times = []
        for _ in range(TRIES):
            begin = clock()
            batches = self.work.batches(fn, ids, t)
            batches = trees.map(lambda x: x[:, :few], batches)
            with steps_run_by(self.chunks.recorder):
                if batched:
                    self.chunks.batched(fn, down, states, batches, t)
                else:
                    task, now = self.work.task, self.work.now(t)
                    for i in range(len(ids)):
                        batch = trees.at(batches, i)
                        state, training = row(states, i), self.work.training
                        run_client(fn, task, now, down, state, batch, training)
            if not is_cpu:
                torch.cuda.synchronize()
            times.append((clock() - begin) / len(ids))
        return min(times) + HANDLING / (len(ids) if batched else 1)
