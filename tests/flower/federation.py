"""A federation of real processes on the loopback interface, cleared away at its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from fedcore.deploy import certs
from tests.helpers import PATIENCE

Process = subprocess.Popen[bytes]


def environment(**more: str) -> dict[str, str]:
    """This process's environment as it is now, and more.

    The tests' own cache is set after this module is imported.
    """
    result = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    inherited = result.get("PYTHONPATH")
    result |= more
    if inherited and "PYTHONPATH" in more:
        result["PYTHONPATH"] = os.pathsep.join([more["PYTHONPATH"], inherited])
    return result


def fedcore(*words: object) -> list[str]:
    return [sys.executable, "-m", "fedcore.cli", *map(str, words)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(done: Callable[[], Any], what: Callable[[], str] | str) -> Any:
    """Wait for something to be true, and give it; `what` says what did not come."""
    end = time.monotonic() + PATIENCE
    while not (result := done()):
        if time.monotonic() > end:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"after {PATIENCE:g} s: {text}")
        time.sleep(0.05)
    return result


class Proxy:
    """Passes bytes on to a port, until it is cut.

    Bytes under way are then swallowed for ever, as by a NAT that forgot the connection;
    or held back until the cut is over; or the connection is reset.
    """

    def __init__(self, port: int) -> None:
        self.target, self.era, self.is_cut = port, 0, False
        self.open = threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                self.sockets.append(near)
                self.open.wait()
                if self.is_cut:
                    continue  # it stays open, and nothing answers
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self.sockets.append(far)
                self._pass_on(near, far)
                self._pass_on(far, near)

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        arguments = (source, to, self.era)
        threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, era: int) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.open.wait()
                if self.is_cut or era != self.era:
                    return
                to.sendall(data)
        for s in (source, to):  # each end hears that the other one has gone
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """No byte passes inside; what was under way is lost."""
        self.is_cut = True
        yield
        self.is_cut, self.era = False, self.era + 1

    def cut_for(
        self, seconds: float, how: Literal["swallow", "hold", "reset"] = "swallow"
    ) -> None:
        if how == "hold":
            self.open.clear()
            time.sleep(seconds)
            self.open.set()
            return
        with self.cut():
            if how == "reset":
                for s in self.sockets[1:]:
                    with suppress(OSError):
                        s.shutdown(socket.SHUT_RDWR)
            time.sleep(seconds)

    def close(self) -> None:
        self.open.set()
        for s in self.sockets:
            s.close()


class Federation:
    """Processes by name, with their logs in files."""

    def __init__(self, folder: Path, clients: int) -> None:
        self.folder, self.clients = folder, clients
        self.port = free_port()
        self.address = f"localhost:{self.port}"  # where clients connect
        self.certs, self.run = folder / "certs", folder / "run"
        certs.make(self.certs, ["localhost"], clients)
        self.processes: dict[str, Process] = {}
        self.proxies: dict[int, Proxy] = {}  # clients that do not connect to `address`

    def proxy(self, i: int) -> Proxy:
        """A proxy between client i and the server, from client i's next start on."""
        self.proxies[i] = Proxy(self.port)
        return self.proxies[i]

    def start(self, name: str, command: list[str], **more: str) -> Process:
        """Start a process, with more in its environment."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**more),
            )
        self.processes[name] = process
        return process

    def server(self, preset: str, *settings: str, **more: str) -> Process:
        words: list[object] = ["--certs", self.certs / "server", "--out", self.run]
        words += ["--listen", f"127.0.0.1:{self.port}"]
        for setting in settings:
            words += ["--set", setting]
        return self.start("server", fedcore("server", preset, *words), **more)

    def client(self, i: int, *words: object, **more: str) -> Process:
        address = self.address
        if i in self.proxies:
            address = f"localhost:{self.proxies[i].port}"
        state = self.folder / f"state-{i}"
        command = self.client_command(i, self.certs / f"client-{i}", state, address)
        return self.start(f"client-{i}", [*command, *map(str, words)], **more)

    def client_command(
        self, i: int, keys: Path, state: Path, address: str | None = None
    ) -> list[str]:
        words: list[object] = ["--id", i, "--server", address or self.address]
        return fedcore("client", *words, "--certs", keys, "--state", state)

    def all_clients(self) -> None:
        for i in range(self.clients):
            self.client(i)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def said(self, name: str, pattern: str) -> str:
        """The first line of a process that matches, once it is there."""
        line: re.Match[str] = until(
            lambda: re.search(f"^.*{pattern}.*$", self.log(name), re.MULTILINE),
            lambda: f"no {pattern!r} in\n{self.log(name)}",
        )
        return line[0]

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far; the last may be half written."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def reached(self, number: int) -> None:
        """Wait for the end of that round."""
        until(
            lambda: len(self.rows()) >= number,
            lambda: f"round {len(self.rows())} of {number}\n{self.everything()}",
        )

    def facts(self) -> dict[str, Any]:
        """What the server wrote of itself."""
        facts: dict[str, Any] = json.loads((self.run / "server.json").read_text())
        return facts

    def serverapp(self) -> int:
        """The process id of the ServerApp, once there is one.

        Never 0, which would send a signal to the process group of the tests.
        """
        number: int = until(self.running_serverapp, self.everything)
        return number

    def running_serverapp(self) -> int | None:
        """The process id of the ServerApp, None where there is none now."""
        server = self.processes["server"].pid
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):  # it has just ended
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes()
                if int(stat[1]) == server and b"serverapp" in command:
                    return int(folder.name)
        return None

    def finished(self) -> dict[str, Any]:
        """The server's result, after it has ended well."""
        assert self.processes["server"].wait(PATIENCE) == 0, self.everything()
        outcome = json.loads((self.run / "outcome.json").read_text())
        result: dict[str, Any] = outcome["result"]
        return result

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(PATIENCE)

    def everything(self) -> str:
        """The ends of all logs."""
        text = ""
        for file in sorted(self.folder.glob("*.log")):
            text += f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}\n"
        return text


