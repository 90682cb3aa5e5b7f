"""What happens to an update before it leaves the client. Today nothing does: the update is sent as computed."""

from __future__ import annotations

from fedcore.types import Tree


def uplink(up: Tree) -> Tree:
    """The update as it is sent; the one place where clipping, noise and compression act."""
    return up
