"""DALL-E in training: the loss of both segments, tokens encoded once, runs that resume to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import resumed, tiny_clip
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.checkpoint import load_checkpoint, save_checkpoint
from models.dalle import DALLETransformer
from models.dvae import DiscreteVAE
from models.generation import generate_image
from models.tokenizers import TextTokenizer
from models.torchvision import load_torchvision
from training.__main__ import main
from training.data import ArraySource, SceneSource
from training.evaluation import FeatureStatistics, frechet_distance
from training.figures import evaluate_model
from training.methods.dalle import (
    DALLELoss,
    DALLEMethod,
    DALLEOptions,
    StyleKind,
    TokenBatches,
    TokenSource,
    build_dalle,
    presets,
    styles_of,
    token_source,
    train_dalle,
)
from training.methods.dvae import train_dvae
from training.oracle import SceneReader
from training.trainer import TrainerConfig

TRAINER = TrainerConfig(
    steps=4, warmup=1, precision="fp32", ema_decay=0.9, log_every=1, save_every=0, device="cpu", threads=1
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an image tokenizer that has seen four steps."""
    folder = tmp_path_factory.mktemp("dvae")
    return train_dvae(
        data=("scenes",), levels=(5, 4), channels=(8, 8), blocks=(0, 1), image_size=16, batch_size=8, chunk=8,
        evaluate=False, out=str(folder / "out"), run_dir=str(folder / "run"), trainer=TRAINER,
    )  # fmt: skip


def _options(tokenizer: Path, folder: Path, **changes: Any) -> DALLEOptions:
    options = DALLEOptions(
        data=("scenes",), tokenizer=str(tokenizer), vocab_size=400, text_length=12, width=16, depth=2, heads=2,
        batch_size=8, chunk=8, evaluate=False, out=str(folder / "out"), run_dir=str(folder / "run"),
        token_cache=str(folder / "tokens"), trainer=TRAINER,
    )  # fmt: skip
    return replace(options, **changes)


