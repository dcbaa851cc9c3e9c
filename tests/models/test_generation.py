"""DALL-E's transformer and sampling from it: the cache changes nothing, seeds decide, filters do what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import CORPUS

from models.checkpoint import load_checkpoint, save_checkpoint
from models.dalle import DALLETransformer
from models.generation import Sampling, draw, filtered, generate_ids, generate_image
from models.tokenizers import ImageTokenizer, TextTokenizer

IMAGE: dict[str, Any] = {
    "image_size": 16, "quantizer": {"name": "fsq", "levels": [4, 4]}, "channels": [8, 8], "blocks": [0, 1],
}  # fmt: skip


def _model(**options: Any) -> DALLETransformer:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train(CORPUS, 300, 10)
    options = {"text_length": 10, "width": 32, "depth": 2, "heads": 2} | options
    model = DALLETransformer(image=IMAGE, vocab_size=tokenizer.vocab_size, **options)
    model.tokenizer = tokenizer
    for parameter in model.parameters():  # far from its calm beginning, so that mistakes show
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model.eval()


def _sample(model: DALLETransformer, texts: list[str], seeds: list[int], *args: Any, **options: Any) -> torch.Tensor:
    return torch.stack(list(generate_ids(model, texts, seeds, *args, **options)), 1)


@pytest.mark.parametrize("options", [{}, {"tied": True}])
def test_logits_with_a_cache_are_those_of_the_whole_sequence(options: dict[str, Any]) -> None:
    model = _model(**options)
    texts = model.tokens_of(["a red star", "two hearts on a gray background"])
    ids = torch.randint(0, model.codes, (2, model.image_length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        text_logits, image_logits = model(texts, ids)
        cache = model.new_cache(2)
        found = [model.read_text(texts, cache)]
        for place in range(model.image_length - 1):
            found.append(model.read_ids(ids[:, place], torch.full((2,), place), cache))
    assert text_logits.shape == (2, 9, model.config["vocab_size"])
    assert float(image_logits.std()) > 0.1
    torch.testing.assert_close(torch.stack(found, 1), image_logits, atol=1e-4, rtol=0)


def test_rows_of_a_cache_may_be_at_different_places() -> None:
    """As when one request joins while another is half done."""
    model = _model()
    texts = model.tokens_of(["a red star", "a blue heart"])
    ids = torch.randint(0, model.codes, (2, model.image_length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(texts, ids)[1]
        cache = model.new_cache(2)
        model.read_text(texts, cache)
        ahead = cache.block(0, 1)
        for place in range(5):
            model.read_ids(ids[:1, place], torch.tensor([place]), ahead)
        both = model.read_ids(torch.stack([ids[0, 5], ids[1, 0]]), torch.tensor([5, 0]), cache)
    torch.testing.assert_close(both, torch.stack([whole[0, 6], whole[1, 1]]), atol=1e-4, rtol=0)


def test_no_token_sees_those_after_it() -> None:
    model = _model()
    texts = model.tokens_of(["a red star"])
    ids = torch.zeros(1, model.image_length, dtype=torch.int64)
    changed = ids.clone()
    changed[:, 7:] = 3
    with torch.inference_mode():
        before, after = model(texts, ids)[1], model(texts, changed)[1]
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_a_row_depends_on_its_text_and_seed_alone() -> None:
    model = _model()
    texts, seeds = ["a red star", "a blue heart", "a red star", "a red star"], [5, 5, 6, 5]
    sampling = Sampling(guidance_scale=2.0, top_k=8)
    together = _sample(model, texts, seeds, sampling)
    alone = torch.cat([_sample(model, [text], [seed], sampling) for text, seed in zip(texts, seeds, strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])


def test_without_filters_tokens_are_drawn_by_the_softmax() -> None:
    """Chi-square over the first token of many seeds."""
    model = _model()
    with torch.inference_mode():
        expected = model.read_text(model.tokens_of(["a red star"]), model.new_cache(1)).softmax(-1)[0].double()
    count = 4000
    ids = next(generate_ids(model, ["a red star"] * count, range(count)))
    drawn = ids.bincount(minlength=model.codes)
    assert (
        float(((drawn - count * expected) ** 2 / (count * expected)).sum()) < 37.7
    )  # 15 degrees of freedom, p = 0.001


def test_filters_are_their_definitions() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = shares.log()
    torch.testing.assert_close(filtered(logits, Sampling()), shares.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(filtered(logits, Sampling(top_k=2)), torch.tensor([[0.625, 0.375, 0, 0]]).double())
    # The fewest that have 0.75 together are the first two; of 0.81, three.
    assert (filtered(logits, Sampling(top_p=0.75)) > 0).tolist() == [[True, True, False, False]]
    assert (filtered(logits, Sampling(top_p=0.81)) > 0).tolist() == [[True, True, True, False]]
    assert filtered(logits, Sampling(temperature=0)).tolist() == [[1, 0, 0, 0]]
    half = filtered(logits, Sampling(temperature=0.5))
    torch.testing.assert_close(half, (shares.double() ** 2 / (shares.double() ** 2).sum()), atol=1e-6, rtol=0)


def test_points_fall_into_the_share_of_their_id_and_never_beside_one() -> None:
    shares = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).double().expand(5, -1)
    points = torch.tensor([0.0, 0.2499, 0.25, 0.99, 1 - 2**-53]).double()
    assert draw(shares, points).tolist() == [1, 1, 3, 3, 3]


def test_guidance_moves_from_no_text_to_the_text() -> None:
    model = _model()
    likeliest = Sampling(temperature=0, guidance_scale=0.0)
    none = _sample(model, [""], [0], Sampling(temperature=0))
    assert torch.equal(_sample(model, ["a red star"], [0], likeliest), none)  # scale 0 forgets the text
    assert not torch.equal(_sample(model, ["a red star"], [0], Sampling(temperature=0, guidance_scale=3.0)), none)


def test_known_tokens_stay_and_the_rest_is_drawn_as_ever() -> None:
    model = _model()
    free = _sample(model, ["a red star"], [3])
    known = torch.full((1, model.image_length), -1)
    known[:, :6] = free[:, :6]
    assert torch.equal(_sample(model, ["a red star"], [3], known=known), free)
    known[:, 9] = (free[:, 9] + 1) % model.codes
    other = _sample(model, ["a red star"], [3], known=known)
    assert int(other[0, 9]) == int(known[0, 9])
    assert torch.equal(other[:, :9], free[:, :9])


def test_pictures_in_one_line(picture: Callable[..., Image.Image]) -> None:
    model = _model()
    made = generate_image(model, ["a red star", "a blue heart"], n=2, seed=7)
    assert [image.size for image in made] == [(16, 16)] * 4
    again = generate_image(model, "a blue heart", seed=8)
    assert again[0].tobytes() == made[3].tobytes()
    start = picture(1)
    kept = generate_image(model, "a red star", seed=1, image=start, keep=1.0)[0]
    tokenizer = ImageTokenizer(model.dvae)
    assert torch.equal(
        torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1),
        tokenizer.decode(tokenizer.encode(model.preprocess(start)[None]))[0],
    )
    with pytest.raises(ValueError, match="at least 1"):
        generate_image(model, "a", n=0)


@pytest.mark.parametrize("options", [{}, {"tied": True}])
def test_a_checkpoint_draws_the_same_pictures(tmp_path: Path, options: dict[str, Any]) -> None:
    model = _model(**options)
    again = load_checkpoint(save_checkpoint(model, tmp_path / "dalle"))
    assert torch.equal(_sample(again, ["a red star"], [3]), _sample(model, ["a red star"], [3]))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"guidance_scale": -1.0}]
)
def test_wrong_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        _model(width=36, heads=6)
