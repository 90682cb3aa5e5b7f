"""Marks on a device: the last secure sum that each of its clients helped to unmask.

    DIR/<series>/client-3/summed.json

Asked again, a client would send the same integers: the difference of two sums, of sets
that differ in one client, is that client's message. So a client takes part in no sum of
a moment that is not later than its mark, whatever a server says of the rounds it has
done; nor, in the round of its mark, in a second sum of one function, which draws the
same batches under another number. The mark is written, and synced, before the answer
that unmasks leaves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from fedcore.messages.moment import Moment
from fedcore.messages.secure.primitives import Refused
from fedcore.storage.checkpoint import sync_folder, write_atomically
from fedcore.storage.faults import writing

from .store import StateError, Store

NAME = "summed.json"


class Mark(NamedTuple):
    """The last sum of a client."""

    at: Moment
    functions: list[str]  # client functions of its round that are in sums


class Marks:
    """The marks of the clients of one run on a device."""

    def __init__(self, store: Store) -> None:
        """`store` is where the run's states are."""
        self._store = store

    def refuse(self, client: int, at: Moment, function: str) -> None:
        """Raises Refused where the client has been in a sum of this moment or later.

        And where it has been in one of this round and `function`. Raises StateError for
        a mark that cannot be read, and where the states of the run were deleted, its
        marks with them.
        """
        self._store.refuse_forgotten()
        mark = self._read(client)
        if mark is None:
            return
        if at <= mark.at:
            raise Refused(
                f"it took part in a sum of round {mark.at.t + 1} already, and is asked "
                f"for round {at.t + 1}: a second sum could give one client away; was "
                "the server set back to an older copy of its run directory?"
            )
        if at.t == mark.at.t and function in mark.functions:
            raise Refused(
                f"it took part in a sum of {function} in round {at.t + 1} already: a "
                "second one could give one client away"
            )

    def write(self, client: int, at: Moment, function: str) -> None:
        """Mark that the client helps to unmask the sum of this moment and function."""
        before, functions = self._read(client), list[str]()
        if before is not None and before.at.t == at.t:
            functions = before.functions
        mark = {**at._asdict(), "functions": [*functions, function]}
        file = self._file(client)
        sync = self._store.sync
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(mark).encode(), sync)
        if sync:
            with writing(file):
                for folder in (file.parent, file.parent.parent):
                    sync_folder(folder)

    def _read(self, client: int) -> Mark | None:
        file = self._file(client)
        try:
            mark = json.loads(file.read_bytes())
            functions = [str(name) for name in mark["functions"]]
            return Mark(Moment(int(mark["t"]), int(mark["k"])), functions)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{file} cannot be read ({error}): restore it from a copy; it says "
                "which sums this client has been in"
            ) from error

    def _file(self, client: int) -> Path:
        return self._store.folder / f"client-{client}" / NAME
