"""Drawing tokens with and without a cache, beside transformers' `generate` and DALLE-pytorch: `make bench-generation`.

Prints tokens a second and ratios; nothing here passes or fails. All sides take turns, and the median of their turns
counts. All are given a text of 32 tokens and draw a picture of 256, in float32, from the whole distribution.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from bench_training import taking_turns
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from models.dalle import DALLETransformer
from models.generation import Sampling, draw, filtered, generate_ids, points_of

TEXT, PICTURE, CODES, VOCABULARY = 32, 256, 512, 4096
SIZES = {"width 256, 6 blocks": (256, 6, 4), "width 512, 8 blocks": (512, 8, 8)}


def copy_bandwidth() -> float:
    """Bytes a second that memory moves, read and written together."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    (seconds,) = taking_turns(5, lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds


class _FixedTexts(DALLETransformer):
    """Draws for texts that are tokens already."""

    def tokens_of(self, texts: object, styles: object = None) -> Tensor:
        assert isinstance(texts, list)
        return torch.randint(3, VOCABULARY, (len(texts), TEXT), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def without_cache(model: _FixedTexts, texts: list[str]) -> Tensor:
    """The same pictures as `generate_ids` draws, each token after another pass over all before it."""
    ids = torch.empty(len(texts), 0, dtype=torch.int64)
    prompts, points = model.tokens_of(texts), torch.stack([points_of(row, PICTURE) for row in range(len(texts))])
    for place in range(PICTURE):
        x = torch.cat([model.text_embedding(prompts), model.image_embedding(ids)], 1)
        for block in model.blocks:
            x = block(x, model.turns[:, : x.shape[1]])
        logits = model.image_head(model.norm(x[:, -1]))  # type: ignore[misc]
        ids = torch.cat([ids, draw(filtered(logits, Sampling()), points[:, place])[:, None]], 1)
    return ids


class DallePytorch:
    """DALLE-pytorch of such a size, in the process of its own environment."""

    def __init__(self, python: Path, width: int, depth: int, heads: int) -> None:
        numbers = (width, depth, heads, TEXT, VOCABULARY, CODES, torch.get_num_threads())
        peer = Path(__file__).with_name("dalle_pytorch_peer.py")
        self._process = subprocess.Popen(
            [python, peer, *map(str, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": str(peer.parents[2])},
        )  # fmt: skip
        self.weights = int(self._answer())

    def draw(self, batch: int) -> None:
        """So many pictures."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("DALLE-pytorch ended; start tests/benchmarks/dalle_pytorch_peer.py by hand to see why")
        return line


def compare(name: str, width: int, depth: int, heads: int, batch: int, bandwidth: float, peer: Path) -> None:
    """One line of tokens a second and ratios. peer: the Python of DALLE-pytorch's environment."""
    torch.manual_seed(0)
    image = {"image_size": 64, "quantizer": {"name": "fsq", "levels": [8, 8, 8]}, "channels": [8, 8], "blocks": [0, 0]}
    ours = _FixedTexts(
        image=image, vocab_size=VOCABULARY, text_length=TEXT, width=width, depth=depth, heads=heads
    ).eval()
    config = GPT2Config(
        vocab_size=VOCABULARY + CODES, n_positions=TEXT + PICTURE, n_embd=width, n_layer=depth, n_head=heads,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    texts = [""] * batch
    options = {"max_new_tokens": PICTURE, "min_new_tokens": PICTURE, "do_sample": True, "top_k": 0, "use_cache": True}

    def cached() -> Tensor:
        return torch.stack(list(generate_ids(ours, texts, range(batch))), 1)

    def transformers() -> Tensor:
        prompts = ours.tokens_of(texts)
        return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)  # type: ignore[no-any-return]

    with torch.inference_mode():
        drawn, again = cached(), without_cache(ours, texts)
    alike = float((drawn == again).float().mean())
    works: list[Callable[[], object]] = [cached, transformers, lambda: without_cache(ours, texts)]
    dalle = DallePytorch(peer, width, depth, heads) if peer.exists() else None
    if dalle is not None:
        works.append(lambda: dalle.draw(batch))
    seconds, other, slow, *of_dalle = taking_turns(3 if batch == 1 else 2, *works)
    weights = sum(p.numel() for part in (ours.blocks, ours.norm, ours.image_head) for p in part.parameters())  # type: ignore[union-attr]
    numbers = weights + batch * 2 * depth * width * (TEXT + PICTURE / 2)
    share = 4 * numbers * PICTURE / seconds / bandwidth
    print(
        f"{name}, batch {batch}: {batch * PICTURE / seconds:,.0f} tokens/s, {slow / seconds:.1f} x without a cache "
        f"({alike:.1%} of the tokens alike), {other / seconds:.2f} x transformers' generate; {share:.0%} of what the "
        f"memory could feed ({weights:,} weights, {bandwidth / 1e9:.1f} GB/s)"
    )
    if dalle is not None:
        print(f"  {of_dalle[0] / seconds:.1f} x DALLE-pytorch, whose transformer has {dalle.weights:,} weights")
        dalle.close()


def main() -> None:
    """Every size, or those that are named, at batch 1 and 16, on the threads torch has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("widths", nargs="*", type=int, help="256 and 512; the second takes half an hour")
    parser.add_argument("--dalle-pytorch", default=".venv-dalle-pytorch", help="its environment; left out if missing")
    arguments = parser.parse_args()
    peer = Path(arguments.dalle_pytorch, "bin", "python")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    bandwidth = copy_bandwidth()
    for name, size in SIZES.items():
        for batch in (1, 16) if size[0] in (arguments.widths or (256, 512)) else ():
            compare(name, *size, batch, bandwidth, peer)


if __name__ == "__main__":
    main()
