"""Image tokenizers: codes are what the papers say, and decode to what the training saw."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.dvae import FSQ, VQ, DiscreteVAE, Gumbel
from models.tokenizers import ImageTokenizer

QUANTIZERS: list[dict[str, Any]] = [
    {"name": "fsq", "levels": [8, 5, 3]},
    {"name": "vq", "codes": 40, "dim": 6},
    {"name": "gumbel", "codes": 24, "dim": 6},
]


def _model(quantizer: dict[str, Any], **options: Any) -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(image_size=16, quantizer=quantizer, channels=(8, 16), blocks=(0, 1), **options)


def _images(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q["name"])
@pytest.mark.parametrize("output", ["pixels", "laplace"])
def test_pictures_become_rows_of_ids_and_pictures_again(quantizer: dict[str, Any], output: str) -> None:
    model = _model(quantizer, output=output).eval()
    tokenizer = ImageTokenizer(model)
    ids = tokenizer.encode(_images())
    assert ids.shape == (5, tokenizer.length) == (5, 16)
    assert 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size
    back = tokenizer.decode(ids)
    assert (back.shape, back.dtype) == ((5, 3, 16, 16), torch.uint8)
    # What is decoded from ids is what the whole network gives.
    with torch.inference_mode():
        whole = model.pixels(model(model.preprocess.normalize(_images()))[0])
    assert (whole.mul(255).round().int() - back.int()).abs().max() <= 1
    one = torch.cat([tokenizer.encode(image[None]) for image in _images()])
    assert torch.equal(one, ids)
    with pytest.raises(ValueError, match="exist"):
        tokenizer.decode(ids + tokenizer.vocab_size)


@pytest.mark.parametrize("levels", [(8, 8, 8), (8, 6, 5), (7, 5, 5, 5), (3, 4)])
def test_fsq_is_that_of_an_independent_library(levels: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from vector_quantize_pytorch import FSQ as Theirs

    features = 3 * torch.randn(2, len(levels), 4, 4, generator=torch.Generator().manual_seed(3))
    mine, theirs = (features.clone().requires_grad_() for _ in range(2))
    quantizer = FSQ(levels)
    values, codes = quantizer(mine)
    expected, indices = Theirs(list(levels))(theirs)
    torch.testing.assert_close(values, expected)
    assert torch.equal(codes.int(), indices)
    values.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_every_code_of_fsq_is_its_own_and_can_be_reached() -> None:
    quantizer = FSQ((4, 3, 2))
    every = quantizer.lookup(torch.arange(quantizer.codes).view(1, 4, 6))
    assert len({tuple(row) for row in every.flatten(2)[0].T.tolist()}) == 24
    features = 4 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values, codes = quantizer(features)
    assert set(codes.flatten().tolist()) == set(range(24))
    assert torch.equal(values, quantizer.lookup(codes))


def test_vq_takes_the_code_of_least_angle_and_passes_the_gradient_on() -> None:
    quantizer = VQ(codes=7, dim=3)
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values, codes = quantizer(features)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                vector = features[image, :, row, column].detach()
                cosines = [float(torch.cosine_similarity(vector, code, dim=0)) for code in quantizer.codebook]
                assert max(range(7), key=cosines.__getitem__) == int(codes[image, row, column])
    torch.testing.assert_close(values, quantizer.lookup(codes))
    values[:, 0].sum().backward()
    assert features.grad is not None
    assert float(features.grad.abs().sum()) > 0


def test_gumbel_draws_codes_with_the_probability_of_their_logits() -> None:
    """At a low temperature a draw is nearly one code; how often each is drawn is a chi-square test, seeded."""
    torch.manual_seed(0)
    quantizer = Gumbel(codes=4, dim=4).train()
    quantizer.temperature.fill_(1e-3)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    values, _ = quantizer(logits.view(1, 4, 1, 1).expand(1, 4, 100, 100))
    drawn = values.argmax(1).flatten().bincount(minlength=4)
    expected = logits.softmax(0) * 10_000
    assert float(((drawn - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = 0.001
    quantizer.temperature.fill_(1e3)
    soft = quantizer(logits.view(1, 4, 1, 1))[0].detach()
    assert float(soft.max() - soft.min()) < 0.05


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q["name"])
def test_a_checkpoint_gives_the_same_codes(tmp_path: Path, quantizer: dict[str, Any]) -> None:
    model = _model(quantizer).eval()
    again = load_checkpoint(save_checkpoint(model, tmp_path / "dvae"))
    assert torch.equal(again.encode(_images()), model.encode(_images()))
    assert again.config == model.config
    assert ImageTokenizer(again).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": {"name": "lfq"}}, "fsq, vq, gumbel"),
        ({"quantizer": {"name": "fsq", "levels": [8, 1]}}, "at least 2"),
        ({"channels": (8,), "blocks": (1, 1)}, "one number for each halving"),
        ({"image_size": 30, "channels": (8, 8), "blocks": (1, 1)}, "multiple of 4"),
        ({"output": "logits"}, "pixels or laplace"),
    ],
)
def test_wrong_options_are_said_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscreteVAE(**options)
