"""`fedcore server`: starts Flower's SuperLink, submits the run, and starts again what ends before its time.

    fedcore server ── SuperLink (Fleet API for the clients; Runtime and Control API on the loopback interface)
                   └─ ServerApp (the round loop, in the run directory)

Whatever is killed, this process included: started again with the same --out, the run goes on from its checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto import control_pb2, runtime_pb2
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient

import fedcore
from fedcore import __version__
from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.errors import RunError, SettingsError
from fedcore.rounds.loop import Interrupted
from fedcore.rounds.rundir import fresh, make_run_dir, open_run_dir
from fedcore.storage.checkpoint import write_atomically
from server.app import OUTCOME, RUN_DIR, SERIES, WATCH
from server.handshakes import TRACE, Handshakes

log = logging.getLogger("fedcore")

PACKAGES = ("fedcore", "strategies", "server", "client")
PRESET = "fedcore-run.toml"  # the run's settings in the bundle that clients get
FACTS = "server.json"  # for `fedcore status`: where the SuperLink's APIs are
START = 60.0  # seconds for the SuperLink to be there
CRASHES = 5  # in a row, without a round between them, after which it is not tried again
LOOK = 0.1  # seconds between looks at the processes
LOCAL = "127.0.0.1"

PYPROJECT = f"""\
[project]
name = "fedcore"
version = "{__version__}"

