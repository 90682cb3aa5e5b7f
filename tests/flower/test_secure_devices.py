"""Secure sums on real processes over TLS, with kills and cuts in every exchange."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from fedcore.config import Experiment
from fedcore.rounds.loop import Result, run
from tests.flower.federation import Federation, federation, until
from tests.flower.test_secure import without
from tests.helpers import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]

CLIENTS = 6
SETTINGS = [
    f"population={CLIENTS}",
    f"participation.cohort={CLIENTS}",
    "participation.name=uniform",
    "partition.name=iid",
    "local.steps=2",
    "evaluation.every=100",
    "aggregation.secure=true",
    f"engine.min_clients={CLIENTS}",
]
# What a method needs beside, to be summed in secret.
MORE: dict[str, list[str]] = {"fedau": ["method.cutoff=8"]}

# A plan is a file a client: "t exchange kill", or "t exchange wait", in each line. What
# was done once leaves a file, and is not done again.
TASK = "task=doomed:make_task"
DOOMED = """
import os, signal, time
from pathlib import Path
import fedcore.client.secure as client
import fedcore.server.journal as server
from fedcore.tasks import images

def once(name):
    done = Path(os.environ["PLAN"] + "." + name)
    if done.exists():
        return False
    done.touch()
    return True

def meet(t, exchange):
    for line in Path(os.environ["PLAN"]).read_text().splitlines():
        number, at, what = line.split()
        if (int(number), int(at)) != (t, exchange) or not once(f"{number}-{at}"):
            continue
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path(os.environ["PLAN"] + ".go").exists():
            time.sleep(0.02)

take_part, write = client.take_part, server.Journal.write

def doomed(message, context, work_for):
    work = message.content["work"]
    meet(int(work["t"]), int(work["exchange"]))
    return take_part(message, context, work_for)

def killed(self, t, k, question, entry):
    write(self, t, k, question, entry)
    meet(t, 6)

if "PLAN" in os.environ:
    client.take_part, server.Journal.write = doomed, killed

def make_task(e):
    return images(e, "digits")
"""


class Plans:
    """Plans of the processes of a federation; none of them does anything at first."""

    def __init__(self, f: Federation) -> None:
        self.f = f
        (f.folder / "doomed.py").write_text(DOOMED)

    def of(self, name: str, *lines: str) -> dict[str, str]:
        """The environment of a process with this plan."""
        file = self.f.folder / f"plan-{name}"
        file.write_text("\n".join(lines))
        return {"PYTHONPATH": str(self.f.folder), "PLAN": str(file)}

    def met(self, name: str, line: str) -> None:
        """Wait until a process has come to a line of its plan."""
        t, exchange, _ = line.split()
        done = self.f.folder / f"plan-{name}.{t}-{exchange}"

        def is_met() -> bool:
            assert self.f.processes["server"].poll() is None, self.f.everything()
            return done.exists()

        until(is_met, self.f.everything)

    def go(self, name: str) -> None:
        """Let a process go on that waits."""
        (self.f.folder / f"plan-{name}.go").touch()


def in_simulation(
    method: str, folder: Path, lost: dict[int, list[int]], *settings: str
) -> Result:
    """The same run in this process, in which these clients drop out, by t."""
    given = [*SETTINGS, *MORE.get(method, []), *settings, "task=digits"]
    experiment = Experiment.load(method, [*given, "engine.name=sequential"])
    with pytest.MonkeyPatch.context() as patch:
        without(lost, patch)
        return run(experiment, folder / "sequential")


def test_whatever_is_killed_or_cut_in_a_sum_costs_one_client_one_round(
    tmp_path: Path,
) -> None:
    lines = [f"{3 * e - 1} {e} kill" for e in (1, 2, 3, 4, 5)]  # t = 2, 5, 8, 11, 14
    with federation(tmp_path, CLIENTS) as f:
        plans = Plans(f)
        settings = [*SETTINGS, "rounds=20", TASK, "engine.rejoin_timeout=120"]
        f.proxy(5)
        f.server("scaffold", *settings, **plans.of("server", "16 6 kill"))
        for i, line in enumerate(lines):
            f.client(i, **plans.of(f"client-{i}", line))
        f.client(5, **plans.of("client-5", "17 2 wait"))
        for i, line in enumerate(lines):
            plans.met(f"client-{i}", line)
            f.processes[f"client-{i}"].wait(PATIENCE)
            f.client(i, **plans.of(f"client-{i}", line))
        f.said("server", "the ServerApp ended by signal 9 .*; starting it again")
        plans.met("client-5", "17 2 wait")
        with f.proxies[5].cut():
            plans.go("client-5")
            time.sleep(30)
        result = f.finished()
        everything = f.everything()
    # In E1 it was asked again; after E3 its message was in the sum.
    lost = {5: [1], 8: [2], 17: [5]}
    expected = in_simulation("scaffold", tmp_path, lost, "rounds=20")
    rows = f.rows()
    assert [row["round"] for row in rows] == list(range(1, 21))
    assert not any(row["skipped"] for row in rows), everything
    short = {row["round"] - 1: row["reports"] for row in rows if row["dropped"]}
    assert short == dict.fromkeys(lost, CLIENTS - 1), everything
    assert result["params_sha256"] == expected.params_sha256, everything
    assert "goes on with a sum that was made before" in everything
    assert result["final"] == expected.final


@pytest.mark.parametrize("method", ["fedavg", "fedau", "fedsim", "fedvarp"])
def test_devices_sum_in_secret_to_the_bits_of_the_simulation(
    method: str, tmp_path: Path
) -> None:
    with federation(tmp_path, CLIENTS) as f:
        plans, line = Plans(f), "2 3 kill"
        settings = [*SETTINGS, *MORE.get(method, []), "rounds=5", TASK]
        f.server(method, *settings, **plans.of("server"))
        for i in range(CLIENTS):
            f.client(i, **plans.of(f"client-{i}", *[line] * (i == 4)))
        plans.met("client-4", line)
        f.processes["client-4"].wait(PATIENCE)
        f.client(4, **plans.of("client-4"))
        result = f.finished()
        everything = f.everything()
    expected = in_simulation(method, tmp_path, {2: [4]}, "rounds=5")
    assert [row["reports"] for row in f.rows()] == [6, 6, 5, 6, 6], everything
    assert result["params_sha256"] == expected.params_sha256, everything
    assert result["final"] == expected.final
