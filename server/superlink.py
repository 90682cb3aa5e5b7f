"""Flower's SuperLink with a gate before its Fleet API, and its ServerApp process.

    python -m fedcore.server.superlink superlink LIMIT CLIENTS KEYS [Flower's words]
    python -m fedcore.server.superlink serverapp [Flower's words]

`fedcore server` starts both. The gate says in one line who was refused and why, on both
ends; Flower itself logs nothing of most refusals. It also refuses calls that Flower
takes: a signature that was used before, a key in the name of another, and a message
over the limit, or of more parts than an answer has.
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
from typing import Any, NamedTuple

import grpc
from cryptography.hazmat.primitives import hashes
from flwr.common.constant import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedcore import __version__
from fedcore.deploy import certs
from fedcore.deploy.proxies import without_proxies
from fedcore.escapes import escaped
from fedcore.users import find_user_modules

from .inbox import bounds_of

REPEAT = 30.0  # seconds in which the same refusal is said once
OBJECT_LIMIT = 64 * 1024 * 1024  # bytes of a gRPC message; Flower's objects have 20 MB
PART = 100  # bytes about one object in the list of a message's objects
AROUND = 100_000  # bytes around that list
MARK = "FEDCORE_GATE"  # environment: begins the gate's lines, and nobody else's
SESSIONS = 1000  # answers under way at one time whose bytes are counted
QUIET = {"Invalid node ID"}  # faults that a client mends by itself
MAY_PASS = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)


class Gate:
    """Refuses callers that may not pass, and says so on both ends, once in a while."""

    def __init__(
        self,
        limit: int,
        clients: int,
        keys: Path | None,
        state: Callable[[], Any] | None = None,
    ) -> None:
        """`limit` in bytes of a whole message, `keys` a directory of public keys.

        A message is about `clients` at most. `state` gives Flower's own, where the
        keys of nodes are registered.
        """
        self.limit, self.keys, self.state = limit, keys, state
        self.parts = bounds_of(clients, limit).objects
        self._mark = os.environ.get(MARK, "")
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        # With the time at which they are too old anyway.
        self._signatures: OrderedDict[bytes, float] = OrderedDict()
        self._bytes: OrderedDict[str, int] = OrderedDict()  # by push session
        self.outer = _Interceptor(self._watched)
        self.inner = _Interceptor(self._checked)

    def _watched(self, call: Call, request: Any, context: Any) -> Any:
        """Before everything of Flower's: name the refused, and tell time and version.

        The client compares them with its own.
        """
        now = f"{time.time():.3f}"
        context.set_trailing_metadata(
            (("fedcore-time", now), ("fedcore-version", __version__))
        )
        try:
            return call.inner(request, context)
        except Exception:
            self._say(call.metadata, context)
            raise

    def _say(self, metadata: dict[str, Any], context: Any) -> None:
        details = context.details()
        if isinstance(details, bytes):
            details = details.decode(errors="replace")
        reason = str(details or "").removeprefix("Fedcore: ")
        if reason in QUIET or context.code() in MAY_PASS:
            return
        name = self._name(metadata.get(PUBLIC_KEY_HEADER))
        line = f"refused {name}: {reason or context.code()}"
        now = time.monotonic()
        with self._lock:
            for text, at in list(self._said.items()):
                if now - at >= REPEAT:
                    del self._said[text]
            if line in self._said:
                return
            self._said[line] = now
        peer = context.peer().partition(":")[2]
        said = escaped(f"{line} (from {peer})")
        print(f"{self._mark}{said}", file=sys.stderr, flush=True)

    def _checked(self, call: Call, request: Any, context: Any) -> Any:
        """After Flower has verified the signature."""
        if self._is_replay(call.metadata[SIGNATURE_HEADER]):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "Fedcore: a signature was used a second time, so the call is a replay",
            )
        if call.method == "ActivateNode":
            self._check_node(request, call.metadata[PUBLIC_KEY_HEADER], context)
        if call.method == "PushMessages":
            self._check_parts(request, context)
        if call.method == "PushObject":
            self._check_size(request, context)
        return call.inner(request, context)

    def _is_replay(self, signature: bytes) -> bool:
        # ECDSA draws a number for every signature, so no two are the same. Half of one
        # tells it from all others.
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
        assert self.state is not None, "the gate was opened before Flower's state"
        state = self.state()
        node = state.get_node_id_by_public_key(key)
        if node is None and key in self._names():
            context.abort(
                grpc.StatusCode.UNAVAILABLE,
                "Fedcore: the server is starting, and registers its clients",
            )
        if node is None:
            where = "" if self.keys is None else f" in {self.keys} on the server"
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"Fedcore: its key is not one of those that may join{where}: "
                "unknown, or revoked",
            )
        infos = state.get_node_info(node_ids=[node])
        if any(info.status == NodeStatus.ONLINE for info in infos):
            context.abort(
                grpc.StatusCode.ALREADY_EXISTS,
                "Fedcore: a client with its key is connected already",
            )

    def _check_parts(self, request: Any, context: Any) -> None:
        """Refuse a list of more objects than an answer has.

        By its length alone, before anything of it is looked at.
        """
        if request.ByteSize() > AROUND + PART * self.parts:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Fedcore: its message has more than {self.parts} parts, "
                "which is more than its clients need",
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
                f"Fedcore: its message is over the limit of {self.limit / 1e6:g} MB "
                "(engine.message_limit_mb)",
            )

    def _names(self) -> dict[bytes, str]:
        """The names of clients that may join, by public key."""
        keys = {} if self.keys is None else certs.client_keys(self.keys)
        return {public_key_to_bytes(key): name for name, key in keys.items()}

    def _name(self, key: Any) -> str:
        """The owner of a key, as far as it is known here."""
        if not isinstance(key, bytes):
            return "a caller without a key"
        if name := self._names().get(key):
            return name
        digest = hashes.Hash(hashes.SHA256())
        digest.update(key)
        return f"a client with the key {digest.finalize().hex()[:16]}"


class Call(NamedTuple):
    """A call on its way to Flower's handler."""

    method: str
    metadata: dict[str, Any]
    inner: Callable[[Any, Any], Any]


