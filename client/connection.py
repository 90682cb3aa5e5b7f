"""The way to a server: calls of Flower's Fleet API that survive cuts of the network.

A device is behind bad networks. Every call has a deadline, and after a call that
passed it the connection is made anew: one that was cut without a word would otherwise
be waited on until the kernel gives up, a quarter of an hour later.
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
from contextlib import suppress
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import (
    NodeAuthClientInterceptor,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.grpc import GRPC_MAX_MESSAGE_LENGTH
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

from fedcore.deploy.proxies import connect, is_loopback, proxy_for
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import Interrupted

log = logging.getLogger("fedcore")

DEADLINE = 15.0  # seconds for a call that carries no array
OBJECT_DEADLINE = 300.0  # seconds for one object, at most 20 MB of an array
TRY_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
FORGOTTEN = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
# gRPC itself would wait for up to two minutes before it tries a server again.
OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_send_message_length", GRPC_MAX_MESSAGE_LENGTH),
    ("grpc.max_receive_message_length", GRPC_MAX_MESSAGE_LENGTH),
]


class Refused(RunError):
    """The server does not let this client take part."""


class Gone(Exception):
    """The server does not know this node any more, or the message, or the run."""


class Connection:
    """A channel to a server, signed with this client's key, and opened again if cut."""

    def __init__(
        self,
        address: str,
        ca: bytes | None,
        key: ec.EllipticCurvePrivateKey,
        stop: threading.Event,
    ) -> None:
        """`ca` in PEM, None for a connection without TLS."""
        self.address, self.ca, self.key, self.stop = address, ca, key, stop
        self.server_time = 0.0  # seconds that the server's clock was last ahead
        self.cuts = 0  # calls that were not answered and tried again
        self._lock = threading.Lock()
        self.channel, self.stub = self._open()

    def _open(self) -> tuple[grpc.Channel, FleetStub]:
        host, _ = host_and_port(self.address)
        # gRPC itself would call this machine through a proxy as well.
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(host)))]
        if self.ca is None:
            channel = grpc.insecure_channel(self.address, options)
        else:
            credentials = grpc.ssl_channel_credentials(self.ca)
            channel = grpc.secure_channel(self.address, credentials, options)
        version = RuntimeVersionClientInterceptor("SuperNode")
        signature = NodeAuthClientInterceptor(self.key, self.key.public_key())
        return channel, FleetStub(grpc.intercept_channel(channel, version, signature))

    def _reopen(self, stub: FleetStub) -> None:
        with self._lock:
            if self.stub is stub:  # and no other thread has done so
                # In a thread, for it may take its time. Calls that are under way on
                # the channel are then cancelled, and tried again.
                threading.Thread(target=self.channel.close, daemon=True).start()
                self.channel, self.stub = self._open()

    def close(self) -> None:
        self.channel.close()

    def once(self, name: str, request: Any, deadline: float = DEADLINE) -> Any:
        """One call, tried once. Raises grpc.RpcError."""
        stub = self.stub
        try:
            response, call = getattr(stub, name).with_call(request, timeout=deadline)
        except grpc.RpcError as error:
            self._read_clock(error)
            # After other faults gRPC connects anew by itself.
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._reopen(stub)
            raise
        except ValueError as error:  # another thread has just closed the channel
            raise Closed(str(error)) from error
        self._read_clock(call)
        return response

    def call(self, name: str, request: Any, deadline: float = DEADLINE) -> Any:
        """One call, until it is answered.

        Raises Gone, and Refused for what trying again does not mend.
        """
        pause, down_since = 0.2, 0.0
        while True:
            try:
                response = self.once(name, request, deadline)
            except grpc.RpcError as error:
                if error.code() not in TRY_AGAIN:
                    raise self._explain(error) from error
                self.cuts += 1
                if not down_since:
                    down_since = time.monotonic()
                    self._complain(error)
                if self.stop.wait(pause):
                    raise Interrupted("stopped") from error
                pause = min(pause * 1.6, 3.0)
                continue
            seconds = time.monotonic() - down_since
            if down_since and seconds > 1:
                log.warning("connected again after %.0f s", seconds)
            return response

    def _complain(self, error: grpc.RpcError) -> None:
        """Say why there is no connection. Raises Refused for what no time will mend."""
        details = str(error.details())
        host, port = host_and_port(self.address)
        if self.ca is None and speaks_tls(host, port):
            raise Refused(
                f"the server at {self.address} speaks TLS and this client does not: "
                "give it its --certs directory"
            ) from error
        if self.ca is not None and _is_about_tls(details):
            with suppress(OSError):  # no connection, or one that ended: that may pass
                if fault := tls_fault(host, port, self.ca):
                    raise Refused(f"TLS with {self.address} failed: {fault}") from error
        reason = details.partition(";")[0]
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = "it does not answer"
        way, remedy = "", ""
        if (proxy := proxy_for(host)) is not None:
            way, remedy = f" through the proxy of {proxy}", f": {proxy.remedy(host)}"
        log.warning(
            "no connection to %s%s (%s); trying again until there is one%s",
            self.address,
            way,
            reason,
            remedy,
        )

    def _read_clock(self, call: Any) -> None:
        with suppress(Exception):
            for key, value in call.trailing_metadata() or ():
                if key == "fedcore-time":
                    self.server_time = float(value) - time.time()

    def _explain(self, error: grpc.RpcError) -> Exception:
        details = text_of(error)
        if "Invalid timestamp" in details or "Clock" in details:
            where = "behind" if self.server_time > 0 else "ahead of"
            return Refused(
                f"this device's clock is {abs(self.server_time):.0f} s {where} the "
                "server's, and signatures with such a time are not taken: "
                "set the clock (NTP)"
            )
        is_denied = error.code() is grpc.StatusCode.PERMISSION_DENIED
        is_by_flower = is_denied and "Fedcore" not in details
        if "Invalid node ID" in details or is_by_flower or error.code() in FORGOTTEN:
            return Gone(details)
        reason = details.removeprefix("Fedcore: ")
        return Refused(f"the server refuses this client: {reason}")