def _source(count: int = 20) -> ArraySource:
    images = torch.randint(0, 256, (count, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return ArraySource("mine", images, [[f"picture {row}", f"number {row}"] for row in range(count)])


def test_the_loss_is_the_weighted_mean_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    text_logits, image_logits = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 3, 5, generator=generator)
    text = torch.tensor([[1, 4, 5, 2, 0], [1, 3, 2, 0, 0]])
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    texts, images = [], []
    for row in range(2):
        for place in range(4):
            if text[row, place + 1] != TextTokenizer.pad_id:
                texts.append(-math.log(float(text_logits[row, place].softmax(0)[text[row, place + 1]])))
        for place in range(3):
            images.append(-math.log(float(image_logits[row, place].softmax(0)[ids[row, place]])))
    expected = np.mean(texts) / 8 + np.mean(images) * 7 / 8
    assert float(DALLELoss()(text_logits, image_logits, text, ids)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="one above 0"):
        DALLELoss(0, 0)


def test_pictures_are_encoded_once_and_kept_by_what_they_are(tokenizer: Path, tmp_path: Path) -> None:
    dvae = load_checkpoint(tokenizer)
    source = _source()
    encoded = token_source(source, dvae, tmp_path)
    assert isinstance(encoded, TokenSource)
    assert encoded.ids.shape == (20, 16)
    white = source.images[:, :3].float() * (source.images[:, 3:] / 255) + 255 - source.images[:, 3:].float()
    assert torch.equal(encoded.ids, dvae.encode(white.round().byte()).flatten(1))
    calls = []
    dvae.encoder.register_forward_hook(lambda *_: calls.append(1))
    again = token_source(_source(), dvae, tmp_path)
    assert isinstance(again, TokenSource)
    assert torch.equal(again.ids, encoded.ids)
    assert not calls
    changed = _source()
    changed.images[3] ^= 255
    token_source(changed, dvae, tmp_path)
    assert calls
    assert len(list(tmp_path.glob("mine-*.safetensors"))) == 2


def test_batches_hold_ids_or_pictures_and_leave_captions_out(tokenizer: Path, tmp_path: Path) -> None:
    dvae = load_checkpoint(tokenizer)
    encoded = token_source(_source(), dvae, tmp_path)
    model = build_dalle(_options(tokenizer, tmp_path), dvae, encoded.corpus())
    none = model.tokens_of([""])[0]
    shares = []
    for step in range(40):
        batches = TokenBatches(
            [encoded, SceneSource(grouped_share=0.0)], [1, 1], model, 0.25, size=16, batch_size=16, steps=40, chunk=8
        )
        batch = batches[step]
        assert torch.equal(batch["tokens"], batches[step]["tokens"])
        missing = batch["ids"][:, 0] < 0
        assert int(missing.sum()) == len(batch["images"]) == 8
        ready = DALLEMethod(model).prepare(batch)
        assert torch.equal(ready["ids"][missing], dvae.encode(batch["images"]).flatten(1))
        assert torch.equal(ready["ids"][~missing], batch["ids"][~missing])
        shares.append((batch["tokens"] == none).all(1).float().mean())
    assert 0.19 < float(torch.stack(shares).mean()) < 0.31


def test_styles_say_where_a_picture_is_from_or_what_it_is(tokenizer: Path, tmp_path: Path) -> None:
    dvae = load_checkpoint(tokenizer)
    fruits = ["pear" if row % 2 else "apple" for row in range(20)]
    ids = torch.arange(20)[:, None].expand(-1, 16)
    sources = [TokenSource("mine", ids, [["picture"]] * 20, fruits), SceneSource(grouped_share=0.0)]
    kinds: list[tuple[StyleKind, set[str]]] = [
        ("none", set()), ("source", {"mine", "scenes"}), ("class", {"apple", "pear", "scenes"})
    ]  # fmt: skip
    for kind, names in kinds:
        assert {style for each in sources for style in styles_of(each, kind)} == names
    names = ["apple", "pear", "scenes"]
    model = build_dalle(_options(tokenizer, tmp_path), dvae, ["picture number"], names)
    options: dict[str, Any] = {"styles": "class", "size": 16, "batch_size": 16, "steps": 60, "chunk": 8}
    batches = TokenBatches(sources, [1, 1], model, 0.2, **options)
    tokens, ids = (torch.cat([batches[step][name] for step in range(60)]) for name in ("tokens", "ids"))
    styled, said = tokens[:, 0] != 1, (tokens[:, 1:] != model.tokens_of([""])[0, 1:]).any(1)
    for with_style, with_text, share in ((0, 0, 0.2), (1, 0, 0.2), (0, 1, 0.2), (1, 1, 0.4)):
        found = ((styled == bool(with_style)) & (said == bool(with_text))).float().mean()
        assert abs(float(found) - share) < 0.05
    for row, first in zip(ids[styled, 0].tolist(), tokens[styled, 0].tolist(), strict=True):
        assert model.styles["scenes" if row < 0 else fruits[row]] == first


def test_four_pictures_are_learned_by_heart(tokenizer: Path, tmp_path: Path) -> None:
    dvae = load_checkpoint(tokenizer)
    encoded = token_source(_source(4), dvae, tmp_path)
    model = build_dalle(_options(tokenizer, tmp_path, width=32), dvae, encoded.corpus())
    batch = {"tokens": model.tokens_of([f"picture {row}" for row in range(4)]), "ids": encoded.ids}
    method = DALLEMethod(model)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 5e-3)
    for _ in range(150):
        outputs = method(batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    assert float(outputs["image_loss"]) < 0.1
    assert float(outputs["chance_loss"]) > 2
    made = generate_image(model.eval(), [f"picture {row}" for row in range(4)], seed=0)
    expected = dvae.decode(encoded.ids.view(4, 4, 4)).mul(255).round().byte()
    shown = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in made])
    assert float((shown.float() - expected.float()).abs().mean((1, 2, 3)).median()) < 2


def test_flops_are_those_that_torch_counts(tokenizer: Path, tmp_path: Path) -> None:
    model = build_dalle(_options(tokenizer, tmp_path), load_checkpoint(tokenizer), ["a red star"])
    text, ids = model.tokens_of(["a red star"]), torch.zeros(1, model.image_length, dtype=torch.int64)
    # Written out, attention is two products, which the counter sees; it passes over the fused one of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(text, ids)
    assert model.flops() == counter.get_total_flops()


def test_a_run_resumes_to_the_same_bits_and_is_measured(tokenizer: Path, tmp_path: Path) -> None:
    model = resumed(train_dalle, partial(_options, tokenizer), tmp_path)
    assert (tmp_path / "a" / "run" / "samples.png").stat().st_size > 0
    dvae = load_checkpoint(tokenizer)
    assert isinstance(dvae, DiscreteVAE)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(model.dvae.encode(images), dvae.encode(images))  # the folder includes its tokenizer
    figures = evaluate_model(model)
    assert set(figures) == {"scenes_text_perplexity", "scenes_image_perplexity"}
    # Four steps from nothing: near guessing, 20 codes and some hundred words.
    assert 10 < figures["scenes_image_perplexity"] < 30


