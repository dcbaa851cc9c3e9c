"""Weights, gradients, averages and optimizer state in shares, one a process (FSDP2), for what fits no device whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from training.distributed import world_size
from training.method import Method


def shard(method: Method, device: torch.device) -> None:
    """Leave each process its share of the method's weights, as rank 0 has them; `forward` gathers a block at a time.

    Kept whole are scalars, which have no shares, what `method.kept_whole` names, and buffers.
    """
    for tensor in (*method.parameters(), *method.buffers()):
        dist.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = {parameter for parameter in method.parameters() if parameter.ndim == 0}
    for name in method.kept_whole:
        whole |= set(method.get_submodule(name).parameters())
    for module in list(method.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, ignored_params=whole & set(block.parameters()))
    fully_shard(method, mesh=mesh, ignored_params=whole)


def average_whole(parameters: Iterable[nn.Parameter]) -> None:
    """Give the gradients of what is kept whole their mean over processes; shards have got theirs on the way back."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their norm is at most `largest`, and return what it was."""
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = list(by_kind(learning))
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest, norm)
    return norm


def by_kind(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those in shares and those that are whole, apart: no operation takes lists of both."""
    for shares in (True, False):
        if found := [parameter for parameter in parameters if isinstance(parameter, DTensor) is shares]:
            yield found


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose shares processes have, whole; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(skeleton: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of `skeleton`, on its device, with the weights of `module` put together; all processes call it."""
    made = deepcopy(skeleton)
    made.load_state_dict({name: whole(tensor) for name, tensor in module.state_dict().items()})
    return made
