"""An audit cell by cell: what each plan sees, and audits that stop and go on."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcore.audit.attacks import base
from fedcore.audit.attacks.sme import SME
from fedcore.audit.cells import Cell, Observer, Prepared, rounds_of, sweep
from fedcore.audit.examine import examine
from fedcore.audit.observe import Subject, observation, public_of
from fedcore.audit.plan import Plan
from fedcore.audit.remedies import PANEL, defences
from fedcore.audit.results import Audit, CellResult
from fedcore.audit.simulate import simulate
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.rounds import loop
from fedcore.rounds.captures import captured
from fedcore.tasks import build_task
from tests.audits import Silent
from tests.helpers import equal, loop_of
from tests.test_audit_captures import digits

FEW: dict[str, Any] = {"sme": {"iterations": 5}, "ig": {"iterations": 5}}


class Interrupting(Silent):
    """The observer of an audit whose user presses Ctrl-C in one of its cells."""

    def __init__(self, interrupt: int) -> None:
        self.interrupt, self.now = interrupt, 0

    def cell(self, number: int, cells: int, name: str) -> None:
        self.now = number

    def progress(self, share: float, what: str, objective: float | None) -> None:
        if self.now == self.interrupt:
            signal.raise_signal(signal.SIGINT)


def plan(*attacks: str, **settings: Any) -> Plan:
    values = {"attacks": attacks or ("sme", "labels"), "options": FEW, "clients": 2}
    return Plan(**{**values, **settings})


def swept(p: Plan, out: Path) -> Audit:
    """An audit of one synthetic cell."""
    cells = sweep(digits(), p, [1], [4], [6])
    return examine("sweep", digits(), cells, p, out, Silent())


def timeless(cell: CellResult) -> dict[str, Any]:
    kept = dict(cell)
    del kept["seconds"], kept["attack_seconds"]
    return kept


def given(name: str, subjects: Sequence[Subject], experiment: Experiment) -> Cell:
    """A cell of these clients."""
    task = build_task(experiment)
    return Cell("cell", {}, lambda observer: Prepared(list(subjects), task), name)


def test_a_run_without_the_truth_reconstructs_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[list[Tensor]] = []
    reconstruct = SME.reconstruct

    def recorded(self: SME, *arguments: Any) -> list[base.Reconstruction]:
        found = reconstruct(self, *arguments)
        images.append([reconstruction.x for reconstruction in found])
        return found

    monkeypatch.setattr(SME, "reconstruct", recorded)
    with_truth = swept(plan(truth=True), tmp_path / "with").cells[0]
    without = swept(plan(truth=False), tmp_path / "without").cells[0]
    for one, other in zip(*images, strict=True):
        assert torch.equal(one, other)
    pairs = zip(with_truth["clients"], without["clients"], strict=True)
    for scored, unscored in pairs:
        curves = (c["attacks"]["sme"]["curve"] for c in (scored, unscored))
        assert len({tuple(curve) for curve in curves}) == 1
        assert scored["labels"]["counts"] == unscored["labels"]["counts"]
        assert scored["grade"] is not None
        for key in ("grade", "best", "membership"):
            assert unscored[key] is None
        assert unscored["references"] == {}
        assert "psnr" not in unscored["attacks"]["sme"]
    assert without["pictures"] == []


def test_the_oracle_alone_gets_true_labels(tmp_path: Path) -> None:
    labels = {}
    for mode in ("oracle", "recovered", "soft"):
        cell = swept(plan(labels=mode), tmp_path / mode).cells[0]
        labels[mode] = cell["clients"][0]["labels"]
    assert labels["oracle"]["mode"] == "oracle"
    assert labels["oracle"]["accuracy"] == 1.0
    assert labels["recovered"]["mode"] == "recovered"
    assert labels["soft"] is None


def test_an_interrupted_audit_goes_on_without_doing_a_cell_twice(
    tmp_path: Path,
) -> None:
    p, prepared = plan(), list[str]()

    def counted(cell: Cell) -> Cell:
        def prepare(observer: Observer) -> Prepared:
            prepared.append(cell.name)
            return cell.prepare(observer)

        return replace(cell, prepare=prepare)

    cells = [counted(cell) for cell in sweep(digits(), p, [1, 2], [4], [4, 6])]
    names = [cell.name for cell in cells]
    out = tmp_path / "a"
    broken = examine("sweep", digits(), cells, p, out, Interrupting(2))
    assert broken.interrupted
    assert prepared == names[:3]
    assert [cell["name"] for cell in broken.cells][:2] == names[:2]
    prepared.clear()
    whole = examine("sweep", digits(), cells, p, out, Silent())
    assert prepared == names[2:]
    assert not whole.interrupted
    prepared.clear()
    out = tmp_path / "b"
    backwards = examine("sweep", digits(), cells[::-1], p, out, Silent())
    assert prepared == names[::-1]
    for one, other in zip(whole.cells, backwards.cells[::-1], strict=True):
        assert timeless(one) == timeless(other)


def test_an_attack_that_lacks_something_is_named_and_the_rest_is_run(
    tmp_path: Path,
) -> None:
    e, p = digits(local__steps=3), plan("dlfa", "idlg", "analytic", "labels")
    subjects = simulate(e, build_task(e), 2, 6)
    cells = [given("steps", subjects, e)]
    cell = examine("sweep", e, cells, p, tmp_path, Silent()).cells[0]
    needs = "needs the local step size, epochs and batch size"
    first = cell["clients"][0]["client"]
    for client in cell["clients"]:
        attacks = client["attacks"]
        assert not attacks["dlfa"]["ok"]
        assert attacks["dlfa"]["error"].startswith(needs)
        why = f"is for one example; client {first} has 6"
        assert attacks["idlg"]["error"] == why
        assert attacks["analytic"]["ok"]
        assert client["labels"]["ok"]
    assert any(w.startswith("dlfa was not run: needs") for w in cell["warnings"])


def test_a_sign_turned_round_is_corrected_under_a_flag_alone(tmp_path: Path) -> None:
    e = digits()
    made = simulate(e, build_task(e), 2, 6)
    turned = [subject._replace(seen=subject.seen.flipped()) for subject in made]

    def attacked(name: str, subjects: list[Subject], flip: bool = False) -> CellResult:
        p = plan("sme", "analytic", "labels", flip=flip)
        cells = [given(name, subjects, e)]
        return examine("sweep", e, cells, p, tmp_path / name, Silent()).cells[0]

    clean, wrong = attacked("clean", made), attacked("wrong", turned)
    corrected = attacked("corrected", turned, flip=True)
    assert timeless(clean) == timeless(corrected)
    against = "point against the gradient of public data"
    assert against not in "\n".join(clean["warnings"])
    assert against in "\n".join(wrong["warnings"])
    # It was not turned back.
    first, other = (cell["clients"][0]["labels"]["counts"] for cell in (wrong, clean))
    assert first != other


def test_membership_is_told_from_all_rounds_in_which_a_client_was_captured(
    tmp_path: Path,
) -> None:
    e = digits(participation__cohort=8, audit__rounds=[1, 2, 3])
    loop.run(e, tmp_path / "run")
    p = plan("membership")
    e, cells = rounds_of(tmp_path / "run", p)
    audit = examine("captured", e, cells, p, tmp_path / "audit", Silent())
    assert [cell["name"] for cell in audit.cells] == ["round 1", "round 2", "round 3"]
    for t, cell in enumerate(audit.cells, 1):
        tests = [client["membership"] for client in cell["clients"]]
        assert [test["exchanges"] for test in tests] == [t, t]
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700


def test_captured_clients_are_attacked_with_what_the_server_saw(tmp_path: Path) -> None:
    e = digits("fedsim with a personal output layer", audit__rounds=[3])
    run = loop_of(e, tmp_path / "run")
    run.run()
    p, public = plan("sme", "labels", truth=False), public_of(e, run.task)
    e, (cell,) = rounds_of(tmp_path / "run", p)
    kept = {exchange.client: exchange for exchange in captured(tmp_path / "run")}
    subjects = cell.prepare(Silent()).subjects
    assert len(subjects) == 2
    for subject in subjects:
        seen = subject.seen
        expected = observation(run.method, public, kept[seen.client])
        assert equal([seen.w0, seen.delta], [expected.w0, expected.delta])
    audit = examine("captured", e, [cell], p, tmp_path / "audit", Silent())
    client = audit.cells[0]["clients"][0]
    why = 'the output layer\'s "3.bias" never left the client'
    assert client["labels"] == {"ok": False, "error": why}
    assert client["attacks"]["sme"]["ok"]
    assert client["entries_seen"] < client["entries_of_model"]


def test_attacks_and_options_that_do_not_exist_are_refused() -> None:
    known = 'attack "smee": there is no such attack; known: sme, ig'
    with pytest.raises(SettingsError, match=known):
        plan("smee").check()
    known = r"--option sme\.iterations = 0: .*; sme knows iterations"
    with pytest.raises(SettingsError, match=known):
        plan("sme", options={"sme": {"iterations": 0}}).check()
    with pytest.raises(SettingsError, match='the attack "labels" has no settings'):
        plan("sme", options={"labels": {"n": 1}}).check()


# Remedies


def test_the_panel_is_one_cell_a_defence_and_none_is_trained_for_it(
    tmp_path: Path,
) -> None:
    cells = defences(digits(), plan(), ["none", "panel", "clip=0.2"], tmp_path)
    assert [cell.name for cell in cells] == list(PANEL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("clip=0.3", ("defence", "clip"), 0.3),
        ("local.epochs=7", ("local", "epochs"), 7),
        ("rounds=2", ("rounds",), 2),
        ("method.name=fedsim rounds=5", ("method", "name"), "fedsim"),
        ("secagg=3", ("audit", "capture"), 6),
    ],
)
def test_a_defence_is_settings_of_its_run(
    text: str, key: Sequence[str], value: Any, tmp_path: Path
) -> None:
    (cell,) = defences(digits(), plan(), [text], tmp_path)
    settings, together = cell.identity
    for name in key:
        settings = settings[name]
    assert settings == value
    assert together == (3 if text == "secagg=3" else 1)
