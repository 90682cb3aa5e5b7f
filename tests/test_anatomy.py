"""Models in parts, and reports and comparisons of personalised methods.

Every preset's opening is checked here as well, as its model is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, run
from fedcore.errors import SettingsError
from fedcore.views.compare import compare
from fedcore.views.compare_page import explanation, table
from fedcore.views.model_summary import anatomy, sensitivity, size
from fedcore.views.run_report import write_report

Cli = Callable[..., tuple[int, str, str]]
PRESETS = sorted(Path("strategies").glob("*.toml"))
TINY: dict[str, Any] = {
    "rounds": 2,
    "population": 10,
    "participation.cohort": 3,
    "engine.name": "sequential",
}


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_opens_with_its_command_and_results_and_builds(
    file: Path,
) -> None:
    opening = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert opening[0] == f"# fedcore run {file}"
    assert "seeds 0 to" in " ".join(opening), (
        "expected its results, and over which seeds"
    )
    # A base is made by `fedcore pretrain`; the model has its layers without it.
    parts = anatomy(Experiment.load(file, {"rounds": 1, "base": None}))
    assert size(parts.shared) + size(parts.personal) > 0


def test_model_counts_layers_and_what_stays_on_the_client(cli: Cli) -> None:
    status, out, _ = cli("model", "strategies/pfedpara.toml", "--json")
    assert status == 0
    parts = json.loads(out)
    # 64-64-64-10 at gamma 0.5: R = 12, 12, 4.
    assert [layer["rank"] for layer in parts["layers"]] == [12, 12, 4]
    # X1, Y1 and the biases are sent, X2 and Y2 are not.
    personal = 12 * 128 * 2 + 4 * 74
    shared = personal + 138
    sizes = {"shared": shared, "personal": personal, "dense": 8970}
    assert parts["parameters"] == sizes
    assert all(name.endswith(("X2", "Y2")) for name in parts["personal_names"])
    status, out, _ = cli("model", "strategies/pfedpara.toml")
    assert f"sent each way: {shared:,} parameters" in out
    assert f"kept by the client: {personal:,}" in out
    status, out, _ = cli("model", "fedavg")
    assert "rank" not in out


def test_layers_to_keep_stay_dense() -> None:
    preset = "strategies/pfedpara.toml"
    parts = anatomy(Experiment.load(preset, {"lowrank.keep": ["output"]}))
    assert [layer.rank for layer in parts.layers] == [12, 12, None]
    message = 'the part "heads": no parameter of the model belongs to it'
    with pytest.raises(SettingsError, match=message):
        anatomy(Experiment.load(preset, {"lowrank.keep": ["heads"]}))


def test_sensitivity_tries_every_kind_of_layer_alone_and_with_the_output() -> None:
    always = ["nothing (FedAvg)", "everything (local)", "output"]
    experiments = dict(sensitivity(Experiment.load("strategies/fedperfix.toml")))
    expected = list(always)
    for kind in ("input", "norm", "attention", "mlp", "prefix"):
        expected += [kind, f"{kind} + output"]
    assert list(experiments) == expected
    # Of two layers, both together are everything.
    experiments = dict(sensitivity(Experiment.load("fedavg")))
    assert list(experiments) == [*always, "input"]


def test_sensitivity_runs_and_prints_a_row_each(cli: Cli, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["fedavg", "--seeds", "1", "--out", tmp_path / "s"]
    for key, value in TINY.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    status, out, err = cli("sensitivity", *arguments)
    assert status == 0, err
    labels = [line.split("  ")[0] for line in out.splitlines()[1:5]]
    assert labels == ["nothing (FedAvg)", "everything (local)", "output", "input"]
    assert "worst tenth" in out


def digits(method: str, **settings: Any) -> Experiment:
    overrides = dict(TINY)
    for key, value in settings.items():
        overrides[key.replace("__", ".")] = value
    return Experiment.load(f"strategies/{method}.toml", overrides)


def test_a_comparison_with_personal_models_is_judged_by_its_clients(
    tmp_path: Path,
) -> None:
    c = compare([("fedavg", digits("fedavg")), ("local", digits("local"))], 1, tmp_path)
    assert c.is_personal
    assert "a client that never took part" in explanation(c)
    assert {"client std", "worst tenth"} <= set(table(c)[0])
    page = (tmp_path / "compare.html").read_text()
    assert "Mean accuracy of the clients at the end, best first" in page
    assert "Accuracy of single clients, their mean, by round" in page
    shared = digits("fedsim", method__personal=[])
    presets = [("fedavg", digits("fedavg")), ("shared", shared)]
    assert not compare(presets, 1, tmp_path / "b").is_personal


def test_the_report_of_personal_models_begins_with_the_clients_and_draws_both_spreads(
    tmp_path: Path,
) -> None:
    final = run(digits("fedper", finetune__epochs=1), tmp_path / "r").final
    page = write_report(tmp_path / "r").read_text()
    assert page.index("single clients") < page.index("unseen client")
    assert "Spread over clients</" in page
    assert "Spread over clients after fine-tuning</" in page
    assert "After fine-tuning on each client the mean is" in page
    assert "The worst tenth has" in page
    for kind in ("client_accuracy", "finetuned_accuracy"):
        clients = final[kind]
        percentiles = []
        for percent in (1, 5, 10, 25, 50, 75, 90, 95, 99):
            percentiles.append(f"{percent}: {clients[f'p{percent}']:.1%}")
        expected = (
            f"mean {clients['mean']:.1%}, "
            f"standard deviation {clients['std']:.1%}; "
            f"percentiles {', '.join(percentiles)}."
        )
        assert expected in page, kind


def test_a_model_with_adapters_is_shown_as_frozen_layers_and_what_is_trained() -> None:
    settings = {"lora.rank": 2, "lora.targets": ["3"], "model.hidden": [5]}
    parts = anatomy(Experiment.load("fedavg", settings))
    assert [(layer.dense, layer.size, layer.rank) for layer in parts.layers] == [
        (65 * 5, 0, None),
        (6 * 10, 2 * (5 + 10), 2),
    ]
    assert size(parts.shared) == 30
