"""The first minutes: what newcomers type, and the one line that helps them on."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, SettingsError, Task, run
from fedcore.data import sources
from fedcore.data.federated import LocalSettings
from fedcore.tasks import least_squares
from fedcore.views.running import NotebookBar
from fedcore.views.terminal import Terminal
from tests.helpers import small

Cli = Callable[..., tuple[int, str, str]]
TINY = {
    "task": "least-squares",
    "rounds": 2,
    "population": 8,
    "participation.cohort": 4,
    "engine.chunk": 4,
}
SETS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


# Hints

HINTS = {
    "run fedavg --rounds 5": "did you mean --set rounds=5?",
    "run fedavg --rounds=5": "did you mean --set rounds=5?",
    "run fedavg rounds=5": "did you mean --set rounds=5?",
    "run rounds=5": "expected a PRESET first",
    "run fedavg --lr 0.1": "--set method.local_lr=0.1",
    "run fedavg --epochs 3": "--set local.epochs=3",
    "run fedavg --cohort 4": "did you mean --set participation.cohort=4?",
    "run fedavg --clients 9": "--set population=9",
    "run fedavg --batch-size 4": "did you mean --set local.batch_size=4?",
    "run fedavg --method fedprox": "did you mean --set method.name=fedprox?",
    "run fedavg --set rounds 5": "did you mean --set rounds=5?",
    "run fedavg --sed 3": "did you mean --seed?",
    "run fedavg --seed x": "'x' is not a valid integer",
    "run fedavg fedprox": "did you mean fedcore compare fedavg fedprox?",
    "run fedvag": "did you mean fedavg?",
    "run FedAvg": "did you mean fedavg?",
    "run strategies/fedvag.toml": "did you mean strategies/fedavg.toml?",
    "run mine.py": '--set task="module:function"',
    "run docs": "it is a directory",
    "run fedavg --engine vectorized": 'did you mean "vectorised"?',
    "show fedavg --engine ray": "did you mean --set engine.name=ray?",
    "show fedavg --set method.lr=1": "did you mean method.local_lr or",
    "show fedavg --set epochs=3": "did you mean local.epochs or finetune.epochs?",
    "show fedavg --set lr=3": "did you mean method.local_lr,",
    "show fedavg --set method.mu=3": 'a setting of method.name = "fedprox"',
    "show fedavg --set model.name=mpl": 'did you mean "mlp"?',
    "run fedavg --set task=digit": 'did you mean "digits"?',
    "run fedavg --set task=mine.py:make": "did you mean mine:make?",
    "show": "expected PRESET",
    "train fedavg": "did you mean fedcore run?",
    "fedavg": "did you mean fedcore run fedavg?",
    "cmpare fedavg": "did you mean fedcore compare?",
    "report strategies": "is no run directory",
    "compare fedavg fedvag": "did you mean fedavg?",
}


@pytest.mark.parametrize("typed", HINTS)
def test_what_is_typed_wrong_gets_the_hint_that_helps(typed: str, cli: Cli) -> None:
    for options in ([], ["--json"]):
        if options and typed.split()[0] not in ("run", "show", "compare"):
            continue
        status, out, err = cli(*typed.split(), *options)
        assert (status, out) == (2, "")
        assert HINTS[typed] in err
        assert len(err.splitlines()) == 1, err


def test_an_audit_of_nothing_names_both_readings(cli: Cli) -> None:
    status, out, err = cli("audit", "NOWHERE")
    assert (status, out) == (2, "")
    assert "there is no such directory, and there is no such preset" in err


def test_a_fault_in_set_is_not_said_to_be_the_presets(cli: Cli) -> None:
    _, _, err = cli("show", "fedavg", "--set", "participation.cohort=x")
    assert err.startswith("fedcore: --set participation.cohort=x: must be")


def test_a_fault_of_the_file_names_the_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('method.name = "fedavg"\nparticipation.cohort = "x"\n')
    _, _, err = cli("show", file, "--set", "rounds=3")
    assert err.startswith(f"fedcore: {file}: participation.cohort = 'x': must be")


def test_help_shows_no_backslashes_and_describes_the_arguments(cli: Cli) -> None:
    status, out, _ = cli("--help")
    commands = [
        line.split()[0] for line in out.partition("Commands:")[2].splitlines()[1:]
    ]
    assert {"run", "compare", "audit", "server"} <= set(commands)
    for command in commands:
        status, out, _ = cli(command, "--help")
        assert status == 0
        assert "\\" not in out
        arguments = out.partition("Arguments:")[2].partition("Options:")[0]
        if arguments:
            assert len(arguments.split()) > 4, f"{command}: {arguments}"
    out = cli("run", "--help")[1]
    assert out.count("a TOML file, or the name of a method") == 1


# Files as other systems write them


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbfmethod.name = "fedavg"\nrounds = 7\n',
        b'method.name = "fedavg"\r\nrounds = 7\r\n',
        'method.name = "fedavg"\nrounds = 7\n'.encode("utf-16"),
    ],
    ids=["byte-order mark", "Windows", "UTF-16"],
)
def test_a_preset_is_read_as_every_editor_saves_it(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_bytes(content)
    assert Experiment.load(tmp_path / "p.toml").rounds == 7


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\0b", "no text"),
        (b"\xe9 = 1", "saved as UTF-8"),
        (b"\x7fELF\xff\xff", "no text"),
        (b"\xff\xfe\x00", "no text"),
        (b"", "method is missing"),
        (b"method.name = ", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_preset_is_one_line(
    content: bytes, problem: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_bytes(content)
    status, out, err = cli("show", tmp_path / "p.toml")
    assert (status, out) == (2, "")
    assert problem in err
    assert len(err.splitlines()) == 1


def test_a_trace_is_read_with_a_byte_order_mark_and_windows_line_ends(
    tmp_path: Path,
) -> None:
    (tmp_path / "trace").write_bytes(b"\xef\xbb\xbf0 1\r\n\r\n5\r\n")
    values = {"participation": {"name": "trace", "file": str(tmp_path / "trace")}}
    trace = Experiment.parse({"method": "fedavg", **values}).participation
    process = trace.process(8, 0, lambda: pytest.fail("labels are not needed"))
    assert [process.members(t).tolist() for t in range(3)] == [[0, 1], [], [5]]


# Data that is not here


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_data_that_is_missing_is_refused_before_the_hub_is_tried_again_and_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *_, **__: pytest.fail("retried")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(sources, "_idx_file", lambda folder, name: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for variable in ("FEDCORE_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SettingsError, match=r"cannot be reached.*data_folder=DIR") as e:
        sources.load(name)
    assert "run once with a network" in str(e.value)
    assert ("apt-get install" in str(e.value)) == (name == "fashion-mnist")


# What takes long says so


def test_a_comparison_says_how_much_it_is_before_it_starts(
    cli: Cli, tmp_path: Path
) -> None:
    command = ["compare", "fedavg", "fedprox", "--seeds", "2", *SETS]
    status, out, err = cli(*command, "--out", tmp_path / "c")
    assert status == 0
    lines = err.splitlines()
    assert lines[0].endswith("4 runs, 8 rounds to do")
    assert sum("for the other 7 rounds, by the first" in line for line in lines) == 1
    assert "rounds to do" not in out
    again = cli(*command, "--out", tmp_path / "c")[2]
    assert "4 runs, 0 rounds to do" in again


def test_a_long_run_is_estimated_after_its_first_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Named:
        def describe(self) -> str:
            return "an engine"

    terminal = Terminal()
    engine: Any = Named()
    experiment = small("fedavg", rounds=100)
    from fedcore.rounds.history import History

    terminal.started(experiment, engine, 10, History())
    terminal.round_done({"round": 1, "seconds": 20.0, "reports": 4})
    assert "about 33 min for the other 99 rounds" in capsys.readouterr().err


# From Python


def make_task(experiment: Experiment) -> Task:
    return least_squares(experiment)


def test_a_run_from_python_writes_the_report_and_shows_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(Experiment.load("fedavg", TINY), tmp_path / "r")
    assert (tmp_path / "r" / "report.html").exists()
    assert "round 2/2" in capsys.readouterr().err
    run(Experiment.load("fedavg", TINY), tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    page = result._repr_html_()
    assert "test loss" in page
    assert str(tmp_path / "r" / "report.html") in page


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook shows, as HTML."""
    shown: list[str] = []

    def display(content: Any, display_id: bool = False) -> Any:
        shown.append(content._repr_html_())
        return types.SimpleNamespace(update=display)

    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    kernel = types.SimpleNamespace(kernel=True)
    ipython.get_ipython = lambda: kernel  # type: ignore[attr-defined]
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_a_notebook_gets_a_bar(
    notebook: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Experiment.load("fedavg", TINY), tmp_path / "r")
    assert '<progress value="0" max="2">' in notebook[0]
    assert '<progress value="2" max="2">' in notebook[-1]
    assert capsys.readouterr() == ("", "")
    bar = NotebookBar(lambda content, **_: notebook.append(content._repr_html_()))
    bar.note("a < b")
    assert "a &lt; b" in notebook[-1]