[tool.flwr.app]
publisher = "fedcore"
fab-include = ["**/*.py", "**/*.toml"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
preset = "{PRESET}"
set = ""
"""


def serve(
    e: Experiment, listen: str, folder: Path | None, out: Path | None
) -> dict[str, Any]:
    """Run the experiment to its end with clients that connect to `listen` (HOST:PORT); what `fedcore run --json` prints.

    `folder` holds the server's certificate and the clients' keys, None for no TLS and no authentication. `out` is the run
    directory: a new one, or one that this run began in. Raises SettingsError, RunError and Interrupted.
    """
    if folder is not None and (faults := certs.check(folder)):
        raise SettingsError("\n".join(faults))
    out = _run_dir(e, out)
    with _alone(out):
        return Server(e, listen, folder, out).run()


def _run_dir(e: Experiment, out: Path | None) -> Path:
    out = out or fresh(f"{e.method.name}-{e.task.replace(':', '-')}-seed{e.seed}")
    if (out / "config.toml").exists():
        open_run_dir(e, None, out)
    else:
        open_run_dir(e, out, None)
    make_run_dir(out, e)
    if not (out / SERIES).exists():
        write_atomically(
            out / SERIES, json.dumps({"series": secrets.token_hex(8)}).encode()
        )
    return out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / "server.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"{out}: another server runs in it; end that one, or choose another --out"
            ) from None
        yield


class Server:
    """The processes of one run, watched."""

    def __init__(
        self, e: Experiment, listen: str, folder: Path | None, out: Path
    ) -> None:
        self.e, self.listen, self.folder, self.out = e, listen, folder, out
        self.keys = None if folder is None else folder / "clients"
        self.port = _free_port()  # of the Runtime and Control APIs
        self.link: subprocess.Popen[bytes] | None = None
        self.app: subprocess.Popen[bytes] | None = None
        self.control: ControlHttpClient
        self.runtime: RuntimeHttpClient
        self.registered: dict[
            bytes, tuple[int, str]
        ] = {}  # node and name by public key
        self.run_id = 0
        self._crashes, self._rounds = 0, -1
        self._stop = threading.Event()

    def run(self) -> dict[str, Any]:
        (self.out / OUTCOME).unlink(missing_ok=True)
        before = {
            n: signal.signal(n, self._on_signal)
            for n in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while True:
                if self.link is None or self.link.poll() is not None:
                    self._start_link()
                if self.app is None:
                    self._start_app()
                time.sleep(LOOK)
                self._mind_keys()
                if (outcome := self._look()) is not None:
                    return outcome
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()

    def _look(self) -> dict[str, Any] | None:
        """The result, once there is one; starts again what was killed."""
        assert self.link is not None
        assert self.app is not None
        if self._stop.is_set():
            self._stop_app()
            raise Interrupted(
                f"interrupted; go on with the same command and --out {self.out}"
            )
        if self.link.poll() is not None:
            self._crashed("the SuperLink", self.link.returncode)
            self._kill_app()
        elif (status := self.app.poll()) is not None:
            file = self.out / OUTCOME
            if file.exists():
                outcome = json.loads(file.read_bytes())
                if outcome["exit_status"] == 0:
                    result: dict[str, Any] = outcome["result"]
                    return result
                raise {2: SettingsError, 130: Interrupted}.get(
                    outcome["exit_status"], RunError
                )(outcome["error"])
            self._crashed("the ServerApp", status)
            self.app = None
            with suppress(httpx.HTTPError):
                self.control.StopRun(control_pb2.StopRunRequest(run_id=self.run_id))
        return None

    def _crashed(self, what: str, status: int) -> None:
        done = _rounds(self.out)
        self._crashes, self._rounds = (
            (self._crashes + 1 if done == self._rounds else 1),
            done,
        )
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if self._crashes >= CRASHES:
            raise RunError(
                f"{what} ended {how}, for the {CRASHES}th time without a round between: see {self.out / 'superlink.log'}"
            )
        log.warning("%s ended %s after round %d; starting it again", what, how, done)

    # The SuperLink

    def _start_link(self) -> None:
        limit = (
            int(self.e.engine.message_limit_mb * 1e6 * 1.01) + 1_000_000
        )  # and what is around the arrays
        tls = ["--insecure"]
        if self.folder is not None:
            names = (
                ("--ssl-certfile", "server.crt"),
                ("--ssl-keyfile", "server.key"),
                ("--ssl-ca-certfile", "ca.crt"),
            )
            tls = [
                word for flag, name in names for word in (flag, str(self.folder / name))
            ] + ["--enable-supernode-auth"]
        _wait_for_port(self.listen)
        command = [
            sys.executable,
            "-m",
            "server.superlink",
            "superlink",
            str(limit),
            str(self.keys or ""),
            *tls,
        ]
        command += [
            "--isolation",
            "process",
            "--host",
            LOCAL,
            "--port",
            str(self.port),
            "--fleet-api-address",
            self.listen,
        ]
        with (self.out / "superlink.log").open("ab") as file:
            environment = self._environment() | ({} if self.folder is None else TRACE)
            self.link = subprocess.Popen(
                command, stdout=file, stderr=subprocess.PIPE, env=environment
            )
        assert self.link.stderr is not None
        threading.Thread(
            target=_relay,
            args=(self.link.stderr, self.out / "superlink.log"),
            daemon=True,
        ).start()
        ca = None if self.folder is None else (self.folder / "ca.crt").read_bytes()
        address: dict[str, Any] = {
            "server_address": f"{LOCAL}:{self.port}",
            "insecure": ca is None,
            "root_certificates": ca,
        }
        version = [RuntimeVersionHttpInterceptor("flwr CLI")]
        self.control = ControlHttpClient.from_server_address(
            **address, interceptors=version
        )
        self.runtime = RuntimeHttpClient.from_server_address(
            **address,
            interceptors=[RuntimeVersionHttpInterceptor("SuperExec")],
            retry_invoker=None,
        )
        end = time.monotonic() + START
        while True:
            try:
                self.control.ListNodes(control_pb2.ListNodesRequest())
                break
            except httpx.HTTPError as error:
                if self.link.poll() is not None or time.monotonic() > end:
                    raise RunError(
                        f"the SuperLink did not start ({error}): see {self.out / 'superlink.log'}"
                    ) from error
                time.sleep(0.05)
        self.registered, self._keys_seen = {}, -1.0
        self._mind_keys()
        self.app = None
        facts = {
            "listen": self.listen,
            "control": f"{LOCAL}:{self.port}",
            "pid": os.getpid(),
            "superlink": self.link.pid,
        }
        facts["ca"] = (
            None if self.folder is None else str((self.folder / "ca.crt").resolve())
        )
        write_atomically(self.out / FACTS, json.dumps(facts).encode())
        who = (
            "anybody, without TLS"
            if self.keys is None
            else f"{len(self.registered)} clients with keys in {self.keys}"
        )
        log.warning(
            "listening on %s for %s; run directory %s", self.listen, who, self.out
        )

    def _mind_keys(self) -> None:
        """Register the keys that are new in the directory, and unregister those that are gone from it."""
        if self.keys is None:
            return
        changed = self.keys.stat().st_mtime
        if changed == self._keys_seen:
            return
        self._keys_seen = changed
        found = {
            public_key_to_bytes(key): name
            for name, key in certs.client_keys(self.keys).items()
        }
        with suppress(
            httpx.HTTPError
        ):  # the SuperLink ended: it gets them all when it starts again
            for key, name in found.items():
                if key not in self.registered:
                    node = self.control.RegisterNode(
                        control_pb2.RegisterNodeRequest(public_key=key, name=name)
                    ).node_id
                    self.registered[key] = node, name
            for key in self.registered.keys() - found.keys():
                node, name = self.registered.pop(key)
                self.control.UnregisterNode(
                    control_pb2.UnregisterNodeRequest(node_id=node)
                )
                log.warning(
                    "%s may not take part any more: its key is gone from %s",
                    name,
                    self.keys,
                )

    # The ServerApp

    def _start_app(self) -> None:
        """Submit the run, and start its ServerApp as Flower's SuperExec does."""
        try:
            bundle = bundle_of(self.e)
            request = control_pb2.StartRunRequest(
                fab=fab_to_proto(bundle), override_config=user_config_to_proto({})
            )
            self.run_id = self.control.StartRun(request).run_id
            task = self.runtime.AcquireTask(
                runtime_pb2.AcquireTaskRequest(
                    supported_task_types=[TaskType.SERVER_APP]
                )
            )
        except httpx.HTTPError as error:
            if self.link is not None and self.link.poll() is None:
                raise RunError(
                    f"Flower does not take the run: {_said(error)}; see {self.out / 'superlink.log'}"
                ) from error
            return
        if not task.token:
            raise RunError(
                f"Flower gives no task for the run that it took; see {self.out / 'superlink.log'}"
            )
        command = [
            sys.executable,
            "-m",
            "server.superlink",
            "serverapp",
            "--runtime-api-address",
            f"{LOCAL}:{self.port}",
        ]
        command += ["--token", task.token, "--parent-pid", str(os.getpid())]
        command += (
            ["--insecure"]
            if self.folder is None
            else ["--root-certificates", str(self.folder / "ca.crt")]
        )
        with (self.out / "superlink.log").open("ab") as file:
            self.app = subprocess.Popen(command, stdout=file, env=self._environment())

    def _stop_app(self) -> None:
        """Ask it to end after what it is doing, then insist. Whatever it says, its checkpoint is whole."""
        assert self.app is not None
        for seconds in (10, 5):
            end = time.monotonic() + seconds
            if self.app.poll() is None and not (self.out / OUTCOME).exists():
                self.app.send_signal(signal.SIGTERM)
            # With its outcome it has written all; Flower's part of it may take a while more.
            while (
                self.app.poll() is None
                and not (self.out / OUTCOME).exists()
                and time.monotonic() < end
            ):
                time.sleep(LOOK)
        self._kill_app()

    def _kill_app(self) -> None:
        if self.app is not None and self.app.poll() is None:
            self.app.kill()
            self.app.wait()
        self.app = None

    def _environment(self) -> dict[str, str]:
        quiet = {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        home = str((self.out / "flower").resolve())
        level = {"FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING")}
        return {
            **os.environ,
            **quiet,
            **level,
            "FLWR_HOME": home,
            RUN_DIR: str(self.out.resolve()),
        }

    def _end(self) -> None:
        self._kill_app()
        if self.link is not None and self.link.poll() is None:
            self.link.kill()  # it holds nothing that anybody needs
            self.link.wait()
        for name in (FACTS, WATCH):
            (self.out / name).unlink(missing_ok=True)


def bundle_of(e: Experiment) -> Fab:
    """The Flower app that clients get: this fedcore's source, and the run's settings."""
    root = Path(fedcore.__file__).parent.parent
    files: dict[str, bytes | Path] = {
        "pyproject.toml": PYPROJECT.encode(),
        PRESET: e.to_toml().encode(),
    }
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*")):
            if file.suffix in (".py", ".toml"):
                files[file.relative_to(root).as_posix()] = file
    content = build_fab_from_files(files)[0]
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def _relay(stream: Any, file: Path) -> None:
    """What the gate says to the user, and of gRPC's handshakes who failed; what Flower says to the log."""
    handshakes = Handshakes()
    with file.open("ab") as rest:
        for line in stream:
            traced, news = handshakes.read(line)
            if news:
                log.warning("%s", news)
            if traced:
                continue
            if line.startswith(b"refused "):
                log.warning("%s", line.decode(errors="replace").rstrip())
            else:
                rest.write(line)
                rest.flush()


def _rounds(out: Path) -> int:
    """Lines of metrics.jsonl: rounds done."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _said(error: httpx.HTTPError) -> str:
    response = getattr(error, "response", None)
    return " ".join(response.text.split())[:300] if response is not None else str(error)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOCAL, 0))
        port: int = s.getsockname()[1]
        return port


def _wait_for_port(listen: str, patience: float = 10.0) -> None:
    """Raises SettingsError for an address that cannot be listened on; what was killed may need a moment to let go of it."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SettingsError(
            f'--listen "{listen}": expected HOST:PORT, e.g. 0.0.0.0:9092'
        )
    end = time.monotonic() + patience
    while True:
        try:
            with socket.create_server(
                (host.strip("[]"), int(port)),
                family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            ):
                return
        except (OSError, OverflowError) as e:
            if time.monotonic() > end:
                raise SettingsError(
                    f"--listen {listen}: {e}; another server there? Choose another port"
                ) from e
            time.sleep(0.1)
