"""Discrete VAEs: image tokenizers with FSQ, VQ or DALL-E's Gumbel-softmax relaxation (arXiv:2102.12092, section 2.1).

from training.methods.dvae import train_dvae
folder = train_dvae(data=["./photos"], quantizer="fsq", levels=(8, 8, 8), image_size=64, out="checkpoints/dvae")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.dvae import LAPLACE_MARGIN, VQ, DiscreteVAE, Gumbel
from training.analysis import picture_sheet
from training.data import ArraySource, PictureBatches
from training.distributed import world_size
from training.figures import evaluate_model
from training.losses import wide
from training.method import Batch, Losses, Method, option
from training.options import RunOptions
from training.reconstruction import code_figures, psnr
from training.run import batch_options, open_data, run_folder, run_training, starting_model
from training.trainer import TrainerConfig

DVAEDataset = ArraySource
Loss = Literal["l2", "l1", "laplace"]


class LogitLaplaceLoss(nn.Module):
    """Negative log-likelihood of the logit-Laplace distribution, eq. 2 of arXiv:2102.12092, appendix A.3.

    output: (B, 6, S, S), means of the logits and logarithms of their scales. pixels: (B, 3, S, S) in 0..1, which are
    taken into (margin, 1 - margin) first. -> scalar, the mean over values.
    """

    def forward(self, output: Tensor, pixels: Tensor) -> Tensor:
        mean, log_scale = output.chunk(2, dim=1)
        x = (1 - 2 * LAPLACE_MARGIN) * pixels + LAPLACE_MARGIN
        density = (torch.logit(x) - mean).abs() * torch.exp(-log_scale) + log_scale + (2 * x * (1 - x)).log()
        return density.mean()


class DVAELoss(nn.Module):
    """Reconstruction: mean squared or absolute error of normalised pixels, or logit-Laplace. -> scalar."""

    def __init__(self, kind: Loss = "l2") -> None:
        super().__init__()
        if kind not in ("l2", "l1", "laplace"):
            raise ValueError(f"unknown loss {kind!r}; choose l2, l1 or laplace")
        self.kind = kind
        self.laplace = LogitLaplaceLoss()

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        """output: the decoder's. images: normalised to -1..1, (B, 3, S, S)."""
        if self.kind == "laplace":
            return self.laplace(output, images * 0.5 + 0.5)
        return F.mse_loss(output, images) if self.kind == "l2" else F.l1_loss(output, images)


def uniform_divergence(logits: Tensor) -> Tensor:
    """KL divergence of each place's categorical distribution from the uniform one, eq. 1 of arXiv:2102.12092.

    (B, K, H, W) -> scalar, the sum over places, the mean over the batch; in nats.
    """
    log_shares = wide(logits).log_softmax(1)
    return ((log_shares.exp() * log_shares).sum(1) + math.log(logits.shape[1])).sum((1, 2)).mean()


