"""Captioned pictures for training: sources that draw rows, and a mixture whose batches are a function of the step.

Nothing here has hidden state: `Mixture.batch(step)` depends on the seed and the step alone. That is what makes resuming
at any step exact, workers interchangeable and ranks disjoint.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.errors import DataError
from models.readers import UNREADABLE, BadRows, Record, fit_rgba, open_picture
from training import scenes
from training.augment import Augmentation, augment, collage
from training.method import Batch

log = logging.getLogger(__name__)
CAPTION_IDS = 16  # of a picture's captions, so many are told apart from negatives; batches need one width on all ranks
Tokenize = Callable[[Sequence[str]], Tensor]


class Source(Protocol):
    """Where pictures with captions come from. len() is the number of pictures, None where there is no end."""

    name: str

    def size(self) -> int | None: ...
    def draw(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> tuple[Tensor, list[list[str]]]:
        """rows (n,) -> uint8 (n, 3, size, size), augmented, and the captions of each, the one to train on first."""
        ...

    def pictures(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
        """rows (n,) -> uint8 (n, 3 or 4, size, size), as they are."""
        ...

    def corpus(self) -> Iterator[str]:
        """Texts to learn a vocabulary from."""
        ...


@dataclass
class ArraySource:
    """Pictures held decoded. images: uint8 (N, 3 or 4, H, W). captions: any number an image; one is drawn each time.

    labels: class names.
    """

    name: str
    images: Tensor
    captions: list[list[str]] = field(default_factory=list)
    augmentation: Augmentation = field(default_factory=Augmentation)
    labels: list[str] | None = None

    def size(self) -> int:
        return len(self.images)

    def draw(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> tuple[Tensor, list[list[str]]]:
        return _changed(
            self.images[torch.from_numpy(rows)], [self.captions[row] for row in rows], size, self.augmentation, rng
        )

    def pictures(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
        images = self.images[torch.from_numpy(rows)]
        if images.shape[-2:] != (size, size):
            raise ValueError(
                f"{self.name} is held at {images.shape[-2]} x {images.shape[-1]} pixels, {size} are wanted"
            )
        return images

    def corpus(self) -> Iterator[str]:
        for texts in self.captions:
            yield from texts


@dataclass
class StreamSource:
    """Pictures decoded when they are drawn, for sets that would not fit decoded; give the trainer workers for it.

    One that cannot be read is reported once and the next one takes its place. side: at which pictures are decoded.
    """

    name: str
    records: list[Record]
    captions: list[list[str]]
    side: int
    bad: BadRows
    augmentation: Augmentation = field(default_factory=Augmentation)
    _broken: set[int] = field(default_factory=set)

    def size(self) -> int:
        return len(self.records)

    def draw(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> tuple[Tensor, list[list[str]]]:
        decoded = [self._decode(int(row), self.side) for row in rows]
        pixels = torch.from_numpy(np.stack([picture for _, picture in decoded]))
        captions = [self.captions[row] for row, _ in decoded]
        return _changed(pixels, captions, size, self.augmentation, rng)

    def pictures(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.stack([self._decode(int(row), size)[1] for row in rows]))

    def corpus(self) -> Iterator[str]:
        for texts in self.captions:
            yield from texts

    def _decode(self, row: int, side: int) -> tuple[int, np.ndarray]:
        for candidate in (*range(row, len(self.records)), *range(row)):
            if candidate in self._broken:
                continue
            try:
                return candidate, fit_rgba(open_picture(self.records[candidate].image), side)
            except UNREADABLE as error:
                self._broken.add(candidate)
                log.warning("%s is skipped: %s", self.records[candidate].where, error)
                self.bad.add(self.records[candidate].where, str(error))
        raise DataError(f"no picture of {self.name} can be read")


@dataclass
class SceneSource:
    """Scenes drawn afresh for every step, partly in groups that differ in little: hard negatives for a batch.

    clean: the share of draws without noise, such as a generator's pictures that a CLIP is to judge.
    """

    name: str = "scenes"
    group: int = 4
    grouped_share: float = 0.5
    clean: float = 0.5

    def size(self) -> None:
        return None

    def draw(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> tuple[Tensor, list[list[str]]]:
        grouped = int(len(rows) * self.grouped_share) // self.group * self.group
        parts = [(grouped, self.group), (len(rows) - grouped, 1)]
        noise = self._noise(rng)
        drawn = [
            scenes.sample(count, size=size, seed=int(rng.integers(2**62)), captions=1, group=group, noise=noise)
            for count, group in parts
            if count
        ]
        return torch.cat([part.images for part in drawn]), [texts for part in drawn for texts in part.captions]

    def pictures(self, rows: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
        seed = int(rng.integers(2**62))
        return scenes.sample(len(rows), size=size, seed=seed, captions=0, noise=self._noise(rng)).images

    def _noise(self, rng: np.random.Generator) -> float:
        return scenes.NOISE if rng.random() >= self.clean else 0.0

    def corpus(self) -> Iterator[str]:
        for texts in scenes.sample(4000, size=8, seed=1, captions=2).captions:
            yield from texts


class Batches(Dataset[Batch]):
    """Which rows of which source each step's batch on this rank has, by weight; what is made of them is the heirs'.

    A batch is made of chunks, each from one source; every step has the same mixture but for rounding. Finite sources
    are gone through epoch by epoch in a fresh order without repeats. weights are shares of the chunks; they need not
    sum to 1. size: side in pixels of the pictures.
    batch_size counts the rows of all ranks together and must be a multiple of chunk x world_size.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        size: int,
        batch_size: int,
        steps: int,
        chunk: int = 64,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        chunk = min(chunk, batch_size // world_size)
        if batch_size % (chunk * world_size):
            raise ValueError(f"batch_size {batch_size} is no multiple of chunk {chunk} x {world_size} processes")
        self.sources, self.image_size = list(sources), size
        self.steps, self.chunk, self.seed = steps, chunk, seed
        self.rank, self.world_size = rank, world_size
        self.chunks = batch_size // chunk
        shares = np.asarray(weights, float) / np.sum(weights)
        self._plan = _plan(shares, steps, self.chunks, np.random.default_rng([seed, 1]))
        flat = self._plan.ravel()
        # How many chunks of the same source came before: its place in that source's stream.
        turn = np.zeros(len(flat), np.int64)
        for index in range(len(self.sources)):
            mine = flat == index
            turn[mine] = np.arange(int(mine.sum()))
        self._turn = turn.reshape(self._plan.shape)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.steps

    def drawn(self, step: int) -> Iterator[tuple[Source, np.ndarray, np.random.Generator]]:
        """Each source that has a part in this step, its rows, and what to draw from for them."""
        share = self.chunks // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        plan, turns = self._plan[step, mine], self._turn[step, mine]
        for index in np.unique(plan).tolist():
            rng = np.random.default_rng([self.seed, 2, step, self.rank, index])
            rows = np.concatenate([self._rows(index, turn) for turn in turns[plan == index].tolist()])
            yield self.sources[index], rows, rng

    def _rows(self, index: int, turn: int) -> np.ndarray:
        places = np.arange(turn * self.chunk, (turn + 1) * self.chunk)
        size = self.sources[index].size()
        if size is None:
            return places
        return np.array([self._order(index, place // size)[place % size] for place in places.tolist()])

    def _order(self, index: int, epoch: int) -> np.ndarray:
        key = (index, int(epoch))
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != index or k[1] >= epoch - 1}
            size = self.sources[index].size() or 0
            self._orders[key] = np.random.default_rng([self.seed, 3, index, int(epoch)]).permutation(size)
        return self._orders[key]


class Mixture(Batches):
    """Batches of augmented pictures with captions: {"images", "tokens", "captions"} as CLIP takes them."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], tokenize: Tokenize, **options: Any) -> None:
        """options: of Batches."""
        super().__init__(sources, weights, **options)
        self.tokenize = tokenize

    def __getitem__(self, step: int) -> Batch:
        images: list[Tensor] = []
        captions: list[list[str]] = []
        for source, rows, rng in self.drawn(step):
            part, texts = source.draw(rows, self.image_size, rng)
            images.append(part)
            captions += texts
        return {
            "images": torch.cat(images),
            "tokens": self.tokenize([texts[0] for texts in captions]),
            "captions": torch.tensor([_ids(texts) for texts in captions]),
        }


class PictureBatches(Batches):
    """Batches of pictures as they are, {"images": uint8 (B, 3, size, size)}, for methods that draw views themselves."""

    def __getitem__(self, step: int) -> Batch:
        parts = [source.pictures(rows, self.image_size, rng) for source, rows, rng in self.drawn(step)]
        return {"images": torch.cat([opaque(part) for part in parts])}


def file_name(data: str) -> str:
    """What a data set, which may be a path, is called in the name of a file."""
    return data.replace("/", "_")[-40:]


def opaque(images: Tensor) -> Tensor:
    """uint8 (B, 3 or 4, H, W), the fourth channel being opacity -> (B, 3, H, W) on white."""
    if images.shape[1] == 3:
        return images
    opacity = images[:, 3:].float() / 255
    return (images[:, :3] * opacity + 255 * (1 - opacity)).round().byte()


def resized(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in 0..255, of any type -> uint8 (B, 3, size, size); a picture of that size stays as it is."""
    scaled = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
    return scaled.round().clamp(0, 255).byte()


def _changed(
    pixels: Tensor, captions: list[list[str]], size: int, recipe: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, list[list[str]]]:
    """Augmented pictures, and the captions of each, the one to train on first; a collage has those of both pictures."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    images = augment(pixels, size, recipe, generator)
    texts = [_shuffled_first(own, rng) for own in captions]
    if recipe.collage:
        images, others = collage(images, recipe.collage, generator)
        texts = [
            own if other == row else [own[0], *captions[other], *own[1:]]
            for row, (own, other) in enumerate(zip(texts, others.tolist(), strict=True))
        ]
    return images, texts


def _shuffled_first(texts: list[str], rng: np.random.Generator) -> list[str]:
    """The texts with one of them, drawn, in front."""
    chosen = int(rng.integers(len(texts)))
    return [texts[chosen], *texts[:chosen], *texts[chosen + 1 :]]


def _ids(texts: list[str]) -> list[int]:
    """An id for each of the first CAPTION_IDS texts, the same in every process; fewer texts are repeated."""
    ids = [zlib.crc32(text.casefold().encode()) for text in texts[:CAPTION_IDS]]
    return (ids * CAPTION_IDS)[:CAPTION_IDS]


def _plan(shares: np.ndarray, steps: int, chunks: int, rng: np.random.Generator) -> np.ndarray:
    """The source of every chunk, (steps, chunks): systematic sampling, so that each step has nearly the same mixture.

    Independent draws make some batches all of one kind, which unsettles batch norm and the loss.
    """
    places = (np.arange(chunks) + rng.random((steps, 1))) / chunks
    plan = np.searchsorted(np.cumsum(shares), places, side="right").clip(max=len(shares) - 1)
    return rng.permuted(plan, axis=1)  # or each rank would always have the same sources


class _Tail(Dataset[Batch]):
    """A dataset from one step on."""

    def __init__(self, data: Dataset[Batch], start: int) -> None:
        self.data, self.start = data, start

    def __len__(self) -> int:
        return len(self.data) - self.start  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        return self.data[index + self.start]


def batches_from(data: Dataset[Batch], start: int, workers: int) -> Iterator[Batch]:
    """The batches of step `start` and on, made ahead by worker processes if there are any."""
    return iter(
        DataLoader(
            _Tail(data, start),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a seed for its workers; from the global generator it would change what the model draws.
            generator=torch.Generator(),
        )
    )
