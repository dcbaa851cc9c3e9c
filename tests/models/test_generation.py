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
from models.dalle import DALLETransformer, StepLinear
from models.generation import (
    Sampling,
    TokenReader,
    draw,
    filtered,
    generate_ids,
    generate_image,
    kept_tokens,
    masked_tokens,
    to_picture,
)
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


def test_steps_of_all_rows_give_what_steps_of_some_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step is one graph; here it is traced whole and run eagerly."""
    real, asked = torch.compile, []

    def traced(step: Any, **options: Any) -> Any:
        asked.append(options)
        return real(step, fullgraph=True, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    model = _model()
    texts = model.tokens_of(["a red star", "a blue heart", "two hearts"])
    ids = torch.randint(0, model.codes, (3, model.image_length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(texts, ids)[1]
        reader = TokenReader(model, 5, fixed=True)
        assert asked == [{"fullgraph": True}]
        found = [reader.text(texts[:2])]
        torch.testing.assert_close(reader.text(texts[2:], start=2), whole[2:, 0], atol=1e-4, rtol=0)
        for place in range(6):
            found.append(reader.ids(ids[:2, place], torch.full((2,), place)))
        third = reader.ids(ids[:, 0], torch.tensor([6, 6, 0]))[2]  # rows of their own places
    torch.testing.assert_close(torch.stack(found, 1), whole[:2, :7], atol=1e-4, rtol=0)
    torch.testing.assert_close(third, whole[2, 1], atol=1e-4, rtol=0)


def test_weights_in_bfloat16_keep_angles_and_tokenizer() -> None:
    model, exact = _model().cast(torch.bfloat16), _model()
    assert model.turns.dtype == model.dvae.decoder[0].weight.dtype == torch.float32
    assert model.new_cache(1).keys.dtype == torch.bfloat16
    texts, ids = exact.tokens_of(["a red star"]), torch.zeros(1, exact.image_length, dtype=torch.int64)
    with torch.inference_mode():
        near, right = model(texts, ids)[1].float().softmax(-1), exact(texts, ids)[1].softmax(-1)
    assert float((near - right).abs().max()) < 0.05
    assert float((near - right).abs().max()) > 0
    assert _sample(model, ["a red star"], [3], Sampling(guidance_scale=2.0)).shape == (1, 16)


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
    with pytest.raises(ValueError, match="at least 1"):
        generate_image(model, "a", n=0)


def _with_hole(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    mask = image.convert("RGBA")
    mask.paste((0, 0, 0, 0), box)
    return mask


def test_what_a_mask_covers_and_a_share_of_a_picture_are_drawn_anew(picture: Callable[..., Image.Image]) -> None:
    model, start = _model(), picture(1, size=(16, 16))
    tokenizer = ImageTokenizer(model.dvae)
    own = tokenizer.encode(model.preprocess(start)[None])[0]
    mask = _with_hole(start, (0, 8, 16, 16))  # the lower half
    anew = masked_tokens(model, mask)
    assert anew.view(4, 4).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    assert torch.equal(kept_tokens(own, 3, anew), torch.where(anew, -1, own))
    for change in (0.5, None):
        half = kept_tokens(own.repeat(100), 3, change=change) == -1
        assert 0.46 < float(half.float().mean()) < 0.54
    some = kept_tokens(own, 3, anew, change=0.5) == -1
    assert 0 < int(some.sum()) < int(anew.sum())
    assert not (some & ~anew).any()
    assert not torch.equal(kept_tokens(own, 3), kept_tokens(own, 4))
    made = generate_image(model, "a red star", n=2, seed=3, image=start, mask=mask)
    for seed, image in zip((3, 4), made, strict=True):
        ids = _sample(model, ["a red star"], [seed], known=kept_tokens(own, seed, anew)[None])
        assert torch.equal(ids[0, :8], own[:8])
        assert to_picture(tokenizer.decode(ids)[0]).tobytes() == image.tobytes()
    assert made[0].tobytes() != made[1].tobytes()


def test_a_start_that_cannot_be_is_refused(picture: Callable[..., Image.Image]) -> None:
    model, start = _model(), picture(1, size=(16, 16))
    with pytest.raises(ValueError, match="transparent nowhere"):
        generate_image(model, "a", image=start, mask=start)
    with pytest.raises(ValueError, match="must be the same"):
        generate_image(model, "a", image=start, mask=_with_hole(picture(1, size=(20, 16)), (0, 0, 5, 5)))
    with pytest.raises(ValueError, match="at most 1"):
        generate_image(model, "a", image=start, change=1.5)
    with pytest.raises(ValueError, match="need a picture"):
        generate_image(model, "a", change=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_style_is_the_first_token_of_its_texts(tied: bool) -> None:
    model = _model(styles=("drawing", "photo"), tied=tied)
    plain, drawing, photo = model.tokens_of(["a red star"] * 3, [None, "drawing", "photo"])
    assert (plain[0], drawing[0], photo[0]) == (1, model.tokenizer.vocab_size, model.tokenizer.vocab_size + 1)
    assert torch.equal(drawing[1:], plain[1:])
    text, _ = model(torch.stack([plain, photo]), torch.zeros(2, model.image_length, dtype=torch.int64))
    assert text.shape == (2, 9, model.tokenizer.vocab_size)  # no style is ever predicted
    assert not torch.allclose(text[0], text[1])
    kinds: list[str | None] = [None, "drawing", "photo"]
    guided = Sampling(guidance_scale=30.0)  # for without training a style changes little
    rows = _sample(model, ["a red star"] * 3, [0] * 3, guided, styles=kinds)
    assert len({tuple(row.tolist()) for row in rows}) == 3
    (image,) = generate_image(model, "a red star", seed=0, sampling=guided, style="photo")
    assert to_picture(ImageTokenizer(model.dvae).decode(rows[2:])[0]).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="this model has drawing, photo"):
        generate_image(model, "a red star", style="opera")


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"styles": ("drawing",)}])
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 48, 49])
def test_a_step_s_product_is_the_plain_one_for_any_number_of_rows(rows: int, bias: bool) -> None:
    layer = StepLinear(32, 24, bias=bias)
    x = torch.randn(rows, 1, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.equal(layer(x), expected)  # as it is while gradients are taken