class Closed(grpc.RpcError):  # type: ignore[misc]  # gRPC has no types
    """A call on a channel that was closed meanwhile."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return str(self)


def text_of(error: grpc.RpcError) -> str:
    """The server's words. Flower packs its own errors in JSON."""
    details = str(error.details() or error.code())
    with suppress(ValueError, TypeError, AttributeError):
        packed = json.loads(details)
        keys = ("public_message", "message", "public_details")
        texts = [str(packed[key]) for key in keys if packed.get(key)]
        return " ".join(texts) or details
    return details


def _is_about_tls(details: str) -> bool:
    words = ("handshake", "ssl", "certificate")
    return any(word in details.lower() for word in words)


def speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake gets an answer there, whatever the certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            connect(host, port, 3) as s,
            context.wrap_socket(s, server_hostname=host),
        ):
            return True
    except OSError:
        return False


def tls_fault(host: str, port: int, ca: bytes) -> str | None:
    """Why the certificate of the server at that name is not taken; None when it is.

    Raises OSError without a connection.
    """
    context = ssl.create_default_context(cadata=ca.decode())
    try:
        with (
            connect(host, port, 5) as s,
            context.wrap_socket(s, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        said = error.verify_message
        if "self-signed" in said or "issuer" in said:
            return (
                f"the server's certificate is not from the authority in ca.crt "
                f"({said}): use its federation's directory"
            )
        if "not valid for" in said or "mismatch" in said:
            return (
                f"{said}: connect to a name in it, or make it anew with "
                f"fedcore certs --host {host}"
            )
        return f"{said}: see fedcore doctor"
    except ssl.SSLEOFError:
        raise
    except ssl.SSLError as error:
        return (
            f"the server there does not speak TLS ({error.reason}): "
            "was it started with --insecure, or is this another port?"
        )


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT. Raises SettingsError for another text."""
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit()
    if not host or not is_number or not 0 < int(port) < 65536:
        raise SettingsError(
            f'--server "{address}": expected HOST:PORT, e.g. fl.example.org:9092'
        )
    return host.strip("[]"), int(port)
