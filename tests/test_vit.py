"""Vision Transformers and FedPerfix's prefixes on their attention.

What the equations say, exactly; timm's models as well.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedcore.errors import SettingsError
from fedcore.models import Timm, Vit
from fedcore.models.vit import (
    Attention,
    Prefix,
    PrefixedAttention,
    Tokens,
    add_prefixes,
)
from fedcore.rng import seed_of
from fedcore.split import split
from fedcore.types import Params

IMAGE, D, HEADS, CLASSES = (1, 8, 8), 8, 2, 5
PLAIN = Vit(patch=4, width=D, depth=3, heads=HEADS, mlp=12)
FORMS = ["additive", "linear", "concat"]
ENDS = {
    "additive": r"(down|up)\.(weight|bias)",
    "linear": "(weight|bias)",
    "concat": "(keys|values)",
}  # of their names


def built(settings: Vit | Timm, image: tuple[int, ...] = IMAGE) -> Any:
    """In float64, from one seed, and all but the start of prefixes and adapters
    moved, so that no norm or bias is trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = settings.build(image, CLASSES).double()
        for name, p in model.named_parameters():
            if "adapter" not in name and "prefix" not in name:
                torch.manual_seed(
                    seed_of(0, name)
                )  # the same for a model that has fewer parameters
                p.data += 0.2 * torch.randn_like(p)
    return model


def vit(form: str = "none", **prefix: Any) -> Any:
    """The same model with any prefixes."""
    return built(
        PLAIN.model_copy(
            update={
                "prefix": Prefix.model_validate(
                    {"form": form, "bottleneck": 3, **prefix}
                )
            }
        )
    )


def images(number: int = 4, image: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(
        number, *image, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def tokens(*shape: int) -> Tensor:
    return torch.randn(
        *shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


def gradients(model: nn.Module) -> Params:
    params = {name: p.detach() for name, p in model.named_parameters()}
    found: Params = grad(
        lambda p: cross_entropy(functional_call(model, p, (images(),)), torch.arange(4))
    )(params)
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance)


def prefixed(model: Any) -> list[PrefixedAttention]:
    return [
        block.attn
        for block in model.blocks
        if isinstance(block.attn, PrefixedAttention)
    ]


# The model and its attention


def test_attention_is_that_of_pytorch() -> None:
    ours, theirs = (
        vit().blocks[0].attn,
        nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64),
    )
    theirs.load_state_dict(
        {"in_proj_" + k: v for k, v in ours.qkv.state_dict().items()}
        | {"out_proj." + k: v for k, v in ours.proj.state_dict().items()}
    )
    z = tokens(3, 5)
    assert close(ours(z), theirs(z, z, z, need_weights=False)[0])


def test_prefixes_are_new_parameters_and_all_others_start_as_without_them() -> None:
    plain = dict(vit().named_parameters())
    for form, end in ENDS.items():
        for depth, blocks in ((None, "[012]"), (2, "[12]"), (1, "2")):
            params = dict(vit(form, depth=depth).named_parameters())
            assert all(torch.equal(params[name], p) for name, p in plain.items()), form
            pattern = rf"blocks\.{blocks}\.attn\.prefix\.{end}"
            assert all(
                re.fullmatch(pattern, name) for name in params.keys() - plain.keys()
            ), (form, depth)
            assert {name.split(".")[1] for name in params.keys() - plain.keys()} == set(
                blocks.strip("[]")
            )


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 16, 8)], ids=str)
def test_adapters_leave_the_logits_as_they_start_bit_for_bit(
    image: tuple[int, ...],
) -> None:
    x = images(4, image)
    plain, adapted = (
        built(PLAIN, image),
        built(PLAIN.model_copy(update={"adapter": 4}), image),
    )
    assert torch.equal(plain(x), adapted(x))
    down = [p for name, p in adapted.named_parameters() if "down" in name]
    assert len(down) == 3 * 2 * 2
    assert all(p.any() for p in down), (
        "with the way down at zero, too, only the last bias would ever move"
    )


