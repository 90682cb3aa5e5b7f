"""Sessions of secure sums on a device: one for each of its clients, until E5.

A warm process keeps them in its memory: a device that starts anew has left the sum.
Where every message can meet another process (Flower's own SuperNodes, its simulation),
a session is a file of the client's folder between two exchanges, for the owner alone:

    DIR/<series>/client-3/session
"""

from __future__ import annotations

import json
from pathlib import Path

from fedcore.messages.secure.client_session import ClientSession
from fedcore.messages.secure.identity import Identity
from fedcore.messages.secure.primitives import Refused
from fedcore.messages.secure.terms import Terms
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import writing

from .store import Store

NAME = "session"
HEAD = 8  # bytes before the header, which hold its length

_SESSIONS: dict[tuple[str, int], ClientSession] = {}
"""Those of this process, by the directory of the device and client."""


class Sessions:
    """The sessions of a device's clients."""

    def __init__(self, store: Store, is_warm: bool) -> None:
        """`is_warm` where one process takes all messages."""
        self._store, self._is_warm = store, is_warm

    def keep(self, session: ClientSession) -> None:
        """Keep a session for the next exchange, in the place of the client's others.

        One that has ended is dropped.
        """
        if session.has_ended:
            self.drop(session.client)
        elif self._is_warm:
            before = _SESSIONS.get(self._key(session.client))
            if before is not None and before is not session:
                before.close()
            _SESSIONS[self._key(session.client)] = session
        else:
            self._write(session)

    def take(self, client: int, run: str, identity: Identity | None) -> ClientSession:
        """The client's session in the sum `run`. Raises Refused where it has none."""
        if self._is_warm:
            session = _SESSIONS.get(self._key(client))
        else:
            session = self._read(client, identity)
        if session is None or session.terms.run != run:
            raise Refused(
                "it has no part in this sum any more: it started anew, or was asked "
                "for another one"
            )
        return session

    def drop(self, client: int) -> None:
        """Forget a client's session, and every secret in it."""
        session = _SESSIONS.pop(self._key(client), None)
        if session is not None:
            session.close()
        self._file(client).unlink(missing_ok=True)

    def _key(self, client: int) -> tuple[str, int]:
        return str(self._store.folder.parent), client

    def _file(self, client: int) -> Path:
        return self._store.folder / f"client-{client}" / NAME

    def _write(self, session: ClientSession) -> None:
        header = json.dumps([list(session.terms), session.weights]).encode()
        length = len(header).to_bytes(HEAD, "little")
        file = self._file(session.client)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        content = length + header + session.packed()
        write_atomically(file, content, sync=False, mode=0o600)

    def _read(self, client: int, identity: Identity | None) -> ClientSession | None:
        try:
            content = self._file(client).read_bytes()
        except FileNotFoundError:
            return None
        border = HEAD + int.from_bytes(content[:HEAD], "little")
        values, weights = json.loads(content[HEAD:border])
        terms = Terms(*values)
        terms = terms._replace(fields=tuple(terms.fields), rules=tuple(terms.rules))
        packed = content[border:]
        return ClientSession.unpacked(packed, client, terms, weights, identity)
