"""SimCLR, MoCo, BYOL and VICReg as methods: what they move, what they keep, how they resume, what they export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import saved_tensors, tiny_clip
from tiny import SMALL, encoder, view_method, views
from torch import Tensor, nn

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import DataError
from models.preprocess import Preprocess
from models.vision import EncoderModel
from training.__main__ import main
from training.baselines import RawPixels, baseline_figures
from training.ema import cosine_decay
from training.export import export_run
from training.figures import evaluate_model
from training.heads import SplitBatchNorm2d, split_batch_norm
from training.method import discover
from training.methods.byol import BYOLModel, BYOLTransform
from training.methods.moco import MoCoMethod, MoCoModel, MoCoTransform
from training.methods.simclr import SimCLRModel, SimCLRTransform
from training.trainer import TrainerConfig

METHODS = ("simclr", "moco", "byol", "vicreg")
TRAINER = TrainerConfig(
    steps=4, warmup=1, precision="fp32", ema_decay=0.9, log_every=1, save_every=0, device="cpu", threads=1
)


def _options(name: str, folder: Path, **changes: Any) -> Any:
    changes = {
        "data": ("scenes",),
        "encoder_options": SMALL,
        "image_size": 16,
        "batch_size": 8,
        "chunk": 4,
        "hidden_dim": 16,
        "projection_dim": 8,
        "evaluate": False,
        "out": str(folder / "out"),
        "run_dir": str(folder / "run"),
        "trainer": TRAINER,
    } | changes
    if name == "moco":
        changes = {"queue_size": 16, "splits": 4} | changes
    return discover()[name].Options(**changes)


def test_models_give_features_and_projections() -> None:
    images = torch.randn(4, 3, 32, 32)
    for model in (SimCLRModel("resnet18"), MoCoModel("resnet18"), BYOLModel("resnet18", hidden_dim=64)):
        features, projections = model(images)
        assert features.shape == (4, 512)
        assert projections.shape == (4, 256 if isinstance(model, BYOLModel) else 128)
    assert len(MoCoModel(encoder(), version="v1").projector) == 1
    with pytest.raises(ValueError, match="choose v1, v2 or v3"):
        MoCoModel("resnet18", version="v4")  # type: ignore[arg-type]


def test_transforms_give_two_views_of_their_own() -> None:
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    for transform in (SimCLRTransform(32), MoCoTransform(32, "v3"), BYOLTransform(32)):
        one, two = transform(images)
        assert one.shape == two.shape == (4, 3, 32, 32)
        assert not torch.equal(one, two)
    assert len(SimCLRTransform(32, views=4)(images)) == 4


@pytest.mark.parametrize("name", METHODS)
def test_ten_pictures_are_told_apart_by_overfitting(name: str) -> None:
    method, batch = view_method(name), views()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 0.01)
    losses = []
    for step in range(60):
        outputs = method(batch)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        if isinstance(method, MoCoMethod):
            method._keys.clear()  # or the queue would hold the same pictures as negatives
        method.after_step(step / 60)
        losses.append(float(outputs["loss"].detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_training_resumes_to_the_same_bits_and_exports(tmp_path: Path, name: str) -> None:
    train = discover()[name].train
    whole = load_checkpoint(train(_options(name, tmp_path / "a")))
    stopped = _interrupting(name, _options(name, tmp_path / "b"), at=2)
    torch.manual_seed(999)
    resumed = load_checkpoint(train(_options(name, tmp_path / "b")))
    assert stopped == 2
    weights = resumed.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole.state_dict().items())
    whole_state, resumed_state = (saved_tensors(tmp_path / run / "run") for run in "ab")
    assert all(torch.equal(value, resumed_state[name]) for name, value in whole_state.items())
    exported = load_checkpoint(export_run(tmp_path / "b" / "run", tmp_path / "exported"))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(exported.encode_image(images), resumed.encode_image(images))
    assert exported.encode_image(images).norm(dim=1).allclose(torch.ones(3), atol=1e-5)
    assert resumed.provenance["steps"] == 4


def _interrupting(name: str, options: Any, at: int) -> int:
    """Trains until Ctrl-C comes in the midst of step `at`; how many steps were done."""
    import os
    import signal

    module, calls = discover()[name], 0
    method_class = next(value for key, value in vars(module).items() if key.endswith("Method") and key != "ViewMethod")
    forward = method_class.forward

    def watched(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    method_class.forward = watched
    try:
        with pytest.raises(KeyboardInterrupt):
            module.train(options)
    finally:
        method_class.forward = forward
    return calls


def test_matryoshka_and_more_views_train(tmp_path: Path) -> None:
    changes = {"matryoshka": (4, 8), "views": 3, "learn_temperature": True, "layers": 3, "variant": "hard"}
    model = load_checkpoint(discover()["simclr"].train(_options("simclr", tmp_path, **changes)))
    assert model.config["truncatable"] == [4, 8]


@pytest.mark.parametrize(
    "changes", [{"version": "v1"}, {"version": "v3"}, {"batch_norm": "sync"}, {"batch_norm": "split"}]
)
def test_versions_of_moco_train(tmp_path: Path, changes: dict[str, str]) -> None:
    assert discover()["moco"].train(_options("moco", tmp_path, **changes)).is_dir()


def test_moco_v3_leaves_the_patch_projection_of_a_vit_as_it_was(tmp_path: Path) -> None:
    model = EncoderModel(image={"name": "vit-tiny", "image_size": 16})
    method = MoCoMethod(model, MoCoTransform(16, "v3"), version="v3", batch_norm="sync", projection_dim=8)
    assert not model.encoder.trunk.patch.weight.requires_grad
    assert model.encoder.trunk.position.requires_grad
    method(views())["loss"].backward()


def test_a_queue_that_the_batch_does_not_divide_is_refused_with_one_that_it_does() -> None:
    with pytest.raises(ValueError, match="choose 24"):
        view_method("moco", queue_size=22)


def test_the_queue_is_a_ring_of_the_latest_keys() -> None:
    method = view_method("moco", batch_norm="sync")
    assert isinstance(method, MoCoMethod)
    seen: list[Tensor] = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        method({"views": torch.randn(2, 8, 3, 16, 16, generator=generator)})
        seen.append(method._keys[0].clone())
        before = method.queue.clone()
        method.after_step(0.0)
        place = (8 * step) % 16
        assert torch.equal(method.queue[place : place + 8], seen[-1])
        assert int((method.queue != before).any(1).sum()) == 8
    assert torch.allclose(method.queue.norm(dim=1), torch.ones(16), atol=1e-5)


@pytest.mark.parametrize(("name", "base"), [("moco", 0.999), ("byol", 0.996)])
def test_the_target_is_the_average_of_the_online_network(name: str, base: float) -> None:
    method: Any = view_method(name)
    before = [p.clone() for p in method.target.parameters()]
    with torch.no_grad():
        for p in method.online.parameters():
            p.add_(1.0)
    method.after_step(0.5)
    decay = cosine_decay(base, 0.5) if name == "byol" else base
    for old, new, online in zip(before, method.target.parameters(), method.online.parameters(), strict=True):
        assert torch.allclose(new, decay * old + (1 - decay) * online, atol=1e-6)
        assert not new.requires_grad


def test_the_schedule_of_the_average_is_the_papers() -> None:
    from models.torchvision import load_torchvision

    load_torchvision()
    from lightly.utils.scheduler import cosine_schedule

    for step in range(101):
        assert cosine_decay(0.996, step / 100) == pytest.approx(cosine_schedule(step, 101, 0.996, 1), abs=1e-12)


def test_shuffled_keys_have_other_company_and_come_back_in_order() -> None:
    """In evaluation mode company does not matter, so that only the order could differ."""
    shuffled, plain = view_method("moco", batch_norm="shuffle"), view_method("moco", batch_norm="split")
    images = views()["views"][1]
    assert not torch.allclose(shuffled._key(images), plain._key(images))  # type: ignore[operator]
    for method in (shuffled, plain):
        method.eval()
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.reset_running_stats()
    assert torch.allclose(shuffled._key(images), plain._key(images), atol=1e-5)  # type: ignore[operator]


def test_split_batch_norm_is_batch_norm_of_each_part() -> None:
    images = torch.randn(12, 5, 4, 4)
    whole = nn.Sequential(nn.BatchNorm2d(5))
    split = split_batch_norm(nn.Sequential(nn.BatchNorm2d(5)), 3)
    assert isinstance(split[0], SplitBatchNorm2d)  # type: ignore[index]
    out = split(images)
    for part in range(3):
        assert torch.allclose(out[part::3], nn.BatchNorm2d(5)(images[part::3]), atol=1e-6)
    whole(images)
    assert torch.allclose(split[0].running_mean, whole[0].running_mean, atol=1e-6)  # type: ignore[index, union-attr]
    assert torch.allclose(split.eval()(images), whole.eval()(images), atol=0.2)  # the variances of parts are smaller
    with pytest.raises(ValueError, match="does not split"):
        split.train()(images[:10])


def test_own_folder_from_the_command_line(
    tmp_path: Path, encoded: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(20):
        folder = tmp_path / "photos" / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(encoded(index))
    arguments = ["simclr", "--data", f"{tmp_path}/photos", "--out", f"{tmp_path}/out", "--run-dir", f"{tmp_path}/run"]
    arguments += ["--steps", "3", "--batch-size", "8", "--chunk", "4", "--image-size", "16", "--precision", "fp32"]
    arguments += ["--encoder-options", json.dumps(SMALL), "--evaluate-every", "2"]
    assert main(arguments) == 0
    metrics = load_checkpoint(tmp_path / "out").provenance["metrics"]
    assert set(metrics) == {f"{tmp_path}/photos_knn", f"{tmp_path}/photos_linear"}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(f"{tmp_path}/photos_knn" in line for line in log if line["kind"] == "evaluation")
    evaluate = ["evaluate", f"{tmp_path}/out", "--data", f"{tmp_path}/photos", "--json", "--fine-tune", "0.1", "0.5"]
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    shares = {f"{tmp_path}/photos_fine_tuned_{share}_percent" for share in (10, 50)}
    assert json.loads(printed[printed.index("{") :]).keys() == metrics.keys() | shares


def test_pictures_without_classes_train_an_encoder_all_the_same(
    tmp_path: Path, encoded: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(8):
        (tmp_path / "photos" / f"{index}.jpg").write_bytes(encoded(index))
    data = (f"{tmp_path}/photos", "scenes")
    folder = discover()["byol"].train(_options("byol", tmp_path, data=data, evaluate=True))
    assert set(load_checkpoint(folder).provenance["metrics"]) == {"scenes_colour_linear", "scenes_shape_linear"}
    assert "has no classes" in caplog.text


def test_an_image_encoder_is_judged_by_what_has_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EncoderModel(image={"name": "conv", "image_size": 32, "channels": 32, "blocks": [1, 1], "depth": 0}).eval()
    figures = evaluate_model(model, ["scenes"])
    assert set(figures) == {"scenes_colour_linear", "scenes_shape_linear"}
    assert figures["scenes_colour_linear"] > 0.2  # guessing is 0.1, and colours show through random weights


def test_baselines_are_the_untrained_network_and_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = EncoderModel(image={"name": "conv", "image_size": 16, **SMALL}).eval()
    folder = save_checkpoint(model, tmp_path / "model")
    assert main(["evaluate", str(folder), "--baselines", "--seed", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    own = {name: value for name, value in figures.items() if name.startswith("scenes_")}
    # The model here is itself untrained, so that its baseline of the same seed is its equal.
    assert own
    assert {name.removeprefix("untrained_"): value for name, value in figures.items() if "untrained" in name} == own
    assert figures.keys() == {f"{whose}{name}" for whose in ("", "untrained_", "pixels_") for name in own}
    assert figures["pixels_scenes_colour_linear"] > 0.2  # guessing is 0.1
    with pytest.raises(DataError, match="leave --baselines out"):
        baseline_figures(tiny_clip(), ["scenes"])


def test_pixels_are_averaged_to_a_side_that_a_probe_can_fit() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pixels = RawPixels(Preprocess(size=64)).encode_image(images).view(2, 3, 32, 32)
    expected = Preprocess(size=64).normalize(images)[:, :, :2, :2].mean((2, 3))
    expected = (
        expected
        / pixels.new_tensor(
            [Preprocess(size=64).normalize(image[None]).view(3, 32, 2, 32, 2).mean((2, 4)).norm() for image in images]
        )[:, None]
    )
    assert torch.allclose(pixels[:, :, 0, 0], expected, atol=1e-6)


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    train = discover()["byol"].train
    one, two, other = (
        load_checkpoint(train(_options("byol", tmp_path / name, trainer=replace(TRAINER, seed=seed)))).state_dict()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


class _Flat(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images.flatten(1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_shuffled_keys_compile_and_come_back_in_order() -> None:
    """The permutation has ended torch's compiler with an error once, in a pass that only the real backend has."""
    method = view_method("moco")
    method.target = _Flat()  # the network takes half a minute to compile and has no part in it
    method.requires_grad_(False)
    images = torch.randn(16, 3, 4, 4)
    expected = nn.functional.normalize(images.flatten(1), dim=-1)
    assert torch.allclose(torch.compile(method._key)(images), expected, atol=1e-6)
