"""OpenCLIP models behind our face: same weights, same embeddings, their own preprocess and tokenizer."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import OPEN_CLIP, open_clip_folder

from models.checkpoint import load_model
from models.errors import CheckpointError
from models.open_clip import OpenCLIPModel, _with_fast_merges
from models.preprocess import Preprocess
from models.torchvision import load_torchvision

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_same_weights_give_the_same_embeddings(tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    folder = open_clip_folder(tmp_path / "model")
    ours = load_model(folder)
    import open_clip

    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    pictures = [picture(seed, size) for seed, size in enumerate([(48, 40), (40, 90), (32, 32), (100, 33)])]
    texts = ["a red star", "a photo of two dogs, playing", ""]
    with torch.inference_mode():
        pixels = torch.stack([ours.preprocess(image) for image in pictures])
        prepared = torch.stack([transform(image) for image in pictures])
        # By Pillow, which rounds a little otherwise: one level of 255 is 0.015.
        assert torch.allclose(ours.preprocess.normalize(pixels), prepared, atol=0.016)
        expected = theirs.encode_image(ours.preprocess.normalize(pixels), normalize=True)
        assert torch.allclose(ours.encode_image(pixels), expected, atol=1e-5)
        assert torch.allclose(expected, theirs.encode_image(prepared, normalize=True), atol=1e-3)
        expected = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
        assert torch.allclose(ours.encode_text(ours.tokenizer(texts)), expected, atol=1e-6)
    assert ours.logit_scale_value == pytest.approx(float(theirs.logit_scale.detach().exp()))
    assert ours.embed_dim == 32


def test_words_of_any_length_have_open_clips_tokens_and_are_not_remembered() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    theirs, ours = SimpleTokenizer(), _with_fast_merges(SimpleTokenizer())
    draw = random.Random(0)
    letters = "abcdefghij éüßñ中文字😀<>'0123 .,!?-ab"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 200))) for _ in range(300)]
    texts += ["", "it's THE <end_of_text> of <start_of_text>blue", "ab" * 300, "a" * 500]
    remembered = len(ours.cache)
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert torch.equal(ours(texts), theirs(texts))
    assert len(ours.cache) == remembered


@pytest.mark.parametrize(
    ("change", "shortest"),
    [
        ({}, 5),
        ({"text_cfg": OPEN_CLIP["text_cfg"] | {"pool_type": "eos", "eos_id": 49407}}, 5),
        ({"custom_text": True}, 5),
        ({"text_cfg": OPEN_CLIP["text_cfg"] | {"no_causal_mask": True}, "custom_text": True}, 77),  # as SigLIP
        ({"text_cfg": OPEN_CLIP["text_cfg"] | {"pool_type": "last"}, "custom_text": True}, 77),
    ],
)
def test_texts_are_cut_where_nothing_after_their_end_counts(
    change: dict[str, object], shortest: int, tmp_path: Path
) -> None:
    load_torchvision()
    import open_clip

    options = OPEN_CLIP | change
    builder = open_clip.model.CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    theirs = builder(**options).eval()
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a red star", "a photo of two dogs, playing"])
    ours = OpenCLIPModel(theirs, Preprocess(size=32), open_clip.get_tokenizer("ViT-B-32"))
    lengths = ours.text_lengths(tokens)
    assert lengths[0] == shortest
    with torch.inference_mode():
        expected = theirs.encode_text(tokens, normalize=True)
        assert torch.allclose(ours.encode_text(tokens[:, : int(lengths.max())]), expected, atol=1e-6)
        assert torch.allclose(ours.encode_text(tokens[:1, : int(lengths[0])]), expected[:1], atol=1e-6)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_their_preprocess_is_used(tmp_path: Path, picture: Callable[..., Image.Image], mode: str) -> None:
    config = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": mode}
    folder = open_clip_folder(tmp_path / "model", config)
    ours = load_model(folder)
    import open_clip

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for seed, size in enumerate([(48, 40), (40, 90), (64, 64)]):
        image = picture(seed, size)
        mine = ours.preprocess.normalize(ours.preprocess(image)[None])[0]
        assert (mine - transform(image)).abs().mean() < 0.03
        assert mine.shape == transform(image).shape


def test_a_named_architecture_with_a_file_of_weights(tmp_path: Path) -> None:
    load_torchvision()
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    ours = load_model(f"open_clip:ViT-S-32-alt/{file}")
    tokens = ours.tokenizer(["a dog"])
    with torch.inference_mode():
        assert torch.allclose(ours.encode_text(tokens), model.eval().encode_text(tokens, normalize=True), atol=1e-6)


def test_fingerprints_follow_the_weights(tmp_path: Path) -> None:
    prints = [
        load_model(open_clip_folder(tmp_path / str(i), seed=seed)).fingerprint for i, seed in enumerate((0, 0, 1))
    ]
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 16


@pytest.mark.parametrize(
    "reference", ["open_clip:ViT-B-32", "open_clip:", "open_clip:No-Such-Model/laion", "open_clip:ViT-B-32/notag"]
)
def test_wrong_references_are_said_in_a_sentence(reference: str) -> None:
    with pytest.raises(CheckpointError, match="open_clip"):
        load_model(f"open_clip:{reference}")


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="unpickled"):
        load_model(f"open_clip:ViT-B-32/{file}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_hub_repositories_from_their_cache(tmp_path: Path) -> None:
    """`hf-hub:` with weights made here, laid where the hub's client keeps what it downloaded."""
    repository = tmp_path / "models--semblance--tiny"
    snapshot = open_clip_folder(repository / "snapshots" / "0" / "x").rename(
        repository / "snapshots" / ("0" * 39 + "1")
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    code = "from models.checkpoint import load_model; m = load_model('hf-hub:semblance/tiny'); print(m.fingerprint)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_model(snapshot).fingerprint  # the same model, wherever it came from
    absent = code.replace("semblance/tiny", "semblance/absent")
    done = subprocess.run(
        [sys.executable, "-c", absent], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert "CheckpointError: hf-hub:semblance/absent: open_clip cannot build it" in done.stderr
