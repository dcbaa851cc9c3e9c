"""Exponential moving averages: of the weights that are exported, and of the targets and key encoders of methods."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def update_ema(average: nn.Module, current: nn.Module, decay: float, *, buffers: bool = True) -> None:
    """average <- decay * average + (1 - decay) * current. buffers: copy those (batch statistics) as they are; a module
    that runs in training mode itself keeps its own."""
    mine, theirs = ([p.detach() for p in module.parameters()] for module in (average, current))
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    if buffers:
        for mean, buffer in zip(average.buffers(), current.buffers(), strict=True):
            mean.copy_(buffer)


def cosine_decay(base: float, progress: float) -> float:
    """From `base` to 1 as progress p goes from 0 to 1: 1 - (1 - base) (cos(pi p) + 1) / 2, arXiv:2006.07733, 3.2."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
