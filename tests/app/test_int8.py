"""Blocks in int8 beside the blocks that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import open_clip_folder
from torch import Tensor, nn

from app import int8
from models.checkpoint import load_model
from models.clip import CLIPModel
from models.layers import Block
from models.torchvision import load_torchvision

pytestmark = pytest.mark.skipif(not int8.supported(), reason="this processor has no VNNI")
WIDTH, HEADS = 64, 4


def _ours() -> nn.Module:
    return Block(WIDTH, HEADS)


def _open_clip(activation: str = "GELU", layer_scale: float | None = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip import transformer

        act = {"GELU": nn.GELU, "QuickGELU": transformer.QuickGELU}[activation]
        return transformer.ResidualAttentionBlock(WIDTH, HEADS, ls_init_value=layer_scale, act_layer=act)

    return make


def _timm(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.vision_transformer import Block as TimmBlock

        return TimmBlock(WIDTH, HEADS, **{"qkv_bias": True, **options})

    return make


def _tanh() -> nn.Module:
    return nn.GELU(approximate="tanh")


KINDS = {
    "ours": _ours,
    "open_clip": _open_clip(),
    "open_clip, QuickGELU": _open_clip("QuickGELU"),
    "open_clip, LayerScale": _open_clip(layer_scale=0.3),
    "timm": _timm(),
    "timm, tanh, no bias, LayerScale": _timm(act_layer=_tanh, qkv_bias=False, init_values=0.3),
}


class _Model(nn.Module):
    """A linear layer and a block, as a model has them. options: what it calls its block with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(WIDTH, WIDTH), block
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.before(x), **self.options)


def _model(kind: str, outlier: float = 1.0) -> _Model:
    """A model with a block of a kind: random biases and norms, one channel so many times as far as the others."""
    load_torchvision()
    torch.manual_seed(0)
    model = _Model(KINDS[kind]()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "gamma" not in name:
            nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.3)
        if name.endswith(("norm1.weight", "ln_1.weight")):
            parameter.data[3] *= outlier
    return model


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def _branches(model: nn.Module, x: Tensor) -> Tensor:
    """What a block adds to its input."""
    with torch.inference_mode():
        return model(x) - model.before(x)  # type: ignore[operator]


def _error(model: nn.Module, exact: nn.Module, x: Tensor) -> float:
    """How far what a block adds is off, over its size."""
    expected = _branches(exact, x)
    return float((_branches(model, x) - expected).norm() / expected.norm())


