"""Procedural captioned pictures with an exact answer key: unlimited, seeded, drawn with signed distances.

A scene holds one to three coloured shapes on a plain or patterned background. Everything that a caption can say is in
the key, so that retrieval, binding, relations and generation can be judged exactly. One colour for each shape is held
out from training always (`held_out_colour`), which makes composition testable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from training.scene_captions import caption

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "hexagon", "crescent", "diamond")
COLOURS = {
    "red": (214, 36, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "cyan": (50, 205, 220),
    "blue": (40, 80, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
BACKGROUNDS = {
    "gray": (125, 125, 125),
    "beige": (214, 196, 156),
    "navy": (30, 40, 84),
    "mint": (170, 222, 186),
    "lavender": (200, 188, 232),
    "maroon": (92, 32, 44),
}
PATTERNS = ("plain", "gradient", "striped", "checkered", "dotted")
KINDS = ("single", "beside", "stacked", "inside", "row", "column")
SIZES = ("small", "medium", "large", "outer")
_EXCHANGE = np.array([[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 2, 0], [2, 0, 1]])  # all but the first move
OUTER_SHAPES = (0, 1, 4, 6, 7)  # circle, square, heart, ring, hexagon: those with room inside
COUNTS = np.array([1, 2, 2, 2, 3, 3])
KIND_SHARES = np.array([0.34, 0.17, 0.17, 0.16, 0.08, 0.08])
RADII = np.array([[7.0, 8.5], [10.0, 12.0], [14.0, 17.0], [19.0, 23.0]])  # pixels at 64 px, by size
NOISE = 0.02  # of the pixels: its deviation, the whole range being 1

Holdout = Literal["exclude", "only", "any"]


@dataclass
class SceneKey:
    """What N scenes show. Unused object slots are -1 (NaN in positions and radii).

    Slot 0 is the only, left, upper or outer object. kind, background, pattern, place: (N,) indices into KINDS,
    BACKGROUNDS, PATTERNS and the nine places (row by row, single objects only). shapes, colours, sizes: (N, 3).
    positions: (N, 3, 2) x and y, radii: (N, 3), as shares of the side. style: (N, 4) free parameters of the pattern.
    """

    kind: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    sizes: np.ndarray
    positions: np.ndarray
    radii: np.ndarray
    place: np.ndarray
    background: np.ndarray
    pattern: np.ndarray
    style: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, rows: np.ndarray) -> SceneKey:
        """The scenes of these rows."""
        return SceneKey(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass
class Scenes:
    """images: uint8 (N, 3, S, S); captions: several of each scene; canonical: one of each, without synonyms."""

    images: Tensor
    key: SceneKey
    captions: list[list[str]]
    canonical: list[str]


def held_out_colour(shape: np.ndarray) -> np.ndarray:
    """The colour index that a shape never has in training."""
    return (3 * shape + 1) % 10


def sample(
    n: int,
    *,
    size: int = 64,
    seed: int = 0,
    holdout: Holdout = "exclude",
    captions: int = 4,
    kinds: tuple[str, ...] = KINDS,
    group: int = 1,
    noise: float = NOISE,
) -> Scenes:
    """Draw n scenes; the same arguments give the same pixels and captions.

    holdout: "exclude" the held-out colour x shape pairs (for training), "only" scenes with such a pair, or "any".
    group: runs of this many scenes differ in little, the hard negatives of contrastive training: half of the runs in
    shapes or in which object is where, half of them in pattern, size and place, or background. Of these the captions
    tell everything or, in a third, one caption that leaves it all open is that of the whole run. noise: deviation of
    the pixels' noise, the whole range being 1. Raises ValueError for an unknown kind or holdout.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or holdout not in ("exclude", "only", "any"):
        raise ValueError(f"unknown kinds {sorted(unknown)} or holdout {holdout!r}; kinds are {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, n, 64, group])
    key = sample_key(n, rng, holdout, kinds, group)
    parts = np.split(np.arange(n), range(256, n, 256))
    images = torch.cat([render(key.take(rows), size, rng, noise) for rows in parts])
    if group == 1:
        texts = [[caption(key, i, rng) for _ in range(captions)] for i in range(n)]
    else:
        texts = _texts_of_groups(key, rng, captions, group)
    return Scenes(images, key, texts, [caption(key, i) for i in range(n)])


def sample_key(
    n: int, rng: np.random.Generator, holdout: Holdout = "exclude", kinds: tuple[str, ...] = KINDS, group: int = 1
) -> SceneKey:
    """Draw what n scenes show, by rejection: whatever the constraints, each is uniform over the allowed ones."""
    parts: list[SceneKey] = []
    missing = n
    while missing > 0:
        key = _propose(-(-max(64, missing * 2) // group) * group, rng, kinds, group, holdout == "only")
        fine = _allowed(key, holdout)
        if group > 1:  # keep groups whole
            fine = np.repeat(fine.reshape(-1, group).all(1), group)
        rows = np.flatnonzero(fine)[:missing]
        parts.append(key.take(rows))
        missing -= len(rows)
    return SceneKey(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(SceneKey)})


def _propose(n: int, rng: np.random.Generator, kinds: tuple[str, ...], group: int, plant: bool) -> SceneKey:
    allowed = np.array([KINDS.index(kind) for kind in kinds])
    shares = KIND_SHARES[allowed] / KIND_SHARES[allowed].sum()
    bases = n // group

    def grouped(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, group, axis=0)

    kind = grouped(rng.choice(allowed, bases, p=shares))
    used = np.arange(3) < COUNTS[kind][:, None]
    colours = grouped(rng.integers(0, 10, (bases, 3)))
    # In a group the first scene is the base; of the others one has fresh shapes, one its colours exchanged and one its
    # objects, with nothing else changed that a caption could tell: what is left is the binding and the place.
    # Half of the groups keep their objects: one scene has a fresh pattern, one fresh sizes and places, one a fresh
    # background. Without these, patterns and places were what unseen scenes were mistaken in.
    shapes = grouped(rng.integers(0, 10, (bases, 3)))
    mode = np.tile(np.arange(group) % 4, bases)
    if group > 1:
        mode += 4 * grouped(rng.random(bases) < 0.35)  # half of what is left, for fewer of these are rejected
    keeps = mode >= 4
    sizes, positions, radii, place = _arrange(kind, rng, n, group, mode == 6)
    if group > 1:
        order = _EXCHANGE[np.where(COUNTS[kind] == 3, rng.integers(1, 6, n), np.where(COUNTS[kind] == 2, 1, 0))]
        fresh = rng.integers(0, 10, (n, 3))
        shapes = np.where(((mode == 1) | (~keeps & (mode > 1) & (COUNTS[kind] == 1)))[:, None], fresh, shapes)
        moved = np.take_along_axis(colours, order, 1)
        colours = np.where((~keeps & (mode >= 2))[:, None], moved, colours)
        shapes = np.where((mode == 3)[:, None], np.take_along_axis(shapes, order, 1), shapes)
        move = ((mode == 3) & (kind != KINDS.index("inside")))[:, None]  # what is inside stays the smaller one
        sizes = np.where(move, np.take_along_axis(sizes, order, 1), sizes)
        radii = np.where(move, np.take_along_axis(radii, order, 1), radii)
    outer = kind == KINDS.index("inside")
    shapes[outer, 0] = np.array(OUTER_SHAPES)[rng.integers(0, len(OUTER_SHAPES), outer.sum())]
    shapes = np.where(keeps[:, None], grouped(shapes[::group]), shapes)
    if plant:
        slot = rng.integers(0, COUNTS[kind])
        rows = np.arange(n)
        colours[rows, slot] = held_out_colour(shapes[rows, slot])
    background = grouped(rng.integers(0, len(BACKGROUNDS), bases))
    pattern = grouped(rng.integers(0, len(PATTERNS), bases))
    style = rng.random((n, 4))
    if group > 1:
        # Of three in a row or column no caption tells sizes or places.
        patterned = (mode == 5) | ((mode == 6) & (COUNTS[kind] == 3))
        pattern = np.where(patterned, rng.integers(0, len(PATTERNS), n), pattern)
        background = np.where(mode == 7, rng.integers(0, len(BACKGROUNDS), n), background)
    hide = ~used
    return SceneKey(
        kind=kind,
        shapes=np.where(hide, -1, shapes),
        colours=np.where(hide, -1, colours),
        sizes=np.where(hide, -1, sizes),
        positions=np.where(hide[..., None], np.nan, positions),
        radii=np.where(hide, np.nan, radii),
        place=place,
        background=background,
        pattern=pattern,
        style=style,
    )


def _allowed(key: SceneKey, holdout: Holdout) -> np.ndarray:
    used = key.shapes >= 0
    held = used & (key.colours == held_out_colour(key.shapes))
    fine = np.ones(len(key), bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):  # no two objects of a scene are alike, or relations would mean nothing
        fine &= ~(used[:, b] & (key.shapes[:, a] == key.shapes[:, b]) & (key.colours[:, a] == key.colours[:, b]))
    inside = key.kind == KINDS.index("inside")
    fine &= ~(inside & (key.colours[:, 0] == key.colours[:, 1]) & (key.shapes[:, 0] != 6))
    if holdout == "exclude":
        return fine & ~held.any(1)
    return fine & held.any(1) if holdout == "only" else fine


def _texts_of_groups(key: SceneKey, rng: np.random.Generator, captions: int, group: int) -> list[list[str]]:
    """Captions of scenes in groups. Where all of a group has the same objects they must tell what is different, or
    nothing of it: the loss then draws all of the group to the one text, which is what a short query asks for."""
    texts: list[list[str]] = []
    for start in range(0, len(key), group):
        rows = range(start, min(start + group, len(key)))
        same = all((values[rows] == values[start]).all() for values in (key.shapes, key.colours))
        if same and rng.random() < 1 / 3:
            texts += [[caption(key, start, rng, "none") for _ in range(captions)]] * len(rows)
        else:
            details: Literal["all", "some"] = "all" if same else "some"
            texts += [[caption(key, row, rng, details) for _ in range(captions)] for row in rows]
    return texts


def _arrange(
    kind: np.ndarray, rng: np.random.Generator, n: int, group: int, alone: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Sizes, centres and radii for each arrangement, and the place of single objects. Groups share sizes and place but
    for the scenes that are `alone`."""

    def drawn(high: int, *shape: int) -> np.ndarray:
        values = np.repeat(rng.integers(0, high, (n // group, *shape)), group, axis=0)
        if alone.any():
            values[alone] = rng.integers(0, high, (int(alone.sum()), *shape))
        return values

    sizes = drawn(3, 3)
    centres = np.full((n, 3, 2), 32.0)
    place = np.full(n, -1)
    jitter = rng.uniform(-1, 1, (n, 3, 2))
    single = kind == 0
    place[single] = drawn(9)[single]
    for index, name in enumerate(KINDS):
        rows = np.flatnonzero(kind == index)
        if name in ("beside", "stacked"):
            axis = int(name == "stacked")
            sizes[rows, :2] = drawn(2, 2)[rows]
            centres[rows[:, None], [0, 1], axis] = np.array([18.5, 45.5])
            jitter[rows] *= np.array([1.5, 5.0])[:: 1 if axis == 0 else -1]
        elif name == "inside":
            sizes[rows, 0], sizes[rows, 1] = 3, 0
            jitter[rows, 1] = jitter[rows, 0]
            jitter[rows] *= 5.0
        elif name in ("row", "column"):
            axis = int(name == "column")
            sizes[rows] = 0
            centres[rows[:, None], [0, 1, 2], axis] = np.array([11.5, 32.0, 52.5])
            jitter[rows] *= np.array([1.0, 4.0])[:: 1 if axis == 0 else -1]
    low, high = RADII[sizes, 0], RADII[sizes, 1]
    radii = rng.uniform(low, high)
    rows = np.flatnonzero(single)
    reach = np.minimum(19.0, 30.5 - radii[rows, 0])  # a large object moves less, and stays whole
    column, line = place[rows] % 3 - 1, place[rows] // 3 - 1
    centres[rows, 0] += np.stack([column, line], 1) * reach[:, None]
    jitter[rows] *= 1.5
    centres += jitter
    centres = np.clip(centres, radii[..., None] + 0.5, 63.5 - radii[..., None])
    return sizes, centres / 64, radii / 64, place


def render(key: SceneKey, size: int = 64, rng: np.random.Generator | None = None, noise: float = NOISE) -> Tensor:
    """Draw the scenes of a key. -> uint8 (N, 3, size, size). rng: colour jitter, turns and noise (default seed 0)."""
    rng = rng or np.random.default_rng(0)
    n = len(key)
    canvas = _backgrounds(key, size, rng)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    turns = torch.from_numpy(rng.uniform(-0.2, 0.2, (n, 3))).float()
    tints = torch.from_numpy(rng.normal(0, 0.02, (n, 3, 3))).float()
    for slot in range(3):
        for shape, distance in enumerate(_DISTANCES):
            rows = torch.from_numpy(np.flatnonzero(key.shapes[:, slot] == shape))
            if not len(rows):
                continue
            centre = torch.from_numpy(key.positions[rows.numpy(), slot]).float()
            radius = torch.from_numpy(key.radii[rows.numpy(), slot]).float()[:, None, None]
            dx = (axis[None, None, :] - centre[:, 0, None, None]) / radius
            dy = (axis[None, :, None] - centre[:, 1, None, None]) / radius
            cos, sin = (f(turns[rows, slot])[:, None, None] for f in (torch.cos, torch.sin))
            signed = distance(cos * dx + sin * dy, cos * dy - sin * dx)
            cover = (0.5 - signed * radius * size).clamp_(0, 1)[:, None]
            colour = palette[torch.from_numpy(key.colours[rows.numpy(), slot])] + tints[rows, slot]
            canvas[rows] += cover * (colour[:, :, None, None] - canvas[rows])
    if noise:
        canvas.add_(torch.from_numpy(rng.standard_normal((n, 3, size, size), dtype=np.float32)), alpha=noise)
    return canvas.mul_(255).round_().clamp_(0, 255).byte()


def _backgrounds(key: SceneKey, size: int, rng: np.random.Generator) -> Tensor:
    """(N, 3, size, size) in 0..1: the plain colour, or it and a lighter or darker variant of it in a pattern."""
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[torch.from_numpy(key.background)] / 255
    style = torch.from_numpy(key.style).float()[:, :, None, None]
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (64 / size)
    x, y = axis[None, None, :], axis[None, :, None]
    angle = style[:, 0] * math.tau
    along = torch.cos(angle) * x + torch.sin(angle) * y
    period = 8 + 6 * style[:, 1]
    phase = style[:, 2] * period
    striped = (((along + phase) / period) % 1 < 0.5).float()
    checkered = ((torch.floor((x + phase) / period * 2) + torch.floor((y + phase) / period * 2)) % 2).float()
    dotted_x, dotted_y = ((x + phase) % period) / period - 0.5, ((y + phase) % period) / period - 0.5
    dotted = (dotted_x**2 + dotted_y**2 < 0.25**2).float()
    gradient = ((along - 32 * (torch.cos(angle) + torch.sin(angle))) / 64 + 0.5).clamp(0, 1)
    patterns = torch.stack([torch.zeros(len(key), size, size), gradient, striped, checkered, dotted], 1)
    weight = patterns[torch.arange(len(key)), torch.from_numpy(key.pattern)][:, None]
    shift = torch.where(colours.mean(1) > 0.45, -0.13, 0.11)[:, None, None, None]
    return colours[:, :, None, None] + weight * shift


def _polygon(x: Tensor, y: Tensor, angles: tuple[float, ...], apothem: float) -> Tensor:
    return torch.stack([math.cos(a) * x + math.sin(a) * y for a in angles]).amax(0) - apothem


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, apex up, inner radius 0.42: fold into one half of a point, then one edge is a half plane."""
    angle = (torch.atan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    radius = torch.hypot(x, y)
    u, v = radius * torch.cos(angle), radius * torch.sin(angle).abs()
    inner_u, inner_v = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    normal_u, normal_v = inner_v, 1 - inner_u
    return ((u - 1) * normal_u + v * normal_v) / math.hypot(normal_u, normal_v)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """The exact distance to a square's corner with two half discs, scaled to radius 1."""
    scale = 1.62
    u, v = x.abs() / scale, 0.56 - y / scale
    lobe = torch.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    along = (u + v).clamp(min=0) / 2
    corner = torch.minimum(torch.hypot(u, v - 1), torch.hypot(u - along, v - along)) * torch.sign(u - v)
    return torch.where(u + v > 1, lobe, corner) * scale


_DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 1,
    lambda x, y: _box(x, y, 0.86, 0.86),
    lambda x, y: _polygon(x, y, (math.pi / 2, -math.pi / 6, -5 * math.pi / 6), 0.5),
    _star,
    _heart,
    lambda x, y: torch.minimum(_box(x, y, 0.95, 0.33), _box(x, y, 0.33, 0.95)),
    lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.48 - torch.hypot(x, y)),
    lambda x, y: _polygon(x, y, tuple(math.pi * i / 3 for i in range(6)), math.sqrt(3) / 2),
    lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.8 - torch.hypot(x - 0.5, y)),
    lambda x, y: (x.abs() / 0.63 + y.abs() / 1.06 - 1) * (0.63 * 1.06 / math.hypot(0.63, 1.06)),
)
