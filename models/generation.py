"""Sampling: token by token from a DALLETransformer, many prompts at a time, each row by its own seed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.dalle import DALLETransformer
from models.tokenizers import ImageTokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: divides the logits, 0 takes the likeliest. top_k: of so many likeliest only, 0 for all. top_p: of the
    fewest that have this share together (arXiv:1904.09751). guidance_scale: how far the logits are moved from those
    without a text towards those with it (arXiv:2207.12598); 1 is the text's own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance_scale < 0:
            raise ValueError(
                f"temperature {self.temperature} and guidance_scale {self.guidance_scale} must be 0 or more, top_k "
                f"{self.top_k} 0 or more, top_p {self.top_p} above 0 and at most 1"
            )


class TokenReader:
    """What sampling reads tokens with: up to `rows` sequences at once, their keys and values in one cache.

    fixed (on a GPU): every step is of all rows, in use or not, so that it is compiled, and on a GPU one CUDA graph, and
    so that in bfloat16 too a row's logits do not depend on how many others there are.
    """

    def __init__(self, model: DALLETransformer, rows: int, fixed: bool | None = None) -> None:
        self.model, self.rows = model, rows
        self.cache = model.new_cache(rows)
        self.device = self.cache.keys.device
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        if self.fixed:
            self._read_all = torch.compile(model.read_ids, fullgraph=True)
            self._ids, self._places = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
            self._replay: Callable[[], Tensor] | None = None

    def text(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Texts int64 (B, T) into the rows from `start` on -> logits of their first tokens, (B, codes)."""
        return self.model.read_text(tokens.to(self.device), self.cache.block(start, start + len(tokens)))

    def ids(self, ids: Tensor, places: Tensor) -> Tensor:
        """One more token of each of the first B rows, int64 (B,) each -> logits of the next, (B, codes)."""
        if not self.fixed:
            return self.model.read_ids(ids.to(self.device), places.to(self.device), self.cache.block(0, len(ids)))
        # What is left of earlier steps in the other rows is read again, and nobody looks at it.
        self._ids[: len(ids)], self._places[: len(ids)] = ids, places
        if self._replay is None:
            self._replay = self._captured()
        return self._replay()[: len(ids)].clone()  # a graph's own memory is written again

    def _captured(self) -> Callable[[], Tensor]:
        """The step over all rows; it can be taken again and again, for it writes the same into the same places."""

        def step() -> Tensor:
            return self._read_all(self._ids, self._places, self.cache)

        return captured(step, self.device) if self.device.type == "cuda" else step


