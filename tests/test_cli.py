"""The command line: results, refusals, and runs that are killed."""

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
from fedcore.rounds.loop import Result
from fedcore.rounds.rundir import fresh, lock
from fedcore.storage.checkpoint import STATE
from tests.helpers import PATIENCE, STRATEGIES, small

Cli = Callable[..., tuple[int, str, str]]


def sets(*settings: str) -> list[str]:
    """The settings as options of the command line."""
    arguments = []
    for setting in settings:
        arguments += ["--set", setting]
    return arguments


QUICK_SETTINGS = ["rounds=2", "population=20", "participation.cohort=4"]
QUICK_SETTINGS += ["engine.chunk=4"]
TINY_SETTINGS = ["task=least-squares", "partition.name=iid", *QUICK_SETTINGS]
TINY_SETTINGS += ["checkpoint.seconds=0"]
QUICK, TINY = sets(*QUICK_SETTINGS), sets(*TINY_SETTINGS)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished run of two rounds, with the settings TINY."""
    experiment = Experiment.load("fedavg", TINY_SETTINGS)
    return run(experiment, tmp_path_factory.mktemp("runs") / "done")


@pytest.fixture
def copy(done: Result, tmp_path: Path) -> Path:
    """The finished run, to be resumed or spoilt."""
    return shutil.copytree(done.run_dir, tmp_path / "r")


# Results


def test_help_does_not_import_torch() -> None:
    code = """
import sys
sys.argv = ["fedcore", "--help"]
try:
    import fedcore.cli
    fedcore.cli.main()
except SystemExit:
    pass
heavy = ("torch", "flwr", "pydantic", "datasets")
sys.exit(any(module in sys.modules for module in heavy))
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


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
    folder = tmp_path / "r"
    status, out, err = cli("run", "strategies/fedavg.toml", *QUICK, "--out", folder)
    assert status == 0
    assert "test accuracy" in out
    assert str(folder / "report.html") in out
    assert "round 2/2" in err
    settings = {"config.toml", "environment.json"}
    results = {"metrics.jsonl", "clients.parquet", "checkpoint", "report.html"}
    assert {file.name for file in folder.iterdir()} == settings | results | {"lock"}


def test_json_is_one_object_with_the_promised_keys(cli: Cli, tmp_path: Path) -> None:
    options = ["--json", "--seed", "5", "--engine", "sequential"]
    status, out, _ = cli("run", "fedavg", *QUICK, *options, "--out", tmp_path / "r")
    assert status == 0
    result = json.loads(out)
    promised = (
        "method engine seed rounds population cohort final history clients_trained "
        "clients_per_second first_round_s bytes_down bytes_up dropped late_answers "
        "params_sha256 run_dir"
    )
    assert set(promised.split()) <= result.keys()
    assert (result["seed"], result["engine"], result["rounds"]) == (5, "sequential", 2)
    final = result["final"]
    assert {"test_loss", "test_accuracy", "client_accuracy"} <= final.keys()
    parts = {"mean", "std", "p10", "p50", "p90", "worst_tenth", "pooled"}
    assert parts <= final["client_accuracy"].keys()
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
    others = sets("model.name=logistic", "method.name=fedavg")
    status, out, _ = cli("show", "strategies/fedprox.toml", *others)
    assert status == 0
    assert "hidden" not in out
    assert "mu =" not in out


def test_a_resolved_config_reproduces_the_run(
    cli: Cli, done: Result, tmp_path: Path
) -> None:
    config = Path(done.run_dir) / "config.toml"
    status, out, _ = cli("run", config, "--json", "--out", tmp_path / "b")
    assert status == 0
    assert json.loads(out)["params_sha256"] == done.params_sha256


def test_five_lines_of_a_notebook(tmp_path: Path) -> None:
    from fedcore import Experiment, run

    experiment = Experiment.load(
        "fedavg", {"rounds": 1, "population": 10, "participation.cohort": 2}
    )
    result = run(experiment, out=tmp_path / "r")
    assert 0 <= result.final["test_accuracy"] <= 1


