"""The warm SuperNode: one resident process a device, with the client function in process, on Flower's Fleet API over gRPC.

A stock `flower-supernode` starts processes for every message and looks for the next each 3 s. This one does what it does on the
wire - the same service, signatures and objects - and calls the ClientApp itself.

A device is behind bad networks: every call has a deadline, and after one that passed it the connection is made anew, since one that
was cut without a word would otherwise be waited on until the kernel gives up, a quarter of an hour later.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import signal
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import (
    NodeAuthClientInterceptor,
)
from flwr.common.config import get_fused_config_from_fab
from flwr.common.serde import (
    fab_from_proto,
    message_from_proto,
    message_to_proto,
    run_from_proto,
)
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from client.app import app, device_settings
from fedcore.deploy import certs
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import Interrupted
from fedcore.storage.checkpoint import write_atomically

log = logging.getLogger("fedcore")

HEARTBEAT = 10.0  # seconds, the least that Flower takes; a node that is silent for two of them is offline
DEADLINE = 15.0  # seconds for a call that carries no array
OBJECT_DEADLINE = 300.0  # seconds for one object, at most 20 MB of an array
PATIENCE = 20.0  # seconds for which a refusal may be the server's start, or this client's own end a moment ago
FIRST_PAUSE = (
    0.01  # seconds between looks for work, right after some; it grows to `poll`
)
RETRY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class Refused(RunError):
    """The server does not let this client take part."""


class _Gone(Exception):
    """The server does not know this node any more, or the message, or the run."""


class Connection:
    """Calls of the Fleet API that survive cuts of the network."""

    def __init__(
        self,
        address: str,
        ca: bytes | None,
        key: ec.EllipticCurvePrivateKey,
        stop: threading.Event,
    ) -> None:
        """`ca` in PEM, None for a connection without TLS."""
        self.address, self.ca, self.key, self.stop = address, ca, key, stop
        self.server_time = 0.0  # seconds that the server's clock is ahead of this one, as of its last answer
        self.cuts = 0  # calls that were not answered and tried again
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        # gRPC itself would wait for up to two minutes before it tries a server again that was away.
        options = [
            (f"grpc.{name}_reconnect_backoff_ms", value)
            for name, value in (("initial", 200), ("min", 1000), ("max", 2000))
        ]
        options += [
            (f"grpc.max_{way}_message_length", GRPC_MAX_MESSAGE_LENGTH)
            for way in ("send", "receive")
        ]
        if self.ca is None:
            self.channel = grpc.insecure_channel(self.address, options)
        else:
            self.channel = grpc.secure_channel(
                self.address, grpc.ssl_channel_credentials(self.ca), options
            )
        interceptors = (
            RuntimeVersionClientInterceptor("SuperNode"),
            NodeAuthClientInterceptor(self.key, self.key.public_key()),
        )
        self.stub = FleetStub(grpc.intercept_channel(self.channel, *interceptors))

    def _reopen(self, stub: FleetStub) -> None:
        with self._lock:
            if self.stub is stub:  # and no other thread has done so
                # Elsewhere, for it may take its time; calls that are under way on it are then cancelled, and tried again.
                threading.Thread(target=self.channel.close, daemon=True).start()
                self._open()

    def close(self) -> None:
        self.channel.close()

    def once(self, name: str, request: Any, deadline: float = DEADLINE) -> Any:
        """One call, tried once. Raises grpc.RpcError."""
        stub = self.stub
        try:
            response, call = getattr(stub, name).with_call(request, timeout=deadline)
        except grpc.RpcError as e:
            self._read_clock(e)
            if (
                e.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            ):  # after other faults gRPC connects anew by itself
                self._reopen(stub)
            raise
        except ValueError as e:  # another thread closed the channel under our hands
            raise _closed(e) from e
        self._read_clock(call)
        return response

    def call(self, name: str, request: Any, deadline: float = DEADLINE) -> Any:
        """One call, until it is answered. Raises _Gone, and Refused for what trying again does not mend."""
        pause, down_since = 0.2, 0.0
        while True:
            try:
                response = self.once(name, request, deadline)
            except grpc.RpcError as e:
                if e.code() not in RETRY:
                    raise self._explain(e) from e
                self.cuts += 1
                if not down_since:
                    down_since = time.monotonic()
                    self._complain(e)
                if self.stop.wait(pause):
                    raise Interrupted("stopped") from e
                pause = min(pause * 1.6, 3.0)
            else:
                if down_since and time.monotonic() - down_since > 1:
                    log.warning(
                        "connected again after %.0f s", time.monotonic() - down_since
                    )
                return response

    def _complain(self, e: grpc.RpcError) -> None:
        """Say why there is no connection; what no time will mend is refused at once."""
        details = str(e.details())
        host, port = host_and_port(self.address)
        if self.ca is None and speaks_tls(host, port):
            raise Refused(
                f"the server at {self.address} speaks TLS and this client does not: give it its --certs directory"
            ) from e
        if self.ca is not None and (
            "handshake" in details.lower()
            or "ssl" in details.lower()
            or "certificate" in details.lower()
        ):
            with suppress(OSError):  # no connection, or one that ended: that may pass
                if fault := tls_fault(host, port, self.ca):
                    raise Refused(f"TLS with {self.address} failed: {fault}") from e
        reason = (
            "it does not answer"
            if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            else details.partition(";")[0]
        )
        log.warning(
            "no connection to %s (%s); trying again until there is one",
            self.address,
            reason,
        )

    def _read_clock(self, call: Any) -> None:
        with suppress(Exception):
            for key, value in call.trailing_metadata() or ():
                if key == "fedcore-time":
                    self.server_time = float(value) - time.time()

    def _explain(self, e: grpc.RpcError) -> Exception:
        details = _text_of(e)
        if "Invalid timestamp" in details or "Clock" in details:
            off = f"{abs(self.server_time):.0f} s {'behind' if self.server_time > 0 else 'ahead of'} the server's"
            return Refused(
                f"this device's clock is {off}, and signatures with such a time are not taken: set the clock (NTP)"
            )
        if "Invalid node ID" in details or (
            e.code() is grpc.StatusCode.PERMISSION_DENIED and "Fedcore" not in details
        ):
            return _Gone(details)
        if e.code() in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        ):
            return _Gone(details)
        return Refused(
            f"the server refuses this client: {details.removeprefix('Fedcore: ')}"
        )


def _closed(e: Exception) -> grpc.RpcError:
    class Closed(grpc.RpcError):  # type: ignore[misc]  # gRPC has no types
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return str(e)

    return Closed()


def _text_of(e: grpc.RpcError) -> str:
    """What the server said. Flower packs its own errors in JSON."""
    details = str(e.details() or e.code())
    with suppress(ValueError, TypeError, AttributeError):
        said = json.loads(details)
        details = (
            " ".join(
                str(said[key])
                for key in ("public_message", "message", "public_details")
                if said.get(key)
            )
            or details
        )
    return details


def speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake gets an answer there, whatever the certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), 3) as s,
            context.wrap_socket(s, server_hostname=host),
        ):
            return True
    except OSError:
        return False


def tls_fault(host: str, port: int, ca: bytes) -> str | None:
    """Why the certificate of the server at that name is not taken, None when it is. Raises OSError without a connection."""
    context = ssl.create_default_context(cadata=ca.decode())
    try:
        with (
            socket.create_connection((host, port), 5) as s,
            context.wrap_socket(s, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as e:
        if "self-signed" in e.verify_message or "issuer" in e.verify_message:
            return f"the server's certificate is not from the authority in ca.crt ({e.verify_message}): use its federation's directory"
        if "not valid for" in e.verify_message or "mismatch" in e.verify_message:
            return f"{e.verify_message}: connect to a name in it, or make it anew with fedcore certs --host {host}"
        return f"{e.verify_message}: see fedcore doctor"
    except ssl.SSLEOFError:
        raise
    except ssl.SSLError as e:
        return f"the server there does not speak TLS ({e.reason}): was it started with --insecure, or is this another port?"


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SettingsError(
            f'--server "{address}": expected HOST:PORT, e.g. fl.example.org:9092'
        )
    return host.strip("[]"), int(port)


class Device:
    """What of this client lies on the device: whose it is, and which node it was. One process at a time."""

    def __init__(self, folder: Path, federation: str, client: int) -> None:
        """Raises SettingsError when the directory is another federation's or client's, or another process uses it."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = (folder / "lock").open("w")
        except OSError as e:
            raise SettingsError(
                f"--state {folder}: {e.strerror}; expected a directory that can be made and written to"
            ) from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise SettingsError(
                f"--state {folder}: another client runs in it; end that one, or give this one a directory of its own"
            ) from e
        self._file = folder / "device.json"
        owner: dict[str, Any] = {"federation": federation, "client": client}
        self.facts = (
            json.loads(self._file.read_text()) if self._file.exists() else owner
        )
        for key, value in owner.items():
            if self.facts.get(key) != value:
                raise SettingsError(
                    f"--state {folder} belongs to {key} {self.facts.get(key)}, and this is {key} {value}: use another directory"
                )
        self.remember()

    def remember(self, **facts: Any) -> None:
        self.facts |= facts
        write_atomically(self._file, json.dumps(self.facts).encode())

    def own_key(self) -> ec.EllipticCurvePrivateKey:
        """A key made here, for a server without authentication: by it that server knows this client again."""
        file = self.folder / "client.key"
        if not file.exists():
            private = ec.generate_private_key(ec.SECP384R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
                f.write(private)
        return certs.load_private(file)


class SuperNode:
    """One client of a federation, from its start to its end."""

    def __init__(
        self,
        server: str,
        client: int,
        device: Device,
        folder: Path | None,
        data: Path | None,
        settings: list[str],
        poll: float,
    ) -> None:
        """`folder` holds ca.crt and the client's key, None for no TLS; `poll` is the longest pause between looks for work, in s."""
        self.device, self.client, self.poll, self.insecure = (
            device,
            client,
            poll,
            folder is None,
        )
        self.stop = threading.Event()
        key = (
            device.own_key()
            if folder is None
            else certs.load_private(folder / "client.key")
        )
        ca = None if folder is None else (folder / "ca.crt").read_bytes()
        self.connection = Connection(server, ca, key, self.stop)
        self.node = Node()
        self.config: dict[str, Any] = {
            "partition-id": client,
            "state": str(device.folder),
            "federation": device.facts["federation"],
            "data": "" if data is None else str(data.resolve()),
            "set": " ".join(settings),
        }
        self._context: Context | None = None
        self._said = 0.0

    def run(self) -> None:
        """Serve until stopped. Raises Interrupted then, and Refused when the server does not want this client."""
        self.activate()
        threading.Thread(target=self._beat, daemon=True).start()
        pause = FIRST_PAUSE
        try:
            while True:
                try:
                    cuts = self.connection.cuts
                    found = self.connection.call(
                        "PullMessages", fleet_pb2.PullMessagesRequest(node=self.node)
                    )
                    for message, tree in zip(
                        found.messages_list, found.message_object_trees, strict=True
                    ):
                        self.handle(message_from_proto(message), tree)
                        pause = FIRST_PAUSE
                    if self.connection.cuts > cuts and not found.messages_list:
                        # Flower gives a message out once, and the answer that did not arrive may have held one. So come anew:
                        # then the server waits for it no longer.
                        self.activate()
                except _Gone as e:
                    log.warning(
                        "the server does not know this client any more (%s); introducing it again",
                        e,
                    )
                    self.activate()
                if self.stop.wait(pause):
                    raise Interrupted(f"client {self.client} stopped")
                pause = min(pause * 1.5, self.poll)
        finally:
            with suppress(grpc.RpcError):
                self.connection.once(
                    "DeactivateNode",
                    fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id),
                    2,
                )
            self.connection.close()

    def activate(self) -> None:
        """Become a node of the federation. A refusal is final after PATIENCE."""
        key = public_key_to_bytes(self.connection.key.public_key())
        begin, said = time.monotonic(), False
        while True:
            with suppress(
                grpc.RpcError
            ):  # a node that ended without a word still counts as there; so say it now
                if before := self.device.facts.get("node"):
                    self.connection.once(
                        "DeactivateNode",
                        fleet_pb2.DeactivateNodeRequest(node_id=before),
                        5,
                    )
            try:
                if self.insecure:
                    with suppress(_Gone, Refused):  # it is registered already
                        self.connection.call(
                            "RegisterNode",
                            fleet_pb2.RegisterNodeFleetRequest(public_key=key),
                        )
                request = fleet_pb2.ActivateNodeRequest(
                    public_key=key, heartbeat_interval=HEARTBEAT
                )
                self.node = Node(
                    node_id=self.connection.call("ActivateNode", request).node_id
                )
                self.device.remember(node=self.node.node_id)
                self._context = None
                where = (
                    "without TLS"
                    if self.insecure
                    else f"federation {self.device.facts['federation']}"
                )
                log.warning(
                    "client %d is connected to %s, %s",
                    self.client,
                    self.connection.address,
                    where,
                )
                return
            except (_Gone, Refused) as e:
                refusal = (
                    e
                    if isinstance(e, Refused)
                    else Refused(f"the server refuses this client: {e}")
                )
                if (
                    time.monotonic() - begin > PATIENCE
                    or "clock" in str(e)
                    or "TLS" in str(e)
                ):
                    raise refusal from e
                if not said:
                    log.warning("%s; trying for %.0f s more", refusal, PATIENCE)
                    said = True
                if self.stop.wait(1):
                    raise Interrupted(f"client {self.client} stopped") from e

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT / 2):
            with suppress(grpc.RpcError):  # the loop of calls says what is wrong
                beat = heartbeat_pb2.SendNodeHeartbeatRequest(
                    node=self.node, heartbeat_interval=HEARTBEAT
                )
                self.connection.once("SendNodeHeartbeat", beat, 5)

    def handle(self, head: Message, tree: message_pb2.ObjectTree) -> None:
        """Take one message, do its work, and answer it. A message that cannot be answered any more is dropped with a line."""
        begin, run = time.monotonic(), head.metadata.run_id
        try:
            message = self._pull(head, tree)
            if (
                (server := message.content.get("server"))
                and isinstance(server, ConfigRecord)
                and "refused" in server
            ):
                raise Refused(f"the server refuses this client: {server['refused']!s}")
            reply = app(message, self._context_of(run))
            self._push(reply, time.monotonic() - begin)
        except (_Gone, ObjectPullError, ObjectPushError) as e:
            log.warning("a message was dropped: %s", " ".join(str(e).split()))
            return
        self._say(message.content, time.monotonic() - begin)

    def _pull(self, head: Message, tree: message_pb2.ObjectTree) -> Message:
        run, number = head.metadata.run_id, head.metadata.message_id
        fetch = make_pull_object_fn_protobuf(
            partial(self.connection.call, "PullObject", deadline=OBJECT_DEADLINE),
            self.node,
            run,
        )
        # The head of a message comes some hundredths of a second before its objects; Flower would wait for a whole one.
        wait: dict[str, Any] = {
            "initial_backoff": 0.01,
            "backoff_cap": 0.5,
            "max_time": OBJECT_DEADLINE,
            "max_tries_per_object": None,
        }
        contents = pull_objects(
            list(dict.fromkeys(o.object_id for o in iterate_object_tree(tree))),
            fetch,
            **wait,
        )
        message = inflate_object_from_contents(
            number, contents, keep_object_contents=False
        )
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = number
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=number
        )
        self.connection.call("ConfirmMessageReceived", request)
        return message

    def _push(self, reply: Message, seconds: float) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = fleet_pb2.PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            response = self.connection.call("PushMessages", request)
            send = partial(self.connection.call, "PushObject", deadline=OBJECT_DEADLINE)
            store = make_push_object_fn_protobuf(
                send, self.node, reply.metadata.run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            push_object_contents_from_iterable(
                ((i, o.deflate()) for i, o in objects.items() if i in wanted), store
            )

    def _context_of(self, run_id: int) -> Context:
        """The run's settings, fetched when the run is new: what Flower hands to the ClientApp."""
        if self._context is None or self._context.run_id != run_id:
            run = run_from_proto(
                self.connection.call(
                    "GetRun", run_pb2.GetRunRequest(node=self.node, run_id=run_id)
                ).run
            )
            request = fab_pb2.GetFabRequest(
                node=self.node, hash_str=run.fab_hash, run_id=run_id
            )
            fab = fab_from_proto(
                self.connection.call("GetFab", request, OBJECT_DEADLINE).fab
            )
            config = get_fused_config_from_fab(fab.content, run)
            config["preset"] = str(
                self._preset(str(config["preset"]), fab.content, fab.hash_str)
            )
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
                run_id,
                self.node.node_id,
                1,
            )
            self._context = Context(
                run_id, self.node.node_id, self.config, RecordDict(), config
            )
        return self._context

    def _preset(self, name: str, bundle: bytes, number: str) -> str | Path:
        """The preset that came with the run, written here, under a name that no other run's has."""
        with zipfile.ZipFile(io.BytesIO(bundle)) as files:
            if name not in files.namelist():
                return name  # one of fedcore's own
            file = self.device.folder / f"run-{number[:16]}.toml"
            for old in self.device.folder.glob("run-*.toml"):
                old.unlink()
            write_atomically(file, files.read(name))
            return file

    def _say(self, content: RecordDict, seconds: float) -> None:
        """A line now and then."""
        ask = content.get("work")
        if isinstance(ask, ConfigRecord) and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            log.warning(
                "round %s: %s, %.2f s", int(ask["t"]) + 1, ask["function"], seconds
            )  # type: ignore[arg-type]


def serve(
    server: str,
    client: int,
    folder: Path | None,
    state: Path | None,
    data: Path | None,
    settings: list[str],
    poll: float,
) -> None:
    """Serve as one client until stopped. Raises SettingsError, Refused, and Interrupted on SIGINT or SIGTERM."""
    host, _ = host_and_port(server)
    device_settings("" if data is None else str(data), " ".join(settings))
    if data is not None and not data.exists():
        raise SettingsError(f"--data {data}: there is no such file or directory")
    if folder is not None and (faults := certs.check(folder)):
        raise SettingsError("\n".join(faults))
    federation = (
        f"without TLS at {host}" if folder is None else certs.federation_of(folder)
    )
    node = SuperNode(
        server,
        client,
        Device(state or Path(f"client-{client}-state"), federation, client),
        folder,
        data,
        settings,
        poll,
    )
    with _stopping(node.stop):
        node.run()


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks, the second one insists."""

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: dict[int, Callable[..., Any] | int | None] = {
        n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
