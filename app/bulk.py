"""Embeds millions of pictures into files: parts of Parquet and safetensors, by as many processes as there are devices.

A part is so many records in a row of the source. It is there when its Parquet file is, which comes last and by one
rename; so whoever is killed, the next run makes the parts that are missing, and every record is in exactly one of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

from app import images
from app.backends import single_threads
from app.fetching import Fetcher
from app.ingest import Report, picture_of
from app.inputs import image_limits
from app.loading import find_models, load_engine
from app.locking import lock
from app.nvjpeg import decoder_of
from app.settings import Settings
from app.vectors import OWN, belong_together, own_of
from models.errors import ConflictError, DataError, ModelError, SemblanceError
from models.files import sync
from models.readers import BadRows, Member, Record, Remote, file_bytes, pyarrow_for, read

PART = 1024  # records
_FETCHERS = 32  # threads that wait for pictures at URLs
_DEATHS = 3  # of processes over one part, before the part is what kills them
EngineName = Literal["processes", "ray"]


@dataclass
class Part:
    """Records `number` x PART and on of a source."""

    number: int
    records: list[Record]

    @property
    def name(self) -> str:
        """Of its files, without what they end with."""
        return f"part-{self.number:06d}"

    @property
    def digest(self) -> str:
        """What differs where a part has other records, or one has another picture, text or metadata."""
        said = [[each.where, each.captions, each.label, each.meta, _version(each.image)] for each in self.records]
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _version(image: Any) -> Any:
    """What differs where a picture has changed, without reading it."""
    if isinstance(image, Path):
        try:
            found = image.stat()
        except (OSError, ValueError):  # told when it is read
            return None
        return found.st_mtime_ns, found.st_size
    if isinstance(image, Member):
        return image.offset, image.size
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else None


@dataclass
class Done:
    """What became of a part's records."""

    added: int
    bad: list[str] = field(default_factory=list)


class PartWriter:
    """A model on a device that makes parts. Raises ConflictError for a folder of another model's."""

    def __init__(self, name: str, reference: str, settings: Settings, source: str, folder: str) -> None:
        self._engine = load_engine(name, reference, settings)
        self._source, self._folder, self._settings = Path(source), Path(folder), settings
        self._limits = image_limits(settings)
        self._threads = _FETCHERS if settings.fetch_hosts else max(2, settings.thread_count)
        self._loop: asyncio.AbstractEventLoop | None = None
        if settings.fetch_hosts:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="fetching", daemon=True).start()
            self._fetcher = asyncio.run_coroutine_threadsafe(self._made_fetcher(), self._loop).result()
        self._agree()

    def __call__(self, part: Part) -> Done:
        """Embed a part and write it, whole or not at all."""
        bad: list[str] = []
        kept: list[Record] = []
        rows: list[np.ndarray] = []
        batch: list[torch.Tensor] = []

        def embed() -> None:
            rows.append(self._engine.encode_images(batch))
            batch.clear()

        with single_threads(self._threads, "decode") as pool:
            ahead: deque[Any] = deque()
            records = iter(part.records)
            while True:
                for record in islice(records, 2 * self._settings.batch_size - len(ahead)):
                    ahead.append((record, pool.submit(self._prepared, record)))
                if not ahead:
                    break
                record, prepared = ahead.popleft()
                try:
                    batch.append(prepared.result())
                except (SemblanceError, OSError, ValueError) as error:
                    bad.append(f"{record.where}: {error}")
                    continue
                kept.append(record)
                if len(batch) == self._settings.batch_size:
                    embed()
            if batch:
                embed()
        vectors = np.concatenate(rows) if rows else np.zeros((0, self._engine.embed_dim), np.float32)
        finite = np.isfinite(vectors).all(axis=1)
        bad += [f"{kept[place].where}: the model gave no finite numbers" for place in np.flatnonzero(~finite)]
        good = np.flatnonzero(finite)
        self._write(part, [kept[place] for place in good], vectors[good], bad)
        return Done(len(good), bad)

    def _prepared(self, record: Record) -> torch.Tensor:
        picture_of(record, self._source).check()
        if isinstance(record.image, Image.Image):
            return self._engine.prepare_image(record.image.convert("RGB"))
        content, size = self._content(record.image), self._engine.image_size
        return self._engine.prepare_image(images.pixels(content, self._limits, size, decoder_of(self._settings)))

    def _content(self, source: bytes | Path | Member | Remote) -> bytes:
        if self._loop is None or not isinstance(source, Remote):
            return file_bytes(source)
        return asyncio.run_coroutine_threadsafe(self._fetcher.fetch(source.url), self._loop).result()

    async def _made_fetcher(self) -> Fetcher:
        settings = self._settings
        return Fetcher(settings.fetch_hosts, settings.max_body, settings.fetch_seconds)

    def _write(self, part: Part, records: Sequence[Record], vectors: np.ndarray, bad: list[str]) -> None:
        arrow = pyarrow_for(self._folder)
        made = uuid.uuid4().hex  # by which the two files know each other
        about = {
            "model": self._engine.name,
            "fingerprint": self._engine.fingerprint,
            "records": part.digest,
            "bad": bad,
            "made": made,
        }
        names = ("id", "kind", "caption", "metadata", "where")
        schema = arrow.schema([(name, arrow.string()) for name in names], metadata={OWN: json.dumps(about)})
        listed = []
        for record in records:
            picture = picture_of(record, self._source)
            caption = record.captions[0] if record.captions else None
            values = (picture.id, "image", caption, json.dumps(picture.metadata), record.where)
            listed.append(dict(zip(names, values, strict=True)))
        unfinished = self._folder / f".{part.name}.{made}"
        save_file({"embedding": vectors}, unfinished, {"made": made})
        _settle(unfinished, self._folder / f"{part.name}.safetensors")
        arrow.parquet.write_table(arrow.Table.from_pylist(listed, schema), unfinished)
        _settle(unfinished, self._folder / f"{part.name}.parquet")

    def _agree(self) -> None:
        """One folder has the embeddings of one model, whichever process comes first."""
        file, mine = self._folder / "model.json", {"model": self._engine.name, "fingerprint": self._engine.fingerprint}
        unfinished = self._folder / f".model.{uuid.uuid4().hex}"
        unfinished.write_text(json.dumps(mine))
        try:
            os.link(unfinished, file)
        except FileExistsError:
            theirs = json.loads(file.read_text())
            if theirs["fingerprint"] != mine["fingerprint"]:
                raise ConflictError(
                    f"{self._folder} holds embeddings of model {theirs['model']!r} ({theirs['fingerprint']}), these "
                    f"would be of {mine['model']!r} ({mine['fingerprint']}); give another folder"
                ) from None
        finally:
            unfinished.unlink()


