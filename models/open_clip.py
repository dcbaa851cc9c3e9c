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
from tokenizers.models import BPE
from torch import Tensor, nn

from models.checkpoint import fingerprint
from models.errors import CheckpointError
from models.layers import read_at
from models.preprocess import Preprocess
from models.torchvision import load_torchvision


class OpenCLIPModel(nn.Module):
    """What CLIPModel offers, over any model that open_clip builds. Rows are of unit length."""

    architecture = "open_clip"
    provenance: dict[str, Any]

    def __init__(self, model: nn.Module, preprocess: Preprocess, tokenizer: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self._causal = _CausalText.of(model)
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
        """int64 (B, L) -> unit rows (B, D). What follows a text's end may be cut off (text_lengths)."""
        return F.normalize(self._causal(tokens) if self._causal else self.model.encode_text(tokens), dim=-1)

    def text_lengths(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B,): how many tokens decide a text's embedding: up to its end, if the encoder reads from left to
        right and gives what it has there; else all of them."""
        return self._causal.lengths(tokens) if self._causal else torch.full((len(tokens),), tokens.shape[1])


class _CausalText:
    """open_clip's text encoder that reads from left to right, for rows of any length; its own takes whole rows alone.

    text: an open_clip.CLIP, which has it in itself, or a TextTransformer.
    """

    def __init__(self, text: Any) -> None:
        self.text = text
        self.eos = text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id
        self.pool = text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type

    @classmethod
    def of(cls, model: Any) -> _CausalText | None:
        """The text encoder of a model; None if it is of another kind."""
        from open_clip.model import CLIP
        from open_clip.transformer import TextTransformer

        text: Any = model if type(model) is CLIP else getattr(model, "text", None)
        if (
            type(text) not in (CLIP, TextTransformer)
            or text.attn_mask is None
            or not text.transformer.batch_first
            or getattr(text, "cls_emb", None) is not None
        ):
            return None
        found = cls(text)
        return found if found.pool in ("argmax", "eos") else None

    def lengths(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B,): how many tokens each text has, its end included."""
        return (tokens if self.pool == "argmax" else (tokens == self.eos).int()).argmax(1) + 1

    def __call__(self, tokens: Tensor) -> Tensor:
        text, length = self.text, tokens.shape[1]
        x = text.token_embedding(tokens) + text.positional_embedding[:length]
        mask = text.attn_mask[:length, :length]
        x = text.ln_final(read_at(text.transformer.resblocks, x, self.lengths(tokens) - 1, attn_mask=mask))
        projection = text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def load_open_clip(reference: str) -> OpenCLIPModel:
    """Build the model that a reference names, in eval mode, in float32, on the CPU.

    Raises CheckpointError for an unknown name, a file that would have to be unpickled, or weights that do not fit.
    """
    load_torchvision()
    import open_clip

    name, weights = _parts(reference)
    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=weights, weights_only=True)
        tokenizer = _with_fast_merges(open_clip.get_tokenizer(name))
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


def _with_fast_merges(tokenizer: Any) -> Any:
    """The same tokenizer, whose merges take a time that grows with a word's length: open_clip's take its square, 0.4 s
    for 2,000 letters, and remember every word that ever came."""
    from open_clip.tokenizer import SimpleTokenizer

    if type(tokenizer) is SimpleTokenizer:
        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
        model = BPE(tokenizer.encoder, merges, end_of_word_suffix="</w>")
        special = {tokenizer.decoder[id] for id in tokenizer.all_special_ids}
        tokenizer.bpe = lambda word: word if word in special else " ".join(each.value for each in model.tokenize(word))
    return tokenizer


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
