"""A client's part in secure sums, as messages of Flower: five exchanges, E1 to E5.

A message is about one exchange, and about the clients that its node hosts:

    work      {function, t, k, series, safe, clients, exchange}; and for client 3
              what the server has for it (`fedcore.messages.secure`): 3.ids, 3.keys, ...
    down      the model, in E1
    places    in E1 for client 3: 3.moment, under which the server counts on what it
              remembers (t 2^16 + k; -1 for nothing yet), and 3.void, those of its
              works that are in no sum: their states are forgotten

    about     {t, exchange, clients, failed, reasons}; and what client 3 answers: 3.c
    masked-3  in E3 an array, its masked vector

The client trains in E1, so that the other exchanges take moments. It refuses by itself
whatever could show its message; the reason goes to the server, which leaves it out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedcore import trees
from fedcore.config import Experiment
from fedcore.deploy import certs
from fedcore.engines.base import Work, failure, one_thread
from fedcore.errors import FedcoreError, RunError
from fedcore.messages import wire
from fedcore.messages.moment import Moment
from fedcore.messages.secure import primitives
from fedcore.messages.secure.ask import Ask, Part
from fedcore.messages.secure.client_session import ClientSession, Refused
from fedcore.messages.secure.distributed import DistributedNoise, check_threshold
from fedcore.messages.secure.fields import by_client, flat
from fedcore.messages.secure.identity import Identity
from fedcore.messages.secure.masks import Vector
from fedcore.messages.secure.ring import Encoded, Ring
from fedcore.messages.secure.sending import Sending, Unusable
from fedcore.messages.secure.terms import LISTED, Terms, question_digest, read_offer
from fedcore.method import evaluates
from fedcore.rounds.setup import agreed_by
from fedcore.types import Tree

from .assignment import Assignment, store_of
from .marks import Marks
from .sessions import Sessions

log = logging.getLogger("fedcore")

VECTOR = "vector"


def take_part(
    message: Message, context: Context, work_for: Callable[[Context], Work]
) -> Message:
    """Answer one exchange for this node's clients.

    Failures and refusals are answered, not raised.
    """
    ask: Any = message.content["work"]
    clients, exchange = [int(client) for client in ask["clients"]], int(ask["exchange"])
    content, done, failed = RecordDict(), dict[int, Any](), dict[int, str]()
    try:
        node = Node(message, context)
        answer = node.answers(exchange, work_for)
    except Exception as error:
        failed.update(failure(clients, error).failed)
        clients = []
    for client in clients:
        try:
            done[client] = answer(client)
        except Exception as error:  # one client fails, the node's others do not
            failed[client] = _reason(error, client)
            node.sessions.drop(client)
            text = failed[client] if isinstance(error, FedcoreError) else repr(error)
            log.warning("client %d left a secure sum: %s", client, text)
    about: dict[str, Any] = {
        "t": int(ask["t"]),
        "exchange": exchange,
        "clients": [*done],
        "failed": [*failed],
        "reasons": [*failed.values()],
    }
    for client, reply in done.items():
        if isinstance(reply, ArrayRecord):
            content[f"masked-{client}"] = reply
        else:
            about |= flat({client: reply})
    content["about"] = ConfigRecord(about)
    return Message(content, reply_to=message)


def _reason(error: Exception, client: int) -> str:
    if isinstance(error, Refused):
        return f"refused: {error}"
    if isinstance(error, Unusable):
        return str(error)
    if not isinstance(error, FedcoreError):  # a text of others may quote the data
        return f"error: {type(error).__name__}; the client's own log has its text"
    return failure([client], error).failed[client]


Answer = Callable[[int], primitives.Message | ArrayRecord]


class Node:
    """What a device needs in every exchange."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        ask: Any = message.content["work"]
        self._arrived = by_client(ask)
        self.moment = Moment(int(ask["t"]), int(ask["k"]))
        series, self.function = str(ask["series"]), str(ask["function"])
        self.run = f"{series}/{self.moment.t}/{self.moment.k}/{self.function}"
        self.store = store_of(context, ask)
        self.marks = Marks(self.store)
        # The warm SuperNode alone says to which federation it belongs.
        self.sessions = Sessions(self.store, "federation" in context.node_config)

    def answers(self, exchange: int, work_for: Callable[[Context], Work]) -> Answer:
        """The function that answers this exchange for one client."""
        if exchange == 1:
            return Trained(self, work_for(self.context)).keys
        later: dict[int, Answer] = {
            2: self._shares,
            3: self._masked,
            4: self._survivors,
            5: self._unmask,
        }
        if exchange not in later:
            raise Refused(f"there is no exchange {exchange}")
        return later[exchange]

    def arrived(self, client: int) -> primitives.Message:
        """What the server has for one client. Raises Refused without it."""
        if client not in self._arrived:
            raise Refused("the message has no part for this client")
        return self._arrived[client]

    def identity_of(self, client: int) -> Identity | None:
        """The client's own key and certificate; None on a device that has none.

        Raises Refused where the device is another client: without a certificate it
        would believe any key.
        """
        node = self.context.node_config
        nodes, own = node.get("num-partitions"), node.get("partition-id")
        if own is not None:
            number = client if nodes is None else client % int(str(nodes))
            if number != int(str(own)):
                raise Refused(f"asked as client {client}, and this is {own}")
        folder = str(node.get("certs", ""))
        return identity_in(folder, client) if folder else None

    def _session(self, client: int) -> ClientSession:
        return self.sessions.take(client, self.run, self.identity_of(client))

    def _shares(self, client: int) -> primitives.Message:
        session, roster = self._session(client), self.arrived(client)
        answer = session.shares(roster)
        check_threshold(session.terms.settings, int(roster["t"]))
        self.sessions.keep(session)
        return answer

    def _masked(self, client: int) -> ArrayRecord:
        session = self._session(client)
        vector: Vector = session.masked(self.arrived(client))
        self.sessions.keep(session)
        array = Array("uint8", vector.shape, VECTOR, vector.tobytes())
        return ArrayRecord({VECTOR: array})

    def _survivors(self, client: int) -> primitives.Message:
        session = self._session(client)
        answer = session.survivors(self.arrived(client))
        self.sessions.keep(session)
        return answer

    def _unmask(self, client: int) -> primitives.Message:
        session = self._session(client)
        answer = session.unmask(self.arrived(client))
        self.sessions.drop(client)
        # Before it leaves: from now on this message may be known in a sum.
        self.marks.write(client, self.moment, self.function)
        return answer


