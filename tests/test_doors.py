"""The two doors of a round: what a method gets through `mean` and through `each`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import RunError, SettingsError, TooFewReports
from fedcore.local import local_sgd
from fedcore.method import Method, MethodSettings, Round, on_client
from fedcore.reports import Mean, Reports, RunningSum, by_examples, equally, weight_of
from fedcore.rounds.loop import Interrupted, run
from fedcore.task import Task
from fedcore.types import Batches, Model, Params, Stateless
from tests.helpers import assert_close, loop_of, small

ENGINES: dict[str, dict[str, Any]] = {
    "sequential": {"engine__name": "sequential"},
    "vectorised": {"engine__name": "vectorised", "engine__chunk": 3},
    "one at a time": {"engine__name": "vectorised", "engine__chunk": 1},
}


def reports(clients: list[int], values: list[float]) -> Reports:
    """Client i sends its value, and has i + 1 examples."""
    ids = torch.tensor(clients)
    up = {"w": torch.tensor(values, dtype=torch.float64)[:, None]}
    return Reports(ids, up, (ids + 1).float())


class Scripted(Round):
    """A round whose clients answer what the test says."""

    def each(self, fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
        yield reports([0, 1], [1.0, 2.0])
        yield reports([4], [8.0])

    def zero_message(self, fn: Any, down: Any, news: Any = None) -> Any:
        return {"w": torch.zeros(1)}


def scripted() -> Scripted:
    cohort = torch.tensor([0, 1, 4])
    return Scripted(0, cohort, 5, None, None, 0)  # type: ignore[arg-type]


# Means


def test_a_mean_weighs_by_examples_equally_or_by_weights_known_before() -> None:
    r = scripted()
    by_size = r.mean(None, r.cohort, {})  # type: ignore[arg-type]
    assert by_size.value["w"].item() == pytest.approx((1 + 2 * 2 + 5 * 8) / 8)
    same = r.mean(None, r.cohort, {}, equally)  # type: ignore[arg-type]
    assert same.value["w"].item() == pytest.approx(11 / 3)
    given = torch.tensor([3.0, 0.5, 2.0])  # of clients 0, 1 and 4
    mean = r.mean(None, r.cohort, {}, given)  # type: ignore[arg-type]
    assert mean.total["w"].item() == pytest.approx(3 * 1 + 0.5 * 2 + 2 * 8)
    assert mean.weight.item() == 5.5
    assert mean.clients.tolist() == [0, 1, 4]


def test_weights_of_another_length_than_the_clients_are_refused() -> None:
    with pytest.raises(ValueError, match="3 clients"):
        weight_of(torch.ones(2), torch.tensor([0, 1, 4]))


def test_the_mean_of_nobody_has_a_total_of_zero_and_no_value() -> None:
    mean = RunningSum().mean(lambda: {"w": torch.zeros(2)})
    assert mean.total["w"].tolist() == [0, 0]
    assert mean.weight.item() == 0
    assert mean.clients.tolist() == []
    with pytest.raises(TooFewReports, match="no client reported"):
        _ = mean.value


def test_a_float64_mean_is_divided_in_float64() -> None:
    total, weights = RunningSum(), torch.tensor([1.0, 2.0])
    total.add(reports([0, 1], [1.0, 2.0]), weights)
    third = total.mean(dict).value["w"].item()
    assert abs(third - 5 / 3) < 1e-15  # a float32 sum of weights is off by 5e-8


def test_a_mean_keeps_the_types_of_what_was_sent() -> None:
    up = {"w": torch.ones(2, 3), "loss": torch.ones(2)}
    total = RunningSum()
    total.add(Reports(torch.tensor([0, 1]), up, torch.ones(2)), torch.ones(2))
    value = total.mean(dict).value
    assert {x.dtype for x in trees.leaves(value)} == {torch.float32}


# Engines


class Settings(MethodSettings):
    local_lr: float = 0.05
    through: str = "mean"
    weighting: str = "examples"


class Up(NamedTuple):
    delta: Params
    loss: Tensor


class Averaging(Method[Settings]):
    """FedAvg through either door, with weights of three kinds."""

    needs_updates = True

    @on_client
    def train(
        self, task: Task, t: Tensor, down: Model, state: Stateless, batches: Batches
    ) -> tuple[Up, Stateless]:
        w, _, loss = local_sgd(task.loss, down.params, batches, self.s.local_lr)
        return Up(trees.sub(w, down.params), loss), state

    def round(self, server: Model, r: Round) -> Model:
        weight: Any = {
            "examples": by_examples,
            "equally": equally,
            "given": 1.0 / (1 + r.cohort.double()),
        }[self.s.weighting]
        if self.s.through == "mean":
            mean = r.mean(self.train, r.cohort, server, weight)
        else:
            mean = Round.mean(r, self.train, r.cohort, server, weight)
        assert mean.clients.sort().values.tolist() == r.cohort.tolist()
        r.log["weight"] = mean.weight.item()
        return Model(trees.add(server.params, mean.value.delta))


class Silent(Averaging):
    """Averaging that does not say that it needs single updates."""

    needs_updates = False


def averaging(tmp_path: Path, name: str, **settings: Any) -> Any:
    through, weighting = settings.pop("through"), settings.pop("weighting", "examples")
    own = {
        "name": "tests.test_doors:Averaging",
        "through": through,
        "weighting": weighting,
    }
    return run(
        small("fedavg", **settings).model_copy(update=method(own)), tmp_path / name
    )


def method(settings: dict[str, Any]) -> dict[str, Any]:
    values = {"method": settings}
    return {"method": Experiment.parse(values).method}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weighting", ["examples", "equally", "given"])
def test_a_mean_summed_where_clients_run_is_the_mean_of_single_updates(
    engine: str, weighting: str, tmp_path: Path
) -> None:
    settings = {**ENGINES[engine], "weighting": weighting}
    mean = averaging(tmp_path, "mean", through="mean", **settings)
    each = averaging(tmp_path, "each", through="each", **settings)
    assert_close(mean.params, each.params, 1e-7, f"{engine}, {weighting}")
    for one, other in zip(mean.history, each.history, strict=True):
        assert one["server_weight"] == pytest.approx(other["server_weight"])
        assert one["train_loss"] == pytest.approx(other["train_loss"])
        assert (one["bytes_up"], one["reports"]) == (
            other["bytes_up"],
            other["reports"],
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_is_not_finite_is_left_out_of_a_mean(
    engine: str, tmp_path: Path
) -> None:
    loop = loop_of(
        small("fedavg", participation__cohort=12, **ENGINES[engine]), tmp_path
    )
    loop.task.data.x[loop.task.data.rows(4, "train")] = torch.nan
    row = loop.round()
    assert row["dropped"] == {"not finite": 1}
    assert row["reports"] == 11
    assert bool(trees.finite(loop.state.server))


def test_a_method_that_takes_single_updates_without_saying_so_is_told(
    tmp_path: Path,
) -> None:
    own = {"name": "tests.test_doors:Silent", "through": "each"}
    experiment = small("fedavg").model_copy(update=method(own))
    with pytest.raises(TypeError, match="needs_updates = True"):
        run(experiment, tmp_path / "r")


def test_a_round_of_nobody_gives_zeros_in_the_shape_of_a_message(
    tmp_path: Path,
) -> None:
    loop = loop_of(small("fedavg"), tmp_path)
    nobody = torch.empty(0, dtype=torch.int64)
    r = loop.open_round(0, nobody)
    mean: Mean = r.mean(loop.method.train, nobody, loop.state.server)  # type: ignore[attr-defined]
    params = loop.state.server.params
    assert {n: x.shape for n, x in mean.total.delta.items()} == {
        n: x.shape for n, x in params.items()
    }
    assert not any(x.any() for x in trees.leaves(mean.total))


class Telling(Averaging):
    """Clients that tell their model twice in a round, and are sent nothing."""

    @on_client(data="all")
    def tell(
        self, task: Task, t: Tensor, down: Stateless, state: Stateless, batches: Batches
    ) -> tuple[Model, Stateless]:
        return Model(task.init_params()), state

    def round(self, server: Model, r: Round) -> Model:
        for _ in range(2):
            r.mean(self.tell, r.cohort, Stateless(), equally)
        return server


def test_one_noise_is_not_sent_twice_by_clients_that_are_sent_nothing(
    tmp_path: Path,
) -> None:
    own = {"name": "tests.test_doors:Telling"}
    noise = {"defence__clip": 1.0, "defence__noise_multiplier": 1.0}
    experiment = small("fedavg", **noise).model_copy(update=method(own))
    with pytest.raises(RunError, match='for "tell" twice in one round'):
        run(experiment, tmp_path / "r")


# Methods


def test_the_four_server_optimizers_are_refused_by_their_old_names() -> None:
    for old, optimizer in {"fedadam": "adam", "fedavgm": "momentum"}.items():
        with pytest.raises(SettingsError) as caught:
            Experiment.parse({"method": {"name": old}})
        assert 'method.name = "fedopt"' in str(caught.value)
        assert "method.server_lr = " in str(caught.value)
        assert f'method.optimizer = "{optimizer}"' in str(caught.value)


def test_fedstale_weighs_by_the_examples_that_clients_report(tmp_path: Path) -> None:
    experiment = small(
        "fedstale",
        method__weights="examples",
        method__beta=0.0,
        participation__cohort=12,
    )
    loop = loop_of(experiment, tmp_path)
    # On a device the server's own copy of the data says nothing.
    loop.task.data.num_examples = lambda clients, data: pytest.fail("looked up")  # type: ignore[method-assign]
    clients = torch.arange(12)
    sizes = torch.tensor([float(1 + i) for i in range(12)])
    deltas = torch.arange(12.0)[:, None]

    class Reported(Round):
        def each(self, fn: Any, clients: Tensor, down: Any) -> Iterator[Reports]:
            up = Up({"weight": deltas[:, None].expand(12, 1, 5)}, torch.zeros(12))
            yield Reports(clients, up, sizes)

    r = Reported(0, clients, 12, loop.task, loop.memory, 0)
    after = loop.method.round(loop.state.server, r)
    # Every a_i / q_i with q_i = 1 in the first round: the mean by examples.
    expected = (sizes * deltas[:, 0]).sum() / sizes.sum()
    moved = after.params["weight"] - loop.state.server.params["weight"]
    assert moved.flatten().tolist() == pytest.approx([expected.item()] * 5)


def test_weights_for_clients_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        weight_of(torch.ones(3), torch.tensor([5, 1, 3]))


def test_the_mean_of_whole_numbers_is_no_whole_number() -> None:
    total = RunningSum()
    total.add(
        Reports(torch.arange(2), torch.tensor([3, 4]), torch.ones(2)), torch.ones(2)
    )
    assert total.mean(dict).value.item() == 3.5


@pytest.mark.parametrize("name", ["scaffold", "fedvarp"])
def test_a_stop_within_an_evaluation_leaves_the_round_undone(
    name: str, tmp_path: Path
) -> None:
    experiment = small(name, evaluation__every=1)
    whole = run(experiment, tmp_path / "whole")
    loop = loop_of(experiment, tmp_path / "stopped")
    test = loop.task.test

    def stopped(params: Params) -> dict[str, float]:
        if loop.state.t == experiment.rounds - 1:  # in the last round's evaluation
            loop._stop.set()
        return test(params)

    loop.task.test = stopped  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted, match="after round 3 of 4"):
        loop.run()
    loop.close()
    resumed = run(experiment, resume=tmp_path / "stopped")
    assert resumed.params_sha256 == whole.params_sha256
    assert [row["round"] for row in resumed.history] == [1, 2, 3, 4]
    assert resumed.history[-1]["test_loss"] == whole.history[-1]["test_loss"]
