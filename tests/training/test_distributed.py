"""Two gloo ranks against one process with the whole batch, in float64."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import tiny_clip
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.distributed import leave_group
from training.methods.clip import CLIPMethod


def _method(loss: str, chunk: int | None, micro_batch: int = 0) -> CLIPMethod:
    model = tiny_clip(logit_bias=-10.0 if loss == "siglip" else None)
    method = CLIPMethod(model, loss=loss, chunk_size=chunk, micro_batch=micro_batch).double().train()
    for module in method.modules():  # statistics of a part are not those of the whole; everything else must agree
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    return method


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 200, (8, 6), generator=generator)
    tokens[:, -1] = 2
    captions = torch.arange(8)[:, None].repeat(1, 2)
    tokens[5], captions[5] = tokens[0], captions[0]  # the same caption on both ranks
    captions[6, 1] = 1  # an image that also goes by a caption of the other rank
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"images": images, "tokens": tokens, "captions": captions}


def _gradients(method: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in method.named_parameters() if p.grad is not None}


def _worker(rank: int, port: int, out: str, loss: str, chunk: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    method: Any = DistributedDataParallel(_method(loss, chunk))
    batch = {name: tensor[rank * 4 : rank * 4 + 4] for name, tensor in _batch().items()}
    result = method(batch)["loss"]
    result.backward()
    mean = result.detach().clone()
    dist.all_reduce(mean)
    if rank == 0:
        torch.save({"gradients": _gradients(method), "loss": mean / 2}, out)
    dist.barrier()
    del method, result
    leave_group()


@pytest.mark.parametrize(("loss", "chunk"), [("infonce", None), ("infonce", 3), ("siglip", None)])
def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path: Path, loss: str, chunk: int | None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path / "out.pt"), loss, chunk), nprocs=2)
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    method = _method(loss, chunk)
    whole = method(_batch())["loss"]
    whole.backward()
    assert abs(float(whole.detach() - got["loss"])) < 1e-10
    expected = _gradients(method)
    assert got["gradients"].keys() == expected.keys()
    assert max(float((got["gradients"][name] - expected[name]).abs().max()) for name in expected) < 1e-10


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_cached_gradients_equal_those_of_the_whole_batch(micro_batch: int) -> None:
    whole, parts = _method("infonce", None), _method("infonce", 3, micro_batch)
    for method in (whole, parts):
        method(_batch())["loss"].backward()
    expected, got = _gradients(whole), _gradients(parts)
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-12
