"""Runs with DP-SGD: an epsilon for every client, refusals, and what is said of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import privacy
from fedcore.config import Experiment
from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.local_settings import LocalSettings
from fedcore.rounds.example_privacy import ExamplePrivacy, refuse, sent_again
from fedcore.rounds.loop import Interrupted, Quiet, run
from fedcore.rounds.refusals import refuse_same_noise_twice, refuse_training
from fedcore.rounds.saving import State
from fedcore.task import Task
from fedcore.views.run_report import write_report
from fedcore.views.terminal import show_result
from tests.helpers import loop_of, small

DP: dict[str, Any] = {"local__dp": {"clip": 0.5, "noise": 0.8}, "local__batch_size": 3}
SIZES = [3, 7, 0, 12, 1, 9]


@pytest.fixture(autouse=True)
def _without_the_slower_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "epsilon_prv", lambda *_: (None, "not asked for"))


def ragged(model: nn.Module | None = None) -> Task:
    torch.manual_seed(0)
    offsets = np.cumsum([0, *SIZES])
    total = int(offsets[-1])
    rows = Examples(torch.randn(total, 4), torch.randint(0, 3, (total,)))
    data = FederatedData(rows, rows, np.arange(total), offsets)
    return Task(model or nn.Linear(4, 3), data)


def accountant(task: Task, method: str = "fedavg", **settings: Any) -> ExamplePrivacy:
    e = small(method, **settings)
    return ExamplePrivacy(e, task, e.build_method())


# The accountant


def test_every_client_has_the_epsilon_of_its_own_steps() -> None:
    sent = [4, 2, 5, 1, 0, 3]
    found = accountant(ragged(), **DP).spent(torch.tensor(sent), False)
    spent = found["privacy_examples"]
    epsilons = []
    for size, messages in zip(SIZES, sent, strict=True):
        q, steps = min(1.0, 3 / max(size, 1)), messages * -(-size // 3)
        epsilons.append(privacy.epsilon_rdp(0.8, q, steps, 1e-5))
    worst = int(np.argmax(epsilons))
    assert spent["client"] == worst == 0  # in every step, of which there are four
    assert spent["epsilon_rdp"] == pytest.approx(epsilons[worst], rel=1e-12)
    assert (spent["sample_rate"], spent["steps"]) == (1.0, 4)
    holders = [e for e, size in zip(epsilons, SIZES, strict=True) if size]
    assert spent["median_epsilon_rdp"] == pytest.approx(np.median(holders), rel=1e-12)
    assert (spent["unit"], spent["view"]) == ("example", "example")


def test_epsilon_is_that_of_the_table() -> None:
    """q 0.05, z 0.8, 200 steps, delta 1e-4: 7.4903 by Opacus, as for any mechanism."""
    e = {"local__dp": {"clip": 1.0, "noise": 0.8, "rate": 0.05}, "local__steps": 10}
    found = accountant(ragged(), **e, defence__delta=1e-4)
    spent = found.spent(torch.full((6,), 20), False)["privacy_examples"]
    assert spent["epsilon_rdp"] == pytest.approx(7.4903, abs=1e-4)


def test_every_pass_over_the_examples_counts() -> None:
    one = torch.ones(6, dtype=torch.int64)
    by_fedavg = accountant(ragged(), **DP).spent(one, False)["privacy_examples"]
    by_ditto = accountant(ragged(), "ditto", **DP).spent(one, False)["privacy_examples"]
    assert by_ditto["steps"] == 2 * by_fedavg["steps"]


def test_epsilon_without_noise_is_infinite_and_without_a_message_zero() -> None:
    quiet: dict[str, Any] = {"local__dp": {"clip": 0.5}}
    spent = accountant(ragged(), **quiet).spent(torch.ones(6), False)
    assert spent["privacy_examples"]["epsilon_rdp"] == "inf"
    spent = accountant(ragged(), **DP).spent(torch.zeros(6), False)
    assert spent["privacy_examples"]["epsilon_rdp"] == 0
    assert spent["privacy_examples"]["median_epsilon_rdp"] == 0


def test_of_many_rates_the_next_higher_one_is_accounted() -> None:
    sizes = np.arange(100, 400)
    order = np.arange(sizes.sum())
    rows = Examples(torch.zeros(len(order), 1), torch.zeros(len(order)))
    data = FederatedData(rows, None, order, np.append(0, sizes.cumsum()))
    found = accountant(Task(nn.Linear(1, 1), data, nn.functional.mse_loss), **DP)
    rates = found._rates
    assert len(np.unique(rates)) <= 48
    exact = 3 / sizes
    assert bool(((rates >= exact - 1e-15) & (rates <= 1.04 * exact)).all())
    assert rates[0] == pytest.approx(exact[0])  # the worst client's is exact


# Runs


def test_a_run_says_epsilon_for_one_example_wherever_privacy_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(small("fedavg", **DP, finetune__epochs=1), tmp_path / "r")
    spent = result.final["privacy_examples"]
    for row in result.history:
        assert ("privacy_examples" in row) == (row["round"] % 2 == 0)
        assert not [name for name in row if name.startswith("train_")]
    show_result(result, None)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("privacy of examples"))
    for word in ("one example", "Poisson", f"client {spent['client']}", "median"):
        assert word in line
    page = write_report(tmp_path / "r").read_text()
    assert "privacy of examples" in page
    assert "covers one training example of one client" in page
    assert "finetuned_loss" in result.final


def test_steps_are_counted_by_the_messages_of_each_client(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg", **DP, rounds=3), tmp_path)
    rows = [loop.round() for _ in range(3)]
    assert int(loop.state.sent.sum()) == sum(row["reports"] for row in rows) == 15


def test_two_guarantees_stand_side_by_side(tmp_path: Path) -> None:
    noise: dict[str, Any] = {
        "method__clip": 0.2,
        "method__noise_multiplier": 1.5,
        "participation": {"name": "bernoulli", "mean": 0.4},
        "min_reports": 0,
    }
    e = small("dpfedavg", **noise, **DP)
    final = run(e, tmp_path / "r").final
    assert final["privacy"]["steps"] == 4  # rounds, whoever was there
    assert final["privacy"]["unit"] == "client"
    assert final["privacy_examples"]["unit"] == "example"


class Stop(Quiet):
    """Interrupts after the third round."""

    def round_done(self, row: dict[str, Any]) -> None:
        if row["round"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_has_the_same_bits_and_the_same_epsilon(tmp_path: Path) -> None:
    e = small("fedavg", **DP, rounds=6)
    whole = run(e, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(e, tmp_path / "part", observer=Stop())
    resumed = run(e, resume=tmp_path / "part")
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.final["privacy_examples"] == whole.final["privacy_examples"]


def test_messages_of_devices_that_train_again_count_twice(tmp_path: Path) -> None:
    rate = {"clip": 0.5, "noise": 0.8, "rate": 0.2}
    state = State(2, None, None, torch.tensor([2, 0]), {}, {}, {})
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n{}\n")  # of three rounds
    simulated = small("fedavg", local__dp=rate)
    assert sent_again(simulated, state, tmp_path).tolist() == [2, 0]
    field = small("fedavg", local__dp=rate, engine__name="grid")
    # Round 3, which is lost, and round 4, which may have been under way.
    assert sent_again(field, state, tmp_path).tolist() == [4, 2]


def test_a_secure_sum_of_noised_messages_is_the_plain_one(tmp_path: Path) -> None:
    plain = run(small("fedavg", **DP), tmp_path / "a")
    secure = run(small("fedavg", **DP, aggregation__secure=True), tmp_path / "b")
    assert secure.final["test_loss"] == pytest.approx(
        plain.final["test_loss"], rel=1e-4
    )
    assert secure.final["privacy_examples"] == plain.final["privacy_examples"]
    assert not [name for name in secure.history[-1] if name.startswith("train_")]


# Refusals


def test_settings_without_a_bound_are_refused() -> None:
    for name, value in (("noise", 1.0), ("rate", 0.1)):
        with pytest.raises(ValueError, match=f"{name} = .* without clip"):
            LocalSettings(dp={name: value})  # type: ignore[arg-type]


REFUSED = {
    "scaffold": "control variates",
    "fedamd": "recursion of gradients",
    "pfedme": "several steps on one batch",
    "clu": "in rounds that nobody counts",
    "admm exact": "takes no local steps",
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_with_other_steps_are_refused_before_a_run(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    with pytest.raises(SettingsError, match=rf"local\.dp .*{REFUSED[name]}"):
        run(small(name, **DP), folder)
    assert not folder.exists()


def test_a_penalty_of_a_method_is_refused() -> None:
    e = small("fedsim", **DP, method__penalty=0.1)
    with pytest.raises(SettingsError, match=r"method\.penalty is of no example"):
        refuse_training(e, e.build_task(), e.build_method())


class Looks(nn.Module):
    """Looks at a value, which single examples do not have under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if bool(y.sum() > 1e9) else y + 0


