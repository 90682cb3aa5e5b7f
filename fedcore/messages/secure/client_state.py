"""Everything a client's session holds between two exchanges, secrets among it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from fedcore.messages.secure.masks import Vector
from fedcore.messages.secure.primitives import KEY, Secret

__all__ = ["ClientState"]


@dataclass(repr=False, slots=True)
class ClientState:
    """A session between two exchanges. Fields are filled as exchanges pass."""

    exchange: int = 0  # the last one that was answered
    # E1: c_u and the seed of s_u, their public keys, and what is to be added up.
    c: Secret = field(default_factory=Secret)
    seed: Secret = field(default_factory=Secret)
    public: bytes = b""  # c_pk and s_pk
    numbers: int = 0  # d, words of 32 bits at the beginning of `vector`
    vector: Vector | None = None
    # E2: the cohort, and the neighbours' keys.
    ids: list[int] = field(default_factory=list)
    weights: bytes = b""  # of all, field by field
    t: int = 0
    session: bytes = b""
    mask_keys: dict[int, bytes] = field(default_factory=dict)  # s_pk by neighbour
    certificates: dict[int, bytes] = field(default_factory=dict)  # by neighbour
    shared: dict[int, Secret] = field(default_factory=dict)  # X25519(c_u, c_v)
    b: Secret = field(default_factory=Secret)
    # E2 and E3: shares of b_v and of seed_v by v; of the own seed none.
    held: dict[int, Secret] = field(default_factory=dict)
    survivors: list[int] = field(default_factory=list)  # E4

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a session holds secrets and is never pickled or copied")

    def packed(self) -> bytes:
        """All of it as bytes, secrets too: for a file that nobody else can read."""
        header: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bytes):
                value = value.hex()
            elif isinstance(value, dict):
                value = [[client, content.hex()] for client, content in value.items()]
            header[name] = value
        vector = self.vector
        header["vector"] = None if vector is None else len(vector)
        text = json.dumps(header).encode()
        body = b"" if vector is None else vector.tobytes()
        return len(text).to_bytes(8, "little") + text + body

    @classmethod
    def unpacked(cls, content: bytes) -> ClientState:
        """The state that was packed."""
        border = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:border])
        kinds: dict[str, Callable[[bytes], bytes]] = dict.fromkeys(
            ("c", "seed", "b", "shared", "held"), Secret
        )
        state = cls()
        for name, value in header.items():
            kind = kinds.get(name, bytes)
            before = getattr(state, name)
            if isinstance(before, bytes):
                value = kind(bytes.fromhex(value))
            elif isinstance(before, dict):
                value = {pair[0]: kind(bytes.fromhex(pair[1])) for pair in value}
            elif name == "vector" and value is not None:
                value = np.frombuffer(content[border:], np.uint8).copy()
            setattr(state, name, value)
        return state

    def shares_of(self, client: int) -> tuple[bytes, bytes]:
        """The shares held of b_v and of seed_v; the latter is empty for the own."""
        both = self.held[client]
        return both[:KEY], both[KEY:]
