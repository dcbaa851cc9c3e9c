"""DALL-E: a transformer over text and image tokens (arXiv:2102.12092, section 2.2), on a trained image tokenizer.

from training.methods.dalle import train_dalle
folder = train_dalle(data=["./photos"], tokenizer="checkpoints/dvae", out="checkpoints/dalle")
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.dalle import DALLETransformer
from models.dvae import DiscreteVAE
from models.errors import CheckpointError, DataError
from models.generation import Sampling, generate_ids
from models.readers import file_bytes
from models.retrieval import embed_images, embed_texts
from models.tokenizers import ImageTokenizer, TextTokenizer
from training import scenes
from training.analysis import picture_sheet
from training.data import ArraySource, Batches, SceneSource, Source, StreamSource, file_name, opaque, resized
from training.distributed import rank
from training.figures import evaluate_model
from training.losses import wide
from training.method import Batch, Losses, Method, option
from training.options import RunOptions
from training.oracle import load_oracle
from training.reconstruction import oracle_figures
from training.run import batch_options, open_data, run_folder, run_training, starting_model
from training.trainer import TrainerConfig

DALLEDataset = ArraySource
StyleKind = Literal["none", "source", "class"]
_SCENES_IN_LOG = 100


class DALLELoss(torch.nn.Module):
    """Cross entropies of the two segments, weighted: 1/8 text and 7/8 picture in the paper (section 2.2). -> scalar.

    text_logits: (B, T - 1, V) for text[:, 1:], padding left out. image_logits: (B, N, K) for ids.
    """

    def __init__(self, text_weight: float = 1 / 8, image_weight: float = 7 / 8) -> None:
        super().__init__()
        if min(text_weight, image_weight) < 0 or text_weight + image_weight == 0:
            raise ValueError(f"weights {text_weight} and {image_weight} must be 0 or more, and one above 0")
        total = text_weight + image_weight
        self.text_weight, self.image_weight = text_weight / total, image_weight / total

    def parts(self, text_logits: Tensor, image_logits: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy of each segment, in nats a token."""
        of_text = F.cross_entropy(
            wide(text_logits).flatten(0, 1), text[:, 1:].flatten(), ignore_index=TextTokenizer.pad_id
        )
        return of_text, F.cross_entropy(wide(image_logits).flatten(0, 1), ids.flatten())

    def forward(self, text_logits: Tensor, image_logits: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        of_text, of_image = self.parts(text_logits, image_logits, text, ids)
        return self.text_weight * of_text + self.image_weight * of_image


class DALLEMethod(Method):
    """batch {"tokens": (B, T), "ids": (B, N), "images": (M, 3, S, S)} -> {"loss", "text_loss", "image_loss", ...}.

    Rows whose ids are -1 have their picture among "images", in order: those are encoded here, on the device.
    """

    kept_whole = ("model.dvae",)

    def __init__(self, model: DALLETransformer, loss: DALLELoss | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or DALLELoss()
        vocabulary = int(model.config["vocab_size"])
        self.chance = self.loss.text_weight * math.log(vocabulary) + self.loss.image_weight * math.log(model.codes)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        ids = batch["ids"].clone()
        missing = ids[:, 0] < 0
        if missing.any():
            ids[missing] = self.model.dvae.encode(batch["images"]).flatten(1)
        return {"tokens": batch["tokens"], "ids": ids}

    def forward(self, batch: Batch) -> Losses:
        logits = self.model(batch["tokens"], batch["ids"])
        text, image = self.loss.parts(logits[0], logits[1], batch["tokens"], batch["ids"])
        loss = self.loss.text_weight * text + self.loss.image_weight * image
        chance = loss.new_full((), self.chance)
        return {"loss": loss, "text_loss": text.detach(), "image_loss": image.detach(), "chance_loss": chance}


@dataclass
class TokenSource:
    """Pictures as ids. ids: int64 (N, length). captions: any number a picture; one is drawn each time. labels: class
    names."""

    name: str
    ids: Tensor
    captions: list[list[str]]
    labels: list[str] | None = None

    def size(self) -> int:
        return len(self.ids)

    def corpus(self) -> Any:
        for texts in self.captions:
            yield from texts


class TokenBatches(Batches):
    """Batches of text and image tokens. Pictures without an end (scenes) come as they are, with ids of -1.

    dropout: share of the captions that are left out, so that guidance has a "no text" to start from
    (arXiv:2207.12598, section 3.2). styles: what a picture's style is, as in DALLEOptions; it is left out where the
    caption is, and as often again the caption alone and the style alone, so that either is enough for a prompt.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float],
        model: DALLETransformer,
        dropout: float,
        *,
        styles: StyleKind = "none",
        **options: Any,
    ) -> None:
        super().__init__(sources, weights, **options)
        self.tokens_of, self.length, self.dropout = model.tokens_of, model.image_length, dropout
        self.styles: StyleKind = styles

    def __getitem__(self, step: int) -> Batch:
        ids, images, texts = [], [], []
        styles: list[str | None] = []
        for source, rows, rng in self.drawn(step):
            if isinstance(source, TokenSource):
                ids.append(source.ids[torch.from_numpy(rows)])
                own = [source.captions[row] for row in rows]
                chosen = [each[int(rng.integers(len(each)))] for each in own]
            else:
                drawn, captions = source.draw(rows, self.image_size, rng)
                images.append(drawn)
                ids.append(torch.full((len(rows), self.length), -1))
                chosen = [each[0] for each in captions]
            points = rng.random(len(rows)) / self.dropout if self.dropout else np.full(len(rows), np.inf)
            own_styles = styles_of(source, self.styles)
            alone = 1 if own_styles else 0  # below 1 both are left out, below 2 the caption, below 3 the style
            texts += ["" if point < 1 + alone else text for point, text in zip(points, chosen, strict=True)]
            for point, row in zip(points, rows, strict=True):
                left_out = point < 1 or 2 <= point < 3 or not own_styles
                styles.append(None if left_out else own_styles[row % len(own_styles)])  # one each, or one for all
        size = self.image_size
        pictures = torch.cat(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return {"ids": torch.cat(ids), "tokens": self.tokens_of(texts, styles), "images": pictures}


def styles_of(source: Any, kind: StyleKind) -> list[str]:
    """The style of each of a source's pictures, or one for them all; empty where there are none."""
    if kind == "class" and isinstance(source, TokenSource) and source.labels:
        return source.labels
    return [] if kind == "none" else [source.name]


def token_source(source: Source, dvae: DiscreteVAE, folder: str | Path) -> TokenSource | SceneSource:
    """A source's pictures as ids, encoded once and kept in `folder` under the tokenizer's and the pictures' hash.

    Scenes have no end and stay what they are. Raises DataError for a source without captions.
    """
    if isinstance(source, SceneSource):
        # Without noise, which no text asks for: a third of a scene's codes change with it, and two thirds of the loss
        # were those of grounds.
        return SceneSource(grouped_share=0.0, clean=1.0)
    if not isinstance(source, (ArraySource, StreamSource)):
        raise DataError(f"{source.name} cannot be encoded: it has neither pictures nor records")
    labels = source.labels if isinstance(source, ArraySource) else None
    file = Path(folder) / f"{file_name(source.name)}-{dvae.fingerprint}-{_digest(source)}.safetensors"
    if file.is_file():
        return TokenSource(source.name, load_file(file)["ids"].long(), source.captions, labels)
    tokenizer, size = ImageTokenizer(dvae.eval()), dvae.preprocess.size
    rng, parts = np.random.default_rng(0), []
    for rows in np.array_split(np.arange(source.size()), max(1, source.size() // 128)):
        parts.append(tokenizer.encode(opaque(source.pictures(rows, size, rng))))
    ids = torch.cat(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{rank()}.tmp")
    save_file({"ids": ids.int()}, temporary)
    temporary.replace(file)
    return TokenSource(source.name, ids, source.captions, labels)


def _digest(source: ArraySource | StreamSource) -> str:
    digest = hashlib.sha256()
    if isinstance(source, ArraySource):
        digest.update(source.images.contiguous().numpy().data)
    else:
        for record in source.records:
            picture = record.image
            digest.update(picture.tobytes() if isinstance(picture, Image.Image) else file_bytes(picture))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DALLEOptions(RunOptions):
    """Train a transformer that makes pictures of texts, on pictures with captions and a trained image tokenizer."""

    out: str = option("checkpoints/dalle", "checkpoint folder to write")
    tokenizer: str = option("checkpoints/dvae", "checkpoint folder of the image tokenizer, from `semblance-train dvae`")
    text_from: str | None = option(
        None,
        "checkpoint folder whose text tokenizer is taken, such as a CLIP's (default: one learned from the captions)",
    )
    vocab_size: int = option(4096, "entries of a text tokenizer that is learned, at most")
    text_length: int = option(32, "tokens of a text, longer ones are cut", least=3)
    width: int = option(256, "width of the transformer", least=1)
    depth: int = option(6, "its number of blocks", least=1)
    heads: int = option(4, "its attention heads", least=1)
    tied: bool = option(False, "let the output weights be the embeddings")
    text_weight: float = option(1 / 8, "weight of the text's loss beside the picture's", least=0)
    image_weight: float = option(7 / 8, "weight of the picture's loss", least=0)
    caption_dropout: float = option(0.1, "share of the captions that are left out, for guidance", least=0, most=1)
    styles: StyleKind = option(
        "none", "what a picture's style token says: its data set (source), or its class where it has one (class)"
    )
    judge: str | None = option(None, "checkpoint folder of a CLIP that scores the samples in the log")
    oracle: str | None = option(
        None, "file of `semblance-train oracle`, which reads the scenes that are drawn for the log"
    )
    token_cache: str = option("runs/tokens", "folder where encoded pictures are kept")


def presets() -> dict[str, DALLEOptions]:
    """Settings to start from; any option given beside one wins over it."""
    tiny = DALLEOptions(
        data=("scenes",),
        batch_size=64,
        chunk=64,
        trainer=TrainerConfig(steps=20_000, lr=1e-3, warmup=200, ema_decay=0.999, time_limit=1800),
    )
    demo = DALLEOptions(
        data=("scenes=3", "emoji=1"),
        out="checkpoints/demo/dalle",
        vocab_size=1536,
        depth=7,
        batch_size=256,
        chunk=64,
        trainer=TrainerConfig(
            steps=40_000, lr=2e-3, warmup=500, weight_decay=0.05, ema_decay=0.999, time_limit=3600, threads=2
        ),
    )
    # Widths, depths and rates as in table 2.1 of arXiv:2005.14165, four blocks fewer in the second. No run of ours.
    base = DALLEOptions(
        vocab_size=8192,
        width=768,
        depth=12,
        heads=12,
        trainer=TrainerConfig(steps=100_000, lr=6e-4, warmup=2000, weight_decay=0.1, ema_decay=0.9999),
    )
    large = replace(
        base, width=2048, depth=20, heads=16, trainer=replace(base.trainer, lr=2e-4, accumulate=4, ema_decay=0.0)
    )
    return {"tiny-cpu": tiny, "demo": demo, "100m": base, "1b": large}


def build_dalle(options: DALLEOptions, dvae: DiscreteVAE, corpus: Any, styles: Sequence[str] = ()) -> DALLETransformer:
    """The model that the options describe. corpus: texts to learn a tokenizer from, if none is given."""
    if options.text_from is not None:
        tokenizer = load_checkpoint(options.text_from).tokenizer
        if tokenizer is None:
            raise CheckpointError(f"{options.text_from} has no text tokenizer; give a CLIP checkpoint, or none")
    else:
        tokenizer = TextTokenizer.train(corpus, options.vocab_size, options.text_length)
    model = DALLETransformer(
        image=dvae.config,
        vocab_size=tokenizer.vocab_size,
        text_length=options.text_length,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        tied=options.tied,
        styles=styles,
    )
    model.dvae.load_state_dict(dvae.state_dict())
    model.preprocess = model.dvae.preprocess = dvae.preprocess
    model.tokenizer = tokenizer
    return model


def train_dalle(config: DALLEOptions | None = None, **keywords: Any) -> Path:
    """Train a transformer from options (or their keywords) and return the checkpoint folder. See DALLEOptions.

    Raises DataError, CheckpointError, DivergedError or ValueError with the way out.
    """
    options = config or DALLEOptions(**keywords)
    torch.manual_seed(options.trainer.seed)
    model = starting_model(options, DALLETransformer)
    dvae = load_checkpoint(options.tokenizer) if model is None else model.dvae
    if not isinstance(dvae, DiscreteVAE):
        raise CheckpointError(f"{options.tokenizer} is no image tokenizer; train one with `semblance-train dvae`")
    if model is not None:  # its pictures are those of this very tokenizer
        dvae.fingerprint = model.fingerprint
    data = open_data(options, side=dvae.preprocess.size)
    sources = [token_source(source, dvae, options.token_cache) for source in data.sources]
    if model is None:
        styles = sorted({style for source in sources for style in styles_of(source, options.styles)})
        model = build_dalle(options, dvae, (text for source in sources for text in source.corpus()), styles)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = f"{parameters:,} parameters, {model.flops():,} FLOPs a picture"
    Console(stderr=True).print(f"{size}, {model.image_length} tokens of {model.codes} codes", highlight=False)
    method = DALLEMethod(model, DALLELoss(options.text_weight, options.image_weight))
    batches = TokenBatches(
        sources,
        data.weights,
        model,
        options.caption_dropout,
        styles=options.styles,
        size=dvae.preprocess.size,
        **batch_options(options),
    )
    return run_training("dalle", options, method, batches, data, _samples(options, batches))


def _samples(options: DALLEOptions, batches: TokenBatches) -> Any:
    """For the log: a sheet of pictures of fixed prompts, always with the same seeds, and what judge and oracle say."""
    source, rows, rng = next(iter(batches.drawn(0)))
    if isinstance(source, TokenSource):
        prompts = [source.captions[row][0] for row in rows[:8]]
    else:
        prompts = [texts[0] for texts in source.draw(rows[:8], 8, rng)[1]]
    sheet = run_folder(options) / "samples.png"
    judge = None if options.judge is None else load_checkpoint(options.judge)
    oracle = None if options.oracle is None else load_oracle(options.oracle)
    chosen = Sampling(guidance_scale=2.0 if options.caption_dropout else 1.0)

    def evaluate(model: Any) -> dict[str, float]:
        drawn = samples_sheet(model, prompts, sheet, columns=6, sampling=chosen)
        figures: dict[str, float] = {}
        if judge is not None:
            texts = [prompt for prompt in prompts for _ in range(6)]
            rows = embed_images(judge, resized(drawn.flatten(0, 1), judge.preprocess.size)) * embed_texts(judge, texts)
            figures["clip_score"] = float(rows.sum(-1).mean())
        if oracle is not None:
            asked = scenes.sample(_SCENES_IN_LOG, size=8, seed=4_000_003 + options.trainer.seed, holdout="any")
            figures |= oracle_figures(model, oracle, asked, guidance_scale=chosen.guidance_scale)
        return figures

    return evaluate


@torch.inference_mode()
def samples_sheet(
    model: DALLETransformer,
    prompts: Sequence[str],
    out: str | Path,
    *,
    columns: int = 8,
    seed: int = 0,
    sampling: Sampling | None = None,
    judge: Any = None,
    seen: Tensor | None = None,
) -> Tensor:
    """A sheet with a row of pictures of each prompt, by the seeds `seed`, `seed` + 1, ...

    -> uint8 (P, columns, 3, S, S).

    judge, seen: a model that embeds pictures, and training pictures by its preprocess, uint8 (M, 3, S', S'). Each row
    then ends with the training picture that is nearest to its first one, so that a copy shows.
    """
    texts = [prompt for prompt in prompts for _ in range(columns)]
    seeds = [seed + number for _ in prompts for number in range(columns)]
    ids = torch.stack(list(generate_ids(model, texts, seeds, sampling)), 1)
    drawn = ImageTokenizer(model.dvae).decode(ids).cpu().unflatten(0, (len(prompts), columns))
    rows = list(drawn)
    if seen is not None:
        first = embed_images(judge, resized(drawn[:, 0], judge.preprocess.size))
        nearest = seen[(first @ embed_images(judge, seen).T).argmax(1).cpu()]
        rows = [
            torch.cat([row, each[None]]) for row, each in zip(drawn, resized(nearest, drawn.shape[-1]), strict=True)
        ]
    picture_sheet(rows, out, prompts)
    return drawn


# What the command line finds here, as in every method's file.
evaluate_dalle = evaluate_model
Options = DALLEOptions
train = train_dalle
