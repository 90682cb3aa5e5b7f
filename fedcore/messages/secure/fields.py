"""Messages of several clients as the fields of one record, and back.

Transports send each record in calls of its own, which cost more than what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["by_client", "flat"]

MARK = "."


def flat(messages: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of all messages, each with its client in front.

    >>> flat({3: {"c": b"x"}, 5: {"c": b"y"}})
    {'3.c': b'x', '5.c': b'y'}
    """
    fields = {}
    for client, message in messages.items():
        for name, value in message.items():
            fields[f"{client}{MARK}{name}"] = value
    return fields


def by_client(fields: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The messages again; other fields are left out.

    >>> by_client({"t": 2, "3.c": b"x", "03.s": b"", "-1.c": b"", "5.": 1})
    {3: {'c': b'x'}, 5: {'': 1}}
    """
    messages: dict[int, dict[str, Any]] = {}
    for key, value in fields.items():
        client, mark, name = key.partition(MARK)
        is_number = client.isascii() and client.isdigit() and len(client) < 20
        if mark and is_number and str(int(client)) == client:
            messages.setdefault(int(client), {})[name] = value
    return messages
