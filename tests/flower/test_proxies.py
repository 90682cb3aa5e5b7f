"""Proxies in the environment: none on loopback, and named where they are in the way."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fedcore.client.connection import Connection
from fedcore.client.doctor import examine
from flwr.proto import fleet_pb2

from fedcore.deploy.proxies import (
    OF_HTTP,
    connect,
    is_loopback,
    proxy_for,
    without_proxies,
)
from fedcore.rounds.loop import Interrupted
from tests.flower.federation import federation
from tests.helpers import PATIENCE

DEAD = "http://127.0.0.1:9"  # nothing listens there
FAR = "fl.example.org"


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class Recorder:
    """A proxy that notes what it is asked for, and gives one answer."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://ada:s%40crt@127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                s, _ = self.listener.accept()
                with s, suppress(OSError):
                    s.settimeout(PATIENCE)
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        if not (piece := s.recv(1)):
                            raise ConnectionResetError
                        request += piece
                    self.asked.append(request)
                    s.sendall(self.answer)


@pytest.fixture
def passing() -> Iterator[Recorder]:
    proxy = Recorder(b"HTTP/1.1 200 Connection established\r\n\r\nhello")
    yield proxy
    proxy.listener.close()


@pytest.fixture
def refusing() -> Iterator[Recorder]:
    proxy = Recorder(b"HTTP/1.1 403 \x1b[31mForbidden\r\n\r\n")
    yield proxy
    proxy.listener.close()


def connection(address: str) -> Connection:
    stop = threading.Event()
    stop.set()  # after the first try
    return Connection(address, None, ec.generate_private_key(ec.SECP384R1()), stop)


def first_try(address: str, deadline: float = PATIENCE) -> None:
    """One call, which fails, within so many seconds."""
    caller = connection(address)
    try:
        with pytest.raises(Interrupted):
            caller.call("ActivateNode", fleet_pb2.ActivateNodeRequest(), deadline)
    finally:
        caller.close()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LocalHost.", "a.localhost",
     "::ffff:127.0.0.1", "0.0.0.0", "127.1"],
)  # fmt: skip
def test_this_machine_is_never_called_through_a_proxy(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", DEAD)
    assert is_loopback(host)
    assert proxy_for(host) is None
    assert not is_loopback("192.0.2.1")
    assert not is_loopback("localhost.example.org.invalid")


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_call_to_this_machine_arrives_whatever_proxy_is_set(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, DEAD)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    caller = connection(f"localhost:{port}")
    try:
        with pytest.raises(grpc.RpcError) as error:
            caller.once("ActivateNode", fleet_pb2.ActivateNodeRequest(), PATIENCE)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED, "it arrived"
    finally:
        caller.close()
        server.stop(None)


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({"https_proxy": DEAD}, "https_proxy"),
        ({"http_proxy": DEAD, "https_proxy": DEAD}, "https_proxy"),
        ({"http_proxy": DEAD, "grpc_proxy": DEAD}, "grpc_proxy"),
        ({"HTTPS_PROXY": DEAD, "ALL_PROXY": DEAD, "all_proxy": DEAD}, None),
        ({"https_proxy": DEAD, "no_proxy": "example.org"}, None),
        ({"https_proxy": DEAD, "no_proxy": " a.b , .EXAMPLE.org,"}, None),
        ({"https_proxy": DEAD, "no_proxy": "*"}, "https_proxy"),
        ({"https_proxy": DEAD, "NO_PROXY": "example.org"}, "https_proxy"),
        ({"https_proxy": DEAD, "no_grpc_proxy": "example.org"}, None),
        (
            {"https_proxy": DEAD, "no_grpc_proxy": "x", "no_proxy": "example.org"},
            "https_proxy",
        ),
        ({"grpc_proxy": "", "https_proxy": DEAD}, None),
        ({"https_proxy": "127.0.0.1:9"}, None),
        ({"https_proxy": "socks5://127.0.0.1:9"}, None),
        ({"https_proxy": "http://[::1"}, None),
    ],
)
def test_the_proxy_on_the_way_is_the_one_that_grpc_takes(
    environment: dict[str, str],
    variable: str | None,
    passing: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace(DEAD, passing.url))
    proxy = proxy_for(FAR)
    assert (proxy and proxy.variable) == variable
    # Without a proxy its name is looked for, which may take long.
    first_try(f"{FAR}:9092", 0.5 if variable is None else PATIENCE)
    was_asked = any(b"CONNECT fl.example.org:9092 " in text for text in passing.asked)
    assert was_asked == (variable is not None), (environment, passing.asked)


