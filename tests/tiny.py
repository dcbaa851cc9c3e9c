"""Methods of a few thousand weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from support import tiny_clip, tiny_dalle
from torch import Tensor, nn

from models.dvae import DiscreteVAE
from models.vision import EncoderModel
from training.heads import ProjectedEncoder
from training.method import Batch, Method
from training.methods.byol import BYOLMethod, BYOLTransform
from training.methods.clip import CLIPMethod
from training.methods.dalle import DALLEMethod
from training.methods.dvae import DVAEMethod
from training.methods.moco import MoCoMethod, MoCoTransform
from training.methods.simclr import SimCLRLoss, SimCLRMethod, SimCLRModel, SimCLRTransform
from training.methods.vicreg import VICRegLoss, VICRegMethod
from training.pretraining import ViewMethod

SMALL = {"channels": 8, "blocks": [1], "depth": 0}
# Methods and their variants, for what has to hold of each.
EVERY = (
    "simclr", "simclr learned", "moco v1", "moco v2", "moco v3", "byol", "vicreg",
    "clip infonce", "clip siglip", "clip chunked", "dvae", "dalle",
)  # fmt: skip


def encoder() -> EncoderModel:
    """An encoder of pictures of 16 pixels, always the same."""
    torch.manual_seed(0)
    return EncoderModel(image={"name": "conv", "image_size": 16, **SMALL})


def view_method(name: str, **options: Any) -> ViewMethod:
    """SimCLR, BYOL, VICReg or MoCo around it."""
    model = encoder()
    match name:
        case "simclr":
            loss = SimCLRLoss(learnable=options.pop("learnable", False))
            return SimCLRMethod(SimCLRModel(model, projection_dim=8), SimCLRTransform(16), loss, **options)
        case "byol":
            return BYOLMethod(model, BYOLTransform(16), hidden_dim=16, projection_dim=8, **options)
        case "vicreg":
            return VICRegMethod(ProjectedEncoder(model, 16, (16, 8)), SimCLRTransform(16), VICRegLoss())
    options = {"keys_per_step": 8, "queue_size": 16, "splits": 4, "projection_dim": 8} | options
    return MoCoMethod(model, MoCoTransform(16, options.get("version", "v2")), **options)


def views(batch: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    """What `view_method` takes."""
    return {"views": torch.randn(2, batch, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=dtype)}


def whole_statistics(name: str, micro_batch: int = 0) -> Method:
    """One of EVERY in float64, whose batch norms do not look at the batch: statistics of a part are not those of the
    whole, and everything else must agree."""
    kind, _, variant = name.partition(" ")
    method: Method
    match kind:
        case "clip":
            model = tiny_clip(logit_bias=-10.0 if variant == "siglip" else None)
            loss, chunk = ("siglip" if variant == "siglip" else "infonce"), (3 if variant == "chunked" else None)
            method = CLIPMethod(model, loss=loss, chunk_size=chunk, micro_batch=micro_batch)
        case "dvae":
            torch.manual_seed(0)
            quantizer = {"name": "fsq", "levels": [8, 8]}
            method = DVAEMethod(DiscreteVAE(image_size=16, quantizer=quantizer, channels=(16,), blocks=(1,)))
        case "dalle":
            method = DALLEMethod(tiny_dalle())
        case "moco":
            method = view_method(kind, version=variant, batch_norm="sync")
        case _:
            method = view_method(kind, **({"learnable": True} if variant else {}))
    method = method.double().train()
    for module in method.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    return method


def whole_batch(name: str) -> Batch:
    """Eight rows for it, drawn from nothing but the name's kind."""
    generator = torch.Generator().manual_seed(1)
    kind = name.partition(" ")[0]
    if kind == "clip":
        tokens = torch.randint(3, 200, (8, 6), generator=generator)
        tokens[:, -1] = 2
        captions = torch.arange(8)[:, None].repeat(1, 2)
        tokens[5], captions[5] = tokens[0], captions[0]  # the same caption on two ranks
        captions[6, 1] = 1  # an image that also goes by a caption of another rank
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        return {"images": images, "tokens": tokens, "captions": captions}
    if kind == "dvae":
        return {"images": torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)}
    if kind == "dalle":
        tokens = torch.randint(3, 200, (8, 10), generator=generator)  # none is padding: each rank has as many
        return {"tokens": tokens, "ids": torch.randint(0, 16, (8, 16), generator=generator)}
    return views(dtype=torch.float64)


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's rows."""

    def part(name: str, tensor: Tensor) -> Tensor:
        return tensor.chunk(world_size, dim=1 if name == "views" else 0)[rank]

    return {name: part(name, tensor) for name, tensor in batch.items()}