def test_an_error_is_short_in_a_notebook() -> None:
    with pytest.raises(SettingsError) as caught:
        Experiment(method="fedavg", rounds=-1)
    lines = caught.value._render_traceback_()
    assert len(lines) == 2
    assert "Experiment(" in lines[0]
    assert "rounds = -1: must be greater than or equal to 1" in lines[1]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_function_is_a_task_and_resumes_by_its_name(tmp_path: Path) -> None:
    experiment = Experiment.load("fedavg", {**TINY, "task": make_task})
    assert experiment.task == "tests.test_first_minutes:make_task"
    named = run(experiment, tmp_path / "a", progress=False)
    given = run(
        Experiment.load("fedavg", TINY), tmp_path / "b", task=make_task, progress=False
    )
    plain = run(Experiment.load("fedavg", TINY), tmp_path / "c", progress=False)
    hashes = {result.params_sha256 for result in (named, given, plain)}
    assert len(hashes) == 1
    longer = experiment.model_copy(update={"rounds": 3})
    again = Experiment.parse(experiment.model_dump(), {"rounds": 3})
    assert again == longer
    assert run(again, resume=tmp_path / "a", progress=False).rounds == 3


def test_a_lambda_is_a_task_here_and_says_why_it_is_none_elsewhere(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcore import users

    experiment = Experiment.load(
        "fedavg", {**TINY, "task": lambda e: [make_task(e)][0]}
    )
    run(experiment, tmp_path / "r", progress=False)
    longer = experiment.model_copy(update={"rounds": 3})
    assert run(longer, resume=tmp_path / "r", progress=False).rounds == 3
    monkeypatch.setattr(users, "_NAMELESS", {})  # as in another process
    status, _, err = cli("run", "--resume", tmp_path / "r", "--set", "rounds=4")
    assert status == 2
    assert "is not found in another process" in err
    assert len(err.splitlines()) == 1


def test_two_functions_of_one_name_are_two_tasks() -> None:
    first = Experiment(method="fedavg", task=lambda e: [e, 1])
    second = Experiment(method="fedavg", task=lambda e: [e, 2])
    assert first.task != second.task


def wrong_signature() -> None:
    """A function that is no task."""


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a value": (lambda: Experiment(method="fedavg", rounds=-1), "rounds = -1"),
    "no method": (Experiment, "method is missing"),  # type: ignore[call-arg]
    "a section": (
        lambda: Experiment(method="fedavg", local=5),  # type: ignore[arg-type]
        "local = 5: expected a section",
    ),
    "by place": (
        lambda: Experiment("fedavg"),  # type: ignore[misc]
        r'Experiment.load\("fedavg"\)',
    ),
    "a copy": (
        lambda: Experiment(method="fedavg").model_copy(update={"rouds": 3}),
        "did you mean rounds",
    ),
    "a copy's value": (
        lambda: Experiment(method="fedavg").model_copy(update={"seed": -1}),
        "seed = -1",
    ),
    "a copied section": (
        lambda: Experiment(
            method="fedavg", local=LocalSettings().model_copy(update={"epochs": 0})
        ),
        "local.epochs = 0",
    ),
    "a changed one": (
        lambda: setattr(Experiment(method="fedavg"), "rounds", 3),
        "model_copy",
    ),
    "one override": (lambda: Experiment.load("fedavg", "rounds=3"), "a list of key"),
    "no preset": (lambda: Experiment.load(None), "no such preset"),  # type: ignore[arg-type]
    "no dict": (lambda: Experiment.parse([1]), "expected a dict"),  # type: ignore[arg-type]
    "an object": (
        lambda: Experiment(method="fedavg", options={"a": object()}),
        "options.a.*cannot be written to config.toml",
    ),
    "a name for an experiment": (
        lambda: run("fedavg"),  # type: ignore[arg-type]
        r'run\(Experiment.load\("fedavg"\)\)',
    ),
    "a function of nothing": (
        lambda: run(Experiment(method="fedavg"), task=wrong_signature),  # type: ignore[arg-type]
        "expected a function of one argument",
    ),
    "an out that is no path": (
        lambda: run(Experiment(method="fedavg"), out=5),  # type: ignore[arg-type]
        "out = 5",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_from_python_is_a_settings_error(name: str) -> None:
    make, message = FAULTS[name]
    with pytest.raises(SettingsError, match=message):
        make()


def test_defaults_and_presets_are_told_apart() -> None:
    for text in (Experiment.__doc__, Experiment.load.__doc__):
        assert "strategies/fedavg.toml" in str(text)
    assert Experiment(method="fedavg").rounds == 30
    assert Experiment.load("fedavg").rounds == 40


# Odd places and moments


def test_odd_run_directories_are_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "fedavg").mkdir()  # has the name of a method, and is none
    for out in ("file", "file/r", "x" * 300, ""):
        status, printed, err = cli("run", "fedavg", *SETS, "--out", out)
        assert (status, printed) == (2, ""), err
        assert len(err.splitlines()) == 1, err
    for command in (["report", "x" * 300], ["run", "--resume", "file"]):
        assert cli(*command)[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "fedavg"}
    status, _, _ = cli("show", "fedavg")
    assert status == 0


def test_output_that_is_closed_is_no_fault(tmp_path: Path) -> None:
    for closed in (">&-", "2>&-"):
        command = f'"{sys.executable}" -m fedcore show fedavg {closed}'
        done = subprocess.run(command, shell=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_ends_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "fedcore", "run", "fedavg"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.endswith(" numpy.core\n") or " numpy._core" in line:
                break  # PyTorch is next
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
        assert "Traceback" not in rest
