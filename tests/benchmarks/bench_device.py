"""What one GPU does, beside what its memory and its matrix units can: `make bench-device`, on a machine that has one.

Prints rates and shares; nothing here passes or fails. Needs torch and torchvision alone (and open_clip for `clip`).
Names of parts as arguments run these; `--seconds` is how long each training is watched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from app.backends import torch_tower
from models.checkpoint import load_checkpoint
from models.dalle import DALLETransformer
from models.generation import Sampling, TokenReader, generate_ids
from models.torchvision import load_torchvision
from models.vision import EncoderModel
from training.data import ArraySource, PictureBatches
from training.methods.byol import BYOLMethod, BYOLTransform
from training.methods.simclr import SimCLRLoss, SimCLRMethod, SimCLRModel, SimCLRTransform
from training.pretraining import CIFAR10_GPU, ViewMethod
from training.trainer import Trainer, TrainerConfig
from training.views import SIMCLR, ViewTransform

DEVICE = torch.device("cuda")


def seconds_of(work: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds on the device, after three rounds to warm up."""
    for _ in range(3):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1000


@contextmanager
def part(name: str) -> Iterator[None]:
    """Says how long a part took with everything, compilation included; one that fails leaves the others alone."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[-1500:]}", flush=True)
    print(f"[{name}: {time.perf_counter() - start:.0f} s in all]", flush=True)


class Ceilings:
    """What the device does at most, measured: bytes a second copied (read and written) and bf16 operations a second."""

    def __init__(self) -> None:
        source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.operations = 2 * 8192**3 / seconds_of(lambda: a @ b)
        rates = f"{self.bandwidth / 1e12:.2f} TB/s, {self.operations / 1e12:.0f} TFLOP/s"
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rates}")


def training(name: str, method: ViewMethod, ceilings: Ceilings, seconds: float) -> None:
    """Pictures a second of the trainer as users run it, with its data, views, logs and optimizer."""
    config: TrainerConfig = CIFAR10_GPU["trainer"]
    batch_size = int(CIFAR10_GPU["batch_size"])
    source = ArraySource("random", torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8))
    batches = PictureBatches([source], [1.0], size=32, batch_size=batch_size, chunk=batch_size, steps=config.steps)
    settings = {**vars(config), "time_limit": seconds, "log_every": 100}
    with TemporaryDirectory() as folder:
        Trainer(method, batches, TrainerConfig(**settings), Path(folder)).fit()
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    rate = statistics.median(rates[len(rates) // 3 :])
    step = batch_size / rate

    def one_step() -> None:
        batch = method.prepare({"images": source.images[:batch_size].to(DEVICE)})
        with torch.autocast("cuda", torch.bfloat16):
            loss = method(batch)["loss"]
        loss.backward()

    with FlopCounterMode(display=False) as counted:
        one_step()
    operations = counted.get_total_flops() / batch_size
    print(
        f"{name}, ResNet-18, 32 px, batch {batch_size}: {rate:,.0f} pictures/s (median of {len(rates)} log lines; "
        f"{min(rates):,.0f} to {max(rates):,.0f}), {1000 * step:.1f} ms a step, an epoch of 50,000 in "
        f"{50_000 / rate:.2f} s; {operations / 1e9:.2f} GFLOP a picture, {operations * rate / 1e12:.0f} TFLOP/s, "
        f"{operations * rate / ceilings.operations:.0%} of the matrix units"
    )


def step_profile(method: ViewMethod, batch_size: int = 512) -> None:
    """Where a step's time on the device goes, by kind of kernel, and how much of the time the device works. method: as
    `training` left it, for what was compiled there serves here."""
    method.train()
    compiled = torch.compile(method)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=DEVICE)

    def step() -> None:
        batch = method.prepare({"images": images})
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def views() -> Tensor:
        return method.prepare({"images": images})["views"]

    whole, alone = seconds_of(step), seconds_of(views)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    shares: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total / 1e6
        if event.device_type.name == "CUDA" and spent:
            shares[event.key] = shares.get(event.key, 0.0) + spent
    busy = sum(shares.values())
    kinds = {"convolutions and products": 0.0, "compiled sweeps": 0.0, "copies": 0.0, "other": 0.0}
    for key, spent in shares.items():
        low = key.lower()
        if any(word in low for word in ("conv", "gemm", "xmma", "cutlass", "wgrad", "dgrad", "fprop", "nvjet")):
            kinds["convolutions and products"] += spent
        elif low.startswith("triton"):
            kinds["compiled sweeps"] += spent
        else:
            kinds["copies" if "mem" in low else "other"] += spent
    print(
        f"one step alone {1000 * whole:.1f} ms, of which views {1000 * alone:.1f}; under the profiler the device works "
        f"{busy / wall:.0%} of {100 * wall:.1f} ms: "
        + ", ".join(f"{name} {spent / busy:.0%}" for name, spent in kinds.items())
    )
    for key, spent in sorted(shares.items(), key=lambda each: -each[1])[:8]:
        print(f"    {spent / busy:.1%}  {key[:110]}")


def simclr(ceilings: Ceilings, seconds: float) -> None:
    """SimCLR and its profile."""
    model = EncoderModel(image={"name": "resnet18", "image_size": 32})
    method = SimCLRMethod(SimCLRModel(model, hidden_dim=512), SimCLRTransform(32, compile=True), SimCLRLoss(0.2))
    training("SimCLR", method, ceilings, seconds)
    step_profile(method)


def byol(ceilings: Ceilings, seconds: float) -> None:
    """BYOL."""
    model = EncoderModel(image={"name": "resnet18", "image_size": 32})
    training("BYOL", BYOLMethod(model, BYOLTransform(32, compile=True), hidden_dim=1024), ceilings, seconds)


def views(ceilings: Ceilings, seconds: float) -> None:
    """512 views at 224 pixels with blur, of pictures of 256."""
    images = torch.randint(0, 256, (512, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    written = 512 * 3 * (256**2 + 4 * 224**2)
    for compile in (False, True):
        transform = ViewTransform(224, (SIMCLR,), compile=compile)
        spent = seconds_of(lambda transform=transform: transform(images))
        floor = written / ceilings.bandwidth
        print(
            f"512 views, 224 px with blur, {'compiled' if compile else 'eager'}: {1000 * spent:.2f} ms; reading the "
            f"pictures and writing the views once takes {1000 * floor:.2f}"
        )


class _FixedTexts(DALLETransformer):
    """Draws for texts that are tokens already."""

    def tokens_of(self, texts: object, styles: object = None) -> Tensor:
        assert isinstance(texts, list)
        return torch.randint(3, 4096, (len(texts), self.text_length), generator=torch.Generator().manual_seed(0))


def generation(ceilings: Ceilings, seconds: float) -> None:
    """A model of 110 million parameters, 576 tokens, guidance, bfloat16; one picture and sixteen at a time."""
    image = {"image_size": 384, "quantizer": {"name": "fsq", "levels": [8, 8, 8, 8]}, "channels": [64, 64, 128, 128]}
    model = _FixedTexts(
        image=image | {"blocks": [0, 0, 0, 2]}, vocab_size=8192, text_length=64, width=768, depth=12, heads=12
    )
    model = model.eval().to(DEVICE).cast(torch.bfloat16)  # type: ignore[assignment]
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("dvae"))
    read = sum(p.numel() for each in (model.blocks, model.norm, model.image_head) for p in each.parameters())  # type: ignore[union-attr]
    for count in (1, 16):
        reader = TokenReader(model, 2 * count)

        def drawn(count: int = count, reader: TokenReader = reader) -> Tensor:
            steps = generate_ids(model, [""] * count, range(count), Sampling(guidance_scale=3.0), reader=reader)
            return model.dvae.decode(torch.stack(list(steps), 1).view(count, model.grid, model.grid))

        with ThreadPoolExecutor(1) as others:  # a server draws in another thread than it loads in
            drawn()
            others.submit(drawn).result()
        spent = seconds_of(drawn, rounds=3)
        # Every step reads the weights and the whole cache, which is looked at in full.
        bytes_read = 2 * (read + reader.cache.keys.numel() + reader.cache.values.numel()) * model.image_length
        print(
            f"{weights:,} parameters, {model.image_length} tokens, guidance, {count} at a time: {spent / count:.3f} s "
            f"a picture with its decoding, {count * model.image_length / spent:,.0f} tokens/s, "
            f"{bytes_read / spent / ceilings.bandwidth:.0%} of what the memory could feed"
        )


def clip(ceilings: Ceilings, seconds: float) -> None:
    """OpenCLIP's ViT-B/32 in bfloat16: decoded pictures, then JPEGs of a megapixel."""
    load_torchvision()
    import open_clip

    model = open_clip.create_model("ViT-B-32").visual.eval().to(DEVICE, torch.bfloat16)
    for count in (256, 1024):
        pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=DEVICE)

        def encode(pixels: Tensor = pixels, network: torch.nn.Module = model) -> Tensor:
            return network(pixels.to(torch.bfloat16) / 127.5 - 1)

        with torch.inference_mode():
            with FlopCounterMode(display=False) as counted:
                encode(pixels[:8])
            operations = counted.get_total_flops() / 8
            eager = seconds_of(encode)
            compiled = torch.compile(model)
            fast = seconds_of(lambda pixels=pixels, compiled=compiled: encode(pixels, compiled))
        rate = count / fast
        print(
            f"ViT-B/32, bf16, {count} decoded pictures at a time: {count / eager:,.0f}/s, compiled {rate:,.0f}/s, "
            f"{operations * rate / ceilings.operations:.0%} of the matrix units"
        )


