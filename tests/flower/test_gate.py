"""The gate before Flower's Fleet API, without the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from fedcore.server.superlink import Gate
from flwr.proto import fleet_pb2
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
    gate = Gate(1000, tmp_path / "server" / "clients", lambda: state)
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
