"""Certificates of clients: with them, clients know each other in a secure sum.

    DIR/client-3/client-3.crt            for the device: X.509, of its client.key
    DIR/server/clients/client-3.crt      the same, for the server to pass on

The common name is the client's, the only use is that of a client, and the authority of
the federation signs. A server that holds no `ca.key` cannot make one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.deploy.pem import (
    builder,
    load_certificate,
    load_private,
    load_public,
    write,
)
from fedcore.errors import SettingsError
from fedcore.messages.secure.identity import Authority, Identity, name_of
from fedcore.messages.secure.primitives import Refused

__all__ = [
    "authority",
    "certificates",
    "check_certificate",
    "check_certificates",
    "identity",
    "make_certificate",
]

DAYS = 825  # as the server's
SOON = 30  # days before its end at which `fedcore doctor` warns


def make_certificate(out: Path, name: str) -> list[Path]:
    """Make what is missing of a client's certificate; the files that are new.

    `name` is "client-3". A client whose public key was taken from `server/clients/` is
    left out: it was revoked.
    """
    own = out / name / f"{name}.crt"
    servers = out / "server" / "clients" / f"{name}.crt"
    if not servers.with_suffix(".pub").exists():
        return []
    made = []
    key = load_private(own.with_name("client.key")).public_key()
    if not own.exists() or load_certificate(own).public_key() != key:
        made.append(write(own, _issue(out, name, key)))
    if not servers.exists() or servers.read_bytes() != own.read_bytes():
        made.append(write(servers, own.read_bytes()))
    return made


def _issue(out: Path, name: str, key: ec.EllipticCurvePublicKey) -> bytes:
    ca = load_certificate(out / "ca.crt")
    ca_key = serialization.load_pem_private_key((out / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey), "made by fedcore certs"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    begun = (
        builder(subject, ca.subject, key, DAYS)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(usage, True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            False,
        )
    )
    certificate = begun.sign(ca_key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM)


def identity(folder: Path, client: int) -> Identity | None:
    """The identity in a device's directory; None where it has no certificate.

    Raises SettingsError for a certificate that is no good.
    """
    file = folder / f"{name_of(client)}.crt"
    if not file.exists():
        return None
    try:
        return Identity(
            client,
            load_private(folder / "client.key"),
            load_certificate(file),
            load_certificate(folder / "ca.crt"),
        )
    except Refused as error:
        raise SettingsError(f"{file}: {error}; {_again(file.stem)}") from error


def authority(folder: Path) -> Authority | None:
    """The authority of a server's directory; None where no client has a certificate."""
    if not certificates(folder):
        return None
    return Authority(load_certificate(folder / "ca.crt"))


def certificates(folder: Path) -> dict[int, bytes]:
    """Certificates (DER) in a server's directory by client, without the revoked."""
    found = {}
    for file in sorted((folder / "clients").glob("client-*.crt")):
        number = file.stem.removeprefix("client-")
        if number.isdigit() and file.with_suffix(".pub").exists():
            certificate = load_certificate(file)
            der = certificate.public_bytes(serialization.Encoding.DER)
            found[int(number)] = der
    return found


def check_certificate(folder: Path, now: datetime | None = None) -> list[str]:
    """Faults of the certificate in a device's directory; none where there is none."""
    faults = []
    for file in sorted(folder.glob("client-*.crt")):
        key = load_private(folder / "client.key").public_key()
        faults += _faults(file, key, folder / "ca.crt", now or datetime.now(UTC))
    return faults


def check_certificates(folder: Path, now: datetime | None = None) -> list[str]:
    """Faults of the certificates in a server's directory, and those that are missing.

    Where no client has one, none is missing.
    """
    faults = []
    has_any = any((folder / "clients").glob("client-*.crt"))
    for public in sorted((folder / "clients").glob("client-*.pub")):
        file = public.with_suffix(".crt")
        if file.exists():
            key = load_public(public)
            faults += _faults(file, key, folder / "ca.crt", now or datetime.now(UTC))
        elif has_any:
            faults.append(
                f"{file} is missing, so that client has no part in secure sums: "
                "run fedcore certs again with its --out, and copy it"
            )
    return faults


def _faults(
    file: Path, key: ec.EllipticCurvePublicKey, ca_file: Path, now: datetime
) -> list[str]:
    certificate = load_certificate(file)
    again = _again(file.stem)
    if certificate.public_key() != key:
        return [f"{file} is not the certificate of this client's key: {again}"]
    client = file.stem.removeprefix("client-")
    der = certificate.public_bytes(serialization.Encoding.DER)
    try:
        number = int(client) if client.isdigit() else -1
        Authority(load_certificate(ca_file)).key_of(number, der, now)
    except Refused as error:
        return [f"{file}: {error}: {again}"]
    end = certificate.not_valid_after_utc
    if now > end - timedelta(days=SOON):
        return [f"{file} ends on {end:%Y-%m-%d}, soon: {again}"]
    return []


def _again(name: str) -> str:
    return (
        f"delete {name}/{name}.crt and server/clients/{name}.crt, run fedcore certs "
        "again with its --out, and copy both"
    )
