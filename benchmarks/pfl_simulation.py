"""pfl-research with the same model, clients, batches and cohorts as fedcore.

python -m benchmarks.pfl_simulation [MODEL ...]
    Options: --rounds 12, --processes 1 2, --set key=value ...

`benchmarks.engines` compares with it. Written as pfl's own benchmarks are, with every
client's batches in memory as tensors and without evaluation. pfl runs in an environment
of its own (.venv-pfl, made when first asked for), which reads what fedcore wrote: the
pickled model, and for every client of every round its examples in the order of their
use. With several processes, torchrun starts them and they add up over gloo; each has
one thread.

The command prints seconds a round, and the distance of pfl's parameters from those of
fedcore's `sequential` engine after the same rounds: some 1e-8 for dense models. For
convolutional ones it grows with the rounds, as rounding turns over a maximum now and
then: ResNet-18 in float32 is as far from itself in float64.
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
    from fedcore.rounds.loop import Loop

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-pfl"
# pydantic is there for models that are classes of fedcore's.
PACKAGES = ["pfl[pytorch]==0.6.0", "pydantic"]
MODELS = ["logistic", "mlp", "lenet", "cnn"]


def environment() -> Path:
    """The directory of the programs of pfl's environment, made if it is not there.

    Its torch is the version that fedcore runs on.
    """
    programs, ready = ENVIRONMENT / "bin", ENVIRONMENT / ".ready"
    if ready.exists():
        return programs
    print(f"making {ENVIRONMENT} with {PACKAGES[0]} ...", file=sys.stderr, flush=True)
    make = [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)]
    subprocess.run(make, check=True)
    pip = [str(programs / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    pip += ["-c", str(ROOT / "constraints.txt")]
    # torch first: then its CPU build is taken, if one is offered.
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)
    ready.touch()
    return programs


def prepare(settings: Experiment, rounds: int, folder: Path) -> None:
    """Write the files that pfl reads.

    model.pt; work.npz with examples by client and round, one after the other; and
    settings.json.
    """
    from fedcore import SettingsError
    from fedcore.rounds.loop import Loop, Quiet

    if (settings.local.epochs, settings.local.steps) != (1, None):
        raise SettingsError(
            "pfl shuffles a client's examples once a round: compare with "
            "local.epochs = 1"
        )
    with TemporaryDirectory() as unused:
        loop = Loop(settings, Path(unused), Quiet(), None, False)
        cohort = _write_work(loop, rounds, folder / "work.npz")
        loop.close()
    model = copy.deepcopy(loop.task.model).train()
    model.load_state_dict(loop.task.init_params(), strict=False)
    torch.save(model, folder / "model.pt")
    method: Any = settings.method
    values = {
        "rounds": rounds,
        "cohort": cohort,
        "local_lr": method.local_lr,
        "server_lr": method.server_lr,
        "batch_size": settings.local.batch_size,
    }
    (folder / "settings.json").write_text(json.dumps(values))


def _write_work(loop: Loop, rounds: int, file: Path) -> int:
    """Write the examples of all clients and rounds; the size of a cohort."""
    from fedcore import SettingsError
    from fedcore.types import Batches

    work = loop.engine.work  # type: ignore[attr-defined]
    train = loop.method.train  # type: ignore[attr-defined]
    x, y, sizes, cohort = [], [], [], np.empty(0)
    for t in range(rounds):
        cohort = loop.process.sample(t, {})[0].numpy()
        # pfl deals users out to its processes in turn: by size, each gets as much work.
        num_examples = loop.task.data.num_examples(cohort, "train")
        order = np.argsort(-num_examples, kind="stable")
        for client in cohort[order].tolist():
            batches = work.batches(train, [client], t)
            assert isinstance(batches, Batches)
            real = batches.mask > 0
            x.append(batches.x[real].numpy())
            y.append(batches.y[real].numpy())
            sizes.append(len(y[-1]))
    if len(sizes) != rounds * len(cohort):
        raise SettingsError(
            "pfl's cohorts are of one size: compare with participation.name = uniform"
        )
    np.savez(file, x=np.concatenate(x), y=np.concatenate(y), sizes=sizes)
    return len(cohort)


def pfl(
    settings: Experiment, rounds: int, folder: Path, processes: int, threads: int = 1
) -> list[float]:
    """Seconds of each round of FedAvg with pfl; the first warms up.

    In so many processes of so many threads. `folder` has what pfl reads and what it
    writes: params.pt, the parameters after the last round.
    """
    file = folder / "settings.json"
    if not file.exists():
        prepare(settings, rounds, folder)
    cohort = json.loads(file.read_text())["cohort"]
    if cohort % processes:
        raise SystemExit(
            f"a cohort of {cohort} in {processes} processes: pfl's would no longer "
            "agree on who is next"
        )
    command = [str(environment() / "python"), "-m"]
    if processes > 1:
        launch = ["--standalone", f"--nproc_per_node={processes}", "-m"]
        command += ["torch.distributed.run", *launch]
    command += ["benchmarks.pfl_simulation", "--folder", str(folder)]
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


class WithLoss(nn.Module):
    """A model as pfl expects it, with its loss and metrics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {}  # pfl evaluates users in its first round, whatever the frequency


