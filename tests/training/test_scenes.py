"""Scenes: seeded, true to their key, without the held-out pairs; captions that mean what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training import scenes
from training.scene_captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    PATTERN_WORDS,
    SHAPE_WORDS,
    caption,
    swapped_colours,
    swapped_relation,
)


def test_the_same_seed_gives_the_same_pixels_and_words() -> None:
    first, second = (scenes.sample(30, seed=5, captions=2) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert first.captions == second.captions
    assert not torch.equal(first.images, scenes.sample(30, seed=6).images)


@pytest.mark.parametrize("group", [1, 4])
def test_held_out_pairs_never_occur_and_occur_only_when_asked_for(group: int) -> None:
    def held(key: scenes.SceneKey) -> np.ndarray:
        return (key.shapes >= 0) & (key.colours == scenes.held_out_colour(key.shapes))

    rng = np.random.default_rng(0)
    assert not held(scenes.sample_key(4000, rng, "exclude", group=group)).any()
    assert held(scenes.sample_key(400, rng, "only")).any(1).all()
    mixed = held(scenes.sample_key(4000, rng, "any")).any(1)
    assert 0 < mixed.mean() < 1


def test_held_out_colours_are_those_of_the_specification() -> None:
    assert [int(scenes.held_out_colour(np.array(s))) for s in range(10)] == [(3 * s + 1) % 10 for s in range(10)]


def test_pixels_show_what_the_key_says() -> None:
    drawn = scenes.sample(200, seed=3, captions=0)
    palette = np.array(list(scenes.COLOURS.values()))
    wrong = 0
    for row in range(200):
        for slot in range(3):
            # A ring has its colour not in the middle, and what is around another has it not there either.
            if drawn.key.shapes[row, slot] in (-1, 6) or (drawn.key.kind[row] == 3 and slot == 0):
                continue
            if drawn.key.shapes[row, slot] == 8:  # the crescent's body lies left of its centre
                continue
            x, y = (drawn.key.positions[row, slot] * 64).astype(int)
            pixel = drawn.images[row, :, y, x].numpy()
            wrong += int(np.abs(palette - pixel).sum(1).argmin() != drawn.key.colours[row, slot])
    assert wrong == 0


def test_sizes_scale_and_objects_stay_inside() -> None:
    key = scenes.sample_key(500, np.random.default_rng(0))
    used = key.shapes >= 0
    low, high = key.positions - key.radii[..., None], key.positions + key.radii[..., None]
    assert low[used].min() >= 0
    assert high[used].max() <= 1
    assert scenes.sample(3, size=96).images.shape == (3, 3, 96, 96)


def test_groups_differ_in_their_objects_or_in_all_around_them() -> None:
    drawn = scenes.sample(800, seed=2, group=4, captions=1)
    kind, background, pattern = (getattr(drawn.key, n).reshape(-1, 4) for n in ("kind", "background", "pattern"))
    objects = np.concatenate([drawn.key.shapes, drawn.key.colours], 1).reshape(-1, 4, 6)
    same = (objects == objects[:, :1]).all((1, 2))
    assert 0.4 < same.mean() < 0.6
    assert (kind == kind[:, :1]).all()
    for around in (background, pattern):
        assert (around[~same] == around[~same][:, :1]).all()
    # Base, pattern, size and place (of three in a line: pattern), background.
    assert (background[same][:, :3] == background[same][:, :1]).all()
    assert 0.7 < (background[same][:, 3] != background[same][:, 0]).mean() < 0.95
    assert 0.7 < (pattern[same][:, 1] != pattern[same][:, 0]).mean() < 0.9
    different = [len(set(drawn.canonical[i : i + 4])) for i in range(0, 800, 4)]
    assert np.mean(different) > 3
    texts = np.array([texts[0] for texts in drawn.captions]).reshape(-1, 4)[same]
    shared = (texts == texts[:, :1]).all(1)
    assert 0.2 < shared.mean() < 0.45
    told = np.array(
        [BACKGROUND_WORDS[each] in text for each, text in zip(background[same].flat, texts.flat, strict=True)]
    )
    named = np.array([PATTERN_WORDS[each] in text for each, text in zip(pattern[same].flat, texts.flat, strict=True)])
    # A caption tells all that is different in its group, or it is the one caption of them all and tells nothing of it.
    assert (told.reshape(-1, 4) == ~shared[:, None]).all()
    assert (named.reshape(-1, 4) == ~shared[:, None]).all()


def test_captions_name_every_colour_and_shape() -> None:
    drawn = scenes.sample(200, seed=4, captions=3)
    for row, texts in enumerate(drawn.captions):
        for text in [*texts, drawn.canonical[row]]:
            words = text.replace(",", "").split()
            for slot in range(int((drawn.key.shapes[row] >= 0).sum())):
                assert any(word in words for word in SHAPE_WORDS[drawn.key.shapes[row, slot]]), text
                assert any(word in words for word in COLOUR_WORDS[drawn.key.colours[row, slot]]), text


def test_either_side_of_a_relation_tells_the_same() -> None:
    rng = np.random.default_rng(0)
    key = scenes.sample_key(1, rng, "any", ("beside",))
    key.colours[0, :2], key.shapes[0, :2] = (0, 5), (0, 3)
    told = {caption(key, 0, rng).partition(" on ")[0].replace("a picture of ", "") for _ in range(200)}
    plain = {text for text in told if "disc" not in text}
    assert any("red circle to the left of a blue star" in text for text in plain)
    assert any("blue star to the right of a red circle" in text for text in plain)
    assert not any("blue star to the left of" in text for text in plain)


def test_swaps_are_wrong_in_just_one_thing() -> None:
    key = scenes.sample_key(1, np.random.default_rng(0), "any", ("beside",))
    key.colours[0, :2], key.shapes[0, :2] = (0, 5), (0, 3)
    true = caption(key, 0)
    assert swapped_colours(key, 0) != true
    assert sorted(swapped_colours(key, 0).split()) == sorted(true.split())
    assert sorted(swapped_relation(key, 0).split()) == sorted(true.split())
    assert swapped_relation(key, 0) != swapped_colours(key, 0)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds are single"):
        scenes.sample(1, kinds=("pile",))
