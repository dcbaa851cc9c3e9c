"""What a transformer block computes, read from blocks of ours, of open_clip and of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn


class Product(NamedTuple):
    """x @ weight.T + bias, in float32. weight: (N, C). bias: (N,)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: nn.Module | None = None) -> Self:
        """From a module's parameters, and the one after it that scales each of the N."""
        weight = weight.detach().float()
        bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        gamma: Tensor | None = getattr(scale, "gamma", None)
        return cls(weight, bias) if gamma is None else cls(weight, bias).scaled(gamma.detach().float())

    def scaled(self, gains: Tensor, shifts: Tensor | float = 0.0) -> Self:
        """With each of the N times `gains` plus `shifts`."""
        return type(self)(self.weight * gains[:, None], self.bias * gains + shifts)


class Parts(NamedTuple):
    """What a pre-norm transformer block computes. activation: gelu, gelu-tanh or quick-gelu."""

    heads: int
    norm1: nn.LayerNorm
    qkv: Product
    out: Product
    norm2: nn.LayerNorm
    fc1: Product
    activation: str
    fc2: Product


def parts_of(block: nn.Module) -> Parts | None:
    """What a block computes; None if it is none that is known, or has something in it that Parts does not say."""
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    parts = _KINDS[kind](block) if kind in _KINDS else None
    whole = parts is not None and all(norm.weight is not None for norm in (parts.norm1, parts.norm2))
    return parts if whole else None


def _ours(block: Any) -> Parts:
    attention, (fc1, _, fc2) = block.attention, block.mlp
    return Parts(
        attention.heads,
        block.norm1,
        Product.of(attention.qkv.weight, attention.qkv.bias),
        Product.of(attention.out.weight, attention.out.bias),
        block.norm2,
        Product.of(fc1.weight, fc1.bias),
        "gelu",
        Product.of(fc2.weight, fc2.bias),
    )


def _open_clip(block: Any) -> Parts | None:
    attention, mlp = block.attn, block.mlp
    activation = _activation(mlp.gelu)
    if activation is None or hasattr(block, "ln_1_kv") or not attention.batch_first:
        return None
    return Parts(
        attention.num_heads,
        block.ln_1,
        Product.of(attention.in_proj_weight, attention.in_proj_bias),
        Product.of(attention.out_proj.weight, attention.out_proj.bias, block.ls_1),
        block.ln_2,
        Product.of(mlp.c_fc.weight, mlp.c_fc.bias),
        activation,
        Product.of(mlp.c_proj.weight, mlp.c_proj.bias, block.ls_2),
    )


def _timm(block: Any) -> Parts | None:
    attention, mlp = block.attn, block.mlp
    activation = _activation(mlp.act)
    others = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
    if activation is None or attention.gate is not None or not all(type(each) is nn.Identity for each in others):
        return None
    return Parts(
        attention.num_heads,
        block.norm1,
        Product.of(attention.qkv.weight, attention.qkv.bias),
        Product.of(attention.proj.weight, attention.proj.bias, block.ls1),
        block.norm2,
        Product.of(mlp.fc1.weight, mlp.fc1.bias),
        activation,
        Product.of(mlp.fc2.weight, mlp.fc2.bias, block.ls2),
    )


_KINDS: dict[str, Callable[[Any], Parts | None]] = {
    "models.layers.Block": _ours,
    "open_clip.transformer.ResidualAttentionBlock": _open_clip,
    "timm.models.vision_transformer.Block": _timm,
}


def _activation(module: nn.Module) -> str | None:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu-tanh"
    return "quick-gelu" if type(module).__name__ == "QuickGELU" else None
