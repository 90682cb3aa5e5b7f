"""The warm SuperNode: messages that are lost on their way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fedcore.client import supernode
from fedcore.client.supernode import SuperNode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_that_is_lost_in_a_cut_makes_the_client_come_anew(
    cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the server waits for the answer until the round's deadline."""
    node: Any = object.__new__(SuperNode)
    node.connection, node.node = SimpleNamespace(cuts=0), None
    came_anew: list[Any] = []

    def activate(node: Any) -> None:
        came_anew.append(node)

    monkeypatch.setattr(SuperNode, "activate", activate)

    def lost(*_: Any) -> None:
        node.connection.cuts += cut
        raise ObjectPushError("object", 1, "session")

    monkeypatch.setattr(supernode, "pull_message", lost)
    head: Any = SimpleNamespace(metadata=SimpleNamespace(run_id=1))
    node.handle(head, None)
    assert came_anew == [node] * cut
