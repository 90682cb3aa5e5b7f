"""A node's messages on the wire: Flower's objects, fetched and sent in few calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)

from .connection import OBJECT_DEADLINE, Connection

# The head of a message comes some hundredths of a second before its objects; Flower's
# own pauses would be a whole second.
PAUSES: dict[str, Any] = {
    "initial_backoff": 0.01,
    "backoff_cap": 0.5,
    "max_time": OBJECT_DEADLINE,
    "max_tries_per_object": None,
}


def pull_message(
    connection: Connection, node: Node, head: Message, tree: message_pb2.ObjectTree
) -> Message:
    """The whole message, of which the head has come.

    Raises Gone, Refused, and Flower's ObjectPullError.
    """
    run_id, message_id = head.metadata.run_id, head.metadata.message_id
    call = partial(connection.call, "PullObject", deadline=OBJECT_DEADLINE)
    fetch = make_pull_object_fn_protobuf(call, node, run_id)
    object_ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
    contents = pull_objects(list(object_ids), fetch, **PAUSES)
    message = inflate_object_from_contents(
        message_id, contents, keep_object_contents=False
    )
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = message_id
    request = message_pb2.ConfirmMessageReceivedRequest(
        node=node, run_id=run_id, message_object_id=message_id
    )
    connection.call("ConfirmMessageReceived", request)
    return message


def push_message(
    connection: Connection, node: Node, reply: Message, seconds: float
) -> None:
    """Send a reply that took so many seconds.

    Raises Gone, Refused, and Flower's ObjectPushError.
    """
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        request = fleet_pb2.PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )
        response = connection.call("PushMessages", request)
        call = partial(connection.call, "PushObject", deadline=OBJECT_DEADLINE)
        send = make_push_object_fn_protobuf(
            call, node, reply.metadata.run_id, response.session_id
        )
        wanted = set(response.objects_to_push)
        contents = ((i, part.deflate()) for i, part in objects.items() if i in wanted)
        push_object_contents_from_iterable(contents, send)