class DVAEMethod(Method):
    """batch {"images": uint8 (B, 3, S, S)} -> {"loss", "reconstruction", "perplexity", "codes_used", ...}.

    commitment: weight of the pull of features to their code (vq). kl: weight of the divergence from uniform codes, by
    values of a picture, reached after a share `kl_ramp` of the run (gumbel; DALL-E took 6.6 over 5,000 steps).
    temperature: where the relaxation's ends, on a cosine from 1 (gumbel). decay: of the codes' moving average (vq).
    """

    kl_weight: Tensor
    code_counts: Tensor
    code_sums: Tensor

    def __init__(
        self,
        model: DiscreteVAE,
        *,
        loss: Loss = "l2",
        commitment: float = 0.25,
        kl: float = 6.6,
        kl_ramp: float = 0.1,
        temperature: float = 1 / 16,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if (loss == "laplace") != (model.config["output"] == "laplace"):
            raise ValueError(f"a model with output {model.config['output']!r} cannot be trained with loss {loss!r}")
        self.model, self.loss = model, DVAELoss(loss)
        self.commitment, self.kl, self.kl_ramp = commitment, kl, kl_ramp
        self.temperature, self.decay = temperature, decay
        self.register_buffer("kl_weight", torch.zeros(()))
        self._seen: list[tuple[Tensor, Tensor]] = []  # unit features and codes of the step that is under way
        if isinstance(model.quantizer, VQ):
            self.register_buffer("code_counts", torch.ones(model.codes))
            self.register_buffer("code_sums", model.quantizer.codebook.clone())

    def forward(self, batch: Batch) -> Losses:
        images = self.model.preprocess.normalize(batch["images"]).contiguous(memory_format=torch.channels_last)
        output, features, codes = self.model(images)
        reconstruction = self.loss(wide(output), images)
        found = {"loss": reconstruction, "reconstruction": reconstruction}
        quantizer = self.model.quantizer
        if isinstance(quantizer, VQ):
            unit = F.normalize(wide(features), dim=1)
            found["commitment"] = F.mse_loss(unit, quantizer.lookup(codes)) * quantizer.outputs
            found["loss"] = reconstruction + self.commitment * found["commitment"]
            if self.training:
                self._seen.append((unit.detach(), codes))
        if isinstance(quantizer, Gumbel):
            found["kl"] = uniform_divergence(features)
            found["loss"] = reconstruction + self.kl_weight * found["kl"] / images[0].numel()
            found["temperature"] = quantizer.temperature.clone()
        found["psnr"] = psnr(self.model.pixels(output.detach()), images * 0.5 + 0.5)
        return found | code_figures(codes, self.model.codes)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        quantizer = self.model.quantizer
        if isinstance(quantizer, Gumbel):
            quantizer.temperature.fill_(
                self.temperature + (1 - self.temperature) * 0.5 * (1 + math.cos(math.pi * progress))
            )
            self.kl_weight.fill_(self.kl * min(1.0, progress / max(self.kl_ramp, 1e-9)))
        if isinstance(quantizer, VQ) and self._seen:
            rows = torch.cat([unit.permute(0, 2, 3, 1).flatten(0, 2) for unit, _ in self._seen])
            codes = torch.cat([codes.flatten() for _, codes in self._seen])
            self._seen.clear()
            self._move_codes(quantizer, rows, codes)

    def _move_codes(self, quantizer: VQ, rows: Tensor, codes: Tensor) -> None:
        """Exponential moving averages of what each code stood for; a code that stands for nothing starts anew."""
        counts = torch.bincount(codes, minlength=quantizer.codes).to(rows.dtype)
        sums = torch.zeros_like(self.code_sums).index_add_(0, codes, rows)
        fresh = rows[torch.randint(len(rows), (quantizer.codes,), device=rows.device)]
        if world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(fresh, 0)
        self.code_counts.lerp_(counts, 1 - self.decay)
        self.code_sums.lerp_(sums, 1 - self.decay)
        # An even use would give each code this count; one of a hundredth is given a feature of this batch instead.
        unused = self.code_counts < 0.01 * counts.sum() / quantizer.codes
        self.code_sums[unused] = fresh[unused]
        self.code_counts[unused] = 1.0
        quantizer.codebook.copy_(F.normalize(self.code_sums, dim=-1))


@dataclass(frozen=True)
class DVAEOptions(RunOptions):
    """Train a discrete image tokenizer, on pictures without labels."""

    out: str = option("checkpoints/dvae", "checkpoint folder to write")
    quantizer: Literal["fsq", "vq", "gumbel"] = option("fsq", "fsq, vq or gumbel (DALL-E's)")
    levels: tuple[int, ...] = option((8, 8, 8), "fsq: levels of each channel; their product is the number of codes")
    codes: int = option(512, "vq and gumbel: number of codes", least=2)
    code_dim: int = option(32, "vq and gumbel: length of a code's vector", least=1)
    channels: tuple[int, ...] = option((64, 128), "width of the network at each halving of the side", least=1)
    blocks: tuple[int, ...] = option((0, 2), "residual blocks at each halving", least=0)
    loss: Loss = option("l2", "of the pixels: l2, l1 or laplace (logit-Laplace, as DALL-E)")
    commitment: float = option(0.25, "vq: weight of the pull of features to their code", least=0)
    kl: float = option(6.6, "gumbel: weight of the divergence from uniform codes", least=0)
    kl_ramp: float = option(0.1, "gumbel: share of the run over which that weight grows from 0", least=0, most=1)
    temperature: float = option(1 / 16, "gumbel: where the relaxation's temperature ends, from 1", above=0)


def presets() -> dict[str, DVAEOptions]:
    """Settings to start from; any option given beside one wins over it."""
    tiny = DVAEOptions(
        data=("scenes",),
        out="checkpoints/dvae",
        channels=(32, 64),
        batch_size=64,
        chunk=64,
        trainer=TrainerConfig(steps=20_000, lr=2e-3, warmup=200, weight_decay=0.01, ema_decay=0.999, time_limit=600),
    )
    demo = DVAEOptions(
        data=("scenes=2", "emoji=1"),
        out="checkpoints/dvae",
        levels=(8, 5, 5, 5),
        channels=(48, 96),
        blocks=(1, 2),
        batch_size=128,
        chunk=32,
        trainer=TrainerConfig(
            steps=40_000, lr=2e-3, warmup=200, weight_decay=0.01, ema_decay=0.999, time_limit=2400, threads=2
        ),
    )
    return {"tiny-cpu": tiny, "demo": demo}


def build_dvae(options: DVAEOptions) -> DiscreteVAE:
    """The model that the options describe."""
    quantizer: dict[str, Any] = {"name": options.quantizer}
    if options.quantizer == "fsq":
        quantizer["levels"] = list(options.levels)
    else:
        quantizer |= {"codes": options.codes, "dim": options.code_dim}
    return DiscreteVAE(
        image_size=options.image_size,
        quantizer=quantizer,
        channels=options.channels,
        blocks=options.blocks,
        output="laplace" if options.loss == "laplace" else "pixels",
    )


def train_dvae(config: DVAEOptions | None = None, **keywords: Any) -> Path:
    """Train an image tokenizer from options (or their keywords) and return the checkpoint folder. See DVAEOptions.

    Raises DataError, CheckpointError, DivergedError or ValueError with the way out.
    """
    options = config or DVAEOptions(**keywords)
    torch.manual_seed(options.trainer.seed)
    model = starting_model(options, DiscreteVAE) or build_dvae(options)
    size = model.preprocess.size
    data = open_data(options, side=size, captioned=False)
    method = DVAEMethod(
        model,
        loss=options.loss,
        commitment=options.commitment,
        kl=options.kl,
        kl_ramp=options.kl_ramp,
        temperature=options.temperature,
    )
    batches = PictureBatches(data.sources, data.weights, size=size, **batch_options(options))
    samples = batches[0]["images"][:12]
    sheet = run_folder(options) / "reconstructions.png"

    def evaluate(trained: Any) -> dict[str, float]:
        """A sheet of pictures above what is left of them, and their PSNR."""
        images = samples.to(next(trained.parameters()).device)
        back = trained.decode(trained.encode(images))
        picture_sheet([images.cpu(), back.mul(255).round().byte().cpu()], sheet, side=size)
        return {"psnr": float(psnr(back, images / 255))}

    return run_training("dvae", options, method, batches, data, evaluate)


# What the command line finds here, as in every method's file.
evaluate_dvae = evaluate_model
Options = DVAEOptions
train = train_dvae