def captured(work: Callable[[], Tensor], device: torch.device, pool: Any = None) -> Callable[[], Tensor]:
    """Work on a GPU as a CUDA graph: one launch in place of one for each operation. It reads and writes the same memory
    every time, its result too. pool: a graph_pool_handle to share with graphs that never run at the same time.

    Not torch.compile's own graphs: those are bound to the thread that they were made in, and a server has several.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what compilers and libraries do in their first calls cannot be captured
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def guided_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (2 B, K), those with the text before those without -> (B, K); given (B, K) where nothing guides."""
    logits = logits.float()
    if sampling.guidance_scale == 1:
        return logits
    with_text, without = logits.chunk(2)
    return without + sampling.guidance_scale * (with_text - without)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, K) -> probabilities (B, K) in float64 by temperature, then top_k, then top_p."""
    scores = logits.double()
    if sampling.temperature == 0:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).double()
    # From the likeliest down, so that a temperature near 0 gives 0 and -inf, and not inf, which has no softmax.
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = shares.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        shares = torch.zeros_like(shares).scatter(-1, places, ordered)
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def draw(shares: Tensor, points: Tensor) -> Tensor:
    """Probabilities (B, K) and uniform numbers (B,) -> the ids whose shares the numbers fall in, int64 (B,)."""
    edges = shares.cumsum(-1)
    end = edges[:, -1]
    # Below the end, whatever rounding does, so that an id without a share is never taken.
    points = torch.minimum(points * end, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(edges, points[:, None], right=True)[:, 0]


@torch.inference_mode()
def generate_ids(
    model: DALLETransformer,
    texts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    known: Tensor | None = None,
    styles: Sequence[str | None] | None = None,
    reader: TokenReader | None = None,
) -> Iterator[Tensor]:
    """The picture of each text, a token at a time: yields int64 (B,) image_length times; stop iterating to stop.

    A row depends on its text, seed and options alone, whatever else is in the batch: each row draws one number a token
    from its own generator. known: int64 (B, image_length), tokens that are given, -1 where one is to be drawn: what
    completes a picture, or varies it. styles: of each text one of the model's, or None. reader: of this model, with a
    row for each text (two where there is guidance), to be used again and again; on a GPU it is compiled once, and the
    one that is made where none is given is not compiled at all. Raises ValueError.
    """
    sampling = sampling or Sampling()
    if len(seeds) != len(texts):
        raise ValueError(f"{len(seeds)} seeds for {len(texts)} texts: give one each")
    count, guided = len(texts), sampling.guidance_scale != 1
    prompts = model.tokens_of([*texts, *([""] * count if guided else [])], styles)
    # Drawn at once, so that a token's number does not depend on which tokens were given.
    reader = reader or TokenReader(model, len(prompts), fixed=False)
    points = torch.stack([points_of(seed, model.image_length) for seed in seeds]).to(reader.device)
    logits = reader.text(prompts)
    for place in range(model.image_length):
        ids = draw(filtered(guided_logits(logits, sampling), sampling), points[:, place])
        if known is not None:
            given = known[:, place].to(reader.device)
            ids = torch.where(given >= 0, given, ids)
        yield ids
        if place + 1 < model.image_length:
            both = ids.repeat(2) if guided else ids
            logits = reader.ids(both, torch.full_like(both, place))


def generate_image(
    model: DALLETransformer,
    prompt: str | Sequence[str],
    *,
    n: int = 1,
    seed: int | None = None,
    sampling: Sampling | None = None,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    change: float | None = None,
    style: str | None = None,
) -> list[Image.Image]:
    """n pictures of each prompt, in order; picture i of a prompt has the seed `seed` + i (default: a fresh one).

    image: a picture to start from. mask: another of the same size: where it is transparent, a picture is drawn anew and
    the rest stays. change: share of what may be drawn anew that is, from the tokens that a seed picks; all of it with a
    mask, half of the picture without. As in arXiv:2102.12092, figure 2c, a token is drawn from the text and from what
    stands above it and to its left. style: one of the model's. Raises ValueError.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if n < 1 or not prompts:
        raise ValueError(f"n {n} must be at least 1, and there must be a prompt")
    first = secrets.randbelow(2**31) if seed is None else seed
    texts = [text for text in prompts for _ in range(n)]
    seeds = [first + number for _ in prompts for number in range(n)]
    tokenizer = ImageTokenizer(model.dvae)
    known = None
    if image is not None:
        if mask is not None and mask.size != image.size:
            raise ValueError(f"the mask has {mask.size} pixels and the picture {image.size}; they must be the same")
        (own,) = tokenizer.encode(model.preprocess(image)[None].to(model.image_embedding.weight.device))
        anew = None if mask is None else masked_tokens(model, mask)
        known = torch.stack([kept_tokens(own, each, anew, change) for each in seeds])
    elif mask is not None or change is not None:
        raise ValueError("a mask and a change need a picture to start from")
    ids = torch.stack(list(generate_ids(model, texts, seeds, sampling, known=known, styles=[style] * len(texts))), 1)
    return [to_picture(pixels) for pixels in tokenizer.decode(ids).cpu()]


def masked_tokens(model: DALLETransformer, mask: Image.Image) -> Tensor:
    """Which tokens lie where a mask has transparent pixels, bool (image_length,). Raises ValueError if none does."""
    opaque = mask.convert("RGBA").getchannel("A")
    pixels = model.preprocess(Image.merge("RGB", [opaque] * 3))[0]
    cells = pixels.view(model.grid, len(pixels) // model.grid, model.grid, -1)
    anew = (cells < 128).any(3).any(1).flatten()
    if not anew.any():
        raise ValueError("the mask is transparent nowhere; where it is, the picture is drawn anew")
    return anew


def kept_tokens(ids: Tensor, seed: int, anew: Tensor | None = None, change: float | None = None) -> Tensor:
    """A picture's tokens (N,) with -1 where one is to be drawn: the share `change`, picked by the seed, of those in
    `anew`, bool (N,). Shares are as in `generate_image`. Raises ValueError."""
    share = (0.5 if anew is None else 1.0) if change is None else change
    if not 0 < share <= 1:
        raise ValueError(f"change {share} must be above 0 and at most 1")
    # Not the numbers that the tokens are drawn with, but those that follow.
    picked = points_of(seed, 2 * len(ids))[len(ids) :].to(ids.device) < share
    return torch.where(picked if anew is None else picked & anew.to(ids.device), -1, ids)


def to_picture(pixels: Tensor) -> Image.Image:
    """uint8 (3, S, S) -> a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def points_of(seed: int, count: int) -> Tensor:
    """What a seed draws its tokens with: that many numbers in [0, 1), float64, on the CPU and so alike everywhere."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
