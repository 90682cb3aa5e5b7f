"""The server's own message: a client function on the proxy data, as FLTrust needs it.

The server trains as one more client, whose examples are the proxy set. What such a
client keeps between rounds is kept beside what the rule keeps.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.engines.base import Work, one_thread
from fedcore.types import ClientFunction, Tree

STATE = "the server as a client"  # a name that no client function has


class Reference:
    """Does one client's work on the server's proxy data."""

    def __init__(self, work: Work) -> None:
        proxy = work.task.proxy
        assert proxy is not None, "a rule that needs proxy data is refused without them"
        rows = np.arange(len(proxy.y))
        own = FederatedData(Examples(*proxy), None, rows, np.array([0, len(rows)]))
        task = work.task.with_data(own)
        self._work = Work(task, work.method, work.local, work.seed, rounds=work.rounds)

    def message(
        self, fn: ClientFunction, down: Tree, t: int, kept: dict[str, Tensor]
    ) -> tuple[Tree, dict[str, Tensor]]:
        """(the server's own message in round t, what it keeps as a client)."""
        first = self._work.first_state(self._work.task.init_params())
        prefix = f"{STATE}{trees.SEPARATOR}"
        flat = {}
        for path, value in trees.flatten(first).items():
            flat[path] = trees.to(kept.get(prefix + path, value), value.device)
        with one_thread():
            up, new = self._work.one(fn, 0, down, trees.unflatten(flat, first), t)
        state = {}
        for path, value in trees.flatten(new).items():
            state[prefix + path] = value.detach().cpu()
        return trees.map(lambda x: x.detach().cpu(), up), state
