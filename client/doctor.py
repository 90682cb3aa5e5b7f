"""`fedcore doctor`: what a federation needs, looked at from this machine, with what to do about each fault."""

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

from client.connection import Connection, host_and_port, speaks_tls, tls_fault
from fedcore import __version__
from fedcore.deploy import certs

FLOWER = "1.39"  # the last release line whose SuperNodes speak gRPC
CLOCK = 4.0  # seconds that a clock may be ahead of the server's: Flower takes 5
BEHIND = 240.0  # seconds that it may be behind: Flower takes 305

Check = tuple[str, str | None]
"""(what was looked at, what to fix)."""


def examine(folder: Path | None, server: str | None) -> list[Check]:
    """Every check that the arguments allow: of this machine, of a directory of keys, and of the way to a server.

    Raises SettingsError for an address that is none.
    """
    checks = [*_versions()]
    host = None if server is None else host_and_port(server)[0]
    device = folder is not None and (folder / "client.key").exists()
    if folder is not None:
        faults = certs.check(folder, None if device else host)
        what = f"certificates and keys in {folder}"
        checks += [(what, fault) for fault in faults] or [(what, None)]
        if faults:
            return checks
    if server is not None:
        checks += _way_to(server, folder, device)
    return checks


def _versions() -> list[Check]:
    python = (
        None if sys.version_info >= (3, 11) else "fedcore needs Python 3.11 or newer"
    )
    flower = importlib.metadata.version("flwr")
    old = (
        None
        if flower.startswith(f"{FLOWER}.")
        else f'expected {FLOWER}: pip install "flwr[simulation]=={FLOWER}.*"'
    )
    return [
        (f"Python {platform.python_version()}", python),
        (f"Flower {flower}", old),
        (f"fedcore {__version__}, PyTorch {importlib.metadata.version('torch')}", None),
    ]


def _way_to(server: str, folder: Path | None, device: bool) -> list[Check]:
    """Name, port, TLS, and as a device also clock, version and key: each only when the one before is well."""
    host, port = host_and_port(server)
    ca = None if folder is None else (folder / "ca.crt").read_bytes()

    def name() -> str | None:
        try:
            socket.getaddrinfo(host, port)
        except OSError as e:
            return f"{host} is no name that this machine knows ({e}): check the spelling and DNS, or use the address"
        return None

    def reach() -> str | None:
        try:
            socket.create_connection((host, port), 5).close()
        except OSError as e:
            return f"nothing answers there ({e}): is fedcore server running with --listen 0.0.0.0:{port}, and the firewall open?"
        return None

    def tls() -> str | None:
        if ca is not None:
            try:
                return tls_fault(host, port, ca)
            except OSError as e:
                return f"the connection ended in the middle of it ({e}): is it the fleet port of a fedcore server, with TLS?"
        return (
            "the server speaks TLS: give this client its directory with --certs"
            if speaks_tls(host, port)
            else None
        )

    steps: list[tuple[str, Callable[[], str | None]]] = [
        (f"the name {host}", name),
        (f"the port {server}", reach),
        ("TLS" if ca is not None else "no TLS", tls),
    ]
    checks: list[Check] = []
    for what, step in steps:
        checks.append((what, step()))
        if checks[-1][1]:
            return checks
    return checks + (
        _as_client(server, ca, folder) if device and folder is not None else []
    )


def _as_client(server: str, ca: bytes | None, folder: Path) -> list[Check]:
    """Ask the server as this client would, for nothing: it says its time and version whether it takes the question or not."""
    connection = Connection(
        server, ca, certs.load_private(folder / "client.key"), threading.Event()
    )
    told: dict[str, str] = {}
    try:
        # As a node with another key: refused for that, after signature and time were found good, so nothing changes there.
        other = ec.generate_private_key(ec.SECP384R1()).public_key()
        connection.once(
            "ActivateNode",
            fleet_pb2.ActivateNodeRequest(
                public_key=public_key_to_bytes(other), heartbeat_interval=10.0
            ),
        )
        refusal = ""
    except grpc.RpcError as e:
        refusal = str(e.details())
        told = {str(key): str(value) for key, value in e.trailing_metadata() or ()}
    finally:
        connection.close()
    away = connection.server_time
    clock = None
    if not -CLOCK < away < BEHIND:
        where = "behind" if away > 0 else "ahead of"
        clock = f"it is {abs(away):.0f} s {where} the server's: set it (NTP), signatures with such times are refused"
    version = told.get("fedcore-version")
    other_version = (
        None
        if version == __version__
        else f"the server runs {version or 'another program'}: install the same on both"
    )
    signature = (
        None
        if "wants to be the node of another" in refusal or clock
        else f"the server does not take it: {refusal}"
    )
    checks: list[Check] = [
        (f"clock, {away:+.1f} s to the server's", clock),
        ("the server's fedcore", other_version),
    ]
    return [*checks, ("this client's signature", signature)]
