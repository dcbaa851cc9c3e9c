"""Image tokenizers in training: losses by their equations, codes that stay in use, runs that resume to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import resumed, tiny_clip

from models.dvae import LAPLACE_MARGIN, VQ, DiscreteVAE, Gumbel
from training.__main__ import main
from training.figures import evaluate_model
from training.methods.dvae import DVAELoss, DVAEMethod, DVAEOptions, LogitLaplaceLoss, train_dvae, uniform_divergence
from training.oracle import SceneReader
from training.reconstruction import code_figures, psnr
from training.trainer import TrainerConfig

KINDS = ("fsq", "vq", "gumbel")
TRAINER = TrainerConfig(
    steps=4, warmup=1, precision="fp32", ema_decay=0.9, log_every=1, save_every=0, device="cpu", threads=1
)


def _options(kind: Any, folder: Path, **changes: Any) -> DVAEOptions:
    options = DVAEOptions(
        data=("scenes",), quantizer=kind, levels=(5, 4), codes=16, code_dim=8, channels=(8, 8), blocks=(0, 1),
        image_size=16, batch_size=8, chunk=8, evaluate=False, out=str(folder / "out"), run_dir=str(folder / "run"),
        trainer=TRAINER,
    )  # fmt: skip
    return replace(options, **changes)


def _method(kind: str, **options: Any) -> DVAEMethod:
    torch.manual_seed(0)
    quantizer: dict[str, Any] = {"name": kind} | ({"levels": [8, 8]} if kind == "fsq" else {"codes": 32, "dim": 8})
    return DVAEMethod(DiscreteVAE(image_size=16, quantizer=quantizer, channels=(16,), blocks=(1,)), **options)


def test_logit_laplace_is_the_papers_density() -> None:
    """-log f of eq. 2, value by value."""
    generator = torch.Generator().manual_seed(0)
    output, pixels = torch.randn(2, 6, 3, 3, generator=generator), torch.rand(2, 3, 3, 3, generator=generator)
    total = 0.0
    for image in range(2):
        for channel in range(3):
            for y in range(3):
                for x in range(3):
                    value = (1 - 2 * LAPLACE_MARGIN) * float(pixels[image, channel, y, x]) + LAPLACE_MARGIN
                    mean, scale = float(output[image, channel, y, x]), math.exp(output[image, channel + 3, y, x])
                    logit = math.log(value / (1 - value))
                    density = math.exp(-abs(logit - mean) / scale) / (2 * scale * value * (1 - value))
                    total -= math.log(density)
    assert float(LogitLaplaceLoss()(output, pixels)) == pytest.approx(total / 54, rel=1e-5)


def test_the_divergence_is_zero_for_even_logits_and_log_k_for_certain_ones() -> None:
    assert float(uniform_divergence(torch.zeros(2, 8, 3, 3))) == pytest.approx(0, abs=1e-6)
    certain = torch.full((2, 8, 3, 3), -1e4)
    certain[:, 2] = 1e4
    assert float(uniform_divergence(certain)) == pytest.approx(9 * math.log(8), rel=1e-6)


def test_figures_are_their_definitions() -> None:
    assert {k: float(v) for k, v in code_figures(torch.tensor([0, 1, 2, 3]), 8).items()} == pytest.approx(
        {"perplexity": 4.0, "codes_used": 4.0}
    )
    assert float(code_figures(torch.zeros(9, dtype=torch.int64), 8)["perplexity"]) == pytest.approx(1)
    assert float(psnr(torch.full((2, 3, 4, 4), 0.6), torch.full((2, 3, 4, 4), 0.5))) == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_pictures_are_learned_by_heart(kind: str) -> None:
    images = F.interpolate(torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 16).mul(255).byte()
    method = _method(kind, kl=0.0)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    for step in range(200):
        outputs = method({"images": images})
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        method.after_step(step / 200)
    model = method.export().eval()
    start = _method(kind).model.eval()
    with torch.inference_mode():
        before, after = (float(psnr(each.decode(each.encode(images)), images / 255)) for each in (start, model))
    assert after > before + 4
    assert float(outputs["codes_used"]) >= 8


def test_codes_of_vq_move_to_the_mean_of_what_they_stand_for_and_unused_ones_start_anew() -> None:
    method = _method("vq", decay=0.0)
    quantizer = method.model.quantizer
    assert isinstance(quantizer, VQ)
    rows = F.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    codes = torch.arange(64) % 4
    method._seen.append((rows.view(1, 8, 8, 8).permute(0, 3, 1, 2), codes.view(1, 8, 8)))
    method.after_step(0.5)
    for code in range(4):
        torch.testing.assert_close(quantizer.codebook[code], F.normalize(rows[codes == code].sum(0), dim=0))
    # The other 28 stood for nothing: each is one of the batch's rows now.
    distance = (quantizer.codebook[4:, None] - rows[None]).abs().amax(2).amin(1)
    assert float(distance.max()) < 1e-6


def test_schedules_of_the_relaxation() -> None:
    method = _method("gumbel", temperature=0.1, kl=6.0, kl_ramp=0.5)
    quantizer = method.model.quantizer
    assert isinstance(quantizer, Gumbel)
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        method.after_step(progress)
        seen.append((round(float(quantizer.temperature), 4), float(method.kl_weight)))
    assert seen == [(1.0, 0.0), (0.8682, 3.0), (0.55, 6.0), (0.1, 6.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_same_bits_and_is_measured(tmp_path: Path, kind: str) -> None:
    model = resumed(train_dvae, partial(_options, kind), tmp_path)
    assert (tmp_path / "a" / "run" / "reconstructions.png").stat().st_size > 0
    figures = evaluate_model(model)
    assert set(evaluate_model(model, judge=tiny_clip(), oracle=SceneReader(8).eval())) - set(figures) == {
        "scenes_reconstruction_frechet_distance",
        *(f"scenes_oracle_{kind}" for kind in ("all", "one", "two", "three")),
    }
    assert set(figures) == {"scenes_psnr", "scenes_perplexity", "scenes_codes_used"}
    assert 1 <= figures["scenes_perplexity"] <= figures["scenes_codes_used"] <= model.codes


def test_a_loss_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be trained with loss 'laplace'"):
        _method("fsq", loss="laplace")
    with pytest.raises(ValueError, match="l2, l1 or laplace"):
        DVAELoss("huber")  # type: ignore[arg-type]


def test_own_folder_from_the_command_line(tmp_path: Path, encoded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(encoded(number))
    arguments = ["--image-size", "16", "--channels", "8", "--blocks", "1", "--loss", "laplace", "--steps", "2"]
    arguments += ["--batch-size", "8", "--chunk", "8", "--warmup", "1", "--run-dir", str(tmp_path / "run")]
    folder = tmp_path / "out"
    assert main(["dvae", "--data", str(tmp_path / "photos"), "--out", str(folder), *arguments]) == 0
    assert "psnr" in (folder / "README.md").read_text()
    assert "wrote" in capsys.readouterr().out
