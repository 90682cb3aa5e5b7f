"""The directory of a client on its device: whose it is, and which node it was."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.deploy import certs
from fedcore.errors import SettingsError
from fedcore.storage.checkpoint import write_atomically
from fedcore.storage.faults import unwritable


class Device:
    """A client's directory, used by one process at a time."""

    def __init__(self, folder: Path, federation: str, client: int) -> None:
        """Take the directory, and make it if it is not there.

        Raises SettingsError when it is another federation's or client's, or another
        process uses it.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise SettingsError(
                f"--state {folder}: {unwritable(folder / 'lock', error)}; "
                "expected a directory that can be made and written to"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"--state {folder}: another client runs in it; "
                "end that one, or give this one a directory of its own"
            ) from error
        self._file = folder / "device.json"
        owner: dict[str, Any] = {"federation": federation, "client": client}
        self.facts = owner
        if self._file.exists():
            self.facts = json.loads(self._file.read_text())
        for key, value in owner.items():
            if self.facts.get(key) != value:
                raise SettingsError(
                    f"--state {folder} belongs to {key} {self.facts.get(key)}, "
                    f"and this is {key} {value}: use another directory"
                )
        self.remember()

    def remember(self, **facts: Any) -> None:
        self.facts |= facts
        write_atomically(self._file, json.dumps(self.facts).encode())

    def own_key(self) -> ec.EllipticCurvePrivateKey:
        """A key made here, for a server without authentication.

        By this key such a server knows the client again.
        """
        file = self.folder / "client.key"
        if not file.exists():
            private = ec.generate_private_key(ec.SECP384R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
            write_atomically(file, private, mode=0o600)
        return certs.load_private(file)

    def keep_preset(self, content: bytes, bundle: str) -> Path:
        """Write the preset of a run, in the place of the run's before.

        Its name has the digest of the bundle that it came with, for tasks are cached
        by the names of their presets.
        """
        file = self.folder / f"run-{bundle[:16]}.toml"
        write_atomically(file, content)
        for old in self.folder.glob("run-*.toml"):
            if old != file:
                old.unlink()
        return file
