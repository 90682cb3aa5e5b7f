"""Poisoned data: what malicious clients train on, in every engine, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcore import Examples, FederatedData, trees
from fedcore.config import Experiment
from fedcore.data.sources import Pixels
from fedcore.engines.base import Work
from fedcore.errors import SettingsError
from fedcore.messages.adversary.adversary import Adversary
from fedcore.messages.adversary.poisoning import backdoor_success, stamped
from fedcore.messages.adversary.settings import AdversarySettings
from fedcore.method import on_client
from fedcore.rounds.loop import run
from fedcore.task import Task
from tests.helpers import assert_close, small

DIGITS: dict[str, Any] = {
    "task": "digits",
    "population": 10,
    "options": {},
    "rounds": 3,
    "local": {"batch_size": 8, "epochs": 1},
    "partition": {"name": "iid"},
    "participation": {"name": "uniform", "cohort": 6},
}
LABEL_FLIP = {"adversary__attack": "label_flip", "adversary__fraction": 0.3}
BACKDOOR = {
    "adversary__attack": "backdoor",
    "adversary__fraction": 0.3,
    "adversary__target": 7,
}


def digits(**settings: Any) -> Experiment:
    return small("fedavg", **{**DIGITS, **settings})


def work_of(e: Experiment, few_widths: bool = False) -> Work:
    task, method = e.build_task(), e.build_method()
    settings = (e.local, e.seed, e.links, e.defence, e.adversary)
    return Work(task, method, *settings, few_widths=few_widths)


def batches(work: Work, clients: list[int], t: int = 0, name: str = "train") -> Any:
    return work.batches(getattr(work.method, name), clients, t)


def is_real(of: Any) -> Tensor:
    mask: Tensor = of.mask > 0
    return mask


# Labels


def test_a_label_becomes_its_opposite_on_malicious_clients_alone() -> None:
    honest, poisoned = work_of(digits()), work_of(digits(**LABEL_FLIP))
    everybody = [*range(10)]
    before, after = batches(honest, everybody), batches(poisoned, everybody)
    assert len(poisoned.adversary.clients) == 3
    for client in everybody:
        is_hostile = client in poisoned.adversary.clients
        expected = 9 - before.y[client] if is_hostile else before.y[client]
        assert torch.equal(after.y[client], expected), f"client {client}"
    assert torch.equal(after.x, before.x)
    assert torch.equal(after.mask, before.mask)


@pytest.mark.parametrize("settings", [LABEL_FLIP, BACKDOOR], ids=["flip", "backdoor"])
def test_measurements_and_rounds_before_the_attack_are_left_alone(
    settings: Any,
) -> None:
    honest, poisoned = (
        work_of(digits()),
        work_of(digits(**settings, adversary__start=3)),
    )
    client = min(poisoned.adversary.clients)
    for t, name in ((0, "train"), (1, "train"), (5, "evaluate"), (5, "finetune")):
        before, after = (
            batches(work, [client], t, name) for work in (honest, poisoned)
        )
        pairs = zip(trees.leaves(before), trees.leaves(after), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs), f"{name}, t = {t}"
    changed = batches(poisoned, [client], 2).y
    assert not torch.equal(changed, batches(honest, [client], 2).y)


@on_client(data="all")
def all_examples(task: Any, t: Any, down: Any, state: Any, given: Any) -> Any:
    """A function of all training examples, as FedAMD's anchors have it."""


def test_work_on_all_examples_is_poisoned_like_minibatches() -> None:
    honest, poisoned = work_of(digits()), work_of(digits(**LABEL_FLIP))
    client = min(poisoned.adversary.clients)
    before = honest.batches(all_examples, [client], 0)
    after = poisoned.batches(all_examples, [client], 0)
    assert torch.equal(after.y, 9 - before.y)  # type: ignore[union-attr]


# The backdoor


def test_the_trigger_is_a_white_square_in_the_lower_right_corner() -> None:
    pixels = Pixels((0.5, 0.0), (0.25, 2.0))
    images = torch.zeros(4, 2, 5, 6)
    marked = stamped(images, pixels, trigger=2)
    assert marked[:, 0, 3:, 4:].unique().tolist() == [2.0]
    assert marked[:, 1, 3:, 4:].unique().tolist() == [0.5]
    assert int((marked != 0).sum()) == 4 * 2 * 4
    assert int((images != 0).sum()) == 0


def test_a_share_of_each_batch_is_stamped_and_relabelled() -> None:
    settings = {**BACKDOOR, "adversary__share": 0.3}
    honest, poisoned = work_of(digits()), work_of(digits(**settings))
    everybody = [*range(10)]
    before, after = batches(honest, everybody), batches(poisoned, everybody)
    changed = (after.x != before.x).flatten(3).any(3) | (after.y != before.y)
    for client in everybody:
        if client not in poisoned.adversary.clients:
            assert not bool(changed[client].any())
            continue
        marked = stamped(before.x[client], Pixels(), 2)
        is_marked = (after.x[client] == marked).flatten(2).all(2)
        is_marked &= after.y[client] == 7
        for k, real in enumerate(is_real(before)[client]):
            count = int(real.sum())
            wanted = int(np.ceil(round(0.3 * count, 9)))
            assert int((is_marked[k] & real).sum()) >= wanted
            assert int(changed[client, k].sum()) <= wanted
        assert bool(changed[client].any())
    assert bool(after.x.isfinite().all())


