"""The one place that imports torchvision, so that a CUDA wheel of it also works beside a CPU build of torch.

Everything that needs torchvision, open_clip or timm (both import torchvision) calls `load_torchvision()` first.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def load_torchvision() -> Any:
    """Import torchvision and return the module; its pure-Python parts (models, transforms, datasets) are usable.

    A wheel built for CUDA cannot load its compiled operators on a CPU-only torch, and its import then fails on
    the first operator it wants to describe. Declaring these operators' schemas is all that the import needs.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


@functools.cache
def _declare_operators() -> torch.library.Library:
    # The cache keeps the Library object alive: torch drops its definitions when it is collected.
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
