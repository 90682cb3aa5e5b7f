"""Ten devices over TLS, of which one tells another lie each round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcore.config import Experiment
from fedcore.rounds.loop import run
from tests.flower import hostile_device
from tests.flower.federation import Federation, Gate, fedcore, federation
from tests.flower.hostile_device import LIES
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]

DEVICES = 10
LIAR = 9
ROUNDS = len(LIES) + 1
SETTINGS = [
    f"population={DEVICES}",
    f"participation.cohort={DEVICES}",
    f"rounds={ROUNDS}",
    "partition.name=iid",
    "local.epochs=8",
    "evaluation.clients=0",
]
# The bounds are far above what honest devices send.
DEFENCE = [
    "aggregation.rule=trimmed_mean",
    "aggregation.byzantine=1",
    "aggregation.clip=6",
    "aggregation.max_examples=500",
]
SERVER = [
    f"engine.min_clients={DEVICES}",
    f"schedule.deadline_s={PATIENCE}",  # every lie has an answer
    "checkpoint.seconds=0",
    "min_reports=5",
]

# The reason that the row of a round gives for leaving the liar out, None where its
# message is taken, and bounded.
REASONS = {
    "a_count_of_a_billion": None,
    "an_enormous_update": None,
    "a_sign_flip": None,
    "a_million_names": "bad message",
    "not_a_number": "not finite",
    "a_name_that_steers": "bad message",
    "a_reason_that_steers": "error",
    "an_error_that_steers": "error",
    "another_round": "wrong round",
    "the_name_of_another": "unknown client",
    "many_parts": "error",
    "many_entries": "bad message",
    "one_chunk_many_times": "bad message",
    "no_entries": "bad message",
}


def start(f: Federation, gate: Gate) -> None:
    for i in range(DEVICES - 1):
        f.client(i, **gate.environment)
    keys, state = f.certs / f"client-{LIAR}", f.folder / f"state-{LIAR}"
    honest = f.client_command(LIAR, keys, state)[len(fedcore()) :]
    program = str(Path(hostile_device.__file__))
    f.start("liar", [sys.executable, program, *honest], **gate.environment)


def status_of(f: Federation) -> dict[str, Any]:
    f.start("status", fedcore("status", f.run, "--json")).wait(PATIENCE)
    facts: dict[str, Any] = json.loads(f.log("status").splitlines()[-1])
    return facts


def test_a_device_that_lies_in_every_way_ruins_nothing_and_is_named(
    tmp_path: Path,
) -> None:
    honest = run(Experiment.load("fedavg", SETTINGS), tmp_path / "honest")
    gate = Gate(tmp_path, t=ROUNDS - 1)
    with federation(tmp_path, DEVICES) as f:
        f.server("fedavg", *SETTINGS, *DEFENCE, *SERVER, gate.TASK, **gate.path)
        start(f, gate)
        f.reached(ROUNDS - 1)
        facts = status_of(f)
        gate.open()
        result = f.finished()
        rows = f.rows()
        files = [*f.run.glob("*.jsonl"), *f.run.glob("*.log"), f.folder / "server.log"]
        written = {file.name: file.read_bytes() for file in files}

    # Each lie was found for what it is, and only the liar's messages.
    for lie, row in zip(LIES, rows, strict=False):
        reason = REASONS[lie.__name__]
        left_out = {} if reason is None else {reason: [LIAR]}
        assert row.get("left_out", {}) == left_out, (lie.__name__, f.everything())
        assert row["reports"] == DEVICES - (reason is not None)
    assert rows[0]["capped"] == rows[1]["clipped"] == rows[2]["clipped"] == [LIAR]

    # The run is as good as without it.
    lost = honest.final["test_accuracy"] - result["final"]["test_accuracy"]
    assert abs(lost) <= 0.01, f"{lost:+.3f}"

    # Who it was stands at the top.
    [liar] = facts["trouble"]
    assert liar["client"] == LIAR
    faults = sum(reason is not None for reason in REASONS.values())
    assert liar["left_out"] == liar["in_a_row"] == faults
    assert (liar["clipped"], liar["capped"]) == (3, 1)

    # Nothing that it said steers a terminal.
    for name, content in written.items():
        for character in (b"\x1b", b"\x07", b"\r", "\u202e".encode()):
            assert character not in content, f"{character!r} in {name}"
