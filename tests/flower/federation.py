"""A federation of real processes on the loopback interface: a server and clients, started, killed and cleared away."""

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

ENVIRONMENT = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def fedcore(*words: object) -> list[str]:
    return [sys.executable, "-m", "fedcore.cli", *map(str, words)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(
    done: Callable[[], Any], seconds: float, what: Callable[[], str] | str
) -> Any:
    """Wait for something to be true, and give it."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, (
            f"after {seconds:g} s: {what if isinstance(what, str) else what()}"
        )
        time.sleep(0.05)
    return found


class Proxy:
    """Passes bytes on to a port, until it is cut.

    Then what is under way is swallowed, for ever, as by a NAT that forgot it; or held back until the cut is over; or reset.
    """

    def __init__(self, port: int) -> None:
        self.target, self.era, self.cut = port, 0, False
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
                if self.cut:
                    continue  # it stays open, and nobody answers
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self.sockets.append(far)
                for a, b in ((near, far), (far, near)):
                    threading.Thread(
                        target=self._pass, args=(a, b, self.era), daemon=True
                    ).start()

    def _pass(self, a: socket.socket, b: socket.socket, era: int) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                self.open.wait()
                if self.cut or era != self.era:
                    return
                b.sendall(data)
        for s in (a, b):
            with suppress(OSError):
                s.shutdown(
                    socket.SHUT_RDWR
                )  # each end hears that the other one has gone

    def cut_for(
        self, seconds: float, how: Literal["swallow", "hold", "reset"] = "swallow"
    ) -> None:
        if how == "hold":
            self.open.clear()
            time.sleep(seconds)
            self.open.set()
            return
        self.cut = True
        if how == "reset":
            for s in self.sockets[1:]:
                with suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self.cut, self.era = False, self.era + 1

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
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.proxies: dict[int, Proxy] = {}  # clients that do not connect to `address`

    def proxy(self, i: int) -> Proxy:
        """One between client i and the server, from client i's next start on."""
        self.proxies[i] = Proxy(self.port)
        return self.proxies[i]

    def start(
        self, name: str, command: list[str], **environment: str
    ) -> subprocess.Popen[bytes]:
        if inherited := ENVIRONMENT.get("PYTHONPATH"):
            environment["PYTHONPATH"] = os.pathsep.join(
                [*filter(None, [environment.get("PYTHONPATH")]), inherited]
            )
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **environment},
            )
        self.processes[name] = process
        return process

    def server(
        self, preset: str, *settings: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        words = [word for text in settings for word in ("--set", text)]
        return self.start(
            "server",
            fedcore(
                "server",
                preset,
                "--certs",
                self.certs / "server",
                "--listen",
                f"127.0.0.1:{self.port}",
                "--out",
                self.run,
                *words,
            ),
            **environment,
        )

    def client(
        self, i: int, *words: object, **environment: str
    ) -> subprocess.Popen[bytes]:
        address = (
            f"localhost:{self.proxies[i].port}" if i in self.proxies else self.address
        )
        place = (
            "--certs",
            self.certs / f"client-{i}",
            "--state",
            self.folder / f"state-{i}",
        )
        return self.start(
            f"client-{i}",
            fedcore("client", "--id", i, "--server", address, *place, *words),
            **environment,
        )

    def all_clients(self) -> None:
        for i in range(self.clients):
            self.client(i)

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def said(self, name: str, pattern: str, seconds: float = 40) -> str:
        """The first line of a process that matches."""
        found: re.Match[str] = until(
            lambda: re.search(f"^.*{pattern}.*$", self.log(name), re.MULTILINE),
            seconds,
            lambda: f"no {pattern!r} in\n{self.log(name)}",
        )
        return found[0]

    def rows(self) -> list[dict[str, Any]]:
        file = self.run / "metrics.jsonl"
        return (
            [
                json.loads(line)
                for line in file.read_text().splitlines()
                if line.endswith("}")
            ]
            if file.exists()
            else []
        )

    def reached(self, number: int, seconds: float = 120) -> None:
        until(
            lambda: len(self.rows()) >= number,
            seconds,
            lambda: f"round {len(self.rows())} of {number}\n{self.everything()}",
        )

    def facts(self) -> dict[str, Any]:
        """What the server wrote of itself."""
        found: dict[str, Any] = json.loads((self.run / "server.json").read_text())
        return found

    def serverapp(self) -> int:
        """Its process id."""
        server = self.processes["server"].pid
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(
                    (folder / "stat").read_text().rpartition(")")[2].split()[1]
                )
                if (
                    parent == server
                    and b"serverapp" in (folder / "cmdline").read_bytes()
                ):
                    return int(folder.name)
            except (OSError, ValueError, IndexError):
                continue
        return 0

    def finished(self, seconds: float = 150) -> dict[str, Any]:
        """The server's outcome, after it has ended well."""
        try:
            status = self.processes["server"].wait(seconds)
        except subprocess.TimeoutExpired:
            status = -1
        assert status == 0, self.everything()
        outcome: dict[str, Any] = json.loads((self.run / "outcome.json").read_text())[
            "result"
        ]
        return outcome

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def everything(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def federation(folder: Path, clients: int) -> Iterator[Federation]:
    """Nothing that it started outlives it: what they start themselves ends with them, or is found by the folder in its command."""
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
                process.wait()
        for proxy in f.proxies.values():
            proxy.close()
        for number in left_behind(folder):
            os.kill(number, signal.SIGKILL)


def left_behind(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                int(process.name) != os.getpid()
                and str(folder).encode() in (process / "cmdline").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found
