"""Secure sums in a simulation: the same integers everywhere, and nothing but sums."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore import trees
from fedcore.config import Experiment
from fedcore.engines.base import Engine, Work
from fedcore.errors import RunError, SettingsError
from fedcore.messages.secure.ring import Ring
from fedcore.reports import by_examples
from fedcore.rounds.client_table import read_clients
from fedcore.rounds.loop import Loop, run
from fedcore.rounds.observer import Quiet
from fedcore.rounds.result import Result
from fedcore.storage.rows import StateStore
from fedcore.types import Model
from fedcore.views.run_record import read_run
from fedcore.views.run_report import summary
from fedcore.views.secret_text import average_of_training
from tests.helpers import assert_close, loop_of, small
from tests.secret import Masking, Shuffled

SECURE: dict[str, Any] = {"aggregation__secure": True, "aggregation__max_examples": 16}
WEIGHING = "tests.secret:Weighing"
REMEMBERING = "tests.secret:Remembering"
GOLDEN = 2.0**-19  # of means of words: rounding of single values, and of the weights


def secure(method: str = "fedavg", **settings: Any) -> Experiment:
    return small(method, **{**SECURE, **settings})


def digits(**settings: Any) -> Experiment:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    values = {"participation.cohort": 8, "rounds": 4, "engine.name": "sequential"}
    return Experiment.load("fedavg", {**values, **overrides})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run_on(
    e: Experiment, folder: Path, make: Callable[[Work, StateStore], Engine]
) -> tuple[Result, Loop]:
    """A run on an engine of a test's own, in this process."""
    folder.mkdir()

    def engine(work: Work) -> Engine:
        states = StateStore(work.first_state(work.task.init_params()), 10**9, Path)
        return make(work, states)

    loop = Loop(e, folder, Quiet(), engine, False)
    try:
        return loop.run(), loop
    finally:
        loop.close()


# One sum, wherever it is made


@pytest.mark.parametrize("method", ["fedavg", "scaffold", REMEMBERING, WEIGHING])
def test_order_and_grouping_of_reports_change_no_bit(
    method: str, tmp_path: Path
) -> None:
    e = secure(method)
    expected = run(e, tmp_path / "sequential").params_sha256
    for key in range(3):
        folder = tmp_path / str(key)
        result, _ = run_on(e, folder, partial(Shuffled, key=key))
        assert result.params_sha256 == expected


@pytest.mark.slow
def test_workers_of_ray_change_no_bit(tmp_path: Path) -> None:
    e = secure("scaffold", engine__name="ray", engine__workers=2)
    one_by_one = secure("scaffold")
    expected = run(one_by_one, tmp_path / "sequential").params_sha256
    assert run(e, tmp_path / "ray").params_sha256 == expected


@pytest.mark.slow
def test_chunks_change_no_bit(tmp_path: Path) -> None:
    results = set()
    for chunk in (1, 3, None):
        settings = {"engine__name": "vectorised", "engine__chunk": chunk}
        e = digits(aggregation__secure=True, **settings)
        results.add(run(e, tmp_path / str(chunk)).params_sha256)
    assert len(results) == 1


def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path: Path) -> None:
    e = secure(REMEMBERING)
    expected = run(e, tmp_path / "whole").params_sha256
    loop = loop_of(e, tmp_path / "stopped")
    for _ in range(2):
        row = loop.round()
        loop.history.add(row)
        (tmp_path / "stopped" / "metrics.jsonl").open("a").write(json.dumps(row) + "\n")
    loop.saving.save(loop.state, _Lines(), None)
    loop.close()
    again = run(e, resume=tmp_path / "stopped")
    assert again.params_sha256 == expected


class _Lines:
    """Lines that are written already."""

    def sync(self) -> None:
        pass


