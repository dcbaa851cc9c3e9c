"""Discrete image tokenizers: pictures to a grid of codes and back, with one of three quantizers between the halves.

fsq: finite scalar quantization (arXiv:2309.15505), which trains best on small budgets; vq: l2-normalised codes
(arXiv:1711.00937, arXiv:2110.04627); gumbel: the relaxation of DALL-E's dVAE (arXiv:2102.12092).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.preprocess import Preprocess

LAPLACE_MARGIN = 0.1  # epsilon of arXiv:2102.12092, appendix A.3: pixels are kept this far from 0 and 1


class Quantizer(nn.Module, ABC):
    """What turns features into codes. inputs: channels it takes, outputs: channels it gives, codes: how many there are.

    forward: (B, inputs, H, W) -> values (B, outputs, H, W) with a gradient, codes int64 (B, H, W).
    """

    inputs: int
    outputs: int
    codes: int

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, H, W) -> values (B, outputs, H, W)."""


class FSQ(Quantizer):
    """Finite scalar quantization: each channel is bounded and rounded to one of its levels (arXiv:2309.15505, 3.1).

    The codebook is the product of the levels: nothing is learned in it and nothing of it can collapse. Rounding passes
    the gradient straight through.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int] = (8, 8, 8)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels {list(levels)}: every channel needs at least 2")
        self.inputs = self.outputs = len(levels)
        self.codes = math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.levels.view(-1, 1, 1)
        # An even number of levels is moved by a half, so that rounding gives them all and 0 is between two of them.
        reach, offset = (levels - 1) * (1 + 1e-3) / 2, 0.5 * (levels % 2 == 0)
        bounded = torch.tanh(features + torch.atanh(offset / reach)) * reach - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        places = rounded.detach().long() + levels // 2
        return rounded / (levels // 2), (places * self.basis.view(-1, 1, 1)).sum(1)

    def lookup(self, codes: Tensor) -> Tensor:
        levels = self.levels.view(-1, 1, 1)
        places = codes[:, None] // self.basis.view(-1, 1, 1) % levels
        return (places - levels // 2) / (levels // 2)


class VQ(Quantizer):
    """The nearest of learned codes by cosine, both sides of unit length (arXiv:2110.04627, section 3.1).

    The gradient passes straight through. Codes are no parameters: training moves them to the mean of what they stand
    for (arXiv:1711.00937, appendix A.1).
    """

    codebook: Tensor

    def __init__(self, codes: int = 512, dim: int = 32) -> None:
        super().__init__()
        self.inputs = self.outputs = dim
        self.codes = codes
        self.register_buffer("codebook", F.normalize(torch.randn(codes, dim), dim=-1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(features, dim=1)
        codes = torch.einsum("bdhw,kd->bkhw", unit, self.codebook.to(unit.dtype)).argmax(1)
        return unit + (self.lookup(codes) - unit).detach(), codes

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].permute(0, 3, 1, 2)


class Gumbel(Quantizer):
    """A categorical code at each place, drawn through the Gumbel-softmax relaxation (arXiv:1611.01144) while training,
    the most likely one else. features are logits. temperature: of the relaxation, lowered by the training."""

    temperature: Tensor

    def __init__(self, codes: int = 512, dim: int = 128) -> None:
        super().__init__()
        self.inputs, self.outputs, self.codes = codes, dim, codes
        self.codebook = nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        codes = features.argmax(1)
        if not self.training:
            return self.lookup(codes), codes
        noise = -torch.empty_like(features).exponential_().log()
        shares = ((features + noise) / self.temperature).softmax(1)
        return torch.einsum("bkhw,kd->bdhw", shares, self.codebook.to(shares.dtype)), codes

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].permute(0, 3, 1, 2)


QUANTIZERS: dict[str, type[Quantizer]] = {"fsq": FSQ, "vq": VQ, "gumbel": Gumbel}


class _Residual(nn.Module):
    """Two 3x3 convolutions on normalised features, added to them. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(channels, 8)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        nn.init.zeros_(self.conv2.weight)  # starts as its skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class DiscreteVAE(nn.Module):
    """Pictures to codes and back. encode: images -> codes int64 (B, H', W'). decode: codes -> images in 0..1.

    H' = W' = image_size / 2^len(channels). channels: at each halving of the side, blocks: residual blocks there.
    quantizer: {"name": "fsq", "levels": [...]}, or "vq" or "gumbel" with "codes" and "dim". output: "pixels", or
    "laplace" for the mean and scale of the logit-Laplace distribution (arXiv:2102.12092, appendix A.3).
    forward: normalised images -> output (B, 3 or 6, S, S), features, codes, for the training. Raises ValueError.
    """

    architecture = "dvae"

    def __init__(
        self,
        *,
        image_size: int = 64,
        quantizer: dict[str, Any] | None = None,
        channels: Sequence[int] = (64, 128),
        blocks: Sequence[int] = (0, 2),
        output: Literal["pixels", "laplace"] = "pixels",
    ) -> None:
        super().__init__()
        quantizer = dict(quantizer or {"name": "fsq"})
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "quantizer": dict(quantizer),
            "channels": list(channels),
            "blocks": list(blocks),
            "output": output,
        }
        if len(channels) != len(blocks) or not channels or image_size % 2 ** len(channels):
            raise ValueError(
                f"channels {list(channels)} and blocks {list(blocks)} need one number for each halving, and image_size "
                f"{image_size} must be a multiple of {2 ** len(channels)}"
            )
        name = quantizer.pop("name", None)
        if name not in QUANTIZERS or output not in ("pixels", "laplace"):
            raise ValueError(
                f"quantizer {name!r} must be one of {', '.join(QUANTIZERS)}, output {output!r} pixels or laplace"
            )
        self.quantizer = QUANTIZERS[name](**quantizer)
        self.grid = image_size // 2 ** len(channels)
        down: list[nn.Module] = []
        up: list[nn.Module] = [nn.Conv2d(self.quantizer.outputs, channels[-1], 3, 1, 1)]
        for before, width, count in zip((3, *channels), channels, blocks, strict=False):
            down += [nn.Conv2d(before, width, 4, 2, 1), *(_Residual(width) for _ in range(count))]
        outside = (3 if output == "pixels" else 6, *channels)
        for before, width, count in reversed(list(zip(outside, channels, blocks, strict=False))):
            up += [*(_Residual(width) for _ in range(count)), nn.SiLU()]
            up += [nn.Conv2d(width, 4 * before, 3, 1, 1), nn.PixelShuffle(2)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(channels[-1], self.quantizer.inputs, 1))
        self.decoder = nn.Sequential(*up)
        self.preprocess = Preprocess(size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.tokenizer = None
        self.provenance: dict[str, Any] = {}
        self.fingerprint = ""

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.quantizer.codes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoder(images)
        values, codes = self.quantizer(features)
        return self.decoder(values), features, codes

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (normalised here) or already normalised float (B, 3, S, S) -> codes int64 (B, H', W')."""
        return self.quantizer(self.encoder(self.preprocess.normalize(images)))[1]

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (B, H', W') -> float (B, 3, S, S) in 0..1. Raises ValueError for a code that does not exist."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} given, 0 to {self.codes - 1} exist")
        return self.pixels(self.decoder(self.quantizer.lookup(codes)))

    def pixels(self, output: Tensor) -> Tensor:
        """The decoder's output -> float (B, 3, S, S) in 0..1: its mean, where it is a distribution."""
        if self.config["output"] == "laplace":
            # phi^-1 of eq. 3: the logit's mean, taken back from the margins.
            return ((output[:, :3].sigmoid() - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN)).clamp(0, 1)
        return (output * 0.5 + 0.5).clamp(0, 1)
