"""Losses and metrics: shapes, which way is better, whole sets over clients, speed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import f1_score, r2_score, roc_auc_score
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score
from torchmetrics.text import Perplexity

from fedcore import (
    Examples,
    FederatedData,
    Metric,
    RunError,
    SettingsError,
    Task,
    absolute_error,
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)
from fedcore.metrics import is_higher_better
from fedcore.rounds.evaluation import Measured, over_clients
from fedcore.rounds.history import History
from fedcore.rounds.loop import Result, run
from fedcore.set_metrics import SetMetric
from fedcore.views.compare import compare
from fedcore.views.run_report import write_report
from fedcore.views.terminal import Terminal, show_result
from fedcore.views.text import rate_text
from tests import measured
from tests.measured import (
    CLASSES,
    SIZES,
    assert_same_measures,
    classes,
    data_of,
    experiment,
    last_of,
    to_classes,
)
from tests.pages import Page, titles


@pytest.fixture(scope="module")
def f1_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(experiment("classes"), tmp_path_factory.mktemp("runs") / "f1")


@pytest.fixture(scope="module")
def loss_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(experiment("by_loss"), tmp_path_factory.mktemp("runs") / "loss")


# Shapes

WRONG_SHAPES = [
    (squared_error, (6, 1), (6,), torch.float32, "y[:, None]"),
    (squared_error, (6,), (6, 1), torch.float32, "y[:, 0]"),
    (squared_error, (6, 3), (6,), torch.float32, "nn.Linear(..., 1)"),
    (absolute_error, (6, 1), (6,), torch.float32, "y[:, None]"),
    (absolute_error, (6, 4, 1), (6, 4), torch.float32, "y[:, :, None]"),
    (binary_cross_entropy, (6, 1), (6,), torch.int64, "y[:, None]"),
    (binary_accuracy, (6, 1), (6,), torch.int64, "y[:, None]"),
    (cross_entropy, (6, 1), (6,), torch.int64, "binary_cross_entropy"),
    (cross_entropy, (6,), (6,), torch.int64, "binary_cross_entropy"),
    (cross_entropy, (6, 3), (6, 1), torch.int64, "y[:, 0]"),
    (cross_entropy, (6, 3), (6, 3), torch.int64, "y.argmax(1)"),
    (cross_entropy, (6, 3), (6, 4), torch.float32, "classes of shape (6,)"),
    (cross_entropy, (6, 3), (6,), torch.float32, "y.long()"),
    (cross_entropy, (6, 7, 3), (6, 7), torch.int64, "transpose(1, -1)"),
    (accuracy, (6, 1), (6,), torch.int64, "binary_accuracy"),
    (accuracy, (6, 3), (6, 1), torch.int64, "y[:, 0]"),
    (accuracy, (6, 3), (6, 3), torch.float32, "y.argmax(1)"),
    (accuracy, (6, 3), (6,), torch.bool, "y.long()"),
]


@pytest.mark.parametrize(("fn", "outputs", "y", "dtype", "advice"), WRONG_SHAPES)
def test_shapes_that_disagree_or_broadcast_are_refused_with_what_to_write(
    fn: Any, outputs: tuple[int, ...], y: tuple[int, ...], dtype: Any, advice: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        fn(torch.randn(outputs), torch.zeros(y, dtype=dtype))
    message = str(caught.value)
    for part in (fn.__name__, str(outputs), str(y), advice):
        assert part in message
    assert "\n" not in message


def test_losses_are_those_of_pytorch_example_by_example() -> None:
    g = torch.Generator().manual_seed(0)
    o, y = torch.randn(6, 4, generator=g), torch.randint(4, (6,), generator=g)
    target, logit = torch.randn(6, 4, generator=g), torch.randn(6, 1, generator=g)
    answer = torch.randint(2, (6, 1), generator=g)
    words, tokens = torch.randn(6, 4, 9, generator=g), torch.randint(4, (6, 9))
    tokens[2, 5:] = -100
    f = nn.functional
    for i in range(6):
        one = slice(i, i + 1)
        pairs = [
            (cross_entropy(o, y), f.cross_entropy(o[one], y[one])),
            (
                cross_entropy(o, target.softmax(1)),
                f.cross_entropy(o[one], target.softmax(1)[one]),
            ),
            (cross_entropy(words, tokens), f.cross_entropy(words[one], tokens[one])),
            (squared_error(o, target), 4 * f.mse_loss(o[one], target[one]) / 2),
            (absolute_error(o, target), f.l1_loss(o[one], target[one])),
            (
                binary_cross_entropy(logit, answer),
                f.binary_cross_entropy_with_logits(logit[one], answer[one].float()),
            ),
            (binary_accuracy(logit, answer), (logit[i] > 0) == (answer[i] == 1)),
        ]
        for ours, theirs in pairs:
            assert ours.shape == (6,)
            assert ours[i].item() == pytest.approx(float(theirs), abs=1e-6)
    flat = squared_error(logit[:, 0], answer[:, 0])
    assert torch.equal(flat, squared_error(logit, answer))


def task_with(loss: Any = squared_error, **more: Any) -> Task:
    return Task(nn.Linear(5, 1), data_of(lambda y: y), loss, **{"metrics": {}, **more})


def test_a_loss_of_the_users_own_that_broadcasts_is_found_by_a_loop() -> None:
    flat = data_of(lambda y: y[:, 0])

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().mean(1)

    with pytest.raises(SettingsError, match=r"the loss mixes examples: example 0 of 8"):
        Task(nn.Linear(5, 1), flat, loss, {}).check()
    task_with(loss).check()
    with pytest.raises(SettingsError, match='the metric "z" mixes examples'):
        task_with(metrics={"z": lambda o, y: (o - o.mean())[:, 0]}).check()


def test_a_measure_of_a_batch_gets_the_hint_that_helps() -> None:
    labels = data_of(to_classes)
    with pytest.raises(SettingsError, match=r'CrossEntropyLoss\(reduction="none"\)'):
        Task(nn.Linear(5, 4), labels, nn.CrossEntropyLoss()).check()
    Task(nn.Linear(5, 4), labels, nn.CrossEntropyLoss(reduction="none")).check()
    with pytest.raises(SettingsError, match="give a metric of torchmetrics"):
        task_with(metrics={"mean": lambda o, y: (o - y).abs().mean()}).check()
    with pytest.raises(SettingsError, match="gives a float, expected a tensor"):
        task_with(metrics={"mean": lambda o, y: 0.5}).check()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"f1": BinaryF1Score}, r"make one, BinaryF1Score\(\.\.\.\)"),
        ({"f1": "f1"}, 'a str as "f1": expected a function'),
        ({"": accuracy}, "expected a name"),
        ({"a/b": accuracy}, "expected a name without /"),
        ({"client": accuracy}, "a column of clients.parquet"),
        ({"loss": accuracy}, "what is trained on"),
        ({"p": PearsonCorrCoef()}, '"p" .PearsonCorrCoef. keeps "mean_x", which is no'),
        ({"auc": BinaryAUROC()}, r"write BinaryAUROC\(\.\.\., thresholds=100\)"),
        ({"sum": R2Score() + R2Score()}, "no states of its own"),
    ],
)
def test_metrics_that_cannot_be_are_refused_by_name(
    metrics: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        task_with(metrics=metrics)


def test_losses_and_lists_that_cannot_be_are_refused() -> None:
    for loss in (MeanSquaredError(), nn.MSELoss, "squared_error"):
        with pytest.raises(SettingsError, match="expected a function of"):
            task_with(loss)
    with pytest.raises(SettingsError, match="metrics is a list, expected a dict"):
        task_with(metrics=[accuracy])


def test_a_metric_that_gives_several_numbers_is_refused() -> None:
    each = {"f1": MulticlassF1Score(num_classes=CLASSES, average=None)}
    task = Task(nn.Linear(5, CLASSES), data_of(to_classes), metrics=each)
    with pytest.raises(SettingsError, match=r'gives shape \(4,\).*average="macro"'):
        task.check()


def test_without_metrics_a_task_has_those_that_suit_its_loss() -> None:
    data = data_of(lambda y: (y > 0).long())
    task = Task(nn.Linear(5, 1), data, binary_cross_entropy)
    task.check()
    assert list(task.measures) == ["accuracy", "loss"]
    assert list(Task(nn.Linear(5, 1), data, squared_error).measures) == ["loss"]


# Which way is better


@pytest.mark.parametrize(
    ("name", "metric", "is_higher"),
    [
        ("accuracy", accuracy, True),
        ("quality", squared_error, False),
        ("quality", absolute_error, False),
        ("mae", lambda o, y: o, False),
        ("val_loss", lambda o, y: o, False),
        ("lossless", lambda o, y: o, True),
        ("top5", lambda o, y: o, True),
        ("mae", Metric(lambda o, y: o, higher_is_better=True), True),
        ("score", Metric(lambda o, y: o, higher_is_better=False), False),
        ("x", Metric(squared_error), False),
        ("x", MeanSquaredError(), False),
        ("x", R2Score(), True),
        ("loss_of_trust", R2Score(), True),
        ("x", nn.MSELoss(reduction="none"), False),
        ("error", MeanMetric(), False),
    ],
)
def test_a_metric_says_or_its_name_shows_which_way_is_better(
    name: str, metric: Any, is_higher: bool
) -> None:
    assert is_higher_better(name, metric) is is_higher


def test_the_worst_tenth_is_the_highest_where_lower_is_better() -> None:
    values = torch.arange(20.0, dtype=torch.float64)
    measured = Measured(values, torch.ones(20))
    assert over_clients(measured, is_higher_better=True)["worst_tenth"] == 0.5
    assert over_clients(measured, is_higher_better=False)["worst_tenth"] == 18.5


def test_a_run_judged_by_its_loss_calls_the_highest_losses_the_worst(
    loss_run: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = np.sort(last_of(loss_run)["loss"])
    clients = loss_run.final["client_loss"]
    assert clients["worst_tenth"] == pytest.approx(losses[-1])
    assert clients["worst_tenth"] > clients["mean"]
    assert loss_run.final["measures"] == {"loss": "lower"}
    words = Page(write_report(loss_run.run_dir)).words
    assert words.count(f"The worst tenth has {losses[-1]:.4g} on average") == 2
    show_result(loss_run, None)
    assert f"worst tenth {losses[-1]:.4f}" in capsys.readouterr().out


def test_a_comparison_ranks_by_the_direction_of_its_measure(tmp_path: Path) -> None:
    good = experiment("by_loss", rounds=8)
    bad = experiment("by_loss", method__local_lr=1e-4)
    c = compare([("bad", bad), ("good", good)], 1, tmp_path / "loss")
    page = Page(tmp_path / "loss" / "compare.html").words
    assert re.search("Test loss at the end, best first: good .*; bad ", page)
    worst, mean = (c.stat("bad", f"client_{part}") for part in ("worst_tenth", "mean"))
    assert worst is not None
    assert mean is not None
    assert worst.mean > mean.mean


def test_a_comparison_shows_the_users_own_metric_first(tmp_path: Path) -> None:
    good = experiment("numbers", rounds=8)
    bad = experiment("numbers", method__local_lr=1e-4)
    c = compare([("bad", bad), ("good", good)], 1, tmp_path / "r2")
    assert c.measure == "r2"
    page = Page(tmp_path / "r2" / "compare.html").words
    assert re.search("Test r2 at the end, best first: good .*; bad ", page)
    assert "by r2 (higher is better)" in page
    stored = json.loads((tmp_path / "r2" / "compare.json").read_text())
    assert stored["methods"]["good"]["test_r2"]["mean"] == pytest.approx(
        c.runs["good"][0].history.last("test_r2")
    )


def test_an_older_run_directory_opens_and_its_best_tenth_is_not_the_worst(
    loss_run: Result, tmp_path: Path
) -> None:
    folder = shutil.copytree(loss_run.run_dir, tmp_path / "old")
    file = folder / "metrics.jsonl"
    lines = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        del row["measures"], row["client_loss"]["worst_tenth"]
        row["client_loss"]["lowest_tenth"] = 0.0001
        row["client_accuracy"] = {"mean": 0.5, "lowest_tenth": 0.25}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n")
    history = History.read(file)
    assert "lowest_tenth" not in str(history.rows)
    assert history.last("client_accuracy")["worst_tenth"] == 0.25
    assert "worst_tenth" not in history.last("client_loss")
    assert list(history.measures) == ["accuracy", "loss"]
    assert "0.0001 on average" not in Page(write_report(folder)).words
    resumed = run(experiment("by_loss", rounds=3), resume=folder)
    assert resumed.measures == {"loss": False}


# Whole sets


def predictions(
    result: Result, name: str = "classes"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(outputs, targets) of each client's own rows, from plain PyTorch."""
    task = getattr(measured, name)(experiment(name))
    weight, bias = result.params["weight"], result.params["bias"]
    pairs = []
    for client in range(len(SIZES)):
        own = task.data.rows(client, "train")
        outputs = task.data.x[own] @ weight.T + bias
        pairs.append((outputs.numpy(), task.data.y[own].numpy()))
    return pairs


