"""Reading gRPC's trace of its handshakes; the lines are gRPC 1.7x's own, shortened."""

from __future__ import annotations

import fedcore.server.handshakes
import pytest
from fedcore.server.handshakes import MOST, Handshakes

BEGIN = """\
W1125 07:57:42.665023   14614 log.cc:102] Log level INFO is not suitable for production.
I1125 07:57:44.657678   14650 handshaker.cc:155] CallNextHandshakerLocked: error=OK \
shutdown=false index=1, args={{endpoint=0x7f5, \
args={{grpc.internal.endpoint_peer_address=ipv4:10.0.0.7:4826, x=1}}}}
"""
FAILED = """\
I1125 07:57:44.657728   14650 ssl_transport_security.cc:2563] Handshake failed with \
error SSL_ERROR_SSL: error:100000f7: {why}
I1125 07:57:44.657745   14650 handshaker.cc:155] CallNextHandshakerLocked: \
error=UNKNOWN: Ssl handshake failed: {why}: Invalid: OK
=== Source Location Trace: ===
src/core/util/status_helper.cc:68
 shutdown=false index=2, args={{endpoint=0x7f5, \
args={{grpc.internal.endpoint_peer_address={peer}, x=1}}}}
I1125 07:57:44.657750   14650 channel_trace.h:396] handshake manager 0x7f5: Failed \
with error: UNKNOWN: Ssl handshake failed: {why}

"""


def read(reader: Handshakes, text: str) -> tuple[list[str], list[str]]:
    """(what is told, what is left for the log)."""
    answers = [
        (line, *reader.read(line.encode())) for line in text.splitlines(keepends=True)
    ]
    return [news for _, _, news in answers if news], [
        line for line, traced, _ in answers if not traced
    ]


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        ("HTTP_REQUEST", "does not speak TLS"),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not trust the server's certificate"),
    ],
)
def test_who_failed_the_handshake_is_named_with_the_reason(why: str, said: str) -> None:
    told, left = read(
        Handshakes(), (BEGIN + FAILED).format(why=why, peer="ipv6:%5B::1%5D:48260")
    )
    assert len(told) == 1
    assert said in told[0]
    assert "(from [::1]:48260)" in told[0]
    assert left == []


def test_a_handshake_that_went_well_is_not_mentioned_and_other_lines_stay() -> None:
    told, left = read(
        Handshakes(),
        BEGIN.format()
        + "refused client-0: replay\nWARNING: something of Flower's\n src/core/\n",
    )
    assert told == []
    assert left == [
        "refused client-0: replay\n",
        "WARNING: something of Flower's\n",
        " src/core/\n",
    ]


def test_a_scan_does_not_flood_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Handshakes()
    text = "".join(
        FAILED.format(why="HTTP_REQUEST", peer=f"ipv4:10.0.{i % 256}.9:{i}")
        for i in range(2000)
    )
    told, left = read(reader, text)
    assert len(told) == MOST
    assert told[-1].endswith("no more are named for a while")
    assert left == []
    monkeypatch.setattr(fedcore.server.handshakes, "REPEAT", 0.0)
    assert (
        len(read(reader, FAILED.format(why="HTTP_REQUEST", peer="ipv4:10.0.0.9:1"))[0])
        == 1
    )
