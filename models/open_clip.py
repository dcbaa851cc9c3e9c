"""OpenCLIP models behind CLIPModel's face, each with its own weights, preprocess and tokenizer.

References: "open_clip:ViT-B-32/laion2b_s34b_b79k" (a tag of open_clip), "open_clip:ViT-B-32//data/mine.safetensors" (a
file), "hf-hub:timm/ViT-B-16-SigLIP", or a local folder with open_clip_config.json and open_clip_model.safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import fingerprint
from models.errors import CheckpointError
from models.preprocess import Preprocess
from models.torchvision import load_torchvision


class OpenCLIPModel(nn.Module):
    """What CLIPModel offers, over any model that open_clip builds. Rows are of unit length."""

    architecture = "open_clip"
    provenance: dict[str, Any]

    def __init__(self, model: nn.Module, preprocess: Preprocess, tokenizer: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.provenance = {}
        self.fingerprint = ""
        with torch.inference_mode():
            self.embed_dim = int(self.encode_text(tokenizer(["a"])).shape[1])

    @property
    def logit_scale_value(self) -> float:
        """exp(logit_scale): what cosines are multiplied by before the softmax."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> Tensor | None:
        """The learned bias of a SigLIP model."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return bias

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (normalised here) or already normalised float (B, 3, S, S) -> unit rows (B, D)."""
        return F.normalize(self.model.encode_image(self.preprocess.normalize(images)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) -> unit rows (B, D)."""
        return F.normalize(self.model.encode_text(tokens), dim=-1)


def load_open_clip(reference: str) -> OpenCLIPModel:
    """Build the model that a reference names, in eval mode, in float32, on the CPU.

    Raises CheckpointError for an unknown name, a file that would have to be unpickled, or weights that do not fit.
    """
    load_torchvision()
    import open_clip

    name, weights = _parts(reference)
    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=weights, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    except CheckpointError:
        raise
    except Exception as error:  # open_clip, its hub and safetensors raise nearly anything
        raise CheckpointError(
            f"{reference}: open_clip cannot build it ({str(error).partition(chr(10))[0] or repr(error)}); check the "
            "name against open_clip.list_pretrained(), or give a local folder or file"
        ) from error
    wrapped = OpenCLIPModel(model.float(), _preprocess(model), tokenizer)
    wrapped.provenance = {"data": reference, "license": "see the model's own card"}
    # Not the reference: the same weights from the hub, a copy or a moved folder can search the same collections.
    wrapped.fingerprint = fingerprint({"weights": _digest(model), "preprocess": wrapped.preprocess.to_config()})
    return wrapped.eval()


def _parts(reference: str) -> tuple[str, str | None]:
    """A reference -> open_clip's name of the model and of its weights."""
    if reference.startswith("hf-hub:"):
        return reference, None
    if not reference.startswith("open_clip:"):
        folder = Path(reference)
        if not (folder / "open_clip_model.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no open_clip_model.safetensors; only safetensors weights are read")
        return f"local-dir:{folder}", None
    name, _, weights = reference.removeprefix("open_clip:").partition("/")
    if not name or not weights:
        raise CheckpointError(f"{reference!r} must be open_clip:MODEL/TAG or open_clip:MODEL/FILE.safetensors")
    if Path(weights).suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise CheckpointError(f"{weights} would have to be unpickled, which can run code; convert it to safetensors")
    return name, weights


def _preprocess(model: Any) -> Preprocess:
    """open_clip's evaluation transform as ours: pixels stay uint8 until they are batched."""
    config = dict(getattr(model.visual, "preprocess_cfg", {}))
    size = config.get("size", model.visual.image_size)
    if isinstance(size, (tuple, list)):
        if size[0] != size[1]:
            raise CheckpointError(
                f"pictures of {size[0]} x {size[1]} are not supported; choose a model with square ones"
            )
        size = size[0]
    modes = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    resize = modes.get(config.get("resize_mode") or "shortest", "crop")
    fill = config.get("fill_color", 0) or 0
    values: dict[str, Any] = {
        "size": size,
        "resize": resize,
        "interpolation": config.get("interpolation", "bicubic"),
        "fill": fill if isinstance(fill, int) else fill[0],
    }
    for key in ("mean", "std"):
        if config.get(key):
            values[key] = tuple(config[key])
    return Preprocess(**values)


def _digest(model: nn.Module) -> str:
    """SHA-256 of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