def macro_f1(outputs: np.ndarray, y: np.ndarray) -> float:
    return float(f1_score(y, outputs.argmax(1), average="macro"))


def test_f1_is_exact_for_each_client_and_over_all_their_rows(f1_run: Result) -> None:
    pairs = predictions(f1_run)
    each = [macro_f1(*pair) for pair in pairs]
    assert last_of(f1_run)["f1"] == pytest.approx(each, abs=1e-6)
    outputs, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    clients = f1_run.final["client_f1"]
    assert clients["pooled"] == pytest.approx(macro_f1(outputs, y), abs=1e-6)
    assert clients["mean"] == pytest.approx(np.mean(each), abs=1e-6)
    assert abs(clients["pooled"] - clients["mean"]) > 0.05
    assert clients["worst_tenth"] == pytest.approx(min(each), abs=1e-6)


def test_a_whole_test_set_is_measured_as_in_one_pass(f1_run: Result) -> None:
    task = classes(experiment("classes"))
    test = task.data.test
    outputs = test.x @ f1_run.params["weight"].T + f1_run.params["bias"]
    expected = macro_f1(outputs.numpy(), test.y.numpy())
    assert f1_run.final["test_f1"] == pytest.approx(expected, abs=1e-6)
    params = {name: value.clone() for name, value in f1_run.params.items()}
    assert task.test(params, batch_size=7) == pytest.approx(task.test(params, 10_000))
    probabilities = outputs.double().softmax(1).numpy()
    area = roc_auc_score(test.y.numpy(), probabilities, multi_class="ovr")
    assert f1_run.final["test_auc"] == pytest.approx(area, abs=0.01)


