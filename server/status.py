"""`fedcore status`: the nodes of a server, who is waited for, and who gives trouble."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto import control_pb2
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedcore.deploy.proxies import without_proxies
from fedcore.errors import RunError, SettingsError
from fedcore.escapes import escaped
from fedcore.rounds.trouble import FAILING, LIGHT, LONG, Trouble, troubles

from .app import SERIES, WATCH
from .serve import FACTS

NAMED = 20  # clients that are named


def status(run_dir: Path) -> dict[str, Any]:
    """The state of a server that runs in a run directory.

    {"listen", "round", "exchange", "waiting_for", "waiting_s", "in_flight": [{"client",
    "version", "seconds"}] of a buffered schedule, "late_answers", "run", "nodes":
    [{"name", "status", "last_seen_s"}], "trouble": [{"client", "rounds", "left_out",
    "in_a_row", "reason", "clipped", "capped", "weight", "norm_ratio"}],
    "num_trouble"}: rounds up to the last checkpoint, the worst clients first. Raises
    SettingsError when no server runs there, RunError when its SuperLink does not
    answer.
    """
    try:
        facts = json.loads((run_dir / FACTS).read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{run_dir}: no fedcore server runs in it; "
            "expected the run directory that it names when it starts"
        ) from error
    nodes = _nodes(run_dir, facts)
    try:
        waiting = json.loads((run_dir / WATCH).read_text())
    except (OSError, ValueError):
        waiting = {"round": 0, "waiting_for": [], "since": time.time()}
    trouble = _troubles(run_dir)
    seconds = round(time.time() - waiting["since"], 1)
    return {
        "listen": facts["listen"],
        "round": waiting["round"],
        "exchange": waiting.get("exchange", ""),
        "waiting_for": waiting["waiting_for"],
        "waiting_s": seconds if waiting["waiting_for"] else 0.0,
        "in_flight": [_work_of(work) for work in waiting.get("in_flight", [])],
        "late_answers": waiting.get("late", 0),
        "run": json.loads((run_dir / SERIES).read_text())["series"],
        "nodes": [_row(node) for node in nodes],
        "trouble": [_facts_of(client) for client in trouble[:NAMED]],
        "num_trouble": len(trouble),
    }


def _work_of(work: dict[str, Any]) -> dict[str, Any]:
    """A client's work, and for how many seconds it has had it."""
    seconds = round(max(time.time() - work["since"], 0.0), 1)
    return {"client": work["client"], "version": work["version"], "seconds": seconds}


def _nodes(run_dir: Path, facts: dict[str, Any]) -> list[Any]:
    """Flower's descriptions of the nodes, client-2 before client-10."""
    ca = None if facts["ca"] is None else Path(facts["ca"]).read_bytes()
    with without_proxies():
        control = ControlHttpClient.from_server_address(
            server_address=facts["control"],
            insecure=ca is None,
            root_certificates=ca,
            interceptors=[RuntimeVersionHttpInterceptor("flwr CLI")],
        )
    try:
        infos = control.ListNodes(control_pb2.ListNodesRequest()).nodes_info
    except httpx.HTTPError as error:
        raise RunError(
            f"the SuperLink of {run_dir} does not answer ({error}): was its server "
            f"killed? Start it again with --out {run_dir}"
        ) from error
    finally:
        control.close()
    return sorted(infos, key=lambda info: (len(info.name), info.name))


def _troubles(run_dir: Path) -> list[Trouble]:
    """The clients that were left out or clipped; those that fail now come first."""
    try:
        found = troubles(run_dir)
    except (OSError, pa.ArrowException):
        return []  # a piece of the table is being joined to others
    return sorted(found, key=lambda client: client.streak < FAILING)


def _facts_of(trouble: Trouble) -> dict[str, Any]:
    return {
        "client": trouble.client,
        "rounds": trouble.rounds,
        "left_out": trouble.left_out,
        "in_a_row": trouble.streak,
        "reason": escaped(trouble.reason),
        "clipped": trouble.clipped,
        "capped": trouble.capped,
        "weight": _rounded(trouble.weight),
        "norm_ratio": _rounded(trouble.norm_ratio),
    }


def _rounded(value: float) -> float | None:
    """A number as it is shown; None for one that is not known."""
    return None if math.isnan(value) else round(value, 3)


def _row(info: Any) -> dict[str, Any]:
    seen = None
    if info.online_until:
        # Flower keeps until when a node counts as there: so long after its last word.
        heard = info.online_until
        if info.status == "online":
            heard -= HEARTBEAT_PATIENCE * info.heartbeat_interval
        seen = round(max(datetime.now(UTC).timestamp() - heard, 0), 1)
    name = escaped(info.name) or f"node {info.node_id}"
    return {"name": name, "status": info.status, "last_seen_s": seen}


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"run {facts['run']}, listening on {facts['listen']}"]
    number = facts["round"]
    lines.append(f"round {number}" if number else "before the first round")
    if facts.get("exchange"):
        lines[-1] += f", a secure sum: {facts['exchange']}"
    if clients := facts["waiting_for"]:
        lines.append(
            f"waiting for {len(clients)} clients: {', '.join(map(str, clients))}; "
            f"last answer {facts['waiting_s']:g} s ago"
        )
    longest = sorted(facts.get("in_flight", []), key=lambda work: -work["seconds"])
    for work in longest[:NAMED]:
        lines.append(
            f"client {work['client']} works on version {work['version']}, "
            f"for {work['seconds']:g} s"
        )
    if len(longest) > NAMED:
        lines.append(f"and {len(longest) - NAMED} more clients, for less long")
    if facts["late_answers"]:
        lines.append(
            f"{facts['late_answers']} answers came after their round had ended, "
            "and were thrown away"
        )
    width = max((len(node["name"]) for node in facts["nodes"]), default=4)
    for node in facts["nodes"]:
        seen = "never seen"
        if node["last_seen_s"] is not None:
            seen = f"last seen {node['last_seen_s']:g} s ago"
        lines.append(f"{node['name']:<{width}}  {node['status']:<10}  {seen}")
    lines += [_trouble_text(client) for client in facts["trouble"]]
    more = facts["num_trouble"] - len(facts["trouble"])
    if more > 0:
        lines.append(f"and {more} more clients with trouble: see the report")
    return "\n".join(lines)


def _trouble_text(client: dict[str, Any]) -> str:
    """A line about a client, as far as it gave trouble."""
    parts = []
    if client["left_out"]:
        parts.append(f"left out of {client['left_out']} of {client['rounds']} rounds")
        parts[-1] += f" (the last time: {client['reason']})"
    if client["in_a_row"] >= FAILING:
        parts.append(f"FAILING, for {client['in_a_row']} rounds in a row")
    if client["clipped"]:
        parts.append(f"its message clipped in {client['clipped']}")
    if client["capped"]:
        parts.append(f"more examples claimed than are counted in {client['capped']}")
    if client["weight"] is not None and client["weight"] < LIGHT:
        parts.append(f"weighs {client['weight']:g} of an average client")
    if client["norm_ratio"] is not None and client["norm_ratio"] > LONG:
        parts.append(f"its message {client['norm_ratio']:.3g} times as long as most")
    return f"client {client['client']}: {', '.join(parts)}"
