"""What the trainer needs to know of a method, and how the methods of this package are found."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import field
from types import ModuleType
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class Method(nn.Module, ABC):
    """A training method: SimCLR, MoCo, BYOL, CLIP, dVAE or DALL-E. The trainer, and DDP, see one module."""

    exported = "model"  # the attribute that is kept, by its dotted name: an object of a class from `models`
    sync_batch_norm = True  # statistics of the whole batch where several GPUs share it
    kept_whole: tuple[str, ...] = ()  # submodules that are used outside of `forward`, which no process has a share of

    def prepare(self, batch: Batch) -> Batch:
        """What is drawn at random on the device, such as views; before `forward` and never compiled with it."""
        return batch

    @abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """Named scalars; "loss" is minimised. "embeddings" (B, D), if given, feeds the collapse monitor."""

    def after_step(self, progress: float) -> None:
        """After every optimizer step, progress 0 -> 1: EMA, queues, clamps and annealing belong here."""

    def export(self) -> nn.Module:
        """The part that is kept."""
        return self.get_submodule(self.exported)


def option(default: Any, help: str) -> Any:
    """A field of an options dataclass; the command line shows `help`."""
    metadata = {"help": help}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def discover() -> dict[str, ModuleType]:
    """Every method's module by name: the folder `training/methods` is the catalogue.

    A module offers `Options` (a dataclass whose docstring is the help), `presets()` (name -> Options) and
    `train(options)` (-> the checkpoint folder).
    """
    package = importlib.import_module("training.methods")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"training.methods.{name}") for name in names}
