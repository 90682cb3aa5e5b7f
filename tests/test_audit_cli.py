"""fedcore audit: its output, its refusals, and audits that stop and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, run
from fedcore.views.terminal import AuditTerminal
from tests.helpers import PATIENCE

Cli = Callable[..., tuple[int, str, str]]
SMALL = [
    "--set=model.name=mlp",
    "--set=model.hidden=[8]",
    "--set=population=20",
    "--set=participation.cohort=8",
    "--set=engine.chunk=1",
]
FEW = ["--option=sme.iterations=20", "--option=ig.iterations=20", "--clients=2"]
QUICK = ["fedavg", *SMALL, *FEW, "--epochs=1"]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that kept the updates of three clients in each."""
    folder = tmp_path_factory.mktemp("runs") / "captured"
    values = {
        "population": 20,
        "participation.name": "uniform",
        "participation.cohort": 8,
        "engine.chunk": 1,
        "rounds": 2,
        "model.name": "mlp",
        "model.hidden": [8],
        "audit.capture": 3,
        "local.batch_size": 4,
    }
    run(Experiment.parse({"method": "fedavg"}, values), out=folder)
    return folder


@pytest.fixture
def audit(cli: Cli) -> Cli:
    """Call `fedcore audit` in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        return cli("audit", *arguments)

    return call


def cells_of(out: Path) -> dict[str, tuple[int, bytes]]:
    """(time of the last change, content) of every cell's file."""
    cells = {}
    for file in (out / "cells").iterdir():
        cells[file.name] = file.stat().st_mtime_ns, file.read_bytes()
    return cells


