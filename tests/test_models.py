"""Bundled models: sizes to the digit, and batching over clients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.models import Cnn, LeNet, Logistic, Mlp, ResNet
from fedcore.task import Task

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS = [Logistic(), Mlp(hidden=(20, 10)), Cnn(), LeNet(), ResNet(depth=10, width=4)]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "shape", "number"),
    [
        (Logistic(), GREY, 7_850),
        (Mlp(hidden=(200,)), GREY, 159_010),
        (Cnn(), GREY, 1_663_370),  # McMahan et al. 2017, section 3
        (LeNet(), GREY, 61_706),
        (ResNet(depth=18), COLOUR, 11_173_962),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_models_have_their_published_size(settings, shape, number: int) -> None:  # type: ignore[no-untyped-def]
    assert count(settings.build(shape, 10)) == number


@pytest.mark.parametrize("settings", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=str)
def test_models_batch_over_clients(settings, shape) -> None:  # type: ignore[no-untyped-def]
    model = settings.build(shape, 10)
    params = {name: p.detach() for name, p in model.named_parameters()}
    stacked = {name: torch.stack([p, p + 0.01]) for name, p in params.items()}
    x, y = torch.randn(2, 3, *shape), torch.randint(0, 10, (2, 3))

    def loss(p, x, y):  # type: ignore[no-untyped-def]
        return nn.functional.cross_entropy(functional_call(model, p, (x,)), y)

    together = vmap(grad(loss))(stacked, x, y)
    for i in range(2):
        alone = grad(loss)({name: p[i] for name, p in stacked.items()}, x[i], y[i])
        for name in params:
            assert torch.allclose(together[name][i], alone[name], atol=1e-4), name


@pytest.mark.parametrize("settings", [Cnn(), LeNet(), ResNet(depth=10)], ids=lambda m: m.name)
def test_inputs_that_are_no_images_are_refused(settings) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError, match="expected \\(channels, height, width\\)"):
        settings.build((64,), 10)


def test_a_model_with_running_statistics_is_refused_by_name() -> None:
    x = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    data = FederatedData(x, x, torch.arange(2).numpy(), torch.tensor([0, 1, 2]).numpy())
    with pytest.raises(SettingsError, match='"1" \\(BatchNorm1d\\)'):
        Task(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), data)
    Task(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), data)
