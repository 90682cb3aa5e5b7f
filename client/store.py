"""What a device's clients keep between rounds, in a directory of the device.

    DIR/<series>/client-3/000012-00.safetensors     the state of client 3 after its first work in round t = 12 of that run series

Every file says to which federation, run series and client it belongs, and is refused by name where it does not. It is written
beside the old one, synced and renamed: a device that loses power has the old state or the new one, whole.

A server that was killed goes on from its last checkpoint and asks for rounds again that this device has done already. So states of
earlier work stay until the server says that they can no longer be asked for, and work starts from the newest state that is older
than it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedcore import trees
from fedcore.errors import FedcoreError
from fedcore.storage.checkpoint import sync_folder, write_atomically
from fedcore.types import Tree


class StateError(FedcoreError):
    """The state of a client on this device cannot be used."""


FORGOTTEN = "forgotten"  # in the place of a run's states, so that it is not gone on with as if there had been none


class Moment(NamedTuple):
    """A client's work: in round t, the k-th that the server gave out in it; both from 0."""

    t: int
    k: int


class Store:
    """States by run series, client and moment."""

    def __init__(
        self, folder: Path, federation: str, series: str, sync: bool = True
    ) -> None:
        """`series` names a run from its start to its end, however often its server was started again.

        Without `sync` states outlive this process, and not a loss of power.
        """
        self.folder, self.federation, self.series, self.sync = (
            folder / (series or "run"),
            federation,
            series,
            sync,
        )

    def load(self, client: int, before: Moment, initial: Tree) -> Tree:
        """The client's state before this work; `initial` where it has not worked yet.

        Raises StateError, naming the file, for a state that is damaged, or another federation's, run series', client's or model's;
        and where the server went back further than it had promised.
        """
        if (self.folder / FORGOTTEN).exists():
            raise StateError(
                f"the state of run {self.series} was deleted on this device (fedcore states --forget): to take part in it with a "
                f"new one, delete {self.folder}"
            )
        found = self._moments(client)
        earlier = [moment for moment in found if moment < before]
        if earlier:
            return self._read(client, earlier[-1], initial)[0]
        if found and self._read(client, found[0], initial)[1] != "initial":
            raise StateError(
                f"{self._folder(client)} holds the state of round {found[0].t + 1} and none before it, but the server asks for "
                f"round {before.t + 1}: was it set back to an older copy of its run directory?"
            )
        return initial

    def save(self, client: int, at: Moment, state: Tree, safe: int) -> None:
        """Keep `state` as that after this work. The server will not go back to before round t = `safe`: older states may go."""
        folder = self._folder(client)
        found = self._moments(client)
        earlier = [moment for moment in found if moment < at]
        if not found:
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder.parent, folder.parent.parent):
                self._sync(parent)
        flat = {
            path or ".": x.detach().cpu().contiguous().clone()
            for path, x in trees.flatten(state).items()
        }
        facts = {
            **self._owner(client),
            "before": str(earlier[-1]) if earlier else "initial",
            "sha256": _digest(flat),
        }
        write_atomically(self._file(client, at), save(flat, facts), self.sync)
        self._sync(folder)
        needed = [moment for moment in earlier if moment < Moment(safe, 0)][-1:]
        for moment in found:
            if moment > at or (moment < Moment(safe, 0) and moment not in needed):
                self._file(client, moment).unlink(missing_ok=True)

    def _moments(self, client: int) -> list[Moment]:
        return sorted(
            Moment(*map(int, file.stem.split("-")))
            for file in self._folder(client).glob("*.safetensors")
        )

    def _folder(self, client: int) -> Path:
        return self.folder / f"client-{client}"

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

    def _read(self, client: int, at: Moment, like: Tree) -> tuple[Tree, str]:
        file = self._file(client, at)
        try:
            with safe_open(file, framework="pt") as content:
                facts = content.metadata() or {}
                flat = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  not a dict
        except Exception as e:
            raise StateError(
                f"{file} is damaged ({e}): restore it from a copy, or delete {file.parent} to start anew"
            ) from e
        for key, wanted in self._owner(client).items():
            if facts.get(key) != wanted:
                raise StateError(
                    f"{file} belongs to {key} {facts.get(key)!r}, this is {key} {wanted!r}: put it back where it was, or use "
                    "another --state"
                )
        if facts.get("sha256") != _digest(flat):
            raise StateError(
                f"{file} is damaged (its SHA-256 differs): restore it from a copy, or delete {file.parent} to start anew"
            )
        expected = {path or ".": x for path, x in trees.flatten(like).items()}
        if {name: (x.shape, x.dtype) for name, x in flat.items()} != {
            name: (x.shape, x.dtype) for name, x in expected.items()
        }:
            raise StateError(
                f"{file} does not fit this method and model: is the server's run another one?"
            )
        return trees.unflatten(
            {"" if name == "." else name: x for name, x in flat.items()}, like
        ), facts.get("before", "")


class Kept(NamedTuple):
    """What a device holds of one run."""

    run: str  # the series, by which the server and this device know it
    clients: int
    round: int  # the last one that left a state, from 1
    bytes: int
    used: float  # when that was, in seconds since 1970


def kept(folder: Path) -> list[Kept]:
    """Of every run that has states in this directory of a device, the last used first."""
    found = []
    for series in folder.iterdir():
        files = [(file, file.stat()) for file in series.glob("client-*/*.safetensors")]
        if files:
            last = max(files, key=lambda each: each[1].st_mtime)
            rounds, clients = (
                int(last[0].stem.split("-")[0]) + 1,
                len({file.parent for file, _ in files}),
            )
            found.append(
                Kept(
                    series.name,
                    clients,
                    rounds,
                    sum(facts.st_size for _, facts in files),
                    last[1].st_mtime,
                )
            )
    return sorted(found, key=lambda run: -run.used)


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
        digest.update(
            json.dumps([name, str(flat[name].dtype), list(flat[name].shape)]).encode()
        )
        digest.update(save({name: flat[name]}))
    return digest.hexdigest()
