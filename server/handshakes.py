"""Callers that fail the TLS handshake, read from gRPC's trace of its handshakes.

They come without TLS, or do not trust the server's certificate. Such a connection ends
before there is a call, and no interceptor hears of it. Its reason and address stand in
the trace of gRPC's core alone (TRACE, on stderr).
"""

from __future__ import annotations

import re
import time
from urllib.parse import unquote

# Environment of the SuperLink.
TRACE = {"GRPC_TRACE": "handshaker", "GRPC_VERBOSITY": "INFO"}
REPEAT = 60.0  # seconds in which an address is named once
MOST = 10  # addresses named in that time, for a scan of ports comes from many

_PLAIN = (
    "a caller that does not speak TLS: a client of this server needs its directory of "
    "keys, --certs (fedcore certs makes it)"
)
_DISTRUST = (
    "a caller that does not trust the server's certificate: "
    "is the ca.crt in its --certs of another federation?"
)
_WHY = {
    b"WRONG_VERSION_NUMBER": _PLAIN,
    b"HTTP_REQUEST": _PLAIN,
    b"ALERT_UNKNOWN_CA": _DISTRUST,
    b"ALERT_BAD_CERTIFICATE": _DISTRUST,
    b"ALERT_CERTIFICATE_UNKNOWN": _DISTRUST,
}

_FIRST = re.compile(
    rb"[IW]\d{4} \S+ +\d+ "
    rb"(handshaker\.cc|channel_trace\.h|ssl_transport_security\.cc|trace\.cc|log\.cc):"
)
_MORE = re.compile(rb"=== Source Location Trace|src/core/| shutdown=|\s*$")
_PEER = re.compile(rb"endpoint_peer_address=[a-z0-9]+:([^,}\s]+)")


class Handshakes:
    """Reads the SuperLink's stderr line by line."""

    def __init__(self) -> None:
        self._is_inside = False  # of an entry of the trace, which may have many lines
        self._reason = ""  # why the handshake of this entry failed
        self._said: dict[str, float] = {}  # hosts that were named, and when

    def read(self, line: bytes) -> tuple[bool, str | None]:
        """(whether the line is of the trace, what to tell the user)."""
        if first := _FIRST.match(line):
            self._is_inside, self._reason = True, ""
            if first[1] == b"handshaker.cc" and b"handshake failed" in line:
                self._reason = _reason_in(line)
            return True, None
        self._is_inside = self._is_inside and bool(_MORE.match(line))
        if self._is_inside and self._reason and (peer := _PEER.search(line)):
            return True, self._news(unquote(peer[1].decode(errors="replace")))
        return self._is_inside, None

    def _news(self, peer: str) -> str | None:
        now, host = time.monotonic(), peer.rpartition(":")[0]
        for name, at in list(self._said.items()):
            if now - at >= REPEAT:
                del self._said[name]
        if host in self._said or len(self._said) >= MOST:
            return None
        self._said[host] = now
        news = f"refused {self._reason} (from {peer})"
        if len(self._said) == MOST:
            news += (
                f"; this is the {MOST}th in {REPEAT:.0f} s, "
                "and no more are named for a while"
            )
        return news


def _reason_in(line: bytes) -> str:
    for mark, reason in _WHY.items():
        if mark in line:
            return reason
    return ""
