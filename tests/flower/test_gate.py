"""The gate before Flower's Fleet API, without the API."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from fedcore.server.link import relay
from fedcore.server.superlink import Gate, only_flat_trees
from flwr.proto import fleet_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedcore.deploy import certs


class Aborted(Exception):
    pass


def test_a_client_that_comes_before_its_key_is_registered_is_told_to_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certs.make(tmp_path, ["localhost"], 2)
    key = public_key_to_bytes(
        certs.load_private(tmp_path / "client-0" / "client.key").public_key()
    )
    state = Mock(get_node_id_by_public_key=lambda key: None)
    gate = Gate(1000, 2, tmp_path / "server" / "clients", lambda: state)
    context = Mock()
    context.abort.side_effect, context.peer.return_value = Aborted, "ipv4:127.0.0.1:5"

    def come() -> grpc.StatusCode:
        request: Any = fleet_pb2.ActivateNodeRequest(
            public_key=key, heartbeat_interval=10
        )
        with pytest.raises(Aborted):
            gate._check_node(request, key, context)
        code, details = context.abort.call_args.args
        context.code.return_value, context.details.return_value = code, details.encode()
        gate._say({"flwr-public-key-bin": key}, context)
        return code  # type: ignore[no-any-return]

    assert come() is grpc.StatusCode.UNAVAILABLE
    assert capsys.readouterr().err == ""
    (tmp_path / "server" / "clients" / "client-0.pub").unlink()
    assert come() is grpc.StatusCode.PERMISSION_DENIED
    assert "its key is not one of those that may join" in capsys.readouterr().err


def gate_of(clients: int) -> tuple[Gate, Mock]:
    context = Mock()
    context.abort.side_effect, context.peer.return_value = Aborted, "ipv4:127.0.0.1:5"
    return Gate(10**6, clients, None), context


def pushed(parts: int) -> Any:
    nodes = [ObjectTree(object_id=f"{i:064x}") for i in range(parts)]
    tree = ObjectTree(object_id="0" * 64, children=nodes)
    return fleet_pb2.PushMessagesRequest(message_object_trees=[tree])


def test_a_message_of_more_parts_than_an_answer_has_is_refused_by_its_length() -> None:
    gate, context = gate_of(clients=1000)
    gate._check_parts(pushed(3 + 3 * 1000), context)
    gate, context = gate_of(clients=1)
    gate._check_parts(pushed(3 + 3), context)
    request = pushed(200_000)
    begin = time.process_time()
    with pytest.raises(Aborted):
        gate._check_parts(request, context)
    assert time.process_time() - begin < 0.2
    code, details = context.abort.call_args.args
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.startswith("Fedcore: its message has more than 54 parts")


def test_the_gate_says_nothing_that_steers_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gate, context = gate_of(clients=1)
    context.details.return_value = "Invalid object \x1b[2J\nrefused client-1: no"
    gate._say({}, context)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()


def test_only_the_gate_says_who_was_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = b"mark refused client-1: why\nrefused client-2: a lie\n"
    lines += b"\x1b[2J\xff \xe2\x82\xac\n"
    relay(io.BytesIO(lines), tmp_path / "log", b"mark ")
    assert caplog.messages == ["refused client-1: why"]
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert log == "refused client-2: a lie\n\\x1b[2J\\xff €\n"


def test_a_message_whose_parts_name_others_many_times_is_listed_once() -> None:
    store = InMemoryObjectStore()
    only_flat_trees(store)
    tree = ObjectTree(object_id=f"{0:064x}")
    for level in range(1, 40):  # 2 ^ 40 objects, had each name of one to be followed
        again = ObjectTree(object_id=tree.object_id)
        tree = ObjectTree(object_id=f"{level:064x}", children=[tree, again])
    store.preregister(1, tree)
    flat = store.get_object_tree(tree.object_id)
    listed = [part.object_id for part in iterate_object_tree(flat)]
    assert sorted(listed) == [f"{level:064x}" for level in range(40)]
    assert listed[-1] == tree.object_id
    store.delete(tree.object_id)
    assert len(store) == 0
    with pytest.raises(NoObjectInStoreError):
        store.get_object_tree(tree.object_id)