def test_r2_is_exact_and_left_out_where_it_is_not_defined(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listener(Terminal):
        def note(self, message: str) -> None:
            notes.append(message)

    result = run(experiment("numbers"), tmp_path / "r", observer=Listener())
    pairs = predictions(result, "numbers")
    each = [r2_score(y, outputs) for outputs, y in pairs[1:]]
    r2 = last_of(result)["r2"]
    assert np.isnan(r2[0])  # one example
    assert r2[1:] == pytest.approx(each, rel=1e-4)
    outputs, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    clients = result.final["client_r2"]
    assert clients["pooled"] == pytest.approx(r2_score(y, outputs), abs=1e-5)
    assert clients["mean"] == pytest.approx(np.mean(each), rel=1e-4)
    assert clients["worst_tenth"] == pytest.approx(min(each), rel=1e-4)
    assert [n for n in notes if '"r2" is not defined' in n and "1 of 6 clients" in n]
    mse = result.final["client_mse"]
    assert mse["pooled"] == pytest.approx(2 * result.final["client_loss"]["pooled"])
    assert mse["worst_tenth"] == pytest.approx(max(last_of(result)["mse"]))


@pytest.mark.parametrize("task", ["classes", "numbers"])
@pytest.mark.parametrize(
    "engine",
    [
        {"engine__name": "vectorised", "engine__chunk": 3},
        {"engine__name": "vectorised", "engine__chunk": 7},
        pytest.param({"engine__name": "ray"}, marks=pytest.mark.slow),
    ],
)
def test_every_engine_in_process_measures_the_same(
    task: str, engine: dict[str, Any], tmp_path: Path
) -> None:
    one = run(experiment(task), tmp_path / "sequential")
    other = run(experiment(task, **engine), tmp_path / "other")
    assert_same_measures(one, other)


def test_vmap_takes_states_and_no_client_falls_back_to_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="fedcore"):
        run(experiment("classes", engine__name="vectorised", engine__chunk=7), tmp_path)
    assert "one by one" not in caplog.text


