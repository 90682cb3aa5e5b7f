"""Clients in chunks, each chunk one batched computation under `torch.func.vmap`, chunks side by side on all cores; the default.

Local steps run from recordings (`fedcore.recording`). On a CPU every chunk is the work of one thread: no core waits for another at
every small operation, and which thread does it changes no bit.

How many clients make a chunk decides the speed: too few waste the batching, too many fall out of the cache. No rule predicts it, so
it is measured, once a (method, model, batches, device), and remembered on disk: two runs of one seed then compute the same bits.
"""

from __future__ import annotations

import logging
import os
import platform
import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedcore import cache, trees
from fedcore.engines.base import Work, failure, one_thread, report
from fedcore.method import evaluates
from fedcore.recording import Recorder, recorded
from fedcore.run_client import run_client
from fedcore.state import StateStore
from fedcore.types import Batches, ClientFunction, Reports, Tree, Tuning

log = logging.getLogger("fedcore")

SIZES = (4, 8, 16, 32, 64, 128, 256)  # chunks to try, after 1 = one client after another without vmap
BUDGET = 1.0  # seconds of this thread after which no larger chunk is tried
CLOSE = 1.1  # a larger chunk that takes no more than this times the least time is preferred: threads wait less for the interpreter
STEPS = 2  # local steps in a trial
HANDLING = 1.5e-4  # seconds that the loop and the method need for a report, of however many clients, beside its arithmetic
PADDING = 0.1  # most of a chunk's steps that may be padding
PIECE = 8  # clients that a thread takes at once where they go one by one
THREADS = "threads"  # beside the chunk sizes by function in what the engine chose
AHEAD = 2  # chunks for each thread that are begun before the first is handed on


class Done(NamedTuple):
    """Clients that have done their work."""

    reports: Reports
    states: Tree  # new, stacked; nothing of those who failed