class _Interceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    def __init__(self, around: Callable[[Call, Any, Any], Any]) -> None:
        self.around = around

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = details.method.rpartition("/")[2]
        metadata = dict(details.invocation_metadata)
        call = Call(method, metadata, handler.unary_unary)

        def handle(request: Any, context: Any) -> Any:
            return self.around(call, request, context)

        return grpc.unary_unary_rpc_method_handler(
            handle, handler.request_deserializer, handler.response_serializer
        )


def superlink(limit: int, clients: int, keys: Path | None) -> None:
    """Flower's SuperLink in this process, gated."""
    # The server ends it, after the ServerApp. A terminal, or systemd, sends these to
    # all processes at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    # By name: its package has a function of the module's name.
    flower: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    create = flower.generic_create_grpc_server

    def create_gated(**options: Any) -> Any:
        state = options["servicer_and_add_fn"][0].state_factory.state
        gate = Gate(limit, clients, keys, state)
        only_flat_trees(state().object_store)
        only_whole_replies(state)
        options["interceptors"] = [gate.outer, *options["interceptors"], gate.inner]
        return create(**{**options, "max_message_length": OBJECT_LIMIT})

    flower.generic_create_grpc_server = create_gated
    flower.flower_superlink()


def only_flat_trees(store: Any) -> None:
    """Have Flower's store list every object of a message once, below its head.

    Its own list follows the children that a sender names. One that names a child many
    times, whose children it has named many times before, makes it grow without end.
    """

    def list_flat(object_id: str) -> ObjectTree:
        found: dict[str, None] = {}
        to_visit = [object_id]
        with store.lock_store:
            while to_visit:
                part = to_visit.pop()
                if part in found:
                    continue
                if part not in store.store:
                    raise NoObjectInStoreError(f"object {part} is not in the store")
                found[part] = None
                to_visit += store.store[part].child_object_ids
        del found[object_id]
        parts = [ObjectTree(object_id=part) for part in found]
        return ObjectTree(object_id=object_id, children=parts)

    store.get_object_tree = list_flat


def only_whole_replies(factory: Callable[[], Any]) -> None:
    """Give the ServerApp the replies that have arrived whole.

    Flower gives one out when its head is there, and its taker waits for the rest: for
    minutes, where the client was killed or cut off between the two, in which the others
    are not heard and the deadline of the round is not heeded.
    """
    state = factory()
    give = state.get_message_res

    def is_arriving(message_id: str) -> bool:
        try:
            reply_id = state.message_ins_id_to_message_res_id[message_id]
            tree = state.object_store.get_object_tree(reply_id)
        except (KeyError, NoObjectInStoreError):
            return False
        parts = iterate_object_tree(tree)
        return any(state.object_store.get(part.object_id) == b"" for part in parts)

    def give_whole(message_ids: set[str], run_id: int) -> Any:
        whole = {number for number in message_ids if not is_arriving(number)}
        return give(message_ids=whole, run_id=run_id)

    state.get_message_res = give_whole


def heed_no_proxy() -> None:
    """Have Flower's HTTP clients in this process heed no proxy.

    They call this machine alone. What a task fetches goes through the proxy still.
    """
    client: Any = importlib.import_module("flwr.supercore.protobuf.client")
    begin = client.ProtobufClient.__init__

    def begin_without_proxies(self: Any, *arguments: Any, **options: Any) -> None:
        with without_proxies():
            begin(self, *arguments, **options)

    client.ProtobufClient.__init__ = begin_without_proxies


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            sys.exit("the server ended before its SuperLink began")


def main() -> None:
    end_with_parent()
    find_user_modules()
    heed_no_proxy()
    which, *rest = sys.argv[1:]
    if which == "superlink":
        limit, clients, keys, *arguments = rest
        sys.argv = ["flower-superlink", *arguments]
        superlink(int(limit), int(clients), Path(keys) if keys else None)
    else:
        from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

        sys.argv = ["flwr-serverapp", *rest]
        flwr_serverapp()


if __name__ == "__main__":
    main()