def test_sums_are_those_of_a_plain_run(tmp_path: Path) -> None:
    plain = run(digits(), tmp_path / "plain")
    secret = run(
        digits(aggregation__secure=True, aggregation__max_examples=128),
        tmp_path / "secure",
    )
    assert_close(secret.params, plain.params, 1e-5, "secure")
    assert secret.params_sha256 != plain.params_sha256
    one, other = rows_of(tmp_path / "plain")[-1], rows_of(tmp_path / "secure")[-1]
    assert one["test_accuracy"] == other["test_accuracy"]


@pytest.mark.parametrize("weighting", ["examples", "equally", "given", "by field"])
def test_weights_are_those_of_a_plain_run(weighting: str, tmp_path: Path) -> None:
    settings = {"method__weighting": weighting, "task": "tests.measured:numbers"}
    settings |= {"population": None, "participation__cohort": 7, "options": {}}
    plain = small(WEIGHING, **settings)
    secret = secure(WEIGHING, **{**settings, "aggregation__max_examples": 128})
    one = run(plain, tmp_path / "plain")
    other = run(secret, tmp_path / "secure")
    bound = 4 * 7 * Ring(7, 8.0, 128.0).step  # a unit a client, in four rounds
    assert_close(other.params, one.params, bound, weighting)
    for before, after in zip(
        rows_of(tmp_path / "plain"), rows_of(tmp_path / "secure"), strict=True
    ):
        assert after["server_weight"] == before["server_weight"], weighting
        if weighting == "equally":
            assert after["server_total_steps"] == before["server_total_steps"]


def test_what_is_remembered_is_what_a_plain_run_remembers(tmp_path: Path) -> None:
    plain = run(small(REMEMBERING), tmp_path / "plain")
    secret = run(secure(REMEMBERING), tmp_path / "secure")
    assert_close(secret.params, plain.params, 1e-5, "secure")


@pytest.mark.parametrize(
    ("t", "client", "fn"), [(1, 0, "train"), (0, 1, "train"), (0, 0, "slope")]
)
def test_rounding_is_drawn_anew_for_each_message(
    t: int, client: int, fn: str, tmp_path: Path
) -> None:
    loop = loop_of(secure("tests.methods:Two"), tmp_path / "r")
    secret, method = loop.desk.receiving.secret, loop.method
    assert secret is not None
    down = Model(loop.state.server.params)
    up = {"weight": torch.full((1, 500), 1 / 3)}
    numbers = []
    for function, number, who in (("train", 0, 0), (fn, t, client)):
        work = getattr(method, function)
        ask = secret.ask(work, torch.arange(5), down, number, by_examples)
        sent = secret.sending.send(ask, who, up, 7)
        numbers.append(sent.encoded.numbers)
    loop.close()
    assert not torch.equal(*numbers)
    assert (numbers[0] - numbers[1]).abs().max() <= 1


# Nothing but sums


def test_noise_of_a_server_is_as_long_as_a_message_that_was_rounded_up(
    tmp_path: Path,
) -> None:
    """DP-FedAvg: a message of norm C may be longer by a step in every entry."""
    reach, noise = 2.0**28, []
    for is_secure in (False, True):
        settings: dict[str, Any] = {"rounds": 1, "min_reports": 0}
        settings["participation"] = {"name": "uniform"}
        settings |= {"aggregation__secure": is_secure, "method__clip": 1.0}
        if is_secure:
            settings["secure__reach"] = reach
        moved = []
        for z in (0.0, 1.0):
            e = small("dpfedavg", method__noise_multiplier=z, **settings)
            folder = tmp_path / f"{is_secure}-{z}"
            moved.append(trees.ravel(run(e, folder).params).double())
        noise.append((moved[1] - moved[0]).norm())
    step = Ring(12, reach, 1.0).step
    longest = 1.0 + step * math.sqrt(len(moved[0]))
    assert longest > 2
    assert float(noise[1] / noise[0]) == pytest.approx(longest, rel=1e-4)


