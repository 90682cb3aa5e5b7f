"""Flower's SuperLink with a gate in front of its Fleet API, and Flower's ServerApp process: what `fedcore server` starts.

    python -m server.superlink superlink LIMIT KEYS [arguments of flower-superlink]
    python -m server.superlink serverapp [arguments of flwr-serverapp]

The gate says in one line who was refused and why, on both ends; Flower itself logs nothing of most refusals. It also refuses what
Flower takes: a signature that was used before, a key in the name of another, and a message over the limit.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import hashes
from flwr.common.constant import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedcore import __version__
from fedcore.deploy import certs

REPEAT = 30.0  # seconds in which the same refusal is said once
OBJECT_LIMIT = (
    64 * 1024 * 1024
)  # bytes of one gRPC message; Flower cuts arrays into objects of 20 MB
SESSIONS = 1000  # answers under way at one time whose bytes are counted
QUIET = {"Invalid node ID"}  # what a client mends by itself


class Gate:
    """Who may not pass: said on both ends, once in a while."""

    def __init__(self, limit: int, keys: Path | None) -> None:
        """`limit` in bytes of a whole message, `keys` the directory of the public keys that may join."""
        self.limit, self.keys = limit, keys
        self.state: Any = None  # Flower's, once there is one
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._signatures: OrderedDict[bytes, float] = (
            OrderedDict()
        )  # with the time at which they are too old anyway
        self._bytes: OrderedDict[str, int] = OrderedDict()  # by push session
        self.outer, self.inner = (
            _Interceptor(self._watched),
            _Interceptor(self._checked),
        )

    def _watched(
        self,
        method: str,
        metadata: dict[str, Any],
        inner: Callable[..., Any],
        request: Any,
        context: Any,
    ) -> Any:
        """Before everything of Flower's: names the refused, and tells the client the time and version here."""
        context.set_trailing_metadata(
            (("fedcore-time", f"{time.time():.3f}"), ("fedcore-version", __version__))
        )
        try:
            return inner(request, context)
        except Exception:
            self._say(metadata, context)
            raise

    def _say(self, metadata: dict[str, Any], context: Any) -> None:
        details = context.details()
        text = (
            details.decode(errors="replace")
            if isinstance(details, bytes)
            else str(details or "")
        ).removeprefix("Fedcore: ")
        if text in QUIET or context.code() in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.UNAVAILABLE,
        ):
            return
        line = f"refused {self._name(metadata.get(PUBLIC_KEY_HEADER))}: {text or context.code()}"
        now = time.monotonic()
        with self._lock:
            self._said = {
                said: at for said, at in self._said.items() if now - at < REPEAT
            }
            if line in self._said:
                return
            self._said[line] = now
        print(
            f"{line} (from {context.peer().partition(':')[2]})",
            file=sys.stderr,
            flush=True,
        )

    def _checked(
        self,
        method: str,
        metadata: dict[str, Any],
        inner: Callable[..., Any],
        request: Any,
        context: Any,
    ) -> Any:
        """After Flower has verified the signature."""
        key = metadata[PUBLIC_KEY_HEADER]
        if self._seen(metadata[SIGNATURE_HEADER]):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "Fedcore: a signature was used a second time, so the call is a replay",
            )
        if method == "ActivateNode":
            self._check_node(request, key, context)
        if method == "PushObject":
            self._check_size(request, context)
        return inner(request, context)

    def _seen(self, signature: bytes) -> bool:
        # ECDSA draws a number for every signature, so no two are the same. Half of one tells it from all others.
        now, short = time.monotonic(), signature[-32:]
        with self._lock:
            while self._signatures and next(iter(self._signatures.values())) < now:
                self._signatures.popitem(last=False)
            if short in self._signatures:
                return True
            self._signatures[short] = (
                now + TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
            )
        return False

    def _check_node(self, request: Any, key: bytes, context: Any) -> None:
        if request.public_key != key:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "Fedcore: it signs with one key and wants to be the node of another",
            )
        state = self.state()
        node = state.get_node_id_by_public_key(key)
        if node is None and any(
            key == public_key_to_bytes(known) for known in self._known().values()
        ):
            context.abort(
                grpc.StatusCode.UNAVAILABLE,
                "Fedcore: the server is starting, and registers its clients",
            )
        if node is None:
            where = "" if self.keys is None else f" in {self.keys} on the server"
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"Fedcore: its key is not one of those that may join{where}: unknown, or revoked",
            )
        if any(
            info.status == NodeStatus.ONLINE
            for info in state.get_node_info(node_ids=[node])
        ):
            context.abort(
                grpc.StatusCode.ALREADY_EXISTS,
                "Fedcore: a client with its key is connected already",
            )

    def _check_size(self, request: Any, context: Any) -> None:
        with self._lock:
            total = self._bytes.pop(request.session_id, 0) + len(request.object_content)
            self._bytes[request.session_id] = total
            while len(self._bytes) > SESSIONS:
                self._bytes.popitem(last=False)
        if total > self.limit:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Fedcore: its message is over the limit of {self.limit / 1e6:g} MB (engine.message_limit_mb)",
            )

    def _known(self) -> dict[str, Any]:
        """Names and keys of those that may join."""
        return {} if self.keys is None else certs.client_keys(self.keys)

    def _name(self, key: Any) -> str:
        """Whose key it is, as far as is known here."""
        if not isinstance(key, bytes):
            return "a caller without a key"
        for name, known in self._known().items():
            if public_key_to_bytes(known) == key:
                return name
        digest = hashes.Hash(hashes.SHA256())
        digest.update(key)
        return f"a client with the key {digest.finalize().hex()[:16]}"


