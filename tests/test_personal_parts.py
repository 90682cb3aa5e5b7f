"""Parts of models, and settings of personal methods that are refused."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedcore import trees
from fedcore.errors import SettingsError
from fedcore.models import (
    Cnn,
    LeNet,
    Logistic,
    LowRank,
    Mlp,
    ModelSettings,
    ResNet,
    Vit,
)
from fedcore.models.lowrank import lowrank
from fedcore.models.vit import Prefix
from fedcore.rounds.loop import run
from fedcore.split import PARTS, split
from fedcore.storage.checkpoint import Checkpoint
from fedcore.storage.faults import Lines
from fedcore.types import Batches, Params
from tests.helpers import LAYERED, assert_close, equal, loop_of, small
from tests.personal import (
    OWN,
    PARTIAL,
    PERSONAL,
    SHARED,
    done,
    model_of,
    plan,
    state_of,
    states_of,
    train,
)


def named(
    settings: ModelSettings, rank: LowRank | None = None, classes: int = 10
) -> Params:
    model = settings.build((1, 16, 16), classes)
    return dict((lowrank(model, rank) if rank else model).named_parameters())


MODELS = {
    "logistic": named(Logistic()),
    "mlp": named(Mlp(hidden=(16, 8))),
    "cnn": named(Cnn()),
    "lenet": named(LeNet()),
    "resnet": named(ResNet(depth=10, width=8, groups=2)),
    "resnet with adapters": named(ResNet(depth=10, width=8, groups=2, adapter=True)),
    "vit": named(
        Vit(depth=11, adapter=4, prefix=Prefix(form="additive", bottleneck=3))
    ),
    "pfedpara": named(Mlp(hidden=(16,)), LowRank(form="pfedpara", gamma=0.5)),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_part_of_every_model_splits_it_in_two(model: str) -> None:
    params = MODELS[model]
    for part, members in PARTS.items():
        if not members(params):
            with pytest.raises(
                SettingsError,
                match=f'the part "{part}": no parameter of the model belongs to it',
            ):
                split(params, [part])
            continue
        shared, personal = split(params, [part])
        assert len(personal) > 0
        assert [*shared] == [name for name in params if name not in personal], (
            "every name once, in the order of the model"
        )
        assert [*personal] == [name for name in params if name not in shared]
    assert split(params, []) == (params, {})
    assert split(params, ["all"]) == ({}, params)


def test_the_parts_of_a_vision_transformer_are_those_of_the_fedperfix_table() -> None:
    """Together they leave nothing out."""
    params = MODELS["vit"]
    block = r"blocks\.\d+\."
    table = {
        "input": r"cls_token|pos_embed|patch_embed\..+",
        "attention": block + r"attn\.(qkv|proj)\.(weight|bias)",
        "prefix": block + r"attn\.prefix\.(down|up)\.(weight|bias)",
        "mlp": block + r"mlp\.(fc1|fc2)\.(weight|bias)",
        "norm": rf"({block}norm[12]|norm)\.(weight|bias)",
        "output": r"head\.(weight|bias)",
    }
    found = {part: set(split(params, [part])[1]) for part in table}
    assert found == {
        part: {name for name in params if re.fullmatch(pattern, name)}
        for part, pattern in table.items()
    }
    adapters = {name for name in params if ".adapter" in name}
    assert sum(map(len, found.values())) + len(adapters) == len(params), (
        "the parts overlap"
    )
    assert set().union(*found.values(), adapters) == set(params)
    assert set(split(params, ["adapter"])[1]) == adapters | found["norm"]
    assert sum(params[name].numel() for name in found["prefix"]) == 11 * (
        3 * 32 * 3 + 3 + 2 * 32
    )  # 3 d r_b + r_b + 2 d a block


def test_patterns_match_whole_names() -> None:
    params = MODELS["vit"]
    assert {name.split(".")[1] for name in split(params, [r"blocks\.1\..+"])[1]} == {
        "1"
    }  # and not block 10
    assert [*split(params, ["cls_token", r"head\.bias"])[1]] == [
        "cls_token",
        "head.bias",
    ]
    for part in ("head", "weight", "blocks", "blocks.1", "token", "Output", ""):
        with pytest.raises(
            SettingsError,
            match=r"no parameter .*; expected all, input, .*, "
            "or a regular expression for whole names",
        ):
            split(params, ["output", part])


def test_what_is_shared_depends_on_no_personal_size() -> None:
    """FedPerfix's messages: the same whatever the bottleneck, the scale and the
    number of classes."""
    found = []
    for bottleneck, scale, classes in ((2, 0.8, 3), (9, 1.5, 60)):
        params = named(
            Vit(prefix=Prefix(form="additive", bottleneck=bottleneck, scale=scale)),
            classes=classes,
        )
        found.append(
            {
                name: p.shape
                for name, p in split(params, ["prefix", "output"])[0].items()
            }
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("name", PARTIAL)
def test_the_server_holds_the_shared_part_alone_and_a_client_the_rest(
    name: str, tmp_path: Path
) -> None:
    loop = done(small(name), tmp_path)
    assert set(trees.flatten(loop.state.server)) == {f"params/{key}" for key in SHARED}
    with closing(Lines(tmp_path / "metrics.jsonl")) as metrics:
        loop.saving.save(loop.state, metrics)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    checkpoint.read()
    assert set(checkpoint.part("server")) == {f"params/{key}" for key in SHARED}
    assert all(
        set(trees.flatten(state)) == {f"v/{key}" for key in OWN}
        for state in states_of(loop)
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "fedalt",
            {"method__personal_passes": -1},
            r"method\.personal_passes = -1: .*greater than or equal to 0",
        ),
        (
            "fedalt",
            {"method__shared_passes": -1},
            r"method\.shared_passes = -1: .*greater than or equal to 0",
        ),
        (
            "fedalt",
            {"method__shared_passes": 0, "method__personal_passes": 0},
            "shared_passes and personal_passes are both 0",
        ),
        (
            "fedsim",
            {"method__penalty": -0.1},
            r"method\.penalty = -0\.1: .*greater than or equal to 0",
        ),
        (
            "fedsim",
            {"method__personal_lr": 0.0},
            r"method\.personal_lr = 0\.0: .*greater than 0",
        ),
        (
            "fedsim",
            {"method__personal": ["("]},
            r'method\.personal.*"\(" is no regular expression',
        ),
        (
            "fedsim",
            {"method__personal": ["head"]},
            'the part "head": no parameter of the model belongs to it; '
            "expected all, input",
        ),
        (
            "fedalt",
            {"method__personal": ["weight", "output"]},
            'the part "weight": no parameter of the model belongs to it',
        ),
        (
            "fedsim",
            {"method__personal": ["prefix"]},
            'the part "prefix": no parameter .* '
            "such as 0.weight, 0.bias, 1.weight, 1.bias",
        ),
        (
            "ditto",
            {"method__lam": -1.0},
            r"method\.lam = -1\.0: .*greater than or equal to 0",
        ),
        (
            "pfedme",
            {"method__lam": -1.0},
            r"method\.lam = -1\.0: .*greater than or equal to 0",
        ),
        (
            "pfedme",
            {"method__inner_steps": 0},
            r"method\.inner_steps = 0: .*greater than or equal to 1",
        ),
        (
            "fedsim",
            {"finetune__epochs": -1},
            r"finetune\.epochs = -1: .*greater than or equal to 0",
        ),
        ("fedsim", {"finetune__lr": 0.0}, r"finetune\.lr = 0\.0: .*greater than 0"),
        (
            "fedsim",
            {"finetune__penalty": -1.0},
            r"finetune\.penalty = -1\.0: .*greater than or equal to 0",
        ),
        (
            "fedsim",
            {"finetune__part": ["all"]},
            r"unknown key finetune\.part; did you mean finetune\.parts",
        ),
        (
            "fedsim",
            {"finetune__parts": ["("]},
            r'finetune\.parts.*"\(" is no regular expression',
        ),
        (
            "fedsim",
            {"finetune__epochs": 1, "finetune__parts": ["heads"]},
            'the part "heads": no parameter of the model belongs to it',
        ),
        ("fedsim", {"finetune__epochs": 1, "finetune__parts": []}, r"finetune\.parts"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(small(name, **settings), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_one_part_may_be_given_as_a_word() -> None:
    assert (
        small("fedsim", method__personal="body").method
        == small("fedsim", method__personal=["body"]).method
    )


RIGHT = {"0.weight": torch.ones(4, 5), "0.bias": torch.ones(4)}
WRONG = {
    "another name": (
        {**RIGHT, "2.weight": torch.ones(1)},
        r'it holds "2\.weight" of shape \(1,\), the model has no such parameter',
    ),
    "another shape": (
        {"0.weight": torch.ones(5, 4)},
        r'it holds "0\.weight" of shape \(5, 4\), the model has of shape \(4, 5\)',
    ),
    "nothing": ({}, "it holds no parameters"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_start_that_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    tensors, message = WRONG[kind]
    save_file(tensors, tmp_path / "start.safetensors")
    with pytest.raises(
        SettingsError, match=r"initial = .*start\.safetensors: " + message
    ):
        run(
            small("fedsim", initial=str(tmp_path / "start.safetensors")), tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "no safetensors",
        "an empty folder",
        "another model's run",
        "a damaged run",
    ],
)
def test_a_start_that_cannot_be_read_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    place = tmp_path / "start"
    if kind == "no safetensors":
        place.write_text("no tensors")
    elif kind == "an empty folder":
        place.mkdir()
    elif kind != "missing":
        run(
            small(
                "fedavg", rounds=1, **({} if kind == "another model's run" else LAYERED)
            ),
            place,
        )
    if kind == "a damaged run":
        next((place / "checkpoint").glob("server-*")).write_bytes(b"no tensors")
    with pytest.raises(SettingsError) as caught:
        run(small("fedsim", initial=str(place)), tmp_path / "r")
    assert f"initial = {place}" in str(caught.value), (
        "a message names the setting that the user typed"
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", PERSONAL)
def test_a_run_starts_from_another_runs_model_and_what_that_lacks_stays_as_it_is(
    name: str, tmp_path: Path
) -> None:
    fedavg = loop_of(small("fedavg", **LAYERED), tmp_path / "fedavg")
    whole = fedavg.run().params
    fedsim = loop_of(small("fedsim"), tmp_path / "fedsim")
    shared = fedsim.run().params
    own = fedsim.task.init_params()
    for source, expected in (
        (tmp_path / "fedavg", whole),
        (tmp_path / "fedsim", {**own, **shared}),
    ):
        loop = loop_of(
            small(name, **LAYERED, initial=str(source)),
            tmp_path / f"from {source.name}",
        )
        assert loop.state.t == 0
        assert equal(model_of(loop, 0), expected), source.name
        assert equal({**loop.task.init_params(), **loop.state.server.params}, expected)


def test_the_penalty_is_centred_on_the_model_that_the_run_started_from(
    tmp_path: Path,
) -> None:
    run(small("fedavg", **LAYERED), tmp_path / "fedavg")
    for name in PARTIAL:
        settings = {
            "method__penalty": 2e5,
            "method__personal_lr": 1e-6,
            "method__local_lr": 1e-6,
        }  # lr 2 lambda = 0.4
        loop = loop_of(
            small(name, initial=str(tmp_path / "fedavg"), **settings), tmp_path / name
        )
        v0, away = state_of(loop, 0).v, trees.map(lambda x: x + 1, state_of(loop, 0).v)
        assert loop.engine.states is not None
        loop.engine.states.put(
            [0], trees.map(lambda x: x[None], state_of(loop, 0)._replace(v=away))
        )
        own = plan(loop, 0)
        batches = (
            own if name == "fedsim" else Batches(*(torch.cat([x, x]) for x in own))
        )
        left = 0.6 ** len(own.mask)
        assert_close(
            train(loop, batches)[1].v,
            trees.map(lambda x, left=left: x + left, v0),
            1e-3,
            name,
        )
