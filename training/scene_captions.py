"""The small grammar that puts a scene into words, and the ways to put it into wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from training.scenes import SceneKey

SHAPE_WORDS = (
    ("circle", "disc"),
    ("square", "box"),
    ("triangle",),
    ("star",),
    ("heart",),
    ("cross", "plus"),
    ("ring", "donut"),
    ("hexagon",),
    ("crescent", "moon"),
    ("diamond", "rhombus"),
)
COLOUR_WORDS = (
    ("red",),
    ("orange",),
    ("yellow",),
    ("green",),
    ("cyan", "turquoise"),
    ("blue",),
    ("purple", "violet"),
    ("pink",),
    ("white",),
    ("black",),
)
SIZE_WORDS = (("small", "tiny", "little"), ("medium",), ("large", "big", "huge"), ("large", "big", "huge"))
BACKGROUND_WORDS = ("gray", "beige", "navy", "mint", "lavender", "maroon")
PATTERN_WORDS = ("plain", "gradient", "striped", "checkered", "dotted")
PLACE_WORDS = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
# By kind: the words between slot 0 and slot 1, and those of the same scene told from slot 1.
RELATIONS = {
    1: (("to the left of", "left of"), ("to the right of", "right of")),
    2: (("above", "over"), ("below", "under")),
    3: (("around", "containing"), ("inside", "in")),
}


def caption(
    key: SceneKey, row: int, rng: np.random.Generator | None = None, details: Literal["some", "all", "none"] = "some"
) -> str:
    """One caption of a scene: colours, shapes and relations always, of the other details some, all or none. Without rng
    the canonical one.

    The canonical caption names everything but sizes of rows and columns, first slot first, without synonyms; of a scene
    with one object inside another it tells the inner one first.
    """

    def sometimes(share: float) -> bool:
        told = rng is None or rng.random() < share
        return told if details == "some" else details == "all"

    kind = int(key.kind[row])
    count = int((key.shapes[row] >= 0).sum())
    sized = count < 3 and sometimes(0.5)
    objects = [_object(key, row, slot, sized, rng) for slot in range(count)]
    if count == 1:
        text = objects[0]
        if sometimes(0.5):
            text += " " + PLACE_WORDS[int(key.place[row])]
    elif count == 2:
        turned = kind == 3 if rng is None else bool(rng.random() < 0.5)
        relation = _choose(RELATIONS[kind][int(turned)], rng)
        first, second = (objects[1], objects[0]) if turned else (objects[0], objects[1])
        text = f"{first} {relation} {second}"
    else:
        line = "row" if kind == 4 else "column"
        text = f"{objects[0]}, {objects[1]} and {objects[2]} in a {line}"
    if sometimes(0.5):
        words = [BACKGROUND_WORDS[key.background[row]], "background"]
        if sometimes(0.6):
            words.insert(0, PATTERN_WORDS[key.pattern[row]])
        text += " on " + _article(" ".join(words))
    if rng is not None and rng.random() < 0.15:
        text = f"a picture of {text}"
    return text


def swapped_colours(key: SceneKey, row: int) -> str:
    """The canonical caption with the colours of the first two objects exchanged: a wrong one, if they differ."""
    wrong = key.take(np.array([row]))
    wrong.colours[0, [0, 1]] = wrong.colours[0, [1, 0]]
    return caption(wrong, 0)


def swapped_relation(key: SceneKey, row: int) -> str:
    """The canonical caption with the first two objects in each other's place: a wrong one."""
    wrong = key.take(np.array([row]))
    for values in (wrong.colours, wrong.shapes, wrong.sizes):
        values[0, [0, 1]] = values[0, [1, 0]]
    return caption(wrong, 0)


def _object(key: SceneKey, row: int, slot: int, sized: bool, rng: np.random.Generator | None) -> str:
    words = [_choose(COLOUR_WORDS[key.colours[row, slot]], rng), _choose(SHAPE_WORDS[key.shapes[row, slot]], rng)]
    if sized:
        words.insert(0, _choose(SIZE_WORDS[key.sizes[row, slot]], rng))
    return _article(" ".join(words))


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _choose(words: tuple[str, ...], rng: np.random.Generator | None) -> str:
    if rng is None or len(words) == 1 or rng.random() < 0.6:
        return words[0]
    return words[1 + int(rng.integers(len(words) - 1))]