class _Interceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    def __init__(self, around: Callable[..., Any]) -> None:
        self.around = around

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        method, metadata = (
            details.method.rpartition("/")[2],
            dict(details.invocation_metadata),
        )

        def call(request: Any, context: Any) -> Any:
            return self.around(method, metadata, handler.unary_unary, request, context)

        return grpc.unary_unary_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )


def superlink(limit: int, keys: Path | None) -> None:
    """Flower's SuperLink in this process, gated."""
    # The server ends it, after the ServerApp. A terminal, or systemd, sends these to all processes at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    flower: Any = importlib.import_module(
        "flwr.superlink.cli.flower_superlink"
    )  # its package has a function of that name
    gate, create = Gate(limit, keys), flower.generic_create_grpc_server

    def create_gated(**options: Any) -> Any:
        gate.state = options["servicer_and_add_fn"][0].state_factory.state
        only_whole_replies(gate.state)
        options["interceptors"] = [gate.outer, *options["interceptors"], gate.inner]
        return create(**{**options, "max_message_length": OBJECT_LIMIT})

    flower.generic_create_grpc_server = create_gated
    flower.flower_superlink()


def only_whole_replies(factory: Callable[[], Any]) -> None:
    """Give the ServerApp the replies that have arrived whole.

    Flower gives one out when its head is there, and whoever takes it waits for the rest: minutes, where the client was killed or
    cut off between the two, while nobody hears the others, or heeds the deadline of the round.
    """
    state = factory()
    give = state.get_message_res

    def arriving(message: str) -> bool:
        try:
            tree = state.object_store.get_object_tree(
                state.message_ins_id_to_message_res_id[message]
            )
        except (KeyError, NoObjectInStoreError):
            return False
        return any(
            state.object_store.get(o.object_id) == b""
            for o in iterate_object_tree(tree)
        )

    def give_whole(message_ids: set[str], run_id: int) -> Any:
        return give(
            message_ids={message for message in message_ids if not arriving(message)},
            run_id=run_id,
        )

    state.get_message_res = give_whole


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            sys.exit("the server ended before its SuperLink began")


def main() -> None:
    end_with_parent()
    which, *rest = sys.argv[1:]
    if which == "superlink":
        limit, keys, *arguments = rest
        sys.argv = ["flower-superlink", *arguments]
        superlink(int(limit), Path(keys) if keys else None)
    else:
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        sys.argv = ["flwr-serverapp", *rest]
        flwr_serverapp()


if __name__ == "__main__":
    main()
