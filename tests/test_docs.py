"""Documents are run: commands of the README, examples, links."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore import Experiment, run

FASHION = Path("/usr/share/datasets/fashion-mnist")
Cli = Callable[..., tuple[int, str, str]]
DOCUMENTS = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
README = Path("README.md").read_text()


def blocks(file: Path, language: str) -> list[str]:
    """The blocks of code in one language."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, file.read_text(), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """The commands of the README that call this program."""
    found = []
    for block in blocks(Path("README.md"), "sh"):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if command.startswith(program):
                found.append(command)
    return found


TINY = ["rounds=1", "population=20"]
TINY_MODEL = ["model.depth=1", "model.width=8", "model.heads=1", "local.epochs=1"]
UNMEASURED = "engine.chunk=2"  # measuring the size of a chunk takes longer than a run


def on_tiny_data(command: str, folder: Path) -> list[str]:
    """The words after `fedcore`, with settings that make the command short."""
    words = shlex.split(command)[1:]
    if "ray" in words:
        # That Ray does the same is tested elsewhere, and takes seconds.
        words[words.index("ray")] = "sequential"
    settings: list[str] = []
    if words[0] in ("run", "compare", "sensitivity"):
        words += ["--out", str(folder)]
        settings += TINY
        if "participation.name" not in command:
            settings.append("participation.cohort=2")
    if "fashion" in command:  # 3 000 images a client
        settings += ["local.steps=1", "evaluation.clients=2"]
    if words[0] == "sensitivity":  # trains once for each kind of layer
        settings += [*TINY_MODEL, UNMEASURED]
    if "fedit" in words:  # its speakers are those that the plays have
        settings.remove("population=20")
        settings += ["local.steps=1", "evaluation.clients=2", UNMEASURED]
    for setting in settings:
        words += ["--set", setting]
    if words[0] == "pretrain":
        words += one_step(folder)
    if words[0] == "stress":
        few = ["--rules", "median", "--attacks", "zero"]
        words += [*few, "--out", str(folder), "--set", "rounds=1"]
    if words[0] == "audit":
        options = ["--option", "sme.iterations=20", "--option", "ig.iterations=20"]
        words += [*options, "--out", str(folder)]
    return words


@pytest.mark.parametrize("command", commands("fedcore"))
def test_every_fedcore_command_of_the_readme_runs_on_tiny_data(
    command: str, cli: Cli, tmp_path: Path
) -> None:
    if "fashion" in command and not FASHION.exists():
        pytest.skip(
            "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
        )
    words = on_tiny_data(command, tmp_path / "r")
    if "fedit" in command:  # it needs the base that the command before it makes
        status, _, err = cli("pretrain", "shakespeare", *one_step(tmp_path / "base"))
        assert status == 0, err
        words += ["--set", f"base={tmp_path / 'base'}"]
    status, out, err = cli(*words)
    assert status == 0, err
    assert out


def one_step(folder: Path) -> list[str]:
    """Options of `fedcore pretrain` that make it short."""
    return ["--steps", "1", "--out", str(folder)]


def test_the_readme_has_the_two_commands_and_make_knows_them() -> None:
    makefile = Path("Makefile").read_text()
    for command in commands("make"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
    assert {"make run", "make test"} <= set(commands("make"))


def test_the_readme_lists_every_method() -> None:
    for preset in Path("strategies").glob("*.toml"):
        assert f"`{preset}`" in README


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", file.read_text()):
        assert (file.parent / target).exists(), f"{file}: {target}"


def anchors(file: Path) -> set[str]:
    """The names of the headings of a page, as GitHub makes them."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(kept.replace(" ", "-"))
    return names


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_links_into_a_page_lead_to_a_heading(file: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", file.read_text()):
        if not target.startswith("http"):
            page = file.parent / target if target else file
            assert anchor in anchors(page), f"{file}: {target}#{anchor}"


def test_the_example_method_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    page = Path("docs/add-a-method.md")
    (tmp_path / "fednova.py").write_text(blocks(page, "python")[0])
    preset = tomllib.loads(blocks(page, "toml")[0])
    quick = {"rounds": 2, "method.name": "fednova:FedNova", "engine.chunk": 4}
    nova = run(Experiment.parse(preset, quick), tmp_path / "a")
    assert nova.final["test_accuracy"] > 0
    # Its limit, from its own docstring: FedAvg when every client takes as many steps.
    even = {**quick, "local.steps": 2, "engine.name": "sequential"}
    nova = run(Experiment.parse(preset, even), tmp_path / "b")
    fedavg = {**even, "method.name": "fedavg"}
    average = run(Experiment.parse(preset, fedavg), tmp_path / "c")
    for name, value in nova.params.items():
        assert (value - average.params[name]).abs().max() < 1e-6


def test_the_example_task_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    page = Path("docs/your-own-task.md")
    (tmp_path / "waves.py").write_text(blocks(page, "python")[0])
    (command,) = blocks(page, "sh")
    words = shlex.split(command)[1:]
    status, out, err = cli(*words, "--set", "rounds=2", "--out", tmp_path / "r")
    assert status == 0, err
    assert "test accuracy" in out
    sys.modules.pop("waves")


@pytest.mark.parametrize("way", ["group", "frozen", "personal"])
def test_the_ways_out_of_batch_norm_work_as_printed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    page = Path("docs/batch-norm.md")
    (tmp_path / "pictures.py").write_text(blocks(page, "python")[0])
    (lines,) = blocks(page, "sh")
    (command,) = (line for line in lines.splitlines() if line.endswith(way))
    status, out, err = cli(*on_tiny_data(command, tmp_path / "r"))
    assert status == 0, err
    assert "accuracy" in out
    sys.modules.pop("pictures")


def test_the_notebook_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(Path("README.md"), "python")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"rounds": 10', '"rounds": 1'), {})
    shutil.rmtree(tmp_path / "runs")


def benchmark_commands() -> list[str]:
    """Calls of a benchmark, with their options, in documents and in benchmarks."""
    call = r"python -m (benchmarks\.\w+(?: [\w./][^\s`]*| --[\w-]+ [^\s`]+)*)"
    found: set[str] = set()
    for file in [*DOCUMENTS, *Path("benchmarks").glob("*.py")]:
        for line in re.findall(call, file.read_text()):
            found.add(line.split("  ")[0].strip())
    return sorted(found)


@pytest.mark.parametrize("command", benchmark_commands())
def test_every_benchmark_that_is_mentioned_takes_its_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--help` is reached only where the study and the options before it exist."""
    words = command.split()
    module = importlib.import_module(words[0])
    if not hasattr(module, "argparse"):
        return  # it has no options: that it can be imported is all there is to see
    monkeypatch.setattr("sys.argv", [*words, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0, command


def test_every_command_in_results_names_a_preset_that_loads() -> None:
    text = Path("docs/results.md").read_text()
    lines = re.findall(r"^fedcore (?:run|compare) (.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line.split("#")[0])
        overrides = []
        for before, word in itertools.pairwise(words):
            if before == "--set":
                overrides.append(word)
        for word in words:
            if word.endswith(".toml"):
                Experiment.load(word, overrides)


@pytest.mark.slow
def test_the_tutorial_of_language_works_as_printed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path("docs/language-tutorial.md").resolve()
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python")[0], "make_texts.py", "exec"), {})
    (tmp_path / "docstrings.toml").write_text(blocks(page, "toml")[0])
    status, out, err = cli("pretrain", "docstrings.toml", "--steps", "1")
    assert status == 0, err
    assert "nats a character, clients" in out
    quick = ["rounds=1", "local.steps=1", "evaluation.clients=2", UNMEASURED]
    words = ["run", "docstrings.toml", "--out", "runs/rank-8"]
    for setting in quick:
        words += ["--set", setting]
    status, out, err = cli(*words)
    assert status == 0, err
    assert "unseen nats_a_character" in out
    status, out, err = cli("model", "docstrings.toml")
    assert status == 0, err
    assert "36,864" in out