def simulate(folder: Path) -> None:
    """Train in pfl's environment, once a process."""
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

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
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

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = json.loads((folder / "settings.json").read_text())
    work = np.load(folder / "work.npz")
    sizes = work["sizes"].tolist()
    x = torch.split(torch.from_numpy(work["x"]), sizes)
    y = torch.split(torch.from_numpy(work["y"]), sizes)
    # A user is a client in a round, whose batches no other round has; they come in
    # this order.
    users = {}
    for i, examples in enumerate(zip(x, y, strict=True)):
        users[i] = Dataset(examples, user_id=str(i))
    net = WithLoss(torch.load(folder / "model.pt", weights_only=False))
    central = torch.optim.SGD(net.parameters(), settings["server_lr"])
    # Told how large users are, pfl would deal them out itself, in a process of its own
    # that first draws 10 000 of them.
    data = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users)))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=settings["rounds"],
            evaluation_frequency=settings["rounds"] + 1,
            train_cohort_size=settings["cohort"],
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
        ),
        model=PyTorchModel(net, torch.optim.SGD, central),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=settings["local_lr"],
            local_num_epochs=1,
            local_batch_size=settings["batch_size"],
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if distributed.global_rank == 0:
        params = {name: p.detach() for name, p in net.model.named_parameters()}
        torch.save(params, folder / "params.pt")
        print("SECONDS", json.dumps(np.diff(clock.times).round(4).tolist()), flush=True)
    if distributed.world_size > 1:
        # Everything is written; an orderly end sometimes aborts in gloo's threads.
        os._exit(0)


def train_sequentially(settings: Experiment, rounds: int) -> dict[str, Tensor]:
    """The parameters of fedcore's `sequential` engine after so many rounds."""
    from fedcore import Experiment
    from fedcore.rounds.loop import Loop, Quiet

    values = settings.model_dump(mode="json")
    sequential = Experiment.parse(values, ["engine.name=sequential"])
    with TemporaryDirectory() as unused:
        loop = Loop(sequential, Path(unused), Quiet(), None, False)
        for _ in range(rounds):
            loop.round()
        loop.close()
    params: dict[str, Tensor] = loop.state.server.params
    return params


def compare(name: str, settings: Experiment, rounds: int, processes: list[int]) -> None:
    """Print a line for each number of processes."""
    params = train_sequentially(settings, rounds)
    with TemporaryDirectory() as folder:
        for number in processes:
            first, *seconds = pfl(settings, rounds, Path(folder), number)
            theirs = torch.load(Path(folder) / "params.pt")
            gaps = [(theirs[key] - p).abs().max() for key, p in params.items()]
            away = max(gaps).item()
            median, least, most = statistics.median(seconds), min(seconds), max(seconds)
            print(
                f"{name:<10}{number:>10}{median:>11.3f}{first:>8.3f}"
                f"{least:>8.3f}{most:>8.3f}{away:>22.1e}",
                flush=True,
            )


def main() -> None:
    from fedcore import Experiment

    title = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=title)
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
        f"{'':<10}{'processes':>10}{'s a round':>11}{'first':>8}"
        f"{'min':>8}{'max':>8}{'away from sequential':>22}"
    )
    common = ["evaluation.every=100000", f"rounds={rounds + 1}"]
    for name in arguments.models:
        changes = [f"model.name={name}", *common, *arguments.settings]
        settings = Experiment.load(ROOT / "benchmarks" / "fashion.toml", changes)
        compare(name, settings, rounds, arguments.processes)


if __name__ == "__main__":
    main()
