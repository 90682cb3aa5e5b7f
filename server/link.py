"""The SuperLink of a run: its process, its two APIs for this machine, and the keys.

The Fleet API is for clients; the Control and Runtime APIs listen on the loopback
interface alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto import control_pb2, runtime_pb2
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient

from fedcore.deploy import certs
from fedcore.deploy.proxies import without_proxies
from fedcore.errors import RunError, SettingsError
from fedcore.escapes import printable
from fedcore.storage.faults import writing

from .handshakes import TRACE, Handshakes
from .superlink import MARK

log = logging.getLogger("fedcore")

START = 60.0  # seconds for the SuperLink to be there
LOCAL = "127.0.0.1"
LOG = "superlink.log"  # in the run directory


class Task(NamedTuple):
    """A run that the SuperLink took."""

    run_id: int
    token: str  # by which its ServerApp shows itself to the SuperLink


class SuperLink:
    """A process that runs, and is asked over its APIs."""

    def __init__(
        self,
        listen: str,
        folder: Path | None,
        out: Path,
        message_limit: float,
        clients: int,
        environment: dict[str, str],
    ) -> None:
        """Start it, and wait until it answers.

        `listen` is HOST:PORT, `folder` holds the server's certificate and the clients'
        keys (None for no TLS), `message_limit` is in bytes; no node hosts more than
        `clients`. Raises SettingsError for an address that cannot be listened on, and
        RunError when it does not start.
        """
        self.listen, self.folder, self.out = listen, folder, out
        self.keys = None if folder is None else folder / "clients"
        self.registered: dict[bytes, tuple[int, str]] = {}  # node and name, by key
        self._keys_changed = -1.0  # when the directory of keys was last seen to change
        self.address = f"{LOCAL}:{_free_port()}"  # of the Runtime and Control APIs
        wait_for_port(listen)
        # What is around the arrays comes on top.
        limit = int(message_limit * 1.01) + 1_000_000
        self.process = self._start(limit, clients, environment)
        ca = None if folder is None else (folder / "ca.crt").read_bytes()
        where: dict[str, Any] = {"server_address": self.address}
        where |= {"insecure": ca is None, "root_certificates": ca}
        as_flwr = RuntimeVersionHttpInterceptor("flwr CLI")
        as_executor = RuntimeVersionHttpInterceptor("SuperExec")
        with without_proxies():
            self.control = ControlHttpClient.from_server_address(
                **where, interceptors=[as_flwr]
            )
            self.runtime = RuntimeHttpClient.from_server_address(
                **where, interceptors=[as_executor], retry_invoker=None
            )
        try:
            self._wait_for_answer()
            self.mind_keys()
        except BaseException:
            self.kill()
            raise

    def _start(
        self, limit: int, clients: int, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        keys = "" if self.keys is None else str(self.keys)
        command = [sys.executable, "-m", "fedcore.server.superlink", "superlink"]
        command += [str(limit), str(clients), keys, *self._tls_words()]
        host, _, port = self.address.rpartition(":")
        command += ["--isolation", "process", "--host", host, "--port", port]
        command += ["--fleet-api-address", self.listen]
        if self.folder is not None:
            environment = environment | TRACE
        mark = secrets.token_hex(8)
        with writing(self.out / LOG):
            (self.out / LOG).touch()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {MARK: mark},
        )
        arguments = (process.stdout, self.out / LOG, mark.encode())
        threading.Thread(target=relay, args=arguments, daemon=True).start()
        return process

    def _tls_words(self) -> list[str]:
        if self.folder is None:
            return ["--insecure"]
        words = ["--ssl-certfile", str(self.folder / "server.crt")]
        words += ["--ssl-keyfile", str(self.folder / "server.key")]
        words += ["--ssl-ca-certfile", str(self.folder / "ca.crt")]
        return [*words, "--enable-supernode-auth"]

    def _wait_for_answer(self) -> None:
        end = time.monotonic() + START
        while True:
            try:
                self.control.ListNodes(control_pb2.ListNodesRequest())
                return
            except httpx.HTTPError as error:
                has_ended = self.process.poll() is not None
                if has_ended or time.monotonic() > end:
                    raise RunError(
                        f"the SuperLink did not start ({error}): see {self.out / LOG}"
                    ) from error
                time.sleep(0.05)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End it at once: it holds nothing that is needed later."""
        if self.is_running():
            self.process.kill()
            self.process.wait()

    def mind_keys(self) -> None:
        """Register new keys of the directory, and unregister those that are gone."""
        if self.keys is None:
            return
        changed = self.keys.stat().st_mtime
        if changed == self._keys_changed:
            return
        self._keys_changed = changed
        names: dict[bytes, str] = {}
        for name, key in certs.client_keys(self.keys).items():
            names[public_key_to_bytes(key)] = name
        # A SuperLink that has ended gets them all when it starts again.
        with suppress(httpx.HTTPError):
            for public, name in names.items():
                if public not in self.registered:
                    self._register(public, name)
            for public in self.registered.keys() - names.keys():
                self._unregister(public)

    def _register(self, public: bytes, name: str) -> None:
        request = control_pb2.RegisterNodeRequest(public_key=public, name=name)
        node = self.control.RegisterNode(request).node_id
        self.registered[public] = node, name

    def _unregister(self, public: bytes) -> None:
        node, name = self.registered.pop(public)
        self.control.UnregisterNode(control_pb2.UnregisterNodeRequest(node_id=node))
        log.warning(
            "%s may not take part any more: its key is gone from %s", name, self.keys
        )

    def submit(self, bundle: Fab) -> Task | None:
        """Hand in a run, and take its task; None where the SuperLink has ended.

        Raises RunError when it does not take the run.
        """
        request = control_pb2.StartRunRequest(
            fab=fab_to_proto(bundle), override_config=user_config_to_proto({})
        )
        ask = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        try:
            run_id = self.control.StartRun(request).run_id
            token = self.runtime.AcquireTask(ask).token
        except httpx.HTTPError as error:
            if self.is_running():
                raise RunError(
                    f"Flower does not take the run: {_text_of(error)}; "
                    f"see {self.out / LOG}"
                ) from error
            return None
        if not token:
            raise RunError(
                f"Flower gives no task for the run that it took; see {self.out / LOG}"
            )
        return Task(run_id, token)

    def stop_run(self, run_id: int) -> None:
        with suppress(httpx.HTTPError):
            self.control.StopRun(control_pb2.StopRunRequest(run_id=run_id))

    def facts(self) -> dict[str, Any]:
        """Where it is, for `fedcore status`."""
        ca = None
        if self.folder is not None:
            ca = str((self.folder / "ca.crt").resolve())
        return {
            "listen": self.listen,
            "control": self.address,
            "pid": os.getpid(),
            "superlink": self.process.pid,
            "ca": ca,
        }


