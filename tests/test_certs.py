"""Keys and certificates, and what is said of those that are no good."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore.deploy import certs
from fedcore.errors import SettingsError

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    certs.make(tmp_path / "c", ["fl.example.org", "10.0.0.7"], 2)
    return tmp_path / "c"


def test_what_is_made_is_well_and_nobody_else_can_read_it(made: Path) -> None:
    assert certs.check(made / "server", "fl.example.org") == []
    assert certs.check(made / "server", "10.0.0.7") == []
    assert certs.check(made / "client-0") == certs.check(made / "client-1") == []
    assert certs.federation_of(made / "server") == certs.federation_of(
        made / "client-1"
    )
    for path in made.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_what_is_there_stays_and_what_is_missing_is_made(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert certs.make(made, ["fl.example.org", "10.0.0.7"], 2) == []
    (made / "server" / "clients" / "client-1.pub").unlink()  # revoked
    new = certs.make(made, ["fl.example.org", "10.0.0.7"], 3)
    assert {path.relative_to(made).parts[0] for path in new} == {"client-2", "server"}
    assert sorted(certs.client_keys(made / "server" / "clients")) == [
        "client-0",
        "client-2",
    ], "a revoked key came back"
    assert all(
        path.read_bytes() == content
        for path, content in before.items()
        if path.exists()
    )
    new = certs.make(made, ["other.example.org"], 3)
    assert sorted(path.name for path in new) == ["server.crt", "server.key"]
    assert certs.check(made / "server", "other.example.org") == []


@pytest.mark.parametrize(
    ("spoil", "folder", "said"),
    [
        (
            lambda f: (f / "client-0" / "client.key").chmod(0o644),
            "client-0",
            "can be read by others (mode 644): chmod 600",
        ),
        (
            lambda f: (f / "client-0" / "client.key").unlink(),
            "client-0",
            "client.key is missing",
        ),
        (
            lambda f: (f / "client-0" / "client.pub").write_bytes(
                (f / "client-1" / "client.pub").read_bytes()
            ),
            "client-0",
            "client.pub is not the public key of client.key",
        ),
        (
            lambda f: (f / "client-0" / "ca.crt").write_text("x"),
            "client-0",
            "is not a certificate in PEM",
        ),
        (
            lambda f: (f / "server" / "server.key").write_bytes(
                (f / "ca.key").read_bytes()
            ),
            "server",
            "is not the key of server.crt",
        ),
        (
            lambda f: [p.unlink() for p in (f / "server" / "clients").iterdir()],
            "server",
            "no client can join",
        ),
    ],
)
def test_every_fault_is_named_with_what_to_do(
    spoil: Callable[[Path], object], folder: str, said: str, made: Path
) -> None:
    spoil(made)
    (fault,) = certs.check(made / folder)
    assert said in fault


def test_names_and_dates_are_checked(made: Path) -> None:
    (fault,) = certs.check(made / "server", "wrong.example.org")
    assert "not wrong.example.org: fedcore certs --host wrong.example.org" in fault
    now = datetime.now(UTC)
    assert "ended on" in certs.check(made / "server", now=now + timedelta(days=1000))[0]
    assert "soon" in certs.check(made / "server", now=now + timedelta(days=800))[0]
    assert (
        "set this machine's clock"
        in certs.check(made / "client-0", now=now - timedelta(days=1))[0]
    )


def test_a_server_of_another_authority_is_noticed(made: Path, tmp_path: Path) -> None:
    certs.make(tmp_path / "d", ["x"], 1)
    (made / "server" / "ca.crt").write_bytes((tmp_path / "d" / "ca.crt").read_bytes())
    assert "was not issued by" in certs.check(made / "server")[0]


def test_hosts_with_ports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="expected a name or an address, without port"
    ):
        certs.make(tmp_path / "c", ["host:9092"], 1)


def test_the_commands_say_what_they_made_and_what_is_wrong(
    tmp_path: Path, cli: Cli
) -> None:
    status, out, _ = cli(
        "certs", "--host", "localhost", "--nodes", "1", "--out", tmp_path / "c"
    )
    assert status == 0
    assert str(tmp_path / "c" / "client-0" / "client.key") in out.splitlines()
    status, out, _ = cli("doctor", "--certs", tmp_path / "c" / "client-0", "--json")
    assert status == 0, out
    assert json.loads(out)["ok"]
    (tmp_path / "c" / "client-0" / "client.key").chmod(0o640)
    status, out, _ = cli("doctor", "--certs", tmp_path / "c" / "client-0")
    assert status == 1
    assert "FIX certificates and keys" in out
    status, out, _ = cli("doctor", "--server", "localhost:1")
    assert status == 1
    assert "nothing answers there" in out
    status, _, err = cli("status", tmp_path)
    assert status == 2
    assert "no fedcore server runs in it" in err
    status, _, err = cli("server", "fedavg")
    assert status == 2
    assert "expected --certs DIR" in err
    words = ("client", "--id", "0", "--insecure", "--state", tmp_path / "s")
    status, _, err = cli(*words, "--server", "nowhere")
    assert status == 2
    assert "expected HOST:PORT" in err
    status, _, err = cli(
        *words, "--server", "localhost:1", "--set", "method.local_lr=9"
    )
    assert status == 2
    assert "a client may set data_folder, base, model.path, options, " in err