def _observed(model: nn.Module, x: Tensor) -> tuple[int8.Ranges, Tensor]:
    outputs: list[Tensor] = []
    with torch.inference_mode():
        ranges = int8.observe(model, lambda copy: outputs.append(copy(x)))
    return ranges, outputs[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outlier", "most"), [(1, 0.015), (30, 0.03)])  # 0.08 to 0.12, were channels not levelled
def test_a_block_is_read_exactly_and_computed_nearly(kind: str, outlier: float, most: float) -> None:
    model, x = _model(kind, outlier), _inputs(16, 10)
    ranges, outputs = _observed(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(outputs, model(x), atol=1e-5, rtol=1e-5)
    assert {key.partition("/")[2] for key in ranges} == {"qkv", "out", "fc1", "fc2"}
    narrow = int8.quantized(model, ranges)
    assert isinstance(narrow.block, int8.Int8Block)
    assert _error(narrow, model, x) < most
    assert _error(narrow, model, _inputs(3, 7)) < 1.5 * most  # not what it was calibrated on


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "quick-gelu"])
def test_an_activation_is_met_to_a_step(activation: str) -> None:
    """GELU and QuickGELU are 0.02 apart at most, which a whole block would hide."""
    function = {
        "gelu": nn.functional.gelu,
        "gelu-tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }[activation]
    takes = int8._Bytes.of(torch.tensor([[-3.0], [1.0]]))
    levels = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = function((levels.float() - takes.zero) * takes.step)
    gives = int8._Bytes.of(torch.stack([expected.amin(0), expected.amax(0)]))
    product = int8.Product(torch.ones(16, 1), torch.zeros(16))
    found = (int8._Int8Product(product, takes, activation, gives)(levels).float() - gives.zero) * gives.step
    assert (found - expected).abs().max() < 0.6 * gives.step
    assert gives.step < 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_it_is_whatever_is_beside_it_and_however_it_lies(kind: str) -> None:
    model, x = _model(kind), _inputs(16, 10)
    narrow = int8.quantized(model, _observed(model, x)[0])
    with torch.inference_mode():
        rows = narrow(x)
        torch.testing.assert_close(narrow(x[5:6]), rows[5:6], atol=1e-5, rtol=1e-5)
        turned = narrow.block(narrow.before(x).transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(turned, rows, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(narrow(1000 * x)).all()  # beyond every range that was seen


@pytest.mark.parametrize("kind", ["ours", "open_clip"])
def test_a_causal_block_stays_causal(kind: str) -> None:
    options: dict[str, Any] = {"causal": True}
    if kind == "open_clip":
        options = {"attn_mask": torch.full((10, 10), float("-inf")).triu(1)}
    model, x = _model(kind), _inputs(8, 10)
    model.options = options
    narrow = int8.quantized(model, _observed(model, x)[0])
    assert _error(narrow, model, x) < 0.03
    later = x.clone()
    later[:, 6:] += 1
    with torch.inference_mode():
        torch.testing.assert_close(narrow(later)[:, :6], narrow(x)[:, :6], atol=1e-5, rtol=1e-5)
    if kind == "open_clip":  # as its CoCa gives one for each head
        narrow.options = {"attn_mask": options["attn_mask"].expand(8 * HEADS, 10, 10)}
        assert _error(narrow, model, x) < 0.03


def test_what_is_not_known_to_the_letter_stays_what_it_is() -> None:
    load_torchvision()
    from open_clip import transformer

    class Mine(Block):
        """Somebody's own."""

    others = [
        Mine(WIDTH, HEADS),
        transformer.CustomResidualAttentionBlock(WIDTH, HEADS),
        transformer.ResidualAttentionBlock(WIDTH, HEADS, is_cross_attention=True),
        transformer.ResidualAttentionBlock(WIDTH, HEADS, act_layer=nn.ReLU),
        transformer.ResidualAttentionBlock(WIDTH, HEADS, batch_first=False),
        _timm(qk_norm=True)(),
        _timm(act_layer=nn.SiLU)(),
        _timm(scale_mlp_norm=True)(),
        nn.TransformerEncoderLayer(WIDTH, HEADS),
    ]
    for block in others:
        assert int8.parts_of(block) is None
        model = _Model(block)
        assert int8.quantized(model, {}).block is not block
        assert type(int8.quantized(model, {}).block) is type(block)
    assert _observed(_Model(nn.ReLU()), _inputs(2, 3))[0] == {}


@pytest.mark.parametrize("kind", ["open_clip", "ours"])
def test_patches_are_cut_from_bytes(kind: str, tmp_path: Any) -> None:
    if kind == "open_clip":
        model = load_model(open_clip_folder(tmp_path / "vit"))
        where = "model.visual.conv1"
    else:
        image = {"name": "vit-tiny", "image_size": 32, "patch_size": 8}
        text = {"vocab_size": 300, "width": WIDTH, "depth": 1, "heads": HEADS}
        model, where = CLIPModel(image=image, text=text, embed_dim=32).eval(), "image_encoder.encoder.trunk.patch"
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ranges = int8.observe(model, lambda copy: copy.encode_image(batch))
        assert [key for key in ranges if key.endswith("/patches")] == [f"{where}/patches"]
        narrow = int8.quantized(model, ranges)
        normalised, exact, patches = (
            model.preprocess.normalize(batch),
            *(each.get_submodule(where) for each in (model, narrow)),
        )
        expected = exact(normalised)
        assert (patches(batch) - expected).norm() / expected.norm() < 0.01
        assert torch.equal(patches(normalised), expected)
        longer = torch.nn.functional.pad(batch, (0, 3, 0, 5))  # of which no whole patch can be cut
        torch.testing.assert_close(patches(longer), patches(batch))
        assert (narrow.encode_image(batch) * model.encode_image(batch)).sum(1).min() > 0.999
        torch.testing.assert_close(narrow.encode_image(normalised), narrow.encode_image(batch), atol=0.02, rtol=0)


def test_a_copy_shares_what_is_not_in_its_blocks(tmp_path: Any) -> None:
    model = load_model(open_clip_folder(tmp_path / "vit"))
    batch = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["a red star", "a blue circle beside a green square"])
    tokens = tokens[:, : int(model.text_lengths(tokens).max())]
    ranges: int8.Ranges = {}
    with torch.inference_mode():
        for encode, inputs in (("encode_image", batch), ("encode_text", tokens)):
            ranges |= int8.observe(model, lambda copy, of=encode, inputs=inputs: getattr(copy, of)(inputs))
        expected = model.encode_image(batch), model.encode_text(tokens)
        narrow = int8.quantized(model, ranges)
        for rows, exact in zip((narrow.encode_image(batch), narrow.encode_text(tokens)), expected, strict=True):
            assert (rows * exact).sum(1).min() > 0.999
    held = {id(parameter) for parameter in narrow.parameters()}
    spare = {id(parameter) for parameter in int8.block_parameters(model)}
    assert len(spare) > 20
    assert held | spare == {id(parameter) for parameter in model.parameters()}
    assert not held & spare


def test_the_last_block_computes_what_is_read() -> None:
    load_torchvision()
    import timm
    from open_clip.transformer import VisionTransformer

    batch = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": 2, "heads": HEADS, "mlp_ratio": 4.0}
    small = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 0}
    towers = {
        "open_clip, tok": VisionTransformer(**options, output_dim=32),
        "open_clip, avg": VisionTransformer(**options, output_dim=32, pool_type="avg"),
        "timm, token": timm.create_model("vit_tiny_patch16_224", **small),
        "timm, avg": timm.create_model("vit_tiny_patch16_224", **small, global_pool="avg"),
    }
    for name, tower in towers.items():
        tower.eval()
        ranges, outputs = _observed(tower, batch)
        narrow = int8.quantized(tower, ranges)
        blocks = [each for each in narrow.modules() if isinstance(each, int8.Int8Block)]
        assert [each.first_only for each in blocks] == [False, "tok" in name], name
        with torch.inference_mode():
            rows = narrow(batch)
            assert torch.cosine_similarity(rows, outputs).min() > 0.999, name
            blocks[-1].first_only = False
            torch.testing.assert_close(narrow(batch), rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["open_clip", "ours"])
def test_texts_are_computed_without_their_padding_and_last_at_their_ends(kind: str, tmp_path: Any) -> None:
    model: Any
    if kind == "open_clip":
        model = load_model(open_clip_folder(tmp_path / "vit"))
        tokens = model.tokenizer(["a red star", "a", "a blue circle beside a green square"])
    else:
        image = {"name": "vit-tiny", "image_size": 32, "patch_size": 8}
        text = {"vocab_size": 300, "width": WIDTH, "depth": 2, "heads": HEADS}
        model = CLIPModel(image=image, text=text, embed_dim=32).eval()
        tokens = torch.tensor([[1, 7, 8, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0], [1, 9, 8, 7, 6, 5, 2, 0]])
    lengths = model.text_lengths(tokens)
    tokens = tokens[:, : int(lengths.max()) + 1]
    with torch.inference_mode():
        ranges = int8.observe(model, lambda copy: copy.encode_text(tokens))
        narrow, seen = int8.quantized(model, ranges), list[int]()
        blocks = [each for each in narrow.modules() if isinstance(each, int8.Int8Block)]
        for block in blocks:
            block.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        rows = narrow.encode_text(tokens)
        assert seen == [int(lengths.sum())] * (len(blocks) - 1) + [3]
        assert (rows * model.encode_text(tokens)).sum(1).min() > 0.999
        for text, length, row in zip(tokens, lengths, rows, strict=True):
            torch.testing.assert_close(narrow.encode_text(text[None, :length])[0], row, atol=1e-5, rtol=1e-5)
        seen.clear()
        many = narrow.encode_text(tokens.repeat(50, 1))
        torch.testing.assert_close(many, rows.repeat(50, 1), atol=1e-5, rtol=1e-5)
        whole = 50 * int(lengths.sum())
        assert whole <= seen[0] <= whole * 31 / 30
        assert seen[-1] == 150
        seen.clear()
        for count in range(1, 51):
            narrow.encode_text(tokens.repeat(count, 1))
        assert len(set(seen[:: len(blocks)])) < 50  # numbers of rows that oneDNN prepares for