def test_the_frechet_distance_is_that_of_an_independent_library() -> None:
    load_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    real, drawn = torch.randn(200, 6, generator=generator) @ mixing, torch.randn(150, 6, generator=generator) + 0.5

    class Rows(torch.nn.Module):
        num_features = 6

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    theirs = FrechetInceptionDistance(feature=Rows(), input_img_size=(6,))
    theirs.set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(drawn.double(), real=False)
    ours = [FeatureStatistics.of(rows) for rows in (drawn, real)]
    assert frechet_distance(*ours) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert frechet_distance(ours[0], ours[0]) == pytest.approx(0, abs=1e-9)


def test_drawn_pictures_are_judged_by_a_model_that_embeds_both(tokenizer: Path, tmp_path: Path) -> None:
    judge = tiny_clip()
    save_checkpoint(judge, tmp_path / "judge")
    save_file(SceneReader(8).state_dict(), tmp_path / "oracle")
    judges = {"judge": str(tmp_path / "judge"), "oracle": str(tmp_path / "oracle")}
    folder = train_dalle(_options(tokenizer, tmp_path, **judges, styles="source"))
    assert load_checkpoint(folder).styles.keys() == {"scenes"}
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    (logged,) = [json.loads(line) for line in lines if "clip_score" in line]
    assert 0 <= logged["scenes_oracle_all"] <= 1
    kept = {"judge": str(tmp_path / "judge"), "statistics": tmp_path / "statistics"}
    figures = evaluate_model(folder, **kept)
    assert -1 <= figures["scenes_clip_score"] <= 1
    assert figures["scenes_clip_score"] != figures["scenes_real_clip_score"]
    assert figures["scenes_frechet_distance"] > 0.01
    (file,) = (tmp_path / "statistics").iterdir()
    assert file.name.startswith("scenes-256-")
    moved = FeatureStatistics.load(file)
    FeatureStatistics(moved.mean + 1, moved.covariance, moved.count).save(file)
    assert evaluate_model(folder, **kept)["scenes_frechet_distance"] > figures["scenes_frechet_distance"] + 10


def test_own_folder_from_the_command_line(
    tokenizer: Path, tmp_path: Path, encoded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("apples", "pears"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "photos" / label / f"{number}.jpg").write_bytes(encoded(number))
    arguments = ["--tokenizer", str(tokenizer), "--width", "16", "--depth", "1", "--heads", "2", "--text-length", "8"]
    arguments += ["--batch-size", "8", "--chunk", "8", "--steps", "2", "--warmup", "1", "--tied"]
    arguments += ["--styles", "class"]
    arguments += ["--run-dir", str(tmp_path / "run"), "--token-cache", str(tmp_path / "tokens")]
    folder = tmp_path / "out"
    assert main(["dalle", "--data", str(tmp_path / "photos"), "--out", str(folder), *arguments]) == 0
    assert "image_perplexity" in (folder / "README.md").read_text()
    assert list(load_checkpoint(folder).styles) == ["apples", "pears"]
    shown = capsys.readouterr()
    assert "FLOPs a picture" in shown.err
    assert main(["dalle", "--tokenizer", str(folder), "--out", str(tmp_path / "b"), "--steps", "1"]) == 1
    assert "is no image tokenizer" in capsys.readouterr().err
    save_checkpoint(tiny_clip(), tmp_path / "judge")
    sheet = ["--out", str(tmp_path / "sheet.png"), "--columns", "3", "--data", str(tmp_path / "photos")]
    assert main(["samples", str(folder), *sheet, "--count", "2", "--judge", str(tmp_path / "judge")]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 * 100 + 4, 2 * 118 + 4)  # two captions, three pictures of each and the nearest
    assert main(["samples", str(folder), "apples", *sheet]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (3 * 100 + 4, 118 + 4)
    assert main(["samples", str(tmp_path / "judge"), *sheet]) == 1
    assert "draws no pictures" in capsys.readouterr().err
    judged = ["--data", str(tmp_path / "photos"), "--judge", str(tmp_path / "judge"), "--json"]
    assert main(["evaluate", str(folder), *judged, "--statistics", str(tmp_path / "statistics")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures[f"{tmp_path / 'photos'}_real_nearest_training"] == pytest.approx(
        1, abs=0.01
    )  # they are those trained on


@pytest.mark.parametrize(("name", "millions"), [("tiny-cpu", 7), ("demo", 7), ("100m", 100), ("1b", 1030)])
def test_a_preset_has_the_size_that_its_name_says(name: str, millions: int) -> None:
    options = presets()[name]
    image = {
        "image_size": 64, "quantizer": {"name": "fsq", "levels": [8, 5, 5, 5]}, "channels": [8, 8], "blocks": [0, 0]
    }  # fmt: skip
    with torch.device("meta"):
        model = DALLETransformer(
            image=image, vocab_size=options.vocab_size, width=options.width, depth=options.depth, heads=options.heads
        )
    weights = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert weights == pytest.approx(millions * 1e6, rel=0.05)
