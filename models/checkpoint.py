"""Checkpoint folders: config.json + model.safetensors + tokenizer.json (where there is text) + README.md (model card).

config.json holds {format, architecture, config, preprocess, context_length?, files, provenance}. Loading runs no code:
the architecture is a name from ARCHITECTURES, weights are safetensors, every file's SHA-256 is checked, unknown keys
are refused by name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from models.errors import CheckpointError
from models.files import sync
from models.preprocess import Preprocess
from models.tokenizers import TextTokenizer

FORMAT = 1
ARCHITECTURES = {
    "clip": "models.clip:CLIPModel",
    "encoder": "models.vision:EncoderModel",
    "dvae": "models.dvae:DiscreteVAE",
    "dalle": "models.dalle:DALLETransformer",
}
_KEYS = {"format", "architecture", "config", "preprocess", "context_length", "files", "provenance"}
_PROVENANCE = ("data", "license", "command", "commit", "seed", "hardware", "metrics")
HUB_PREFIXES = ("open_clip:", "hf-hub:")


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model of `models` to a folder, atomically: a reader sees the old folder or the new one, whole.

    provenance: {data, license, command, commit, seed, hardware, metrics}; metrics end up in the model card.
    card: text for the card before the figures. dtype: in which floating weights are stored (float16 halves the file).
    Raises CheckpointError, as check_target does, where something else than a checkpoint lies there.
    """
    target = Path(folder)
    check_target(target)
    architecture = getattr(model, "architecture", None)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{type(model).__name__} is no architecture of this format; known: {_known()}")
    record = dict(provenance if provenance is not None else getattr(model, "provenance", {}))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tensors = {name: _stored(tensor, dtype) for name, tensor in model.state_dict().items()}
        (staging / "model.safetensors").write_bytes(save_tensors(tensors))
        config: dict[str, Any] = {
            "format": FORMAT,
            "architecture": architecture,
            "config": model.config,
            "preprocess": _preprocess(model).to_config(),
        }
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            (staging / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
            config["context_length"] = tokenizer.context_length
        config["files"] = {file.name: _sha256(file.read_bytes()) for file in sorted(staging.iterdir())}
        config["provenance"] = record
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_card(target.name, architecture, model, record, card), encoding="utf-8")
        _publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def check_target(folder: str | Path) -> None:
    """Whether a checkpoint may be written there: in place of nothing, of an empty folder or of another checkpoint.

    Raises CheckpointError for anything else, for what is replaced is deleted: pictures, say, named by mistake.
    """
    target = Path(folder)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        config = json.loads((target / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not {"architecture", "files"} <= config.keys():
        raise CheckpointError(
            f"{target} is there and is no checkpoint folder: name another folder for the checkpoint, or move this away"
        )


def load_checkpoint(folder: str | Path) -> Any:
    """Load a checkpoint folder; the model comes back in eval mode, in float32, on the CPU.

    It carries `preprocess`, `tokenizer` (or None), `provenance`, `stored_dtype` and `fingerprint`, a hash of all that
    decides its embeddings. Raises CheckpointError, which names the file and the way out, for anything missing, damaged
    or newer.
    """
    folder = Path(folder)
    config = _read_config(folder)
    contents = {name: _read_verified(folder / name, digest) for name, digest in config["files"].items()}
    architecture = config["architecture"]
    module, _, name = ARCHITECTURES[architecture].partition(":")
    try:
        tensors: dict[str, Tensor] = load_tensors(contents["model.safetensors"])
        model = getattr(importlib.import_module(module), name)(**config["config"])
        model.load_state_dict({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()})
        model.preprocess = Preprocess.from_config(config["preprocess"])
    except (SafetensorError, TypeError, ValueError, RuntimeError, KeyError) as error:
        # load_state_dict and the constructors name the offending key.
        raise CheckpointError(
            f"{folder}: the weights or options do not fit architecture {architecture!r}: {error}. "
            "The folder was changed by hand or damaged; copy it again or train it again."
        ) from error
    if "tokenizer.json" in contents:
        model.tokenizer = TextTokenizer.load(folder / "tokenizer.json", config["context_length"])
    model.provenance = config["provenance"]
    model.stored_dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    model.fingerprint = fingerprint({key: config[key] for key in ("architecture", "config", "preprocess", "files")})
    return model.eval()


def load_model(reference: str | Path) -> Any:
    """A model by what an operator writes: a checkpoint folder, "open_clip:<arch>/<tag or file>", "hf-hub:<repo>", or a
    local OpenCLIP folder (with open_clip_config.json). Raises CheckpointError with the way out."""
    text = str(reference)
    if text.startswith(HUB_PREFIXES) or (Path(text) / "open_clip_config.json").is_file():
        from models.open_clip import load_open_clip

        return load_open_clip(text)
    return load_checkpoint(text)


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON-ready value."""
    return _sha256(json.dumps(value, sort_keys=True).encode())[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a checkpoint folder, as training wrote it")
    if not file.is_file():
        others = [path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]
        hint = f" ({', '.join(others[:3])} would have to be unpickled, which can run code)" if others else ""
        raise CheckpointError(f"{file} is missing: only safetensors checkpoint folders are read{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore it from where it was trained") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CheckpointError(f"{file} has no format number: it is not a checkpoint of this project")
    if config["format"] > FORMAT:
        raise CheckpointError(f"{file} is of format {config['format']}, this version reads up to {FORMAT}: upgrade it")
    if unknown := sorted(set(config) - _KEYS):
        raise CheckpointError(f"{file} holds unknown keys: {', '.join(unknown)}; remove them or upgrade")
    if missing := sorted(_KEYS - {"context_length"} - set(config)):
        raise CheckpointError(f"{file} lacks the keys {', '.join(missing)}; restore it from where it was trained")
    if config["architecture"] not in ARCHITECTURES:
        raise CheckpointError(f"{file} names architecture {config['architecture']!r}; known: {_known()}")
    files = config["files"]
    if not isinstance(files, dict) or not set(files) <= {"model.safetensors", "tokenizer.json"} or not files:
        raise CheckpointError(f"{file} lists other files than model.safetensors and tokenizer.json; it was changed")
    return config


def _read_verified(file: Path, digest: str) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy the whole checkpoint folder") from error
    if _sha256(content) != digest:
        raise CheckpointError(f"{file} is damaged: its SHA-256 differs from config.json's; copy the folder again")
    return content


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _preprocess(model: nn.Module) -> Preprocess:
    preprocess = getattr(model, "preprocess", None)
    if not isinstance(preprocess, Preprocess):
        raise CheckpointError(f"{type(model).__name__} has no `preprocess`: it could not be served as it was measured")
    return preprocess


def _publish(staging: Path, target: Path) -> None:
    """Put the finished folder in the target's place, with its content on disk first."""
    for file in staging.iterdir():
        sync(file)
    staging.chmod(0o755)
    if target.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(retired / "checkpoint")
        staging.rename(target)
        shutil.rmtree(retired)
    else:
        staging.rename(target)


def _card(name: str, architecture: str, model: nn.Module, record: Mapping[str, Any], text: str | None) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"# {name}", "", text or f"{parameters:,} parameters, architecture {architecture}.", ""]
    lines += [f"- {key}: {record[key]}" for key in _PROVENANCE if key != "metrics" and record.get(key) is not None]
    metrics = record.get("metrics") or {}
    if metrics:
        lines += ["", "Measured on these weights; shares are 0..1, training/figures.py says what each figure means."]
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [
            f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
            for key, value in metrics.items()
        ]
    return "\n".join(lines) + "\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _known() -> str:
    return ", ".join(sorted(ARCHITECTURES))
