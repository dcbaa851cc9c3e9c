"""Options that every training run has, as a dataclass; the command line is made from it and from its heirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training.method import check_bounds, option
from training.trainer import TrainerConfig


@dataclass(frozen=True)
class RunOptions:
    """What to train on and where to write; the methods add their own."""

    data: tuple[str, ...] = option(
        ("scenes",),
        "data sets, each with =WEIGHT if wanted: scenes, emoji, openclipart, usda, grocery, crawl, caltech101, "
        "cifar10, a folder (subfolders are labels), a .csv/.tsv/.jsonl/.parquet table of path and caption, "
        ".tar(.gz) shards, torchvision:NAME, hf:NAME",
    )
    out: str = option("checkpoints/model", "checkpoint folder to write")
    run_dir: str | None = option(
        None,
        "folder of logs and resume state; a run that finds its state goes on (default runs/<name of out>)",
    )
    data_root: str | None = option(None, "folder of the named data sets (default: SEMBLANCE_DATA)")
    init: str | None = option(
        None, "checkpoint folder to go on from; its architecture, size and tokenizer stay (default: random weights)"
    )
    image_size: int = option(64, "side of the model's pictures in pixels", least=1)
    batch_size: int = option(256, "pictures a step, of all processes together", least=1)
    chunk: int = option(64, "pictures that a batch takes from one data set at a time", least=1)
    max_bad: int = option(100, "rows that may be unreadable before the run stops", least=0)
    hold: float = option(
        4.0, "gigabytes a data set may take decoded; a larger one is decoded as it is drawn (by --workers)", least=0
    )
    evaluate: bool = option(True, "measure the trained model and write the figures into its card")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class EncoderOptions(RunOptions):
    """Options of every method whose models embed pictures."""

    encoder: str = option("conv", "image encoder: conv, resnet18/34/50, vit-tiny/small/base, timm:NAME")
    encoder_options: dict[str, Any] = option({}, "its options as JSON, such as '{\"channels\": 48}'")
    matryoshka: tuple[int, ...] = option(
        (), "lengths at which embeddings shall be usable when cut, such as 64 128 256", least=1
    )
