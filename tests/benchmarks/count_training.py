"""What a step of each method costs, counted: the table of training/SCALING.md.

Weights, floating-point operations and kept activations of a picture are counted by running a step of a few; what
crosses between GPUs follows from the weights. Nothing here is a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.clip import CLIPModel
from models.dalle import DALLETransformer
from models.vision import EncoderModel
from training.heads import ProjectedEncoder
from training.method import Batch, Method
from training.methods.byol import BYOLMethod, BYOLTransform
from training.methods.clip import CLIPMethod
from training.methods.dalle import DALLEMethod
from training.methods.moco import MoCoMethod, MoCoTransform
from training.methods.simclr import SimCLRLoss, SimCLRMethod, SimCLRModel, SimCLRTransform
from training.methods.vicreg import VICRegLoss, VICRegMethod

ROWS = 4  # of the counted step: few, for activations grow with them, and no fewer than batch norm needs


def _encoder(name: str) -> EncoderModel:
    return EncoderModel(image={"name": name, "image_size": 224})


def _views(method: Method) -> tuple[Method, Batch]:
    return method, {"views": torch.randn(2, ROWS, 3, 224, 224)}


def _clip() -> tuple[Method, Batch]:
    model = CLIPModel(
        image={"name": "vit-base", "image_size": 224},
        text={"vocab_size": 49_408, "context_length": 77, "width": 512, "depth": 12, "heads": 8},
        embed_dim=512,
    )
    return CLIPMethod(model), {
        "images": torch.randn(ROWS, 3, 224, 224), "tokens": torch.randint(3, 40_000, (ROWS, 77)),
        "captions": torch.arange(ROWS)[:, None],
    }  # fmt: skip


def _dalle() -> tuple[Method, Batch]:
    image = {"image_size": 384, "quantizer": {"name": "fsq", "levels": [8, 8, 8, 8]}, "channels": [64, 64, 128, 128]}
    model = DALLETransformer(
        image=image | {"blocks": [0, 0, 0, 2]}, vocab_size=8192, text_length=64, width=768, depth=12, heads=12
    )
    tokens, ids = torch.randint(3, 4096, (ROWS, 64)), torch.randint(0, 4096, (ROWS, model.image_length))
    return DALLEMethod(model), {"tokens": tokens, "ids": ids}


METHODS: dict[str, Callable[[], tuple[Method, Batch]]] = {
    "simclr, ResNet-50": lambda: _views(
        SimCLRMethod(SimCLRModel(_encoder("resnet50"), hidden_dim=2048), SimCLRTransform(224), SimCLRLoss())
    ),
    "moco v2, ResNet-50": lambda: _views(
        MoCoMethod(_encoder("resnet50"), MoCoTransform(224, "v2"), batch_norm="sync", queue_size=65_536)
    ),
    "moco v3, ViT-B/16": lambda: _views(
        MoCoMethod(
            _encoder("vit-base"),
            MoCoTransform(224, "v3"),
            version="v3",
            batch_norm="sync",
            hidden_dim=4096,
            projection_dim=256,
        )
    ),
    "byol, ResNet-50": lambda: _views(BYOLMethod(_encoder("resnet50"), BYOLTransform(224))),
    "vicreg, ResNet-50": lambda: _views(
        VICRegMethod(
            ProjectedEncoder(_encoder("resnet50"), 224, (8192, 8192, 8192)), SimCLRTransform(224), VICRegLoss()
        )
    ),
    "clip, ViT-B/16": _clip,
    "dalle, 104 M, 576 tokens": _dalle,
}


def kept_bytes(work: Callable[[], Any]) -> int:
    """Bytes that the way back needs of a forward pass, each storage once; parameters are not among them."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(seen.values())


def operations(method: Method, batch: Batch) -> int:
    """Of a forward and a backward pass, attention with its products, which fused kernels do not show."""
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        method(batch)["loss"].backward()
    return counted.get_total_flops()


def main() -> None:
    """Print the table."""
    print("| | weights that learn | all | GFLOP a picture | activations a picture | gradients, DDP | in shares |")
    print("|---|---|---|---|---|---|---|")
    for name, make in METHODS.items():
        torch.manual_seed(0)
        method, batch = make()
        learning = sum(p.numel() for p in method.parameters() if p.requires_grad)
        weights = sum(p.numel() for p in method.parameters())

        def forward(method: Method = method, batch: Batch = batch) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return method(batch)["loss"]

        activations = kept_bytes(forward)
        print(
            f"| `{name.partition(',')[0]}`{name[name.index(',') :]} | {learning / 1e6:.1f} M | {weights / 1e6:.1f} M | "
            f"{operations(method, batch) / ROWS / 1e9:.1f} | {activations / ROWS / 1e6:.0f} MB | "
            f"{8 * learning / 1e6:.0f} MB | {12 * learning / 1e6:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
