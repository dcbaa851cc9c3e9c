"""CLIP from the command line and from Python: it learns, resumes, exports and is measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import tiny_clip

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointError, DataError
from training.__main__ import main
from training.evaluation import extract_features, knn_evaluation, linear_evaluation
from training.export import export_run
from training.figures import evaluate_scenes
from training.method import discover
from training.methods.clip import CLIPMethod, CLIPOptions, evaluate_clip, presets, train_clip
from training.methods.simclr import train_simclr
from training.state import facts_of, find_state
from training.trainer import TrainerConfig

SMALL = {"channels": 8, "blocks": [1], "depth": 0}
OPTIONS = CLIPOptions(
    image_size=32,
    encoder_options=SMALL,
    embed_dim=16,
    text_width=32,
    text_depth=1,
    vocab_size=300,
    batch_size=16,
    chunk=8,
    evaluate=False,
    trainer=TrainerConfig(steps=4, warmup=1, precision="fp32", log_every=1, device="cpu"),
)


def _options(folder: Path, **changes: object) -> CLIPOptions:
    return replace(OPTIONS, out=str(folder / "out"), run_dir=str(folder / "run"), **changes)  # type: ignore[arg-type]


def test_ten_pairs_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    model = tiny_clip()
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer([f"picture {number}" for number in "abcdefghij"])
    method = CLIPMethod(model).train()
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    first = None
    for _ in range(60):
        loss = method({"images": images, "tokens": tokens})["loss"]
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.0)
    assert first > 1.5
    assert float(loss.detach()) < 0.1


def test_forward_changes_nothing_and_the_scale_is_kept_in_bounds() -> None:
    model = tiny_clip()
    method = CLIPMethod(model)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    outputs = method({"images": images, "tokens": model.tokenizer(["a", "b", "c", "d"])})
    assert torch.equal(images, before)
    assert float(outputs["chance_loss"]) == pytest.approx(math.log(4))
    model.logit_scale.data.fill_(9.0)
    method.after_step(0.5)
    assert model.logit_scale_value == pytest.approx(100)
    with pytest.raises(ValueError, match="logit_bias"):
        CLIPMethod(model, loss="siglip")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "siglip"},
        {"micro_batch": 4, "chunk_size": 4},
        {"matryoshka": (4, 16)},
        {"encoder": "vit-tiny", "encoder_options": {}},
    ],
)
def test_options_train_and_round_trip(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = train_clip(_options(tmp_path, **changes))
    model = load_checkpoint(folder)
    assert model.provenance["steps"] == 4
    assert model.config["truncatable"] == list(changes.get("matryoshka", ()))  # type: ignore[call-overload]
    texts = model.encode_text(model.tokenizer(["a red star"]))
    assert texts.shape == (1, 16)
    exported = load_checkpoint(export_run(tmp_path / "run", tmp_path / "exported"))
    assert torch.equal(exported.encode_text(exported.tokenizer(["a red star"])), texts)


def test_a_run_goes_on_from_a_trained_model(tmp_path: Path) -> None:
    """With a rate of zero it stays what it was; its tokenizer, size, data and licences come along."""
    first = load_checkpoint(train_clip(_options(tmp_path / "first")))
    still = replace(OPTIONS.trainer, lr=0.0, weight_decay=0.0, ema_decay=0.0, seed=5)
    again = load_checkpoint(
        train_clip(_options(tmp_path / "again", init=str(tmp_path / "first" / "out"), image_size=48, trainer=still))
    )
    tokens = first.tokenizer(["a red star"])
    assert torch.equal(again.tokenizer(["a red star"]), tokens)
    assert torch.equal(again.text_encoder.token.weight, first.text_encoder.token.weight)
    assert again.preprocess.size == 32
    assert again.provenance["data"].count("scenes: unlimited") == 2
    assert again.provenance["license"] == first.provenance["license"]
    with pytest.raises(CheckpointError, match="needs EncoderModel"):
        train_simclr(data=("scenes",), init=str(tmp_path / "first" / "out"), out=str(tmp_path / "o"))


def test_the_average_of_checkpoints_is_that_of_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        save_checkpoint(tiny_clip(seed), tmp_path / str(seed), provenance={"command": f"run {seed}", "license": "mine"})
    places = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert main(["average", *places, "--out", str(tmp_path / "both")]) == 0
    one, two, both = (load_checkpoint(tmp_path / name) for name in ("0", "1", "both"))
    for name, value in both.state_dict().items():
        torch.testing.assert_close(value.float(), (one.state_dict()[name].float() + two.state_dict()[name].float()) / 2)
    assert both.provenance["license"] == "mine"
    assert "of: run 0, run 1" in both.provenance["command"]
    save_checkpoint(tiny_clip(size=48), tmp_path / "larger")
    capsys.readouterr()
    assert main(["average", places[0], str(tmp_path / "larger"), "--out", str(tmp_path / "no")]) == 1
    assert "no two states of one model" in capsys.readouterr().err


def test_own_folder_from_the_command_line(
    tmp_path: Path, encoded: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(12):
        folder = tmp_path / "photos" / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(encoded(index))
    (tmp_path / "photos" / "dogs" / "broken.jpg").write_bytes(b"broken")
    arguments = ["clip", "--data", f"{tmp_path}/photos", "--out", f"{tmp_path}/out", "--run-dir", f"{tmp_path}/run"]
    arguments += ["--steps", "3", "--batch-size", "8", "--chunk", "4", "--image-size", "32", "--precision", "fp32"]
    arguments += ["--encoder-options", json.dumps(SMALL), "--text-depth", "1", "--text-width", "32"]
    assert main(arguments) == 0
    assert "semblance serve --checkpoints" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["provenance"]["skipped_rows"] == 1
    assert f"{tmp_path}/photos_zero_shot" in config["provenance"]["metrics"]
    assert main(["evaluate", f"{tmp_path}/out", "--data", f"{tmp_path}/photos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[f"{tmp_path}/photos_zero_shot"] >= 0


def test_errors_of_the_command_line_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clip", "--data", "nowhere", "--out", str(tmp_path / "o"), "--run-dir", str(tmp_path / "r")]) == 1
    assert capsys.readouterr().err.startswith("semblance-train: 'nowhere' is no file")
    assert main(["evaluate", str(tmp_path / "none")]) == 1
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "holds no saved run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["clip", "--no-such-option"])


@pytest.mark.parametrize("method", sorted(discover()))
def test_every_option_has_its_explanation(method: str) -> None:
    options = [*fields(discover()[method].Options), *fields(TrainerConfig)]
    assert all(item.metadata.get("help") for item in options if item.name != "trainer")


def test_presets_are_whole_options_and_methods_are_found() -> None:
    assert set(presets()) == {"tiny-cpu", "demo", "demo-finish", "demo-refine"}
    assert "clip" in discover()


def test_two_processes_train_as_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    command += ["clip", "--data", "scenes", "--steps", "3", "--batch-size", "16", "--chunk", "4", "--image-size", "32"]
    command += ["--encoder-options", json.dumps(SMALL), "--text-depth", "1", "--text-width", "32", "--no-evaluate"]
    command += ["--out", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run"), "--threads", "1", "--device", "cpu"]
    command += ["--precision", "fp32", "--log-every", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # by the first of them, not by each
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # Guessing among the 16 of both ranks: each has its half of the batch, and the other's as negatives.
    assert [line["chance_loss"] for line in lines if line["kind"] == "train"] == pytest.approx([math.log(16)] * 3)
    assert load_checkpoint(tmp_path / "out").provenance["steps"] == 3


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "clip", "--data", "scenes", "--steps", "100000", "--log-every", "1"]
    command += ["--batch-size", "8", "--chunk", "8", "--image-size", "32", "--encoder-options", json.dumps(SMALL)]
    command += ["--text-depth", "1", "--run-dir", str(tmp_path / "run"), "--threads", "1", "--precision", "fp32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3 "):
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert "start again with the same options" in said
    state = find_state(tmp_path / "run")
    assert state is not None
    assert facts_of(state)["step"] >= 3


def test_scene_figures_of_a_model_that_knows_nothing_are_those_of_guessing() -> None:
    figures = evaluate_scenes(tiny_clip(), count=64)
    assert figures["scenes_r1"] < 0.2
    assert 0.2 < figures["scenes_swap_relation"] < 0.8
    assert all(0 <= value <= 1 for value in figures.values())


def test_probes_separate_what_is_separable_and_no_more() -> None:
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    rows = torch.randn(400, 8)
    apart = rows + 8 * torch.nn.functional.one_hot(labels, 8)
    for features, low, high in ((apart, 0.98, 1.0), (rows, 0.1, 0.45)):
        linear = linear_evaluation(features[:300], labels[:300], features[300:], labels[300:])["accuracy"]
        near = knn_evaluation(features[:300], labels[:300], features[300:], labels[300:], k=20)["accuracy"]
        assert low <= linear <= high
        assert low <= near <= high


def test_knn_is_the_vote_of_a_loop() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(50, 4), torch.randn(9, 4)
    labels, targets = torch.randint(0, 3, (50,)), torch.randint(0, 3, (9,))
    right = 0
    for row, target in zip(test, targets, strict=True):
        cosines = [float(torch.nn.functional.cosine_similarity(row, other, dim=0)) for other in train]
        votes = [0.0] * 3
        for place in sorted(range(50), key=lambda i: -cosines[i])[:5]:
            votes[int(labels[place])] += math.exp(cosines[place] / 0.1)
        right += int(votes.index(max(votes)) == int(target))
    assert knn_evaluation(train, labels, test, targets, k=5)["accuracy"] == pytest.approx(right / 9)


def test_features_come_in_order_and_leave_the_model_as_it_was() -> None:
    model = tiny_clip().train()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    features, labels = extract_features(model, [(images[:4], torch.arange(4)), (images[4:], torch.tensor([4, 5]))])
    assert model.training
    assert torch.allclose(features, model.eval().encode_image(images).detach(), atol=1e-5)
    assert labels.tolist() == list(range(6))


def test_named_sets_need_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMBLANCE_DATA", raising=False)
    with pytest.raises(DataError, match="set SEMBLANCE_DATA"):
        evaluate_clip(tiny_clip(), data=("emoji",))


def test_what_belongs_to_a_runs_state_is_that_runs(tmp_path: Path) -> None:
    """A run that is refused leaves it as it was; one whose pictures or captions are others since is refused."""
    table = tmp_path / "pictures.csv"
    for index in range(8):
        Image.new("RGB", (32, 32), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")

    def trained(words: Sequence[str], **changes: object) -> Path:
        table.write_text("path,caption\n" + "".join(f"{i}.png,{word}\n" for i, word in enumerate(words)))
        return train_clip(_options(tmp_path, data=(str(table),), evaluate=False, **changes))

    words = ["red", "rose", "rust", "ruby", "robin", "rhubarb", "radish", "raspberry"]
    trained(words)
    with pytest.raises(CheckpointError, match="other embed_dim, vocab_size:"):
        trained(words, embed_dim=32, vocab_size=280)
    assert load_checkpoint(export_run(tmp_path / "run", tmp_path / "exported")).embed_dim == 16
    with pytest.raises(CheckpointError, match="other vocabulary: give the same options and data"):
        trained([*words[:7], "sky"])
    with pytest.raises(CheckpointError, match="other pictures, vocabulary:"):
        trained(words[:7])
    trained(words)


def test_pictures_or_a_run_in_the_checkpoints_place_are_kept(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(8):
        Image.new("RGB", (32, 32), (30 * index, 0, 0)).save(photos / f"{index}.png")
    with pytest.raises(CheckpointError, match="photos is there and is no checkpoint folder"):
        train_clip(replace(_options(tmp_path), data=(str(photos),), out=str(photos)))
    assert not (tmp_path / "run").exists()  # it is said before anything is trained
    assert len(list(photos.iterdir())) == 8
    for run in ("out", "out/run"):
        with pytest.raises(CheckpointError, match="lies in --out"):
            train_clip(replace(_options(tmp_path), run_dir=str(tmp_path / run)))


def test_two_trainings_do_not_write_into_one_run(tmp_path: Path) -> None:
    """The second is refused as long as the first lives, however that ends."""
    code = "import sys; from pathlib import Path; from training.state import alone_in\n"
    code += "with alone_in(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"here\n"
        with pytest.raises(CheckpointError, match="another process trains in"):
            train_clip(_options(tmp_path))
        first.kill()
    train_clip(_options(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("clip --steps -3", "--steps -3: must be at least 0"),
        ("clip --lr nan", "--lr nan: must be at least 0"),
        ("clip --ema-decay 1", "--ema-decay 1.0: must be at least 0 and below 1"),
        ("clip --batch-size 0", "--batch-size 0: must be at least 1"),
        ("clip --chunk-size -2", "--chunk-size -2: must be at least 1"),
        ("clip --matryoshka 16 0", "--matryoshka 0: must be at least 1"),
        ("clip --matryoshka 16 9999", "--matryoshka 9999: embeddings of this model have 256 numbers"),
        ("simclr --views 1", "--views 1: must be at least 2"),
        ("simclr --crop 1.5", "--crop 1.5: must be above 0 and at most 1"),
        ("dvae --quantizer vq --codes 0", "--codes 0: must be at least 2"),
        ("clip --device nowhere", "--device nowhere: "),
        ("clip --encoder timm:nope", "image encoder 'timm:nope' cannot be made: Unknown model"),
        ("clip --loss siglip --chunk-size 2", "--chunk-size is of infonce alone"),
        ("byol --batch-size 1", "--batch-size 1: every process needs two pictures"),
        ("clip --encoder-options 3", "argument --encoder-options: '3' is no JSON object"),
    ],
)
def test_values_that_cannot_work_are_refused_by_the_options_name(
    tmp_path: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--out", str(tmp_path / "o"), "--run-dir", str(tmp_path / "r"), "--steps", "1", "--batch-size", "2"]
    method, *given = arguments.split()
    with contextlib.suppress(SystemExit):  # argparse's, of what is no value at all
        assert main([method, *places, *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate m --fine-tune 0.1 2", "argument --fine-tune: 2: must be above 0 and at most 1"),
        ("views simclr --count 0", "argument --count: 0: must be at least 1"),
        ("scenes --each -1", "argument --each: -1: must be at least 0"),
        ("scenes --size 0", "argument --size: 0: must be at least 1"),
        ("oracle --steps many", "argument --steps: invalid int value: 'many'"),
    ],
)
def test_so_are_those_of_the_other_commands(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert message in capsys.readouterr().err
