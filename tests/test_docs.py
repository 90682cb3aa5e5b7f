"""What the documents say is run: every command of the README, every example in docs/, every link."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore import Experiment, run

Cli = Callable[..., tuple[int, str, str]]
DOCUMENTS = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
README = Path("README.md").read_text()


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL
    )


def commands() -> list[str]:
    lines = [
        line for block in blocks(Path("README.md"), "sh") for line in block.splitlines()
    ]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("fedcore")])
def test_every_fedcore_command_of_the_readme_runs_on_tiny_data(
    command: str, cli: Cli, tmp_path: Path
) -> None:
    words = shlex.split(command)[1:]
    if "fashion" in command and not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip(
            "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
        )
    if "ray" in words:
        words[words.index("ray")] = (
            "sequential"  # that Ray does the same is tested elsewhere, and takes seconds
        )
    if words[0] in ("run", "compare", "sensitivity"):
        words += [
            "--set",
            "rounds=1",
            "--set",
            "population=20",
            "--out",
            str(tmp_path / "r"),
        ]
        words += (
            []
            if "participation.name" in command
            else ["--set", "participation.cohort=2"]
        )
    if words[0] == "audit":
        words += [
            "--option",
            "sme.iterations=20",
            "--option",
            "ig.iterations=20",
            "--out",
            str(tmp_path / "a"),
        ]
    status, out, err = cli(*words)
    assert status == 0, err
    assert out


def test_the_readme_has_the_two_commands_and_make_knows_them() -> None:
    makefile = Path("Makefile").read_text()
    for command in (c for c in commands() if c.startswith("make")):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
    assert {"make run", "make test"} <= set(commands())


def test_the_readme_lists_every_method() -> None:
    for preset in Path("strategies").glob("*.toml"):
        assert f"`{preset}`" in README


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", file.read_text()):
        assert (file.parent / target).exists(), f"{file}: {target}"


def test_the_example_method_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fednova.py").write_text(
        blocks(Path("docs/add-a-method.md"), "python")[0]
    )
    preset = tomllib.loads(blocks(Path("docs/add-a-method.md"), "toml")[0])
    quick = {"rounds": 2, "method.name": "fednova:FedNova", "engine.chunk": 4}
    nova = run(Experiment.parse(preset, quick), tmp_path / "a")
    assert nova.final["test_accuracy"] > 0
    # Its limit, from its own docstring: FedAvg when every client takes as many steps.
    even = {**quick, "local.steps": 2, "engine.name": "sequential"}
    nova = run(Experiment.parse(preset, even), tmp_path / "b")
    average = run(
        Experiment.parse(preset, {**even, "method.name": "fedavg"}), tmp_path / "c"
    )
    for name, value in nova.params.items():
        assert (value - average.params[name]).abs().max() < 1e-6


def test_the_example_task_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "waves.py").write_text(
        blocks(Path("docs/your-own-task.md"), "python")[0]
    )
    (command,) = blocks(Path("docs/your-own-task.md"), "sh")
    status, out, err = cli(
        *shlex.split(command)[1:], "--set", "rounds=2", "--out", tmp_path / "r"
    )
    assert status == 0, err
    assert "test accuracy" in out
    sys.modules.pop("waves")


def test_the_notebook_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(Path("README.md"), "python")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"rounds": 10', '"rounds": 1'), {})
    shutil.rmtree(tmp_path / "runs")


def modules_with_examples() -> list[str]:
    """Modules of fedcore whose docstrings hold an example."""
    names = []
    for file in sorted(Path("fedcore").rglob("*.py")):
        if ">>> " in file.read_text():
            parts = file.with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_in_docstrings_work(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0, f"see the output above: {results}"


def benchmark_commands() -> list[str]:
    texts = [
        file.read_text() for file in [*DOCUMENTS, *Path("benchmarks").glob("*.py")]
    ]
    found = re.findall(
        r"python -m (benchmarks\.\w+(?: [\w./][^\s`]*| --[\w-]+ [^\s`]+)*)",
        "\n".join(texts),
    )
    return sorted({line.split("  ")[0].strip() for line in found})


@pytest.mark.parametrize("command", benchmark_commands())
def test_every_benchmark_that_is_mentioned_takes_its_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--help` is reached only behind a study that exists; an option that does not is refused."""
    words = command.split()
    module = importlib.import_module(words[0])
    if not hasattr(module, "argparse"):
        return  # it has no options: that it can be imported is all there is to see
    monkeypatch.setattr("sys.argv", [*words, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0, command


def test_every_command_in_results_names_a_preset_that_loads() -> None:
    found = re.findall(
        r"^fedcore (?:run|compare) (.*)$",
        Path("docs/results.md").read_text(),
        re.MULTILINE,
    )
    assert found
    for line in found:
        words = shlex.split(line.split("#")[0])
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        for preset in (word for word in words if word.endswith(".toml")):
            Experiment.load(preset, overrides)
