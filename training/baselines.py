"""What an image encoder's figures are to be read beside: the same network untrained, and the pixels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import DataError
from models.preprocess import Preprocess
from models.vision import EncoderModel
from training.figures import evaluate_model


class RawPixels(nn.Module):
    """Pictures as their own features. uint8 or normalised (B, 3, S, S) -> unit rows (B, 3 side^2).

    preprocess: as of the model beside. side: larger pictures are averaged down to it, which a linear probe can still
    fit.
    """

    tokenizer = None

    def __init__(self, preprocess: Preprocess, side: int = 32) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.side = min(side, preprocess.size)
        self.embed_dim = 3 * self.side**2
        self.device_of = nn.Parameter(torch.empty(0))  # models are asked for the device of their parameters

    def encode_image(self, images: Tensor) -> Tensor:
        pixels = F.adaptive_avg_pool2d(self.preprocess.normalize(images), self.side)
        return F.normalize(pixels.flatten(1), dim=-1)


def baseline_figures(model: Any, data: Sequence[str], data_root: str | None = None, seed: int = 0) -> dict[str, float]:
    """kNN and linear accuracy of the model's network with fresh random weights ("untrained_...") and of raw pixels
    ("pixels_..."), as evaluate_model measures the model itself. Raises DataError for a model that is no EncoderModel.
    """
    if not isinstance(model, EncoderModel):
        raise DataError("only models that encode images alone have baselines; leave --baselines out")
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    untrained = EncoderModel(**deepcopy(model.config)).eval().to(device)
    untrained.preprocess = model.preprocess
    return {
        f"{name}_{figure}": value
        for name, beside in (("untrained", untrained), ("pixels", RawPixels(model.preprocess).to(device)))
        for figure, value in evaluate_model(beside, data, data_root, seed).items()
    }
