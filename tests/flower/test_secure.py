"""Secure sums over Flower: the real ClientApp, and a grid in process."""

from __future__ import annotations

import itertools
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fedcore.client.secure
import fedcore.server.post
import fedcore.server.secure
import pytest
import torch
from fedcore.client.marks import Marks
from fedcore.client.store import StateError, Store
from fedcore.server.app import Safe
from fedcore.server.grid import GridEngine
from fedcore.server.journal import Entry, Journal, Void
from fedcore.server.secure import answers_in
from fedcore.server.sums import Securing
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedcore.config import Experiment
from fedcore.errors import RunError
from fedcore.messages.moment import Moment
from fedcore.messages.secure.ask import Ask, Part, SecretTotal
from fedcore.messages.secure.fields import by_client, flat
from fedcore.messages.secure.primitives import Refused
from fedcore.messages.secure.ring import Encoded, Ring
from fedcore.rounds import opening
from fedcore.rounds.loop import run
from fedcore.rounds.secret import SecretSums
from fedcore.rounds.setup import work_of
from fedcore.types import Model, Stateless
from tests.flower.fake import FakeGrid, in_place_of
from tests.flower.test_grid import over_flower, preset_of
from tests.helpers import slow, small

SECURE: dict[str, Any] = {"aggregation": {"secure": True}}
CAPPED: dict[str, Any] = {"method__cutoff": 8}


def secure(name: str, **settings: Any) -> Experiment:
    """A run of milliseconds whose sums are secret."""
    return small(name, **{**SECURE, **settings})


def facts_of(reply: Message) -> dict[str, Any]:
    """What a reply says of itself; {} for one that is no exchange of a sum."""
    about = reply.content.get("about")
    facts = dict(about) if isinstance(about, ConfigRecord) else {}
    return facts if "exchange" in facts else {}


Edit = Callable[[Message], list[Message]]


def in_exchange(number: int, t: int, client: int, edit: Edit) -> Edit:
    """Weather for the reply about one client in one exchange of round t."""

    def weather(reply: Message) -> list[Message]:
        facts = facts_of(reply)
        is_it = facts.get("exchange") == number and facts["t"] == t
        if is_it and client in facts["clients"]:
            return edit(reply)
        return [reply]

    return weather


def gone(reply: Message) -> list[Message]:
    return [in_place_of(reply, ErrorCode.NODE_UNAVAILABLE, "gone")]


def without(clients: dict[int, list[int]], patch: pytest.MonkeyPatch) -> None:
    """In this process these clients, by round t, drop out."""
    answering = opening.answering

    def some(cohort: torch.Tensor, dropout: float, seed: int, t: int) -> torch.Tensor:
        there = answering(cohort, dropout, seed, t)
        absent = torch.tensor(clients.get(t, []), dtype=torch.int64)
        return there[~torch.isin(there, absent)]

    patch.setattr(opening, "answering", some)


# Where all goes well


OTHERS = ["fedavg", "scaffold", "fedau", "fedsim", "fedvarp", "fedamd", "mifa"]


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("scaffold", 5), ("fedvarp", 12), *(slow(name, 12) for name in OTHERS)],
)
def test_devices_add_up_to_the_bits_of_the_simulation(
    name: str, nodes: int, tmp_path: Path
) -> None:
    e = secure(name, **(CAPPED if name == "fedau" else {}))
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), nodes))
    assert other.params_sha256 == one.params_sha256
    assert other.final == one.final
    assert other.dropped == {}


def test_a_session_is_a_file_for_its_owner_and_gone_after_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: set[int] = set()

    def look(reply: Message) -> list[Message]:
        for file in (tmp_path / "kept").glob("run/client-*/session"):
            modes.add(stat.S_IMODE(file.stat().st_mode))
        return [reply]

    e = secure("fedavg", rounds=1)
    over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, look))
    assert modes == {0o600}
    assert not list((tmp_path / "kept").glob("run/client-*/session"))
    marks = list((tmp_path / "kept").glob("run/client-*/summed.json"))
    assert len(marks) == 12  # the cohort, and the others were evaluated


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# A client that is lost in an exchange of round t = 1


def cohort_of(e: Experiment, t: int) -> list[int]:
    """Clients of round t."""
    process = e.participation.process(12, e.seed, lambda: None)  # type: ignore
    return process.sample(t, process.start())[0].tolist()


