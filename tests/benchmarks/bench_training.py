"""Augmentation and training step beside lightly's and torchvision's, in one run: `make bench-training`.

Prints seconds and ratios; nothing here passes or fails. Both sides take turns, and the median of their turns counts, so
that a slow minute of the machine falls on both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.torchvision import load_torchvision
from models.vision import EncoderModel
from training.memory import memory_kept
from training.methods.simclr import SimCLRLoss, SimCLRMethod, SimCLRModel, SimCLRTransform
from training.trainer import choose_precision
from training.views import SIMCLR, ViewTransform

load_torchvision()
from lightly.loss import NTXentLoss  # noqa: E402
from lightly.models.modules import SimCLRProjectionHead  # noqa: E402
from lightly.transforms import SimCLRTransform as LightlyTransform  # noqa: E402
from torchvision.models import resnet18  # noqa: E402
from torchvision.transforms import v2  # noqa: E402


def taking_turns(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each, after one turn to warm up."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        for place, work in enumerate(works):
            start = time.perf_counter()
            work()
            if turn:
                seconds[place].append(time.perf_counter() - start)
    return [statistics.median(each) for each in seconds]


def augmentation(side: int, count: int, *, compile: bool) -> None:
    """Pairs of views a second of one thread: lightly's transform over PIL pictures, ours over a batch."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side // 4, side // 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in pixels]
    batch = torch.stack([torch.from_numpy(np.array(each).transpose(2, 0, 1)) for each in pictures])
    recipe = {"blur": 0.0, "jitter": 0.5} if side <= 64 else {"blur": 0.5, "jitter": 1.0}
    theirs = LightlyTransform(input_size=side, gaussian_blur=recipe["blur"], cj_strength=recipe["jitter"])
    ours = SimCLRTransform(side, compile=compile)
    slow, fast = taking_turns(3, lambda: [theirs(each) for each in pictures], lambda: ours(batch))
    how = "compiled" if compile else "eager"
    print(
        f"{side} px, {how}: lightly {2 * count / slow:,.0f} views/s, ours {2 * count / fast:,.0f}, {slow / fast:.1f} x"
    )


def beside_torchvision(count: int = 32) -> None:
    """224 px with blur, one thread: torchvision's transforms picture by picture, as a loader's worker runs them."""
    batch = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    recipe = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=SIMCLR.crop, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    pictures = [v2.functional.to_pil_image(each) for each in batch]
    to_image = v2.ToImage()
    eager, compiled = (ViewTransform(224, (SIMCLR,), compile=compile) for compile in (False, True))
    slow, tensors, fast, faster = taking_turns(
        3,
        lambda: [to_image(recipe(each)) for each in pictures],
        lambda: [recipe(each) for each in batch],
        lambda: eager(batch),
        lambda: compiled(batch),
    )
    best = min(slow, tensors)
    print(
        f"224 px with blur: torchvision {count / slow:,.0f} views/s on PIL and {count / tensors:,.0f} on tensors, ours "
        f"{count / fast:,.0f}, {best / fast:.2f} x the faster; compiled {count / faster:,.0f}, {best / faster:.2f} x"
    )


def step(batch_size: int) -> None:
    """Forward, loss, backward and update of ResNet-18 for 32 px, without augmentation, on the threads torch has; four
    steps a turn, ours with memory kept as our trainer keeps it."""
    views = torch.randn(2, batch_size, 3, 32, 32)
    backbone = resnet18()
    backbone.conv1, backbone.maxpool, backbone.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    head, criterion = SimCLRProjectionHead(512, 512, 128), NTXentLoss(temperature=0.5)
    theirs = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.06, momentum=0.9)

    def lightly_step() -> None:
        loss = criterion(head(backbone(views[0])), head(backbone(views[1])))
        theirs.zero_grad()
        loss.backward()
        theirs.step()

    model = EncoderModel(image={"name": "resnet18", "image_size": 32})
    method = SimCLRMethod(SimCLRModel(model, hidden_dim=512), SimCLRTransform(32), SimCLRLoss(0.5))
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(method.parameters(), 0.06, momentum=0.9)
    precision = choose_precision("auto", torch.device("cpu"))

    def our_step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = method({"views": views})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def four(step: Callable[[], None]) -> None:
        for _ in range(4):
            step()

    def our_turn() -> None:
        with memory_kept(torch.device("cpu")):
            four(our_step)

    slow, fast = taking_turns(3, lambda: four(lightly_step), our_turn)
    rates = f"lightly {4 * batch_size / slow:,.0f} pictures/s, ours {4 * batch_size / fast:,.0f}"
    print(f"step of {batch_size}, {torch.get_num_threads()} threads, {precision}: {rates}, {slow / fast:.2f} x")


def main() -> None:
    """Every comparison; augmentation on one thread, as rates there are per processor-second, with memory kept for all
    sides as our trainer keeps it (PIL takes no large blocks)."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with memory_kept(torch.device("cpu")):
        for side in (32, 64):
            for compile in (False, True):
                augmentation(side, 512, compile=compile)
        beside_torchvision()
    torch.set_num_threads(threads)
    for batch_size in (64, 256):
        step(batch_size)


if __name__ == "__main__":
    main()
