"""Keys and certificates in files: read, begun, and written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import SettingsError
from fedcore.storage.checkpoint import write_atomically

__all__ = [
    "builder",
    "load_as",
    "load_certificate",
    "load_private",
    "load_public",
    "write",
]

T = TypeVar("T")


def load_public(file: Path) -> ec.EllipticCurvePublicKey:
    """A public key of a NIST curve in OpenSSH's format. Raises SettingsError."""
    key = load_as(
        file, serialization.load_ssh_public_key, "a public key in OpenSSH's format"
    )
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _another_key(file, key)
    return key


def load_private(file: Path) -> ec.EllipticCurvePrivateKey:
    """A private key of a NIST curve in OpenSSH's format. Raises SettingsError."""
    key = load_as(
        file,
        lambda data: serialization.load_ssh_private_key(data, None),
        "a private key in OpenSSH's format",
    )
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _another_key(file, key)
    return key


def _another_key(file: Path, key: object) -> SettingsError:
    return SettingsError(
        f"{file}: expected an ECDSA key (P-384), found {type(key).__name__}; "
        "make one with: fedcore certs"
    )


def load_certificate(file: Path) -> x509.Certificate:
    """A certificate in PEM. Raises SettingsError for another file."""
    return load_as(file, x509.load_pem_x509_certificate, "a certificate in PEM")


def load_as(file: Path, read: Callable[[bytes], T], kind: str) -> T:
    """The content of a file, a `kind` that `read` takes. Raises SettingsError."""
    try:
        return read(file.read_bytes())
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}; expected {kind}, as fedcore certs makes it"
        ) from error
    except Exception as error:
        raise SettingsError(
            f"{file} is not {kind}: copy it again, or make it with fedcore certs"
        ) from error


def builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """A certificate that begins ten minutes ago, before its uses are added."""
    now = datetime.now(UTC)
    begin = now - timedelta(minutes=10)  # devices' clocks are not all the same
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    )


def write(file: Path, content: bytes) -> Path:
    """Whole or not at all: a half written file would be taken for one that is there.

    For the owner alone, not even before its mode is set readable by others.
    """
    write_atomically(file, content, mode=0o600)
    return file
