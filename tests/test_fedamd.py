"""FedAMD against its equations, on clients f_i(x) = h_i (x - c_i)^2 / 2.

And SCAFFOLD on the same clients, spelled out in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore import SettingsError, methods, trees
from fedcore.data.federated import Examples, FederatedData, LocalSettings
from fedcore.engines.base import Work
from fedcore.engines.message_shape import message_shape
from fedcore.engines.sequential import Sequential
from fedcore.method import Round
from fedcore.metrics import squared_error
from fedcore.rounds.loop import run
from fedcore.storage.rows import StateStore
from fedcore.task import Task
from tests.helpers import answers, loop_of, no_answers, round_of, small

# The worked example of the specification; its optimum is 1.25.
H = (1.0, 2.0, 1.0)
C = (0.0, 1.0, 3.0)


class Lab:
    """A method on quadratic clients, in float64, round by round.

    Client i holds one example, or `sizes[i]` equal ones. The cohort is everybody unless
    said.
    """

    def __init__(
        self,
        name: str = "fedamd",
        h: Sequence[float] = H,
        c: Sequence[float] = C,
        x: float = 0.0,
        steps: int = 2,
        sizes: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        self.n, self.t = len(h), 0
        counts = np.array(sizes or [1] * self.n)
        curvature = torch.from_numpy(np.repeat(h, counts))[:, None]
        centre = torch.from_numpy(np.repeat(c, counts))[:, None]
        examples = Examples(curvature.sqrt(), curvature.sqrt() * centre)
        order, offsets = np.arange(len(centre)), np.cumsum([0, *counts])
        data = FederatedData(examples, examples, order, offsets)
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(model.weight, x)
        self.task = Task(model, data, loss=squared_error, metrics={})
        cls = methods.load(name)
        values = {"local_lr": 0.25, **settings}
        self.method = cls(methods.settings_of(cls)(name=name, **values))
        params = self.task.init_params()
        self.states = StateStore(self.method.init_client(params), 10**9, Path)
        self.memory = StateStore(self.method.init_memory(params), 10**9, Path)
        local = LocalSettings(batch_size=1, steps=steps)
        work = Work(self.task, self.method, local, 0)
        self.engine = Sequential(work, self.states)
        self.state = self.method.init_server(params, self.n)
        self.asked: list[tuple[str, list[int]]] = []
        self.lost: set[int] = set()

    def round(self, anchors: Sequence[int] = (), miners: Sequence[int] = ()) -> float:
        """One round with these roles (of FedAMD); the model after it."""
        if anchors or miners:
            roles = [torch.tensor(ids, dtype=torch.int64) for ids in (anchors, miners)]
            self.method._roles = lambda server, r: tuple(roles)

        def each(fn: Any, clients: Tensor, down: Any) -> Any:
            self.asked.append((fn.__name__, clients.tolist()))
            left = [i for i in clients.tolist() if i not in self.lost]
            return answers(self.engine, fn, left, down, self.t)

        cohort = sorted({*anchors, *miners}) or range(self.n)
        self.state = self.method.round(self.state, self.round_of(cohort, each))
        self.memory.commit()
        self.states.commit()
        self.t += 1
        return self.x

    def round_of(self, cohort: Sequence[int], each: Any = no_answers) -> Round:
        def zeros(fn: Any, down: Any) -> Any:
            work = self.engine.work
            return trees.zeros_like(message_shape(work, fn, down, self.t))

        return round_of(
            self.t, cohort, self.n, each, self.memory, self.task, zeros=zeros
        )

    def roles(self, cohort: Sequence[int]) -> tuple[list[int], list[int]]:
        """(anchors, miners) of a round in which everybody has a cache."""
        everybody = torch.ones(self.n, dtype=torch.int64)
        server = self.state._replace(refreshed=everybody)
        anchors, miners = self.method._roles(server, self.round_of(cohort))
        return anchors.tolist(), miners.tolist()

    @property
    def x(self) -> float:
        return float(self.state.params["weight"])

    @property
    def caches(self) -> list[float]:
        return [float(self.memory.get(i)["weight"]) for i in range(self.n)]

    @property
    def vbar(self) -> float:
        return float(self.state.v["weight"])


def gradients(x: float, h: Sequence[float] = H, c: Sequence[float] = C) -> list[float]:
    return [hi * (x - ci) for hi, ci in zip(h, c, strict=True)]


def test_the_worked_example_comes_out_to_the_digit() -> None:
    lab = Lab()
    expected = [
        Fraction(5, 8),
        Fraction(125, 96),
        Fraction(125, 96),
        Fraction(7495, 4608),
    ]
    roles = [([0], [1]), ([], [1, 2]), ([0, 2], []), ([], [0, 1])]
    caches = [
        [0, -2, -3],
        [0, -2, -3],
        [125 / 96, -2, -163 / 96],
        [125 / 96, -2, -163 / 96],
    ]
    for (anchors, miners), x, v in zip(roles, expected, caches, strict=True):
        assert lab.round(anchors, miners) == pytest.approx(float(x), abs=1e-14)
        assert lab.caches == pytest.approx(v, abs=1e-14)
        assert lab.vbar == pytest.approx(np.mean(v), abs=1e-14)
    assert lab.vbar == pytest.approx(-115 / 144, abs=1e-14)


def test_everybody_is_asked_for_a_gradient_once_and_anchors_do_not_move_the_model() -> (
    None
):
    lab = Lab(x=0.5)
    assert [lab.round(anchors=[1, 2]) for _ in range(3)] == [0.5] * 3
    assert lab.asked[0] == ("anchor", [0, 1, 2])
    assert [ids for name, ids in lab.asked[1:] if name == "anchor"] == [[1, 2]] * 3
    assert lab.caches == pytest.approx(gradients(0.5), abs=1e-15)


def test_a_miners_first_step_is_along_vbar_whatever_its_data() -> None:
    lab = Lab(steps=1)
    assert lab.round(miners=[2]) == pytest.approx(0.25 * 5 / 3, abs=1e-15)
    for t in range(2, 6):  # no anchors: a straight line
        assert lab.round(miners=[t % 3]) == pytest.approx(t * 0.25 * 5 / 3, abs=1e-14)


def test_with_full_batches_a_miner_takes_scaffolds_path_with_fresh_caches() -> None:
    steps, lr = 6, 0.1
    lab = Lab(steps=steps, local_lr=lr)
    y, x0 = 0.0, 0.0
    g0, g1 = gradients(x0)[1], np.mean(gradients(x0))
    for _ in range(steps):
        y -= lr * (
            g1 + gradients(y)[1] - g0
        )  # SVRG; SCAFFOLD with c = vbar, c_i = grad f_i(x)
    assert lab.round(miners=[1]) == pytest.approx(y, abs=1e-14)


def test_clients_of_one_curvature_do_not_drift() -> None:
    h, c, steps, lr = (2.0, 2.0, 2.0), (0.0, 1.0, 5.0), 5, 0.2
    ends = [Lab(h=h, c=c, steps=steps, local_lr=lr).round(miners=[i]) for i in range(3)]
    x = 0.0
    for _ in range(steps):
        x -= lr * np.mean(gradients(x, h, c))  # gradient descent on F
    assert ends == pytest.approx([x] * 3, abs=1e-14)


def test_with_period_two_one_step_is_gradient_descent_every_second_round() -> None:
    lab, x = Lab(steps=1, period=2), 0.0
    for t in range(8):
        if t % 2:
            x -= 0.25 * np.mean(gradients(x))
        assert lab.round() == pytest.approx(x, abs=1e-14)


def test_one_client_with_period_two_is_sarah() -> None:
    lab, x, steps = Lab(h=(2.0,), c=(3.0,), steps=4, local_lr=0.1, period=2), 0.0, 4
    for t in range(6):
        if t % 2:
            before, y, g = x, x, 2.0 * (x - 3)
            for k in range(steps):
                g = g + 2.0 * (y - 3) - 2.0 * (before - 3) if k else g
                before, y = y, y - 0.1 * g
            x = y
        assert lab.round() == pytest.approx(x, abs=1e-14)


def test_the_optimum_is_a_fixed_point_for_every_cohort() -> None:
    for anchors, miners in (([0], [1, 2]), ([], [0]), ([1], [2]), ([0, 1, 2], [])):
        lab = Lab(x=1.25, steps=5)
        for _ in range(3):
            assert lab.round(anchors, miners) == pytest.approx(1.25, abs=1e-14)


def test_only_anchors_refresh_their_cache_and_a_lost_message_changes_nothing_else() -> (
    None
):
    lab = Lab()
    lab.round(miners=[0, 1])
    before, x = lab.caches, lab.x
    lab.lost = {2}
    lab.round(anchors=[0, 2], miners=[1])
    assert lab.caches[1:] == before[1:]
    assert lab.caches[0] == pytest.approx(gradients(x)[0], abs=1e-15)
    assert lab.vbar == pytest.approx(np.mean(lab.caches), abs=1e-14)
    lost, alone = Lab(), Lab()
    lost.round(miners=[0, 1])
    alone.round(miners=[0, 1])
    lost.lost = {2}
    assert lost.round(miners=[1, 2]) == alone.round(
        miners=[1]
    )  # divided by the miners that reported
    lost.lost = {0, 1, 2}
    assert lost.round(miners=[0, 1]) == alone.x


def test_a_client_without_a_cache_is_left_out_of_vbar_and_is_an_anchor_first() -> None:
    lab = Lab(p=0.0001)
    lab.lost = {1}
    lab.round()
    assert lab.vbar == pytest.approx(
        np.mean([gradients(0.0)[0], gradients(0.0)[2]]), abs=1e-15
    )
    lab.lost, x = set(), lab.x
    lab.round()
    assert [ids for name, ids in lab.asked[-2:]] == [[0, 2], [1]]
    assert lab.caches[1] == pytest.approx(gradients(x)[1], abs=1e-15)
    assert lab.vbar == pytest.approx(np.mean(lab.caches), abs=1e-15)


def test_the_running_mean_is_the_mean_of_the_caches() -> None:
    draw = np.random.default_rng(0)
    lab = Lab(h=(1.0, 2.0, 0.5, 1.5), c=(0.0, 1.0, 3.0, -2.0), local_lr=0.1)
    for _ in range(40):
        ids = draw.permutation(4).tolist()
        cut = int(draw.integers(0, 5))
        lab.round(sorted(ids[:cut]), sorted(ids[cut:]))
        assert lab.vbar == pytest.approx(np.mean(lab.caches), abs=1e-12)


def test_how_many_examples_a_client_holds_does_not_change_its_weight() -> None:
    one, several = Lab(), Lab(sizes=(1, 5, 2))
    roles = [([0], [1, 2]), ([], [0, 1]), ([0, 1, 2], []), ([1], [0, 2])]
    for anchors, miners in roles:
        expected = one.round(anchors, miners)
        assert several.round(anchors, miners) == pytest.approx(expected, abs=1e-14)
        assert several.vbar == pytest.approx(one.vbar, abs=1e-14)


def test_the_server_step_scales_the_miners_mean() -> None:
    assert Lab(server_lr=0.5).round(miners=[1, 2]) == pytest.approx(
        0.5 * Lab().round(miners=[1, 2]), abs=1e-15
    )


@pytest.mark.slow
def test_the_linear_rate_holds_with_random_roles_where_fedavg_stops() -> None:
    amd = Lab("fedamd", steps=10, local_lr=0.05, p=0.5)
    avg = Lab("fedavg", steps=10, local_lr=0.05, weighting="participating")
    for _ in range(300):
        amd.round()
        avg.round()
    assert abs(amd.x - 1.25) < 1e-12
    assert abs(avg.x - 1.25) > 1e-2


def anchors_by_round(population: int, rounds: int, **settings: Any) -> np.ndarray:
    """How many anchors there are, [rounds]."""
    lab = Lab(h=(1.0,) * population, c=(0.0,) * population, **settings)
    counts = []
    for lab.t in range(rounds):
        anchors, miners = lab.roles(range(population))
        assert sorted([*anchors, *miners]) == list(range(population))
        counts.append(len(anchors))
    return np.array(counts)


def test_anchors_come_at_their_rate_or_all_at_once() -> None:
    counts = anchors_by_round(10, 3000, p=0.8)
    assert counts.mean() == pytest.approx(8.0, abs=0.1)
    assert (counts == 10).mean() == pytest.approx(0.8**10, abs=0.02)  # no miner: 0.1074
    assert anchors_by_round(10, 9, period=3).tolist() == [10, 0, 0] * 3


def test_the_role_of_a_client_does_not_depend_on_its_company() -> None:
    lab = Lab(h=(1.0,) * 30, c=(0.0,) * 30, p=0.5)
    lab.t = 4
    some, all_of_them = range(0, 30, 3), range(30)
    together = set(lab.roles(all_of_them)[0])
    assert set(lab.roles(some)[0]) == together & set(some)


def test_traffic_is_counted_to_the_byte(tmp_path: Path) -> None:
    loop = loop_of(
        small(
            "fedamd", method__period=2, options={"features": 5}, participation__cohort=4
        ),
        tmp_path,
    )
    d, loss = 5 * 4, 4  # bytes of a model, and of the loss that is logged
    first, second = loop.round(), loop.round()
    assert (first["bytes_down"], first["bytes_up"]) == (
        (12 + 4) * d,
        (12 + 4) * (d + loss),
    )  # everybody once, then four anchors
    assert (second["bytes_down"], second["bytes_up"]) == (
        4 * 2 * d,
        4 * (d + loss),
    )  # four miners, with vbar


def test_the_same_batch_in_both_gradients_cancels() -> None:
    lab = Lab(steps=4, local_lr=0.0001)
    batches = trees.at(lab.engine.work.batches(lab.method.mine, [1], 0), 0)
    params = lab.task.init_params()
    still = type("Still", (), {"params": params, "v": trees.zeros_like(params)})
    up, _ = lab.method.mine(lab.task, torch.tensor(0.0), still, (), batches)
    assert float(up.delta["weight"]) == 0.0


@pytest.mark.parametrize(
    "settings", [{"p": 1.0}, {"p": 0.0}, {"period": 1}, {"period": 0}]
)
def test_schedules_that_never_move_or_never_refresh_are_refused(
    settings: dict[str, float],
) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        small("fedamd", **{f"method__{key}": value for key, value in settings.items()})


def test_stopping_and_resuming_keeps_caches_and_coins(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method__p": 0.5,
        "participation__dropout": 0.3,
        "min_reports": 0,
    }
    whole = run(small("fedamd", rounds=9, **settings), tmp_path / "whole")
    run(small("fedamd", rounds=5, **settings), tmp_path / "part")
    assert (
        run(
            small("fedamd", rounds=9, **settings), resume=tmp_path / "part"
        ).params_sha256
        == whole.params_sha256
    )


# SCAFFOLD (Karimireddy et al., ICML 2020, Algorithm 1, option II)


def test_scaffold_is_the_papers_arithmetic_with_a_client_away() -> None:
    steps, lr, server_lr = 3, 0.1, 0.7
    lab = Lab("scaffold", steps=steps, local_lr=lr, server_lr=server_lr)
    x, c, c_i = 0.0, 0.0, [0.0, 0.0, 0.0]
    for lost in (set(), {1}, set(), {0, 2}):
        lab.lost = lost
        deltas, changes = [], []
        for i in set(range(3)) - lost:
            y = x
            for _ in range(steps):
                y -= lr * (gradients(y)[i] - c_i[i] + c)
            new = c_i[i] - c + (x - y) / (steps * lr)
            deltas.append(y - x)
            changes.append(new - c_i[i])
            c_i[i] = new
        x, c = x + server_lr * float(np.mean(deltas)), c + sum(changes) / 3
        assert lab.round() == pytest.approx(x, abs=1e-14)
        assert float(lab.state.c["weight"]) == pytest.approx(c, abs=1e-14)
        assert c == pytest.approx(np.mean(c_i), abs=1e-14)


def test_scaffolds_client_without_examples_keeps_its_control_variate() -> None:
    lab = Lab("scaffold", sizes=(2, 0, 1))
    for _ in range(3):
        lab.round()
        variates = [float(lab.states.get(i)["weight"]) for i in range(3)]
        assert variates[1] == 0
        assert float(lab.state.c["weight"]) == pytest.approx(np.mean(variates))
    assert variates[0] != 0


def test_scaffold_finds_the_optimum_where_local_steps_make_fedavg_drift() -> None:
    lab = Lab("scaffold", steps=5, local_lr=0.1)
    for _ in range(60):
        lab.round()
    assert lab.x == pytest.approx(1.25, abs=1e-6)
