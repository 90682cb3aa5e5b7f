"""Texts and who wrote them, and the parts that they are divided into."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from fedcore.errors import SettingsError

__all__ = ["Division", "Text", "by_client", "divided", "fingerprints", "joined"]


class Text(NamedTuple):
    """One text, such as a speech or a message."""

    content: str
    client: str | None = None  # who wrote it, where that is known
    label: str | int | None = None  # its class, where there are classes


class Division(NamedTuple):
    """The text of every client, by name, in order of appearance; disjoint."""

    base: dict[str, str]  # of the base model alone
    clients: dict[str, str]  # those that take part
    unseen: dict[str, str]  # smaller than `least`: tested on alone


def by_client(texts: list[Text]) -> dict[str, str]:
    """All text of each client, in order of appearance; a text ends with a newline.

    >>> by_client([Text("To be", "Hamlet"), Text("Ay", "All"), Text("or", "Hamlet")])
    {'Hamlet': 'To be\\nor\\n', 'All': 'Ay\\n'}
    """
    contents: dict[str, list[str]] = {}
    for text in texts:
        assert text.client is not None, "texts without clients are given some first"
        contents.setdefault(text.client, []).append(text.content)
    whole = {}
    for client, parts in contents.items():
        whole[client] = "\n".join(parts) + "\n"
    return whole


def divided(texts: dict[str, str], share: float, least: int) -> Division:
    """Clients in order of appearance until `share` of all characters are the base's.

    Those after them with at least `least` characters take part. Raises SettingsError
    when no client does.

    >>> divided({"a": "12345", "b": "1234", "c": "1"}, share=0.5, least=2).clients
    {'b': '1234'}
    """
    total = sum(map(len, texts.values()))
    base: dict[str, str] = {}
    clients: dict[str, str] = {}
    unseen: dict[str, str] = {}
    taken = 0
    for name, text in texts.items():
        if taken < share * total:
            base[name] = text
            taken += len(text)
        elif len(text) >= least:
            clients[name] = text
        else:
            unseen[name] = text
    if not clients:
        raise SettingsError(_nobody(base, unseen, share, least))
    return Division(base, clients, unseen)


def _nobody(
    base: dict[str, str], unseen: dict[str, str], share: float, least: int
) -> str:
    """Why no client takes part."""
    if not unseen:
        return (
            f"text.base = {share}: all {len(base)} clients are the base's, and none "
            "is left to take part; lower it"
        )
    longest = max(map(len, unseen.values()))
    return (
        f"text.least = {least}: none of the {len(unseen)} clients has so many "
        f"characters, the largest has {longest}; lower it"
    )


def joined(texts: dict[str, str]) -> str:
    """The text of several clients as one, a newline between two of them."""
    return "\n".join(texts.values())


def fingerprints(texts: dict[str, str]) -> list[str]:
    """The sha256 of each client's text, its first 64 bits in hex, in order.

    They tell whether a base has seen a text, without telling the text.

    >>> fingerprints({"a": "abc"})
    ['ba7816bf8f01cfea']
    """
    digests = []
    for text in texts.values():
        content = text.encode("utf-8", errors="surrogatepass")
        digests.append(hashlib.sha256(content).hexdigest()[:16])
    return digests
