"""Keys and certificates of a deployment.

There are one authority, the server's certificate, and a key pair and a certificate of
each client:

    DIR/ca.crt  DIR/ca.key      the authority; its key renews the server's certificate
    DIR/server/                 for the server: ca.crt, server.crt, server.key, and
                                clients/client-0.pub, clients/client-0.crt, ...
    DIR/client-0/               for one device: ca.crt, client.key, client.pub, and
                                client-0.crt

TLS proves the server to the clients. Flower's node authentication proves each client to
the server by its key pair (NIST P-384, in OpenSSH's format, as `flower-supernode
--auth-supernode-private-key` reads it). The keys in `clients/` may join: to revoke a
client, remove its file, also while the server runs.

In a secure sum clients know each other by their certificates (`client_certificates`).
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.deploy.client_certificates import (
    check_certificate,
    check_certificates,
    make_certificate,
)
from fedcore.deploy.pem import (
    builder,
    load_certificate,
    load_private,
    load_public,
    write,
)
from fedcore.errors import SettingsError
from fedcore.storage.faults import Unwritable, unwritable

__all__ = [
    "check",
    "check_client",
    "check_server",
    "client_id",
    "client_keys",
    "federation_of",
    "load_certificate",
    "load_private",
    "load_public",
    "make",
]

# Names under which the server's own processes talk to each other.
ALWAYS = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
SERVER_DAYS = 825  # the most that common TLS libraries accept of a server
SOON = 30  # days before its end at which `fedcore doctor` warns of a certificate


def make(out: Path, hosts: Sequence[str], nodes: int) -> list[Path]:
    """Make the files that are missing under `out`; the files that are new.

    `hosts` are the server's names and addresses. Files that are there stay, so that
    more clients can be added later; the server's certificate is made anew when `hosts`
    differ from it. Directories are 0700 and private keys 0600. Raises SettingsError for
    a bad host, and Unwritable where files cannot be written.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *ALWAYS])]
    try:
        _make_folder(out)
        made = _make_authority(out)
        ca_file = out / "ca.crt"
        for folder in [out / "server", *(out / f"client-{i}" for i in range(nodes))]:
            _make_folder(folder)
            if not (folder / "ca.crt").exists():
                made.append(write(folder / "ca.crt", ca_file.read_bytes()))
        made += _make_server(out, names)
        _make_folder(out / "server" / "clients")
        for i in range(nodes):
            made += _make_client(out, f"client-{i}")
            made += make_certificate(out, f"client-{i}")
    except Unwritable:
        raise
    except OSError as error:
        raise unwritable(Path(error.filename or out), error) from error
    return made


def _make_authority(out: Path) -> list[Path]:
    key_file, file = out / "ca.key", out / "ca.crt"
    if key_file.exists() != file.exists():
        raise SettingsError(
            f"{out} holds one of ca.key and ca.crt: "
            "put the other back, or choose another --out"
        )
    if file.exists():
        return []
    key = ec.generate_private_key(ec.SECP256R1())
    return [write(key_file, _pem(key)), write(file, _authority(key))]


