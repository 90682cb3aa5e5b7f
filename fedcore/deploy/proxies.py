"""The proxy between this machine and a host, as gRPC reads it from the environment.

gRPC takes the first of `grpc_proxy`, `https_proxy` and `http_proxy` that is set, in
lower case alone; hosts that end as an entry of `no_grpc_proxy` does, or else of
`no_proxy`, go without it, and so do addresses in a range (10.0.0.0/8). What listens on
this machine's loopback interface is never called through a proxy.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
# Of other programs in this process: httpx also heeds upper case, and `all_proxy`.
OF_HTTP = ("http_proxy", "https_proxy", "all_proxy")
LONGEST = 65536  # bytes of a proxy's answer


class Proxy(NamedTuple):
    """A proxy, and the variable that names it."""

    variable: str
    host: str
    port: int
    credentials: str  # "user:password", or nothing

    def __str__(self) -> str:
        """Without credentials, for logs: `https_proxy (proxy.example.org:3128)`."""
        return f"{self.variable} ({self.host}:{self.port})"

    def remedy(self, host: str) -> str:
        """The advice for a host that had better be called without it."""
        return f"to reach {host} without a proxy, add it to no_proxy"


def proxy_for(host: str) -> Proxy | None:
    """The proxy that gRPC takes on the way to a host; None where it takes none."""
    for variable in VARIABLES:
        if variable in os.environ:
            break
    else:
        return None
    proxy = _parsed(variable, os.environ[variable])
    if proxy is None or is_loopback(host) or _is_exception(host):
        return None
    return proxy


def _parsed(variable: str, text: str) -> Proxy | None:
    """The proxy at http://[user:password@]HOST[:PORT]; None for other text.

    gRPC goes without a proxy that it cannot read.
    """
    with suppress(ValueError):
        parts = urlsplit(text)
        if parts.scheme == "http" and parts.hostname:
            credentials = ""
            if parts.username is not None:
                credentials = unquote(f"{parts.username}:{parts.password or ''}")
            return Proxy(variable, parts.hostname, parts.port or 80, credentials)
    return None


def _is_exception(host: str) -> bool:
    listed = next((os.environ[name] for name in EXCEPTIONS if name in os.environ), "")
    for entry in filter(None, map(str.strip, listed.split(","))):
        if host.lower().endswith(entry.lower()):
            return True
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
    return False


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine itself, on its loopback interface.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("192.0.2.1")
    (True, True, False)
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if (address := _address(name)) is not None:
        return _is_here(address)
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    addresses = [_address(str(place[0])) for *_, place in found]
    return all(address is not None and _is_here(address) for address in addresses)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_here(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # A connection to 0.0.0.0 goes to this machine.
    return address.is_loopback or address.is_unspecified


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to a host, through the proxy that gRPC would take.

    Raises OSError where there is none, or the proxy refuses.
    """
    proxy = proxy_for(host)
    if proxy is None:
        return socket.create_connection((host, port), seconds)
    connection = socket.create_connection((proxy.host, proxy.port), seconds)
    try:
        _ask(connection, proxy, host, port)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Have the proxy connect on. Raises OSError where it does not."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if proxy.credentials:
        encoded = base64.b64encode(proxy.credentials.encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {encoded}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < LONGEST:
        piece = connection.recv(1)  # no byte of what comes after its answer
        if not piece:
            raise ConnectionResetError("the proxy ended the connection")
        answer += piece
    status = answer.partition(b"\r\n")[0].decode(errors="replace")
    if status.split()[1:2] != ["200"]:
        raise ConnectionRefusedError(f"the proxy answered {status!a}")


@contextmanager
def without_proxies() -> Iterator[None]:
    """No proxy in the environment, inside: for HTTP clients made to call loopback."""
    hidden: dict[str, str] = {}
    for name in list(os.environ):
        if name.lower() in OF_HTTP:
            hidden[name] = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ.update(hidden)