class Vectorised:
    """Client functions batched over clients, on all threads of this process."""

    def __init__(self, work: Work, states: StateStore, chunk: int | None = None) -> None:
        """`chunk` clients a batch, 1 = one after another; None = measure."""
        self.work, self.states, self.chunk = work, states, chunk
        self.choices: dict[str, Any] = {}
        self.threads = torch.get_num_threads() if work.task.device.type == "cpu" else 1
        self._recorder: Recorder | None = None
        self._draws: dict[str, bool] = {}  # client functions that draw from torch's generator: not on several threads
        self._workers: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        self.late = 0

    def each(self, fn: ClientFunction, clients: Tensor, down: Tree, t: int) -> Iterator[Reports]:
        if len(clients) == 0:
            return
        if not self._draws and not self._noisy():
            self._recorder = self._recorder or Recorder()
            self.work.even = True
        with self._one_thread():
            size = self._chunk(fn, clients.numpy(), down, t)
            pieces = deque(self.chunks(fn, clients.numpy()))
            if fn.__name__ not in self._draws:
                yield from self._keep(fn, self._first(fn, pieces.popleft(), down, t, size))
            if self.threads == 1 or self._draws[fn.__name__] or len(pieces) < 2:
                for piece in pieces:
                    yield from self._keep(fn, self._run(self.work, fn, piece, down, self._states(piece), t, size))
            else:
                yield from self._side_by_side(fn, pieces, down, t, size)

    def chunks(self, fn: ClientFunction, clients: np.ndarray) -> list[list[int]]:
        """How these clients are split, the longest first, once the size is known."""
        size, steps = self.chunk or self.choices[fn.__name__], self.work.steps(fn, clients)
        order = np.argsort(-steps, kind="stable")
        threads = self.choices.setdefault(THREADS, self.threads)
        if size == 1:
            piece = min(max(len(clients) // (4 * threads), 1), PIECE)
            return [clients[order[i : i + piece]].tolist() for i in range(0, len(order), piece)]
        chunks = threads * -(-len(clients) // (size * threads))  # every thread has as many
        return _pack(clients[order].tolist(), steps[order].tolist(), -(-len(clients) // chunks))

    def _noisy(self) -> list[nn.Module]:
        """Layers that draw for each example: what they draw depends on shapes, so that these stay as `sequential` has them."""
        return [m for m in self.work.task.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]

    def _one_thread(self) -> Any:
        return one_thread() if self.work.task.device.type == "cpu" else nullcontext()

    def _first(self, fn: ClientFunction, piece: list[int], down: Tree, t: int, size: int) -> list[Done]:
        """The first piece of a run, which tells whether `fn` draws."""
        self.work.drew = False
        done = self._run(self.work, fn, piece, down, self._states(piece), t, size)
        self._draws[fn.__name__], self.work.drew = self.work.drew, None
        return done

    def _side_by_side(self, fn: ClientFunction, pieces: deque[list[int]], down: Tree, t: int, size: int) -> Iterator[Reports]:
        """Pieces on all threads; handed on in their order."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "clients")
            for _ in range(self.threads):
                self._workers.put(self.work.replica())

        def job(piece: list[int], states: Tree) -> list[Done]:
            worker = self._workers.get()
            try:
                torch.set_num_threads(1)  # PyTorch keeps this by thread
                return self._run(worker, fn, piece, down, states, t, size)
            finally:
                self._workers.put(worker)

        running: deque[Future[list[Done]]] = deque()
        try:
            while pieces or running:
                while pieces and len(running) < AHEAD * self.threads:
                    piece = pieces.popleft()
                    running.append(self._pool.submit(job, piece, self._states(piece)))
                yield from self._keep(fn, running.popleft().result())
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _keep(self, fn: ClientFunction, done: list[Done]) -> Iterator[Reports]:
        for reports, new in done:
            if len(reports.clients) and not evaluates(fn):
                self.states.put(reports.clients, new)
            yield reports

    # One thread's work

    def _run(self, work: Work, fn: ClientFunction, piece: list[int], down: Tree, states: Tree, t: int, size: int) -> list[Done]:
        with recorded(self._recorder):
            if size > 1 and len(piece) > 1:
                try:
                    with work.model_noise(fn, t, piece[0]):
                        up, new = self._batched(work, fn, down, states, work.batches(fn, piece, t), t, piece)
                    return [Done(Reports(torch.tensor(piece), up, work.num_examples(fn, piece)), new)]
                except Exception:  # one client of the chunk, or vmap itself: the loop finds out which, and saves the others
                    log.debug("chunk %s failed, going through it one by one", piece, exc_info=True)
            return [self._alone(work, fn, client, down, self._row(states, i), t) for i, client in enumerate(piece)]

    def _alone(self, work: Work, fn: ClientFunction, client: int, down: Tree, state: Tree, t: int) -> Done:
        try:
            up, new = work.one(fn, client, down, state, t)
        except Exception as e:  # a client may fail in any way; the round goes on without it
            return Done(failure([client], e), {})
        return Done(report(work, fn, client, up), trees.map(lambda x: x[None], new))

    def _batched(
        self,
        work: Work,
        fn: ClientFunction,
        down: Tree,
        states: Tree,
        batches: Batches | Tuning,
        t: int,
        chunk: list[int] | None = None,
    ) -> tuple[Tree, Tree]:
        """(what arrives, new states) of the clients `chunk`; without it nothing is lost on the way, for a trial."""
        n, links = len(trees.leaves(batches)[0]), work.links
        now = work.now(t)
        own_down = chunk is not None and bool(trees.leaves(down)) and not links.silent("downlink", fn)
        if chunk is not None and own_down:  # each client receives a message of its own
            down = trees.stack([links.carry(down, "downlink", fn, t, i) for i in chunk])

        def client(down: Tree, state: Tree, batch: Batches | Tuning) -> tuple[Tree, Tree]:
            return run_client(fn, work.task, now, down, state, batch)

        in_dims = (0 if own_down else None, 0 if trees.leaves(states) else None, 0)
        up, new = vmap(client, in_dims=in_dims, randomness="different")(down, states, batches)
        assert all(len(x) == n for x in trees.leaves(up))
        if chunk is not None and trees.leaves(up) and not work.arrives_as_is(fn):
            up = trees.stack([work.send(trees.at(up, row), fn, t, i) for row, i in enumerate(chunk)])
        return up, new

    def _states(self, clients: list[int]) -> Tree:
        return trees.to(self.states.gather(clients), self.work.task.device)

    def _row(self, states: Tree, i: int) -> Tree:
        return trees.at(states, i) if trees.leaves(states) else states

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
        ids = ids[np.argsort(-self.work.steps(fn, ids), kind="stable")]
        if noisy := self._noisy():
            log.warning("%s draws for each client on its own: clients run one after another", type(noisy[0]).__name__)
            return 1, True
        try:
            best, start = 1, time.thread_time()
            best_time = self._trial(fn, ids[:2], down, t, batched=False)
        except Exception:
            return 1, False
        for size in (s for s in SIZES if s <= max(len(ids), SIZES[0])):
            try:
                seconds = self._trial(fn, ids[:size], down, t, batched=True)
            except Exception as e:
                reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
                log.warning("%s cannot be batched over clients (%s); they run one after another", fn.__name__, reason)
                return 1, False
            if seconds < CLOSE * best_time:
                best, best_time = size, min(seconds, best_time)
            elif seconds > 1.3 * best_time or time.thread_time() - start > BUDGET:
                break
        return best, True

    def _trial(self, fn: ClientFunction, ids: np.ndarray, down: Tree, t: int, batched: bool) -> float:
        """Seconds a client, the best of several tries."""
        chunk = ids.tolist()
        few = STEPS * self.work.passes(fn)
        batches = trees.map(lambda x: x[:, :few], self.work.batches(fn, chunk, t))
        states = self._states(chunk)
        # On a CPU this thread's own time: what else runs on the machine does not choose for us.
        clock = time.thread_time if self.work.task.device.type == "cpu" else time.perf_counter
        times = []
        for _ in range(5):  # the first two record, and compare the recording with what it stands for
            begin = clock()
            with recorded(self._recorder):
                if batched:
                    self._batched(self.work, fn, down, states, batches, t)
                else:
                    for i in range(len(chunk)):
                        run_client(fn, self.work.task, self.work.now(t), down, self._row(states, i), trees.at(batches, i))
            if self.work.task.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((clock() - begin) / len(chunk))
        return min(times) + HANDLING / (len(chunk) if batched else 1)

    def describe(self) -> str:
        sizes = {name: n for name, n in self.choices.items() if name != THREADS}
        chosen = ", ".join(f"{name} {'one by one' if n == 1 else f'{n} at a time'}" for name, n in sizes.items())
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"vectorised on {self.work.task.device}{threads}" + (f" ({chosen})" if chosen else "")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _pack(ids: list[int], steps: list[int], most: int) -> list[list[int]]:
    """Chunks of at most `most` clients of about one length, ascending ids in each; `steps` descend.

    A chunk lasts as long as its longest client, and at most PADDING of that is waiting: else it is halved, and again, so that few
    shapes occur.
    """
    chunks, start = [], 0
    while start < len(ids):
        size = min(most, len(ids) - start)
        while size > 1 and _waiting(steps[start : start + size]) > PADDING:
            size //= 2
        chunks.append(sorted(ids[start : start + size]))
        start += size
    return chunks


def _waiting(steps: list[int]) -> float:
    """Share of a chunk's steps that are padding."""
    return 1 - sum(steps) / max(steps[0] * len(steps), 1)