def embed_source(
    source: str,
    folder: str | Path,
    settings: Settings,
    *,
    embedder: str | None = None,
    engine: EngineName = "processes",
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Embed every picture of `source` (as models.readers.read takes it) into parts in `folder`; what is there stays.

    embedder: a model's name, the first by default. workers: processes, 0: one a GPU, one a host where there is none;
    those of a host share its threads. progress: told how many records were dealt with.
    Raises ConflictError for a folder of another source or model, StorageError for one that another command fills,
    DataError where there is nothing to read, ModelError if a part ends every process that tries it.
    """
    models = find_models(settings)
    name = embedder or next(iter(models), "")
    if name not in models:
        raise DataError(f"no model {name!r}; there are: {', '.join(models) or 'none'}")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    rows, report = BadRows(limit=None), Report()
    arguments = {"name": name, "reference": models[name], "source": source, "folder": str(place)}

    def missing() -> Iterator[Part]:
        records = read(source, rows)
        number = 0
        while part := list(islice(records, PART)):
            made = Part(number, part)
            if (known := _written(place / f"{made.name}.parquet", made)) is None:
                yield made
            else:
                report.present += len(part) - len(known)
                report.bad += known
                progress(len(part))
            number += 1

    def done(result: Done) -> None:
        report.added += result.added
        report.bad += result.bad
        progress(result.added + len(result.bad))

    run = {"processes": run_processes, "ray": run_ray}[engine]
    with closing(lock(place, f"process {os.getpid()}")):
        for unfinished in chain(place.glob(".part-*"), place.glob(".model.*")):  # of a process that was killed
            unfinished.unlink()
        run(missing(), arguments, settings, workers, done)
    report.bad += rows.rows
    return report


def run_processes(
    parts: Iterator[Part],
    arguments: Mapping[str, Any],
    settings: Settings,
    workers: int,
    done: Callable[[Done], None],
) -> None:
    """Parts to processes of this machine; one that dies is followed by another, which begins with its part."""
    workers = workers or max(1, torch.cuda.device_count())
    slots: list[_Process | None] = [None] * workers
    again: deque[Part] = deque()
    deaths: Counter[int] = Counter()
    try:
        while True:
            for number, process in enumerate(slots):
                if process is not None and process.part is not None:
                    continue
                part = again.popleft() if again else next(parts, None)
                if part is None:
                    break
                slots[number] = process or _Process(arguments, _shared(settings, number, workers))
                slots[number].give(part)  # type: ignore[union-attr]
            busy = [(each, each.part) for each in slots if each is not None and each.part is not None]
            if not busy:
                return
            ready = wait([process.connection for process, _ in busy])
            for process, part in busy:
                if process.connection not in ready:
                    continue
                try:
                    done(process.answer())
                except (EOFError, ConnectionResetError):
                    slots[slots.index(process)] = None
                    process.end()
                    deaths[part.number] += 1
                    if deaths[part.number] == _DEATHS:
                        raise ModelError(
                            f"{part.name}, from {part.records[0].where} on, ended {_DEATHS} processes that tried "
                            "it: is there memory enough?"
                        ) from None
                    again.append(part)
    finally:
        for process in filter(None, slots):
            process.end()


class _Process:
    """One that makes parts, and the part that it has."""

    def __init__(self, arguments: Mapping[str, Any], settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_make_parts, args=(theirs, dict(arguments), settings), daemon=True)
        self._process.start()
        theirs.close()
        self.part: Part | None = None

    def give(self, part: Part) -> None:
        self.part = part
        with suppress(BrokenPipeError):  # it has died, as its answer will tell
            self.connection.send(part)

    def answer(self) -> Done:
        """What became of the part. Raises EOFError or ConnectionResetError if the process has died, and what the part
        raised."""
        answer: Done | Exception = self.connection.recv()
        self.part = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def run_ray(
    parts: Iterator[Part],
    arguments: Mapping[str, Any],
    settings: Settings,
    workers: int,
    done: Callable[[Done], None],
) -> None:
    """Parts to a Ray cluster, whose hosts all see source and folder; Ray follows whatever dies by another."""
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]
        import ray.data  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError("--engine ray needs Ray: pip install 'semblance[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    # In Ray's memory, and on the disk where that is full: a list of millions of records is too much for one process.
    kept = [ray.put(part) for part in parts]
    if not kept:
        return
    hosts, gpus = sum(each["Alive"] for each in ray.nodes()), int(ray.cluster_resources().get("GPU", 0))
    workers = workers or gpus or hosts
    made = ray.data.range(len(kept), override_num_blocks=len(kept)).map(
        _RayWriter,
        fn_constructor_kwargs={
            "parts": kept,
            "arguments": dict(arguments),
            "settings": _shared(settings, None, -(-workers // hosts)),
        },
        concurrency=workers,
        num_gpus=1 / -(-workers // gpus) if gpus else 0,
    )
    for row in made.iter_rows():
        done(Done(row["added"], list(row["bad"])))


class _RayWriter:
    """What an actor of Ray Data does with a row."""

    def __init__(self, parts: Sequence[Any], arguments: dict[str, Any], settings: Settings) -> None:
        self._parts, self._writer = parts, PartWriter(settings=settings, **arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        made = self._writer(ray.get(self._parts[row["id"]]))
        return {"added": made.added, "bad": made.bad}


def _make_parts(connection: Connection, arguments: dict[str, Any], settings: Settings) -> None:
    """A process's life: parts come, answers go, until the other side has gone."""
    writer = None
    while True:
        try:
            part = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            torch.set_num_threads(settings.thread_count)
            writer = writer or PartWriter(settings=settings, **arguments)
            answer: Any = writer(part)
        except Exception as error:
            answer = error
        connection.send(answer)


def _shared(settings: Settings, number: int | None, workers: int) -> Settings:
    """A process's settings: its share of the threads, and its GPU. number: None where the GPU is given by others."""
    changes: dict[str, Any] = {"threads": max(1, settings.thread_count // workers)}
    if number is not None and settings.device == "auto" and torch.cuda.is_available():
        changes["device"] = f"cuda:{number % torch.cuda.device_count()}"
    return settings.model_copy(update=changes)


def _written(table: Path, part: Part) -> list[str] | None:
    """The bad inputs of a part that is there, None if it is not, or not as one process made it. Raises ConflictError
    for one of other records."""
    vectors = table.with_suffix(".safetensors")
    if not table.is_file() or not vectors.is_file():
        return None
    about = own_of(table)
    if about is None or about["records"] != part.digest:
        raise ConflictError(f"{table} is of other inputs: the source has changed since; give another folder")
    bad: list[str] = about["bad"]
    return bad if belong_together(about, vectors) else None


def _settle(unfinished: Path, file: Path) -> None:
    """Let a file have its name once all of it is on the disk."""
    sync(unfinished)
    unfinished.replace(file)
