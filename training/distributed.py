"""The little that methods and the trainer need of torch.distributed; all of it also works in a single process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together: of the group, or where it is not (or no more) joined, of torchrun's."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 <= rank < world_size()."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


@contextmanager
def process_group(device: torch.device, patience: float = 600.0) -> Iterator[None]:
    """Join the group that torchrun describes (nccl for what is on CUDA, gloo for the rest) and leave it at the end.

    patience: seconds after which a process that waits for others ends with an error.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    try:
        yield
    finally:
        leave_group()


def leave_group() -> None:
    """Leave the process group, after what still holds it was dropped.

    DistributedDataParallel is part of reference cycles and keeps the group, whose threads would then outlive the
    interpreter: the process ends with SIGABRT, now and then.
    """
    gc.collect()
    dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather whose gradient flows back to every rank.

    The gradient of a rank's rows is the sum over ranks of what each wants of them. DDP then divides by the world size,
    so that a mean of per-rank means has exactly the gradient of one process with the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradient. (B, ...) on each -> (world_size * B, ...)."""
    return local if world_size() == 1 else _Gather.apply(local)


def gather_without_gradient(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order, for ids and keys. (B, ...) on each -> (world_size * B, ...)."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)