def jpegs(ceilings: Ceilings, seconds: float) -> None:
    """JPEGs of a megapixel through nvJPEG to the embeddings of ViT-B/32, beside the decoding alone."""
    load_torchvision()
    import open_clip
    from torchvision.io import decode_jpeg, encode_jpeg

    model = open_clip.create_model("ViT-B-32").visual.eval().to(DEVICE, torch.bfloat16)
    rough = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8).float()
    smooth = F.interpolate(rough, (1024, 1024), mode="bicubic").clamp(0, 255).byte()
    files = [encode_jpeg(each, quality=90) for each in smooth]

    def decoded() -> list[Tensor]:
        return decode_jpeg(files, device=DEVICE)  # type: ignore[no-any-return]

    def embedded() -> Tensor:
        pixels = torch.stack(decoded()).to(torch.bfloat16)
        small = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
        return model(small / 127.5 - 1)  # type: ignore[no-any-return]

    with torch.inference_mode():
        alone, whole = seconds_of(decoded, rounds=5), seconds_of(embedded, rounds=5)
    kilobytes = sum(len(each) for each in files) / len(files) / 1000
    print(
        f"JPEGs of 1024 x 1024 ({kilobytes:.0f} kB), 128 at a time, by nvJPEG: decoded {128 / alone:,.0f}/s, embedded "
        f"by ViT-B/32 {128 / whole:,.0f}/s, {alone / whole:.0%} of what decoding allows"
    )


