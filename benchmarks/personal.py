"""Personalised methods on Fashion-MNIST: 100 clients with three classes each (pathological), accuracy of single clients.

    python -m benchmarks.personal methods      local, FedAvg, fine-tuning, Ditto, pFedMe, FedPer, FedRep, FedSim, FedAlt, ...
    python -m benchmarks.personal parts        FedSim and FedAlt by part of a ViT, and fine-tuning (after Pillutla et al.)
    python -m benchmarks.personal plugins      FedPerfix's prefixes against personal attention (after Sun et al.)
    python -m benchmarks.personal pfedpara     pFedPara, FedPer, FedAvg, local on digits: two classes, Dirichlet, little data

`methods`: 6 000 training images, a quarter of each client's held out; 10 clients a round, 200 rounds of one local epoch, batch
10. The same MLP 784-64-10 for all but FedPerfix, whose tiny ViT has FedAvg and FedPer beside it. Means over clients, mean and
standard deviation over seeds. Options: --out DIR (runs there are read, or gone on with), --seeds N.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fedcore import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.rng import rng
from fedcore.storage.memory import size_text
from fedcore.task import Task
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

MLP = {"name": "mlp", "hidden": [64]}
VIT = {"name": "vit", "patch": 7}
PREFIX = {"form": "additive", "bottleneck": 24, "scale": 1.0}
Values = dict[str, Any]


def some_images(e: Experiment) -> Task:
    """`options.rows` training images of `options.source`, at random, spread by `e.partition`."""
    source = sources.load(e.options["source"], e.data_folder)
    rows = rng(e.seed, "rows").permutation(len(source.y_train))[: e.options["rows"]]
    assert e.population is not None
    part = e.partition.split(source.y_train.numpy()[rows], None, e.population, e.seed)
    train, test = (
        Examples(source.x_train, source.y_train),
        Examples(source.x_test, source.y_test),
    )
    data = FederatedData(train, test, rows[part.order], part.offsets, e.holdout, e.seed)
    return Task(
        e.model.build(tuple(source.x_train.shape[1:]), source.num_classes), data
    )


def experiment(method: Values, model: Values, base: Values, **more: Any) -> Experiment:
    values: Values = {
        "task": "benchmarks.personal:some_images",
        "options": {"source": "fashion-mnist", "rows": 6000},
        "holdout": 0.25,
        "evaluation": {"every": 10**6},
        "method": method,
        "model": model,
    }
    return Experiment.parse(values | base | more)


def measured(runs: Sequence[Run], kind: str, part: str) -> str:
    """Mean and standard deviation over seeds of a number at the end, in percent; - where there is none."""
    found = [
        run.history.rows[-1][f"{kind}_accuracy"][part]
        for run in runs
        if f"{kind}_accuracy" in run.history.rows[-1]
    ]
    if not found:
        return "-"
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{100 * statistics.fmean(found):.1f} ± {100 * spread:.1f}"


def of_clients(run: Run, function: str) -> np.ndarray:
    """Accuracy of every client at the last measurement, by client."""
    rows = pq.read_table(
        run.folder / "clients.parquet", filters=[("function", "==", function)]
    ).to_pandas()
    last = rows[rows["round"] == rows["round"].max()].sort_values("client")
    return np.asarray(last["accuracy"])


def table(head: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def sent(runs: Sequence[Run]) -> str:
    return size_text(statistics.fmean(run.values()["bytes"] or 0.0 for run in runs))


def methods(out: Path, seeds: int) -> None:
    base: Values = {
        "population": 100,
        "rounds": 200,
        "partition": {"name": "pathological", "classes": 3},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"batch_size": 10},
    }
    lr: Values = {"local_lr": 0.05}
    tune: Values = {"finetune": {"epochs": 5, "lr": 0.05}}
    tune_head: Values = {"finetune": {"epochs": 5, "lr": 0.05, "parts": ["output"]}}
    head: Values = {"personal": ["output"]}
    cases: dict[str, tuple[Values, Values, Values]] = {
        "local": ({"name": "fedsim", "personal": ["all"]}, MLP, {}),
        "FedAvg": ({"name": "fedavg"}, MLP, tune),
        "Ditto, lambda 0.1": ({"name": "ditto", "lam": 0.1}, MLP, {}),
        "Ditto, lambda 1": ({"name": "ditto", "lam": 1.0}, MLP, {}),
        "pFedMe": ({"name": "pfedme", "lam": 15.0, "personal_lr": 0.05}, MLP, {}),
        "FedPer = FedSim, output": ({"name": "fedsim", **head}, MLP, tune_head),
        "FedAlt, output": ({"name": "fedalt", **head}, MLP, tune_head),
        "FedRep": ({"name": "fedalt", **head, "personal_passes": 10}, MLP, tune_head),
        "FedBABU": ({"name": "fedalt", **head, "personal_passes": 0}, MLP, tune),
        "LG-FedAvg = FedSim, body": ({"name": "fedsim", "personal": ["body"]}, MLP, {}),
        "FedAvg, FedPara": (
            {"name": "fedavg"},
            MLP,
            {"lowrank": {"form": "fedpara", "gamma": 0.5}, **tune},
        ),
        "pFedPara": (
            {"name": "fedsim", "personal": ["factors"]},
            MLP,
            {"lowrank": {"form": "pfedpara", "gamma": 0.5}},
        ),
        "FedAvg, ViT": ({"name": "fedavg"}, VIT, tune),
        "FedPer, ViT": ({"name": "fedsim", **head}, VIT, tune_head),
        "FedPerfix, ViT": (
            {"name": "fedsim", "personal": ["prefix", "output"]},
            VIT | {"prefix": PREFIX},
            {},
        ),
    }
    experiments = [
        (label, experiment({**lr, **m}, model, base, **more))
        for label, (m, model, more) in cases.items()
    ]
    found = compare(experiments, seeds, out, Terminal()).runs
    rows = []
    for label, runs in found.items():
        cells = [
            measured(runs, "client", part) for part in ("mean", "std", "lowest_tenth")
        ]
        rows.append([label, *cells, measured(runs, "finetuned", "mean"), sent(runs)])
    table(
        [
            "",
            "mean over clients, %",
            "std over clients",
            "worst tenth",
            "mean after fine-tuning",
            "sent",
        ],
        rows,
    )


def parts(out: Path, seeds: int) -> None:
    spread: Values = {
        "population": 20,
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 40},
    }
    base: Values = {
        **spread,
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"batch_size": 32, "epochs": 1},
    }
    model = VIT | {"adapter": 8}

    def tuned(parts: list[str], epochs: int, penalty: float = 0.0) -> Values:
        return {
            "finetune": {
                "epochs": epochs,
                "lr": 0.02,
                "parts": parts,
                "penalty": penalty,
            }
        }

    local: Values = {"local": {"batch_size": 32, "epochs": 2}}
    first = experiment(
        {"name": "fedavg", "local_lr": 0.05}, model, base | local, rounds=25
    )
    kinds = {"output": ["output"], "input": ["input"], "adapter": ["adapter"]}
    rows: dict[str, list[tuple[float | None, float]]] = {}
    hurt: dict[str, list[int]] = {}
    for seed in range(seeds):  # each second stage starts from the first of its own seed
        start = (
            compare(
                [("first", first.model_copy(update={"seed": seed}))],
                1,
                out / "first",
                Terminal(),
            )
            .runs["first"][0]
            .folder
        )
        after: list[tuple[str, Experiment]] = []
        for label, how in (
            ("full", tuned(["all"], 9)),
            ("Ditto", tuned(["all"], 9, 0.1)),
            *((k, tuned(p, 9)) for k, p in kinds.items()),
        ):
            frozen: Values = {
                "name": "fedsim",
                "personal": [],
                "local_lr": 1e-9,
            }  # the model of the first stage, as it is
            after.append(
                (
                    f"fine-tuning, {label}",
                    experiment(
                        frozen, model, base, rounds=1, initial=start, seed=seed, **how
                    ),
                )
            )
        for kind, personal in kinds.items():
            for name, epochs in (("fedsim", 1), ("fedsim", 2), ("fedalt", 1)):
                settings: Values = {
                    "name": name,
                    "personal": personal,
                    "local_lr": 0.02,
                }
                own = base | {"local": {"batch_size": 32, "epochs": epochs}}
                e = experiment(
                    settings,
                    model,
                    own,
                    rounds=12,
                    initial=start,
                    seed=seed,
                    **tuned(personal, 3),
                )
                after.append(
                    (f"{name}, {kind}" + (", 2 epochs" if epochs == 2 else ""), e)
                )
        found = compare(after, 1, out / f"second-{seed}", Terminal()).runs
        plain = of_clients(found["fine-tuning, full"][0], "evaluate")
        for label, runs in found.items():
            last = runs[0].history.rows[-1]
            hurt.setdefault(label, []).append(
                int((of_clients(runs[0], "finetune") < plain).sum())
            )
            before = (
                None if label.startswith("fine") else last["client_accuracy"]["pooled"]
            )
            rows.setdefault("not personalised", [])
            if label == "fine-tuning, full":
                rows["not personalised"].append(
                    (last["client_accuracy"]["pooled"], float("nan"))
                )
            rows.setdefault(label, []).append(
                (before, last["finetuned_accuracy"]["pooled"])
            )

    def cell(values: list[float | None]) -> str:
        real = [100 * v for v in values if v is not None and v == v]
        return " / ".join(f"{v:.1f}" for v in real) or "-"

    head = [
        "weighted mean over clients, %, by seed",
        "before fine-tuning",
        "after",
        "clients hurt, of 20",
    ]
    lines = []
    for label, pairs in rows.items():
        worse = " / ".join(map(str, hurt.get(label, []))) or "-"
        lines.append(
            [label, cell([b for b, _ in pairs]), cell([a for _, a in pairs]), worse]
        )
    table(head, lines)


def plugins(out: Path, seeds: int) -> None:
    base: Values = {
        "population": 20,
        "rounds": 25,
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 40},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"batch_size": 32, "epochs": 2},
    }
    fedsim: dict[str, list[str]] = {
        "FedAvg": [],
        "local": ["all"],
        "norm": ["norm"],
        "attention": ["attention"],
        "mlp": ["mlp"],
        "output (FedPer)": ["output"],
        "attention, output": ["attention", "output"],
    }
    own = ["prefix", "output"]
    experiments = [
        (
            label,
            experiment({"name": "fedsim", "personal": p, "local_lr": 0.05}, VIT, base),
        )
        for label, p in fedsim.items()
    ]
    for label, prefix in (
        ("FedPerfix", PREFIX),
        ("FedPerfix, zero_up", PREFIX | {"start": "zero_up"}),
        ("linear prefix, zero_up", PREFIX | {"form": "linear", "start": "zero_up"}),
        ("concatenated prefix", PREFIX | {"form": "concat", "bottleneck": 4}),
    ):
        method: Values = {"name": "fedsim", "personal": own, "local_lr": 0.05}
        experiments.append((label, experiment(method, VIT | {"prefix": prefix}, base)))
    found = compare(experiments, seeds, out, Terminal()).runs
    head = [
        "personal",
        "mean over clients, %",
        "std over clients",
        "worst tenth",
        "sent",
    ]
    cells = {
        label: [
            measured(runs, "client", part) for part in ("mean", "std", "lowest_tenth")
        ]
        for label, runs in found.items()
    }
    table(head, [[label, *cells[label], sent(runs)] for label, runs in found.items()])


def pfedpara(out: Path, seeds: int) -> None:
    model: Values = {"name": "mlp", "hidden": [64]}
    cases: dict[str, tuple[list[str], Values]] = {
        "local": (["all"], {}),
        "FedAvg": ([], {}),
        "FedPer": (["output"], {}),
        "pFedPara": (["factors"], {"lowrank": {"form": "pfedpara", "gamma": 0.5}}),
    }
    scenarios: dict[str, Values] = {
        "two classes a client": {
            "partition": {"name": "pathological", "classes": 2},
            "rows": 1437,
        },
        "Dirichlet 0.5": {
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 10},
            "rows": 1437,
        },
        "Dirichlet 0.5, 20 % of the data": {
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_size": 5},
            "rows": 290,
        },
    }
    rows: dict[str, list[str]] = {label: [] for label in cases}
    for number, (scenario, given) in enumerate(scenarios.items()):
        base: Values = {
            "population": 10,
            "rounds": 30,
            "options": {"source": "digits", "rows": given["rows"]},
            "partition": given["partition"],
            "local": {"batch_size": 10, "epochs": 5},
        }
        experiments = [
            (
                label,
                experiment(
                    {"name": "fedsim", "personal": p, "local_lr": 0.05},
                    model,
                    base,
                    **more,
                ),
            )
            for label, (p, more) in cases.items()
        ]
        for label, runs in compare(
            experiments, seeds, out / str(number), Terminal()
        ).runs.items():
            rows[label].append(measured(runs, "client", "mean"))
            if scenario == list(scenarios)[-1]:
                rows[label].append(sent(runs))
    table(
        ["mean over clients, %", *scenarios, "sent"],
        [[label, *cells] for label, cells in rows.items()],
    )


def main() -> None:
    studies: dict[str, Callable[[Path, int], None]] = {
        "methods": methods,
        "parts": parts,
        "plugins": plugins,
        "pfedpara": pfedpara,
    }
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    a = parser.parse_args()
    studies[a.study](
        a.out or Path("runs") / "personal" / a.study,
        a.seeds or (5 if a.study == "pfedpara" else 3),
    )


if __name__ == "__main__":
    main()
