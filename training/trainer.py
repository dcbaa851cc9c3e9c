"""The only training loop: precision, accumulation, clipping, EMA, distributed, resume, progress and logs."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from models.errors import CheckpointError, DivergedError
from training.data import batches_from
from training.distributed import process_group, rank, world_size
from training.ema import update_ema
from training.memory import memory_kept
from training.method import Batch, Method, check_bounds, option
from training.optim import Moments, build_optimizer, warmup_cosine
from training.progress import Journal, health
from training.sharding import average_whole, clip_gradients, gathered, shard
from training.state import facts_of, find_state, has_state, load_tensors, save_state, tensors_in

Evaluate = Callable[[nn.Module], dict[str, float]]
_TOLD_SINCE = ("pictures", "vocabulary")  # what the states of earlier versions do not tell of their runs


@dataclass(frozen=True)
class TrainerConfig:
    """How to train. Sizes count pictures of all processes together."""

    steps: int = option(1000, "optimizer steps", least=0)
    lr: float = option(1e-3, "peak learning rate", least=0)
    weight_decay: float = option(0.1, "decay of weights (not of norms, biases and scales)", least=0)
    warmup: int = option(100, "steps of linear warm-up; half a cosine follows", least=0)
    optimizer: Literal["adamw", "lars", "sgd"] = option("adamw", "adamw, lars or sgd")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto (bf16 where the device has it in hardware, else fp32), fp32, bf16 or fp16"
    )
    accumulate: int = option(1, "batches whose gradients make one step", least=1)
    clip_norm: float = option(1.0, "largest norm of the gradient, 0 for any", least=0)
    ema_decay: float = option(
        0.0, "decay of the averaged weights that are evaluated and exported, 0 for none", least=0, below=1
    )
    compile: bool = option(False, "compile the method with torch.compile")
    shard: bool = option(
        False, "of several processes, each keeps a share of weights, gradients and optimizer state (FSDP2)"
    )
    patience: float = option(600.0, "seconds after which a process that waits for others gives up", above=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    seed: int = option(0, "of everything that is drawn", least=0)
    workers: int = option(0, "processes that prepare batches", least=0)
    threads: int = option(0, "of torch on the CPU, 0 for its own choice", least=0)
    log_every: int = option(20, "steps between log lines", least=0)
    save_every: int = option(500, "steps between saved states, 0 for the end only", least=0)
    evaluate_every: int = option(0, "steps between evaluations, 0 for the end only", least=0)
    time_limit: float = option(
        0.0, "seconds after which the run ends, its schedule with it (the rate follows the clock); 0 for none", least=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class Trainer:
    """Trains a Method on `data`, whose item `step` is that step's batch on this rank.

    run: folder of this run's logs (log.jsonl, tensorboard/) and resume state (state/), on a disk that all processes
    see. A run that finds its state goes on from there: with as many processes to weights bit-identical to those of a
    run that was never stopped, with more or fewer on other random numbers.
    """

    method: Method
    data: Dataset[Batch]
    config: TrainerConfig
    run: Path
    evaluate: Evaluate | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def fit(self) -> nn.Module:
        """Train to the end and return `method.export()` (of the averaged weights, with EMA).

        Raises DivergedError when the loss is not finite. Ctrl-C saves the state before it goes on.
        """
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # every step has the same shapes
        with process_group(self.device, config.patience), memory_kept(self.device):
            self._prepare()
            journal = Journal(self.run, config.steps, enabled=rank() == 0)
            try:
                with self._finishing_steps():
                    self._loop(journal)
            finally:
                journal.close()
                del self.model  # what wraps the method holds the process group
            self.save()
            if self._interrupted:
                raise KeyboardInterrupt
            return self._exported().eval()

    def _exported(self) -> nn.Module:
        """What is kept of the averaged method; put together on every process, if each has a share."""
        kept = self.averaged().export()
        return kept if self._skeleton is None else gathered(self._skeleton, kept)

    @contextmanager
    def _finishing_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after its current step, for half a one cannot be resumed; a second kills."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            signal.signal(number, before[signal.Signals(number)])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _agreed_to_stop(self) -> bool:
        """Whether this run was interrupted; ranks ask each other now and then, for all must stop at the same step."""
        if world_size() == 1:
            return self._interrupted
        if self.step % max(1, self.config.log_every):
            return False
        flag = torch.tensor(int(self._interrupted), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self._interrupted = bool(flag)
        return self._interrupted

    def averaged(self) -> Method:
        """The method with the weights that are evaluated and exported."""
        return self.method if self.ema is None else self.ema

    def _prepare(self) -> None:
        config = self.config
        if config.time_limit and world_size() > 1:
            raise ValueError("--time-limit needs a single process: clocks of several disagree about the last step")
        torch.manual_seed(config.seed * 1000 + rank())
        # There is no synchronised batch norm on the CPU.
        if world_size() > 1 and self.device.type == "cuda" and self.method.sync_batch_norm:
            self.method = nn.SyncBatchNorm.convert_sync_batchnorm(self.method)
        self.method.to(self.device)
        sharded = config.shard and world_size() > 1
        if not sharded:  # shares have to lie in the order of their dimensions
            # Channels last is the layout that convolutions are fastest in, on CPUs and on tensor cores alike.
            self.method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if sharded and (config.compile or config.precision == "fp16"):
            raise ValueError("--shard goes with neither --compile nor --precision fp16: leave one of them out")
        self._skeleton = deepcopy(self.method.export()).cpu() if sharded else None
        self.ema = deepcopy(self.method).requires_grad_(False) if config.ema_decay else None
        if sharded:
            for method in filter(None, (self.method, self.ema)):
                shard(method, self.device)
        self.optimizer = build_optimizer(self.method, config.optimizer, config.lr, config.weight_decay)
        self.precision = choose_precision(config.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.step, self.spent, self._interrupted = 0, 0.0, False
        self._outputs: dict[str, Tensor] = {}  # of the last step
        self._saved = -1  # the step of the last saved state
        self.load()
        self.model: nn.Module = torch.compile(self.method) if config.compile else self.method  # type: ignore[assignment]
        if world_size() > 1 and not sharded:
            self.model = DistributedDataParallel(self.model)

    def _loop(self, journal: Journal) -> None:
        config = self.config
        start, before = time.monotonic(), self.spent
        batches = batches_from(self.data, self.step * config.accumulate, config.workers)
        self.method.train()
        while self.step < config.steps and not self._out_of_time():
            self._step([next(batches) for _ in range(config.accumulate)])
            self.step += 1
            self.spent = before + time.monotonic() - start
            last = self.step == config.steps or self._out_of_time()
            if last or (config.log_every and self.step % config.log_every == 0):
                self._log(journal)
            if self.evaluate and (last or (config.evaluate_every and self.step % config.evaluate_every == 0)):
                self._evaluate(journal)
            if config.save_every and self.step % config.save_every == 0:
                self.save()
            if not last and self._agreed_to_stop():
                return

    def _step(self, batches: list[Batch]) -> None:
        config = self.config
        factor = warmup_cosine(self._schedule_step(), config.steps, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        outputs: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            self._rows = len(next(iter(batch.values()))) * len(batches) * world_size()
            # Gradients cross between ranks once a step, after the last of the accumulated batches.
            with self._gradients_apart() if index < len(batches) - 1 else nullcontext():
                batch = self.method.prepare(batch)  # pixels keep their precision
                with self.autocast():
                    outputs = self.model(batch)
                self.scaler.scale(outputs["loss"] / len(batches)).backward()
        self.scaler.unscale_(self.optimizer)
        if self._skeleton is not None:
            average_whole(self.method.parameters())
        norm = clip_gradients(self.method.parameters(), config.clip_norm or math.inf)
        self._outputs = {name: value.detach() for name, value in outputs.items()} | {"grad_norm": norm.detach()}
        if self.device.type == "cpu":
            self._check()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(min(1.0, self._schedule_step() / max(1, config.steps)))
        if self.ema is not None:
            update_ema(self.ema, self.method, min(config.ema_decay, (1 + self.step) / (10 + self.step)))

    @contextmanager
    def _gradients_apart(self) -> Iterator[None]:
        """What is done here leaves each process its own gradients, to be added to."""
        if isinstance(self.model, DistributedDataParallel):
            with self.model.no_sync():
                yield
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
        else:
            yield

    def _schedule_step(self) -> int:
        if not self.config.time_limit:
            return self.step
        return max(self.step, int(self.config.steps * self.spent / self.config.time_limit))

    def _out_of_time(self) -> bool:
        return bool(self.config.time_limit) and self.spent >= self.config.time_limit

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes run in."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _check(self) -> None:
        """Whether the last step's loss and gradient are finite.

        To look at them the host must wait for the device, which then waits for the host; so where these are two, it is
        done for each log line and each saved state. What is not finite once stays so, for it is in the weights.
        """
        loss = float(self._outputs["loss"])
        # In half precision the scaler lets such steps pass, and takes smaller ones.
        gradient_ok = self.precision == torch.float16 or math.isfinite(float(self._outputs["grad_norm"]))
        if not (math.isfinite(loss) and gradient_ok):
            kept = f"; the last good state is in {self.run / 'state'}" if has_state(self.run) else ""
            raise DivergedError(
                f"step {self.step}: the loss is {loss} or its gradient is not finite{kept}. "
                "Lower --lr, lengthen --warmup or use --precision fp32."
            )

    def _log(self, journal: Journal) -> None:
        self._check()
        values = {name: float(value) for name, value in self._outputs.items() if value.ndim == 0}
        if "embeddings" in self._outputs:
            values |= health(self._outputs["embeddings"])
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        journal.log(self.step, values, rows=self._rows, alert=self._alert(values))

    def _alert(self, values: dict[str, float]) -> str | None:
        chance = values.get("chance_loss")
        if chance is not None and self.step > 10 * self.config.warmup and values["loss"] > 0.98 * chance:
            return "the loss sits at that of guessing: check captions, augmentation and learning rate"
        return None

    def _evaluate(self, journal: Journal) -> None:
        self.averaged().eval()
        model = self._exported().eval()
        if rank() == 0 and self.evaluate is not None:
            with torch.inference_mode():
                journal.evaluation(self.step, self.evaluate(model))
        self.method.train()
        if world_size() > 1:
            dist.barrier()

    def save(self) -> None:
        """Write all that the rest of the run depends on, atomically. Every rank keeps its own random state.

        Raises DivergedError, and leaves what was saved before, if the loss is not finite.
        """
        if self._outputs:
            self._check()
        if self.step == self._saved:
            return
        facts = {
            "exported": self.method.exported,
            "spent": self.spent,
            "scaler": self.scaler.state_dict(),
            "config": self._identity(),
        }
        moments = Moments(self.method, self.optimizer).tensors()
        save_state(self.run, self.step, self._weights() | moments | self._random_states(), facts)
        self._saved = self.step

    def load(self) -> None:
        """Go on from the saved state, if there is one; refuses one of a run with other settings, by their names."""
        state = find_state(self.run)
        if state is None:
            return
        facts, kept = facts_of(state), tensors_in(state)
        mine, theirs = json.loads(json.dumps(self._identity())), facts["config"]
        theirs = {key: mine[key] for key in _TOLD_SINCE if key in mine} | theirs
        if changed := sorted(key for key in mine if mine[key] != theirs.get(key)):
            raise CheckpointError(
                f"{self.run} is of a run with other {', '.join(changed)}: give the same options and data to go on, "
                "or another --run-dir to begin anew"
            )
        moments = Moments(self.method, self.optimizer)
        places = moments.places(kept)
        random = {name: tensor for name, tensor in self._random_states().items() if name in kept}
        load_tensors(state, self._weights() | places | random)
        moments.load(places)
        self.scaler.load_state_dict(facts["scaler"])
        self.step, self.spent = facts["step"], facts["spent"]
        for name, tensor in random.items():
            if name.startswith("cuda_rng"):
                torch.cuda.set_rng_state(tensor, self.device)
            else:
                torch.set_rng_state(tensor)
        self._saved = self.step

    def _weights(self) -> dict[str, Tensor]:
        """Weights and buffers of the method and its average, by names in the saved state."""
        parts = {"method": self.method.state_dict()}
        if self.ema is not None:
            parts["ema"] = self.ema.state_dict()
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _random_states(self) -> dict[str, Tensor]:
        states = {f"rng/{rank()}": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"cuda_rng/{rank()}"] = torch.cuda.get_rng_state(self.device)
        return states

    def _identity(self) -> dict[str, Any]:
        free = (
            "log_every",
            "save_every",
            "evaluate_every",
            "workers",
            "threads",
            "device",
            "compile",
            "shard",
            "patience",
        )
        return {k: v for k, v in (asdict(self.config) | self.extra).items() if k not in free}


def choose_device(name: str = "auto") -> torch.device:
    """ "auto": this process's CUDA device if there is one, else the CPU."""
    if name != "auto":
        try:
            torch.empty(0, device=name)  # a name that torch knows, of a device that is there
        except (RuntimeError, AssertionError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"--device {name}: {why}; choose auto, cpu, cuda or cuda:<number>") from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of forward passes. CPUs without bfloat16 units emulate it, 10 to 500 times slower: float32 there."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    choices = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in choices:
        raise ValueError(f"unknown precision {name!r}; choose one of auto, {', '.join(choices)}")
    return choices[name]


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