def test_a_range_of_addresses_goes_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", DEAD)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,2001:db8::/32")
    assert proxy_for("10.4.5.6") is None
    assert proxy_for("2001:db8::7") is None
    assert proxy_for("11.4.5.6") is not None
    assert proxy_for(FAR) is not None


def test_a_connection_that_fails_names_the_proxy_and_the_way_round_it(
    refusing: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("https_proxy", refusing.url)
    first_try(f"{FAR}:9092")
    (line,) = [text for text in caplog.messages if "no connection" in text]
    port = refusing.listener.getsockname()[1]
    assert f"through the proxy of https_proxy (127.0.0.1:{port})" in line
    assert f"to reach {FAR} without a proxy, add it to no_proxy" in line
    assert "crt" not in line, "a password"
    caplog.clear()
    first_try("127.0.0.1:9")
    assert "proxy" not in caplog.text


def test_doctor_names_a_proxy_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", DEAD)
    subject, fault = examine(None, f"{FAR}:9092")[-1]
    assert subject == "the proxy of http_proxy (127.0.0.1:9)"
    assert fault is not None
    assert "set http_proxy right, or unset it" in fault
    assert f"to reach {FAR} without a proxy, add it to no_proxy" in fault
    _, fault = examine(None, "localhost:9")[-1]
    assert fault is not None
    assert "proxy" not in fault


def test_doctor_names_a_proxy_that_does_not_let_it_pass(
    refusing: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("grpc_proxy", refusing.url)
    subject, fault = examine(None, f"{FAR}:9092")[-1]
    assert subject == f"the port {FAR}:9092"
    assert fault is not None
    assert "403" in fault
    assert fault.isprintable()
    assert "add it to no_proxy" in fault


def test_a_connection_through_a_proxy_reaches_the_other_end(
    passing: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", passing.url)
    with connect(FAR, 9092, PATIENCE) as s:
        assert s.recv(5) == b"hello"
    # ada:s@crt, as RFC 7617 writes it.
    assert b"Proxy-Authorization: Basic YWRhOnNAY3J0\r\n" in passing.asked[0]


def test_http_clients_of_this_machine_heed_no_proxy_and_others_still_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    with without_proxies():
        assert not {name.lower() for name in os.environ} & set(OF_HTTP)
        httpx.Client().close()  # with a socks proxy it would not even be made
    proxies = {"all_proxy": "socks5://127.0.0.1:9", "HTTPS_PROXY": DEAD}
    assert proxies.items() <= os.environ.items()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_a_federation_on_one_machine_runs_whatever_proxies_are_set(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    names = [*OF_HTTP, "grpc_proxy", *(name.upper() for name in OF_HTTP)]
    proxies = dict.fromkeys(names, DEAD) | {"all_proxy": "socks5://127.0.0.1:9"}
    with federation(tmp_path_factory.mktemp("proxies"), 2) as f:
        settings = ["population=2", "participation.cohort=2", "rounds=2"]
        f.server("fedavg", *settings, "engine.min_clients=2", **proxies)
        f.client(0, **proxies)
        f.said("client-0", "client 0 is connected")
        f.client(1, **proxies)
        assert [row["reports"] for row in f.finished()["history"]] == [2, 2]
