"""Ranks against one process with the whole batch, in float64; data parallel and in shares."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import saved_tensors
from tiny import EVERY, part_of, whole_batch, whole_statistics
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.distributed import leave_group
from training.method import Method
from training.methods.clip import CLIPMethod
from training.sharding import average_whole, clip_gradients, shard, whole
from training.state import find_state, load_tensors, save_state

WAYS = ("data parallel", "in shares")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).clone() for name, p in method.named_parameters() if p.grad is not None}


def _state(method: Method) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in method.state_dict().items()}


def _given() -> Method:
    """A method that is not as `whole_statistics` makes it."""
    method = whole_statistics("byol")
    with torch.no_grad():
        for tensor in method.state_dict().values():
            tensor.add_(1)
    return method


def _worker(rank: int, world_size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for name in EVERY:
        batch = part_of(whole_batch(name), rank, world_size)
        for way in WAYS:
            method = whole_statistics(name)
            runs: Any = method
            if way == "in shares":
                shard(method, torch.device("cpu"))
            else:
                runs = DistributedDataParallel(method)
            loss = runs(batch)["loss"]
            loss.backward()
            if way == "in shares":
                average_whole(method.parameters())
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            gradients = _gradients(method)
            norm = clip_gradients(method.parameters(), 0.01)
            method.after_step(0.0)
            found[f"{name}, {way}"] = {
                "loss": mean / world_size,
                "gradients": gradients,
                "norm": norm,
                "clipped": _gradients(method),
                "state": _state(method),
            }
            del runs, loss
    # What one process saved is read in shares, and what these save of their shares by one process.
    method = whole_statistics("byol")
    shard(method, torch.device("cpu"))
    given = find_state(Path(out).parent / "given")
    assert given is not None
    load_tensors(given, method.state_dict())
    found["read in shares"] = _state(method)
    save_state(Path(out).parent / "made", 7, method.state_dict(), {})
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    del method
    leave_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_have_the_gradient_and_the_state_of_the_whole_batch(tmp_path: Path, world_size: int) -> None:
    given = _given().state_dict()
    save_state(tmp_path / "given", 3, given, {"spent": 1.5})
    mp.spawn(_worker, (world_size, _free_port(), str(tmp_path / "out.pt")), nprocs=world_size)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    made = saved_tensors(tmp_path / "made")
    assert made.keys() == given.keys()
    assert all(torch.equal(tensor, found["read in shares"][name]) for name, tensor in given.items())
    assert all(torch.equal(tensor, made[name]) for name, tensor in given.items())
    for name in EVERY:
        method = whole_statistics(name)
        loss = method(whole_batch(name))["loss"]
        loss.backward()
        expected = _gradients(method)
        norm = nn.utils.clip_grad_norm_(method.parameters(), 0.01)
        clipped = _gradients(method)
        method.after_step(0.0)
        for way in WAYS:
            got = found[f"{name}, {way}"]
            assert abs(float(loss.detach() - got["loss"])) < 1e-10, (name, way)
            assert abs(float(norm - got["norm"])) < 1e-10, (name, way)
            for part, wanted in (("gradients", expected), ("clipped", clipped), ("state", _state(method))):
                assert got[part].keys() == wanted.keys(), (name, way, part)
                for key, tensor in wanted.items():
                    assert torch.allclose(got[part][key], tensor, rtol=0, atol=1e-10), (name, way, part, key)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_cached_gradients_equal_those_of_the_whole_batch(micro_batch: int) -> None:
    whole, parts = whole_statistics("clip infonce"), whole_statistics("clip chunked", micro_batch)
    assert isinstance(parts, CLIPMethod)
    for method in (whole, parts):
        method(whole_batch("clip"))["loss"].backward()
    expected, got = _gradients(whole), _gradients(parts)
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-12