def _make_server(out: Path, names: list[x509.DNSName | x509.IPAddress]) -> list[Path]:
    file = out / "server" / "server.crt"
    wanted = {str(name.value) for name in names}
    if file.exists() and _names(load_certificate(file)) == wanted:
        return []
    ca = load_certificate(out / "ca.crt")
    ca_key = serialization.load_pem_private_key((out / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    return [
        write(file.with_suffix(".key"), _pem(key)),
        write(file, _certificate(key, names, ca, ca_key)),
    ]


def _make_client(out: Path, name: str) -> list[Path]:
    folder = out / name
    if (folder / "client.key").exists():
        return []  # its public key is not put back: it may have been revoked
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return [
        write(folder / "client.key", private),
        write(folder / "client.pub", public + b"\n"),
        write(out / "server" / "clients" / f"{name}.pub", public + b"\n"),
    ]


def client_keys(folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """The public keys in a server's `clients/`, by name ("client-3").

    Raises SettingsError for a file that holds none.
    """
    return {file.stem: load_public(file) for file in sorted(folder.glob("*.pub"))}


def client_id(name: str) -> int | None:
    """The id in the name of a key that `make` made; None for another name."""
    match = re.fullmatch(r"client-(\d+)", name)
    return int(match[1]) if match else None


def federation_of(folder: Path) -> str:
    """A name for a federation: the beginning of the SHA-256 of its authority."""
    return load_certificate(folder / "ca.crt").fingerprint(hashes.SHA256()).hex()[:16]


def check_server(folder: Path) -> list[str]:
    """Faults for which a server cannot start with a directory, as `check` has them."""
    if (folder / "client.key").exists() and not (folder / "server.key").exists():
        return [
            f"{folder} is a client's directory: "
            "expected the server's, DIR/server of fedcore certs"
        ]
    return _check(folder, None, datetime.now(UTC))


def check_client(folder: Path) -> list[str]:
    """Faults for which a client cannot start with a directory, as `check` has them."""
    if (folder / "server.key").exists() and not (folder / "client.key").exists():
        return [
            f"{folder} is the server's directory: "
            "expected the client's own, DIR/client-N of fedcore certs"
        ]
    return _check(folder, None, datetime.now(UTC))


def check(
    folder: Path, host: str | None = None, now: datetime | None = None
) -> list[str]:
    """Faults of a server's or a client's directory, each with its remedy.

    `host` is the name under which clients reach the server: its certificate must hold
    it. `now` in UTC. Clients' certificates are looked at as well: without a good one a
    client joins, and has no part in secure sums.
    """
    now = now or datetime.now(UTC)
    faults = _check(folder, host, now)
    if faults:
        return faults
    looked_at = check_certificates if _is_server(folder) else check_certificate
    try:
        return looked_at(folder, now)
    except SettingsError as error:
        return [str(error)]


def _is_server(folder: Path) -> bool:
    return (folder / "server.crt").exists() or (folder / "clients").exists()


def _check(folder: Path, host: str | None, now: datetime) -> list[str]:
    if not folder.is_dir():
        return [
            f"{folder}: there is no such directory; "
            "make it with: fedcore certs --host NAME --nodes N"
        ]
    is_server = _is_server(folder)
    wanted = ["ca.crt", "client.key", "client.pub"]
    if is_server:
        wanted = ["ca.crt", "server.crt", "server.key"]
    faults = []
    for name in wanted:
        if not (folder / name).exists():
            faults.append(
                f"{folder / name} is missing: copy it from where fedcore certs made it"
            )
    if faults:
        return faults
    try:
        for name in wanted:
            if name.endswith(".crt"):
                faults += _check_dates(folder / name, now)
        faults += _check_modes(folder)
        faults += _check_server(folder, host) if is_server else _check_client(folder)
    except SettingsError as error:
        faults.append(str(error))
    return faults


def _check_modes(folder: Path) -> list[str]:
    faults = []
    for file in folder.glob("*.key"):
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            faults.append(
                f"{file} can be read by others (mode {mode:o}): chmod 600 {file}"
            )
    return faults


def _check_client(folder: Path) -> list[str]:
    public = load_public(folder / "client.pub")
    if load_private(folder / "client.key").public_key() == public:
        return []
    return [
        f"{folder}: client.pub is not the public key of client.key: "
        "copy both from one directory again"
    ]


def _check_server(folder: Path, host: str | None) -> list[str]:
    faults = []
    again = "run fedcore certs again with its --out"
    certificate = load_certificate(folder / "server.crt")
    ca = load_certificate(folder / "ca.crt")
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:
        faults.append(
            f"{folder / 'server.crt'} was not issued by {folder / 'ca.crt'}: {again}"
        )
    key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    if key.public_key() != certificate.public_key():
        faults.append(f"{folder / 'server.key'} is not the key of server.crt: {again}")
    if host is not None and host not in _names(certificate):
        names = ", ".join(sorted(_names(certificate)))
        faults.append(
            f"the server's certificate holds the names {names}, not {host}: "
            f"fedcore certs --host {host}"
        )
    if not client_keys(folder / "clients"):
        faults.append(
            f"{folder / 'clients'} holds no public key, so no client can join: "
            "fedcore certs --nodes N"
        )
    return faults


def _check_dates(file: Path, now: datetime) -> list[str]:
    certificate = load_certificate(file)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    again = "delete server/server.crt and run fedcore certs again with its --out"
    if now < begin:
        return [
            f"{file} is valid from {begin:%Y-%m-%d %H:%M} UTC on, and here it is "
            f"{now:%Y-%m-%d %H:%M}: set this machine's clock"
        ]
    if now > end:
        return [f"{file} ended on {end:%Y-%m-%d}: {again}"]
    if now > end - timedelta(days=SOON):
        return [f"{file} ends on {end:%Y-%m-%d}, soon: {again}"]
    return []


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host):
        raise SettingsError(
            f'--host "{host}": expected a name or an address, without port, '
            "e.g. --host fl.example.org"
        )
    return x509.DNSName(host)


def _names(certificate: x509.Certificate) -> set[str]:
    kind = x509.SubjectAlternativeName
    names = certificate.extensions.get_extension_for_class(kind).value
    return {str(name.value) for name in names}


def _authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcore federation")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    begun = (
        builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(usage, True)
    )
    return begun.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcore server")])
    begun = (
        builder(subject, ca.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            False,
        )
    )
    return begun.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
