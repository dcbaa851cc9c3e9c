"""What holds of the text tokenizer and of sampling for whatever hypothesis thinks of."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.generation import Sampling, draw, filtered, guided_logits, points_of
from models.tokenizers import BOS, EOS, PAD, TextTokenizer

TOKENIZER = TextTokenizer.train(["a red star", "a blue circle", "zwei Sterne über dem Meer"] * 4, 320, 16)
LONG = TextTokenizer(TOKENIZER._tokenizer, 100_000)
TEXTS = st.lists(st.text() | st.sampled_from([PAD, BOS, EOS, " "])).map("".join)


@given(TEXTS)
@example("a red <eos> star")
@example("<pad>")
def test_a_text_is_one_row_between_its_beginning_and_its_end(text: str) -> None:
    """What is written like a special token is text too, or it would end a caption where its writer likes."""
    ids = TOKENIZER.encode(text)
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert len(ids) <= TOKENIZER.context_length
    assert all(TOKENIZER.eos_id < each < TOKENIZER.vocab_size for each in ids[1:-1])


@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_rows_with_padding_behind(texts: list[str]) -> None:
    tokens = TOKENIZER(texts)
    rows = [TOKENIZER.encode(text) for text in texts]
    assert tokens.shape == (len(texts), max(map(len, rows), default=2))
    for line, row in zip(tokens.tolist(), rows, strict=True):
        assert line == row + [TOKENIZER.pad_id] * (len(line) - len(row))


@given(TEXTS)
def test_what_was_not_cut_can_be_read_again(text: str) -> None:
    normal = TOKENIZER._tokenizer.normalizer.normalize_str(text)
    assert LONG.decode(LONG.encode(text)) == normal.strip()


LOGITS = arrays.arrays(np.float32, (3, 7), elements=st.floats(-(2.0**99), 2.0**99, width=32))
SAMPLINGS = st.builds(
    Sampling, temperature=st.floats(0, 10), top_k=st.integers(0, 9), top_p=st.floats(0, 1, exclude_min=True)
)
POINTS = arrays.arrays(np.float64, 3, elements=st.floats(0, 1, exclude_max=True))


@given(LOGITS, SAMPLINGS, POINTS)
@example(np.eye(3, 7, dtype="f4"), Sampling(temperature=5e-324), np.zeros(3))
@example(np.zeros((3, 7), "f4"), Sampling(temperature=1e-300, top_k=2, top_p=5e-324), np.full(3, math.nextafter(1, 0)))
def test_only_tokens_that_are_left_are_drawn(logits: np.ndarray, sampling: Sampling, points: np.ndarray) -> None:
    shares = filtered(torch.from_numpy(logits), sampling)
    assert shares.isfinite().all()
    assert (shares >= 0).all()
    assert torch.allclose(shares.sum(-1), torch.ones(3, dtype=torch.float64))
    drawn = draw(shares, torch.from_numpy(points))
    assert (shares.gather(-1, drawn[:, None]) > 0).all()
    likely = filtered(torch.from_numpy(logits), Sampling(sampling.temperature)).numpy()
    for row, before, left in zip(logits, likely, shares.numpy(), strict=True):
        assert before[left > 0].max() == before.max()  # the likeliest stays, or one that is as likely
        kept = (row.astype(np.float64) - row.max())[left > 0]  # as softmax sees them
        if sampling.top_k:  # those as good as the last are not told apart
            assert np.count_nonzero(kept > kept.min()) < sampling.top_k
        if sampling.temperature == 0:
            assert len(kept) == 1


@given(arrays.arrays(np.float32, (2, 9), elements=st.floats(-20, 20, width=32)), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_have_that_share(logits: np.ndarray, top_p: float) -> None:
    whole = filtered(torch.from_numpy(logits), Sampling()).numpy()
    left = filtered(torch.from_numpy(logits), Sampling(top_p=top_p)).numpy()
    for before, after in zip(whole, left, strict=True):
        kept = np.sort(before[after > 0])
        assert kept.sum() >= top_p - 1e-9
        assert kept[1:].sum() < top_p + 1e-9
        assert np.allclose(after[after > 0], before[after > 0] / kept.sum())


@given(arrays.arrays(np.float32, (4, 5), elements=st.floats(-100, 100, width=32)), st.floats(0, 100))
def test_guidance_goes_from_without_the_text_towards_with_it(logits: np.ndarray, scale: float) -> None:
    given_logits = torch.from_numpy(logits)
    guided = guided_logits(given_logits if scale != 1 else given_logits[:2], Sampling(guidance_scale=scale)).numpy()
    assert np.allclose(guided, logits[2:] + scale * (logits[:2] - logits[2:]) if scale != 1 else logits[:2], atol=1e-3)


@given(st.integers(0, 2**63 - 1), st.integers(1, 50), st.integers(1, 50))
def test_a_seeds_numbers_do_not_depend_on_how_many_are_asked_for(seed: int, few: int, many: int) -> None:
    first, second = points_of(seed, few), points_of(seed, many)
    shared = min(few, many)
    assert torch.equal(first[:shared], second[:shared])
    assert ((first >= 0) & (first < 1)).all()
