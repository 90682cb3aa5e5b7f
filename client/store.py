"""The states of a device's clients between rounds, in a directory of the device.

    DIR/<series>/client-3/000012-00.safetensors

is the state of client 3 after its first work in round t = 12 of that run series. What
it remembers of its messages in secure sums is in `client-3/memory/` in the same form.

Every file says to which federation, run series and client it belongs, and is refused by
name where it does not. It is written beside the old one, synced and renamed: a device
that loses power has the old state or the new one, whole.

A server that was killed goes on from its last checkpoint and asks for rounds again that
this device has done already. So states of earlier work stay until the server says that
they can no longer be asked for, and work starts from the newest state that is older
than it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.messages.moment import Moment
from fedcore.storage.checkpoint import sync_folder, write_atomically
from fedcore.storage.faults import writing
from fedcore.storage.tensors import read_tensors
from fedcore.types import Tree


class StateError(FedcoreError):
    """The state of a client on this device cannot be used."""


# In the place of a run's states: it is not gone on with as if there had been none.
FORGOTTEN = "forgotten"


class Stored(NamedTuple):
    """A state that was read."""

    state: Tree
    before: str  # the moment of the state that its work started from, or "initial"


class Store:
    """States by run series, client and moment."""

    def __init__(
        self,
        folder: Path,
        federation: str,
        series: str,
        sync: bool = True,
        kind: str = "",
    ) -> None:
        """`series` names a run from its start to its end, over starts of its server.

        Without `sync` states outlive this process, and not a loss of power. `kind` is a
        folder within that of each client.
        """
        self.folder = folder / (series or "run")
        self.federation, self.series, self.sync = federation, series, sync
        self.kind = kind

    def of_kind(self, kind: str) -> Store:
        """A store in the same place for something else than states."""
        place = self.folder.parent
        store = Store(place, self.federation, self.series, self.sync, kind)
        store.folder = self.folder
        return store

    def load(self, client: int, before: Moment, initial: Tree) -> Tree:
        """The client's state before this work; `initial` where it has not worked yet.

        Raises StateError, naming the file, for a state that is damaged, or another
        federation's, run series', client's or model's; and where the server went back
        further than it had promised.
        """
        self.refuse_forgotten()
        moments = self._moments(client)
        earlier = [moment for moment in moments if moment < before]
        if earlier:
            return self._read(client, earlier[-1], initial).state
        if moments and self._read(client, moments[0], initial).before != "initial":
            raise StateError(
                f"{self._folder(client)} holds the state of round {moments[0].t + 1} "
                f"and none before it, but the server asks for round {before.t + 1}: "
                "was it set back to an older copy of its run directory?"
            )
        return initial

    def save(self, client: int, at: Moment, state: Tree, safe: int) -> None:
        """Keep `state` as that after this work.

        The server will not go back to before round t = `safe`: older states may go.
        """
        moments = self._moments(client)
        earlier = [moment for moment in moments if moment < at]
        self._write(client, at, state, str(earlier[-1]) if earlier else "initial")
        first_needed = Moment(safe, 0)
        too_old = [moment for moment in earlier if moment < first_needed]
        replayed = [moment for moment in moments if moment > at]
        # The last one of the old ones is what round `safe` starts from.
        for moment in [*too_old[:-1], *replayed]:
            self._file(client, moment).unlink(missing_ok=True)

    def refuse_forgotten(self) -> None:
        """Raises StateError where the states of this run were deleted."""
        if (self.folder / FORGOTTEN).exists():
            raise StateError(
                f"the state of run {self.series} was deleted on this device "
                "(fedcore states --forget): to take part in it with a new one, "
                f"delete {self.folder}"
            )

    def drop(self, client: int, moments: Iterable[Moment]) -> None:
        """Forget work that came to nothing: its message is in no sum."""
        for moment in moments:
            self._file(client, moment).unlink(missing_ok=True)

    def exact(self, client: int, at: Moment, like: Tree) -> Tree:
        """What was kept after this work, like `like`.

        Raises StateError, naming the file, where it is missing or damaged.
        """
        self.refuse_forgotten()
        if at not in self._moments(client):
            raise StateError(
                f"{self._file(client, at)} is missing: the server counts on what this "
                f"client sent in round {at.t + 1}; restore the file from a copy"
            )
        return self._read(client, at, like).state

    def keep(
        self, client: int, at: Moment, state: Tree, counted: Moment | None, safe: int
    ) -> None:
        """Keep `state` as that after this work, which may still come to nothing.

        `counted` is the moment that the server counts on before this work. It will not
        go back to before round t = `safe`: what it cannot count on any more goes.
        """
        self._write(client, at, state, str(counted or "initial"))
        first_needed = Moment(safe, 0)
        if counted is not None and counted < first_needed:
            for moment in self._moments(client):
                if moment < first_needed and moment != counted:
                    self._file(client, moment).unlink(missing_ok=True)

    def _write(self, client: int, at: Moment, state: Tree, before: str) -> None:
        folder = self._folder(client)
        if not folder.exists():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._sync(folder.parent)
                self._sync(folder.parent.parent)
        flat: dict[str, Tensor] = {}
        for path, x in trees.flatten(state).items():
            flat[path or "."] = x.detach().cpu().contiguous().clone()
        facts = self._owner(client) | {"before": before, "sha256": _digest(flat)}
        write_atomically(self._file(client, at), save(flat, facts), self.sync)
        with writing(folder):
            self._sync(folder)

    def _moments(self, client: int) -> list[Moment]:
        moments = []
        for file in self._folder(client).glob("*.safetensors"):
            t, k = file.stem.split("-")
            moments.append(Moment(int(t), int(k)))
        return sorted(moments)

    def _folder(self, client: int) -> Path:
        return self.folder / f"client-{client}" / self.kind

    def _file(self, client: int, at: Moment) -> Path:
        return self._folder(client) / f"{at.t:06d}-{at.k:02d}.safetensors"

    def _owner(self, client: int) -> dict[str, str]:
        return {
            "federation": self.federation,
            "series": self.series,
            "client": str(client),
        }

    def _sync(self, folder: Path) -> None:
        if self.sync:
            sync_folder(folder)

    def _read(self, client: int, at: Moment, like: Tree) -> Stored:
        file = self._file(client, at)
        what_to_do = f"restore it from a copy, or delete {file.parent} to start anew"
        try:
            flat, facts = read_tensors(file)
        except Exception as error:
            raise StateError(f"{file} is damaged ({error}): {what_to_do}") from error
        for key, expected in self._owner(client).items():
            if facts.get(key) != expected:
                raise StateError(
                    f"{file} belongs to {key} {facts.get(key)!r}, "
                    f"this is {key} {expected!r}: put it back where it was, "
                    "or use another --state"
                )
        if facts.get("sha256") != _digest(flat):
            raise StateError(f"{file} is damaged (its SHA-256 differs): {what_to_do}")
        by_path: dict[str, Tensor] = {}
        for name, x in flat.items():
            by_path["" if name == "." else name] = x
        if _shapes(by_path) != _shapes(trees.flatten(like)):
            raise StateError(
                f"{file} does not fit this method and model: "
                "is the server's run another one?"
            )
        return Stored(trees.unflatten(by_path, like), facts.get("before", ""))


def _shapes(flat: dict[str, Tensor]) -> dict[str, Any]:
    return {path: (x.shape, x.dtype) for path, x in flat.items()}


class Kept(NamedTuple):
    """The states of one run on a device."""

    run: str  # the series, by which the server and this device know it
    clients: int
    round: int  # the last one that left a state, from 1
    bytes: int
    used: float  # when that was, in seconds since 1970


def kept(folder: Path) -> list[Kept]:
    """The runs that have states in a directory of a device, the last used first."""
    runs = []
    for series in folder.iterdir():
        size, used, last = 0, -1.0, None
        clients: set[Path] = set()
        for file in series.glob("client-*/**/*.safetensors"):
            facts = file.stat()
            size += facts.st_size
            clients.add(series / file.relative_to(series).parts[0])
            if facts.st_mtime > used:
                used, last = facts.st_mtime, file
        if last is not None:
            number = int(last.stem.split("-")[0]) + 1
            runs.append(Kept(series.name, len(clients), number, size, used))
    return sorted(runs, key=lambda run: -run.used)


def forget(folder: Path, run: str) -> None:
    """Delete the states of a run; a mark says that there were some."""
    mark = folder / run / FORGOTTEN
    mark.touch()
    sync_folder(mark.parent)
    for states in mark.parent.glob("client-*"):
        shutil.rmtree(states)


def _digest(flat: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        x = flat[name]
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(save({name: x}))
    return digest.hexdigest()
