"""Personalised methods: accuracy of single clients whose data differ.

python -m benchmarks.personal methods
    local, FedAvg, fine-tuning, Ditto, pFedMe, FedPer, FedRep, FedSim, FedAlt, ...
python -m benchmarks.personal parts
    FedSim and FedAlt by part of a ViT, and fine-tuning (after Pillutla et al.)
python -m benchmarks.personal plugins
    FedPerfix's prefixes against personal attention (after Sun et al.)
python -m benchmarks.personal pfedpara
    pFedPara, FedPer, FedAvg, local on digits: two classes, Dirichlet, little data

`methods`: Fashion-MNIST, 100 clients with three classes each (pathological), 6 000
training images, a quarter of each client's held out; 10 clients a round, 200 rounds of
one local epoch, batch 10. The same MLP 784-64-10 for all but FedPerfix, whose tiny ViT
has FedAvg and FedPer beside it. Means over clients, mean and standard deviation over
seeds. Options: --out DIR (runs there are read, or gone on with), --seeds N.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from benchmarks.tables import mean_and_std, print_table
from fedcore import Experiment
from fedcore.data import sources
from fedcore.data.federated import Examples, FederatedData
from fedcore.rng import rng
from fedcore.storage.memory import size_text
from fedcore.task import Task
from fedcore.views.compare import compare
from fedcore.views.comparison import Run
from fedcore.views.terminal import Terminal

Values = dict[str, Any]

MLP: Values = {"name": "mlp", "hidden": [64]}
VIT: Values = {"name": "vit", "patch": 7}
PREFIX: Values = {"form": "additive", "bottleneck": 24, "scale": 1.0}
PFEDPARA: Values = {"lowrank": {"form": "pfedpara", "gamma": 0.5}}


def some_images(settings: Experiment) -> Task:
    """`options.rows` random training images of `options.source`, spread by partition.

    That is `settings.partition`.
    """
    seed, count = settings.seed, settings.options["rows"]
    source = sources.load(settings.options["source"], settings.data_folder)
    rows = rng(seed, "rows").permutation(len(source.y_train))[:count]
    assert settings.population is not None
    labels = source.y_train.numpy()[rows]
    part = settings.partition.split(labels, None, settings.population, seed)
    train = Examples(source.x_train, source.y_train)
    test = Examples(source.x_test, source.y_test)
    order, holdout = rows[part.order], settings.holdout
    data = FederatedData(train, test, order, part.offsets, holdout, seed)
    shape = tuple(source.x_train.shape[1:])
    return Task(settings.model.build(shape, source.num_classes), data)


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


def fedsim(personal: list[str], local_lr: float = 0.05) -> Values:
    return {"name": "fedsim", "personal": personal, "local_lr": local_lr}


def finetune(
    epochs: int, lr: float, parts: Sequence[str] = ("all",), penalty: float = 0.0
) -> Values:
    settings = {"epochs": epochs, "lr": lr, "parts": list(parts), "penalty": penalty}
    return {"finetune": settings}


def measured(runs: Sequence[Run], kind: str, part: str) -> str:
    """Mean and standard deviation over seeds of a number at the end, in percent.

    "-" where there is none.
    """
    values = []
    for run in runs:
        last = run.history.rows[-1]
        if f"{kind}_accuracy" in last:
            values.append(100 * last[f"{kind}_accuracy"][part])
    return mean_and_std(values) if values else "-"


def by_client(runs: Sequence[Run]) -> list[str]:
    """Mean, standard deviation and worst tenth over clients."""
    kinds = ("mean", "std", "worst_tenth")
    return [measured(runs, "client", part) for part in kinds]


def of_clients(run: Run, function: str) -> np.ndarray:
    """Accuracy of every client at the last measurement, by client."""
    file, wanted = run.folder / "clients.parquet", [("function", "==", function)]
    rows = pq.read_table(file, filters=wanted).to_pandas()
    last = rows[rows["round"] == rows["round"].max()].sort_values("client")
    return np.asarray(last["accuracy"])


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
    tune, tune_head = finetune(5, 0.05), finetune(5, 0.05, ["output"])
    fedpara: Values = {"lowrank": {"form": "fedpara", "gamma": 0.5}}
    prefixed = VIT | {"prefix": PREFIX}
    fedavg = {"name": "fedavg"}
    fedalt = {"name": "fedalt", "personal": ["output"]}
    fedrep, fedbabu = fedalt | {"personal_passes": 10}, fedalt | {"personal_passes": 0}
    pfedme = {"name": "pfedme", "lam": 15.0, "personal_lr": 0.05}
    cases: dict[str, tuple[Values, Values, Values]] = {
        "local": (fedsim(["all"]), MLP, {}),
        "FedAvg": (fedavg, MLP, tune),
        "Ditto, lambda 0.1": ({"name": "ditto", "lam": 0.1}, MLP, {}),
        "Ditto, lambda 1": ({"name": "ditto", "lam": 1.0}, MLP, {}),
        "pFedMe": (pfedme, MLP, {}),
        "FedPer = FedSim, output": (fedsim(["output"]), MLP, tune_head),
        "FedAlt, output": (fedalt, MLP, tune_head),
        "FedRep": (fedrep, MLP, tune_head),
        "FedBABU": (fedbabu, MLP, tune),
        "LG-FedAvg = FedSim, body": (fedsim(["body"]), MLP, {}),
        "FedAvg, FedPara": (fedavg, MLP, fedpara | tune),
        "pFedPara": (fedsim(["factors"]), MLP, PFEDPARA),
        "FedAvg, ViT": (fedavg, VIT, tune),
        "FedPer, ViT": (fedsim(["output"]), VIT, tune_head),
        "FedPerfix, ViT": (fedsim(["prefix", "output"]), prefixed, {}),
    }
    experiments = []
    for label, (method, model, more) in cases.items():
        settings = experiment({"local_lr": 0.05, **method}, model, base, **more)
        experiments.append((label, settings))
    rows = []
    for label, runs in compare(experiments, seeds, out, Terminal()).runs.items():
        tuned = measured(runs, "finetuned", "mean")
        rows.append([label, *by_client(runs), tuned, sent(runs)])
    head = ["", "mean over clients, %", "std over clients", "worst tenth"]
    print_table([*head, "mean after fine-tuning", "sent"], rows)


KINDS = ("output", "input", "adapter")
PARTS_BASE: Values = {
    "population": 20,
    "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 40},
    "participation": {"name": "uniform", "cohort": 10},
    "local": {"batch_size": 32, "epochs": 1},
}
PARTS_MODEL = VIT | {"adapter": 8}


class Line(NamedTuple):
    """A line of the table of `parts`, by seed; nan where there is nothing to say."""

    before: list[float]  # pooled accuracy before fine-tuning
    after: list[float]
    hurt: list[int]  # clients whose accuracy is less than with full fine-tuning


def first_stage(out: Path, seed: int) -> Path:
    """The run directory of the FedAvg that the second stages start from."""
    local = {"local": {"batch_size": 32, "epochs": 2}}
    fedavg = {"name": "fedavg", "local_lr": 0.05}
    settings = experiment(fedavg, PARTS_MODEL, PARTS_BASE | local, rounds=25, seed=seed)
    runs = compare([("first", settings)], 1, out / "first", Terminal()).runs["first"]
    return runs[0].folder


def second_stages(start: Path, seed: int) -> list[tuple[str, Experiment]]:
    """Fine-tuning of the model in `start`, and FedSim and FedAlt on from it."""
    tunings = {"full": finetune(9, 0.02), "Ditto": finetune(9, 0.02, penalty=0.1)}
    tunings |= {kind: finetune(9, 0.02, [kind]) for kind in KINDS}
    frozen = fedsim([], local_lr=1e-9)  # the model of the first stage, as it is
    common: Values = {"initial": start, "seed": seed}
    stages = []
    for label, tuning in tunings.items():
        more = {"rounds": 1, **common, **tuning}
        settings = experiment(frozen, PARTS_MODEL, PARTS_BASE, **more)
        stages.append((f"fine-tuning, {label}", settings))
    for kind in KINDS:
        more = {"rounds": 12, **common, **finetune(3, 0.02, [kind])}
        for name, epochs in (("fedsim", 1), ("fedsim", 2), ("fedalt", 1)):
            method = fedsim([kind], local_lr=0.02) | {"name": name}
            base = PARTS_BASE | {"local": {"batch_size": 32, "epochs": epochs}}
            settings = experiment(method, PARTS_MODEL, base, **more)
            suffix = ", 2 epochs" if epochs == 2 else ""
            stages.append((f"{name}, {kind}{suffix}", settings))
    return stages


def parts(out: Path, seeds: int) -> None:
    full = "fine-tuning, full"
    lines = {"not personalised": Line([], [], [])}
    for seed in range(seeds):  # each second stage starts from the first of its own seed
        stages = second_stages(first_stage(out, seed), seed)
        results = compare(stages, 1, out / f"second-{seed}", Terminal()).runs
        reference = of_clients(results[full][0], "evaluate")
        for label, (run,) in results.items():
            last = run.history.rows[-1]
            before = last["client_accuracy"]["pooled"]
            if label == full:
                lines["not personalised"].before.append(before)
            line = lines.setdefault(label, Line([], [], []))
            line.before.append(math.nan if label.startswith("fine") else before)
            line.after.append(last["finetuned_accuracy"]["pooled"])
            hurt = of_clients(run, "finetune") < reference
            line.hurt.append(int(hurt.sum()))

    def cell(values: list[float]) -> str:
        known = [f"{100 * v:.1f}" for v in values if not math.isnan(v)]
        return " / ".join(known) or "-"

    rows = []
    for label, line in lines.items():
        hurt_by_seed = " / ".join(map(str, line.hurt)) or "-"
        rows.append([label, cell(line.before), cell(line.after), hurt_by_seed])
    title = "weighted mean over clients, %, by seed"
    print_table([title, "before fine-tuning", "after", "clients hurt, of 20"], rows)


def plugins(out: Path, seeds: int) -> None:
    base: Values = {
        "population": 20,
        "rounds": 25,
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_size": 40},
        "participation": {"name": "uniform", "cohort": 10},
        "local": {"batch_size": 32, "epochs": 2},
    }
    personal = {
        "FedAvg": [],
        "local": ["all"],
        "norm": ["norm"],
        "attention": ["attention"],
        "mlp": ["mlp"],
        "output (FedPer)": ["output"],
        "attention, output": ["attention", "output"],
    }
    prefixes = {
        "FedPerfix": PREFIX,
        "FedPerfix, zero_up": PREFIX | {"start": "zero_up"},
        "linear prefix, zero_up": PREFIX | {"form": "linear", "start": "zero_up"},
        "concatenated prefix": PREFIX | {"form": "concat", "bottleneck": 4},
    }
    experiments = []
    for label, names in personal.items():
        experiments.append((label, experiment(fedsim(names), VIT, base)))
    for label, prefix in prefixes.items():
        method, model = fedsim(["prefix", "output"]), VIT | {"prefix": prefix}
        experiments.append((label, experiment(method, model, base)))
    rows = []
    for label, runs in compare(experiments, seeds, out, Terminal()).runs.items():
        rows.append([label, *by_client(runs), sent(runs)])
    head = ["personal", "mean over clients, %", "std over clients", "worst tenth"]
    print_table([*head, "sent"], rows)


class Scenario(NamedTuple):
    """Clients and their data in the comparison `pfedpara`."""

    partition: Values
    rows: int  # training images


SCENARIOS = {
    "two classes a client": Scenario({"name": "pathological", "classes": 2}, 1437),
    "Dirichlet 0.5": Scenario(
        {"name": "dirichlet", "alpha": 0.5, "min_size": 10}, 1437
    ),
    "Dirichlet 0.5, 20 % of the data": Scenario(
        {"name": "dirichlet", "alpha": 0.5, "min_size": 5}, 290
    ),
}


def pfedpara(out: Path, seeds: int) -> None:
    cases: dict[str, tuple[list[str], Values]] = {
        "local": (["all"], {}),
        "FedAvg": ([], {}),
        "FedPer": (["output"], {}),
        "pFedPara": (["factors"], PFEDPARA),
    }
    rows = {label: [label] for label in cases}
    traffic: dict[str, str] = {}
    for number, scenario in enumerate(SCENARIOS.values()):
        base: Values = {
            "population": 10,
            "rounds": 30,
            "options": {"source": "digits", "rows": scenario.rows},
            "partition": scenario.partition,
            "local": {"batch_size": 10, "epochs": 5},
        }
        experiments = []
        for label, (names, more) in cases.items():
            experiments.append((label, experiment(fedsim(names), MLP, base, **more)))
        results = compare(experiments, seeds, out / str(number), Terminal()).runs
        for label, runs in results.items():
            rows[label].append(measured(runs, "client", "mean"))
            traffic[label] = sent(runs)  # of the last scenario in the end
    lines = [[*cells, traffic[label]] for label, cells in rows.items()]
    print_table(["mean over clients, %", *SCENARIOS, "sent"], lines)


def main() -> None:
    studies: dict[str, Callable[[Path, int], None]] = {
        "methods": methods,
        "parts": parts,
        "plugins": plugins,
        "pfedpara": pfedpara,
    }
    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("study", choices=studies)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    study = arguments.study
    out = arguments.out or Path("runs") / "personal" / study
    studies[study](out, arguments.seeds or (5 if study == "pfedpara" else 3))


if __name__ == "__main__":
    main()