def found_in(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return values


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


# What works


def test_sweep_prints_attacks_beside_what_needs_no_update(
    audit: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    status, printed, err = audit(*QUICK, "--epochs", "1,3", "--out", out)
    assert status == 0
    assert "audit of 2 cells" in err
    head, *rows = printed.split("\n\n")[0].splitlines()
    for column in ("attack", "PSNR dB [95 % CI]", "SSIM", "found", "alpha"):
        assert column in head
    for column in ("objective", "labels", "members AUC"):
        assert column in head
    named = [row.split("  ")[0] for row in rows if row.startswith(("1 ", "3 "))]
    assert named == [
        "1 epoch, batches of 10, 8 examples",
        "3 epochs, batches of 10, 8 examples",
    ]
    for name in (
        "sme",
        "ig",
        "analytic",
        "blank image",
        "mean image",
        "class means, labels known",
        "another client's images",
        "start noise",
    ):
        assert sum(name in row for row in rows) == 2, name
    assert "Grade " in printed
    assert f"Report: {out / 'audit.html'}" in printed
    assert mode_of(out) == 0o700
    for file in (out / "audit.html", out / "audit.json", *(out / "cells").iterdir()):
        assert mode_of(file) == 0o600


def test_json_is_one_object_and_audit_json_the_same(audit: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    status, printed, _ = audit(*QUICK, "--json", "--seed", "3", "--out", out)
    assert status == 0
    found = json.loads(printed)
    assert found.pop("report") == str(out / "audit.html")
    assert found == found_in(out)
    assert found["mode"] == "sweep"
    assert found["plan"]["seed"] == found["experiment"]["seed"] == 3
    assert found["plan"]["settings"]["sme"]["iterations"] == 20
    assert found["plan"]["clients"] == 2


def test_defences_are_one_row_each_with_grade_accuracy_and_epsilon(
    audit: Cli, tmp_path: Path
) -> None:
    wanted = ["none", "clip=1 noise_multiplier=0.1", "secagg=2"]
    defences = [f"--defence={text}" for text in wanted]
    status, printed, err = audit(
        *("fedavg", *SMALL, "--clients=1", "--set=rounds=1", *defences),
        *("--attack=analytic,labels", "--out", tmp_path / "a"),
    )
    assert status == 0
    head, plain, noisy, together = printed.split("\n\n")[0].splitlines()
    for column in ("defence", "best attack", "PSNR dB", "SSIM", "labels"):
        assert column in head
    for column in ("grade", "accuracy", "epsilon"):
        assert column in head
    assert plain.startswith("none ")
    assert plain.endswith(" -")
    assert float(noisy.split()[-1]) > 0
    assert together.startswith("secagg=2 ")
    assert err.count("1 round") == 3  # the runs report as `fedcore run` does
    assert "Measured here" in printed or "None of the defences" in printed
    cells = found_in(tmp_path / "a")["cells"]
    assert cells[1]["privacy"]["view"] == "client_update"
    assert {c["clients_aggregated"] for c in cells[2]["clients"]} == {2}


def test_epsilon_of_the_global_model_is_not_paired_with_a_clients_update(
    audit: Cli, tmp_path: Path
) -> None:
    settings = ["rounds=1", "population=20", "model.hidden=[8]", "engine.chunk=1"]
    status, printed, err = audit(
        *("dpfedavg", *[f"--set={text}" for text in settings], "--clients=1"),
        *("--attack=analytic", "--defence=none", "--out", tmp_path / "a"),
    )
    assert status == 0, err
    row = printed.split("\n\n")[0].splitlines()[1]
    assert row.endswith("global model only")
    page = (tmp_path / "a" / "audit.html").read_text()
    assert "says nothing of this attack" in page


def test_run_is_audited_by_what_it_kept(audit: Cli, captured: Path) -> None:
    status, printed, _ = audit(captured, *FEW)
    assert status == 0
    assert "round 1 " in printed
    assert "round 2 " in printed
    assert f"Report: {captured / 'audit' / 'audit.html'}" in printed
    assert found_in(captured / "audit")["mode"] == "captured"


def test_fail_above_compares_the_worst_client(audit: Cli, tmp_path: Path) -> None:
    arguments = (*QUICK, "--out", tmp_path / "a", "--fail-above")
    assert audit(*arguments, "100")[0] == 0
    worst = found_in(tmp_path / "a")["worst"]
    assert worst["input_leakage"] > 1
    status, printed, err = audit(*arguments, "1")
    assert status == 1
    leak = f"input leakage {worst['input_leakage']:.1f} of client {worst['client']}"
    assert leak in err
    assert "is above --fail-above 1" in err
    assert "Report: " in printed


def test_fail_above_does_not_pass_where_nothing_was_scored(
    audit: Cli, tmp_path: Path
) -> None:
    settings = ["task=least-squares", "partition.name=iid", "population=4"]
    settings.append("participation.cohort=2")
    status, _, err = audit(
        *("fedavg", *[f"--set={text}" for text in settings], "--clients=2"),
        *("--attack=membership", "--epochs=1", "--examples=2"),
        *("--fail-above=50", "--out", tmp_path / "a"),
    )
    assert status == 1
    assert "nothing was scored" in err


def test_second_audit_in_the_same_directory_attacks_nothing_again(
    audit: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    assert audit(*QUICK, "--out", out)[0] == 0
    before, first = cells_of(out), found_in(out)["cells"]
    assert audit(*QUICK, "--epochs", "1,3", "--out", out)[0] == 0
    after = cells_of(out)
    assert len(after) == 2
    assert before.items() <= after.items()
    assert first == found_in(out)["cells"][:1]


def has_pixels(text: str) -> bool:
    return "data:image" in text or "iVBOR" in text


def test_images_none_leaves_no_pixels_anywhere(audit: Cli, tmp_path: Path) -> None:
    none, some = tmp_path / "none", tmp_path / "some"
    assert audit(*QUICK, "--images", "none", "--out", none)[0] == 0
    assert audit(*QUICK, "--out", some)[0] == 0
    for file in none.rglob("*.*"):
        assert not has_pixels(file.read_text()), file
    assert "they were switched off" in (none / "audit.html").read_text()
    assert has_pixels((some / "audit.html").read_text())
    assert not has_pixels((some / "audit.json").read_text())


def test_without_truth_the_attacks_find_the_same_and_nothing_is_scored(
    audit: Cli, tmp_path: Path
) -> None:
    assert audit(*QUICK, "--out", tmp_path / "known")[0] == 0
    out = tmp_path / "unknown"
    status, printed, _ = audit(*QUICK, "--no-truth", "--out", out)
    assert status == 0
    scored, unscored = (
        found_in(tmp_path / name)["cells"][0]["clients"]
        for name in ("known", "unknown")
    )
    for a, b in zip(scored, unscored, strict=True):
        assert b["labels"]["counts"] == a["labels"]["counts"]
        for key in ("grade", "best", "membership"):
            assert b[key] is None
        assert b["references"] == {}
        for name in ("sme", "ig", "analytic"):
            assert b["attacks"][name].items() <= a["attacks"][name].items()
            assert "psnr" not in b["attacks"][name]
    assert "Unscored" in printed
    assert "PSNR" not in printed
    page = (out / "audit.html").read_text()
    assert "unscored" in page
    assert not has_pixels(page)


def test_a_sign_is_turned_round_where_the_user_says_so_alone(
    audit: Cli, tmp_path: Path
) -> None:
    warnings = []
    for name, flag in (("plain", []), ("flipped", ["--flip"])):
        out = tmp_path / name
        assert audit(*QUICK, "--attack", "labels", *flag, "--out", out)[0] == 0
        lines = found_in(out)["cells"][0]["warnings"]
        warnings.append([line for line in lines if "against the gradient" in line])
    assert warnings[0] == []
    assert "--flip turns it round" in warnings[1][0]  # as these were right


def test_without_out_it_makes_a_new_directory(
    audit: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, _ = audit(*QUICK, "--attack", "labels")
    assert status == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert "audit-fedavg-digits" in made.name
    assert mode_of(made) == 0o700
    assert f"Report: {made.relative_to(tmp_path) / 'audit.html'}" in printed


def test_progress_tells_the_objective_and_never_a_psnr(
    monkeypatch: pytest.MonkeyPatch, audit: Cli, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedcore.views.terminal.EVERY", 0.0)
    status, _, err = audit(*QUICK, "--out", tmp_path / "a")
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("cell 1/1 ")]
    assert any("sme, objective 0." in line for line in lines)
    assert any("so far, " in line and line.endswith(" left") for line in lines)
    assert "PSNR" not in err
    assert "dB" not in err


def test_defence_whose_run_fails_is_left_out_and_named(
    audit: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    status, printed, err = audit(
        *("fedavg", *SMALL, *FEW, "--attack=labels", "--set=rounds=1"),
        *("--defence=secagg=30", "--defence=none", "--out", out),
    )
    assert status == 1
    assert (
        "note secagg=30 is left out: secagg=30: round 1 has 8 captured clients, "
        "expected at least 30" in err
    )
    assert "Left out: secagg=30: " in printed
    assert "Left out: secagg=30: " in (out / "audit.html").read_text()
    found = found_in(out)
    assert list(found["failed"]) == ["secagg=30"]
    assert [cell["name"] for cell in found["cells"]] == ["none"]


# What is refused

REFUSED = {
    "--attack=sme,magic": 'attack "magic": there is no such attack; known: sme, ig',
    "--budget=huge": "--budget huge: expected one of quick, standard, thorough, paper",
    "--labels=guessed": "--labels guessed: expected one of recovered, oracle, soft",
    "--images=all": "--images all: expected one of thumbnails, none",
    "--epochs=1,x": "--epochs 1,x: expected numbers from 1 on",
    "--examples=0": "--examples 0: expected numbers from 1 on",
    "--option=sme.iterations": ('--option "sme.iterations": expected ATTACK.KEY=VALUE'),
    "--option=iterations=5": '--option "iterations=5": expected ATTACK.KEY=VALUE',
    "--option=sme.speed=5": "--option sme.speed = 5",
    "--option=sme.iterations=0": "--option sme.iterations = 0",
    "--defence=none --epochs=1": "--epochs: with --defence clients are those of a run",
    "--defence=clip": '--defence "clip": found "clip", expected key=value',
    "--defence=clip=-1": '--defence "clip=-1": defence.clip=-1: must be',
    "--no-truth --labels=oracle": (
        "--labels oracle tells the attacks the true labels, which --no-truth withholds"
    ),
    "--no-truth --fail-above=5": (
        "--fail-above needs scores, and with --no-truth nothing is scored"
    ),
    "--examples=5000": (
        "5000 examples of each of 4 clients: only 0 of 100 clients have as many"
    ),
    "--set=no.such=1": "unknown key no",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items())
def test_bad_settings_are_one_message_and_no_directory(
    audit: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, err = audit("fedavg", *arguments.split())
    assert (status, printed) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not any((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "1"),
        ("--batch-size", "4"),
        ("--examples", "8"),
        ("--defence", "none"),
        ("--set", "rounds=3"),
        ("--engine", "ray"),
    ],
)
def test_settings_of_a_finished_run_cannot_be_changed(
    audit: Cli, captured: Path, option: str, value: str
) -> None:
    status, printed, err = audit(captured, option, value)
    assert (status, printed) == (2, "")
    why = f"{captured} is a run, whose updates are audited as they were sent"
    assert f"{option}: {why}" in err


def test_run_without_captures_is_told_how_to_keep_them(
    audit: Cli, tmp_path: Path
) -> None:
    values = {"task": "least-squares", "population": 4, "rounds": 1, "engine.chunk": 1}
    run(Experiment.parse({"method": "fedavg"}, values), out=tmp_path / "r")
    status, _, err = audit(tmp_path / "r")
    assert status == 2
    assert "audit.capture" in err
    assert not (tmp_path / "r" / "audit").exists()


# Stopped


GATED = """
import time
from pathlib import Path

from fedcore.tasks import TASKS


def make_task(experiment):
    if experiment.local.epochs == 2:
        Path("waiting").touch()
        while not Path("gate").exists():
            time.sleep(0.02)
    return TASKS["digits"](experiment)
"""


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_interrupted_audit_reports_what_is_done_and_is_gone_on_with(
    audit: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own, interrupted while it builds the task of its second cell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gated.py").write_text(GATED)
    out = tmp_path / "a"
    arguments = ["fedavg", *SMALL, *FEW, "--set=task=gated:make_task", "--attack=sme"]
    arguments += ["--epochs=1,2,3", f"--out={out}"]
    command = [sys.executable, "-m", "fedcore.cli", "audit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the second cell did not begin"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        (tmp_path / "gate").touch()
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (
        f"interrupted: {out / 'audit.html'} holds what is done; "
        f"the same command with --out {out} goes on" in err
    )
    found, before = found_in(out), cells_of(out)
    assert found["interrupted"]
    assert len(found["cells"]) == len(before) == 1
    page = (out / "audit.html").read_text()
    assert "This audit was interrupted" in page
    assert "1 epoch, batches of 10, 8 examples" in page
    assert audit(*arguments)[0] == 0
    after = cells_of(out)
    assert before.items() <= after.items()
    assert len(after) == 3
    whole = found_in(out)
    assert (whole["interrupted"], len(whole["cells"])) == (False, 3)


def test_interruption_between_cells_writes_the_report_too(
    monkeypatch: pytest.MonkeyPatch, audit: Cli, tmp_path: Path
) -> None:
    def stopping(
        self: AuditTerminal, share: float, what: str, objective: float | None
    ) -> None:
        if self._number == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AuditTerminal, "progress", stopping)
    out = tmp_path / "a"
    arguments = ("--clients=1", "--attack=analytic", "--epochs=1,2,3", "--out", out)
    status, printed, err = audit("fedavg", *SMALL, *arguments)
    assert status == 130, err
    assert "Report: " in printed
    assert len(cells_of(out)) == 1
    page = (out / "audit.html").read_text()
    assert "1 epoch, batches of 10" in page
    assert "This audit was interrupted" in page
