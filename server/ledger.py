"""The arrivals of a run on nodes: what was sent, and when it was back.

Answers that come when nobody waits for them any more have rows too: a client that is
always late would else look as if it took for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fedcore import trees
from fedcore.clock.arrivals import Arrival

from .post import LateReply
from .replies import Answer, Measure, measures_in

LATE = "late"  # outcome of an answer that came after its exchange


class Sent(NamedTuple):
    """Work that was sent, as the rows of its arrivals have it."""

    version: int
    function: str
    sent_us: int  # as `fedcore.engines.base.stamp`
    bytes_down: int

    def row(
        self, client: int, back_us: int, answer: Answer, measure: Measure
    ) -> Arrival:
        """The row of an answer; `back_us` is -1 where none came."""
        reason, bytes_up, steps, work_us = "", 0, 0, 0
        if isinstance(answer, str):
            reason = answer
        else:
            bytes_up = trees.nbytes(answer[0])
        if back_us >= 0:  # a device's clock is believed as far as it can be right
            steps = measure.steps
            work_us = min(measure.work_us, back_us - self.sent_us)
        return Arrival(
            0,  # its update, and its order in the run, are not known here
            0,
            client,
            self.version,
            self.function,
            self.sent_us,
            back_us,
            reason.split(":")[0],
            self.bytes_down,
            bytes_up,
            steps,
            work_us,
        )


class _Expected(NamedTuple):
    sent: Sent
    clients: list[int]


class Ledger:
    """Rows since they were last taken, and works whose answers are late."""

    def __init__(self) -> None:
        self._rows: list[Arrival] = []
        self._expected: dict[str, _Expected] = {}  # by message

    def add(
        self,
        sent: Sent,
        back_us: int,
        answers: Mapping[int, Answer],
        measures: Mapping[int, Measure],
    ) -> None:
        """Rows of clients whose answers, or reasons for none, are there."""
        for client, answer in answers.items():
            measure = measures.get(client, Measure())
            self._rows.append(sent.row(client, back_us, answer, measure))

    def expect(self, message_id: str, sent: Sent, clients: list[int]) -> None:
        """Take a late answer to this message, should one come."""
        self._expected[message_id] = _Expected(sent, clients)

    def note_late(self, replies: list[LateReply]) -> None:
        """Rows of late answers; messages that can have none are forgotten."""
        for message_id, reply, back_us in replies:
            expected = self._expected.pop(message_id, None)
            if expected is None or reply is None or reply.has_error():
                continue
            sent, clients = expected
            measures = measures_in(reply.content, clients)
            for client in clients:
                measure = measures.get(client, Measure())
                self._rows.append(sent.row(client, back_us, LATE, measure))

    def take(self, update: int) -> list[Arrival]:
        """The rows since the last call, as those of this update."""
        rows, self._rows = self._rows, []
        return [row._replace(update=update) for row in rows]