def test_clients_whose_logits_look_like_probabilities_are_read_as_the_others() -> None:
    x = torch.tensor([[0.1], [0.4], [0.6], [-2.0], [3.0], [0.2]])
    y = torch.tensor([[1], [0], [1], [0], [1], [0]])
    data = FederatedData(
        Examples(x, y), Examples(x, y), np.arange(6), np.array([0, 3, 6])
    )
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    metrics = {"f1": BinaryF1Score(), "accuracy": binary_accuracy}
    task = Task(model, data, binary_cross_entropy, metrics)
    task.check()
    expected = f1_score(y[:, 0], (x[:, 0] > 0).long())
    for batch_size in (3, 6):
        assert task.test(task.init_params(), batch_size)["f1"] == pytest.approx(
            expected
        )

    def own(outputs: Tensor, y: Tensor) -> Tensor:
        return 2 * binary_cross_entropy(outputs, y)

    own_loss = Task(model, data, own, metrics)
    with pytest.raises(SettingsError, match=r'"f1" .* outputs=torch.sigmoid\)'):
        own_loss.check()
    told = {"f1": Metric(BinaryF1Score(), outputs=torch.sigmoid)}
    wrapped = Task(model, data, own, told)
    wrapped.check()
    assert wrapped.test(wrapped.init_params(), 3)["f1"] == pytest.approx(expected)


