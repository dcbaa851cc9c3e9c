"""Batched augmentations, on the device the batch is on; every image has its own parameters.

Parameters are sampled first (`sample_parameters`) and applied after (`apply_parameters`), so that the same draw can be
replayed. One resampling does crop, flip, turn and scale together; one 3x3 matrix an image does the colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rec. 601 luma, the grey of PIL and torchvision.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """How strongly each image is changed; a probability or the end of a uniform range.

    scale: range of the crop's share of the area; above 1 the picture shrinks onto the background. ratio: range of the
    crop's aspect (log-uniform). flip: probability of a horizontal flip. turn: degrees either way. brightness, contrast,
    saturation: factors from 1-x to 1+x. hue: turns of the colour circle either way, in YIQ. grayscale: probability.
    background: probability that transparent parts lie on a random colour in place of white. collage: probability that
    one side of the picture, about half of it, shows another of the same batch (CutMix, arXiv:1905.04899).
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    turn: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    background: float = 0.0
    collage: float = 0.0


@dataclass(frozen=True)
class Parameters:
    """What was drawn for B images: affine (B, 2, 3) from output to input, colour (B, 3, 3) and offset (B, 3) in 0..1,
    contrast (B,), background (B, 3) in 0..1."""

    affine: Tensor
    colour: Tensor
    brightness: Tensor
    contrast: Tensor
    background: Tensor


def augment(images: Tensor, size: int, recipe: Augmentation, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3 or 4, H, W), the fourth channel being opacity -> uint8 (B, 3, size, size)."""
    return apply_parameters(images, size, sample_parameters(len(images), recipe, generator))


def sample_parameters(count: int, recipe: Augmentation, generator: torch.Generator) -> Parameters:
    """Draw the parameters of `count` images, on the generator's device."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device) < probability

    side = uniform(*recipe.scale).sqrt()
    aspect = uniform(math.log(recipe.ratio[0]), math.log(recipe.ratio[1])).exp().sqrt()
    width, height = side * aspect, side / aspect
    # Where the crop is smaller than the picture its centre keeps it inside; where it is larger, the picture inside it.
    shift_x, shift_y = uniform(-1, 1) * (1 - width).abs(), uniform(-1, 1) * (1 - height).abs()
    angle = uniform(-recipe.turn, recipe.turn) * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    width = torch.where(chance(recipe.flip), -width, width)
    rows = [width * cos, -height * sin, shift_x, width * sin, height * cos, shift_y]
    white = torch.ones(count, 3, device=generator.device)
    random = torch.rand(count, 3, generator=generator, device=generator.device)
    return Parameters(
        affine=torch.stack(rows, 1).view(count, 2, 3),
        colour=_colour_matrix(
            torch.where(chance(recipe.grayscale), 0.0, uniform(1 - recipe.saturation, 1 + recipe.saturation)),
            uniform(-recipe.hue, recipe.hue) * math.tau,
        ),
        brightness=uniform(1 - recipe.brightness, 1 + recipe.brightness),
        contrast=uniform(1 - recipe.contrast, 1 + recipe.contrast),
        background=torch.where(chance(recipe.background)[:, None], random, white),
    )


def apply_parameters(images: Tensor, size: int, parameters: Parameters) -> Tensor:
    """uint8 (B, 3 or 4, H, W) -> uint8 (B, 3, size, size). Outside of the picture lies its background."""
    pixels = images.float() / 255
    background = parameters.background[:, :, None, None]
    if images.shape[1] == 3:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    # Colours are premultiplied by opacity, so that hidden colours don't bleed into edges.
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    grid = F.affine_grid(parameters.affine, [len(images), 4, size, size], align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False)
    moved = moved[:, :3] + (1 - moved[:, 3:]) * background
    coloured = torch.einsum("bij,bjhw->bihw", parameters.colour, moved) * parameters.brightness.view(-1, 1, 1, 1)
    mean = coloured.mean((1, 2, 3), keepdim=True)
    coloured = (coloured - mean) * parameters.contrast.view(-1, 1, 1, 1) + mean
    return coloured.mul(255).round().clamp(0, 255).byte()


def collage(images: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some pictures with a strip, two to three fifths wide or high, of another, in its place. (B, C, H, W) -> the same
    shape, and for each the row that the strip is of, its own where there is none: int64 (B,).

    The strip is about a half, so that both pictures are shown alike and no share needs to be kept; CutMix draws it
    uniformly.
    """

    def drawn() -> Tensor:
        return torch.rand(len(images), generator=generator, device=generator.device)

    rows = torch.arange(len(images), device=images.device)
    others = torch.where(drawn() < probability, torch.randperm(len(images), generator=generator), rows)
    share, turned, upright = 0.4 + 0.2 * drawn(), drawn() < 0.5, drawn() < 0.5
    height, width = images.shape[-2:]
    across = ((torch.arange(width) + 0.5) / width).view(1, 1, -1)
    along = ((torch.arange(height) + 0.5) / height).view(1, -1, 1)
    place = torch.where(upright.view(-1, 1, 1), along, across)
    strip = torch.where(turned.view(-1, 1, 1), 1 - place, place) < share.view(-1, 1, 1)
    return torch.where(strip[:, None], images[others], images), others


def _colour_matrix(saturation: Tensor, hue: Tensor) -> Tensor:
    """Saturation and hue as one matrix: scale and turn the chroma plane of YIQ. (B,), (B,) -> (B, 3, 3)."""
    to_yiq = torch.tensor([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], device=hue.device)
    cos, sin, zero, one = saturation * hue.cos(), saturation * hue.sin(), torch.zeros_like(hue), torch.ones_like(hue)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
