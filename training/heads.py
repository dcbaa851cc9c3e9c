"""Projectors, predictors and the batch norms of methods; all of it is dropped after training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision import ImageEncoder


def mlp(sizes: Sequence[int], *, last_norm: bool = False) -> nn.Sequential:
    """Linear layers of these sizes with batch norm and ReLU between them. (B, sizes[0]) -> (B, sizes[-1]).

    last_norm: batch norm without scale and shift after the last one too, as MoCo v3 has it.
    """
    layers: list[nn.Module] = []
    for index, (wide, out) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(wide, out, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*layers)


class ProjectedEncoder(nn.Module):
    """Encoder and projector. images (B, 3, S, S) -> features (B, sizes[0]), projections (B, sizes[-1]).

    encoder: a model with `feature_dim`, or the name of an ImageEncoder, which then is made for image_size. widths: of
    the projector's layers after the features, 0 for that of the features.
    """

    def __init__(
        self, encoder: nn.Module | str, image_size: int, widths: Sequence[int], *, last_norm: bool = False
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = ImageEncoder(encoder, image_size) if isinstance(encoder, str) else encoder
        features = int(self.encoder.feature_dim)  # type: ignore[arg-type]
        self.projector = mlp((features, *(width or features for width in widths)), last_norm=last_norm)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        return features, self.projector(features)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of a part of the batch, as if `splits` devices had a part each.

    Row i belongs to part i mod splits. (B, C, H, W) -> the same. It keeps one device from telling positives from
    negatives by statistics they share (arXiv:1911.05722, section 3.3). Raises ValueError if B is no multiple of splits.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, splits: int) -> None:
        super().__init__(channels)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(input)
        count, channels, height, width = input.shape
        if count % self.splits:
            raise ValueError(f"a batch of {count} does not split into {self.splits} parts of batch norm")
        parts = input.reshape(count // self.splits, self.splits * channels, height, width)
        mean, variance = (self._repeated(x) for x in (self.running_mean, self.running_var))
        weight, bias = (self._repeated(x) for x in (self.weight, self.bias))
        out = F.batch_norm(parts, mean, variance, weight, bias, True, self.momentum or 0.1, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(self.splits, channels).mean(0))
            self.running_var.copy_(variance.view(self.splits, channels).mean(0))
            self.num_batches_tracked.add_(1)
        return out.view(count, channels, height, width)

    def _repeated(self, values: Tensor) -> Tensor:
        return values.repeat(self.splits)


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """The module with every BatchNorm2d in it split; its weights stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            part = SplitBatchNorm2d(child.num_features, splits)
            part.load_state_dict(child.state_dict())
            setattr(module, name, part)
        else:
            split_batch_norm(child, splits)
    return module