def relay(stream: BinaryIO, file: Path, mark: bytes) -> None:
    """Tell the user who was refused, by the gate or in a handshake.

    The gate's lines begin with the mark. Flower's own go to the log, written out where
    they are not printable: they may hold words of a client.
    """
    handshakes = Handshakes()
    for line in stream:
        is_trace, news = handshakes.read(line)
        if news:
            log.warning("%s", news)
        if is_trace:
            continue
        text = line.decode(errors="backslashreplace").removesuffix("\n")
        if line.startswith(mark):
            log.warning("%s", text.removeprefix(mark.decode()))
            continue
        # The stream is read on in any case: else the SuperLink would stand still.
        with suppress(OSError), file.open("a", encoding="utf-8") as rest:
            rest.write(printable(text) + "\n")


def _text_of(error: httpx.HTTPError) -> str:
    if not isinstance(error, httpx.HTTPStatusError):
        return str(error)
    return " ".join(error.response.text.split())[:300]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOCAL, 0))
        port: int = s.getsockname()[1]
        return port


def host_and_port(listen: str) -> tuple[str, int]:
    """The parts of HOST:PORT. Raises SettingsError for another text."""
    host, _, port = listen.rpartition(":")
    is_number = port.isascii() and port.isdigit()
    if not host or not is_number or not 0 < int(port) < 65536:
        raise SettingsError(
            f'--listen "{listen}": expected HOST:PORT, e.g. 0.0.0.0:9092'
        )
    return host, int(port)


def wait_for_port(listen: str, patience: float = 10.0) -> None:
    """Wait until an address can be listened on; a killed process may still hold it.

    Raises SettingsError for one that cannot be listened on.
    """
    host, port = host_and_port(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    end = time.monotonic() + patience
    while True:
        try:
            address = (host.strip("[]"), port)
            with socket.create_server(address, family=family):
                return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise SettingsError(
                    f"--listen {listen}: {error}; another server there? "
                    "Choose another port"
                ) from error
            time.sleep(0.1)
