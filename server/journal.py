"""The sums of a run's last rounds, in its directory, until a checkpoint has them.

    checkpoint/sums/000012-00.safetensors    the first sum of round 12 (t = 11), decoded
    checkpoint/sums/void.json                works of clients that are in no sum

Clients send one sum of a round and no second one, so a server that was killed after it
had the sum, and before its checkpoint had the round, cannot ask again: it goes on with
what is written here. A round that could not be summed is written as well, for it would
be another one the second time. All of it is known to the server, and no secret.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from fedcore.messages.secure.ask import SecretTotal
from fedcore.messages.secure.ring import Encoded
from fedcore.storage.checkpoint import sync_folder, write_atomically
from fedcore.storage.faults import writing
from fedcore.storage.tensors import read_tensors

log = logging.getLogger("fedcore")

FOLDER = "sums"  # in the run's checkpoint directory
VOID = "void.json"
MOST = 100  # works of one client that it is told are in no sum


class Entry(NamedTuple):
    """What became of one sum."""

    total: SecretTotal
    fault: str = ""  # why it could not be made
    failed: Mapping[int, str] = {}  # clients that were named, and why


class Journal:
    """The sums of a run's last rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, t: int, k: int, question: str) -> Entry | None:
        """The k-th sum of round t, where it was made of this `question`; or None."""
        file = self._file(t, k)
        if not file.exists():
            return None
        try:
            tensors, metadata = read_tensors(file)
            facts = json.loads(metadata["facts"])
        except Exception as error:  # of safetensors' own kinds
            log.warning("%s is damaged, and is not used: %s", file, error)
            return None
        if facts["question"] != question:
            return None
        total = SecretTotal(None, facts["clients"], facts["moment"], facts["bytes_up"])
        if not facts["fault"]:
            total.total = Encoded(tensors["numbers"], tensors["words"])
        return Entry(total, facts["fault"], dict(facts["failed"]))

    def write(self, t: int, k: int, question: str, entry: Entry) -> None:
        """Write a sum, synced: once this returns it is never asked for again."""
        total, fault, failed = entry
        facts = {
            "question": question,
            "clients": total.clients,
            "moment": total.moment,
            "bytes_up": total.bytes_up,
            "fault": fault,
            "failed": list(failed.items()),
        }
        tensors = {"nothing": torch.empty(0)}
        if total.total is not None and not fault:
            tensors = {"numbers": total.total.numbers, "words": total.total.words}
        file = self._file(t, k)
        with writing(file):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors, {"facts": json.dumps(facts)}))
        with writing(file):
            sync_folder(self.folder)

    def prune(self, safe: int) -> None:
        """Delete the sums of the first `safe` rounds, which a checkpoint has.

        Those of the model before its first round (t = -1) go with the first round's.
        """
        for file in self.folder.glob("*.safetensors"):
            number = int(file.stem.split("-")[0])
            if max(number, 1) <= safe:
                file.unlink(missing_ok=True)

    def _file(self, t: int, k: int) -> Path:
        return self.folder / f"{t + 1:06d}-{k:02d}.safetensors"


class Void:
    """Works of clients that are in no sum: they forget the states that these left.

    A client hears of them when it is asked the next time.
    """

    def __init__(self, folder: Path | None) -> None:
        """`folder` keeps them over a restart of the server; None for a simulation."""
        self._file = None if folder is None else folder / VOID
        self._works: dict[int, list[int]] = {}
        if self._file is not None and self._file.exists():
            for client, works in json.loads(self._file.read_bytes()).items():
                self._works[int(client)] = works

    def of(self, client: int) -> list[int]:
        """The works (t 2^16 + k) that the client has yet to hear of."""
        return self._works.get(client, [])

    def update(self, told: Iterable[int], void: Iterable[int], work: int) -> None:
        """Note the clients that were told, and those of whom `work` is in no sum."""
        before = dict(self._works)
        for client in told:
            self._works.pop(client, None)
        for client in void:
            self._works[client] = [*self._works.get(client, []), work][-MOST:]
        if self._file is None or self._works == before:
            return
        with writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps(self._works).encode())