@contextmanager
def federation(folder: Path, clients: int) -> Iterator[Federation]:
    """A federation of which nothing outlives the block.

    Its processes' own children end with them, or are found by the folder in their
    command.
    """
    f = Federation(folder, clients)
    try:
        yield f
    finally:
        for process in f.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        for process in f.processes.values():
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(PATIENCE)
        for proxy in f.proxies.values():
            proxy.close()
        for number in left_behind(folder):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def left_behind(folder: Path) -> list[int]:
    """Processes, other than this one, with the folder in their command."""
    numbers = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            is_other = int(process.name) != os.getpid()
            if is_other and str(folder).encode() in (process / "cmdline").read_bytes():
                numbers.append(int(process.name))
    return numbers


class Gate:
    """Holds the training of clients at a round, however fast the machine is.

    Clients that were started with `environment` wait with every round t from the one
    on that the gate is open to.
    """

    TASK = "task=gated:make_task"  # scikit-learn's digits

    def __init__(self, folder: Path, name: str = "gate", t: int = 0) -> None:
        (folder / "gated.py").write_text(GATED)
        self.file = folder / name
        self.path = {"PYTHONPATH": str(folder)}  # for the server, which finds the task
        self.environment = {**self.path, "GATE": str(self.file)}
        self.open_to(t)

    def open_to(self, t: int) -> None:
        """Let clients work up to round t, which is held."""
        part = self.file.with_suffix(".part")
        part.write_text(str(t))
        part.replace(self.file)

    def open(self) -> None:
        self.open_to(10**9)


GATED = """
import os, time
from pathlib import Path
from fedcore.tasks import images
from fedcore.data.federated import FederatedData

class Gated(FederatedData):
    def batches(self, clients, data, local, seed, t, *rest):
        if data == "train" and "GATE" in os.environ:
            while t >= int(Path(os.environ["GATE"]).read_text()):
                time.sleep(0.05)
        return super().batches(clients, data, local, seed, t, *rest)

def make_task(e):
    task = images(e, "digits")
    task.data.__class__ = Gated
    return task
"""