def test_an_area_is_not_defined_where_a_class_has_no_example() -> None:
    area = SetMetric("auc", BinaryAUROC(thresholds=50))
    outputs, ones = torch.tensor([0.1, 0.9, 0.4]), torch.ones(3)
    both = area.states(outputs, torch.tensor([0, 1, 1]), ones)
    alone = area.states(outputs, torch.tensor([0, 0, 0]), ones)
    assert area.value(both) == 1.0
    assert math.isnan(area.value(alone))  # torchmetrics gives 0
    each = SetMetric("auc", MulticlassAUROC(num_classes=3, thresholds=50))
    shares = torch.eye(3)
    whole = each.states(shares, torch.tensor([0, 1, 2]), ones)
    assert each.value(whole) == 1.0
    assert math.isnan(each.value(each.states(shares, torch.tensor([0, 1, 1]), ones)))


def test_perplexity_of_tokens_is_the_exponential_of_their_mean_loss() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.score = nn.Embedding(7, 8), nn.Linear(8, 7)

        def forward(self, x: Tensor) -> Tensor:  # [B, T] -> [B, classes, T]
            return self.score(self.embed(x)).transpose(1, 2)

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(7, (40, 5), generator=g) for _ in range(2))
    y[3, 2:] = -100
    data = FederatedData(
        Examples(x, y), Examples(x, y), np.arange(40), np.arange(0, 41, 10)
    )
    tokens = Perplexity(ignore_index=-100)
    perplexity = Metric(tokens, outputs=lambda outputs: outputs.transpose(1, 2))
    task = Task(Words(), data, metrics={"perplexity": perplexity})
    task.check()
    params = task.init_params()
    mean = nn.functional.cross_entropy(task.predict(params, x), y)
    assert task.test(params, 7)["perplexity"] == pytest.approx(mean.exp().item())
    assert task.measures == {"perplexity": False, "loss": False}


def test_a_metric_of_the_users_own_with_summed_states_works() -> None:
    class Bias(torchmetrics.Metric):
        higher_is_better = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
            self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, outputs: Tensor, y: Tensor) -> None:
            self.total += (outputs - y).sum()
            self.n += len(y)

        def compute(self) -> Tensor:
            return (self.total / self.n).abs()

    task = task_with(metrics={"bias": Bias()})
    task.check()
    x, y = task.data.test
    params = task.init_params()
    expected = (task.predict(params, x) - y).mean().abs().item()
    assert task.test(params)["bias"] == pytest.approx(expected, abs=1e-6)
    assert task.measures == {"bias": False, "loss": False}


