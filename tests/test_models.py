"""Models: their published sizes, any image they claim to take, batching over
clients, and no running statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedcore.data.federated import Examples, FederatedData
from fedcore.errors import SettingsError
from fedcore.models import Cnn, LeNet, Logistic, Mlp, ModelSettings, ResNet, Vit
from fedcore.models.vit import Prefix
from fedcore.split import split
from fedcore.task import Task

SMALL_RESNET = ResNet(depth=10, width=8, groups=2)
ADAPTED = ResNet(depth=10, width=8, groups=2, adapter=True)
SMALL_VIT = Vit(depth=1, adapter=4, prefix=Prefix(form="additive", bottleneck=3))
ALL = [
    Logistic(),
    Mlp(hidden=(16, 8)),
    Cnn(),
    LeNet(),
    SMALL_RESNET,
    ADAPTED,
    SMALL_VIT,
]
GREY, COLOUR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "shape", "number"),
    [
        (Logistic(), GREY, 7_850),
        (Mlp(hidden=(200,)), GREY, 159_010),
        (
            Mlp(hidden=(200, 200)),
            GREY,
            199_210,
        ),  # McMahan et al. 2017, section 3, as the CNN
        (Cnn(), GREY, 1_663_370),
        (LeNet(), GREY, 61_706),
        (ResNet(depth=18), COLOUR, 11_173_962),
    ],
    ids=repr,
)
def test_models_have_their_published_number_of_parameters(
    settings: Cnn, shape: tuple[int, ...], number: int
) -> None:
    assert sum(p.numel() for p in settings.build(shape, 10).parameters()) == number


def test_parts_of_a_resnet_have_the_sizes_of_the_authors_tables() -> None:
    """Pillutla et al., ICML 2022, their code.

    ResNet-18 with GroupNorm on 62 classes of 28x28 images.
    """
    params = dict(ResNet(depth=18, adapter=True).build(GREY, 62).named_parameters())
    expected = {"input": 704, "output": 31_806, "adapter": 1_408_128, "all": 12_599_806}
    assert {
        part: sum(p.numel() for p in split(params, [part])[1].values())
        for part in expected
    } == expected
    assert (
        sum(p.numel() for p in ResNet(depth=18).build(GREY, 62).parameters())
        == 11_199_486
    )


def test_adapters_leave_a_resnet_as_it_starts() -> None:
    """2 h, which the norm behind it rescales.

    The same outputs but for its epsilon and the small weights of the adapters.
    """
    x = torch.randn(4, *GREY, generator=torch.Generator().manual_seed(0))
    outputs = []
    for settings in (SMALL_RESNET, ADAPTED):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs.append(settings.build(GREY, 5)(x))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-2 * outputs[0].abs().max()


@pytest.mark.parametrize("shape", [(1, 8, 8), GREY, COLOUR], ids=str)
@pytest.mark.parametrize("settings", ALL, ids=repr)
def test_every_model_takes_every_bundled_image(
    settings: Cnn, shape: tuple[int, ...]
) -> None:
    if isinstance(settings, LeNet) and shape == (1, 8, 8):
        pytest.skip("LeNet needs 16x16")
    assert settings.build(shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", [(1, 16, 16), GREY, COLOUR], ids=str)
@pytest.mark.parametrize("settings", ALL, ids=repr)
def test_gradients_batched_over_clients_are_those_of_each_client(
    settings: Cnn, shape: tuple[int, ...]
) -> None:
    clients = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [settings.build(shape, 4).double() for _ in range(clients)]
        x, y = (
            torch.randn(clients, 5, *shape, dtype=torch.float64),
            torch.randint(4, (clients, 5)),
        )
    params = {
        k: torch.stack([dict(m.named_parameters())[k].detach() for m in models])
        for k, _ in models[0].named_parameters()
    }

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(models[0], p, (x,)), y)

    batched = vmap(grad(loss))(params, x, y)
    for i, model in enumerate(models):
        parameters = dict(model.named_parameters())
        alone = torch.autograd.grad(
            cross_entropy(model(x[i]), y[i]), list(parameters.values())
        )
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(
                batched[name][i], gradient, msg=f"gradient of {name}, client {i}"
            )


@pytest.mark.parametrize("settings", ALL, ids=repr)
def test_a_model_keeps_no_running_statistics(settings: Cnn) -> None:
    assert not dict(settings.build((1, 16, 16), 4).named_buffers())


def test_a_model_with_running_statistics_is_refused_by_name() -> None:
    x = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    data = FederatedData(x, x, np.arange(2), np.arange(3))
    with pytest.raises(SettingsError, match=r'"1" \(BatchNorm1d\)'):
        Task(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), data)
    Task(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        data,
    )


@pytest.mark.parametrize("settings", ALL, ids=repr)
def test_the_global_seed_decides_initialisation(settings: Cnn) -> None:
    with torch.random.fork_rng():
        built = []
        for _ in range(2):
            torch.manual_seed(3)
            built.append(settings.build((1, 16, 16), 4).state_dict())
    for name, value in built[0].items():
        assert torch.equal(value, built[1][name]), name


@pytest.mark.parametrize("settings", [Cnn(), LeNet(), SMALL_RESNET], ids=repr)
def test_inputs_that_are_no_images_or_too_small_are_refused(settings: Cnn) -> None:
    for shape in [(784,), (1, 2, 2), (28, 28)]:
        with pytest.raises(
            SettingsError,
            match=r"expected \(channels, height, width\) of at least .*; "
            r'use model\.name = "mlp"',
        ):
            settings.build(shape, 10)


def test_settings_are_told_apart_by_name_and_impossible_ones_are_refused() -> None:
    parse = TypeAdapter(ModelSettings).validate_python
    assert parse({"name": "mlp", "hidden": [30, 20]}) == Mlp(hidden=(30, 20))
    for wrong in (
        {"name": "mlp", "hidden": []},
        {"name": "mlp", "hidden": [0]},
        {"name": "cnn", "width": 3},
        {"name": "resnet", "width": 10, "groups": 4},
        {"name": "resnet", "depth": 17},
        {"name": "transformer"},
    ):
        with pytest.raises(ValidationError):
            parse(wrong)
