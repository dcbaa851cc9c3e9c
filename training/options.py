"""Options of training runs as dataclasses; the command line is made from them, so each exists and is explained once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.trainer import TrainerConfig


@dataclass(frozen=True)
class CLIPOptions:
    """Train CLIP on pictures with captions."""

    data: tuple[str, ...] = ("scenes",)
    out: str = "checkpoints/clip"
    run_dir: str | None = None
    data_root: str | None = None
    image_size: int = 64
    resize: Literal["pad", "crop", "squash"] = "pad"
    encoder: str = "conv"
    encoder_options: dict[str, Any] = field(default_factory=dict)
    embed_dim: int = 256
    text_width: int = 192
    text_depth: int = 4
    context_length: int = 48
    vocab_size: int = 8192
    batch_size: int = 256
    chunk: int = 64
    loss: Literal["infonce", "siglip"] = "infonce"
    micro_batch: int = 0
    chunk_size: int | None = None
    matryoshka: tuple[int, ...] = ()
    max_bad: int = 100
    hold: float = 4.0
    evaluate: bool = True
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


HELP = {
    "data": "data sets, each with =WEIGHT if wanted: scenes, emoji, openclipart, usda, grocery, crawl, caltech101, "
    "cifar10, a folder (subfolders are labels), a .csv/.tsv/.jsonl/.parquet table of path and caption, .tar(.gz) "
    "shards, torchvision:NAME, hf:NAME",
    "out": "checkpoint folder to write",
    "run_dir": "folder of logs and resume state; a run that finds its state goes on (default runs/<name of out>)",
    "data_root": "folder of the named data sets (default: SEMBLANCE_DATA)",
    "image_size": "side of the model's pictures in pixels",
    "resize": "how pictures become square: pad, crop or squash",
    "encoder": "image encoder: conv, resnet18/34/50, vit-tiny/small/base, timm:NAME",
    "encoder_options": "its options as JSON, such as '{\"channels\": 48}'",
    "embed_dim": "length of the embeddings",
    "text_width": "width of the text transformer",
    "text_depth": "its number of blocks",
    "context_length": "tokens a text may have, longer ones are cut",
    "vocab_size": "entries of the tokenizer that is learned from the captions, at most",
    "batch_size": "pictures a step, of all processes together",
    "chunk": "pictures that a batch takes from one data set at a time",
    "loss": "infonce (CLIP) or siglip",
    "micro_batch": "encode this many rows at a time and again on the way back (GradCache): less memory, more time",
    "chunk_size": "rows of the similarity matrix held at a time",
    "matryoshka": "lengths at which embeddings shall be usable when cut, such as 64 128 256",
    "max_bad": "rows that may be unreadable before the run stops",
    "hold": "gigabytes a data set may take decoded; a larger one is decoded as it is drawn (by --workers)",
    "evaluate": "measure the trained model and write the figures into its card",
    "steps": "optimizer steps",
    "lr": "peak learning rate",
    "weight_decay": "decay of weights (not of norms, biases and scales)",
    "warmup": "steps of linear warm-up; half a cosine follows",
    "optimizer": "adamw, lars or sgd",
    "precision": "auto, fp32, bf16 or fp16",
    "accumulate": "batches whose gradients make one step",
    "clip_norm": "largest norm of the gradient, 0 for any",
    "ema_decay": "decay of the averaged weights that are evaluated and exported, 0 for none",
    "compile": "compile the method with torch.compile",
    "device": "auto, cpu, cuda, cuda:1, ...",
    "seed": "of everything that is drawn",
    "workers": "processes that prepare batches",
    "threads": "of torch on the CPU, 0 for its own choice",
    "log_every": "steps between log lines",
    "save_every": "steps between saved states, 0 for the end only",
    "evaluate_every": "steps between evaluations, 0 for the end only",
    "time_limit": "seconds after which the run ends, its schedule with it; 0 for none",
}


def presets() -> dict[str, CLIPOptions]:
    """Settings that were measured (training/README.md); any option given beside one wins over it."""
    tiny = CLIPOptions(
        data=("scenes",),
        out="checkpoints/tiny-cpu",
        encoder_options={"channels": 32, "blocks": [1, 1, 1], "depth": 1, "fine_blocks": 1},
        text_width=128,
        text_depth=2,
        embed_dim=128,
        vocab_size=1024,
        batch_size=128,
        chunk=128,
        trainer=TrainerConfig(steps=3000, lr=1.5e-3, warmup=100, ema_decay=0.998, time_limit=285, save_every=0),
    )
    demo = CLIPOptions(
        data=("scenes", "emoji", "openclipart", "usda", "grocery", "crawl"),
        out="checkpoints/demo/clip",
        encoder_options={"channels": 64, "blocks": [1, 1, 1], "depth": 1, "fine_blocks": 1},
        vocab_size=6144,
        embed_dim=192,
        text_depth=3,
        batch_size=192,
        chunk=16,
        trainer=TrainerConfig(
            steps=12000, lr=1.5e-3, warmup=200, ema_decay=0.999, evaluate_every=2000, time_limit=5400, threads=2
        ),
    )
    return {"tiny-cpu": tiny, "demo": demo}
