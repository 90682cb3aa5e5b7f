"""The parts of a model: parameters of its layers, and which of them are personal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.escapes import escaped, printable
from fedcore.method import MethodSettings
from fedcore.models import LowRank
from fedcore.models.lowrank import Layer, layers
from fedcore.split import PARTS, split
from fedcore.tasks import build_task
from fedcore.types import Params
from fedcore.views.text import table_text

__all__ = ["Anatomy", "anatomy", "sensitivity", "show", "size"]


class Anatomy(NamedTuple):
    """The model of an experiment; of one with adapters a layer's size is trained."""

    layers: list[Layer]
    shared: Params
    personal: Params

    @property
    def dense_size(self) -> int:
        """The number of parameters without factors."""
        return sum(layer.dense for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The layers, sizes and names, ready for JSON."""
        sizes = {
            "shared": size(self.shared),
            "personal": size(self.personal),
            "dense": self.dense_size,
        }
        return {
            "layers": [layer._asdict() for layer in self.layers],
            "parameters": sizes,
            "shared_names": list(self.shared),
            "personal_names": list(self.personal),
        }


def size(params: Params) -> int:
    """The number of parameters."""
    return sum(x.numel() for x in trees.leaves(params))


def anatomy(experiment: Experiment) -> Anatomy:
    """The model of an experiment in parts.

    Raises SettingsError where the task cannot be built, or a personal part is not
    there.
    """
    task = build_task(experiment)
    # Only methods with personal parts have the setting.
    personal_parts = getattr(experiment.method, "personal", ())
    shared, personal = split(task.init_params(), personal_parts)
    if experiment.lora.rank:
        return Anatomy(_adapted(task.model), shared, personal)
    without_factors = {"lowrank": LowRank(), "initial": None}
    dense = build_task(experiment.model_copy(update=without_factors)).model
    return Anatomy(layers(dense, task.model), shared, personal)


def _adapted(model: nn.Module) -> list[Layer]:
    """The layers of a model with adapters: frozen, with what is trained of each."""
    dense: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    ranks: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer, _, own = name.rpartition(".")
        if own == "lora_A":
            ranks[layer] = len(parameter)
        if not own.startswith("lora_"):
            dense[layer] += parameter.numel()
        if parameter.requires_grad:
            trained[layer] += parameter.numel()
    found = []
    for layer in dense | trained:
        name = layer or "(the model itself)"
        found.append(Layer(name, dense[layer], trained[layer], ranks.get(layer)))
    return found


def show(parts: Anatomy) -> None:
    """Print the tables on stdout."""
    is_factored = any(layer.rank for layer in parts.layers)
    shared, personal = size(parts.shared), size(parts.personal)
    total, dense = shared + personal, parts.dense_size
    is_frozen = any(layer.size == 0 for layer in parts.layers)
    rows = [["layer", "trained" if is_frozen else "parameters", "dense", "rank"]]
    for layer in parts.layers:
        rank = str(layer.rank or "-")
        rows.append([layer.name, f"{layer.size:,}", f"{layer.dense:,}", rank])
    rows.append(["in all", f"{total:,}", f"{dense:,}", f"{total / dense:.1%}"])
    if not is_factored:
        rows = [row[:2] for row in rows]
    print(printable(table_text(rows)))
    print(f"sent each way: {shared:,} parameters; kept by the client: {personal:,}")
    if parts.personal:
        print(escaped(f"personal: {', '.join(parts.personal)}"))


def sensitivity(experiment: Experiment) -> list[tuple[str, Experiment]]:
    """FedSim with each kind of layer personal, FedAvg and local training, with labels.

    Each kind is personal alone and with the output layer: the study of Sun et al.
    (FedPerfix, ICCV 2023, Table 1). Kinds that the model lacks are left out, and those
    that come to the same parameters as one before. Raises SettingsError for a method
    without a `local_lr`.
    """
    lr = getattr(experiment.method, "local_lr", None)
    if lr is None:
        raise SettingsError(
            f'method.name = "{experiment.method.name}" has no local_lr: '
            "take a preset whose method has, e.g. fedavg"
        )
    params = build_task(experiment).init_params()
    choices: dict[frozenset[str], tuple[str, ...]] = {}
    for parts in _choices():
        try:
            _, personal = split(params, parts)
        except SettingsError:
            continue  # the model has no such layers
        choices.setdefault(frozenset(personal), parts)
    names = {(): "nothing (FedAvg)", ("all",): "everything (local)"}
    labelled = []
    for parts in choices.values():
        label = names.get(parts) or " + ".join(parts)
        method = _fedsim(lr, parts)
        labelled.append((label, experiment.model_copy(update={"method": method})))
    return labelled


def _choices() -> Iterator[tuple[str, ...]]:
    yield ()
    yield ("all",)
    yield ("output",)
    for kind in PARTS:
        if kind not in ("all", "output", "body"):
            yield (kind,)
            yield kind, "output"


def _fedsim(lr: float, personal: tuple[str, ...]) -> MethodSettings:
    settings = {"name": "fedsim", "local_lr": lr, "personal": list(personal)}
    return Experiment.parse({"method": settings}).method