def test_a_row_has_sums_and_no_number_of_a_client(tmp_path: Path) -> None:
    run(small(WEIGHING), tmp_path / "plain")
    run(secure(WEIGHING), tmp_path / "secure")
    for plain, row in zip(
        rows_of(tmp_path / "plain"), rows_of(tmp_path / "secure"), strict=True
    ):
        assert "train_loss_spread" in plain
        assert "train_loss_spread" not in row
        assert row["secure"]["train"] == {
            "clients": 5,
            "threshold": 4,
            "tolerated": 2,
            "weight": row["server_weight"],
            "clipped": 0.0,
            "capped": 0,
        }
        d = 5 + 1
        assert row["bytes_up"] == 5 * (4 * (d - 1) + 8 * (5 + 2))


def test_a_report_says_what_the_server_could_read(tmp_path: Path) -> None:
    run(small("fedavg"), tmp_path / "plain")
    run(secure(aggregation__max_examples=8), tmp_path / "secure")
    plain, secret = (read_run(tmp_path / name) for name in ("plain", "secure"))
    assert "could read" not in summary(plain)
    assert (
        "The server could read sums of 5 clients or more alone, of whom 4 have to "
        "stay, and 2 may help a server that lies, if clients "
        "have certificates; added without masks in this simulation; examples capped "
        "20 times."
    ) in summary(secret)
    assert average_of_training(secret.history) == "mean"
    assert average_of_training(plain.history) == "median"


@pytest.mark.parametrize("method", [WEIGHING, "tests.secret:Unasked"])
def test_the_table_of_clients_stays_empty(method: str, tmp_path: Path) -> None:
    settings = {"participation__dropout": 0.2, "rounds": 8}
    run(small(method, **settings), tmp_path / "plain")
    result = run(secure(method, **settings), tmp_path / "secure")
    assert result.dropped
    assert len(read_clients(tmp_path / "plain")) > 0
    assert len(read_clients(tmp_path / "secure")) == 0


def test_work_without_a_message_may_not_send_numbers(tmp_path: Path) -> None:
    run(small("tests.secret:Telling"), tmp_path / "plain")
    with pytest.raises(SettingsError, match="go_on sends numbers of single clients"):
        run(secure("tests.secret:Telling"), tmp_path / "secure")


def test_training_losses_are_means_over_clients_with_examples(tmp_path: Path) -> None:
    task = "tests.methods:with_an_empty_client"
    settings = {"task": task, "participation__cohort": 12, "rounds": 1}
    run(secure(**settings), tmp_path / "secure")
    run(small("fedavg", **settings), tmp_path / "plain")
    table = read_clients(tmp_path / "plain", "train")
    losses = [loss for loss in table["loss"].to_pylist() if not math.isnan(loss)]
    assert len(losses) == 11
    (row,) = rows_of(tmp_path / "secure")
    assert row["train_loss"] == pytest.approx(sum(losses) / 11, abs=GOLDEN)


def test_entries_beyond_the_reach_and_counts_above_the_cap_are_counted(
    tmp_path: Path,
) -> None:
    settings = {"secure__reach": 2.0**-20, "aggregation__max_examples": 8}
    run(secure("fedavg", rounds=1, **settings), tmp_path / "r")
    (row,) = rows_of(tmp_path / "r")
    sums = row["secure"]["train"]
    assert sums["clipped"] == 1.0
    assert sums["capped"] == 5
    assert sums["weight"] == 5 * 8


def test_counts_above_the_cap_weigh_as_in_a_plain_run(tmp_path: Path) -> None:
    settings = {"task": "tests.measured:numbers", "population": None, "options": {}}
    settings |= {"participation__cohort": 7, "aggregation__max_examples": 20}
    plain = run(small("fedavg", **settings), tmp_path / "plain")
    secret = run(small("fedavg", **settings, aggregation__secure=True), tmp_path / "r")
    assert_close(secret.params, plain.params, 1e-5, "capped")
    assert rows_of(tmp_path / "r")[0]["secure"]["train"]["capped"] == 2


