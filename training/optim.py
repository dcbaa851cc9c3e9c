"""Optimizers, their parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from training.sharding import by_kind

OPTIMIZERS = ("adamw", "lars", "sgd")


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate at a step: linear from 1/warmup up to 1, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizer(module: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters; one-dimensional ones (norms, biases, scales) are not decayed.

    adamw: betas 0.9, 0.98 (arXiv:2103.00020, table 18). sgd: momentum 0.9. lars: see LARS. Else ValueError.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    groups = [{**group, "params": kind} for group in groups for kind in by_kind(group["params"])]
    if name == "lars":
        return LARS(groups, lr)
    for group in groups:
        group.pop("adapt", None)
    if name == "adamw":
        fused = all(parameter.device.type == "cuda" for parameter in trainable) or None
        return torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), eps=1e-6, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (arXiv:1708.03888, algorithm 1) with momentum, as SimCLR and BYOL use it.

    Groups with adapt=False (norms and biases) take plain SGD steps. trust: eta of the paper.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient.add(parameter, alpha=group["weight_decay"])
        if group["adapt"]:
            size, slope = parameter.norm(), gradient.norm()
            ratio = group["trust"] * size / (slope + group["weight_decay"] * size + 1e-8)
            update = update * torch.where((size > 0) & (slope > 0), ratio, torch.ones_like(ratio))
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(update)
        parameter.sub_(state["momentum"], alpha=group["lr"])


class Moments:
    """What an optimizer keeps of the parameters of `module`, by names: "optimizer/<parameter>/<what>" -> tensor."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        names = {parameter: name for name, parameter in module.named_parameters()}
        self._parameters = {f"optimizer/{names[p]}": p for group in optimizer.param_groups for p in group["params"]}

    def tensors(self) -> dict[str, Tensor]:
        """As they are."""
        states = {name: self._optimizer.state[p] for name, p in self._parameters.items() if p in self._optimizer.state}
        return {
            f"{name}/{key}": value
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def places(self, kept: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        """Room for those of `kept` that belong to a parameter, in shares where the parameter is in shares."""
        made: dict[str, Tensor] = {}
        for key, stored in kept.items():
            parameter = self._parameters.get(key.rpartition("/")[0])
            if parameter is not None:
                like = stored.size == parameter.shape
                dtype = stored.properties.dtype
                made[key] = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(stored.size, dtype=dtype)
        return made

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was read into `places`."""
        states: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self._parameters)}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            states.setdefault(numbers[name], {})[what] = tensor.detach()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
