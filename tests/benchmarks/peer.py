"""Weights that all servers of bench_serving.py can load; and the start of a peer's server with them, inside the peer's
environment: `peer.py infinity|clip-as-service`.

Both load weights from a hub, which a benchmark must not need. infinity takes a folder instead; of clip-as-service the
download alone is replaced, by the file that is given. Nothing else of either is touched.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from models.torchvision import load_torchvision

_FLOW = """
jtype: Flow
version: '1'
with:
  protocol: http
  port: {port}
executors:
  - name: clip_t
    uses:
      jtype: CLIPEncoder
      with:
        name: ViT-B-32::laion2b_e16
      metas:
        py_modules:
          - clip_server.executors.clip_torch
    timeout_ready: 3000000
"""


# open_clip's names -> transformers'.
NAMES = (
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^visual\.proj", "visual_projection.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection", "text_projection.weight"),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def write_weights(folder: Path) -> None:
    """A ViT-B/32 of random weights, seed 0: vit.safetensors, vit.pt, and hf/ as transformers reads it."""
    load_torchvision()
    import open_clip
    from safetensors.torch import save_file  # neither peer has it

    torch.manual_seed(0)
    state = open_clip.create_model("ViT-B-32").state_dict()
    save_file(state, folder / "vit.safetensors")
    torch.save(state, folder / "vit.pt")
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        mapped = name
        for pattern, put in NAMES:
            mapped = re.sub(pattern, put, mapped)
        if "in_proj_" in mapped:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                theirs[mapped.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            theirs[mapped] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
    hf = folder / "hf"
    hf.mkdir()
    save_file(theirs, hf / "model.safetensors", metadata={"format": "pt"})
    text = {"hidden_act": "gelu", "eos_token_id": 49407, "bos_token_id": 49406}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512}
    config |= {"text_config": text, "vision_config": {"hidden_act": "gelu"}}
    (hf / "config.json").write_text(json.dumps(config))
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    picture = {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": std, "resample": 3}
    picture |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (hf / "preprocessor_config.json").write_text(json.dumps(picture))
    # The vocabulary of OpenAI's tokenizer, which open_clip brings with it.
    file = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (hf / "vocab.json").write_text(json.dumps({named.get(name, name): id for name, id in tokenizer.encoder.items()}))
    (hf / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (hf / "tokenizer_config.json").write_text(json.dumps(ends | kind))


def infinity(weights: str, port: int) -> None:
    """weights: a folder as transformers writes it. Its defaults, but for the size of a batch, which is ours."""
    from infinity_emb.cli import cli

    sys.argv = ["infinity_emb", "v2", "--model-id", weights, "--served-model-name", "vit", "--port", str(port)]
    sys.argv += ["--host", "127.0.0.1", "--engine", "torch", "--device", "cpu", "--batch-size", "32"]
    sys.argv += ["--no-model-warmup", "--log-level", "warning"]
    cli()


def clip_as_service(weights: str, port: int) -> None:
    """weights: a file of open_clip's names, as torch.save writes it."""
    from clip_server.model import openclip_model
    from jina import Flow

    openclip_model.get_model_url_md5 = lambda name: (name, None)
    openclip_model.download_model = lambda url, md5sum=None: weights
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write(_FLOW.format(port=port))
        file.flush()
        with Flow.load_config(file.name) as flow:
            flow.block()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("infinity", "clip-as-service"))
    parser.add_argument("--weights", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "JINA_OPTOUT_TELEMETRY": "1", "NO_VERSION_CHECK": "1"}
    load_torchvision()
    (infinity if arguments.peer == "infinity" else clip_as_service)(arguments.weights, arguments.port)


if __name__ == "__main__":
    main()