class Trained:
    """The first exchange: the client's work is done, and its keys are sent."""

    def __init__(self, node: Node, work: Work) -> None:
        if work.sending is None:
            raise RunError("a secure sum, in a run without aggregation.secure = true")
        self._node, self._sending = node, work.sending
        self._assignment = Assignment(node.message, node.context, work)
        data = self._assignment.record[wire.FORMAT].data
        self._down = question_digest(data, settings_of(node.context))
        self._memory = node.store.of_kind("memory")
        places = node.message.content.get("places")
        self._places = by_client(places) if isinstance(places, ConfigRecord) else {}

    def keys(self, client: int) -> primitives.Message:
        """E1: the client's public keys, once it has trained."""
        node, assignment = self._node, self._assignment
        node.sessions.drop(client)
        node.marks.refuse(client, node.moment, node.function)
        terms, weights = read_offer(node.arrived(client))
        if terms.run != node.run:
            raise Refused(f"terms of {terms.run[:80]}, in a message for {node.run}")
        identity = node.identity_of(client)
        # Before the training, which would be for nothing.
        session = ClientSession(client, terms, self._down, weights, identity)
        sending = self._with_noise(terms)
        self._forget_void(client)
        up, state = assignment.run(client)
        counted, remembered = self._remembered(client, terms)
        ask = self._ask(client, terms, weights)
        with one_thread():
            sent = sending.send(ask, client, up, assignment.count(client), remembered)
        answer = session.keys(*_words(sent.encoded))
        if terms.news:
            self._memory.keep(
                client, node.moment, sent.remembered, counted, assignment.safe
            )
        assignment.keep_state(client, state)
        node.sessions.keep(session)
        return answer

    def _with_noise(self, terms: Terms) -> Sending:
        """What makes integers of the message, with noise of this device's own."""
        work = self._assignment.work
        own = work.defence.settings.distributed
        if own.is_active and not evaluates(self._assignment.fn):
            noising = DistributedNoise.on_device(own, terms.settings, work.seed)
            return self._sending.with_noise(noising)
        if terms.settings:
            raise Refused(f"settings {terms.settings[:80]!r}, and clients add no noise")
        return self._sending

    def _ask(self, client: int, terms: Terms, weights: list[float]) -> Ask:
        """What this client alone is asked to add to the sum."""
        own = iter(weights)
        parts = []
        for name, rule in zip(terms.fields, terms.rules, strict=True):
            weights_of: Any = rule
            if rule == LISTED:
                weights_of = torch.tensor([next(own)], dtype=torch.float64)
            parts.append(Part(name, weights_of))
        ring = Ring(terms.n_max, terms.reach, terms.cap)
        assignment = self._assignment
        return Ask(
            assignment.fn,
            torch.tensor([client]),
            assignment.down,
            assignment.t,
            tuple(parts),
            ring,
            terms.news or None,
        )

    def _forget_void(self, client: int) -> None:
        """Delete the states of works whose message is in no sum."""
        void = self._places.get(client, {}).get("void", [])
        moments = [Moment.of(int(number)) for number in void]
        if self._assignment.store is not None and not evaluates(self._assignment.fn):
            self._assignment.store.drop(client, moments)

    def _remembered(self, client: int, terms: Terms) -> tuple[Moment | None, Tree]:
        """(when the client last came into a sum, what it remembers of that)."""
        if not terms.news:
            return None, None
        work = self._assignment.work
        if terms.news.startswith("_") or not terms.news.isidentifier():
            raise Refused(f'"{terms.news[:40]}" is no function of the method')
        first = work.method.init_memory(work.task.init_params())
        number = int(self._places.get(client, {}).get("moment", -1))
        if number < 0:
            return None, trees.to(first, work.task.device)
        counted = Moment.of(number)
        row = self._memory.exact(client, counted, first)
        return counted, trees.to(row, work.task.device)


def settings_of(context: Context) -> bytes:
    """What stands for the settings that the server sent: the others have them too.

    Those of this device alone are not among them.
    """
    config = context.run_config
    return _settings_in(str(config["preset"]), str(config["set"]))


@lru_cache(maxsize=1)
def _settings_in(preset: str, overrides: str) -> bytes:
    return agreed_by(Experiment.load(preset, overrides.split()))


def _words(encoded: Encoded) -> tuple[Any, Any]:
    """Numbers and words without a sign, as masks are added to them."""
    numbers = encoded.numbers.contiguous().numpy().view("uint32")
    words = encoded.words.contiguous().numpy().view("uint64")
    return numbers, words


@lru_cache(maxsize=64)
def identity_in(folder: str, client: int) -> Identity | None:
    """The identity in a client's directory of keys; None for one of before.

    Raises SettingsError for files that cannot be read, Refused for another client's.
    """
    place = Path(folder)
    certificate = place / f"client-{client}.crt"
    if not certificate.exists():
        return None
    return Identity(
        client,
        certs.load_private(place / "client.key"),
        certs.load_certificate(certificate),
        certs.load_certificate(place / "ca.crt"),
    )