def test_a_bound_on_messages_is_kept_by_clients(tmp_path: Path) -> None:
    settings = {"aggregation__clip": 0.01, "rounds": 1}
    plain = run(small("fedavg", **settings), tmp_path / "plain")
    secret = run(secure("fedavg", **settings), tmp_path / "secure")
    assert_close(secret.params, plain.params, 1e-6, "clipped")


def test_a_message_that_is_not_finite_is_left_out_by_name(tmp_path: Path) -> None:
    loop = loop_of(secure("tests.methods:BadWeather"), tmp_path / "r")
    cohort = loop.process.sample(0, loop.state.participation)[0]
    client = int(cohort[1])
    rows = loop.task.data.rows(client, "train")
    loop.task.data.x[rows] = 667.0
    row = loop.round()
    loop.close()
    assert row["left_out"] == {"not finite": [client]}
    assert row["reports"] == row["secure"]["train"]["clients"] == 4
    assert not row["skipped"]


def test_malicious_clients_attack_before_numbers_are_encoded(tmp_path: Path) -> None:
    settings = {
        "adversary__attack": "sign_flip",
        "adversary__clients": [0, 1, 2],
        "participation__cohort": 12,
    }
    plain = run(small("fedavg", **settings), tmp_path / "plain")
    secret = run(secure(**settings), tmp_path / "secure")
    honest = run(secure(participation__cohort=12), tmp_path / "honest")
    assert_close(secret.params, plain.params, 1e-5, "attacked")
    assert secret.params_sha256 != honest.params_sha256


# Rounds that are skipped


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"method__weighting": "one"}, "one client has a weight of 1 in a sum of 1"),
        ({"participation__dropout": 0.4}, "a sum of [12] clients"),
        ({"secure__threshold": 4, "participation__dropout": 0.3}, "a threshold of 4"),
    ],
)
def test_a_sum_that_would_show_a_client_is_not_made(
    settings: dict[str, Any], found: str, tmp_path: Path
) -> None:
    notes = _Notes()
    e = secure(WEIGHING, **settings)
    loop = loop_of(e, tmp_path / "r", observer=notes)
    rows = [loop.round() for _ in range(8)]
    loop.close()
    skipped = [row for row in rows if row["skipped"]]
    assert skipped
    assert all("secure" not in row for row in skipped)
    said = [note for note in notes.notes if "left the model as it was" in note]
    assert len(said) == 1
    assert re.search(found, said[0]), said


def test_a_run_whose_sums_would_all_show_a_client_ends_with_the_reason(
    tmp_path: Path,
) -> None:
    """Two lists of weights are one too many: their difference is one client's."""
    e = secure(WEIGHING, rounds=6, method__weighting="isolating")
    with pytest.raises(RunError, match=r"in a row; the last: of two sums with other"):
        run(e, tmp_path / "r")


class _Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_round_that_is_skipped_leaves_no_trace(tmp_path: Path) -> None:
    """The same run as one in which those rounds ask nobody."""
    trace = tmp_path / "trace"
    trace.write_text("0 1 2 3\n4 5\n0 1 2 4 5\n")
    empty = tmp_path / "empty"
    empty.write_text("0 1 2 3\n\n0 1 2 4 5\n")
    results = []
    for method in ("scaffold", REMEMBERING):
        for file in (trace, empty):
            settings = {"name": "trace", "file": file}
            e = secure(method, rounds=3, participation=settings)
            folder = tmp_path / f"{method.split(':')[-1]}-{file.name}"
            results.append(run(e, folder).params_sha256)
            assert rows_of(folder)[1]["skipped"] == (file == trace)
        assert results[-1] == results[-2], method


