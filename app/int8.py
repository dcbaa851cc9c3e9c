"""Transformer blocks in int8 by the oneDNN that torch brings: the backend `torch-int8`.

A block's four products of matrices take bytes and give float32. The scales and shifts that make bytes are known from a
calibration set and folded into what comes before: the layer norms' weights, the weights that give the attention's
values (the attention's own sum to one, so a shift passes through), and the scale at which the MLP's first product is
written. So a running block only rounds. A tensor's channels differ in range; they are levelled first (SmoothQuant,
arXiv:2211.10438, eq. 4 with alpha 1/2), which is folded the same way. Pictures are bytes to begin with: what cuts them
into patches takes them as they are, and has in its weights what normalises them.

Blocks of ours, of open_clip and of timm are known (app/blocks.py); a block of another kind stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.blocks import Parts, Product, parts_of
from models.preprocess import Preprocess

# "block/product" -> (2, C): the least and the greatest of each channel of what it takes. "module/patches", empty: this
# convolution cuts the normalised pictures into patches.
Ranges = dict[str, Tensor]
_TINY = 1e-5
# name -> (function, oneDNN's name and algorithm of it, what the product before is multiplied by to be able to use that)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str], float]] = {
    "gelu": (F.gelu, ("gelu", "none"), 1.0),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), ("gelu", "tanh"), 1.0),
    "quick-gelu": (lambda x: x * torch.sigmoid(1.702 * x), ("swish", ""), 1.702),
}


# Not called from Python, for what records a model knows no lists of `number` (app/recording.py).
_ONEDNN = torch.jit.CompilationUnit("""
def product(x: Tensor, step: float, zero: int, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor,
            to_step: float, to_zero: int, to: int, after: str, algorithm: str) -> Tensor:
    no: List[Optional[number]] = []
    return torch.ops.onednn.qlinear_pointwise(
        x, step, zero, packed, scales, zeros, bias, to_step, to_zero, to, after, no, algorithm)

