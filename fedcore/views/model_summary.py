"""What a model is made of: its layers dense and factored, what is sent and what stays on the client, which part to personalise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fedcore import trees
from fedcore.config import Experiment
from fedcore.errors import SettingsError
from fedcore.method import MethodSettings
from fedcore.models import LowRank
from fedcore.models.lowrank import Layer, layers
from fedcore.split import PARTS, split
from fedcore.tasks import build_task
from fedcore.types import Params


class Anatomy(NamedTuple):
    """The model of an experiment."""

    layers: list[Layer]
    shared: Params
    personal: Params

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        sizes = {
            "shared": size(self.shared),
            "personal": size(self.personal),
            "dense": sum(layer.dense for layer in self.layers),
        }
        names = {
            "shared_names": list(self.shared),
            "personal_names": list(self.personal),
        }
        return {
            "layers": [layer._asdict() for layer in self.layers],
            "parameters": sizes,
            **names,
        }


def size(params: Params) -> int:
    return sum(x.numel() for x in trees.leaves(params))


def anatomy(e: Experiment) -> Anatomy:
    """Raises SettingsError where the task cannot be built, or a personal part is not there."""
    model = build_task(e).model
    params: Params = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    dense = build_task(
        e.model_copy(update={"lowrank": LowRank(), "initial": None})
    ).model
    return Anatomy(
        layers(dense, model), *split(params, getattr(e.method, "personal", ()))
    )


def show(a: Anatomy) -> None:
    """The tables, on stdout."""
    factored = any(layer.rank for layer in a.layers)
    rows = [["layer", "parameters", *(["dense", "rank"] if factored else [])]]
    for layer in a.layers:
        rows.append(
            [
                layer.name,
                f"{layer.size:,}",
                *([f"{layer.dense:,}", str(layer.rank or "-")] if factored else []),
            ]
        )
    total, dense = (
        size(a.shared) + size(a.personal),
        sum(layer.dense for layer in a.layers),
    )
    rows.append(
        [
            "in all",
            f"{total:,}",
            *([f"{dense:,}", f"{total / dense:.1%}"] if factored else []),
        ]
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        print(
            "  ".join(
                [
                    first.ljust(widths[0]),
                    *(
                        text.rjust(width)
                        for text, width in zip(others, widths[1:], strict=True)
                    ),
                ]
            )
        )
    print(
        f"sent each way: {size(a.shared):,} parameters; kept by the client: {size(a.personal):,}"
    )
    if a.personal:
        print(f"personal: {', '.join(a.personal)}")


def sensitivity(e: Experiment) -> list[tuple[str, Experiment]]:
    """FedSim with each kind of layer personal, alone and with the output layer, beside FedAvg and local training, with labels.

    The study of Sun et al. (FedPerfix, ICCV 2023, Table 1). Kinds that the model lacks are left out, and those that come to the
    same parameters as one before. Raises SettingsError for a method without a `local_lr`.
    """
    lr = getattr(e.method, "local_lr", None)
    if lr is None:
        raise SettingsError(
            f'method.name = "{e.method.name}" has no local_lr: take a preset whose method has, e.g. fedavg'
        )
    params = build_task(e).init_params()
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for parts in _choices():
        try:
            personal = frozenset(split(params, parts)[1])
        except SettingsError:
            continue  # the model has no such layers
        found.setdefault(personal, parts)
    names = {(): "nothing (FedAvg)", ("all",): "everything (local)"}
    return [
        (
            names.get(parts) or " + ".join(parts),
            e.model_copy(update={"method": _fedsim(e, lr, parts)}),
        )
        for parts in found.values()
    ]


def _choices() -> Iterator[tuple[str, ...]]:
    yield from ((), ("all",), ("output",))
    for kind in PARTS:
        if kind not in ("all", "output", "body"):
            yield (kind,)
            yield kind, "output"


def _fedsim(e: Experiment, lr: float, personal: tuple[str, ...]) -> MethodSettings:
    return Experiment.parse(
        {"method": {"name": "fedsim", "local_lr": lr, "personal": list(personal)}}
    ).method
