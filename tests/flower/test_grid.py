"""The engine whose clients are Flower nodes: the real ClientApp, a grid in process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fedcore.client.app
import fedcore.server.app
import fedcore.server.nodes
import fedcore.server.post
import fedcore.server.replies
import pytest
import torch
from fedcore.server.grid import GridEngine
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Work
from fedcore.errors import RunError
from fedcore.messages import wire
from fedcore.rounds.loop import Loop, Quiet, Result, run
from fedcore.types import Model
from fedcore.views.terminal import Terminal
from tests.flower.fake import FakeGrid, Weather, in_place_of
from tests.helpers import NOISY, STRATEGIES, TOYS, VARIANTS, assert_close, equal, small


def preset_of(e: Experiment, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preset.toml").write_text(e.to_toml())
    return str(folder / "preset.toml")


def over_flower(
    e: Experiment, folder: Path, grid: FakeGrid, timeout: float = 60
) -> Result:
    return run(
        e,
        folder / "run",
        engine=lambda work: GridEngine(grid, work, timeout, state=folder / "kept"),
    )  # type: ignore[arg-type]


# Where all goes well


@pytest.mark.parametrize(
    "nodes", [12, 5], ids=["a node a client", "fewer nodes than clients"]
)
@pytest.mark.parametrize("name", [*STRATEGIES, *TOYS, *VARIANTS])
def test_flower_computes_what_sequential_computes(
    name: str, nodes: int, tmp_path: Path
) -> None:
    e = small(name, **(NOISY if nodes == 5 else {}))
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), nodes))
    assert_close(other.params, one.params, 1e-6, f"{name} over {nodes} nodes")
    assert other.final["test_loss"] == pytest.approx(one.final["test_loss"], abs=1e-6)
    assert other.dropped == {}
    assert other.bytes_up == one.bytes_up


def test_clients_on_flower_nodes_defend_themselves_as_all_others_do(
    tmp_path: Path,
) -> None:
    settings = {"clip": 0.5, "noise_multiplier": 0.02, "top_k": 0.7, "bits": 8}
    e = small("scaffold", defence=settings)
    one = run(e, tmp_path / "sequential")
    other = over_flower(e, tmp_path, FakeGrid(preset_of(e, tmp_path), 5))
    assert_close(other.params, one.params, 1e-6, "scaffold over 5 nodes")
    assert other.final["privacy"] == one.final["privacy"]
    assert (
        other.params_sha256 != run(small("scaffold"), tmp_path / "plain").params_sha256
    )


def test_evaluation_leaves_no_trace_in_a_client(tmp_path: Path) -> None:
    e = small("scaffold", rounds=1)
    grid = FakeGrid(preset_of(e, tmp_path), 12)
    over_flower(e, tmp_path, grid)
    assert (
        len(list((tmp_path / "kept").glob("*/client-*"))) == 5
    )  # the cohort; all 12 were evaluated
    assert not any(context.state for context in grid.contexts.values())


# Bad weather: the answer of node 103, which hosts client 3, in a round of 12 clients


def rewrite(**changes: Any) -> Callable[[Message], list[Message]]:
    def weather(reply: Message) -> list[Message]:
        about = reply.content["about"]
        assert isinstance(about, ConfigRecord)
        reply.content["about"] = ConfigRecord({**about, **changes})
        return [reply]

    return weather


def resend(edit: Callable[[Any], Any]) -> Callable[[Message], list[Message]]:
    def weather(reply: Message) -> list[Message]:
        up = wire.decode(reply.content["up-3"], Model)  # type: ignore[arg-type]
        reply.content["up-3"] = wire.encode(edit(up))
        return [reply]

    return weather


def without_update(reply: Message) -> list[Message]:
    del reply.content["up-3"]
    return [reply]


def empty(reply: Message) -> list[Message]:
    reply.content = RecordDict()
    return [reply]


RAY = (
    "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:"
    "<'ray::ClientAppActor.run() (pid=9)\n File ...\n"
    "flwr.clientapp.client_app.ClientAppException: \n"
    "Exception ClientAppException occurred. Message: out of\n memory'>"
)
DIED = (
    "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly.\n\tpid: 9'>"
)
AGAIN = "is it running another version of tests/methods.py?"
BAD: dict[str, tuple[Weather, str]] = {
    "an error": (
        lambda r: [in_place_of(r, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, RAY)],
        "error: out of memory",
    ),
    "a process that dies": (
        lambda r: [in_place_of(r, ErrorCode.UNKNOWN, DIED)],
        "error: The actor died unexpectedly. pid: 9",
    ),
    "no answer": (lambda r: [], "timeout: no answer within 0.3 s"),
    "expired": (
        lambda r: [in_place_of(r, ErrorCode.MESSAGE_UNAVAILABLE, "?")],
        "timeout: no answer within 0.3 s",
    ),
    "offline": (
        lambda r: [in_place_of(r, ErrorCode.NODE_UNAVAILABLE, "?")],
        "disconnected: the Flower node went offline",
    ),
    "another round": (rewrite(t=7), "wrong round: an answer for t = 7, expected 0"),
    "misshapen": (
        resend(lambda up: Model({"weight": up.params["weight"].T})),
        'bad message: it sent "params/weight" of shape (5, 1), '
        f"expected (1, 5): {AGAIN}",
    ),
    "another type": (
        resend(lambda up: Model({"weight": up.params["weight"].double()})),
        'bad message: it sent "params/weight" of type float64, '
        f"expected float32: {AGAIN}",
    ),
    "an undeclared field": (
        resend(lambda up: Model({**up.params, "secret": torch.zeros(1)})),
        f'bad message: it sent "params/secret", which Model does not declare: {AGAIN}',
    ),
    "a negative count": (
        rewrite(**{"num-examples": [-1]}),
        "bad count: -1 examples, expected a whole number from 0 on",
    ),
    "a fractional count": (
        rewrite(**{"num-examples": [2.5]}),
        "bad count: 2.5 examples, expected a whole number from 0 on",
    ),
    "no count": (rewrite(**{"num-examples": []}), fedcore.server.replies.MISSING),
    "counts of another kind": (
        rewrite(**{"num-examples": "many"}),
        fedcore.server.replies.MISSING,
    ),
    "the name of another": (
        rewrite(clients=[4]),
        "unknown client: its node answered for client 4, which it was not asked for",
    ),
    "no update": (without_update, fedcore.server.replies.MISSING),
    "nothing": (empty, 'bad message: no record "about" in the answer'),
}


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def one_round(
    weather: Weather, folder: Path, name: str = "tests.methods:NoBatching"
) -> tuple[dict[str, Any], list[str], Loop]:
    """A round of all 12 clients in which node 103 has this weather.

    Its row, what the user was told, and the loop.
    """
    e = small(name, participation__cohort=12)  # evaluates after two rounds
    grid = FakeGrid(
        preset_of(e, folder),
        12,
        lambda r: weather(r) if r.metadata.src_node_id == 103 else [r],
    )
    notes = Notes()
    loop = Loop(e, folder, notes, lambda work: GridEngine(grid, work, 0.3), False)  # type: ignore[arg-type]
    return loop.round(), notes.notes, loop


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_left_out_counted_and_named(kind: str, tmp_path: Path) -> None:
    weather, reason = BAD[kind]
    row, notes, loop = one_round(weather, tmp_path)
    assert row["dropped"] == {reason.split(":")[0]: 1}
    assert notes[0] == f"round 1: client 3 left out: {reason}"
    assert row["reports"] == 11
    assert bool(trees.finite(loop.state.server))


@pytest.mark.parametrize(
    ("weather", "reason"),
    [
        (
            lambda r: [r, r],
            "client 3 left out: answered twice: "
            "of the answers in round 1 the first counts",
        ),
        (
            rewrite(**{"clients": [3, 3, 3], "num-examples": [9, 9, 9]}),
            "client 3 left out: answered twice: "
            "of the answers in round 1 the first counts",
        ),
        (
            rewrite(**{"clients": [3, 99, 4], "num-examples": [9, 9, 9]}),
            "client 3 left out: unknown client: its node answered for client 99, "
            "which it was not asked for",
        ),
    ],
    ids=["two messages", "three times in one message", "for others"],
)
def test_what_is_said_beyond_the_answer_is_counted_and_changes_nothing(
    weather: Weather, reason: str, tmp_path: Path
) -> None:
    row, notes, loop = one_round(weather, tmp_path / "bad")
    good, _, undisturbed = one_round(lambda r: [r], tmp_path / "good")
    assert row["dropped"] == {reason.split(": ")[1]: 1}
    assert notes == [f"round 1: {reason}"]
    assert row["reports"] == good["reports"] == 12
    assert equal(loop.state.server, undisturbed.state.server)  # 9 is the true count


def test_a_client_that_fails_fails_alone_and_gives_its_reason(tmp_path: Path) -> None:
    e = small("scaffold", participation__cohort=12)
    kept, grid = tmp_path / "kept", FakeGrid(preset_of(e, tmp_path), 2)
    loop = Loop(
        e,
        tmp_path,
        notes := Notes(),
        lambda work: GridEngine(grid, work, 60, state=kept),
        False,
    )  # type: ignore[arg-type]
    assert loop.round()["reports"] == 12
    (kept / "run/client-3/000000-00.safetensors").write_bytes(b"")
    assert loop.round()["reports"] == 11
    start = f"round 2: client 3 left out: error: StateError: {kept}/run/client-3/"
    assert notes.notes[0].startswith(start + "000000-00.safetensors is da")


def test_a_node_without_a_directory_refuses_only_methods_that_keep_states(
    tmp_path: Path,
) -> None:
    for name, reports in (("fedavg", 12), ("scaffold", 0)):
        e = small(name, participation__cohort=12)
        grid, folder = FakeGrid(preset_of(e, tmp_path / name), 12), tmp_path / name
        loop = Loop(
            e,
            folder,
            notes := Notes(),
            lambda work, grid=grid: GridEngine(grid, work, 60),
            False,
        )  # type: ignore[arg-type,misc]
        assert loop.round()["reports"] == reports
    assert "this node has no directory for it" in notes.notes[0]


def test_what_a_client_says_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Terminal().note("client 3 left out: error: ValueError: no [/weather]")
    assert "no [/weather]" in capsys.readouterr().err


# Nodes that come and go


def loop_over(e: Experiment, folder: Path, grid: FakeGrid) -> Loop:
    folder.mkdir(exist_ok=True)
    return Loop(e, folder, Quiet(), lambda work: GridEngine(grid, work, 0.3), False)  # type: ignore[arg-type]


def test_a_node_that_leaves_is_left_out_and_one_that_comes_back_is_asked_again(
    tmp_path: Path,
) -> None:
    e = small("fedavg", participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 4)
    loop = loop_over(e, tmp_path, grid)
    assert loop.round()["dropped"] == {}
    gone = grid.contexts.pop(102)
    assert loop.round()["dropped"] == {"disconnected": 3}
    grid.contexts[555] = replace(
        gone, node_id=555
    )  # a device that restarted: the same partition, another node id
    rows = [loop.round(), loop.round()]
    assert rows[-1]["dropped"] == {}


def test_an_answer_that_comes_after_its_round_is_counted_and_changes_nothing(
    tmp_path: Path,
) -> None:
    e = small("fedavg", participation__cohort=12)
    held: list[Message] = []

    def weather(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id != 102 or held:
            return [reply]
        held.append(reply)
        return []

    (tmp_path / "other").mkdir()
    grid, other = (
        FakeGrid(preset_of(e, tmp_path), 4, weather),
        FakeGrid(preset_of(e, tmp_path), 4, weather),
    )
    loop, without = (
        loop_over(e, tmp_path / "a", grid),
        loop_over(e, tmp_path / "b", other),
    )
    assert loop.round()["dropped"] == {"timeout": 3}
    grid.replies[held[0].metadata.reply_to_message_id] = [held[0]]
    row = loop.round()
    assert (row["late_answers"], row["dropped"], row["reports"]) == (1, {}, 12)
    assert "late_answers" not in loop.round()
    held.clear()
    assert "late_answers" not in without.round() | without.round() | without.round()
    assert equal(loop.state.server, without.state.server)


@pytest.mark.parametrize(("rejoin", "sent"), [(0.0, 4), (20.0, 5)])
def test_a_node_that_starts_anew_in_a_round_is_asked_again_where_that_is_wished(
    rejoin: float, sent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedcore.server.post, "LOOK", 0.0)
    e = small("scaffold", participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 4)

    def weather(reply: Message) -> list[Message]:
        if (
            reply.metadata.src_node_id == 102 and grid.activated[102] == "0"
        ):  # it did its work, and was killed before it answered
            grid.activated[102] = "1"
            grid.contexts[102] = grid.context(str(tmp_path / "preset.toml"), 2, 4)
            return []
        return [reply]

    grid.weather = weather
    for folder in ("run", "kept"):
        (tmp_path / folder).mkdir()

    def engine(work: Work) -> GridEngine:
        return GridEngine(grid, work, 60, rejoin=rejoin, state=tmp_path / "kept")  # type: ignore[arg-type]

    loop = Loop(e, tmp_path / "run", Quiet(), engine, False)
    row = loop.round()
    assert row["dropped"] == ({} if rejoin else {"disconnected": 3})
    assert row["reports"] == (12 if rejoin else 9)
    assert grid.sent == 4 + sent  # four were asked who they are
    one = Loop(e, tmp_path, Quiet(), None, False)
    one.round()
    assert_close(
        loop.state.server.params,
        one.state.server.params,
        1e-6 if rejoin else 1,
        "a round in which a node was asked twice",
    )


def test_a_node_that_does_not_come_back_is_waited_for_as_long_as_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedcore.server.post, "LOOK", 0.0)
    e = small("fedavg", participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 4)
    offline = "the Flower node went offline"

    def weather(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id != 102:
            return [reply]
        grid.contexts.pop(102, None)
        return [in_place_of(reply, ErrorCode.NODE_UNAVAILABLE, "?")]

    grid.weather = weather
    (tmp_path / "run").mkdir()
    loop = Loop(
        e,
        tmp_path / "run",
        notes := Notes(),
        lambda work: GridEngine(grid, work, 60, rejoin=0.4),
        False,
    )  # type: ignore[arg-type]
    row = loop.round()
    assert row["dropped"] == {"disconnected": 3}
    assert offline in notes.notes[0]
    assert row["seconds"] >= 0.4  # a lower bound: no machine is too slow for it


def test_a_node_that_vanishes_while_messages_are_sent_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = small("fedavg", participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 4)
    loop = loop_over(e, tmp_path, grid)
    loop.round()
    monkeypatch.setattr(grid, "get_node_ids", lambda ids=tuple(grid.contexts): ids)
    del grid.contexts[101]
    assert loop.round()["dropped"] == {"disconnected": 3}


def test_nodes_that_never_come_are_an_error_and_some_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedcore.server.nodes, "WAIT", 0.2)
    e = small("fedavg", participation__cohort=12)
    grid = FakeGrid(preset_of(e, tmp_path), 4)
    del grid.contexts[100]
    assert loop_over(e, tmp_path / "a", grid).round()["dropped"] == {"disconnected": 3}
    grid.contexts.clear()
    with pytest.raises(
        RunError, match="no Flower node can take part: none is registered"
    ):
        loop_over(e, tmp_path / "b", grid).round()


def test_a_node_without_a_partition_is_told_what_is_missing(tmp_path: Path) -> None:
    e = small("fedavg")
    grid = FakeGrid(preset_of(e, tmp_path), 1)
    grid.contexts[100] = replace(grid.contexts[100], node_config={})
    with pytest.raises(
        RunError, match="partition None of 12: give it partition-id and num-partitions"
    ):
        loop_over(e, tmp_path, grid).round()


# The two apps


@pytest.mark.parametrize(
    "function", ["init_server", "round", "model_for", "__class__", "nothing"]
)
def test_only_functions_marked_for_clients_can_be_called(
    function: str, tmp_path: Path
) -> None:
    preset = preset_of(small("fedavg"), tmp_path)
    work = ConfigRecord({"function": function, "t": 0, "clients": [3]})
    message = Message(RecordDict({"work": work}), dst_node_id=100, message_type="train")
    answer = fedcore.client.app.app(
        message, Context(1, 100, {}, RecordDict(), {"preset": preset, "set": ""})
    )
    about: Any = answer.content["about"]
    fault = f'fedcore.strategies.fedavg has no client function "{function}"'
    assert about["reasons"] == [f"error: RunError: {fault}"]
    assert list(answer.content) == ["about"]


def test_a_run_that_fails_is_one_line_and_an_exception_for_flower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    context = Context(
        1, 1, {}, RecordDict(), {"preset": "strategies/fedavg.toml", "set": "rounds=0"}
    )
    with pytest.raises(RunError, match="rounds=0"):
        fedcore.server.app.app(FakeGrid("", 0), context)  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith(
        "fedcore: --set rounds=0: must be greater than or equal to 1"
    )