def test_the_stamped_examples_are_drawn_for_each_client_round_and_batch() -> None:
    equal_sizes = {"local": {"batch_size": 16, "steps": 4}}
    honest, work = (
        work_of(digits(**equal_sizes)),
        work_of(digits(**equal_sizes, **BACKDOOR)),
    )
    hostile, drawn = sorted(work.adversary.clients), []
    for t in (0, 1):
        before, after = batches(honest, hostile, t), batches(work, hostile, t)
        changed = (after.x != before.x).flatten(3).any(3)  # [n, K, B]
        drawn += [places.tobytes() for places in changed.flatten(0, 1).numpy()]
    assert len(set(drawn)) == len(drawn) == 2 * 4 * len(hostile)
    assert all(sum(places) == 8 for places in drawn)
    assert bytes([1] * 8 + [0] * 8) not in drawn, "not the first ones"


def poisoned_rows(of: Any, row: int) -> list[tuple[bytes, int]]:
    """The real examples of a client, in their order."""
    rows = []
    for x, y in zip(
        of.x[row][is_real(of)[row]], of.y[row][is_real(of)[row]], strict=True
    ):
        rows.append((x.numpy().tobytes(), int(y)))
    return rows


@pytest.mark.parametrize("settings", [LABEL_FLIP, BACKDOOR], ids=["flip", "backdoor"])
def test_neither_company_nor_padding_changes_poisoned_data(settings: Any) -> None:
    skewed = {"partition": {"name": "dirichlet", "alpha": 0.3}}
    e = digits(**settings, **skewed)
    one, few = work_of(e), work_of(e, few_widths=True)
    hostile = sorted(one.adversary.clients)
    for t in (0, 4):
        together = batches(few, [*range(10)], t)
        for client in hostile:
            alone = poisoned_rows(batches(one, [client], t), 0)
            assert alone == poisoned_rows(together, client)
            assert alone == poisoned_rows(
                batches(one, hostile, t), hostile.index(client)
            )
    assert poisoned_rows(batches(one, hostile, 0), 0) != poisoned_rows(
        batches(one, hostile, 1), 0
    )


def test_memory_of_poisoned_batches_is_laid_out_as_before() -> None:
    before = batches(work_of(digits()), [*range(10)])
    after = batches(work_of(digits(**BACKDOOR)), [*range(10)])
    assert after.x.stride() == before.x.stride()
    assert after.y.stride() == before.y.stride()


