"""`fedcore doctor`: faults of a federation as seen from this machine, and remedies."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import fleet_pb2
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedcore import __version__
from fedcore.deploy import certs
from fedcore.deploy.proxies import connect, proxy_for

from .connection import (
    TRY_AGAIN,
    Connection,
    host_and_port,
    speaks_tls,
    tls_fault,
)

FLOWER = "1.39"  # the last release line whose SuperNodes speak gRPC
CLOCK = 4.0  # seconds that a clock may be ahead of the server's: Flower takes 5
BEHIND = 240.0  # seconds that it may be behind: Flower takes 305

Check = tuple[str, str | None]
"""(the thing that was looked at, what to fix)."""


def examine(folder: Path | None, server: str | None) -> list[Check]:
    """Every check that the arguments allow.

    They are of this machine, of a directory of keys, and of the way to a server. Raises
    SettingsError for an address that is none.
    """
    checks = _versions()
    host = None if server is None else host_and_port(server)[0]
    is_device = folder is not None and (folder / "client.key").exists()
    if folder is not None:
        faults = certs.check(folder, None if is_device else host)
        subject = f"certificates and keys in {folder}"
        if faults:
            return checks + [(subject, fault) for fault in faults]
        checks.append((subject, None))
    if server is not None:
        way = Way(server, folder)
        checks += way.examine()
        if folder is not None and is_device and not checks[-1][1]:
            checks += way.examine_as_client(folder)
    return checks


def _versions() -> list[Check]:
    is_new = sys.version_info >= (3, 11)
    python = None if is_new else "fedcore needs Python 3.11 or newer"
    flower = importlib.metadata.version("flwr")
    old = None
    if not flower.startswith(f"{FLOWER}."):
        old = f'expected {FLOWER}: pip install "flwr[simulation]=={FLOWER}.*"'
    torch = importlib.metadata.version("torch")
    return [
        (f"Python {platform.python_version()}", python),
        (f"Flower {flower}", old),
        (f"fedcore {__version__}, PyTorch {torch}", None),
    ]


class Way:
    """The way from this machine to a server."""

    def __init__(self, server: str, folder: Path | None) -> None:
        self.server = server
        self.host, self.port = host_and_port(server)
        self.proxy = proxy_for(self.host)
        self.ca = None if folder is None else (folder / "ca.crt").read_bytes()

    def examine(self) -> list[Check]:
        """Name, port and TLS, each only when the one before is well."""
        way = ("the name " + self.host, self._fault_of_name)
        if self.proxy is not None:  # which knows names itself
            way = (f"the proxy of {self.proxy}", self._fault_of_proxy)
        steps: list[tuple[str, Callable[[], str | None]]] = [
            way,
            (f"the port {self.server}", self._fault_of_port),
            ("no TLS" if self.ca is None else "TLS", self._fault_of_tls),
        ]
        checks: list[Check] = []
        for subject, find_fault in steps:
            fault = find_fault()
            checks.append((subject, fault))
            if fault:
                break
        return checks

    def _fault_of_name(self) -> str | None:
        try:
            socket.getaddrinfo(self.host, self.port)
        except OSError as error:
            return (
                f"{self.host} is no name that this machine knows ({error}): "
                "check the spelling and DNS, or use the address"
            )
        return None

    def _fault_of_proxy(self) -> str | None:
        assert self.proxy is not None
        try:
            place = (self.proxy.host, self.proxy.port)
            socket.create_connection(place, 5).close()
        except OSError as error:
            return (
                f"nothing answers there ({error}): set {self.proxy.variable} right, or "
                f"unset it; {self.proxy.remedy(self.host)}"
            )
        return None

    def _fault_of_port(self) -> str | None:
        try:
            connect(self.host, self.port, 5).close()
        except OSError as error:
            if self.proxy is not None:
                return (
                    f"the proxy of {self.proxy} does not get there ({error}): let it "
                    f"pass port {self.port}; {self.proxy.remedy(self.host)}"
                )
            return (
                f"nothing answers there ({error}): is fedcore server running with "
                f"--listen 0.0.0.0:{self.port}, and the firewall open?"
            )
        return None

    def _fault_of_tls(self) -> str | None:
        if self.ca is None:
            if speaks_tls(self.host, self.port):
                return "the server speaks TLS: give this client its --certs directory"
            return None
        try:
            return tls_fault(self.host, self.port, self.ca)
        except OSError as error:
            return (
                f"the connection ended in the middle of it ({error}): "
                "is it the fleet port of a fedcore server, with TLS?"
            )

    def examine_as_client(self, folder: Path) -> list[Check]:
        """Clock, version and key, as the server sees them.

        A question that changes nothing is asked: the server says its time and version
        whether it takes the question or not.
        """
        key = certs.load_private(folder / "client.key")
        connection = Connection(self.server, self.ca, key, threading.Event())
        # As a node with another key: refused for that, after signature and time were
        # found good, so nothing changes there.
        other = ec.generate_private_key(ec.SECP384R1()).public_key()
        request = fleet_pb2.ActivateNodeRequest(
            public_key=public_key_to_bytes(other), heartbeat_interval=10.0
        )
        refusal, told = "", dict[str, str]()
        try:
            connection.once("ActivateNode", request)
        except grpc.RpcError as error:
            refusal = str(error.details())
            for name, value in error.trailing_metadata() or ():
                told[str(name)] = str(value)
            if error.code() in TRY_AGAIN and not told:
                return [("a call to the server", f"it is not answered: {refusal}")]
        finally:
            connection.close()
        clock = _fault_of_clock(connection.server_time)
        version, version_fault = told.get("fedcore-version"), None
        if version != __version__:
            runs = version or "another program"
            version_fault = f"the server runs {runs}: install the same on both"
        signature = None
        if not clock and "wants to be the node of another" not in refusal:
            signature = f"the server does not take it: {refusal}"
        return [
            (f"clock, {connection.server_time:+.1f} s to the server's", clock),
            ("the server's fedcore", version_fault),
            ("this client's signature", signature),
        ]


def _fault_of_clock(server_time: float) -> str | None:
    if -CLOCK < server_time < BEHIND:
        return None
    where = "behind" if server_time > 0 else "ahead of"
    return (
        f"it is {abs(server_time):.0f} s {where} the server's: "
        "set it (NTP), signatures with such times are refused"
    )
