"""Identities of clients in secure sums: certificates, and signatures."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore.messages.secure.client_session import ClientSession
from fedcore.messages.secure.identity import Authority, Identity
from fedcore.messages.secure.primitives import Message, Refused
from tests.secure_sums import (
    DOWN,
    OURS,
    SecureSum,
    authority_certificate,
    authority_key,
    client_certificate,
    client_key,
    der,
    identity_of,
    signed_certificate,
    terms_of,
)


def test_the_certificate_of_another_client_is_refused() -> None:
    def swap(exchange: int, client: int, message: Message) -> Message:
        if (exchange, client) != (2, 4):
            return message
        first, second, *rest = message["certificates"]
        return message | {"certificates": [second, first, *rest]}

    secure = SecureSum(range(5), lie=swap).run(until=2)
    said = "the certificate of client 0 is that of client-1"
    assert secure.refused == {4: said}


def test_certificates_have_to_be_those_of_a_client_of_the_federation() -> None:
    key, ours = client_key(7).public_key(), authority_key(OURS)
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    server = ExtendedKeyUsageOID.SERVER_AUTH
    cases = {
        "not one of this federation": signed_certificate(
            "client-7", key, authority_key("another")
        ),
        "is that of client-8": signed_certificate("client-8", key, ours),
        "is for another use": signed_certificate("client-7", key, ours, use=server),
        "has no key of P-384": signed_certificate("client-7", small, ours),
        "is valid from": signed_certificate("client-7", key, ours, begins=-9, ends=-1),
    }
    authority = Authority(authority_certificate(OURS))
    for said, certificate in cases.items():
        with pytest.raises(Refused, match=said):
            authority.key_of(7, der(certificate))
    as_authority = signed_certificate("client-7", key, ours, is_authority=True)
    for content in (b"", b"x" * 9000, der(as_authority)):
        with pytest.raises(Refused, match="client 7 is"):
            authority.key_of(7, content)
    assert authority.key_of(7, der(client_certificate(7))) == key


def test_an_identity_is_that_of_its_key_and_client() -> None:
    mine, others = client_certificate(0), client_certificate(1)
    ca = authority_certificate(OURS)
    with pytest.raises(Refused, match="has another key"):
        Identity(0, client_key(1), mine, ca)
    with pytest.raises(Refused, match="is that of client-1"):
        Identity(0, client_key(1), others, ca)
    with pytest.raises(Refused, match="not one of this federation"):
        Identity(0, client_key(0), mine, authority_certificate("another"))
    assert repr(identity_of(0)) == "<identity of client 0>"


def test_signed_and_unsigned_are_never_mixed() -> None:
    signed, unsigned = terms_of(5), terms_of(5, is_signed=False)
    with pytest.raises(Refused, match="client 3 has no certificate"):
        ClientSession(3, signed, DOWN)
    with pytest.raises(Refused, match="the server has no certificates"):
        ClientSession(3, unsigned, DOWN, (), identity_of(3))
    with pytest.raises(Refused, match="asked as client 3, and this is 4"):
        ClientSession(3, signed, DOWN, (), identity_of(4))
    secure = SecureSum(range(5))
    del secure.server._certificates[2]
    secure.run()
    assert "no clients/client-2.crt" in secure.server.blame[2]
    assert secure.is_exact()