def test_the_users_own_metric_object_stays_as_it_was() -> None:
    mine = MulticlassF1Score(num_classes=CLASSES)
    task = Task(nn.Linear(5, CLASSES), data_of(to_classes), metrics={"f1": mine})
    task.check()
    task.test(task.init_params())
    assert mine.update_count == 0


# What a person sees


def test_the_first_metric_comes_first_in_progress_table_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(experiment("classes"), tmp_path / "r", observer=Terminal())
    f1 = result.final["test_f1"]
    err = capsys.readouterr().err
    assert re.search(rf"round 2/2: .*, test f1 {f1:.4f}, test auc .*accuracy .*%", err)
    show_result(result, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["test", "f1", f"{f1:.4f}"]
    assert [line for line in lines if line.startswith("f1 per client")]
    report = write_report(tmp_path / "r")
    assert titles(report)[0] == "Test f1 by round"
    words = Page(report).words
    assert f"reaches {f1:.4g} test f1 (higher is better)" in words
    assert "Clients differ: on their own examples the mean f1 is" in words


def test_a_name_in_brackets_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(experiment("bracketed", rounds=1), tmp_path / "r", observer=Terminal())
    assert re.search(r"test recall\[red\] 0\.\d{4}", capsys.readouterr().err)
    page = write_report(tmp_path / "r")
    assert "test recall[red] (higher is better)" in Page(page).words


def test_one_speed_is_shown_everywhere_after_a_resume_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    for rounds, how in ((3, {"out": folder}), (5, {"resume": folder})):
        e = experiment("classes", rounds=rounds)
        result = run(e, observer=Terminal(), **how)  # type: ignore[arg-type]
        history = History.read(folder / "metrics.jsonl")
        assert len(history) == rounds
        speed = history.clients_per_second
        reports = sum(row["reports"] for row in history.rows[1:])
        assert speed == reports / sum(row["seconds"] for row in history.rows[1:])
        assert result.clients_per_second == round(speed, 2)
        last_line = capsys.readouterr().err.splitlines()[-1]
        assert f" {rate_text(speed)} clients/s" in last_line
        show_result(result, None)
        out = capsys.readouterr().out
        assert f"{rate_text(speed)} clients/s without evaluation" in out
        words = Page(write_report(folder)).words
        assert f"{rate_text(speed)} clients a second without evaluation" in words
    c = compare([("r", e)], 1, tmp_path / "c")
    stat = c.stat("r", "clients_per_second")
    own = History.read(tmp_path / "c" / "r-seed0" / "metrics.jsonl")
    assert stat is not None
    assert stat.mean == round(own.clients_per_second, 2)


# Advice


ADVICE = [
    ("by_loss", {"method__local_lr": 1e38}, "lower the learning rate .method.local_lr"),
    (
        "unscaled",
        {"rounds": 20, "local__epochs": 9},
        "or scale the inputs, which go up",
    ),
    ("rooted", {}, 'gradient of "weight" is not finite with the initial model'),
    ("logarithmic", {}, "its loss is nan with the initial model, before any training"),
    (
        "by_loss",
        {"defence__clip": 1e38, "defence__noise_multiplier": 1.0},
        r"noise of standard deviation .* = 1e\+38",
    ),
    (
        "by_loss",
        {"links__uplink__snr_db": -200, "rounds": 12},
        "links.uplink: the noise drowns",
    ),
    (
        "by_loss",
        {"links__downlink__snr_db": -200, "rounds": 12},
        "links.downlink: the noise drowns",
    ),
    ("steep", {"method__server_lr": 3e38}, "such as method.server_lr"),
]


@pytest.mark.parametrize(("task", "settings", "advice"), ADVICE)
def test_a_run_without_usable_updates_says_why(
    task: str, settings: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=advice) as caught:
        run(experiment(task, **settings), tmp_path)
    message = str(caught.value)
    assert ("learning rate" in message) == (
        "learning rate" in advice or "scale" in advice
    )
    assert "\n" not in message


def test_a_report_does_not_count_clients_that_it_does_not_know(tmp_path: Path) -> None:
    """The page of a run is made without the user's own code."""
    run(experiment("classes"), tmp_path / "r")
    page = write_report(tmp_path / "r").read_text()
    assert "clients were asked in each of 2 rounds" in page
    assert "of them were asked" not in page
