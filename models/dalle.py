"""DALL-E (arXiv:2102.12092): one causal transformer over the tokens of a text and then of its picture.

Departures from the paper: rotary positions (arXiv:2104.09864), two-dimensional for the picture's tokens, in place of
learned ones; normalised queries and keys (arXiv:2302.05442), which keep large learning rates stable; dense attention;
GELU by tanh, as GPT-2 has it, for which a CPU takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dvae import DiscreteVAE
from models.layers import init_transformer
from models.tokenizers import TextTokenizer

ROTARY_BASE = 100.0  # positions go to a few hundred; the 10,000 of language models would leave most pairs unturned


@dataclass
class KVCache:
    """Keys and values of every layer, (layers, B, H, L, D) each, allocated once for the whole sequence."""

    keys: Tensor
    values: Tensor

    def block(self, start: int, end: int) -> KVCache:
        """The rows from `start` to `end`, in the same memory."""
        return KVCache(self.keys[:, start:end], self.values[:, start:end])

    def step(self, start: Tensor, length: int) -> CacheStep:
        """For `length` tokens of each row, int64 (B,), from the place `start` on."""
        places = start[:, None] + torch.arange(length, device=start.device)
        # Where the host must not wait for the device, the whole cache is looked at, for the mask hides what is ahead.
        waits = not (start.is_cuda or torch.compiler.is_compiling())
        end = int(places.max()) + 1 if waits else self.keys.shape[3]
        seen = torch.arange(end, device=start.device) <= places[..., None]
        return CacheStep(torch.arange(len(start), device=start.device)[:, None], places, end, seen[:, None])


@dataclass
class CacheStep:
    """Where tokens stand in the cache, in every layer alike: rows (B, 1) and places (B, L). seen: (B, 1, L, end), what
    of the cache's first `end` places each of them may look at."""

    rows: Tensor
    places: Tensor
    end: int
    seen: Tensor


