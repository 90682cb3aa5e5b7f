"""One installed name: modules of the user's are found, but never before fedcore's."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fedcore import Experiment, SettingsError
from fedcore.config import read_preset
from fedcore.methods import load
from tests.helpers import PATIENCE

ROOT = Path(__file__).parent.parent
TASK = """
import numpy as np, torch
from fedcore import Examples, FederatedData, Task

def make_task(experiment):
    rows = Examples(torch.eye(4), torch.tensor([0, 1, 0, 1]))
    data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    return Task(torch.nn.Linear(4, 2), data)
"""
SETTINGS = ["rounds=1", "participation.cohort=2", "population=2", "engine.chunk=1"]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A user's folder, with the names that everybody uses."""
    for name in ("client", "server", "strategies", "engines", "queue", "logging"):
        text = f"raise SystemExit('the user\\'s {name} was imported')"
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "waves.py").write_text(TASK)
    return tmp_path


def command(folder: Path, *words: str, tree: Path = ROOT) -> tuple[int, str, str]:
    """`fedcore` as its installed script runs, in a folder: status, stdout, stderr."""
    script = "from fedcore.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def settings(*more: str) -> list[str]:
    words = []
    for setting in (*SETTINGS, *more):
        words += ["--set", setting]
    return words


def test_a_users_names_break_no_command(crowded: Path) -> None:
    words = settings("task=waves:make_task")
    status, out, err = command(crowded, "run", "fedavg", *words, "--json")
    assert status == 0, err
    assert json.loads(out)["rounds"] == 1
    for name in ("client", "server", "doctor", "status", "methods"):
        status, out, err = command(crowded, name, "--help")
        assert (status, err) == (0, ""), name
        assert "Usage" in out
    # What imports the whole of a command, before it finds that there is nobody.
    status, _, err = command(crowded, "doctor", "--server", "127.0.0.1:1")
    assert status in (1, 2), err
    assert "was imported" not in err


def test_an_experiment_loads_beside_a_users_names(crowded: Path) -> None:
    script = crowded / "script.py"
    script.write_text(
        "from fedcore import Experiment\n"
        "experiment = Experiment.load('fedprox', {'task': 'waves:make_task'})\n"
        "print(experiment.build_method().__class__.__module__)\n"
    )
    for name in ("queue", "logging"):  # a script's own folder is Python's first
        (crowded / f"{name}.py").unlink()
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fedcore.strategies.fedprox\n", done.stderr


def test_python_m_fedcore_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedcore", "show", "fedavg", "--set", "rounds=7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "rounds = 7" in done.stdout


def test_the_folders_are_modules_of_fedcore_alone() -> None:
    """A method that were imported twice would be two classes."""
    assert load("fedavg").__module__ == "fedcore.strategies.fedavg"
    probe = (
        "import sys\n"
        "from fedcore import Experiment\n"
        "import fedcore.server.serve, fedcore.client.supernode, fedcore.client.states\n"
        "import fedcore.server.app, fedcore.server.status, fedcore.client.doctor\n"
        "Experiment.load('fedavg').build_method()\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'strategies', 'server', 'client'}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_flower_finds_both_apps_while_another_thread_is_importing_fedcore() -> None:
    """In one process under `flwr run`, each in a thread of its own."""
    apps = tomllib.loads((ROOT / "pyproject.toml").read_text())
    components = apps["tool"]["flwr"]["app"]["components"]
    probe = (
        "import sys, types\n"
        "from flwr.supercore.object_ref import validate\n"
        "begun = types.ModuleType('fedcore')\n"
        f"begun.__path__ = [{str(ROOT / 'fedcore')!r}]\n"
        "sys.modules['fedcore'] = begun\n"
        f"for name in {list(components.values())}:\n"
        f"    print(validate(name, project_dir={str(ROOT)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.stdout == "(True, None)\n(True, None)\n", done.stderr


def test_a_preset_is_found_by_path_and_then_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strategies").mkdir()
    for name in ("mine", "fedavg"):
        file = tmp_path / "strategies" / f"{name}.toml"
        file.write_text('method.name = "fedavg"\nrounds = 3\n')
    (tmp_path / "fedprox").mkdir()  # a folder is no preset
    assert Experiment.load("mine").rounds == 3
    assert Experiment.load("strategies/mine.toml").rounds == 3
    assert Experiment.load("strategies/fedavg.toml").rounds == 3, "the user's own"
    assert Experiment.load("fedavg").rounds == read_preset(
        ROOT / "strategies" / "fedavg.toml"
    ).get("rounds", 30), "a name is a bundled preset's first"
    assert Experiment.load("fedprox").method.name == "fedprox"
    assert Experiment.load("benchmarks/fashion.toml").task == "fashion-mnist"
    with pytest.raises(SettingsError, match=r"did you mean strategies/fedprox\.toml"):
        Experiment.load("strategies/fedproks.toml")


def test_a_module_that_another_one_hides_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text(TASK)
    experiment = Experiment.parse({"method": "fedavg", "task": "json:make_task"})
    with pytest.raises(SettingsError, match=r"json\.py is hidden .* rename yours"):
        experiment.build_task()


def test_a_module_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_task.py").write_text("def make_task(experiment)\n")
    values = {"method": "fedavg", "task": "broken_task:make_task"}
    with pytest.raises(SettingsError, match=r"broken_task fails .* SyntaxError"):
        Experiment.parse(values).build_task()


def test_a_users_function_that_fails_is_one_line_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "def make_task(experiment):\n    return experiment.options['width']\n"
    (tmp_path / "wanting_task.py").write_text(text)
    values = {"method": "fedavg", "task": "wanting_task:make_task"}
    with pytest.raises(SettingsError, match=r"failed, at wanting_task\.py line 2: Key"):
        Experiment.parse(values).build_task()


@pytest.mark.slow
def test_the_wheel_installs_one_name(crowded: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tree, wheel], check=True)
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fedcore"}

    words = settings("task=waves:make_task")
    status, out, err = command(crowded, "run", "fedavg", *words, "--json", tree=tree)
    assert status == 0, err
    assert json.loads(out)["rounds"] == 1
    status, out, err = command(crowded, "show", "benchmarks/fashion.toml", tree=tree)
    assert "fashion-mnist" in out, err
    probe = "from fedcore.server.bundle import bundle_of; import fedcore;"
    probe += "from fedcore import Experiment as E; print(fedcore.__file__);"
    probe += "print(len(bundle_of(E.load('fedavg')).content) > 100000)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe],
        cwd=crowded,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, is_whole = done.stdout.split()
    assert Path(where).is_relative_to(tree)
    assert is_whole == "True"
