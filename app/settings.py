"""What an operator may decide, read from `SEMBLANCE_...` environment variables or given by keyword."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.errors import ForbiddenError

Backend = Literal[
    "torch-fp32",
    "torch-bf16",
    "torch-int8",
    "torch-compiled",
    "torch-graphs",
    "onnx-fp32",
    "onnx-int8",
    "openvino-fp32",
    "openvino-bf16",
    "openvino-int8",
]


def _split(value: Any) -> Any:
    """Let a list be written as `a,b` in the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _addresses(values: tuple[str, ...]) -> tuple[str, ...]:
    for each in values:
        if each != "*":
            ipaddress.ip_network(each, strict=False)  # a ValueError that says what is wrong with it
    return values


class Settings(BaseSettings):
    """Defaults suit a laptop: loopback only, small limits, every processor core."""

    model_config = SettingsConfigDict(env_prefix="SEMBLANCE_", extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    insecure: bool = Field(False, description="serve a non-loopback address without an API key")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="keys of which a request must bring one, as Authorization: Bearer; separated by commas. They may "
        "do everything; `semblance keys` makes others",
    )
    hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="names by which clients may call this server; none: on a loopback address its own names, else any",
    )

    proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_addresses)] = Field(
        (),
        description="addresses or networks of proxies whose X-Forwarded-For says who calls; * for any; none: not asked",
    )

    checkpoints: Path = Field(Path("checkpoints/demo"), description="every subfolder with a config.json is a model")
    models: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="more models as name=reference, e.g. vit=open_clip:ViT-B-32/laion2b_s34b_b79k"
    )
    # Not `data`: SEMBLANCE_DATA names the pictures that training reads, and nothing shall be written there.
    store: Path = Field(Path("data"), description="the folder of the collections; one process at a time")
    database: SecretStr | None = Field(
        None,
        description="postgresql://... that has the collections, which several servers may share; none: the folder has "
        "them",
    )
    milvus: str | None = Field(
        None,
        description="http://HOST:PORT of a Milvus that says where to look, for more than PostgreSQL can search; with "
        "DATABASE, which stays the truth",
    )
    picture_root: Path | None = Field(
        None, description="folder of pictures that items may refer to in place; none: all are kept in the store"
    )
    fetch_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="hosts of which pictures are read by URL: a name, *.name for all below it, * for any; none: off",
    )
    fetch_seconds: float = Field(10.0, gt=0, description="until a picture must have come from its URL; then 504")
    default_collection: str = Field("default", description="searched when a request names no collection")
    demo: bool = Field(False, description="fill the default collection with generated scenes on first start")

    max_body: int = Field(20_000_000, gt=0, description="bytes of a request body, and of one picture file")
    max_pixels: int = Field(25_000_000, gt=0, description="pixels of one picture")
    max_side: int = Field(16_384, gt=0, description="pixels of a picture's longer side")
    max_text: int = Field(2_000, gt=0, description="characters of one text")
    max_inputs: int = Field(64, gt=0, description="inputs, documents or items of one call")
    max_labels: int = Field(1_000, gt=0, description="zero-shot labels of one call")
    max_prompts: int = Field(4_000, gt=0, description="zero-shot labels times templates of one call")
    max_k: int = Field(1_000, gt=0, description="hits of one search")
    stored_side: int = Field(1_024, gt=0, description="pixels of the longest side of a stored picture")

    log: Literal["auto", "text", "json"] = Field(
        "auto", description="form of the lines on stderr; auto: text on a terminal, else JSON"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    backend: Literal["auto", Backend] = Field(
        "auto", description="what computes embeddings; auto: the fastest of torch and what `semblance export` wrote"
    )
    jpeg_decoder: Literal["pillow", "nvjpeg"] = Field(
        "pillow",
        description="of JPEGs to embed; nvjpeg: on the GPU, to pixels that differ from Pillow's by some levels",
    )
    threads: int = Field(0, ge=0, description="processor threads for decoding and for the models; 0: every core")
    model_memory: int = Field(
        0,
        ge=0,
        description="bytes that models which embed may take; the least recently used leave; 0: any number",
    )
    batch_size: int = Field(32, gt=0, description="inputs of one forward, at most")
    batch_wait_ms: float = Field(3.0, ge=0, description="milliseconds that a batch waits for more inputs, at most")
    head_seconds: float = Field(10.0, gt=0, description="until a request's head must have come; then it is hung up on")
    body_seconds: float = Field(
        30.0, gt=0, description="in which 16 KiB of a request's body must come, or its end; then it is hung up on"
    )
    drain_seconds: float = Field(
        30.0, gt=0, description="in which accepted requests are finished after SIGTERM; what waits then is answered 503"
    )
    queue_size: int = Field(256, gt=0, description="inputs admitted at once, per model and kind; then 503")
    deadline: float = Field(30.0, gt=0, description="seconds a request may wait for its embeddings; then 504")
    generate_lanes: int = Field(16, ge=2, description="pictures drawn at once; a guided one counts as two")
    generate_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of drawing; auto is bf16 on a GPU that has it, and fp32 on a CPU"
    )
    generate_queue: int = Field(64, gt=0, description="pictures admitted at once, per model; then 503")
    generate_deadline: float = Field(120.0, gt=0, description="seconds a request may wait for its pictures; then 504")
    text_cache: int = Field(10_000, ge=0, description="text embeddings kept in memory, per model")

    @property
    def thread_count(self) -> int:
        """`threads`, or the cores this process may use."""
        if self.threads:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def plain_keys(self) -> tuple[str, ...]:
        """`api_keys` as they are, for who must send or hash them."""
        return tuple(key.get_secret_value() for key in self.api_keys)

    @property
    def accepted_hosts(self) -> tuple[str, ...]:
        """What a request's Host may name; empty: anything."""
        if self.hosts or _is_loopback(self.host):
            return (*self.hosts, "localhost", "127.0.0.1", "::1", self.host)
        return ()

    def check_exposure(self, *, keyed: bool = False) -> None:
        """Refuse to offer an unprotected server to the network. keyed: it asks for keys that are not in the settings.

        Raises:
            ForbiddenError: the host is not a loopback address, no key is asked for, and `insecure` is off.
        """
        if self.api_keys or keyed or self.insecure or _is_loopback(self.host):
            return
        raise ForbiddenError(
            f"{self.host} can be reached from other machines and no API key is asked for: make one by `semblance keys "
            "create NAME` or set SEMBLANCE_API_KEYS, listen on 127.0.0.1, or say --insecure if everybody who reaches "
            "this address may use it"
        )


def _is_loopback(host: str) -> bool:
    """Whether `host` is localhost or a loopback address; other names may resolve to anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