def test_models_without_gradients_of_single_examples_are_refused() -> None:
    from fedcore.models.norms import personal_batch_norm

    e = small("fedavg", **DP)
    method = e.build_method()
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    task = ragged(personal_batch_norm(normed))
    with pytest.raises(SettingsError, match="is a statistic of batches"):
        refuse(e, task, method)
    with pytest.raises(SettingsError, match="it looks at values"):
        refuse(e, ragged(Looks()), method)
    plain = ragged()
    penalised = plain.with_model(plain.model, lambda mean, params: mean(params))
    with pytest.raises(SettingsError, match="penalty of its own"):
        refuse(e, penalised, method)
    refuse(e, plain, method)
    dropping = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3))
    refuse(e, ragged(dropping), method)


def test_a_delta_at_which_one_example_may_be_told_is_refused() -> None:
    e = small("fedavg", **DP, defence__delta=0.1)
    with pytest.raises(SettingsError, match=r"set it below 1 / 12"):
        refuse(e, ragged(), e.build_method())


def test_the_field_needs_a_rate_that_the_server_knows() -> None:
    dp = {"clip": 0.5, "noise": 0.8}
    e = small("fedavg", local__dp=dp, engine__name="grid")
    with pytest.raises(SettingsError, match=r"local\.dp\.rate is not set"):
        refuse(e, ragged(), e.build_method())
    e = small("fedavg", local__dp={**dp, "rate": 0.3}, engine__name="grid")
    refuse(e, ragged(), e.build_method())
    found = ExamplePrivacy(e, ragged(), e.build_method())
    spent = found.spent(torch.full((6,), 5), False)["privacy_examples"]
    assert (spent["sample_rate"], spent["steps"]) == (0.3, 20)


def test_a_run_does_not_go_back_to_the_same_noise_in_other_messages() -> None:
    e: Experiment = small("fedavg", **DP)
    with pytest.raises(SettingsError, match="same noise to other messages"):
        refuse_same_noise_twice(e, None, True)
    refuse_same_noise_twice(e, None, False)
    refuse_same_noise_twice(small("fedavg"), None, True)


def test_work_on_every_example_is_refused(tmp_path: Path) -> None:
    loop = loop_of(small("fedavg", **DP), tmp_path)
    method = small("admm exact").build_method()
    with pytest.raises(SettingsError, match="reads every example without noise"):
        loop.desk.work.batches(method.start, [1], 0)