def graphs(ceilings: Ceilings, seconds: float) -> None:
    """The demo's CLIP as the server runs it: seconds of a batch, eager and as CUDA graphs, and whether they agree."""
    model = load_checkpoint(Path(__file__).parents[2] / "checkpoints/demo/clip").to(DEVICE).eval()
    words = ["a red star above a blue circle on a striped gray background", "an apple", "a noto emoji of a green frog"]
    for tower in ("image", "text"):
        eager, graphed = (torch_tower(name, model, tower, DEVICE) for name in ("torch-bf16", "torch-graphs"))
        line = []
        for count in (1, 3, 8, 32):
            size = model.preprocess.size
            pictures = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
            batch = pictures if tower == "image" else model.tokenizer((words * count)[:count])
            cosines = (torch.from_numpy(eager(batch)) * torch.from_numpy(graphed(batch))).sum(1)
            slow, fast = (seconds_of(lambda encode=encode, batch=batch: encode(batch)) for encode in (eager, graphed))
            line.append(f"{count}: {1000 * slow:.2f} and {1000 * fast:.2f} (cosine {float(cosines.min()):.5f})")
        print(f"demo CLIP, {tower}, ms of a batch with its copies, eager and as graphs, " + "; ".join(line))


PARTS: dict[str, Callable[[Ceilings, float], None]] = {
    "views": views,
    "simclr": simclr,
    "byol": byol,
    "clip": clip,
    "jpegs": jpegs,
    "graphs": graphs,
    "generation": generation,
}


def main() -> None:
    """The parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="(default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each training, compilation included")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_device.py needs a GPU, and torch sees none")
    torch.manual_seed(0)
    ceilings = Ceilings()
    for name in arguments.parts or PARTS:
        with part(name):
            PARTS[name](ceilings, arguments.seconds)


if __name__ == "__main__":
    main()