def product_added(x: Tensor, step: float, zero: int, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor,
                  other: Tensor) -> Tensor:
    no: List[Optional[number]] = []
    return torch.ops.onednn.qlinear_pointwise(
        x, step, zero, packed, scales, zeros, other, bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", no, "")
""")


def observe(model: nn.Module, run: Callable[[Any], object]) -> Ranges:
    """What the products of a model's blocks take while `run` computes with the model; empty if it has no such block."""
    ranges: Ranges = {}
    copy = _with_blocks(model, lambda name, parts: _Observed(name, parts, ranges))
    if isinstance(preprocess := getattr(model, "preprocess", None), Preprocess):
        copy.preprocess = watched = _Watched(preprocess)
        for name, module in copy.named_modules():
            if _cuts_patches(module):
                module.register_forward_pre_hook(partial(_see_pictures, f"{name}/patches", watched, ranges))
    run(copy)
    return ranges if any(key.endswith("/qkv") for key in ranges) else {}


def quantized(model: Any, ranges: Mapping[str, Tensor]) -> Any:
    """A copy of a model that shares its other weights, with every block in int8 that there are ranges of.

    Where a tower reads one token alone, its last block computes no others; and none computes what pads a text.
    """
    copy = _with_blocks(model, lambda name, parts: Int8Block(name, parts, ranges) if f"{name}/qkv" in ranges else None)
    for module in list(copy.modules()):
        if isinstance(last := _last_before_first_token(module), Int8Block):
            last.first_only = True
        holder, name = _text_blocks(module)
        if name and all(isinstance(each, Int8Block) for each in getattr(holder, name)):
            setattr(holder, name, _TextBlocks(getattr(holder, name)))
    for key in ranges:
        name, _, what = key.partition("/")
        if what == "patches":
            _replace(copy, name, _Patches(copy.get_submodule(name), model.preprocess))
            copy.preprocess = _AsTheyAre(model.preprocess)
    return copy


def block_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that a quantized copy does not share."""
    for module in model.modules():
        if parts_of(module) is not None:
            yield from module.parameters()


def supported() -> bool:
    """Whether this processor multiplies bytes exactly: without VNNI it adds pairs of products in 16 bits."""
    return bool(torch.cpu._is_vnni_supported())


def _with_blocks(model: nn.Module, replacement: Callable[[str, Parts], nn.Module | None]) -> Any:
    shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared)
    for name, module in list(copy.named_modules()):
        if (parts := parts_of(module)) is not None and (block := replacement(name, parts)) is not None:
            _replace(copy, name, block)
    return copy


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _Watched:
    """A model's preprocess that keeps what it normalised last."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.pictures: Tensor | None = None

    def normalize(self, images: Tensor) -> Tensor:
        self.pictures = self.preprocess.normalize(images)
        return self.pictures


class _AsTheyAre:
    """In the place of a preprocess, where _Patches normalises."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.size = preprocess.size

    def normalize(self, images: Tensor) -> Tensor:
        return images


def _cuts_patches(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.in_channels == 3
        and module.stride == module.kernel_size
        and (module.padding, module.dilation, module.groups) == ((0, 0), (1, 1), 1)
    )


def _see_pictures(key: str, watched: _Watched, ranges: Ranges, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0] is watched.pictures:
        ranges[key] = torch.empty(0)


class _Patches(nn.Module):
    """What cuts pictures into patches and takes each to a token, of bytes. uint8 (B, 3, H, W) -> float32 (B, N, h, w).

    A float batch is taken as normalised, as everywhere.
    """

    def __init__(self, conv: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.conv, self.side = conv, conv.kernel_size
        # W ((x / 255 - mean) / std) + b = (W / (255 std)) x + b - W (mean / std)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocess.mean, preprocess.std))
        weight = conv.weight.detach().float()
        shift = (weight * mean / std).sum((1, 2, 3))
        weight = (weight / (255 * std)).flatten(1)
        bias = -shift if conv.bias is None else conv.bias.detach().float() - shift
        self.product = _Int8Product(Product(weight, bias), _Bytes(torch.ones(weight.shape[1]), 1.0, 0))

    def forward(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            tokens: Tensor = self.conv(images)
            return tokens
        height, width = self.side
        rows, columns = images.shape[2] // height, images.shape[3] // width
        cut = (
            images[..., : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
        )
        tokens = self.product(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class _Replacement(nn.Module):
    """A block as its model calls it."""

    def get_weight_dtype(self) -> torch.dtype:
        """What open_clip casts a block's input to."""
        return torch.float32


class _Observed(_Replacement):
    """A block in float32 that notes the ranges of what its products take."""

    def __init__(self, name: str, parts: Parts, ranges: Ranges) -> None:
        super().__init__()
        self.name, self.parts, self.ranges = name, parts, ranges

    def forward(self, x: Tensor, causal: bool = False, attn_mask: Tensor | None = None) -> Tensor:
        parts = self.parts
        mixed = _attention(self._see("qkv", parts.norm1(x)), parts.heads, causal, attn_mask)
        x = x + self._see("out", mixed)
        activation, _, _ = _ACTIVATIONS[parts.activation]
        return x + self._see("fc2", activation(self._see("fc1", parts.norm2(x))))

    def _see(self, product: str, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x.flatten(0, -2), dim=0)
        key = f"{self.name}/{product}"
        known = self.ranges.get(key, torch.stack([low, high]))
        self.ranges[key] = torch.stack([torch.minimum(known[0], low), torch.maximum(known[1], high)])
        return F.linear(x, *getattr(self.parts, product))


class Int8Block(_Replacement):
    """A block in int8. float (B, L, D) -> float32 (B, L, D), or (B, 1, D) if it is to give the first token only."""

    def __init__(self, name: str, parts: Parts, ranges: Mapping[str, Tensor]) -> None:
        super().__init__()
        taken = {each: ranges[f"{name}/{each}"] for each in ("qkv", "out", "fc1", "fc2")}
        qkv, out, fc1 = (_Bytes.of(taken[each], getattr(parts, each).weight) for each in ("qkv", "out", "fc1"))
        fc2 = _Bytes.of(taken["fc2"])
        as_they_are = torch.ones(2 * len(out.gains))  # queries and keys; the values are what `out` takes
        shifts = torch.full_like(out.gains, out.shift)
        values = parts.qkv.scaled(torch.cat([as_they_are, out.gains]), torch.cat([0 * as_they_are, shifts]))
        self.heads, self.first_only = parts.heads, False
        self.norm1, self.qkv = _ByteNorm(parts.norm1, qkv), _Int8Product(values, qkv)
        self.out = _Int8Product(parts.out, out)
        self.norm2, self.fc1 = _ByteNorm(parts.norm2, fc1), _Int8Product(parts.fc1, fc1, parts.activation, fc2)
        self.fc2 = _Int8Product(parts.fc2, fc2)

    def forward(self, x: Tensor, causal: bool = False, attn_mask: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = x.float()
            length = 1 if self.first_only else x.shape[1]
            mixed = _attention(self.qkv(self.norm1(x)), self.heads, causal, attn_mask, length)
            return self.after(mixed, x[:, :length].contiguous())  # oneDNN adds rows as they lie

    def after(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What follows the attention: its rows, which are overwritten, and those that the block was given."""
        x = self.out.added(_to_bytes(mixed), x)
        return self.fc2.added(self.fc1(self.norm2(x)), x)


class _TextBlocks(nn.ModuleList):
    """The Int8Blocks of a text encoder that reads from left to right."""

    def read_at(self, x: Tensor, ends: Tensor) -> Tensor:
        """As models.layers.read_at. Texts lie one behind the other, but for attention, and padding is left out."""
        length = x.shape[1]
        inside = (torch.arange(length) <= ends[:, None]).flatten()
        spread = inside.cumsum(0) - 1  # for each place, which token stands there; in padding the last one
        places = inside.nonzero().flatten()
        # oneDNN prepares for each number of rows that it has not seen of late, so long batches are filled up to one of
        # a few, at most a thirtieth larger.
        places = F.pad(places, (0, -places.shape[0] % (1 + places.shape[0] // 32)))
        with torch.autocast("cpu", enabled=False):
            x = x.float().flatten(0, 1).index_select(0, places)
            for number, block in enumerate(cast("Iterable[Int8Block]", self)):
                qkv = block.qkv(block.norm1(x)).index_select(0, spread).unflatten(0, (-1, length))
                mixed = _attention(qkv, block.heads, True, None).flatten(0, 1)
                if number == len(self) - 1:
                    x = x.index_select(0, (ends + 1).cumsum(0) - 1)
                    places = torch.arange(ends.shape[0]) * length + ends
                x = block.after(mixed.index_select(0, places), x)
        return x


class _Bytes(NamedTuple):
    """How channels become bytes: x * gains + shift, cut off. levels: (C,), what is divided by before one step for all.

    shift: half a step above `zero`, for bytes are cut off and not rounded.
    """

    levels: Tensor
    step: float
    zero: int

    @classmethod
    def of(cls, ranges: Tensor, weight: Tensor | None = None) -> Self:
        """weight: (N, C), that will take them: its channels are levelled with theirs. Without, no channel is."""
        levels = torch.ones(ranges.shape[1])
        if weight is not None:
            levels = (ranges.abs().amax(0).clamp(min=_TINY) / weight.abs().amax(0).clamp(min=_TINY)).sqrt()
        low, high = (min(0.0, float((ranges / levels).min())), max(0.0, float((ranges / levels).max())))
        step = max(high - low, _TINY) / 255
        return cls(levels, step, round(-low / step))

    @property
    def gains(self) -> Tensor:
        return 1 / (self.levels * self.step)

    @property
    def shift(self) -> float:
        return self.zero + 0.5


def _to_bytes(x: Tensor) -> Tensor:
    """What is scaled and shifted already -> uint8; overwrites x."""
    return x.clamp_(0, 255).to(torch.uint8)


class _ByteNorm(nn.Module):
    """A layer norm that gives bytes."""

    def __init__(self, norm: nn.LayerNorm, to: _Bytes) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        bias = 0.0 if norm.bias is None else norm.bias.detach().float()
        self.weight, self.bias = norm.weight.detach().float() * to.gains, bias * to.gains + to.shift

    def forward(self, x: Tensor) -> Tensor:
        return _to_bytes(F.layer_norm(x, self.shape, self.weight, self.bias, self.eps))


class _Int8Product(nn.Module):
    """A product of bytes: a scale for each of its N rows of weights. uint8 (..., C) -> float32 (..., N).

    With an activation it gives bytes, such as `gives` says.
    """

    def __init__(
        self, product: Product, takes: _Bytes, activation: str | None = None, gives: _Bytes | None = None
    ) -> None:
        super().__init__()
        gain = 1.0
        self.takes = takes.step, takes.zero
        self.gives: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32)
        self.after = ("none", "")
        if activation is not None and gives is not None:
            _, (name, algorithm), gain = _ACTIVATIONS[activation]
            self.gives, self.after = (gives.step * gain, gives.zero, torch.uint8), (name, algorithm)
        weight, bias = product.weight * takes.levels * gain, product.bias * gain
        scales = weight.abs().amax(1).clamp(min=_TINY * _TINY) / 127
        packed = torch.ops.onednn.qlinear_prepack((weight / scales[:, None]).round().to(torch.int8), None)
        self.register_buffer("packed", packed)  # a record takes no tensor of this kind for a constant
        self.weights = scales, torch.zeros(len(scales), dtype=torch.int64), bias

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = _ONEDNN.product(x, *self.takes, self.packed, *self.weights, *self.gives, *self.after)
        return rows

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """Its rows plus float32 (..., N), in one pass."""
        rows: Tensor = _ONEDNN.product_added(x, *self.takes, self.packed, *self.weights, other)
        return rows


def _attention(qkv: Tensor, heads: int, causal: bool, attn_mask: Tensor | None, length: int | None = None) -> Tensor:
    """Queries, keys and values (B, L, 3 D) -> (B, L, D), or of the first `length` tokens.

    attn_mask: added, (L, L) or (B * H, L, L).
    """
    queries, keys, values = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    if length is not None:
        queries, attn_mask = queries[:, :, :length], None if attn_mask is None else attn_mask[..., :length, :]
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def _text_blocks(module: Any) -> tuple[Any, str]:
    """Where a text encoder that models.layers.read_at reads has its blocks: their holder, and the name there."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == "models.clip.CLIPTextEncoder":
        return module, "blocks"
    if kind in ("open_clip.model.CLIP", "open_clip.transformer.TextTransformer"):
        return module.transformer, "resblocks"
    return None, ""


def _last_before_first_token(module: Any) -> nn.Module | None:
    """The last block of a tower that gives what its first token has become."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == "open_clip.transformer.VisionTransformer":
        alone = module.pool_type == "tok" and module.attn_pool is None and not module.output_tokens
        return module.transformer.resblocks[-1] if alone else None
    if kind == "timm.models.vision_transformer.VisionTransformer":
        return module.blocks[-1] if module.global_pool == "token" and module.attn_pool is None else None
    return None
