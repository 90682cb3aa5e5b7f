"""Identities of clients: keys whose certificates an authority of the federation signed.

A client signs the keys of a session, and later the list of survivors. Its neighbours
check the signature against the certificate that the server passes on, and that
certificate against their own copy of the authority's, `ca.crt`: the server can neither
add keys of its own nor show clients different lists. Without certificates nothing is
signed, and a server that lies is not kept out.

Keys are ECDSA over NIST P-384, the very keys that a device joins with; certificates are
X.509, with the client's name ("client-3") as common name and use for clients alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.messages.secure.primitives import Refused

__all__ = ["Authority", "Identity", "name_of"]

_ECDSA = ec.ECDSA(hashes.SHA384())
MOST = 4096  # bytes of a certificate, or of a signature


def name_of(client: int) -> str:
    """The common name of a client.

    >>> name_of(3)
    'client-3'
    """
    return f"client-{client}"


class Authority:
    """The authority of a federation, and the certificates that it was seen to sign."""

    def __init__(self, certificate: x509.Certificate) -> None:
        self.certificate = certificate
        # Checked once: a certificate of the same bytes has the same signature.
        self._seen: dict[bytes, x509.Certificate] = {}

    def key_of(
        self, client: int, certificate: bytes, now: datetime | None = None
    ) -> ec.EllipticCurvePublicKey:
        """The key that `certificate` (DER) says is the client's; `now` in UTC.

        Raises Refused for one that this authority did not sign, of another client, for
        another use, or outside its dates.
        """
        found = self._seen.get(certificate)
        if found is None:
            found = self._read(client, certificate)
            self._seen[certificate] = found
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        said = [str(name.value) for name in names]
        if said != [name_of(client)]:
            raise Refused(
                f"the certificate of client {client} is that of {', '.join(said)[:80]}"
            )
        now = now or datetime.now(UTC)
        if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
            raise Refused(
                f"the certificate of client {client} is valid from "
                f"{found.not_valid_before_utc:%Y-%m-%d} to "
                f"{found.not_valid_after_utc:%Y-%m-%d}; here it is {now:%Y-%m-%d}"
            )
        key = found.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey), "checked when it was read"
        return key

    def _read(self, client: int, content: bytes) -> x509.Certificate:
        """The certificate, with a signature and uses that are right."""
        try:
            if len(content) > MOST:
                raise ValueError("too long")
            certificate = x509.load_der_x509_certificate(content)
            certificate.verify_directly_issued_by(self.certificate)
            extensions = certificate.extensions
            use = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            basic = extensions.get_extension_for_class(x509.BasicConstraints).value
            key = certificate.public_key()
        except Exception as error:  # of many kinds, and all mean the same
            raise Refused(
                f"the certificate of client {client} is not one of this federation"
            ) from error
        if list(use) != [ExtendedKeyUsageOID.CLIENT_AUTH] or basic.ca:
            raise Refused(f"the certificate of client {client} is for another use")
        is_of_curve = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(
            key.curve, ec.SECP384R1
        )
        if not is_of_curve:
            raise Refused(f"the certificate of client {client} has no key of P-384")
        return certificate

    def verify(
        self, client: int, certificate: bytes, signature: bytes, message: bytes
    ) -> None:
        """Check that the client signed the message. Raises Refused."""
        key = self.key_of(client, certificate)
        try:
            if len(signature) > MOST:
                raise InvalidSignature
            key.verify(signature, message, _ECDSA)
        except InvalidSignature as error:
            raise Refused(
                f"a signature of client {client} does not fit what it should have "
                "signed"
            ) from error


class Identity:
    """A client's own key and certificate, and the authority it trusts."""

    def __init__(
        self,
        client: int,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
    ) -> None:
        """Raises Refused where the three do not belong together, or to the client."""
        self.client = client
        self.authority = Authority(authority)
        content = certificate.public_bytes(serialization.Encoding.DER)
        if self.authority.key_of(client, content) != key.public_key():
            raise Refused(f"the certificate of client {client} has another key")
        self._key = key

    def sign(self, message: bytes) -> bytes:
        """The client's signature of a message, in DER."""
        return self._key.sign(message, _ECDSA)

    def __repr__(self) -> str:
        return f"<identity of client {self.client}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an identity is never pickled or copied")