@pytest.mark.parametrize(("units", "size"), [(16, 71_808), (64, 268_800)])
def test_adapters_have_the_sizes_of_the_authors_transformer(
    units: int, size: int
) -> None:
    """Pillutla et al., ICML 2022: four blocks of width 256, bottlenecks and norms.

    The norm behind the last block is ours alone.
    """
    with torch.device("meta"):
        model = Vit(width=256, depth=4, heads=4, mlp=1024, adapter=units).build(
            (1, 28, 28), 10
        )
    assert (
        count(split(dict(model.named_parameters()), ["adapter"])[1]) == size + 2 * 256
    )


@pytest.mark.parametrize(
    ("wrong", "image", "message"),
    [
        (
            {"patch": 3},
            IMAGE,
            r"model\.patch = 3: expected a divisor of the image's sides, 8x8",
        ),
        (
            {"heads": 3},
            IMAGE,
            r"model\.heads = 3: expected a divisor of model\.width = 8",
        ),
        (
            {"prefix": Prefix(form="additive", depth=4)},
            IMAGE,
            r"model\.prefix\.depth = 4: the model has 3 blocks",
        ),
        ({}, (64,), r"expected \(channels, height, width\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    wrong: dict[str, Any], image: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        PLAIN.model_copy(update=wrong).build(image, CLASSES)


def test_prefixes_need_blocks_with_plain_attention() -> None:
    with pytest.raises(SettingsError, match="the model has no blocks"):
        add_prefixes(nn.Linear(2, 2), Prefix(form="additive"))
    other = vit()
    other.blocks[1].attn = nn.MultiheadAttention(D, HEADS)
    with pytest.raises(
        SettingsError,
        match="prefixes need attention with qkv, proj and num_heads; "
        "the block has Multihead",
    ):
        add_prefixes(other, Prefix(form="additive"))
    normed = vit()
    normed.blocks[1].attn.q_norm = nn.LayerNorm(D // HEADS)
    with pytest.raises(SettingsError, match="not defined for attention with q_norm"):
        add_prefixes(normed, Prefix(form="additive"))


# Prefixes, equation by equation


@pytest.mark.parametrize("form", ["additive", "linear"])
def test_a_prefix_is_added_to_keys_and_values_as_written_out(form: str) -> None:
    attn, z = vit(form, scale=0.7).blocks[0].attn, tokens(5)
    p = {name: value.detach() for name, value in attn.named_parameters()}
    if form == "additive":
        hidden = torch.tanh(z @ p["prefix.down.weight"].T + p["prefix.down.bias"])
        generated = hidden @ p["prefix.up.weight"].T + p["prefix.up.bias"]
    else:
        generated = z @ p["prefix.weight"].T + p["prefix.bias"]
    w_q, w_k, w_v = p["qkv.weight"].split(D)
    b_q, b_k, b_v = p["qkv.bias"].split(D)
    queries, keys, values = (
        z @ w_q.T + b_q,
        z @ w_k.T + b_k + 0.7 * generated[:, :D],
        z @ w_v.T + b_v + 0.7 * generated[:, D:],
    )
    heads = []
    for h in range(HEADS):
        own = slice(h * D // HEADS, (h + 1) * D // HEADS)
        heads.append(
            torch.softmax(queries[:, own] @ keys[:, own].T / math.sqrt(D // HEADS), 1)
            @ values[:, own]
        )
    assert close(
        attn(z[None])[0], torch.cat(heads, 1) @ p["proj.weight"].T + p["proj.bias"]
    )


@pytest.mark.parametrize("form", ["additive", "linear"])
def test_at_scale_zero_it_is_the_plain_model_bit_for_bit_and_prefixes_do_not_learn(
    form: str,
) -> None:
    model = vit(form, scale=0.0)
    assert torch.equal(model(images()), vit()(images()))
    assert all(
        (g == 0).all() for name, g in gradients(model).items() if "prefix" in name
    )


@pytest.mark.parametrize("scale", [0.8, 1.5, -3.0])
@pytest.mark.parametrize("form", ["additive", "linear"])
def test_with_a_zero_way_up_it_is_the_plain_model_and_only_the_way_up_learns(
    form: str, scale: float
) -> None:
    model = vit(form, scale=scale, start="zero_up")
    assert torch.equal(model(images()), vit()(images()))
    found = {name: g for name, g in gradients(model).items() if "prefix" in name}
    for name, g in found.items():
        assert bool((g == 0).all()) == (".down." in name), name
    assert not torch.equal(vit(form, scale=scale)(images()), vit()(images())), (
        "the default start is not the plain model"
    )


@pytest.mark.parametrize("where", ["prefix.up.bias", "qkv.bias"])
def test_a_constant_on_all_keys_changes_no_output_and_has_no_gradient(
    where: str,
) -> None:
    model = vit("additive")
    before = model(images())
    keys = slice(0, D) if where == "prefix.up.bias" else slice(D, 2 * D)
    for i, block in enumerate(model.blocks):
        bias = block.attn.get_parameter(where)
        g = gradients(model)[f"blocks.{i}.attn.{where}"]
        assert (
            g[keys].abs().max() < 1e-14 < 1e-8 < g[-D:].abs().max()
        )  # the last are the values'
        bias.data[keys] += torch.linspace(-2, 3, D, dtype=torch.float64)
    assert close(model(images()), before)


def test_a_constant_on_all_values_is_one_on_the_output() -> None:
    left, right = (vit("additive", scale=0.7) for _ in range(2))
    c = torch.linspace(-2, 3, D, dtype=torch.float64)
    for one, other in zip(prefixed(left), prefixed(right), strict=True):
        one.prefix.get_parameter("up.bias").data[D:] += c
        other.proj.bias.data += 0.7 * other.proj.weight.data @ c
    assert close(left(images()), right(images()))
    assert not close(left(images()), vit("additive", scale=0.7)(images()), 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_queries_are_those_of_the_plain_model_bit_for_bit(form: str) -> None:
    attn, z = vit(form).blocks[0].attn, tokens(3, 5)
    q, k, v = attn.heads(z)
    plain = Attention.heads(attn, z)
    assert torch.equal(q, plain[0])
    assert not torch.equal(k[..., :5, :], plain[1])
    assert not torch.equal(v[..., :5, :], plain[2])


def test_a_linear_prefix_can_be_folded_into_the_keys_and_values() -> None:
    model, folded = vit("linear", scale=0.7), vit()
    for block, attn in zip(folded.blocks, prefixed(model), strict=True):
        block.attn.qkv.weight.data[D:] += 0.7 * attn.prefix.get_parameter("weight").data
        block.attn.qkv.bias.data[D:] += 0.7 * attn.prefix.get_parameter("bias").data
    assert close(model(images()), folded(images()))
    assert not close(model(images()), vit()(images()), 1e-3)


def test_tokens_before_the_keys_take_a_share_of_the_attention() -> None:
    """Equation 6: (1 - share) attention + share softmax(Q P_k') P_v, the share that
    of the prefix in the softmax's sum."""
    attn, z, s = vit("concat", scale=0.7).blocks[0].attn, tokens(2, 5), 0.7
    q, k, v = Attention.heads(attn, z)
    keys, values = s * attn.prefix.keys, s * attn.prefix.values  # [heads, p, d / heads]
    assert keys.shape == (HEADS, 3, D // HEADS)
    own, prefix = (
        (q @ x.transpose(-2, -1) / math.sqrt(D // HEADS)).exp() for x in (k, keys)
    )
    share = prefix.sum(-1) / (prefix.sum(-1) + own.sum(-1))
    mixed = (1 - share)[..., None] * (own / own.sum(-1, keepdim=True) @ v)
    mixed = mixed + share[..., None] * (prefix / prefix.sum(-1, keepdim=True) @ values)
    assert close(attn(z), attn.proj(mixed.transpose(1, 2).flatten(2)))


def test_tokens_of_zeros_are_not_the_plain_model_and_no_tokens_are() -> None:
    zeros, none = vit("concat", start="zero_up"), vit("concat")
    assert not close(zeros(images()), vit()(images()), 1e-3)
    for attn in prefixed(none):
        attn.prefix = Tokens(HEADS, 0, D // HEADS).double()
    assert torch.equal(none(images()), vit()(images()))


@pytest.mark.parametrize("form", ["none", *FORMS])
def test_the_order_of_patches_does_not_matter_once_their_places_are_gone(
    form: str,
) -> None:
    model, order = vit(form), torch.tensor([0, 3, 1, 4, 2])  # the class token stays
    z = tokens(2, 5)
    assert close(model.blocks(z[:, order]), model.blocks(z)[:, order])
    x = images()
    exchanged = torch.cat([x[:, :, 4:], x[:, :, :4]], 2)  # the two rows of patches
    assert not close(model(exchanged), model(x), 1e-3)
    model.pos_embed.data.zero_()
    assert close(model(exchanged), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_head_reads_out_features_that_another_head_has_no_part_in(form: str) -> None:
    """Client i's model with the head of client j.

    The logits of j's head on the features of i.
    """
    model, other = vit(form), nn.Linear(D, CLASSES).double()
    mixed = functional_call(
        model, {"head.weight": other.weight, "head.bias": other.bias}, (images(),)
    )
    model.head = nn.Identity()
    assert torch.equal(mixed, other(model(images())))


@pytest.mark.parametrize(
    "form", ["linear", "concat"]
)  # additive ones are among the models of test_models.py
def test_gradients_batched_over_clients_are_those_of_each_client(form: str) -> None:
    model = vit(form)
    params = {
        name: torch.stack([p.detach(), 1.1 * p.detach()])
        for name, p in model.named_parameters()
    }
    x = torch.stack([images(), -images()])

    def loss(p: Params, x: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (x,)), torch.arange(4))

    batched = vmap(grad(loss))(params, x)
    for i in range(2):
        alone = grad(loss)({name: p[i] for name, p in params.items()}, x[i])
        assert all(close(batched[name][i], g) for name, g in alone.items()), (
            f"client {i}"
        )


# Sizes and parts


def count(params: Params) -> int:
    return sum(p.numel() for p in params.values())


def published(
    width: int, heads: int, classes: int, form: str = "additive", bottleneck: int = 256
) -> Params:
    """Of a ViT of 12 blocks for 224x224 colour images.

    Without memory for its weights.
    """
    prefix = Prefix.model_validate({"form": form, "bottleneck": bottleneck})
    with torch.device("meta"):
        model = Vit(
            patch=16, width=width, depth=12, heads=heads, mlp=4 * width, prefix=prefix
        ).build((3, 224, 224), classes)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("width", "heads", "size"),
    [(192, 3, 148_096), (384, 6, 295_936), (768, 12, 591_616)],
)
def test_prefixes_have_their_published_size_a_block(
    width: int, heads: int, size: int
) -> None:
    params = published(width, heads, 10)
    for i in range(12):
        assert (
            count(split(params, [rf"blocks\.{i}\.attn\.prefix\..+"])[1])
            == size
            == 3 * width * 256 + 256 + 2 * width
        )
    assert count(split(params, ["prefix"])[1]) == 12 * size
    assert count(split(published(width, heads, 10, "linear"), ["prefix"])[1]) == 12 * (
        2 * width * width + 2 * width
    )
    assert (
        count(split(published(width, heads, 10, "concat", 7), ["prefix"])[1])
        == 12 * 2 * 7 * width
    )


@pytest.mark.parametrize(
    ("personal", "shared", "millions"),
    [
        ([], 25_601_896, 24.42),  # what is stored: all of it
        (["prefix"], 22_050_664, 21.03),
        (["prefix", "output"], 21_665_664, 20.66),  # FedPerfix
        (["prefix", "norm"], None, 21.01),
        (["prefix", "attention", "output"], None, 13.89),  # Vanilla Attention
        (["prefix", "output", r"blocks\.11\..+"], None, 18.97),
        (["all"], 0, 0),
    ],
    ids=str,
)
def test_a_small_vit_has_the_published_size_less_what_is_personal(
    personal: list[str], shared: int | None, millions: float
) -> None:
    """FedPerfix's table 2, whose M is 2^20, of a ViT-S/16 for 1000 classes."""
    params = published(384, 6, 1000)
    left, own = split(params, personal)
    assert count(left) + count(own) == count(params)
    assert not left.keys() & own.keys()
    assert round(count(left) / 2**20, 2) == millions
    if shared is not None:
        assert count(left) == shared


def test_a_small_vit_for_100_classes_keeps_its_prefixes_and_its_head() -> None:
    params = published(384, 6, 100)
    shared, personal = split(params, ["prefix", "output"])
    assert count(split(params, ["prefix"])[0]) == 21_704_164
    assert (count(shared), count(personal)) == (21_665_664, 3_551_232 + 385 * 100)
    assert not any("prefix" in name or "head" in name for name in shared)


PARTS = {
    "prefix": r"blocks\.\d\.attn\.prefix\.",
    "attention": r"blocks\.\d\.attn\.(qkv|proj)\.(weight|bias)",
    "norm": r"(blocks\.\d\.norm[12]|norm)\.(weight|bias)",
    "output": r"head\.(weight|bias)",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_the_same_whatever_the_prefixes(part: str, form: str) -> None:
    params = dict(vit(form).named_parameters())
    pattern = PARTS[part] + (ENDS[form] if part == "prefix" else "")
    assert split(params, [part])[1].keys() == {
        name for name in params if re.fullmatch(pattern, name)
    }


# timm's models


TIMM = Timm(architecture="vit_tiny_patch16_224", patch=4)
OURS = Vit(patch=4, width=192, depth=12, heads=3, mlp=768)


def with_prefix(settings: Any, **prefix: Any) -> Any:
    return built(
        settings.model_copy(
            update={"prefix": Prefix.model_validate({"bottleneck": 3, **prefix})}
        )
    )


def test_timm_is_asked_for_by_name_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        SettingsError,
        match=r'timm is not installed; pip install timm, or use model\.name = "vit"',
    ):
        TIMM.build(IMAGE, CLASSES)


@pytest.mark.parametrize("form", ["none", *FORMS])
def test_timms_vit_is_ours_by_name_and_by_value(form: str) -> None:
    pytest.importorskip("timm")
    theirs, ours = with_prefix(TIMM, form=form), with_prefix(OURS, form=form)
    assert {name: p.shape for name, p in theirs.named_parameters()} == {
        name: p.shape for name, p in ours.named_parameters()
    }
    ours.load_state_dict(theirs.state_dict())
    assert close(theirs.eval()(images()), ours(images()), 1e-10)


def test_timms_vit_with_a_zero_way_up_is_timms_vit() -> None:
    pytest.importorskip("timm")
    plain = with_prefix(TIMM).eval()(images())
    assert close(
        with_prefix(TIMM, form="additive", start="zero_up").eval()(images()),
        plain,
        1e-10,
    )
    assert not close(with_prefix(TIMM, form="additive").eval()(images()), plain, 1e-3)


def test_timms_vit_has_the_parts_of_ours() -> None:
    pytest.importorskip("timm")
    prefix = Prefix(form="additive", bottleneck=256, depth=2)
    with torch.device("meta"):
        params: Params = dict(
            TIMM.model_copy(update={"prefix": prefix})
            .build((3, 32, 32), 10)
            .named_parameters()
        )
        ours: Params = dict(
            OURS.model_copy(update={"prefix": prefix})
            .build((3, 32, 32), 10)
            .named_parameters()
        )
    assert count(split(params, ["prefix"])[1]) == 2 * 148_096
    for part in ("input", "output", "norm", "attention", "mlp", "prefix"):
        assert split(params, [part])[1].keys() == split(ours, [part])[1].keys(), part


@pytest.mark.parametrize("form", ["none", "additive"])
def test_gradients_of_timms_vit_batched_over_clients_are_those_of_each_client(
    form: str,
) -> None:
    pytest.importorskip("timm")
    model = with_prefix(TIMM, form=form)
    params = {
        name: torch.stack([p.detach()] * 2) for name, p in model.named_parameters()
    }

    def loss(p: Params, x: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, p, (x,)), torch.arange(4))

    batched = vmap(grad(loss))(params, torch.stack([images(), -images()]))
    alone = grad(loss)({name: p[1] for name, p in params.items()}, -images())
    assert all(close(batched[name][1], g, 1e-10) for name, g in alone.items())


def test_a_vit_of_timm_that_prefixes_are_not_defined_for_is_refused() -> None:
    timm = pytest.importorskip("timm")
    normed = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(8, 8),
        patch_size=4,
        in_chans=1,
        depth=1,
        qk_norm=True,
    )
    with pytest.raises(SettingsError, match="not defined for attention with q_norm"):
        add_prefixes(normed, Prefix(form="additive"))
    with pytest.raises(
        SettingsError,
        match=r'model\.architecture = "vit_of_nobody": timm cannot make it',
    ):
        Timm(architecture="vit_of_nobody").build(IMAGE, CLASSES)
