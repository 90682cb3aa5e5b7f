"""The command line: what it prints, what it refuses and how, and runs that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore import Experiment, run
from fedcore.errors import SettingsError
from fedcore.rounds.rundir import fresh, lock
from fedcore.storage.checkpoint import STATE
from tests.helpers import STRATEGIES, small

Cli = Callable[..., tuple[int, str, str]]
QUICK = [
    "--set",
    "rounds=2",
    "--set",
    "population=20",
    "--set",
    "participation.cohort=4",
    "--set",
    "engine.chunk=4",
]
TINY = [
    "--set",
    "task=least-squares",
    "--set",
    "partition.name=iid",
    *QUICK,
    "--set",
    "checkpoint.seconds=0",
]


# What works


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['fedcore', '--help']\ntry:\n import fedcore.cli as c; c.main()\nexcept SystemExit: pass\n"
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'flwr', 'pydantic', 'datasets')))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=False
        ).returncode
        == 0
    )


def test_methods_lists_every_method_with_its_reference(cli: Cli) -> None:
    status, out, _ = cli("methods")
    assert status == 0
    methods, presets = (
        part.splitlines() for part in out.split("\n\nPresets of the methods above:\n")
    )
    assert [line.split()[0] for line in methods] == STRATEGIES
    files = {file.stem for file in Path("strategies").glob("*.toml")}
    assert [line.split()[0] for line in presets] == sorted(files - set(STRATEGIES))
    assert "McMahan" in out


def test_run_prints_a_table_and_writes_the_run_directory(
    cli: Cli, tmp_path: Path
) -> None:
    status, out, err = cli(
        "run", "strategies/fedavg.toml", *QUICK, "--out", tmp_path / "r"
    )
    assert status == 0
    assert "test accuracy" in out
    assert str(tmp_path / "r" / "report.html") in out
    assert "round 2/2" in err
    expected = {
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "clients.parquet",
        "checkpoint",
        "report.html",
        "lock",
    }
    assert {f.name for f in (tmp_path / "r").iterdir()} == expected


def test_json_is_one_object_with_the_promised_keys(cli: Cli, tmp_path: Path) -> None:
    status, out, _ = cli(
        "run",
        "fedavg",
        *QUICK,
        "--json",
        "--seed",
        "5",
        "--engine",
        "sequential",
        "--out",
        tmp_path / "r",
    )
    assert status == 0
    result = json.loads(out)
    promised = (
        "method engine seed rounds population cohort final history clients_trained clients_per_second first_round_s "
        "bytes_down bytes_up dropped late_answers params_sha256 run_dir"
    )
    assert set(promised.split()) <= result.keys()
    assert (result["seed"], result["engine"], result["rounds"]) == (5, "sequential", 2)
    assert {"test_loss", "test_accuracy", "client_accuracy"} <= result["final"].keys()
    assert {"mean", "std", "p10", "p50", "p90", "lowest_tenth", "pooled"} <= result[
        "final"
    ]["client_accuracy"].keys()
    assert [row["round"] for row in result["history"]] == [1, 2]
    model = (64 * 64 + 64 + 64 * 10 + 10) * 4
    assert result["bytes_down"] == 2 * 4 * model
    assert result["bytes_up"] == 2 * 4 * (model + 4)  # and the loss


def test_show_prints_settings_that_load_to_the_same(cli: Cli, tmp_path: Path) -> None:
    status, out, _ = cli("show", "strategies/fedprox.toml", "--set", "method.mu=0.5")
    assert status == 0
    assert "mu = 0.5" in out
    file = tmp_path / "again.toml"
    file.write_text(out)
    assert cli("show", file)[1] == out


def test_choosing_another_method_or_model_drops_the_settings_of_the_first(
    cli: Cli,
) -> None:
    status, out, _ = cli(
        "show",
        "strategies/fedprox.toml",
        "--set",
        "model.name=logistic",
        "--set",
        "method.name=fedavg",
    )
    assert status == 0
    assert "hidden" not in out
    assert "mu =" not in out


def test_a_resolved_config_reproduces_the_run(cli: Cli, tmp_path: Path) -> None:
    first = json.loads(
        cli("run", "fedavg", *TINY, "--json", "--out", tmp_path / "a")[1]
    )
    again = json.loads(
        cli("run", tmp_path / "a" / "config.toml", "--json", "--out", tmp_path / "b")[1]
    )
    assert again["params_sha256"] == first["params_sha256"]


def test_five_lines_of_a_notebook(tmp_path: Path) -> None:
    from fedcore import Experiment, run

    experiment = Experiment.load(
        "fedavg", {"rounds": 1, "population": 10, "participation.cohort": 2}
    )
    result = run(experiment, out=tmp_path / "r")
    assert 0 <= result.final["test_accuracy"] <= 1


# What is refused


REFUSED = {
    "an unknown key": (
        ["run", "fedavg", "--set", "participation.cohrt=3"],
        "did you mean participation.cohort?",
    ),
    "an unknown method key": (
        ["run", "fedavg", "--set", "method.local_lrr=3"],
        "did you mean method.local_lr?",
    ),
    "an unknown section": (
        ["run", "fedavg", "--set", "modle.name=mlp"],
        "did you mean model?",
    ),
    "a value out of range": (
        ["run", "fedavg", "--set", "participation.dropout=1.3"],
        "participation.dropout = 1.3",
    ),
    "a method value out of range": (
        ["run", "fedavg", "--set", "method.local_lr=-1"],
        "method.local_lr = -1",
    ),
    "a word for a number": (
        ["run", "fedavg", "--set", "rounds=many"],
        "rounds = 'many'",
    ),
    "an unknown method": (
        ["run", "fedavg", "--set", "method.name=fedavgg"],
        'did you mean "fedavg"?',
    ),
    "an unknown engine": (
        ["run", "fedavg", "--engine", "warp"],
        "'sequential', 'vectorised', 'ray' or 'grid'",
    ),
    "an unknown task": (
        ["run", "fedavg", "--set", "task=digitz"],
        "expected one of digits",
    ),
    "an unknown partition": (
        ["run", "fedavg", "--set", "partition.name=round"],
        "partition.name",
    ),
    "a missing preset": (
        ["run", "strategies/fedavgg.toml"],
        "did you mean strategies/fedavg.toml?",
    ),
    "no preset": (["run"], "expected a PRESET"),
    "no value": (["run", "fedavg", "--set", "rounds"], "expected key=value"),
    "a cohort of zero": (
        ["run", "fedavg", "--set", 'participation={name="uniform",fraction=0.001}'],
        "a cohort of 0",
    ),
    "too large a cohort": (
        ["run", "fedavg", "--set", "participation.cohort=101"],
        "the population is 100",
    ),
    "cohort and fraction": (
        [
            "run",
            "fedavg",
            "--set",
            "participation.fraction=0.1",
            "--set",
            "participation.cohort=3",
        ],
        "give one of the two",
    ),
    "an impossible partition": (
        [
            "run",
            "fedavg",
            "--set",
            "partition.alpha=0.001",
            "--set",
            "partition.min_size=20",
        ],
        "raise partition.alpha",
    ),
    "a module that is not there": (
        ["run", "fedavg", "--set", "task=no.such:thing"],
        "cannot import no.such",
    ),
    "no data there": (
        ["run", "fedavg", "--set", "task=fashion-mnist", "--set", "data_folder=/none"],
        "data_folder = /none",
    ),
    "no finite number": (
        ["run", "fedavg", "--set", "method.local_lr=inf"],
        "method.local_lr = inf",
    ),
    "a rate that is none": (
        [
            "run",
            "fedavg",
            "--set",
            "participation.name=bernoulli",
            "--set",
            "participation.alpha=inf",
        ],
        "participation.alpha = inf",
    ),
    "more reports than clients": (
        ["run", "fedavg", *TINY, "--set", "min_reports=5"],
        "a cohort has 4 clients",
    ),
    "a method that is no name": (
        ["run", "fedavg", "--set", "method.name=5"],
        "expected the name of a method",
    ),
    "a method without a module": (
        ["run", "fedavg", "--set", 'method.name=":x"'],
        "package.module:Class",
    ),
    "a task without a module": (
        ["run", "fedavg", "--set", 'task=":x"'],
        "cannot import",
    ),
    "an option that is no number": (
        ["run", "fedavg", *TINY, "--set", "options.examples=abc"],
        "options.examples = 'abc'",
    ),
    "an option out of range": (
        ["run", "fedavg", *TINY, "--set", "options.features=0"],
        "options.features = 0",
    ),
    "an option of another task": (
        ["run", "fedavg", "--set", "options.features=3"],
        '"digits" has no options',
    ),
    "a folder for the digits": (
        ["run", "fedavg", "--set", "data_folder=/none"],
        "leave it out",
    ),
    "a trace that is no text": (
        [
            "run",
            "fedavg",
            "--set",
            f'participation={{name="trace",file="{sys.executable}"}}',
        ],
        "expected a text file",
    ),
    "a directory that cannot be written": (
        ["run", "fedavg", *TINY, "--out", "/sys/kernel"],
        "/sys/kernel",
    ),
    "a directory with other files": (
        ["run", "fedavg", *TINY, "--out", "docs"],
        "is not empty and holds no run",
    ),
    "a grid without Flower": (["run", "fedavg", "--engine", "grid"], "flwr run ."),
    "a resume of nothing": (["run", "--resume", "/none"], "expected config.toml"),
    "a report of nothing": (["report", "/none"], "expected config.toml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_end_with_one_message_and_status_2(
    name: str, cli: Cli, tmp_path: Path
) -> None:
    arguments, expected = REFUSED[name]
    out = (
        ["--out", tmp_path / "r"]
        if arguments[0] == "run" and not {"--resume", "--out"} & set(arguments)
        else []
    )
    status, stdout, err = cli(*arguments, *out)
    assert status == 2
    assert expected in err
    assert "Traceback" not in err
    assert stdout == ""
    assert not (tmp_path / "r" / "config.toml").exists()


def test_cuda_where_there_is_none_is_refused(cli: Cli, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    status, _, err = cli(
        "run", "fedavg", "--set", "engine.device=cuda", "--out", tmp_path / "r"
    )
    assert status == 2
    assert "sees no CUDA device" in err


def test_toml_that_is_none_is_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("method.name = = 3")
    status, _, err = cli("run", file)
    assert status == 2
    assert "not valid TOML" in err


def test_an_occupied_directory_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    status, _, err = cli("run", "fedavg", *TINY, "--out", tmp_path / "r")
    assert status == 2
    assert "already holds a run" in err
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_a_model_that_gives_nan_from_the_first_step_fails_with_status_1(
    cli: Cli, tmp_path: Path
) -> None:
    status, _, err = cli(
        "run",
        "fedavg",
        *TINY,
        "--set",
        "rounds=9",
        "--set",
        "method.local_lr=1e38",
        "--out",
        tmp_path / "r",
    )
    assert status == 1
    assert "lower the learning rate" in err
    assert "Traceback" not in err


# Resuming


def test_resuming_with_other_settings_names_them(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    status, _, err = cli(
        "run",
        "fedavg",
        *TINY,
        "--set",
        "method.local_lr=0.3",
        "--resume",
        tmp_path / "r",
    )
    assert status == 2
    assert "method.local_lr was 0.1 and is now 0.3" in err


def test_resuming_to_fewer_rounds_than_are_done_is_refused(
    cli: Cli, tmp_path: Path
) -> None:
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    before = (tmp_path / "r" / "config.toml").read_bytes()
    status, _, err = cli("run", "--resume", tmp_path / "r", "--set", "rounds=1")
    assert status == 2
    assert "has done 2" in err
    assert (tmp_path / "r" / "config.toml").read_bytes() == before


def test_known_rates_are_refused_where_nobody_knows_them_before_anything_is_written(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "trace").write_text("0 1\n2\n")
    trace = f"participation.file={tmp_path / 'trace'}"
    settings = [
        "task=least-squares",
        "population=20",
        "rounds=2",
        "participation.name=trace",
        "method.weighting=known",
    ]
    arguments = [part for setting in [*settings, trace] for part in ("--set", setting)]
    status, _, err = cli("run", "fedavg", *arguments, "--out", tmp_path / "r")
    assert status == 2
    assert "no known rates" in err
    assert not (tmp_path / "r").exists()


def test_two_runs_of_one_moment_get_two_directories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({fresh("x") for _ in range(5)}) == 5


def test_a_task_of_the_users_own_is_found_where_the_command_is_given(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(
        "from fedcore.tasks import least_squares as make_task\n"
    )
    more = [
        "--set",
        "task=mine:make_task",
        "--set",
        "rounds=1",
        "--set",
        "population=8",
        "--set",
        "participation.cohort=4",
        "--json",
    ]
    command = [str(Path(sys.executable).parent / "fedcore"), "run", "fedavg", *more]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_comparison_that_lacks_a_run_ends_with_status_1(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "boom.toml").write_text(
        'method.name = "fedavg"\nmethod.local_lr = 1e38\n'
    )
    status, out, _ = cli(
        "compare",
        "fedavg",
        tmp_path / "boom.toml",
        *TINY,
        "--seeds",
        "1",
        "--out",
        tmp_path / "c",
    )
    assert status == 1
    assert "boom" in out


def test_a_finished_run_can_be_made_longer_on_another_engine(
    cli: Cli, tmp_path: Path
) -> None:
    whole = json.loads(
        cli(
            "run",
            "fedavg",
            *TINY,
            "--set",
            "rounds=4",
            "--json",
            "--out",
            tmp_path / "w",
        )[1]
    )
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    status, out, _ = cli(
        "run",
        "--resume",
        tmp_path / "r",
        "--set",
        "rounds=4",
        "--engine",
        "sequential",
        "--json",
    )
    assert status == 0
    longer = json.loads(out)
    assert longer["rounds"] == 4
    assert longer["final"]["test_loss"] == pytest.approx(
        whole["final"]["test_loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    "damage", ["state", "bytes", "missing", "metrics", "version", "edited", "no state"]
)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, cli: Cli, tmp_path: Path
) -> None:
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    checkpoint = tmp_path / "r" / "checkpoint"
    server = next(checkpoint.glob("server-*"))
    if damage == "state":
        (checkpoint / STATE).write_text("{")
    elif damage == "bytes":
        content = bytearray(server.read_bytes())
        content[-1] ^= 1
        server.write_bytes(bytes(content))
    elif damage == "missing":
        server.unlink()
    elif damage == "metrics":
        (tmp_path / "r" / "metrics.jsonl").write_text("")
    else:
        state = json.loads((checkpoint / STATE).read_text())
        (checkpoint / STATE).write_text(
            json.dumps(
                {**state, **({"version": 99} if damage == "version" else {"round": 1})}
            )
        )
    if damage == "no state":
        (checkpoint / STATE).unlink()
    status, _, err = cli("run", "--resume", tmp_path / "r", "--set", "rounds=3")
    assert status == 2
    assert ("expected 1" if damage == "version" else "is damaged") in err


WAITING = "tests.methods:Waiting"  # SCAFFOLD, slowly


def start(folder: Path, method: str, rounds: int, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "fedcore.cli",
        "run",
        "fedavg",
        *TINY,
        "--set",
        f"method.name={method}",
    ]
    command += ["--set", f"rounds={rounds}", *more]
    command += (
        ["--resume", str(folder)]
        if (folder / "config.toml").exists()
        else ["--out", str(folder)]
    )
    environment = {**os.environ, "FEDCORE_TEST_WAIT": "0.1"}
    return subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result: dict[str, object] = json.loads(out)
    return result


KEEPERS = [
    name for name in STRATEGIES if name not in ("fedavg", "fedprox")
]  # methods that keep more than the model


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize(("engine", "reads"), [("sequential", 25), ("vectorised", 3)])
def test_kill_9_in_the_middle_of_a_round_costs_nothing(
    name: str, engine: str, reads: int, tmp_path: Path
) -> None:
    values = {
        "task": "tests.methods:crashing",
        "rounds": 8,
        "participation": {"name": "markov", "mean": 0.6, "q": 0.5, "dropout": 0.1},
    }
    e = small(name, min_reports=0, engine__name=engine, engine__chunk=2)
    e = Experiment.parse(e.model_dump(mode="json") | values)
    (tmp_path / "preset.toml").write_text(e.to_toml())
    whole = run(e, tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "fedcore.cli",
        "run",
        str(tmp_path / "preset.toml"),
        "--out",
        str(tmp_path / "r"),
    ]
    # One process: what a killed fork leaves is in test_forks.py.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FEDCORE_TEST_CRASH": str(reads),
    }
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = _lines(tmp_path / "r")
    assert (done == 0) == (reads == 3)
    assert done < 8
    assert run(e, resume=tmp_path / "r").params_sha256 == whole.params_sha256


def test_a_run_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    e = small("fedavg", rounds=4)
    whole = run(e, tmp_path / "whole").params_sha256
    run(small("fedavg", rounds=2), tmp_path / "r")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = lock(tmp_path / "r")
        os.write(writer, b"held" if held else b"")
        signal.pause()
    assert os.read(reader, 4) == b"held"
    try:
        with pytest.raises(
            SettingsError, match=r"being written by another process.*stop it"
        ):
            run(e, resume=tmp_path / "r")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run(e, resume=tmp_path / "r").params_sha256 == whole


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    more = ["--set", 'participation={name="markov",mean=0.4,dropout=0.1}']
    whole = finish(start(tmp_path / "whole", "scaffold", 12, *more))
    process, kills = start(tmp_path / "r", WAITING, 12, *more), 0
    while kills < 4:
        lines = _lines(tmp_path / "r") + 1
        deadline = time.monotonic() + 60
        while (
            _lines(tmp_path / "r") < lines
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(0.023 * kills)
        process.kill()
        process.communicate()
        kills += 1
        process = start(tmp_path / "r", WAITING, 12, *more)
    assert finish(process)["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_that_resume_takes(
    number: signal.Signals, tmp_path: Path
) -> None:
    more = ["--set", "checkpoint.seconds=1000"]
    whole = finish(start(tmp_path / "whole", "scaffold", 10, *more))
    process = start(tmp_path / "r", WAITING, 10, *more)
    deadline = time.monotonic() + 60
    while _lines(tmp_path / "r") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'r'}" in err
    assert "Traceback" not in err
    assert (
        finish(start(tmp_path / "r", WAITING, 10, *more))["params_sha256"]
        == whole["params_sha256"]
    )


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_an_unfinished_line_in_the_metrics_is_survived(
    cli: Cli, tmp_path: Path
) -> None:
    assert cli("run", "fedavg", *TINY, "--out", tmp_path / "r")[0] == 0
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    with (tmp_path / "copy" / "metrics.jsonl").open("a") as f:
        f.write('{"round": 3, "coh')
    status, out, _ = cli(
        "run", "--resume", tmp_path / "copy", "--set", "rounds=3", "--json"
    )
    assert status == 0
    assert [row["round"] for row in json.loads(out)["history"]] == [1, 2, 3]
