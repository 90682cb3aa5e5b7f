"""The warm SuperNode: one resident process a device, on Flower's Fleet API over gRPC.

A stock `flower-supernode` starts processes for every message and looks for the next
each 3 s. This one does the same on the wire - the same service, signatures and
objects - and calls the ClientApp itself.
"""

from __future__ import annotations

import io
import logging
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.config import get_fused_config_from_fab
from flwr.common.serde import fab_from_proto, message_from_proto, run_from_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from fedcore.deploy import certs
from fedcore.errors import SettingsError
from fedcore.rounds.loop import Interrupted

from .app import app, device_settings, refuse_settings
from .connection import (
    OBJECT_DEADLINE,
    Connection,
    Gone,
    Refused,
    host_and_port,
)
from .device import Device
from .mail import pull_message, push_message

log = logging.getLogger("fedcore")

HEARTBEAT = 10.0  # seconds, Flower's least; a node silent for two of them is offline
PATIENCE = 20.0  # seconds for which a refusal may be due to a start on either end
FIRST_PAUSE = 0.01  # seconds between looks for work after some; it grows to `poll`
SAY = 10.0  # seconds between lines about rounds


def serve(
    server: str,
    client: int,
    folder: Path | None,
    state: Path | None,
    data: Path | None,
    settings: list[str],
    poll: float,
    base: Path | None = None,
    sums_alone: bool = False,
) -> None:
    """Serve as one client until stopped; with `sums_alone` in secure sums alone.

    Raises SettingsError, Refused, and Interrupted on SIGINT or SIGTERM.
    """
    host, _ = host_and_port(server)
    refuse_settings(device_settings("", " ".join(settings)))
    if data is not None:
        _refuse_data(data)
    if base is not None and not base.is_dir():
        raise SettingsError(
            f"--base {base}: there is no such folder; copy the server's base to it"
        )
    if folder is not None and (faults := certs.check_client(folder)):
        raise SettingsError("\n".join(faults))
    if folder is None:
        federation = f"without TLS at {host}"
    else:
        federation = certs.federation_of(folder)
    if sums_alone and not _is_certified(folder, client):
        log.warning(
            "client %d has no certificate: a server that lies about the keys of others "
            "could read what it sends into sums, --secure or not; run fedcore certs "
            "(again), and start it with --certs",
            client,
        )
    device = Device(state or Path(f"client-{client}-state"), federation, client)
    node = SuperNode(
        server, client, device, folder, data, settings, poll, base, sums_alone
    )
    with _stopping(node.stop):
        node.run()


def _is_certified(folder: Path | None, client: int) -> bool:
    """Whether the client has a certificate, by which others know its keys."""
    return folder is not None and (folder / f"client-{client}.crt").exists()


