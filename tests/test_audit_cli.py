"""fedcore audit: its output, its refusals, and audits that are stopped and resumed."""

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

Cli = Callable[..., tuple[int, str, str]]
SMALL = [
    "--set",
    "model.name=mlp",
    "--set",
    "model.hidden=[8]",
    "--set",
    "population=20",
    "--set",
    "participation.cohort=8",
]
SMALL += ["--set", "engine.chunk=1"]
FEW = [
    "--option",
    "sme.iterations=20",
    "--option",
    "ig.iterations=20",
    "--clients",
    "2",
]
QUICK = ["fedavg", *SMALL, *FEW, "--epochs", "1"]


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that kept the updates of three clients in each."""
    folder = tmp_path_factory.mktemp("runs") / "captured"
    values = {
        "population": 20,
        "participation.name": "uniform",
        "participation.cohort": 8,
        "engine.chunk": 1,
        "rounds": 2,
    }
    values |= {
        "model.name": "mlp",
        "model.hidden": [8],
        "audit.capture": 3,
        "local.batch_size": 4,
    }
    run(Experiment.parse({"method": "fedavg"}, values), out=folder)
    return folder


def cells_of(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes())
        for file in (out / "cells").iterdir()
    }


# What works


def test_sweep_prints_attacks_beside_what_needs_no_update(
    cli: Cli, tmp_path: Path
) -> None:
    status, out, err = cli(
        *("audit", *QUICK), "--epochs", "1,3", "--out", tmp_path / "a"
    )
    assert status == 0
    assert "audit of 2 cells" in err
    head, *rows = out.split("\n\n")[0].splitlines()
    for column in (
        "attack",
        "PSNR dB [95 % CI]",
        "SSIM",
        "found",
        "alpha",
        "objective",
        "labels",
        "members AUC",
    ):
        assert column in head
    assert [
        row.strip().split("  ")[0] for row in rows if row.startswith(("1 ", "3 "))
    ] == [
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
    ):
        assert sum(name in row for row in rows) == 2, name
    assert sum("start noise" in row for row in rows) == 2
    assert "Grade " in out
    assert f"Report: {tmp_path / 'a' / 'audit.html'}" in out
    assert (tmp_path / "a" / "audit.html").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a" / "audit.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert {
        file.stat().st_mode & 0o777 for file in (tmp_path / "a" / "cells").iterdir()
    } == {0o600}


def test_json_is_one_object_and_audit_json_the_same(cli: Cli, tmp_path: Path) -> None:
    status, out, _ = cli(
        "audit", *QUICK, "--json", "--seed", "3", "--out", tmp_path / "a"
    )
    assert status == 0
    found = json.loads(out)
    assert found.pop("report") == str(tmp_path / "a" / "audit.html")
    assert found == json.loads((tmp_path / "a" / "audit.json").read_text())
    assert (found["mode"], found["plan"]["seed"], found["experiment"]["seed"]) == (
        "sweep",
        3,
        3,
    )
    assert (
        found["plan"]["settings"]["sme"]["iterations"],
        found["plan"]["clients"],
    ) == (20, 2)


def test_defences_are_one_row_each_with_grade_accuracy_and_epsilon(
    cli: Cli, tmp_path: Path
) -> None:
    wanted = [
        "--defence",
        "none",
        "--defence",
        "clip=1 noise_multiplier=0.1",
        "--defence",
        "secagg=2",
        "--set",
        "rounds=2",
    ]
    status, out, err = cli(
        "audit",
        "fedavg",
        *SMALL,
        *FEW,
        "--attack",
        "sme,labels",
        *wanted,
        "--out",
        tmp_path / "a",
    )
    assert status == 0
    head, plain, noisy, together = out.split("\n\n")[0].splitlines()
    for column in (
        "defence",
        "best attack",
        "PSNR dB",
        "SSIM",
        "labels",
        "grade",
        "accuracy",
        "epsilon",
    ):
        assert column in head
    assert plain.startswith("none ")
    assert plain.endswith(" -")
    assert float(noisy.split()[-1]) > 0
    assert together.startswith("secagg=2 ")
    assert err.count("2 rounds") == 3  # the runs report as `fedcore run` does
    assert "Measured here" in out or "None of the defences" in out
    cells = json.loads((tmp_path / "a" / "audit.json").read_text())["cells"]
    assert cells[1]["privacy"]["view"] == "client_update"
    assert {c["clients_aggregated"] for c in cells[2]["clients"]} == {2}


def test_epsilon_of_the_global_model_is_not_paired_with_a_clients_update(
    cli: Cli, tmp_path: Path
) -> None:
    settings = [
        "--set",
        "rounds=2",
        "--set",
        "population=20",
        "--set",
        "model.hidden=[8]",
        "--set",
        "engine.chunk=1",
    ]
    arguments = ("--attack", "sme", *FEW, "--defence", "none", "--out", tmp_path / "a")
    status, out, err = cli("audit", "dpfedavg", *settings, *arguments)
    assert status == 0, err
    row = out.split("\n\n")[0].splitlines()[1]
    assert row.endswith("global model only")
    assert "says nothing of this attack" in (tmp_path / "a" / "audit.html").read_text()


def test_run_is_audited_by_what_it_kept(cli: Cli, captured: Path) -> None:
    status, out, _ = cli("audit", captured, *FEW)
    assert status == 0
    assert "round 1 " in out
    assert "round 2 " in out
    assert f"Report: {captured / 'audit' / 'audit.html'}" in out
    assert (
        json.loads((captured / "audit" / "audit.json").read_text())["mode"]
        == "captured"
    )


def test_fail_above_compares_the_worst_client(cli: Cli, tmp_path: Path) -> None:
    assert cli("audit", *QUICK, "--out", tmp_path / "a", "--fail-above", "100")[0] == 0
    worst = json.loads((tmp_path / "a" / "audit.json").read_text())["worst"]
    assert worst["input_leakage"] > 1
    status, out, err = cli(
        "audit", *QUICK, "--out", tmp_path / "a", "--fail-above", "1"
    )
    assert status == 1
    assert (
        f"input leakage {worst['input_leakage']:.1f} of client {worst['client']}" in err
    )
    assert "is above --fail-above 1" in err
    assert "Report: " in out


def test_fail_above_does_not_pass_where_nothing_was_scored(
    cli: Cli, tmp_path: Path
) -> None:
    settings = [
        "--set",
        "task=least-squares",
        "--set",
        "partition.name=iid",
        "--set",
        "population=4",
    ]
    settings += ["--set", "participation.cohort=2"]
    arguments = (
        "--attack",
        "membership",
        "--clients",
        "2",
        "--epochs",
        "1",
        "--examples",
        "2",
        "--fail-above",
        "50",
    )
    status, _, err = cli(
        "audit", "fedavg", *settings, *arguments, "--out", tmp_path / "a"
    )
    assert status == 1
    assert "nothing was scored" in err


def test_second_audit_in_the_same_directory_attacks_nothing_again(
    cli: Cli, tmp_path: Path
) -> None:
    assert cli("audit", *QUICK, "--out", tmp_path / "a")[0] == 0
    before = cells_of(tmp_path / "a")
    page = (tmp_path / "a" / "audit.json").read_text()
    assert cli("audit", *QUICK, "--epochs", "1,3", "--out", tmp_path / "a")[0] == 0
    after = cells_of(tmp_path / "a")
    assert len(after) == 2
    assert before.items() <= after.items()
    assert (
        json.loads(page)["cells"]
        == json.loads((tmp_path / "a" / "audit.json").read_text())["cells"][:1]
    )


def pixels_in(text: str) -> bool:
    return "data:image" in text or "iVBOR" in text


def test_images_none_leaves_no_pixels_anywhere(cli: Cli, tmp_path: Path) -> None:
    assert cli("audit", *QUICK, "--images", "none", "--out", tmp_path / "none")[0] == 0
    assert cli("audit", *QUICK, "--out", tmp_path / "some")[0] == 0
    assert not any(
        pixels_in(file.read_text()) for file in (tmp_path / "none").rglob("*.*")
    )
    assert "they were switched off" in (tmp_path / "none" / "audit.html").read_text()
    assert pixels_in((tmp_path / "some" / "audit.html").read_text())
    assert not pixels_in((tmp_path / "some" / "audit.json").read_text())


def test_without_truth_the_attacks_find_the_same_and_nothing_is_scored(
    cli: Cli, tmp_path: Path
) -> None:
    def found(*arguments: str) -> list[dict[str, Any]]:
        status, out, _ = cli(
            "audit",
            *QUICK,
            *arguments,
            "--json",
            "--out",
            tmp_path / f"a{len(arguments)}",
        )
        assert status == 0
        clients: list[dict[str, Any]] = json.loads(out)["cells"][0]["clients"]
        return clients

    known, unknown = found(), found("--no-truth")
    for a, b in zip(known, unknown, strict=True):
        assert b["labels"]["counts"] == a["labels"]["counts"]
        assert (b["grade"], b["best"], b["references"], b["membership"]) == (
            None,
            None,
            {},
            None,
        )
        for name in ("sme", "ig", "analytic"):
            own = {
                key: value
                for key, value in a["attacks"][name].items()
                if key in b["attacks"][name]
            }
            assert own == b["attacks"][name]
            assert "psnr" not in b["attacks"][name]
    _, out, _ = cli("audit", *QUICK, "--no-truth", "--out", tmp_path / "a1")
    assert "Unscored" in out
    assert "PSNR" not in out
    page = (tmp_path / "a1" / "audit.html").read_text()
    assert "unscored" in page
    assert not pixels_in(page)


def test_a_sign_is_turned_round_where_the_user_says_so_alone(
    cli: Cli, tmp_path: Path
) -> None:
    warnings = []
    for name, flag in (("plain", []), ("flipped", ["--flip"])):
        status, out, _ = cli(
            *("audit", *QUICK),
            "--attack",
            "labels",
            *flag,
            "--json",
            "--out",
            tmp_path / name,
        )
        assert status == 0
        warnings.append(
            [
                line
                for line in json.loads(out)["cells"][0]["warnings"]
                if "against the gradient" in line
            ]
        )
    assert warnings[0] == []
    assert "--flip turns it round" in warnings[1][0]  # as these were right


def test_without_out_it_makes_a_new_directory(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli("audit", *QUICK, "--attack", "labels")
    assert status == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert "audit-fedavg-digits" in made.name
    assert made.stat().st_mode & 0o777 == 0o700
    assert f"Report: {made.relative_to(tmp_path) / 'audit.html'}" in out


def test_progress_tells_the_objective_and_never_a_psnr(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedcore.views.terminal.EVERY", 0.0)
    status, _, err = cli("audit", *QUICK, "--out", tmp_path / "a")
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("cell 1/1 ")]
    assert any("sme, objective 0." in line for line in lines)
    assert any("so far, 0:00:" in line and line.endswith(" left") for line in lines)
    assert "PSNR" not in err
    assert "dB" not in err


def test_defence_whose_run_fails_is_left_out_and_named(
    cli: Cli, tmp_path: Path
) -> None:
    wanted = ["--defence", "secagg=30", "--defence", "none", "--set", "rounds=1"]
    status, out, err = cli(
        "audit",
        "fedavg",
        *SMALL,
        *FEW,
        "--attack",
        "labels",
        *wanted,
        "--out",
        tmp_path / "a",
    )
    assert status == 1
    assert (
        "note secagg=30 is left out: secagg=30: round 1 has 8 captured clients, "
        "expected at least 30" in err
    )
    assert "Left out: secagg=30: " in out
    assert "Left out: secagg=30: " in (tmp_path / "a" / "audit.html").read_text()
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert (list(found["failed"]), [cell["name"] for cell in found["cells"]]) == (
        ["secagg=30"],
        ["none"],
    )


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--attack", "sme,magic"],
            'attack "magic": there is no such attack; known: sme, ig',
        ),
        (
            ["--budget", "huge"],
            "--budget huge: expected one of quick, standard, thorough, paper",
        ),
        (
            ["--labels", "guessed"],
            "--labels guessed: expected one of recovered, oracle, soft",
        ),
        (["--images", "all"], "--images all: expected one of thumbnails, none"),
        (["--epochs", "1,x"], "--epochs 1,x: expected numbers from 1 on"),
        (["--examples", "0"], "--examples 0: expected numbers from 1 on"),
        (
            ["--option", "sme.iterations"],
            '--option "sme.iterations": expected ATTACK.KEY=VALUE',
        ),
        (
            ["--option", "iterations=5"],
            '--option "iterations=5": expected ATTACK.KEY=VALUE',
        ),
        (["--option", "sme.speed=5"], "--option sme.speed = 5"),
        (["--option", "sme.iterations=0"], "--option sme.iterations = 0"),
        (
            ["--defence", "none", "--epochs", "1"],
            "--epochs: with --defence clients are those of a run",
        ),
        (["--defence", "clip"], '--defence "clip": found "clip", expected key=value'),
        (["--defence", "clip=-1"], "defence.clip = -1"),
        (
            ["--no-truth", "--labels", "oracle"],
            "--labels oracle tells the attacks the true labels, which --no-truth "
            "withholds",
        ),
        (
            ["--no-truth", "--fail-above", "5"],
            "--fail-above needs scores, and with --no-truth nothing is scored",
        ),
        (
            ["--examples", "5000"],
            "5000 examples of each of 4 clients: only 0 of 100 clients have as many",
        ),
        (["--set", "no.such=1"], "unknown key no"),
    ],
)
def test_bad_settings_are_one_message_and_no_directory(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = cli("audit", "fedavg", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not any((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    "given",
    [
        ["--epochs", "1"],
        ["--batch-size", "4"],
        ["--examples", "8"],
        ["--defence", "none"],
        ["--set", "rounds=3"],
        ["--engine", "ray"],
    ],
)
def test_settings_of_a_finished_run_cannot_be_changed(
    cli: Cli, captured: Path, given: list[str]
) -> None:
    status, out, err = cli("audit", captured, *given)
    assert (status, out) == (2, "")
    assert (
        f"{given[0]}: {captured} is a run, whose updates are audited as they were sent"
        in err
    )


def test_run_without_captures_is_told_how_to_keep_them(
    cli: Cli, tmp_path: Path
) -> None:
    values = {"task": "least-squares", "population": 4, "rounds": 1, "engine.chunk": 1}
    run(Experiment.parse({"method": "fedavg"}, values), out=tmp_path / "r")
    status, _, err = cli("audit", tmp_path / "r")
    assert status == 2
    assert "audit.capture" in err
    assert not (tmp_path / "r" / "audit").exists()


# Stopped


@pytest.mark.slow
def test_interrupted_audit_reports_what_is_done_and_is_gone_on_with(
    cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    arguments = [
        "audit",
        "fedavg",
        *SMALL,
        "--clients",
        "2",
        "--attack",
        "sme",
        "--epochs",
        "1,2,3",
    ]
    arguments += ["--option", "sme.iterations=600", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedcore.cli", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        deadline = time.monotonic() + 120
        while (
            not list(out.glob("cells/*.json"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert (
        f"interrupted: {out / 'audit.html'} holds what is done; the same command "
        f"with --out {out} goes on" in err
    )
    found = json.loads((out / "audit.json").read_text())
    assert found["interrupted"]
    assert 1 <= len(found["cells"]) < 3 or found["cells"][-1]["interrupted"]
    page = (out / "audit.html").read_text()
    assert "This audit was interrupted" in page
    assert "1 epoch, batches of 10, 8 examples" in page
    before = cells_of(out)
    status, _, _ = cli(*arguments)
    assert status == 0
    after = cells_of(out)
    assert before.items() <= after.items()
    assert len(after) == 3
    whole = json.loads((out / "audit.json").read_text())
    assert (whole["interrupted"], len(whole["cells"])) == (False, 3)


def test_interruption_between_cells_writes_the_report_too(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path
) -> None:
    def stopping(
        self: AuditTerminal, share: float, what: str, objective: float | None
    ) -> None:
        if self._number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AuditTerminal, "progress", stopping)
    arguments = (
        "audit",
        "fedavg",
        *SMALL,
        "--clients",
        "1",
        "--attack",
        "analytic",
        "--epochs",
        "1,2,3",
    )
    status, out, err = cli(*arguments, "--out", tmp_path / "a")
    assert status == 130, err
    assert "Report: " in out
    assert len(cells_of(tmp_path / "a")) == 1
    assert "1 epoch, batches of 10" in (tmp_path / "a" / "audit.html").read_text()
