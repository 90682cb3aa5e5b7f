"""Gradients of an objective in many lanes: under `torch.func.vmap`, or one by one.

Both run from recordings (`fedcore.speed.recording`), and on a GPU from CUDA graphs. The
faster way depends on model and machine, so it is measured and remembered, as the
vectorised engine does. Convolutions with other weights in each lane are written as
matrix products for vmap: PyTorch would make them grouped convolutions, which on a CPU
are twenty times slower.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional

from fedcore import __version__, trees
from fedcore.speed import step_recorder
from fedcore.speed.cuda_graphs import EAGER, Graphs
from fedcore.speed.kernels.product import product
from fedcore.speed.kernels.unfolding import grid
from fedcore.storage import cache
from fedcore.types import Tree

AT_ONCE = 32  # lanes in one batch
TRIALS = EAGER + 4  # of each way, of which the fastest counts: the first ones record

Variables = dict[str, Tensor]
"""The optimised tensors, by name; [lanes, ...], or of one lane inside an objective."""

Objective = Callable[[Variables, Tree], tuple[Tensor, Tensor]]
"""(variables, constants) of one lane -> (the value to minimise, the match), both 0-d.

The match is the part of the value that compares with the update.
"""


class Gradients:
    """(gradient of every lane's objective, its match), batched or one by one."""

    def __init__(
        self,
        objective: Callable[[nn.Module], Objective],
        model: nn.Module,
        variables: Variables,
        constants: Tree,
        names: tuple[str, ...],
        batched: bool | None = None,
    ) -> None:
        self.names = names
        self._recorder = step_recorder("the objective of the attack")
        on_gpu = device_of(variables).type == "cuda"
        self._graphs = Graphs(self._recorder) if on_gpu else None
        as_products = convolutions_as_products(model)
        self._alone = grad_and_value(objective(model), has_aux=True)
        self._batch = vmap(grad_and_value(objective(as_products), has_aux=True))
        if batched is None:
            several = count_lanes(variables) > 1
            batched = several and self._batching_pays(model, variables, constants)
        self.batched = batched

    def __call__(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        if self.batched:
            return self._batched(variables, constants)
        return self._one_by_one(variables, constants)

    def _batched(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        results = []
        for start in range(0, count_lanes(variables), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            piece = trees.at((variables, constants), rows)
            results.append(self._recorded("batched", self._batch, *piece))
        gradients, match = trees.map(lambda *xs: torch.cat(xs), *results)
        return gradients, match

    def _one_by_one(
        self, variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        results: list[Tree] = []
        for i in range(count_lanes(variables)):
            lane = trees.at((variables, constants), i)
            results.append(self._recorded("alone", self._alone, *lane))
        gradients, match = trees.stack(results)
        return gradients, match

    def _recorded(
        self, kind: str, way: Callable[..., Any], variables: Variables, constants: Tree
    ) -> tuple[Variables, Tensor]:
        """(gradient, match), of a piece of the lanes or of one.

        The first of its shape is recorded, the others run from that.
        """

        def step(inputs: tuple[Variables, Tree]) -> tuple[Variables, Tensor]:
            gradient, (_, match) = way(*inputs)
            return gradient, match.detach()

        def recorded(inputs: Tree) -> Tree:
            if self._recorder is None:
                return step(inputs)
            return self._recorder.run(step, kind, inputs, ())

        inputs = (variables, constants)
        result: tuple[Variables, Tensor]
        if self._graphs is None:
            result = recorded(inputs)
        else:
            result = self._graphs.run(kind, recorded, inputs)
        return result

    def _batching_pays(
        self, model: nn.Module, variables: Variables, constants: Tree
    ) -> bool:
        """Whether a batch is faster than its lanes one by one.

        Measured once a (model, shapes, machine), and remembered: two audits with one
        seed then compute the same bits.
        """
        flat = trees.flatten((variables, constants))
        shapes = [[name, list(x.shape)] for name, x in flat.items()]
        machine = [
            str(device_of(variables)),
            platform.processor(),
            os.cpu_count(),
            torch.get_num_threads(),
            torch.__version__,
            __version__,
        ]
        key = cache.key_of("lanes", [str(model), shapes, machine])
        remembered = cache.load(key)
        if remembered is not None:
            return bool(remembered["batched"])
        try:
            batch = self._time(self._batched, variables, constants)
            one_by_one = self._time(self._one_by_one, variables, constants)
        except Exception:  # a model that vmap cannot take
            return False
        is_faster = np.array(batch < one_by_one)
        cache.save(key, batched=is_faster)
        # Another process may have measured at the same time; all follow the file.
        return bool((cache.load(key) or {"batched": is_faster})["batched"])

    def _time(
        self,
        way: Callable[[Variables, Tree], object],
        variables: Variables,
        constants: Tree,
    ) -> float:
        """Seconds of the fastest of several calls."""
        times = []
        for _ in range(TRIALS):
            begin = time.perf_counter()
            way(variables, constants)
            if self._graphs is not None:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)


def device_of(variables: Variables) -> torch.device:
    return next(iter(variables.values())).device


def count_lanes(variables: Variables) -> int:
    return len(next(iter(variables.values())))


def convolutions_as_products(model: nn.Module) -> nn.Module:
    """A copy of the model whose plain convolutions are matrix products.

    Its parameters have the same names.
    """
    changed = copy.deepcopy(model)
    for name, layer in list(changed.named_modules()):
        if not isinstance(layer, nn.Conv2d) or not is_plain(layer):
            continue
        if not name:
            return _Product(layer)
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, _Product(layer))
    return changed


def is_plain(layer: nn.Conv2d) -> bool:
    """Whether this is a convolution in one group, with zeros around by a number."""
    is_one_group = type(layer) is nn.Conv2d and layer.groups == 1
    is_zero_padded = layer.padding_mode == "zeros"
    return is_one_group and is_zero_padded and not isinstance(layer.padding, str)


class _Product(nn.Module):
    """A convolution as one matrix product over unfolded inputs."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        assert not isinstance(layer.padding, str)
        self.kernel, self.stride = layer.kernel_size, layer.stride
        self.dilation, self.padding = layer.dilation, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        window = (self.kernel, self.dilation, self.padding, self.stride)
        places = grid(x.shape[2:], *window)
        columns = functional.unfold(x, *window)  # [N, C k k, H W]
        columns = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        y = product(self.weight, columns, places)
        return y if self.bias is None else y + self.bias[:, None, None]
