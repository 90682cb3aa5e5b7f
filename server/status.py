"""`fedcore status`: who is there, and who is waited for, of a server that runs on this machine."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto import control_pb2
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedcore.errors import RunError, SettingsError
from server.app import SERIES, WATCH
from server.serve import FACTS


def status(run_dir: Path) -> dict[str, Any]:
    """{"listen", "round", "waiting_for", "waiting_s", "late_answers", "run", "nodes": [{"name", "status", "last_seen_s"}]}.

    Raises SettingsError when no server runs there, RunError when its SuperLink does not answer.
    """
    try:
        facts = json.loads((run_dir / FACTS).read_text())
    except (OSError, ValueError) as e:
        raise SettingsError(
            f"{run_dir}: no fedcore server runs in it; expected the run directory that it names when it starts"
        ) from e
    ca = None if facts["ca"] is None else Path(facts["ca"]).read_bytes()
    control = ControlHttpClient.from_server_address(
        server_address=facts["control"],
        insecure=ca is None,
        root_certificates=ca,
        interceptors=[RuntimeVersionHttpInterceptor("flwr CLI")],
    )
    try:
        nodes = control.ListNodes(control_pb2.ListNodesRequest()).nodes_info
    except httpx.HTTPError as e:
        raise RunError(
            f"the SuperLink of {run_dir} does not answer ({e}): was its server killed? Start it again with --out {run_dir}"
        ) from e
    finally:
        control.close()
    now = datetime.now(UTC).timestamp()
    rows = []
    for node in sorted(nodes, key=lambda node: (len(node.name), node.name)):
        # Flower keeps until when a node counts as there: that long after it was last heard of.
        heard = (
            node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
            if node.status == "online"
            else node.online_until
        )
        seen = round(max(now - heard, 0), 1) if node.online_until else None
        rows.append(
            {
                "name": node.name or f"node {node.node_id}",
                "status": node.status,
                "last_seen_s": seen,
            }
        )
    try:
        waiting = json.loads((run_dir / WATCH).read_text())
    except (OSError, ValueError):
        waiting = {"round": 0, "waiting_for": [], "since": time.time()}
    return {
        "listen": facts["listen"],
        "round": waiting["round"],
        "waiting_for": waiting["waiting_for"],
        "waiting_s": round(time.time() - waiting["since"], 1)
        if waiting["waiting_for"]
        else 0.0,
        "late_answers": waiting.get("late", 0),
        "run": json.loads((run_dir / SERIES).read_text())["series"],
        "nodes": rows,
    }


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"run {facts['run']}, listening on {facts['listen']}",
        f"round {facts['round']}" if facts["round"] else "before the first round",
    ]
    if facts["waiting_for"]:
        who = ", ".join(map(str, facts["waiting_for"]))
        lines.append(
            f"waiting for {len(facts['waiting_for'])} clients: {who}; last answer {facts['waiting_s']:g} s ago"
        )
    if facts["late_answers"]:
        lines.append(
            f"{facts['late_answers']} answers came after their round had ended, and were thrown away"
        )
    width = max((len(node["name"]) for node in facts["nodes"]), default=4)
    for node in facts["nodes"]:
        seen = (
            "never seen"
            if node["last_seen_s"] is None
            else f"last seen {node['last_seen_s']:g} s ago"
        )
        lines.append(f"{node['name']:<{width}}  {node['status']:<10}  {seen}")
    return "\n".join(lines)
