"""DALLE-pytorch inside its own environment, for bench_generation.py: for each number on its input it draws so many
pictures of random texts and answers "done". Its first answer is the number of its transformer's weights."""

from __future__ import annotations

import sys
import warnings

import torch

from models.torchvision import load_torchvision


def main() -> None:
    """Arguments: width, depth, heads, length and vocabulary of a text, codes, threads."""
    warnings.simplefilter("ignore")
    width, depth, heads, length, vocabulary, codes, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    load_torchvision()
    from dalle_pytorch import DALLE, DiscreteVAE

    # 64 pixels halved twice are 16 x 16 codes, as ours are.
    vae = DiscreteVAE(image_size=64, num_layers=2, num_tokens=codes, codebook_dim=8, hidden_dim=8)
    size = {"dim": width, "depth": depth, "heads": heads, "dim_head": width // heads, "attn_types": ("full",)}
    model = DALLE(vae=vae, num_text_tokens=vocabulary, text_seq_len=length, **size).eval()
    print(sum(each.numel() for each in model.transformer.parameters()), flush=True)
    for line in sys.stdin:
        texts = torch.randint(1, vocabulary, (int(line), length))
        with torch.inference_mode():  # from the whole distribution, with its cache
            model.generate_images(texts, filter_thres=0.0, use_cache=True)
        print("done", flush=True)


if __name__ == "__main__":
    main()
