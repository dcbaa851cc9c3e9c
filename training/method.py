"""What the trainer needs to know of a method, and how the methods of this package are found."""

from __future__ import annotations

import importlib
import operator
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import field, fields
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


# What a bound of an option is called, and whether a value keeps it; NaN keeps none.
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A field of an options dataclass; the command line shows `help`. bounds: least, above, most, below."""
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_bounds(options: Any) -> None:
    """Whether every value of an options dataclass keeps its bounds. Raises ValueError by the option's name."""
    for item in fields(options):
        given = getattr(options, item.name)
        bounds = item.metadata.get("bounds", {})
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and (wanted := unkept(value, bounds)):
                raise ValueError(f"--{item.name.replace('_', '-')} {value}: must be {wanted}")


def unkept(value: float, bounds: Mapping[str, float]) -> str:
    """What a value must be that does not keep these bounds; nothing for one that does."""
    if all(_BOUNDS[bound][1](value, limit) for bound, limit in bounds.items()):
        return ""
    return " and ".join(f"{_BOUNDS[bound][0]} {limit}" for bound, limit in bounds.items())


def discover() -> dict[str, ModuleType]:
    """Every method's module by name: the folder `training/methods` is the catalogue.

    A module offers `Options` (a dataclass whose docstring is the help), `presets()` (name -> Options) and
    `train(options)` (-> the checkpoint folder).
    """
    package = importlib.import_module("training.methods")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"training.methods.{name}") for name in names}
