"""pfl-research with the same model, clients, batches and cohorts: what `benchmarks.engines` compares with.

    python -m benchmarks.pfl_simulation [--rounds 12] [--processes 1 2] [--set key=value ...] [MODEL ...]

Written as pfl's own benchmarks are, with every client's batches in memory as tensors and without evaluation. pfl runs in an
environment of its own (.venv-pfl, made when first asked for), which reads what fedcore wrote: the pickled model, and for every
client of every round its examples in the order in which they are used. With several processes, torchrun starts them and they add
up over gloo; each has one thread. The command prints seconds a round, and how far pfl's parameters are from our `sequential`
engine's after the same rounds: some 1e-8 for dense models. For convolutional ones it grows with the rounds, as rounding does that
turns over a maximum now and then: ResNet-18 in float32 is as far from itself in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedcore import Experiment

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-pfl"
PACKAGES = [
    "pfl[pytorch]==0.6.0",
    "pydantic",
]  # the latter for models that are classes of fedcore's
MODELS = ["logistic", "mlp", "lenet", "cnn"]


def environment() -> Path:
    """The directory of the programs of pfl's environment, made if it is not there; torch is the version that we run."""
    ready = ENVIRONMENT / ".ready"
    if not ready.exists():
        print(
            f"making {ENVIRONMENT} with {PACKAGES[0]} ...", file=sys.stderr, flush=True
        )
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True
        )
        install = [
            str(ENVIRONMENT / "bin" / "pip"),
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        install += ["-c", str(ROOT / "constraints.txt")]
        for packages in (
            ["torch"],
            PACKAGES,
        ):  # torch first: then its CPU build is taken, if one is offered
            subprocess.run([*install, *packages], check=True)
        ready.touch()
    return ENVIRONMENT / "bin"


def prepare(e: Experiment, rounds: int, folder: Path) -> None:
    """Write what pfl needs: model.pt, and work.npz with examples by client and round, one after the other."""
    from fedcore import SettingsError
    from fedcore.rounds.loop import Loop, Quiet

    if (e.local.epochs, e.local.steps) != (1, None):
        raise SettingsError(
            "pfl shuffles a client's examples once a round: compare with local.epochs = 1"
        )
    with TemporaryDirectory() as unused:
        loop = Loop(e, Path(unused), Quiet(), None, False)
        work, method = loop.engine.work, loop.method  # type: ignore[attr-defined]
        x, y, sizes, cohort = [], [], [], np.empty(0)
        for t in range(rounds):
            cohort = loop.process.sample(t, {})[0].numpy()
            # pfl deals users out to its processes in turn: by size, each gets as much work.
            for client in cohort[
                np.argsort(-loop.task.data.num_examples(cohort, "train"), kind="stable")
            ].tolist():
                batches = work.batches(method.train, [client], t)  # type: ignore[attr-defined]
                real = batches.mask > 0
                x.append(batches.x[real].numpy())
                y.append(batches.y[real].numpy())
                sizes.append(len(y[-1]))
        if len(sizes) != rounds * len(cohort):
            raise SettingsError(
                "pfl's cohorts are of one size: compare with participation.name = uniform"
            )
        loop.close()
    np.savez(folder / "work.npz", x=np.concatenate(x), y=np.concatenate(y), sizes=sizes)
    model = copy.deepcopy(loop.task.model).train()
    model.load_state_dict(loop.task.init_params(), strict=False)
    torch.save(model, folder / "model.pt")
    s: Any = e.method
    settings = {
        "rounds": rounds,
        "cohort": len(cohort),
        "local_lr": s.local_lr,
        "server_lr": s.server_lr,
        "batch_size": e.local.batch_size,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def pfl(
    e: Experiment, rounds: int, folder: Path, processes: int, threads: int = 1
) -> list[float]:
    """Seconds of each round of FedAvg with pfl, in so many processes of so many threads; the first warms up.

    `folder` has what it reads and what it writes: params.pt, the parameters after the last round.
    """
    if not (folder / "settings.json").exists():
        prepare(e, rounds, folder)
    cohort = json.loads((folder / "settings.json").read_text())["cohort"]
    if cohort % processes:
        raise SystemExit(
            f"a cohort of {cohort} in {processes} processes: pfl's would no longer agree on who is next"
        )
    program = [str(environment() / "python"), "-m"]
    if processes > 1:
        program += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "-m",
        ]
    command = [*program, "benchmarks.pfl_simulation", "--folder", str(folder)]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "PFL_PYTORCH_DEVICE": "cpu",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=ROOT, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if done.returncode or not lines:
        raise SystemExit(f"pfl failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seconds: list[float] = json.loads(lines[-1].removeprefix("SECONDS "))
    return seconds


def simulate(folder: Path) -> None:
    """In pfl's environment, once a process."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.internal.ops.pytorch_ops import distributed
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    s = json.loads((folder / "settings.json").read_text())
    work = np.load(folder / "work.npz")
    x, y, sizes = (
        torch.from_numpy(work["x"]),
        torch.from_numpy(work["y"]),
        work["sizes"].tolist(),
    )
    rounds, cohort = s["rounds"], s["cohort"]
    # A user is a client in a round, whose batches no other round has; they come in this order.
    users = {
        i: Dataset(data, user_id=str(i))
        for i, data in enumerate(zip(x.split(sizes), y.split(sizes), strict=True))
    }

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.model(x), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {}  # pfl evaluates users in its first round, whatever the frequency

    class Clock(TrainingProcessCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *, model: Any) -> Any:
            self.times.append(time.perf_counter())
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            self.times.append(time.perf_counter())
            return False, Metrics()

    net = WithLoss(torch.load(folder / "model.pt", weights_only=False))
    model = PyTorchModel(
        net, torch.optim.SGD, torch.optim.SGD(net.parameters(), s["server_lr"])
    )
    # Told how large users are, pfl would deal them out itself, in a process of its own that first draws 10 000 of them.
    data = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=s["local_lr"],
            local_num_epochs=1,
            local_batch_size=s["batch_size"],
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if distributed.global_rank == 0:
        torch.save(
            {name: p.detach() for name, p in net.model.named_parameters()},
            folder / "params.pt",
        )
        print("SECONDS", json.dumps(np.diff(clock.times).round(4).tolist()), flush=True)
    if distributed.world_size > 1:
        os._exit(
            0
        )  # everything is written; an orderly end sometimes aborts in gloo's threads


def ours(e: Experiment, rounds: int) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of each round of our `sequential` engine, and its parameters after the last."""
    from fedcore import Experiment
    from fedcore.rounds.loop import Loop, Quiet

    with TemporaryDirectory() as unused:
        loop = Loop(
            Experiment.parse(e.model_dump(mode="json"), ["engine.name=sequential"]),
            Path(unused),
            Quiet(),
            None,
            False,
        )
        seconds = [float(loop.round()["seconds"]) for _ in range(rounds)]
        loop.close()
    return seconds, loop.state.server.params


def main() -> None:
    from fedcore import Experiment

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        simulate(arguments.folder)
        return
    rounds = arguments.rounds
    print(
        f"{'':<10}{'processes':>10}{'s a round':>11}{'first':>8}{'min':>8}{'max':>8}{'away from sequential':>22}"
    )
    for name in arguments.models:
        settings = [
            f"model.name={name}",
            "evaluation.every=100000",
            f"rounds={rounds + 1}",
            *arguments.settings,
        ]
        e = Experiment.load(ROOT / "benchmarks" / "fashion.toml", settings)
        _, params = ours(e, rounds)
        with TemporaryDirectory() as folder:
            for processes in arguments.processes:
                first, *seconds = pfl(e, rounds, Path(folder), processes)
                theirs = torch.load(Path(folder) / "params.pt")
                away = max(
                    (theirs[key] - params[key]).abs().max().item() for key in params
                )
                median = statistics.median(seconds)
                print(
                    f"{name:<10}{processes:>10}{median:>11.3f}{first:>8.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{away:>22.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
