"""Certificates of clients: made, checked, and refused where they are no good."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore.deploy import certs, client_certificates
from fedcore.deploy.pem import load_certificate
from fedcore.errors import SettingsError
from tests.secure_sums import der

HOSTS = ["localhost"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "c"
    certs.make(folder, HOSTS, 3)
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "c"))


def test_each_client_and_the_server_have_the_certificate(made: Path) -> None:
    found = client_certificates.certificates(made / "server")
    assert sorted(found) == [0, 1, 2]
    authority = client_certificates.authority(made / "server")
    assert authority is not None
    for client, content in found.items():
        file = made / f"client-{client}" / f"client-{client}.crt"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert content == der(load_certificate(file))
        identity = client_certificates.identity(file.parent, client)
        assert identity is not None
        assert authority.key_of(client, content) == certs.load_public(
            file.with_name("client.pub")
        )
        authority.verify(client, content, identity.sign(b"message"), b"message")
        assert certs.check(file.parent) == []
    assert certs.check(made / "server") == []


def test_a_certificate_is_that_of_a_client_and_no_authority(made: Path) -> None:
    certificate = load_certificate(made / "client-1" / "client-1.crt")
    assert certificate.subject.rfc4514_string() == "CN=client-1"
    kinds = {type(extension.value).__name__ for extension in certificate.extensions}
    assert {"BasicConstraints", "KeyUsage", "ExtendedKeyUsage"} <= kinds
    for extension in certificate.extensions:
        if type(extension.value).__name__ == "ExtendedKeyUsage":
            assert list(extension.value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    days = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=824) < days < timedelta(days=826)


def test_directories_of_before_get_what_is_missing(made: Path) -> None:
    for file in made.rglob("client-*.crt"):
        file.unlink()
    kept = {file: file.read_bytes() for file in made.rglob("*.*") if file.is_file()}
    assert client_certificates.authority(made / "server") is None
    assert client_certificates.identity(made / "client-0", 0) is None
    assert certs.check(made / "server") == certs.check(made / "client-0") == []
    new = certs.make(made, HOSTS, 3)
    names = sorted(str(file.relative_to(made)) for file in new)
    assert names == [
        "client-0/client-0.crt",
        "client-1/client-1.crt",
        "client-2/client-2.crt",
        "server/clients/client-0.crt",
        "server/clients/client-1.crt",
        "server/clients/client-2.crt",
    ]
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert certs.make(made, HOSTS, 3) == []


def test_the_copy_of_the_server_is_put_back(made: Path) -> None:
    own = (made / "client-0" / "client-0.crt").read_bytes()
    (made / "server" / "clients" / "client-0.crt").unlink()
    (file,) = certs.make(made, HOSTS, 3)
    assert file.read_bytes() == own


def test_a_revoked_client_gets_no_certificate(made: Path) -> None:
    clients = made / "server" / "clients"
    (clients / "client-1.pub").unlink()
    assert sorted(client_certificates.certificates(made / "server")) == [0, 2]
    (clients / "client-1.crt").unlink()
    (made / "client-1" / "client-1.crt").unlink()
    assert certs.make(made, HOSTS, 3) == []


def copy(source: Path, to: Path) -> None:
    to.write_bytes(source.read_bytes())


@pytest.mark.parametrize(
    ("spoil", "folder", "said"),
    [
        (
            lambda f: copy(
                f / "client-1" / "client-1.crt", f / "client-0" / "client-0.crt"
            ),
            "client-0",
            "client-0.crt is not the certificate of this client's key",
        ),
        (
            lambda f: (f / "client-0" / "client-0.crt").rename(
                f / "client-0" / "client-7.crt"
            ),
            "client-0",
            "the certificate of client 7 is that of client-0",
        ),
        (
            lambda f: (f / "client-0" / "client-0.crt").write_text("x"),
            "client-0",
            "is not a certificate in PEM",
        ),
        (
            lambda f: (f / "server" / "clients" / "client-2.crt").unlink(),
            "server",
            "client-2.crt is missing, so that client has no part in secure sums",
        ),
        (
            lambda f: copy(
                f / "server" / "clients" / "client-1.crt",
                f / "server" / "clients" / "client-0.crt",
            ),
            "server",
            "client-0.crt is not the certificate of this client's key",
        ),
    ],
)
def test_every_fault_is_named(
    spoil: Callable[[Path], object], folder: str, said: str, made: Path
) -> None:
    spoil(made)
    (fault,) = certs.check(made / folder)
    assert said in fault
    # A client without a good certificate joins: it has no part in secure sums alone.
    starts = certs.check_server if folder == "server" else certs.check_client
    assert starts(made / folder) == []


def test_a_certificate_of_another_federation_is_named(
    made: Path, tmp_path: Path
) -> None:
    certs.make(tmp_path / "d", HOSTS, 1)
    for name in ("client.key", "client.pub", "client-0.crt"):
        copy(tmp_path / "d" / "client-0" / name, made / "client-0" / name)
    (fault,) = certs.check(made / "client-0")
    assert "the certificate of client 0 is not one of this federation" in fault
    assert "delete client-0/client-0.crt and server/clients/client-0.crt" in fault
    with pytest.raises(SettingsError, match="not one of this federation"):
        client_certificates.identity(made / "client-0", 0)


def test_dates_are_checked(made: Path) -> None:
    now = datetime.now(UTC)
    check = client_certificates.check_certificate
    assert check(made / "client-0", now + timedelta(days=700)) == []
    (fault,) = check(made / "client-0", now + timedelta(days=800))
    assert "soon: delete client-0/client-0.crt" in fault
    (fault,) = check(made / "client-0", now + timedelta(days=900))
    assert "the certificate of client 0 is valid from" in fault
    faults = client_certificates.check_certificates(
        made / "server", now + timedelta(days=900)
    )
    assert len(faults) == 3


def test_a_renewed_certificate_goes_to_both(made: Path) -> None:
    own = made / "client-0" / "client-0.crt"
    before = own.read_bytes()
    own.unlink()
    new = certs.make(made, HOSTS, 3)
    assert {file.parent.name for file in new} == {"client-0", "clients"}
    servers = made / "server" / "clients" / "client-0.crt"
    assert own.read_bytes() == servers.read_bytes() != before