LOST = itertools.product(["fedavg", "scaffold", "fedvarp"], [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("name", "exchange"),
    [("scaffold", 3), ("fedvarp", 4), *itertools.starmap(slow, LOST)],
)
def test_a_client_lost_in_an_exchange_is_as_if_it_had_not_come(
    name: str, exchange: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state and its memory, too. Once its vector has arrived it is in the sum."""
    e = secure(name, participation__cohort=6)
    client = cohort_of(e, 1)[2]
    weather = in_exchange(exchange, 1, client, gone)
    monkeypatch.setattr(fedcore.server.secure, "GRACE", 0.0)
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    lost = {1: [client]} if exchange <= 3 else {}
    with monkeypatch.context() as patch:
        without(lost, patch)
        one = run(e, tmp_path / "sequential")
    assert other.params_sha256 == one.params_sha256
    rows = rows_of(tmp_path)
    dropped = {"disconnected": 1} if exchange <= 3 else {}
    assert [row["dropped"] for row in rows] == [{}, dropped, {}, {}]
    assert rows[1]["reports"] == 6 - len(dropped)


def test_below_the_threshold_the_round_is_skipped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = secure("scaffold")
    lost = cohort_of(e, 1)[:2]

    def weather(reply: Message) -> list[Message]:
        facts = facts_of(reply)
        is_it = facts.get("exchange") == 3 and facts["t"] == 1
        if is_it and not set(lost).isdisjoint(facts["clients"]):
            return gone(reply)
        return [reply]

    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [False, True, False, False]
    with monkeypatch.context() as patch:
        without({1: cohort_of(e, 1)}, patch)
        one = run(e, tmp_path / "sequential")
    assert other.params_sha256 == one.params_sha256, "states went on without a sum"


# Once a round, whatever is asked


def asked_in(grid: FakeGrid) -> list[tuple[int, int]]:
    """(t, exchange) of every message of a sum that went to a node from now on."""
    seen: list[tuple[int, int]] = []
    push = grid.push_messages

    def noting(messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            work = message.content.get("work")
            facts: Any = dict(work) if isinstance(work, ConfigRecord) else {}
            if "exchange" in facts and facts["function"] == "train":
                seen.append((facts["t"], facts["exchange"]))
        return push(messages)

    grid.push_messages = noting  # type: ignore[method-assign]
    return seen


def engine_of(grid: FakeGrid, folder: Path) -> Callable[[Any], GridEngine]:
    """A server with a journal, whose clients have their own directories."""
    securing = Securing(checkpoint=folder / "run" / "checkpoint")

    def make(work: Any) -> GridEngine:
        kept = folder / "kept"
        return GridEngine(
            grid,  # type: ignore[arg-type]
            work,
            60,
            series="s",
            safe=Safe(folder / "run"),
            state=kept,
            securing=securing,
        )

    return make


def test_a_server_killed_between_the_sum_and_its_use_asks_nobody_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = secure("scaffold", checkpoint__seconds=1e6)  # none before the end
    expected = run(e, tmp_path / "sequential")
    weather = in_exchange(4, 1, cohort_of(e, 1)[0], edited(lambda fields: {"other": 1}))
    grid = FakeGrid(preset_of(e, tmp_path), 12, weather)
    make, check = engine_of(grid, tmp_path), SecretSums.check

    def killed(self: SecretSums, ask: Any, made: SecretTotal) -> None:
        if ask.t == 2:
            raise SystemExit("killed")
        check(self, ask, made)

    monkeypatch.setattr(SecretSums, "check", killed)
    with pytest.raises(SystemExit):
        run(e, tmp_path / "run", engine=make)
    monkeypatch.setattr(SecretSums, "check", check)
    seen = asked_in(grid)
    result = run(e, resume=tmp_path / "run", engine=make)
    assert result.params_sha256 == expected.params_sha256
    assert result.final == expected.final
    assert {t for t, _ in seen} == {3}, "rounds 1 to 3 had their sums"
    assert rows_of(tmp_path)[1]["dropped"] == {"bad message": 1}, "named as before"
    sums = tmp_path / "run" / "checkpoint" / "sums"
    assert not list(sums.glob("*.safetensors")), "the last checkpoint has them"


def test_without_its_journal_a_server_gets_no_second_sum(tmp_path: Path) -> None:
    e = secure("fedavg", rounds=3)
    grid = FakeGrid(preset_of(e, tmp_path), 12)
    run(e, tmp_path / "run", engine=engine_of(grid, tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").symlink_to(tmp_path / "kept")
    with pytest.raises(RunError, match=r"no usable update in 3 round.*refused"):
        run(e, other / "run", engine=engine_of(grid, other))
    rows = rows_of(other)
    assert [row["dropped"] for row in rows] == [{"refused": 5}] * 3


def test_a_client_sends_nothing_in_the_clear_where_sums_are_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server asks that would rather have each message."""
    e = secure("fedavg", rounds=1)
    grid = FakeGrid(preset_of(e, tmp_path), 12)
    kept = tmp_path / "kept"
    kept.mkdir()
    reports = []

    def ask(work: Any) -> GridEngine:
        engine = GridEngine(grid, work, 60, state=kept)  # type: ignore[arg-type]
        down = Model(work.task.init_params())
        reports.extend(engine.each(work.method.train, torch.arange(12), down, 0))
        raise SystemExit

    with pytest.raises(SystemExit):
        run(e, tmp_path / "run", engine=ask)
    failed = {client: r.failed[client] for r in reports for client in r.failed}
    assert set(failed) == {*range(12)}
    assert "was asked for it in the clear" in failed[3]
    assert not any(len(report.clients) for report in reports)


def test_a_device_that_wants_sums_alone_takes_no_part_in_another_run(
    tmp_path: Path,
) -> None:
    e = small("fedavg", rounds=1, participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 12)
    grid.contexts[103].node_config["secure"] = True
    result = over_flower(e, tmp_path, grid)
    assert result.dropped == {"error": 1}
    assert rows_of(tmp_path)[0]["left_out"] == {"error": [3]}


def test_a_mark_outlives_the_process_and_a_deleted_state(tmp_path: Path) -> None:
    store = Store(tmp_path, "f", "s")
    Marks(store).write(3, Moment(4, 1), "train")
    marks = Marks(Store(tmp_path, "f", "s"))
    marks.refuse(3, Moment(5, 0), "train")
    marks.refuse(2, Moment(0, 0), "train")  # another client of this node
    for at in (Moment(4, 1), Moment(4, 0), Moment(0, 5)):
        with pytest.raises(Refused, match="a sum of round 5 already"):
            marks.refuse(3, at, "train")
    (tmp_path / "s" / "client-3" / "summed.json").write_text("{")
    with pytest.raises(StateError, match=r"summed.json cannot be read"):
        marks.refuse(3, Moment(9, 0), "train")
    (tmp_path / "s" / "forgotten").touch()
    with pytest.raises(StateError, match="was deleted on this device"):
        marks.refuse(2, Moment(9, 0), "train")


# What the journal keeps


def total_of(*clients: int) -> SecretTotal:
    numbers = torch.tensor([1, -2, 2**31 - 1], dtype=torch.int32)
    return SecretTotal(Encoded(numbers, torch.tensor([-1, 2**40])), [*clients], 7, 99)


def test_a_journal_gives_back_what_was_written_for_the_same_question(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "sums")
    assert journal.read(3, 0, "q") is None
    journal.write(3, 0, "q", Entry(total_of(1, 4)))
    journal.write(3, 1, "q", Entry(SecretTotal(bytes_up=5), "2 clients sent keys"))
    again = Journal(tmp_path / "sums")
    entry = again.read(3, 0, "q")
    assert entry is not None
    assert entry.fault == ""
    assert (entry.total.clients, entry.total.moment) == ([1, 4], 7)
    assert entry.total.bytes_up == 99
    assert entry.total.total is not None
    wanted = total_of().total
    assert wanted is not None
    assert torch.equal(entry.total.total.numbers, wanted.numbers)
    assert torch.equal(entry.total.total.words, wanted.words)
    fault = again.read(3, 1, "q")
    assert fault is not None
    assert fault.total.total is None
    assert fault.fault == "2 clients sent keys"
    assert again.read(3, 0, "another model") is None
    again.write(-1, 0, "q", Entry(total_of(1)))  # before the first round
    again.prune(0)
    assert again.read(-1, 0, "q") is not None
    again.prune(3)  # rounds in the checkpoint: t = 0, 1, 2
    assert again.read(-1, 0, "q") is None
    assert again.read(3, 0, "q") is not None
    again.prune(4)
    assert again.read(3, 0, "q") is None


def test_a_damaged_journal_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.write(0, 0, "q", Entry(total_of(1)))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert journal.read(0, 0, "q") is None
    assert "is damaged" in caplog.text


def test_works_in_no_sum_are_told_once_the_client_is_back(tmp_path: Path) -> None:
    void = Void(tmp_path)
    void.update(told=[1, 2], void=[2, 3], work=5)
    void.update(told=[1], void=[3], work=6)
    again = Void(tmp_path)
    assert [again.of(client) for client in (1, 2, 3)] == [[], [5], [5, 6]]
    again.update(told=[3], void=[], work=7)
    assert Void(tmp_path).of(3) == []


# What clients remember (methods with news)


def test_memory_is_kept_under_its_moment_and_missing_is_named(tmp_path: Path) -> None:
    like = {"h": torch.zeros(2)}
    memory = Store(tmp_path, "f", "s").of_kind("memory")
    one, two, three = Moment(1, 0), Moment(2, 0), Moment(4, 0)
    memory.keep(0, one, {"h": torch.ones(2)}, None, safe=0)
    memory.keep(0, two, {"h": 2 * torch.ones(2)}, one, safe=0)
    assert memory.exact(0, one, like)["h"][0] == 1  # the second came to nothing
    assert memory.exact(0, two, like)["h"][0] == 2
    memory.keep(0, three, {"h": 3 * torch.ones(2)}, one, safe=3)
    with pytest.raises(StateError, match=r"memory/000002-00.safetensors is missing"):
        memory.exact(0, two, like)
    assert memory.exact(0, one, like)["h"][0] == 1
    states = Store(tmp_path, "f", "s")
    assert states.load(0, Moment(9, 0), like) is like, "memory is no state"


# Replies of hostile devices


def edited(edit: Callable[[Any], Any]) -> Edit:
    """Weather that changes what a client answers: its fields, or its array."""

    def weather(reply: Message) -> list[Message]:
        about: Any = reply.content["about"]
        (client,) = about["clients"]
        sent = reply.content.pop(f"masked-{client}", by_client(about).get(client))
        others = {key: about[key] for key in about if "." not in key}
        changed = edit(sent)
        if isinstance(changed, ArrayRecord):
            reply.content[f"masked-{client}"] = changed
        else:
            others |= flat({client: changed})
        reply.content["about"] = ConfigRecord(others)
        return [reply]

    return weather


def shorter(record: Any) -> ArrayRecord:
    data = record["vector"].data[:-8]
    return ArrayRecord({"vector": Array("uint8", (len(data),), "vector", data)})


def other_fields(fields: Any) -> dict[str, Any]:
    return {**fields, "c": b"short"}


# By what is wrong: the exchange, and the kind under which the client is left out.
LIES: dict[str, tuple[int, Edit, str]] = {
    "keys that are none": (1, edited(other_fields), "bad message"),
    "a field too many": (2, edited(other_fields), "bad message"),
    "a vector too short": (3, edited(shorter), "bad message"),
    "a vector in another place": (
        3,
        edited(lambda record: {"vector": b"x"}),
        "no update",
    ),
}


@pytest.mark.parametrize("lie", ["a vector too short", *(slow(lie) for lie in LIES)])
def test_a_client_that_lies_is_named_and_the_sum_of_the_others_exact(
    lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, edit, kind = LIES[lie]
    e = secure("fedavg", participation__cohort=6)
    client = cohort_of(e, 1)[2]
    weather = in_exchange(exchange, 1, client, edit)
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    assert other.dropped == {kind: 1}
    assert rows_of(tmp_path)[1]["left_out"] == {kind: [client]}
    with monkeypatch.context() as patch:
        without({1: [client]}, patch)
        assert other.params_sha256 == run(e, tmp_path / "sequential").params_sha256


def test_wrong_shares_are_named_and_the_sum_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = secure("fedavg", participation__cohort=6)
    client = cohort_of(e, 1)[2]

    def wrong(fields: Any) -> dict[str, Any]:
        return {"shares": bytes(len(fields["shares"]))}

    weather = in_exchange(5, 1, client, edited(wrong))
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 12, weather))
    assert rows_of(tmp_path)[1]["left_out"] == {"bad message": [client]}
    assert other.params_sha256 == run(e, tmp_path / "sequential").params_sha256


def test_what_a_reply_says_is_read_with_suspicion() -> None:
    def reply(about: dict[str, Any]) -> Message:
        content = RecordDict({"about": ConfigRecord(about)})
        return Message(content, dst_node_id=1, message_type="train")

    good: dict[str, Any] = {"t": 3, "exchange": 1, "failed": [], "reasons": []}
    good |= {"1.c": b"x", "7.c": b"x"}
    found = answers_in(reply(good), 1, 3, [1, 2], 9.0)
    assert found[1] == {"c": b"x"}
    assert str(found[2]).startswith("no update")
    assert set(found) == {1, 2}, "an answer for a client of another node"
    for other in ({"t": 2}, {"exchange": 2}, {"t": "3"}):
        found = answers_in(reply({**good, **other}), 1, 3, [1], 9.0)
        assert found == {1: "bad message: expected an answer to exchange 1 of t = 3"}
    said = {"failed": [1, 1, 7], "reasons": ["refused: \x1b[2J no", "x", "y"]}
    found = answers_in(reply({**good, **said}), 1, 3, [1, 2], 9.0)
    assert found[1] == "refused: \\x1b[2J no"
    said = {"failed": [1], "reasons": ["timeout: not I"]}
    found = answers_in(reply({**good, **said}), 1, 3, [1], 9.0)
    assert found == {1: "error: timeout: not I"}


# What arrives at the server


def everything_in(reply: Message) -> bytes:
    """All bytes of a reply, of its arrays as they are."""
    content = b""
    for record in reply.content.values():
        if isinstance(record, ArrayRecord):
            content += b"".join(array.data for array in record.values())
        else:
            content += repr(dict(record)).encode()
            for value in record.values():
                content += value if isinstance(value, bytes) else b""
    return content


@pytest.mark.parametrize("is_secret", [True, False])
def test_no_reply_holds_an_update_as_floats_or_as_integers(
    is_secret: bool, tmp_path: Path
) -> None:
    """In the clear it is found, by the same search."""
    e = secure("fedavg", rounds=1, evaluation__every=100, participation__cohort=6)
    plain = small("fedavg", rounds=1, evaluation__every=100, participation__cohort=6)
    replies: list[bytes] = []

    def note(reply: Message) -> list[Message]:
        replies.append(everything_in(reply))
        return [reply]

    given = e if is_secret else plain
    over_flower(given, tmp_path, FakeGrid(preset_of(given, tmp_path), 12, note))
    task, client = e.build_task(), cohort_of(e, 0)[0]
    work = work_of(e, task, e.build_method())
    down = Model(task.init_params())
    up, _ = work.one(work.method.train, client, down, Stateless(), 0)
    ring, parts = Ring(6), (Part("", "examples"),)
    ask = Ask(work.method.train, torch.tensor([client]), down, 0, parts, ring)
    assert work.sending is not None
    count = float(work.num_examples(work.method.train, [client]))
    sent = work.sending.send(ask, client, up, count).encoded
    floats = next(iter(up.delta.values())).numpy().tobytes()
    integers = sent.numbers.numpy().tobytes()
    assert len(floats) >= 16
    all_bytes = b"".join(replies)
    assert (floats in all_bytes) is not is_secret
    assert integers not in all_bytes


def test_devices_take_their_noise_from_the_system(tmp_path: Path) -> None:
    noise = {"clip": 1.0, "noise_multiplier": 0.5}
    method = {"method__weighting": "participating"}
    e = secure("fedavg", rounds=2, defence__distributed=noise, **method)
    shas = set()
    for number in range(2):
        folder = tmp_path / str(number)
        grid = FakeGrid(preset_of(e, folder), 12)
        result = over_flower(e, folder, grid)
        assert result.dropped == {}
        shas.add(result.params_sha256)
    shas.add(run(e, tmp_path / "keyed").params_sha256)
    assert len(shas) == 3, "noise by the seed, which every device knows"