def test_clients_forget_work_whose_sum_is_not_known(tmp_path: Path) -> None:
    """SCAFFOLD's c_i: the server did not hear of its change."""
    trace, empty = tmp_path / "trace", tmp_path / "empty"
    trace.write_text("0 1 2 3\n0 1 4 5\n0 1 2 3\n")
    empty.write_text("0 1 2 3\n\n0 1 2 3\n")
    results = []
    for file in (trace, empty):
        settings = {"participation": {"name": "trace", "file": file}, "rounds": 3}
        settings |= {"adversary__attack": "absent", "adversary__clients": [4, 5]}
        folder = tmp_path / f"run-{file.name}"
        results.append(run(secure("scaffold", **settings), folder).params_sha256)
        assert rows_of(folder)[1]["skipped"] == (file == trace)
    assert results[0] == results[1]


def test_clients_that_have_trained_are_as_many_as_devices_ask_for(
    tmp_path: Path,
) -> None:
    """Of five clients two say at once that they cannot; four have to stay."""
    settings: dict[str, Any] = {"secure__threshold": 4, "rounds": 1}
    settings |= {"adversary__attack": "absent", "adversary__clients": [0, 3]}
    trace = tmp_path / "trace"
    trace.write_text("0 1 2 3 4\n")
    settings["participation"] = {"name": "trace", "file": trace}
    run(secure(**settings), tmp_path / "r")
    (row,) = rows_of(tmp_path / "r")
    assert row["skipped"]
    assert "secure" not in row
    # An evaluation, of all twelve clients, has a threshold of its own.
    assert "client_loss" in row


def test_clients_keep_work_that_is_in_a_sum_though_the_round_is_not_used(
    tmp_path: Path,
) -> None:
    """As devices do, who hear of the sum alone."""
    kept = []
    for min_reports in (1, 12):
        e = secure(
            "scaffold",
            rounds=1,
            min_reports=min_reports,
            participation={"name": "uniform"},
            adversary__attack="absent",
            adversary__clients=[1],
        )
        loop = loop_of(e, tmp_path / f"{min_reports}")
        row = loop.round()
        assert row["skipped"] == (min_reports == 12)
        assert "train" in row["secure"]
        assert loop.engine.states is not None
        everybody = torch.tensor(loop.engine.states.clients())
        kept.append(loop.engine.states.gather(everybody))
        loop.close()
    first, second = kept
    assert_close(first, second, 0.0, "c_i")
    assert any(bool(x.any()) for x in trees.leaves(first))


@pytest.mark.parametrize("is_secure", [False, True])
@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_an_evaluation_of_no_client_measures_none(
    engine: str, is_secure: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"engine__name": engine, "evaluation__clients": 0}
    e = small("fedavg", rounds=1, aggregation__secure=is_secure, **settings)
    notes = _Notes()
    result = run(e, tmp_path / "r", observer=notes)
    assert "client_loss" not in result.final
    assert not [note for note in notes.notes if "not evaluated" in note]


# Engines whose clients mask what they send


def test_an_engine_with_masks_gives_the_same_bits(tmp_path: Path) -> None:
    for method in ("fedavg", WEIGHING, REMEMBERING):
        e = secure(method)
        name = method.split(":")[-1]
        expected = run(e, tmp_path / name).params_sha256
        result, loop = run_on(e, tmp_path / f"{name}-masked", Masking)
        assert result.params_sha256 == expected, method
        assert len(loop.memory.clients()) == 0  # the server remembers nobody
        bytes_up = rows_of(tmp_path / f"{name}-masked")[0]["bytes_up"]
        assert bytes_up == rows_of(tmp_path / name)[0]["bytes_up"] + 5 * 1000


def test_a_sum_that_clients_unmask_is_used(tmp_path: Path) -> None:
    """When clients are gone its weights are those of fewer, and still of no one."""

    def make(work: Work, states: StateStore) -> Engine:
        engine = Masking(work, states)
        engine.lost = {0: {5, 6, 7}}
        return engine

    trace = tmp_path / "trace"
    trace.write_text("0 1 2 3 4 5 6 7\n")
    settings = {"participation": {"name": "trace", "file": trace}}
    e = secure(WEIGHING, method__weighting="steep", rounds=1, **settings)
    run_on(e, tmp_path / "r", make)
    (row,) = rows_of(tmp_path / "r")
    assert not row["skipped"]
    assert row["secure"]["train"]["clients"] == 5
    assert row["secure"]["train"]["weight"] == 9