# Refusals


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
        "--set participation.dropout=1.3: must be less than 1",
    ),
    "a method value out of range": (
        ["run", "fedavg", "--set", "method.local_lr=-1"],
        "--set method.local_lr=-1: must be greater than 0",
    ),
    "a word for a number": (
        ["run", "fedavg", "--set", "rounds=many"],
        "--set rounds=many: must be a valid integer",
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
        "has 100 clients: set participation.cohort to at most that",
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
        "--set method.local_lr=inf: must be a finite number",
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
        "--set participation.alpha=inf: must be a finite number",
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


def test_an_occupied_directory_is_not_overwritten(cli: Cli, copy: Path) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    status, _, err = cli("run", "fedavg", *TINY, "--out", copy)
    assert status == 2
    assert "already holds a run" in err
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_model_that_gives_nan_from_the_first_step_fails_with_status_1(
    cli: Cli, tmp_path: Path
) -> None:
    broken = sets("rounds=9", "method.local_lr=1e38")
    status, _, err = cli("run", "fedavg", *TINY, *broken, "--out", tmp_path / "r")
    assert status == 1
    assert "lower the learning rate" in err
    assert "Traceback" not in err


# Resuming


def test_resuming_with_other_settings_names_them(cli: Cli, copy: Path) -> None:
    other = sets("method.local_lr=0.3")
    status, _, err = cli("run", "fedavg", *TINY, *other, "--resume", copy)
    assert status == 2
    assert "method.local_lr was 0.1 and is now 0.3" in err


def test_resuming_to_fewer_rounds_than_are_done_is_refused(
    cli: Cli, copy: Path
) -> None:
    before = (copy / "config.toml").read_bytes()
    status, _, err = cli("run", "--resume", copy, *sets("rounds=1"))
    assert status == 2
    assert "has done 2" in err
    assert (copy / "config.toml").read_bytes() == before


def test_known_rates_that_the_process_lacks_are_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "trace").write_text("0 1\n2\n")
    trace = ["participation.name=trace", f"participation.file={tmp_path / 'trace'}"]
    small_task = ["task=least-squares", "population=20", "rounds=2"]
    arguments = sets(*small_task, *trace, "method.weighting=known")
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
    source = "from fedcore.tasks import least_squares as make_task\n"
    (tmp_path / "mine.py").write_text(source)
    program = str(Path(sys.executable).parent / "fedcore")
    small_run = ["rounds=1", "population=8", "participation.cohort=4"]
    arguments = ["run", "fedavg", *sets("task=mine:make_task", *small_run), "--json"]
    done = subprocess.run(
        [program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_comparison_that_lacks_a_run_ends_with_status_1(
    cli: Cli, tmp_path: Path
) -> None:
    preset, folder = tmp_path / "boom.toml", tmp_path / "c"
    preset.write_text('method.name = "fedavg"\nmethod.local_lr = 1e38\n')
    options = [*TINY, "--seeds", "1", "--out", folder]
    status, out, _ = cli("compare", "fedavg", preset, *options)
    assert status == 1
    assert "boom" in out


def test_a_finished_run_can_be_made_longer_on_another_engine(
    cli: Cli, copy: Path, tmp_path: Path
) -> None:
    whole = run(Experiment.load("fedavg", [*TINY_SETTINGS, "rounds=4"]), tmp_path / "w")
    options = [*sets("rounds=4"), "--engine", "sequential", "--json"]
    status, out, _ = cli("run", "--resume", copy, *options)
    assert status == 0
    longer = json.loads(out)
    assert longer["rounds"] == 4
    expected = pytest.approx(whole.final["test_loss"], abs=1e-5)
    assert longer["final"]["test_loss"] == expected


def edit_state(folder: Path, **values: int) -> None:
    file = folder / "checkpoint" / STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def flip_last_bits(folder: Path) -> None:
    file = next((folder / "checkpoint").glob("server-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state": lambda folder: (folder / "checkpoint" / STATE).write_text("{"),
    "bytes": flip_last_bits,
    "missing": lambda folder: next(folder.glob("checkpoint/server-*")).unlink(),
    "metrics": lambda folder: (folder / "metrics.jsonl").write_text(""),
    "version": lambda folder: edit_state(folder, version=99),
    "edited": lambda folder: edit_state(folder, round=1),
    "no state": lambda folder: (folder / "checkpoint" / STATE).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, cli: Cli, copy: Path
) -> None:
    DAMAGES[damage](copy)
    status, _, err = cli("run", "--resume", copy, *sets("rounds=3"))
    assert status == 2
    assert ("expected 1" if damage == "version" else "is damaged") in err


GATED = "tests.methods:Gated"  # SCAFFOLD, whose rounds begin as the test lets them


def start(folder: Path, method: str, rounds: int, *more: str) -> subprocess.Popen[str]:
    """A process that begins the run in this folder, or goes on with it."""
    settings = sets(f"method.name={method}", f"rounds={rounds}", *more)
    where = "--resume" if (folder / "config.toml").exists() else "--out"
    arguments = ["run", "fedavg", *TINY, *settings, where, str(folder), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "fedcore.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FEDCORE_TEST_GATE": str(_gate(folder))},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    result: dict[str, object] = json.loads(out)
    return result


def _gate(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-gate")


def let_begin(folder: Path, rounds: int) -> None:
    """Let the first `rounds` rounds of the run begin, and the next one wait."""
    new = _gate(folder).with_suffix(".new")
    new.write_text(str(rounds))
    new.replace(_gate(folder))


def wait_for_rounds(folder: Path, rounds: int, process: subprocess.Popen[str]) -> None:
    """Wait until the metrics have so many rounds; the process must live until then."""
    deadline = time.monotonic() + PATIENCE
    while _lines(folder) < rounds:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"round {rounds} has not come"
        time.sleep(0.01)


# Methods that keep more than the model.
KEEPERS = sorted(set(STRATEGIES) - {"fedavg", "fedprox"})


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
    command = [sys.executable, "-m", "fedcore.cli", "run"]
    command += [str(tmp_path / "preset.toml"), "--out", str(tmp_path / "r")]
    # One process: what a killed fork leaves is in test_forks.py.
    crash = {"OMP_NUM_THREADS": "1", "FEDCORE_TEST_CRASH": str(reads)}
    environment = os.environ | crash
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
        message = r"being written by another process.*stop it"
        with pytest.raises(SettingsError, match=message):
            run(e, resume=tmp_path / "r")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run(e, resume=tmp_path / "r").params_sha256 == whole


@pytest.mark.slow
@pytest.mark.timeout(7 * PATIENCE)
def test_kill_9_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    more = ['participation={name="markov",mean=0.4,dropout=0.1}']
    whole = finish(start(tmp_path / "whole", "scaffold", 16, *more))
    folder = tmp_path / "r"
    for kill in range(4):
        rounds = _lines(folder) + 1
        let_begin(folder, rounds)
        process = start(folder, GATED, 16, *more)
        wait_for_rounds(folder, rounds, process)
        # Anywhere in the next two rounds; the third waits for the gate.
        let_begin(folder, rounds + 2)
        time.sleep(0.023 * kill)
        process.kill()
        process.communicate(timeout=PATIENCE)
    let_begin(folder, 16)
    again = finish(start(folder, GATED, 16, *more))
    assert again["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(5 * PATIENCE)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_that_resume_takes(
    number: signal.Signals, tmp_path: Path
) -> None:
    more, folder = ["checkpoint.seconds=1000"], tmp_path / "r"
    whole = finish(start(tmp_path / "whole", "scaffold", 10, *more))
    let_begin(folder, 3)
    process = start(folder, GATED, 10, *more)
    wait_for_rounds(folder, 3, process)
    process.send_signal(number)
    let_begin(folder, 10)  # the signal came while the fourth round waited
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"--resume {folder}" in err
    assert "Traceback" not in err
    assert _lines(folder) == 3
    again = finish(start(folder, GATED, 10, *more))
    assert again["params_sha256"] == whole["params_sha256"]


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_an_unfinished_line_in_the_metrics_is_survived(cli: Cli, copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "coh')
    status, out, _ = cli("run", "--resume", copy, *sets("rounds=3"), "--json")
    assert status == 0
    assert [row["round"] for row in json.loads(out)["history"]] == [1, 2, 3]
