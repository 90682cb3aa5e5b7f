"""Marks on a device: the last secure sum that each of its clients helped to unmask.

    DIR/<series>/client-3/summed.json

Asked again, a client would send the same integers: the difference of two sums, of sets
that differ in one client, is that client's message. So a client takes part in no sum of
a moment that is not later than its mark, whatever a server says of the rounds it has
done. The mark is written, and synced, before the answer that unmasks leaves.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedcore.messages.secure.primitives import Refused
from fedcore.storage.checkpoint import sync_folder, write_atomically
from fedcore.storage.faults import writing

from .store import Moment, StateError, Store

NAME = "summed.json"


class Marks:
    """The marks of the clients of one run on a device."""

    def __init__(self, store: Store) -> None:
        """`store` is where the run's states are."""
        self._store = store

    def refuse(self, client: int, at: Moment) -> None:
        """Raises Refused where the client has been in a sum of this moment or later.

        Raises StateError for a mark that cannot be read, and where the states of the
        run were deleted, its marks with them.
        """
        self._store.refuse_forgotten()
        mark = self._read(client)
        if mark is not None and at <= mark:
            raise Refused(
                f"it took part in a sum of round {mark.t + 1} already, and is asked "
                f"for round {at.t + 1}: a second sum could give one client away; was "
                "the server set back to an older copy of its run directory?"
            )

    def write(self, client: int, at: Moment) -> None:
        """Mark that the client helps to unmask the sum of this moment."""
        file = self._file(client)
        sync = self._store.sync
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(at._asdict()).encode(), sync)
        if sync:
            with writing(file):
                for folder in (file.parent, file.parent.parent):
                    sync_folder(folder)

    def _read(self, client: int) -> Moment | None:
        file = self._file(client)
        try:
            mark = json.loads(file.read_bytes())
            return Moment(int(mark["t"]), int(mark["k"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{file} cannot be read ({error}): restore it from a copy; it says "
                "which sums this client has been in"
            ) from error

    def _file(self, client: int) -> Path:
        return self._store.folder / f"client-{client}" / NAME
