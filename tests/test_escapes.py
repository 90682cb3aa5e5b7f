"""Text of others in terminals, logs and pages: it steers nothing, and hides nothing."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fedcore import Examples, Experiment, FederatedData, Task
from fedcore.escapes import escaped, printable
from fedcore.rounds.history import History
from fedcore.views.terminal import AuditTerminal, Terminal

Cli = Callable[..., tuple[int, str, str]]

# Colour, a cleared line, the direction of text, a character that is not seen, a line
# that looks like another one's, a bell, a C1 code, and markup of rich.
NASTY = "[red]\x1b[31m\x1b[2K\u202egnp\u200b\r\nround 9: fine\x07\x9b0m[bold]\udc80"
SHOWN = r"[red]\x1b[31m\x1b[2K\u202egnp\u200b\r\nround 9: fine\x07\x9b0m[bold]\udc80"


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.replace("\t", " ").split("\n"))


def test_what_is_not_printable_is_written_out() -> None:
    assert escaped(NASTY) == SHOWN
    assert printable("a\tb\nc\x1b") == "a\tb\nc\\x1b"
    assert escaped("Zürich, 東京, x²") == "Zürich, 東京, x²"


def test_a_record_of_any_logger_of_ours_is_one_printable_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("fedcore").warning("client %d left out: %s", 3, NASTY)
    assert caplog.messages == [f"client 3 left out: {SHOWN}"]


@pytest.mark.parametrize("terminal", [Terminal, AuditTerminal])
@pytest.mark.parametrize("width", [40, 400])
def test_a_note_shows_what_it_quotes(terminal: Any, width: int) -> None:
    out = io.StringIO()
    observer = terminal()
    observer.console = Console(file=out, width=width)
    observer.note(f"client 3 left out: {NASTY}")
    assert out.getvalue() == f"note client 3 left out: {SHOWN}\n"


def nasty_task(e: Experiment) -> Task:
    """A task whose metric has a nasty name, and whose model fails for client 1."""

    class Fails(FederatedData):
        def batches(self, clients: np.ndarray, data: str, *rest: Any) -> Any:
            if 1 in clients and data == "train":
                raise ValueError(NASTY)
            return super().batches(clients, data, *rest)

    x, y = torch.randn(40, 3), torch.arange(40) % 2
    train = Examples(x, y)
    data = Fails(train, train, np.arange(40), np.arange(0, 41, 8), 0.0, e.seed)

    def measure(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.argmax(1) == y).float()

    return Task(nn.Linear(3, 2), data, metrics={f"$\\frac{NASTY[:-1]}$": measure})


def test_a_clients_reason_and_a_metrics_name_steer_neither_terminal_nor_page(
    cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["run", "fedavg", f"--set=task={__name__}:nasty_task", "--set=rounds=2"]
    words += ["--set=participation.cohort=5", "--set=population=5"]
    words += ["--set=engine.name=sequential", "--out", str(out)]
    status, stdout, err = cli(*words)
    assert status == 0, err
    assert f"client 1 left out: error: ValueError: {SHOWN}" in err
    assert is_clean(stdout)
    assert is_clean(err)
    page = (out / "report.html").read_text()
    assert is_clean(page)
    assert "\\u202e" in page, "the name is there, and can be read"
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
        assert line.isprintable()


def test_names_of_files_and_of_presets_steer_neither_terminal_nor_page(
    cli: Cli, tmp_path: Path
) -> None:
    name = NASTY.replace("/", "").replace("\udc80", "")
    preset = tmp_path / f"{name}.toml"
    preset.write_text('method.name = "fedavg"\nrounds = 1\npopulation = 5\n')
    out = tmp_path / f"out{name}"
    status, stdout, err = cli("compare", preset, "--seeds=1", "--out", out)
    assert status == 0, err
    assert is_clean(stdout)
    assert is_clean(err)
    assert is_clean((out / "compare.html").read_text())
    for command in (
        ["run", tmp_path / f"no{name}"],
        ["report", tmp_path / f"no{name}"],
        ["run", "fedavg", "--set", f"{name}=3"],
        ["run", "fedavg", "--set", f"task={name}"],
        ["server", "fedavg", "--insecure", "--listen", name],
        ["client", "--id=0", "--insecure", "--server", name],
        ["doctor", "--certs", tmp_path / name],
        ["status", tmp_path / name],
        ["states", tmp_path / name],
        ["audit", tmp_path / f"no{name}"],
    ):
        status, stdout, err = cli(*command)
        assert status in (1, 2), command
        assert is_clean(stdout + err), command
        assert "\\x1b[31m" in stdout + err, command
        assert "Traceback" not in err


def test_a_file_name_that_is_no_text_is_shown(cli: Cli, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.toml")
    (tmp_path / name).write_text("method.name = = 3")
    status, _, err = cli("run", tmp_path / name)
    assert status == 2
    assert "caf\\udce9.toml" in err


def test_a_run_directory_that_somebody_else_wrote_makes_a_clean_page(
    cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["run", "fedavg", "--set=rounds=1", "--set=population=5"]
    assert cli(*words, "--set=participation.cohort=2", "--out", out)[0] == 0
    row = json.loads((out / "metrics.jsonl").read_text())
    row["dropped"] = {f"<script>{NASTY}": 3}
    (out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    facts = json.loads((out / "environment.json").read_text())
    facts["python"] = f"<b>{NASTY}"
    (out / "environment.json").write_text(json.dumps(facts))
    assert History.read(out / "metrics.jsonl").dropped()
    status, _, err = cli("report", out)
    assert status == 0, err
    page = (out / "report.html").read_text()
    assert is_clean(page)
    assert "<script>[red]" not in page
    assert "<b>[red]" not in page
