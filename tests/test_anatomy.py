"""The commands `model` and `sensitivity`; every preset's opening; what comparisons and reports say of personalised methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore import Experiment, run
from fedcore.errors import SettingsError
from fedcore.views.compare import compare, explained, rows
from fedcore.views.model_summary import anatomy, sensitivity, size
from fedcore.views.run_report import write_report

Cli = Callable[..., tuple[int, str, str]]
PRESETS = sorted(Path("strategies").glob("*.toml"))
TINY = {
    "rounds": 2,
    "population": 10,
    "participation.cohort": 3,
    "engine.name": "sequential",
}


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_opens_with_its_command_says_what_it_reached_and_builds(
    file: Path,
) -> None:
    opening = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert opening[0] == f"# fedcore run {file}"
    assert "seeds 0 to" in " ".join(opening), "what it reached, over which seeds"
    found = anatomy(Experiment.load(file, {"rounds": 1}))
    assert size(found.shared) + size(found.personal) > 0


def test_model_counts_layers_and_what_stays_on_the_client(cli: Cli) -> None:
    status, out, _ = cli("model", "strategies/pfedpara.toml", "--json")
    assert status == 0
    found = json.loads(out)
    # 64-64-64-10 at gamma 0.5: R = 12, 12, 4; X1, Y1 and the biases are sent, X2 and Y2 are not
    assert [layer["rank"] for layer in found["layers"]] == [12, 12, 4]
    half = 12 * 128 * 2 + 4 * 74
    assert found["parameters"] == {
        "shared": half + 138,
        "personal": half,
        "dense": 8970,
    }
    assert all(name.endswith(("X2", "Y2")) for name in found["personal_names"])
    status, out, _ = cli("model", "strategies/pfedpara.toml")
    assert (
        f"sent each way: {half + 138:,} parameters; kept by the client: {half:,}" in out
    )
    status, out, _ = cli("model", "fedavg")
    assert "rank" not in out


def test_layers_to_keep_stay_dense() -> None:
    found = anatomy(
        Experiment.load("strategies/pfedpara.toml", {"lowrank.keep": ["output"]})
    )
    assert [layer.rank for layer in found.layers] == [12, 12, None]
    with pytest.raises(
        SettingsError, match='the part "heads": no parameter of the model belongs to it'
    ):
        anatomy(
            Experiment.load("strategies/pfedpara.toml", {"lowrank.keep": ["heads"]})
        )


def test_sensitivity_tries_every_kind_of_layer_alone_and_with_the_output() -> None:
    labels = [
        label for label, _ in sensitivity(Experiment.load("strategies/fedperfix.toml"))
    ]
    kinds = ["input", "norm", "attention", "mlp", "prefix"]
    both = [name for kind in kinds for name in (kind, f"{kind} + output")]
    assert labels == ["nothing (FedAvg)", "everything (local)", "output", *both]
    plain = [label for label, _ in sensitivity(Experiment.load("fedavg"))]
    assert plain == [
        "nothing (FedAvg)",
        "everything (local)",
        "output",
        "input",
    ]  # two layers: both together are everything


def test_sensitivity_runs_and_prints_a_row_each(cli: Cli, tmp_path: Path) -> None:
    sets = [
        word
        for key, value in TINY.items()
        for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    status, out, err = cli(
        "sensitivity", "fedavg", "--seeds", "1", *sets, "--out", tmp_path / "s"
    )
    assert status == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()[1:5]] == [
        "nothing (FedAvg)",
        "everything (local)",
        "output",
        "input",
    ]
    assert "worst tenth" in out


def digits(method: str, **settings: Any) -> Experiment:
    return Experiment.load(
        f"strategies/{method}.toml",
        {**TINY, **{k.replace("__", "."): v for k, v in settings.items()}},
    )


def test_a_comparison_with_personal_models_is_judged_by_its_clients(
    tmp_path: Path,
) -> None:
    c = compare([("fedavg", digits("fedavg")), ("local", digits("local"))], 1, tmp_path)
    assert c.personal
    assert "a client that never took part" in explained(c)
    assert {"client std", "worst tenth"} <= set(rows(c)[0])
    page = (tmp_path / "compare.html").read_text()
    assert "Mean accuracy of the clients at the end, best first" in page
    assert "Accuracy of single clients, their mean, by round" in page
    shared = digits("fedsim", method__personal=[])
    assert not compare(
        [("fedavg", digits("fedavg")), ("shared", shared)], 1, tmp_path / "b"
    ).personal


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
        c = final[kind]
        percentiles = ", ".join(
            f"{p}: {c[f'p{p}']:.1%}" for p in (1, 5, 10, 25, 50, 75, 90, 95, 99)
        )
        assert (
            f"mean {c['mean']:.1%}, standard deviation {c['std']:.1%}; percentiles {percentiles}."
            in page
        ), kind
