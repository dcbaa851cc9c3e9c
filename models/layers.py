"""Transformer parts shared by the encoders. Shapes: B batch, L length, D width, H heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762, eq. 1). (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split over {heads} heads; choose heads that divide it")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of four times the width. (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attention(self.norm1(x), causal)
        return x + self.mlp(self.norm2(x))


def read_at(blocks: nn.ModuleList, x: Tensor, ends: Tensor, **options: Any) -> Tensor:
    """Blocks that read from left to right, over texts (B, L, D), and what they give at each text's end, int64 (B,):
    (B, D). What follows an end is padding, which `blocks` may leave out by a `read_at` of their own (app/int8.py).

    options: what each block is called with.
    """
    if (own := getattr(blocks, "read_at", None)) is not None:
        rows: Tensor = own(x, ends)
        return rows
    for block in blocks:
        x = block(x, **options)
    return x[torch.arange(x.shape[0], device=x.device), ends]


def init_transformer(module: nn.Module, depth: int, std: float = 0.02) -> None:
    """GPT-2's initialisation: normal weights, zero biases, residual outputs scaled by 1/sqrt(2 depth)."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        residual = name.endswith(("out.weight", "mlp.2.weight"))
        nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if residual else std)
    for child in module.modules():
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