def test_clients_outside_a_sum_remember_what_was_before(tmp_path: Path) -> None:
    full, without = tmp_path / "full", tmp_path / "without"
    full.write_text("0 1 2 3 4\n" * 4)
    without.write_text("0 1 2 3 4\n0 1 3 4\n" + "0 1 2 3 4\n" * 2)
    e = secure(REMEMBERING, participation={"name": "trace", "file": without})
    expected = run(e, tmp_path / "expected").params_sha256
    e = secure(REMEMBERING, participation={"name": "trace", "file": full})
    engines: list[Masking] = []

    def make(work: Work, states: StateStore) -> Engine:
        engine = Masking(work, states)
        engine.lost = {1: {2}}
        engines.append(engine)
        return engine

    result, loop = run_on(e, tmp_path / "lost", make)
    assert result.params_sha256 == expected
    moments = [ask.moments.tolist() for ask in engines[0].asked if ask.news]
    assert moments[0] == [-1] * 5
    assert moments[2] == [1 << 16, 1 << 16, 0, 1 << 16, 1 << 16]
    remembered = loop.state.aggregation["remembered"]
    assert remembered.tolist() == [3 << 16] * 5 + [-1] * 7


def test_a_sum_whose_masks_stay_is_not_used(tmp_path: Path) -> None:
    def make(work: Work, states: StateStore) -> Engine:
        engine = Masking(work, states)
        engine.garbles = True
        return engine

    result, _ = run_on(secure(), tmp_path / "r", make)
    rows = rows_of(tmp_path / "r")
    assert all(row["skipped"] for row in rows)
    assert "client_loss" not in rows[-1]
    assert result.rounds == 4


# Refused before a run


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fedavg", {"links__uplink__snr_db": 20.0}, "links.uplink with aggregation"),
        ("fedavg", {"defence__bits": 8}, "defence.bits with aggregation.secure"),
        ("fedavg", {"audit__capture": 2}, "audit.capture with aggregation.secure"),
        (
            "fedavg",
            {"participation__cohort": 2},
            "at most 2 clients, and a sum needs 3",
        ),
        ("fedavg", {"secure__threshold": 6}, "secure.threshold = 6"),
        ("fedavg", {"secure__threshold": 2}, "a threshold of 2 among 5 clients"),
        ("fedavg", {"evaluation__clients": 2}, "2 clients are evaluated"),
        ("fedavg", {"aggregation__rule": "median"}, "a rule looks at single messages"),
        ("fedavg", {"secure__reach": 3.0}, "reach = 3: expected a power of two"),
        (
            "fedavg",
            {"participation": {"name": "bernoulli", "mean": 0.15}},
            "of the rounds have fewer than 3 clients",
        ),
        ("fedlaw", {}, "does not fit fedlaw"),
        (
            "dpfedavg",
            {
                "min_reports": 0,
                "participation": {"name": "bernoulli", "mean": 0.6},
                "method__noise_multiplier": 1.0,
            },
            "fewer than 3 clients is skipped, which tells how many were there",
        ),
        (WEIGHING, {"method__weighting": "custom"}, "by_first_letters makes weights"),
        ("tests.secret:Integers", {}, '"seen/histogram" is int64 of shape'),
        ("tests.secret:Single", {}, "Single takes single updates of train"),
    ],
)
def test_what_cannot_be_summed_in_secret_is_refused_before_a_run(
    method: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        run(secure(method, **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_run_cannot_change_who_sees_updates(tmp_path: Path) -> None:
    run(secure(), tmp_path / "r")
    message = "aggregation.secure was true and is now false"
    with pytest.raises(SettingsError, match=re.escape(message)):
        run(small("fedavg"), resume=tmp_path / "r", back_to=2)
