"""Tokenizers that a checkpoint carries with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

if TYPE_CHECKING:
    from models.dvae import DiscreteVAE

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class TextTokenizer:
    """Byte-level BPE (as in GPT-2) over lower-cased NFKC text; any string can be encoded and none is unknown.

    Ids 0, 1, 2 are padding, beginning and end. Called with B strings it gives int64 (B, L), L the longest row, at most
    `context_length`; a longer text is cut and still ends with the end token.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, tokenizer: Tokenizer, context_length: int = 64) -> None:
        self._tokenizer = tokenizer
        # "<eos>" in a caption is five characters, and no end of it.
        tokenizer.encode_special_tokens = True
        self.context_length = context_length

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8192, context_length: int = 64) -> TextTokenizer:
        """Learn the merges from a corpus; the same texts in the same order give the same tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, context_length)

    @classmethod
    def load(cls, file: Path, context_length: int = 64) -> TextTokenizer:
        """From a `tokenizer.json`."""
        return cls(Tokenizer.from_file(str(file)), context_length)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the three special ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """One text -> its ids, with beginning and end."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: self.context_length - 2]
        return [self.bos_id, *ids, self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; special tokens are left out."""
        return self._tokenizer.decode([i for i in ids if i > self.eos_id]).strip()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [encoding.ids[: self.context_length - 2] for encoding in encoded]
        tokens = np.zeros((len(rows), max((len(row) for row in rows), default=0) + 2), dtype=np.int64)
        for line, row in zip(tokens, rows, strict=True):
            line[0] = self.bos_id
            line[1 : len(row) + 1] = row
            line[len(row) + 1] = self.eos_id
        return torch.from_numpy(tokens)


class ImageTokenizer:
    """Pictures as rows of ids, over a DiscreteVAE of any kind; row by row from the top left.

    length: ids of a picture. grid: of its rows. vocab_size: how many ids there are.
    """

    def __init__(self, model: DiscreteVAE) -> None:
        self.model = model
        self.grid = model.grid
        self.length = model.grid**2
        self.vocab_size = model.codes
        self.fingerprint = model.fingerprint

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> int64 (B, length)."""
        return self.model.encode(images).flatten(1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """int64 (B, length) -> uint8 (B, 3, S, S). Raises ValueError for an id that does not exist."""
        pixels = self.model.decode(ids.view(len(ids), self.grid, self.grid))
        return pixels.mul(255).round().byte()
