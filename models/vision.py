"""Image encoders: ResNet (torchvision), a small convolutional one for CPUs, ViT, and any timm backbone by name; and
the model that is an encoder alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block, init_transformer
from models.preprocess import Preprocess
from models.tokenizers import TextTokenizer
from models.torchvision import load_torchvision

VIT_SIZES = {"vit-tiny": (192, 6, 3), "vit-small": (384, 12, 6), "vit-base": (768, 12, 12)}  # width, depth, heads
RESNETS = ("resnet18", "resnet34", "resnet50")
SMALL_IMAGE = 64  # up to this size a ResNet takes the stem of arXiv:2002.05709, appendix B.9


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip (arXiv:1512.03385). (B, C, H, W) -> (B, C', H/s, W/s)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)  # every block starts as its skip (arXiv:1706.02677, section 5.1)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Sequential(
                nn.AvgPool2d(stride) if stride != 1 else nn.Identity(), nn.Conv2d(channels_in, channels, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm1(self.conv1(x)))
        return torch.relu_(self.norm2(self.conv2(y)) + self.skip(x))


class ConvEncoder(nn.Module):
    """A small residual network whose last map is read by a few transformer blocks. (B, 3, S, S) -> (B, width).

    Most of its arithmetic is 3x3 convolutions on maps of a quarter of the side and less, which is what a CPU does
    fastest; the blocks with their learned positions see where things are, which average pooling alone forgets. The
    features are the mean of the last tokens, for what is there wherever it is, plus a linear map of all of them in
    their order, for where it is.
    fine_blocks: residual blocks at half the side, where small shapes still have their outlines. stem_stride: 1 keeps
    twice the side all the way, for pictures of 32 pixels.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 64,
        blocks: tuple[int, ...] = (1, 1, 2),
        depth: int = 2,
        fine_blocks: int = 0,
        stem_stride: int = 2,
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(inplace=True),
            *[ResidualBlock(channels // 2, channels // 2) for _ in range(fine_blocks)],
            nn.Conv2d(channels // 2, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = []
        width = channels
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                out = channels * 2**stage
                stages.append(ResidualBlock(width, out, stride))
                width = out
        self.stages = nn.Sequential(*stages)
        side = -(-image_size // (stem_stride * 2 ** len(blocks)))
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(depth))
        init_transformer(self.blocks, max(1, depth))
        self.position = nn.Parameter(0.02 * torch.randn(side * side, width)) if depth else None
        self.read = nn.Linear(side * side * width, width, bias=False)
        self.feature_dim = width

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stages(self.stem(images)).flatten(2).transpose(1, 2)
        if self.position is not None:
            tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1) + self.read(tokens.flatten(1))


class ViT(nn.Module):
    """Vision transformer (arXiv:2010.11929) with mean pooling in place of a class token. (B, 3, S, S) -> (B, width)."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.patch = nn.Conv2d(3, width, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        init_transformer(self.blocks, depth)
        nn.init.normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.feature_dim = width

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens.mean(1))


class ImageEncoder(nn.Module):
    """Any image encoder by name. Normalised float (B, 3, S, S) -> features (B, feature_dim).

    name: "conv" (options channels, blocks, depth, fine_blocks, stem_stride), "resnet18" / "resnet34" / "resnet50",
    "vit-tiny" / "vit-small" / "vit-base" (option patch_size), or "timm:<name>" for a backbone of timm, without weights.
    Raises ValueError for an unknown name or option.
    """

    def __init__(self, name: str = "conv", image_size: int = 64, **options: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"name": name, "image_size": image_size, **options}
        self.trunk, self.feature_dim = _build(name, image_size, options)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)


class EncoderModel(nn.Module):
    """An image encoder alone, as SimCLR, MoCo, BYOL and VICReg leave it: its features are what is kept.

    image: options of ImageEncoder. truncatable: the lengths at which an embedding may be cut (Matryoshka,
    arXiv:2205.13147), for the record. forward: normalised float (B, 3, S, S) -> features (B, D).
    """

    architecture = "encoder"

    def __init__(self, *, image: dict[str, Any], truncatable: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"image": image, "truncatable": list(truncatable)}
        self.encoder = ImageEncoder(**image)
        self.feature_dim = self.embed_dim = self.encoder.feature_dim
        self.preprocess = Preprocess(size=image.get("image_size", 64))
        self.tokenizer: TextTokenizer | None = None
        self.provenance: dict[str, Any] = {}
        self.fingerprint = ""

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (normalised here) or already normalised float (B, 3, S, S) -> unit rows (B, D)."""
        return F.normalize(self.encoder(self.preprocess.normalize(images)), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def _build(name: str, image_size: int, options: dict[str, Any]) -> tuple[nn.Module, int]:
    try:
        if name == "conv":
            trunk = ConvEncoder(image_size, **options)
            return trunk, trunk.feature_dim
        if name in VIT_SIZES:
            width, depth, heads = VIT_SIZES[name]
            patch = options.pop("patch_size", 16 if image_size >= 128 else 8)
            vit = ViT(image_size, patch, width, depth, heads, **options)
            return vit, vit.feature_dim
        if name in RESNETS:
            return _resnet(name, image_size, **options)
        if name.startswith("timm:"):
            load_torchvision()
            import timm

            backbone = timm.create_model(name.removeprefix("timm:"), pretrained=False, num_classes=0, **options)
            return backbone, int(backbone.num_features)
    except TypeError as error:
        raise ValueError(f"image encoder {name!r} does not take these options: {error}") from error
    except RuntimeError as error:  # timm's, of a name that it does not know
        raise ValueError(f"image encoder {name!r} cannot be made: {error}") from error
    known = ", ".join(["conv", *RESNETS, *VIT_SIZES])
    raise ValueError(f"unknown image encoder {name!r}; choose one of {known}, or timm:<name>")


def _resnet(name: str, image_size: int) -> tuple[nn.Module, int]:
    load_torchvision()
    import torchvision.models

    network = getattr(torchvision.models, name)(weights=None)
    if image_size <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    feature_dim = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, feature_dim
