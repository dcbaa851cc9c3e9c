"""Encoders, preprocess, tokenizer and the torchvision shim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import CORPUS, tiny_clip

from models.clip import CLIPModel
from models.preprocess import Preprocess, flatten_alpha
from models.tokenizers import TextTokenizer
from models.torchvision import load_torchvision
from models.vision import ImageEncoder


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("conv", 64, {"channels": 16, "blocks": (1, 1), "depth": 1}),
        ("conv", 48, {"channels": 8, "blocks": (1,), "depth": 0}),
        ("conv", 32, {"channels": 8, "blocks": (1, 1), "depth": 1, "stem_stride": 1}),
        ("resnet18", 32, {}),
        ("resnet18", 96, {}),
        ("resnet50", 32, {}),
        ("vit-tiny", 32, {"patch_size": 8}),
        ("timm:resnet10t", 64, {}),
    ],
)
def test_encoders_give_features_of_the_width_they_say(name: str, size: int, options: dict[str, object]) -> None:
    encoder = ImageEncoder(name, size, **options).eval()
    with torch.inference_mode():
        features = encoder(torch.randn(2, 3, size, size))
    assert features.shape == (2, encoder.feature_dim)
    assert torch.isfinite(features).all()


def test_a_small_image_resnet_keeps_the_first_map_whole() -> None:
    small, large = ImageEncoder("resnet18", 32).trunk, ImageEncoder("resnet18", 224).trunk
    assert small.conv1.stride == (1, 1)  # type: ignore[union-attr]
    assert large.conv1.stride == (2, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "options"), [("convnext", {}), ("conv", {"width": 3}), ("resnet18", {"depth": 2})])
def test_unknown_encoders_and_options_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=name):
        ImageEncoder(name, 32, **options)


def test_embeddings_do_not_depend_on_their_batch() -> None:
    model = tiny_clip()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    texts = ["a red star", "two hearts on a gray background and a blue circle", "a", "b c d", "x"]
    with torch.inference_mode():
        together = model.encode_image(images), model.encode_text(model.tokenizer(texts))
        alone = (
            torch.cat([model.encode_image(image[None]) for image in images]),
            torch.cat([model.encode_text(model.tokenizer([text])) for text in texts]),
        )
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(a.norm(dim=-1), torch.ones(5))


def test_forward_gives_both_embeddings_and_the_scale() -> None:
    model = tiny_clip()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    left, right, scale = model(images, model.tokenizer(["a", "b"]))
    assert left.shape == right.shape == (2, 24)
    assert float(scale.detach()) == pytest.approx(model.logit_scale_value)
    assert torch.equal(images, before)


def test_a_text_longer_than_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="context length 32"):
        tiny_clip().encode_text(torch.ones(1, 33, dtype=torch.long))


def test_clip_config_rebuilds_the_model() -> None:
    model = tiny_clip(logit_bias=-10.0)
    assert [p.shape for p in CLIPModel(**model.config).parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (32, 32), (1, 1), (300, 1), (1, 300), (33, 97)])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_preprocess_takes_any_size(picture: Callable[..., Image.Image], size: tuple[int, int], resize: str) -> None:
    tensor = Preprocess(size=32, resize=resize)(picture(0, size))  # type: ignore[arg-type]
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.uint8


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (32, 32), (33, 97), (511, 300)])
def test_crop_equals_torchvision(picture: Callable[..., Image.Image], size: tuple[int, int]) -> None:
    load_torchvision()
    from torchvision.transforms import v2

    image, resize, crop = picture(1, size), v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)
    ours = Preprocess(size=32, resize="crop")(image)
    assert torch.equal(ours, v2.Compose([v2.PILToTensor(), resize, crop])(image))
    off = (ours.int() - v2.Compose([resize, crop, v2.PILToTensor()])(image).int()).abs()
    assert off.max() <= 1  # Pillow itself rounds a little otherwise
    assert (off > 0).float().mean() < 0.06


def test_pad_keeps_the_whole_picture_and_fills_the_rest() -> None:
    tensor = Preprocess(size=32, resize="pad")(Image.new("RGB", (64, 16), (10, 20, 30)))
    assert (tensor[:, 12:20] == torch.tensor([10, 20, 30])[:, None, None]).all()
    assert (tensor[:, :12] == 255).all()
    assert (tensor[:, 20:] == 255).all()


@pytest.mark.parametrize("wrong", [{"resize": "zoom"}, {"interpolation": "nearest"}, {"size": 0}])
def test_unknown_ways_to_prepare_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="resize crop, pad or squash"):
        Preprocess(**wrong)


def test_transparency_is_laid_on_white_and_hides_its_colour() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(flatten_alpha(image)).min() == 255


def test_normalize_is_the_formula_and_leaves_floats_alone() -> None:
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.25, 0.125]
    )[:, None, None]
    assert torch.allclose(preprocess.normalize(pixels).double(), expected, atol=1e-6)
    floats = torch.randn(1, 3, 4, 4)
    assert preprocess.normalize(floats) is floats


def test_tokenizer_is_reproducible_and_loses_nothing() -> None:
    first, second = (TextTokenizer.train(CORPUS, 300) for _ in range(2))
    assert first.to_json() == second.to_json()
    for text in ("a red star", "émoji 🦊 and 漢字", "tab\tand\x01control", "  spaces  "):
        assert first.decode(first.encode(text)).split() == text.lower().split()
        assert first(["x", text])[1].tolist()[: len(first.encode(text))] == first.encode(text)


def test_long_texts_are_cut_and_still_end() -> None:
    tokens = TextTokenizer.train(CORPUS, 300, context_length=8)(["a red star " * 20, "a"])
    assert tokens.shape == (2, 8)
    assert tokens[0, 0] == TextTokenizer.bos_id
    assert tokens[0, -1] == TextTokenizer.eos_id


def test_torchvision_imports_whatever_it_was_built_for() -> None:
    assert load_torchvision().__version__
    import torchvision.models

    assert torchvision.models.resnet18