class StepLinear(nn.Linear):
    """nn.Linear, for steps of one token over several rows: x W^T as (W x^T)^T.

    For 9 to 48 rows in float32 the product behind nn.Linear takes a CPU 1.4 to 3 times as long as the turned one, which
    reads the weights as they lie; for fewer, for more and in bfloat16 it is the faster one.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        turned = 8 < rows <= 48 and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if not turned or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        out = (self.weight @ x.reshape(rows, -1).t()).t()
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


class CausalAttention(nn.Module):
    """Self-attention with rotary positions and normalised queries and keys. (B, L, W) -> (B, L, W).

    turns: cosines and sines of the angles, (2, L, D / 2) or (2, B, 1, L, D / 2). cache: this layer's keys and values
    (B, H, T, D), and where the tokens stand in them. Without one, the tokens are the whole sequence.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads or width // heads % 4:
            raise ValueError(
                f"width {width} over {heads} heads: a head needs a multiple of 4 numbers, for rows and columns"
            )
        self.heads = heads
        self.qkv = StepLinear(width, 3 * width, bias=False)
        self.out = StepLinear(width, width, bias=False)
        self.scales = nn.Parameter(torch.ones(2, width // heads))  # of normalised queries and keys

    def forward(self, x: Tensor, turns: Tensor, cache: tuple[Tensor, Tensor, CacheStep] | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Queries and keys together, for a step of one token is as dear as it has operations.
        qk = F.rms_norm(qkv[:2], (qkv.shape[-1],)) * self.scales[:, None, None, None].to(qkv.dtype)
        (q, k), v = _turned(qk, turns), qkv[2]
        if cache is None:
            mixed = _causal(q, k, v)
        else:
            mixed = self._with_cache(q, k, v, *cache)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _with_cache(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, step: CacheStep) -> Tensor:
        keys[step.rows, :, step.places] = k.transpose(1, 2).to(keys.dtype)
        values[step.rows, :, step.places] = v.transpose(1, 2).to(values.dtype)
        keys, values = keys[:, :, : step.end].to(q.dtype), values[:, :, : step.end].to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=step.seen)


class CausalBlock(nn.Module):
    """Pre-norm block: causal attention, then an MLP of four times the width. (B, L, W) -> (B, L, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp = nn.Sequential(StepLinear(width, 4 * width), nn.GELU("tanh"), StepLinear(4 * width, width))

    def forward(self, x: Tensor, turns: Tensor, cache: tuple[Tensor, Tensor, CacheStep] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), turns, cache)
        return x + self.mlp(self.norm2(x))


class DALLETransformer(nn.Module):
    """A text's tokens, then its picture's, each predicted from all before it.

    image: options of the DiscreteVAE whose codes are the picture's tokens; it is part of the checkpoint. vocab_size,
    text_length: of the text; shorter ones are padded, longer ones cut. tied: the output weights are the embeddings.
    styles: names of kinds of pictures, such as data sets or classes; a text with a style begins with its token.
    forward: text int64 (B, T), ids int64 (B, N) -> logits of the text's tokens 1..T-1, (B, T - 1, vocab_size), and of
    the picture's tokens, (B, N, codes). Raises ValueError.
    """

    architecture = "dalle"

    def __init__(
        self,
        *,
        image: dict[str, Any],
        vocab_size: int,
        text_length: int = 32,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        tied: bool = False,
        styles: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image": image,
            "vocab_size": vocab_size,
            "text_length": text_length,
            "width": width,
            "depth": depth,
            "heads": heads,
            "tied": tied,
            "styles": list(styles),
        }
        self.styles = {name: vocab_size + number for number, name in enumerate(styles)}
        self.dvae = DiscreteVAE(**image).requires_grad_(False)
        self.text_length = text_length
        self.grid, self.image_length, self.codes = self.dvae.grid, self.dvae.grid**2, self.dvae.codes
        self.text_embedding = nn.Embedding(vocab_size + len(self.styles), width)
        self.image_embedding = nn.Embedding(self.codes, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.text_head = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.image_head = None if tied else StepLinear(width, self.codes, bias=False)
        for part in (self.text_embedding, self.image_embedding, self.blocks, self.text_head, self.image_head):
            if part is not None:
                init_transformer(part, depth)
        self.register_buffer("turns", self._turns(width // heads), persistent=False)
        self.preprocess = self.dvae.preprocess
        self.tokenizer: TextTokenizer | None = None
        self.provenance: dict[str, Any] = {}
        self.fingerprint = ""

    turns: Tensor

    @property
    def length(self) -> int:
        """Tokens of the longest input: the text and all but the picture's last."""
        return self.text_length + self.image_length - 1

    def forward(self, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        self._check(text, ids)
        x = torch.cat([self.text_embedding(text), self.image_embedding(ids[:, :-1])], 1)
        for block in self.blocks:
            x = block(x, self.turns[:, : x.shape[1]])
        x = self.norm(x)
        return self._text_logits(x[:, : self.text_length - 1]), self._image_logits(x[:, self.text_length - 1 :])

    def flops(self) -> int:
        """Multiplications and additions of a forward pass of one text and picture, attention counted in full."""
        width, length = int(self.config["width"]), self.length
        block = 2 * length * 12 * width**2 + 4 * length**2 * width
        text, image = (self.text_length - 1) * int(self.config["vocab_size"]), self.image_length * self.codes
        return len(self.blocks) * block + 2 * width * (text + image)

    def cast(self, dtype: torch.dtype) -> DALLETransformer:
        """Take the transformer's weights to another dtype, for sampling; the image tokenizer and the angles stay."""
        parts = (self.text_embedding, self.image_embedding, self.blocks, self.norm, self.text_head, self.image_head)
        for part in parts:
            if part is not None:
                part.to(dtype)
        return self

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for that many sequences."""
        weight, heads = self.image_embedding.weight, self.config["heads"]
        shape = (len(self.blocks), rows, heads, self.length, weight.shape[1] // heads)
        return KVCache(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)))

    def read_text(self, text: Tensor, cache: KVCache) -> Tensor:
        """text int64 (B, T) -> logits of the picture's first token, (B, codes); fills the cache."""
        start = torch.zeros(len(text), dtype=torch.int64, device=text.device)
        return self._advance(self.text_embedding(text), start, cache)

    def read_ids(self, ids: Tensor, places: Tensor, cache: KVCache) -> Tensor:
        """One more token of each picture -> logits of the next, (B, codes).

        ids, places: int64 (B,), the tokens and their numbers in the picture, which may differ from row to row.
        """
        return self._advance(self.image_embedding(ids[:, None]), self.text_length + places, cache)

    def tokens_of(self, texts: Sequence[str], styles: Sequence[str | None] | None = None) -> Tensor:
        """B strings, and a style or None each -> int64 (B, text_length), padded.

        Raises ValueError where the model has no tokenizer, or not such a style.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no text tokenizer")
        tokens = self.tokenizer(texts)[:, : self.text_length]
        tokens = F.pad(tokens, (0, self.text_length - tokens.shape[1]), value=TextTokenizer.pad_id)
        for row, style in enumerate(styles or ()):
            if style is None:
                continue
            if style not in self.styles:
                raise ValueError(f"no style {style[:64]!r}; this model has {', '.join(self.styles) or 'none'}")
            tokens[row, 0] = self.styles[style]
        return tokens

    def _advance(self, x: Tensor, start: Tensor, cache: KVCache) -> Tensor:
        step = cache.step(start, x.shape[1])
        turns = self.turns[:, step.places][:, :, None]  # the same for all heads
        for layer, block in enumerate(self.blocks):
            x = block(x, turns, (cache.keys[layer], cache.values[layer], step))
        return self._image_logits(self.norm(x[:, -1]))

    def _text_logits(self, x: Tensor) -> Tensor:
        if self.text_head is not None:
            return self.text_head(x)
        return F.linear(x, self.text_embedding.weight[: self.config["vocab_size"]])

    def _image_logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.image_embedding.weight) if self.image_head is None else self.image_head(x)

    def _check(self, text: Tensor, ids: Tensor) -> None:
        if text.shape[1] != self.text_length or ids.shape[1] != self.image_length:
            raise ValueError(
                f"{text.shape[1]} text and {ids.shape[1]} image tokens given, {self.text_length} and "
                f"{self.image_length} expected"
            )

    def _turns(self, size: int) -> Tensor:
        """By what each pair of a head's numbers is turned at each place: cosines and sines, (2, T + N - 1, D / 2).

        Half of the pairs turn with the row, half with the column. A text's token stands in the row and the column of
        its number; the picture begins after the text on both axes.
        """
        pairs = size // 4
        speeds = ROTARY_BASE ** (-torch.arange(pairs) / pairs)
        text = torch.arange(self.text_length)
        picture = torch.arange(self.image_length - 1)
        rows = torch.cat([text, self.text_length + picture // self.grid])
        columns = torch.cat([text, self.text_length + picture % self.grid])
        angles = torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], 1)
        return torch.stack([angles.cos(), angles.sin()])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token to itself and all before it. (B, H, L, D) each -> (B, H, L, D).

    On a CPU that takes gradients, as plain products: the backward pass of torch's fused kernel is a quarter of a
    training step there, and all of the compiled step takes a fifth less without it.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions, eq. 34 of arXiv:2104.09864. (2, B, H, L, D) -> the same; turns as CausalAttention has."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