def test_success_is_the_share_of_other_classes_that_become_the_target() -> None:
    class Corner(torch.nn.Module):
        """Says class 1 where the corner is white, else class 0."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            white = self.gain * x[:, 0, -1, -1]
            return torch.stack([1 - white, white], 1)

    x, y = torch.zeros(10, 1, 3, 3), torch.tensor([0] * 6 + [1] * 4)
    rows = Examples(x, y)
    data = FederatedData(rows, rows, np.arange(10), np.array([0, 5, 10]))
    task = Task(Corner(), data, pixels=Pixels())
    given = {"attack": "backdoor", "clients": (0,), "trigger": 1}
    settings = AdversarySettings.model_validate({**given, "target": 1})
    assert backdoor_success(task, task.init_params(), settings) == 1.0
    away = {"gain": torch.tensor(0.0)}
    assert backdoor_success(task, away, settings) == 0.0
    other = AdversarySettings.model_validate({**given, "target": 0})
    assert backdoor_success(task, task.init_params(), other) == 0.0
    data.test = Examples(x[6:], y[6:])
    assert backdoor_success(task, away, settings) is None, "all are of the target"
    assert task.model.training


def test_a_backdoor_is_learned_and_reported_in_every_evaluation(tmp_path: Path) -> None:
    settings = {
        "rounds": 8,
        "participation": {"name": "uniform", "fraction": 1.0},
        "local": {"batch_size": 16, "steps": 12},
        "method.local_lr": 0.2,
    }
    attacked = run(digits(**settings, **BACKDOOR, adversary__start=5), tmp_path / "run")
    rows = [row for row in attacked.history if "test_accuracy" in row]
    before, after = rows[1], rows[3]  # of rounds 4 and 8
    assert before["backdoor_success"] < 0.1, "0.02 with each of three seeds"
    assert after["backdoor_success"] > 0.2, "0.33 to 0.43 with these"
    assert after["test_accuracy"] > 0.7


# Engines


@pytest.mark.parametrize("settings", [LABEL_FLIP, BACKDOOR], ids=["flip", "backdoor"])
def test_engines_poison_the_same_examples(settings: Any, tmp_path: Path) -> None:
    e = digits(**settings)
    one = run(e, tmp_path / "sequential")
    chunks = {"engine__name": "vectorised", "engine__chunk": 4}
    batched = run(digits(**settings, **chunks), tmp_path / "vectorised")
    honest = run(digits(), tmp_path / "honest")
    assert one.params_sha256 != honest.params_sha256
    is_backdoor = settings is BACKDOOR
    assert ("backdoor_success" in one.history[-1]) == is_backdoor
    assert "backdoor_success" not in honest.history[-1]
    assert_close(batched.params, one.params, 1e-5, "in chunks of 4")
    assert one.dropped == batched.dropped == {}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LABEL_FLIP, BACKDOOR], ids=["flip", "backdoor"])
def test_workers_poison_the_same_examples(settings: Any, tmp_path: Path) -> None:
    one = run(digits(**settings), tmp_path / "a")
    workers = {"engine__name": "ray", "engine__workers": 2}
    other = run(digits(**settings, **workers), tmp_path / "b")
    assert other.params_sha256 == one.params_sha256


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adversary__attack": "zero", "adversary__clients": [2, 10]},
            r"clients holds 10, but the task has 10 clients: expected ids from 0 to 9",
        ),
        (
            {"adversary__attack": "zero", "adversary__fraction": 0.09},
            r"fraction = 0\.09: of 10 clients that rounds down to nobody; raise it to "
            r"0\.1",
        ),
        (
            {**BACKDOOR, "adversary__target": 10},
            r"target = 10: the task has 10 classes, expected 0 to 9",
        ),
        (
            {**BACKDOOR, "adversary__trigger": 9},
            r"trigger = 9: a square of so many pixels does not fit into images of 8 x",
        ),
    ],
)
def test_what_does_not_fit_the_task_is_refused_before_anything_is_written(
    settings: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=rf"adversary\.{message}"):
        run(digits(**settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("settings", [LABEL_FLIP, BACKDOOR], ids=["flip", "backdoor"])
def test_data_that_cannot_be_poisoned_are_refused(
    settings: Any, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"targets of the task are no classes"):
        run(small("fedavg", **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_backdoor_into_inputs_that_are_no_images_is_refused() -> None:
    rows = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    data = FederatedData(rows, rows, np.arange(4), np.array([0, 2, 4]))
    task = Task(torch.nn.Linear(3, 2), data)
    settings = AdversarySettings(attack="backdoor", clients=(0,))
    with pytest.raises(SettingsError, match=r"inputs of the task are \(3,\).*Pixels"):
        Adversary(settings, 2, 0, task)


DIFFERENCES = [
    *("sign_flip", "scaled", "gaussian", "zero", "stale", "ipm", "ipm_optimised"),
]


@pytest.mark.parametrize("name", ["admm", "rerce", "clu", "fedamd"])
def test_methods_that_send_other_things_than_differences_refuse_some_attacks(
    name: str, tmp_path: Path
) -> None:
    for attack in DIFFERENCES:
        e = small(name, adversary__attack=attack, adversary__fraction=0.3)
        other = rf'attack = "{attack}" acts on differences.*{name} sends other things'
        with pytest.raises(SettingsError, match=other):
            run(e, tmp_path / "r")
    e = small(
        name,
        adversary__attack="minmax",
        adversary__fraction=0.3,
        adversary__direction="unit",
    )
    with pytest.raises(SettingsError, match=r'with direction = "unit" acts on diff'):
        run(e, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    method = e.build_method()
    for attack in ("alie", "alie_optimised", "minmax", "minsum", "mimic", "absent"):
        settings = AdversarySettings(attack=attack, clients=(0,))
        Adversary(settings, 12, 0).refuse(method, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scale": 2, "attack": "zero"},
            'attack = "zero" has no strength; leave scale',
        ),
        (
            {"scale": "auto", "attack": "ipm"},
            'scale = "auto" is for scaled, alie, back',
        ),
        ({"scale": "much", "attack": "ipm"}, 'must be a number, or "auto"'),
        ({"scale": "inf", "attack": "ipm"}, 'must be a number, or "auto"'),
        ({"clients": [4, 4], "attack": "ipm"}, "clients = [4, 4]: name each id once"),
        ({"clients": [-1], "attack": "ipm"}, "adversary.clients"),
        ({"attack": "ipm"}, "without malicious clients"),
        ({"clients": [1]}, "malicious clients without an attack"),
        ({"clients": [1], "fraction": 0.1, "attack": "ipm"}, "give one of the two"),
    ],
)
def test_settings_that_disagree_are_refused_in_one_line(
    settings: Any, message: str
) -> None:
    if "scale" in settings:
        settings = {**settings, "clients": [1]}
    given = {f"adversary__{key}": value for key, value in settings.items()}
    with pytest.raises(SettingsError) as refused:
        digits(**given)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