def _refuse_data(data: Path) -> None:
    """Raises SettingsError for a place that has no data, or not for this user."""
    if not data.exists():
        raise SettingsError(f"--data {data}: there is no such file or directory")
    try:
        is_empty = data.is_dir() and not any(data.iterdir())
    except OSError as error:
        raise SettingsError(
            f"--data {data}: {error.strerror}; let this user read it"
        ) from error
    if is_empty:
        raise SettingsError(f"--data {data}: an empty directory; is its disk mounted?")


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Set `stop` at the first SIGINT or SIGTERM; the second one insists."""

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        base: Path | None = None,
        sums_alone: bool = False,
    ) -> None:
        """`folder` holds ca.crt and the client's key; None for no TLS.

        `data` and `base` are places on this device of what the run's settings name.
        `poll` is the longest pause between looks for work, in seconds.
        """
        self.device, self.client, self.poll = device, client, poll
        self.is_insecure = folder is None
        self.stop = threading.Event()
        if folder is None:
            key, ca = device.own_key(), None
        else:
            key = certs.load_private(folder / "client.key")
            ca = (folder / "ca.crt").read_bytes()
        self.connection = Connection(server, ca, key, self.stop)
        self.node = Node()
        self.config: dict[str, Any] = {
            "partition-id": client,
            "state": str(device.folder),
            "federation": device.facts["federation"],
            "certs": "" if folder is None else str(folder.resolve()),
            "data": "" if data is None else str(data.resolve()),
            "base": "" if base is None else str(base.resolve()),
            "set": " ".join(settings),
            "secure": sums_alone,
        }
        self._context: Context | None = None
        self._said = 0.0  # on the monotonic clock: the last line about a round

    def run(self) -> None:
        """Serve until stopped.

        Raises Interrupted then, and Refused when the server does not want this client.
        """
        self.activate()
        threading.Thread(target=self._beat, daemon=True).start()
        pause = FIRST_PAUSE
        try:
            while True:
                has_worked = False
                try:
                    has_worked = self._look_for_work()
                except Gone as error:
                    log.warning(
                        "the server does not know this client any more (%s); "
                        "introducing it again",
                        error,
                    )
                    self.activate()
                if has_worked:
                    pause = FIRST_PAUSE
                if self.stop.wait(pause):
                    raise Interrupted(f"client {self.client} stopped")
                pause = min(pause * 1.5, self.poll)
        finally:
            with suppress(grpc.RpcError):
                self._deactivate(self.node.node_id, deadline=2)
            self.connection.close()

    def activate(self) -> None:
        """Become a node of the federation. A refusal is final after PATIENCE."""
        begin, has_complained = time.monotonic(), False
        while True:
            # A node that ended without a word still counts as there: so say it now.
            with suppress(grpc.RpcError):
                if before := self.device.facts.get("node"):
                    self._deactivate(before, deadline=5)
            try:
                self._register()
                return
            except (Gone, Refused) as error:
                refusal = error
                if isinstance(error, Gone):
                    refusal = Refused(f"the server refuses this client: {error}")
                is_final = "clock" in str(error) or "TLS" in str(error)
                if is_final or time.monotonic() - begin > PATIENCE:
                    raise refusal from error
                if not has_complained:
                    log.warning("%s; trying for %.0f s more", refusal, PATIENCE)
                    has_complained = True
                if self.stop.wait(1):
                    raise Interrupted(f"client {self.client} stopped") from error

    def _register(self) -> None:
        key = public_key_to_bytes(self.connection.key.public_key())
        where = f"federation {self.device.facts['federation']}"
        if self.is_insecure:
            where = "without TLS"
            register = fleet_pb2.RegisterNodeFleetRequest(public_key=key)
            with suppress(Gone, Refused):  # it is registered already
                self.connection.call("RegisterNode", register)
        request = fleet_pb2.ActivateNodeRequest(
            public_key=key, heartbeat_interval=HEARTBEAT
        )
        number = self.connection.call("ActivateNode", request).node_id
        self.node = Node(node_id=number)
        self.device.remember(node=number)
        self._context = None
        address = self.connection.address
        log.warning("client %d is connected to %s, %s", self.client, address, where)

    def _deactivate(self, node_id: int, deadline: float) -> None:
        request = fleet_pb2.DeactivateNodeRequest(node_id=node_id)
        self.connection.once("DeactivateNode", request, deadline)

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT / 2):
            beat = heartbeat_pb2.SendNodeHeartbeatRequest(
                node=self.node, heartbeat_interval=HEARTBEAT
            )
            with suppress(grpc.RpcError):  # the loop of calls says what is wrong
                self.connection.once("SendNodeHeartbeat", beat, 5)

    def _look_for_work(self) -> bool:
        """Take messages and answer them; whether there was one."""
        cuts = self.connection.cuts
        request = fleet_pb2.PullMessagesRequest(node=self.node)
        pulled = self.connection.call("PullMessages", request)
        heads, trees = pulled.messages_list, pulled.message_object_trees
        for head, tree in zip(heads, trees, strict=True):
            self.handle(message_from_proto(head), tree)
        if self.connection.cuts > cuts and not heads:
            # Flower gives a message out once, and the answer that did not arrive may
            # have held one. So come anew: the server then waits for it no longer.
            self.activate()
        return bool(heads)

    def handle(self, head: Message, tree: message_pb2.ObjectTree) -> None:
        """Take one message, do its work, and answer it.

        A message that cannot be answered any more is dropped with a line. Raises
        Refused when the message says so.
        """
        begin, run_id = time.monotonic(), head.metadata.run_id
        cuts = self.connection.cuts
        try:
            message = pull_message(self.connection, self.node, head, tree)
            _raise_refusal(message.content)
            reply = app(message, self._context_of(run_id))
            seconds = time.monotonic() - begin
            push_message(self.connection, self.node, reply, seconds)
        except (Gone, ObjectPullError, ObjectPushError) as error:
            log.warning("a message was dropped: %s", " ".join(str(error).split()))
            if self.connection.cuts > cuts:
                # It was lost in a cut, and the server still waits for the answer. So
                # come anew: it then waits no longer, and may ask again.
                self.activate()
            return
        self._say(message.content, time.monotonic() - begin)

    def _context_of(self, run_id: int) -> Context:
        """The run's settings as Flower hands them to the ClientApp.

        They are fetched when the run is new.
        """
        if self._context is None or self._context.run_id != run_id:
            ask = run_pb2.GetRunRequest(node=self.node, run_id=run_id)
            run = run_from_proto(self.connection.call("GetRun", ask).run)
            request = fab_pb2.GetFabRequest(
                node=self.node, hash_str=run.fab_hash, run_id=run_id
            )
            answer = self.connection.call("GetFab", request, OBJECT_DEADLINE)
            fab = fab_from_proto(answer.fab)
            config = get_fused_config_from_fab(fab.content, run)
            preset = self._preset(str(config["preset"]), fab.content, fab.hash_str)
            config["preset"] = preset
            TaskIdentity.run_id, TaskIdentity.task_id = run_id, 1
            TaskIdentity.node_id = self.node.node_id
            self._context = Context(
                run_id, self.node.node_id, self.config, RecordDict(), config
            )
        return self._context

    def _preset(self, name: str, bundle: bytes, digest: str) -> str:
        """A preset's place on this device, or the name of one of fedcore's own."""
        with zipfile.ZipFile(io.BytesIO(bundle)) as files:
            if name not in files.namelist():
                return name
            return str(self.device.keep_preset(files.read(name), digest))

    def _say(self, content: RecordDict, seconds: float) -> None:
        """A line about a round now and then."""
        work: Any = content.get("work")
        now = time.monotonic()
        if isinstance(work, ConfigRecord) and now - self._said > SAY:
            self._said = now
            number, function = int(str(work["t"])) + 1, work["function"]
            log.warning("round %d: %s, %.2f s", number, function, seconds)


def _raise_refusal(content: RecordDict) -> None:
    server = content.get("server")
    if isinstance(server, ConfigRecord) and "refused" in server:
        raise Refused(f"the server refuses this client: {server['refused']!s}")
