"""Clients in chunks, each chunk one batched computation under `torch.func.vmap`; the default on one machine.

How many clients make a chunk decides the speed: too few waste the batching, too many fall out of the cache. No rule predicts it, so
it is measured, once a (method, model, batches, device), and remembered on disk: two runs of one seed then compute the same bits.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedcore import cache, trees
from fedcore.engines.base import Work, failure, report
from fedcore.method import evaluates
from fedcore.run_client import run_client
from fedcore.state import StateStore
from fedcore.types import Batches, ClientFunction, Reports, Tree, Tuning

log = logging.getLogger("fedcore")

SIZES = (4, 8, 12, 16, 32, 64, 128, 256)  # chunks to try, after 1 = one client after another without vmap
BUDGET = 1.0  # seconds after which no larger chunk is tried
STEPS = 2  # local steps in a trial


class Vectorised:
    """Client functions batched over clients, on all threads of this process."""

    def __init__(self, work: Work, states: StateStore, chunk: int | None = None) -> None:
        """`chunk` clients a batch, 1 = one after another; None = measure."""
        self.work, self.states, self.chunk = work, states, chunk
        self.choices: dict[str, Any] = {}
        self.late = 0

    def each(self, fn: ClientFunction, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        if len(clients) == 0:
            return
        ids = clients.numpy()
        steps = self.work.steps(fn, ids)
        ids = ids[np.argsort(-steps, kind="stable")]  # clients of one length together: less padding
        size = self._chunk(fn, ids, down, t)
        if size == 1:
            yield from self._loop(fn, sorted(ids.tolist()), down, t)
            return
        for start in range(0, len(ids), size):
            yield from self._chunked(fn, sorted(ids[start : start + size].tolist()), down, t)

    def _chunked(self, fn: ClientFunction, chunk: list[int], down: Tree, t: int) -> Iterator[Reports]:
        try:
            with self.work.model_noise(fn, t, chunk[0]):
                up, new = self._batched(fn, down, self._states(chunk), self.work.batches(fn, chunk, t), t, chunk)
        except Exception:  # one client of the chunk, or vmap itself: the loop finds out which, and saves the others
            log.debug("chunk %s failed, going through it one by one", chunk, exc_info=True)
            yield from self._loop(fn, chunk, down, t)
            return
        if not evaluates(fn):
            self.states.put(chunk, new)
        yield Reports(torch.tensor(chunk), up, self.work.num_examples(fn, chunk))

    def _batched(
        self, fn: ClientFunction, down: Tree, states: Tree, batches: Batches | Tuning, t: int, chunk: list[int] | None = None
    ) -> tuple[Tree, Tree]:
        """(what arrives, new states) of the clients `chunk`; without it nothing is lost on the way, for a trial."""
        n, links = len(trees.leaves(batches)[0]), self.work.links
        now = self.work.now(t)
        own_down = chunk is not None and bool(trees.leaves(down)) and not links.silent("downlink", fn)
        if chunk is not None and own_down:  # each client receives a message of its own
            down = trees.stack([links.carry(down, "downlink", fn, t, i) for i in chunk])

        def client(down: Tree, state: Tree, batch: Batches | Tuning) -> tuple[Tree, Tree]:
            return run_client(fn, self.work.task, now, down, state, batch)

        in_dims = (0 if own_down else None, 0 if trees.leaves(states) else None, 0)
        up, new = vmap(client, in_dims=in_dims, randomness="different")(down, states, batches)
        assert all(len(x) == n for x in trees.leaves(up))
        if chunk is not None and trees.leaves(up) and not self.work.arrives_as_is(fn):
            up = trees.stack([self.work.send(trees.at(up, row), fn, t, i) for row, i in enumerate(chunk)])
        return up, new

    def _states(self, clients: list[int]) -> Tree:
        return trees.to(self.states.gather(clients), self.work.task.device)

    def _loop(self, fn: ClientFunction, clients: list[int], down: Tree, t: int) -> Iterator[Reports]:
        for client in clients:
            try:
                up, new = self.work.one(fn, client, down, trees.to(self.states.get(client), self.work.task.device), t)
            except Exception as e:  # a client may fail in any way; the round goes on without it
                yield failure([client], e)
                continue
            if not evaluates(fn):
                self.states.put([client], trees.map(lambda x: x[None], new))
            yield report(self.work, fn, client, up)

    # Calibration

    def _chunk(self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int) -> int:
        if self.chunk is not None:
            return self.chunk
        name = fn.__name__
        if name not in self.choices:
            key = self._key(fn, ids, down)
            known = cache.load(key)
            if known is None:
                size, measured = self._measure(fn, ids, down, t)
                if measured:
                    cache.save(key, chunk=np.array(size))
                    known = cache.load(key)  # of two runs that measured at once, both take what was written last
            self.choices[name] = int(known["chunk"]) if known else size
        return int(self.choices[name])

    def _key(self, fn: ClientFunction, ids: np.ndarray, down: Tree) -> str:
        data = self.work.task.data
        facts = {
            "function": f"{type(self.work.method).__module__}.{fn.__qualname__}",
            "settings": [self.work.method.s.model_dump(mode="json"), self.work.method.finetuning.model_dump(mode="json")],
            "model": str(self.work.task.model),
            "down": [(path, list(x.shape), str(x.dtype)) for path, x in trees.flatten(down).items()],
            "batch": [list(data.x.shape[1:]), self.work.local.model_dump(mode="json")],
            "clients": 1 << len(ids).bit_length(),
            "machine": [
                str(self.work.task.device),
                platform.processor(),
                os.cpu_count(),
                torch.get_num_threads(),
                torch.__version__,
            ],
        }
        return cache.key_of("chunk", facts)

    def _measure(self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int) -> tuple[int, bool]:
        """(chunk size with the least time a client, whether it was measured), on the first clients of this round, a few steps each.

        What a client raises is no measurement: it may be the client's own fault, which the loop will name.
        """
        if len(ids) == 1:
            return 1, False
        if noisy := [m for m in self.work.task.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]:
            log.warning("%s draws for each client on its own: clients run one after another", type(noisy[0]).__name__)
            return 1, True
        try:
            best, best_time, start = 1, self._trial(fn, ids[:2], down, t, batched=False), time.perf_counter()
        except Exception:
            return 1, False
        for size in (s for s in SIZES if s <= max(len(ids), SIZES[0])):
            try:
                seconds = self._trial(fn, ids[:size], down, t, batched=True)
            except Exception as e:
                reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
                log.warning("%s cannot be batched over clients (%s); they run one after another", fn.__name__, reason)
                return 1, False
            if seconds < best_time:
                best, best_time = size, seconds
            elif seconds > 1.3 * best_time or time.perf_counter() - start > BUDGET:
                break
        return best, True

    def _trial(self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int, batched: bool) -> float:
        """Seconds a client, the better of two tries after none: the first also warms up."""
        chunk = ids.tolist()
        few = STEPS * self.work.passes(fn)
        batches = trees.map(lambda x: x[:, :few].contiguous(), self.work.batches(fn, chunk, t))
        states = self._states(chunk)
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            if batched:
                self._batched(fn, down, states, batches, t)
            else:
                for i in range(len(chunk)):
                    state = states if not trees.leaves(states) else trees.at(states, i)
                    run_client(fn, self.work.task, self.work.now(t), down, state, trees.at(batches, i))
            if self.work.task.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) / len(chunk))
        return min(times)

    def describe(self) -> str:
        chosen = ", ".join(f"{name} {'one by one' if n == 1 else f'{n} at a time'}" for name, n in self.choices.items())
        return f"vectorised on {self.work.task.device}" + (f" ({chosen})" if chosen else "")

    def close(self) -> None:
        pass
