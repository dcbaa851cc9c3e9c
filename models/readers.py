"""Reads pictures with captions from what people have: folders, caption tables, WebDataset shards, torchvision, a hub.

Every reader yields `Record`s; `decode` turns them into arrays. A bad row is reported with its file and line and
skipped, up to a limit.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import DataError
from models.preprocess import upright
from models.torchvision import load_torchvision

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# What Pillow raises for bytes that are no picture, or a broken one.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path")
CAPTION_COLUMNS = ("captions", "caption", "text", "title")
LABEL_COLUMNS = ("label", "class", "category")


@dataclass(frozen=True)
class Member:
    """A file in an uncompressed tar archive, read when it is wanted, so that a large shard is never held in memory."""

    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Remote:
    """A picture at a URL. Nothing here fetches it; `app.bulk` does, from the hosts that it may."""

    url: str

    def read(self) -> bytes:
        """Raises OSError."""
        raise OSError(errno.ENOTSUP, "the picture is at a URL, which only `semblance index --to` fetches")


Picture = bytes | Path | Member | Remote | Image.Image


@dataclass
class Record:
    """One picture: its bytes, path or decoded form, its texts and what else is known. where: for error messages."""

    where: str
    image: Picture
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class BadRows:
    """Rows that could not be read. More than `limit` of them raise DataError with the first few. limit: None for who
    takes what can be read, however little; then a shard that breaks off is one of the rows, too, and raises nothing."""

    limit: int | None = 100
    rows: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        self.rows.append(f"{where}: {why}")
        if self.limit is not None and len(self.rows) > self.limit:
            shown = "\n  ".join(self.rows[:10])
            raise DataError(
                f"more than {self.limit} rows cannot be read, among them\n  {shown}\nRaise --max-bad to go on."
            )


def read(spec: str, bad: BadRows, split: str | None = None) -> Iterator[Record]:
    """Records of a data set by what it is called on the command line.

    A folder of pictures (subfolders are labels), a .csv / .tsv / .jsonl / .parquet table with columns of paths (or
    URLs) and captions, a .tar / .tar.gz shard or a folder of them, "torchvision:<name>[:<root>]", or "hf:<name>".
    split: keep the records whose metadata or data set says so. Raises DataError for a spec that names nothing.
    """
    if spec.startswith("torchvision:"):
        return _read_torchvision(spec.removeprefix("torchvision:"), split)
    if spec.startswith("hf:"):
        return _read_hub(spec.removeprefix("hf:"), split, bad)
    path = Path(spec).expanduser()
    if path.is_dir():
        records = _read_files(path, bad)
    elif not path.is_file():
        raise DataError(f"{spec!r} is no file, folder, torchvision:<name> or hf:<name>")
    elif _is_shard(path):
        records = _read_shard(path, bad)
    elif path.suffix in _TABLES:
        records = _read_table(path, bad)
    else:
        raise DataError(f"{path}: unknown kind of file; give a folder, {', '.join(_TABLES)}, .tar or .tar.gz")
    return records if split is None else (r for r in records if r.meta.get("split", split) == split)


def decode(
    records: Iterable[Record],
    size: int,
    bad: BadRows,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    threads: int = 2,
) -> tuple[Tensor, list[Record]]:
    """Records -> uint8 (N, 4, size, size) and the records that could be read, in order.

    Pictures are scaled to fit and centred; what they leave free is transparent (the fourth channel is opacity).
    prepare: another way from a picture to its tensor, such as a model's own preprocess.
    """
    prepare = prepare or (lambda image: torch.from_numpy(fit_rgba(image, size)))

    def one(record: Record) -> tuple[Record, Tensor | None, str]:
        try:
            return record, prepare(open_picture(record.image)), ""
        except UNREADABLE as error:
            return record, None, str(error)

    arrays, kept = [], []
    with ThreadPoolExecutor(threads) as pool:
        for record, array, why in pool.map(one, records):
            if array is None:
                bad.add(record.where, why)
            else:
                record.image = b""  # the decoded array replaces it
                arrays.append(array)
                kept.append(record)
    if not arrays:
        raise DataError("no picture could be read; check the path and the formats (" + ", ".join(FORMATS) + ")")
    return torch.stack(arrays), kept


def open_picture(source: Picture) -> Image.Image:
    """A picture of any kind -> upright RGB or RGBA. Training data is the operator's own; `app` is stricter."""
    image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(file_bytes(source)), formats=FORMATS)
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return upright(image.convert("RGBA" if has_alpha else "RGB"), image)


def file_bytes(source: bytes | Path | Member | Remote) -> bytes:
    """The file behind a picture that is not decoded."""
    if isinstance(source, Path):
        if source.exists() and not source.is_file():  # to read a pipe would wait for who writes into it
            raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file")
        return source.read_bytes()
    return source.read() if isinstance(source, Member | Remote) else source


def fit_rgba(image: Image.Image, size: int) -> np.ndarray:
    """A picture -> uint8 (4, size, size), scaled to fit, centred on nothing."""
    image = image.convert("RGBA")
    scale = size / max(image.size)
    new = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image.resize(new, Image.Resampling.BICUBIC), ((size - new[0]) // 2, (size - new[1]) // 2))
    return np.asarray(canvas).transpose(2, 0, 1).copy()


def _is_shard(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


def _chain(shards: list[Path], bad: BadRows) -> Iterator[Record]:
    for shard in shards:
        yield from _read_shard(shard, bad)


def _read_files(folder: Path, bad: BadRows) -> Iterator[Record]:
    """Of the shards in a folder, or else of its pictures."""
    files = sorted(_files(folder, bad))
    shards = [file for file in files if _is_shard(file)]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not shards:
        return _read_pictures(folder, pictures, bad)
    if pictures:
        why = f"{len(pictures):,} pictures beside shards are not read, first {pictures[0]}: the folder is one of shards"
        bad.add(str(folder), f"{why} for {shards[0]}, which belongs elsewhere if it is none")
    return _chain(shards, bad)


def _files(folder: Path, bad: BadRows) -> Iterator[Path]:
    """All below a folder, in no order. A link to another folder is followed where that is not read anyway, once."""
    root, seen = folder.resolve(), set[Path]()

    def wanted(place: Path) -> bool:
        real = place.resolve() if place.is_symlink() else None
        if real is None or real in seen or real.is_relative_to(root) or root.is_relative_to(real):
            return real is None
        seen.add(real)
        return True

    def unreadable(error: OSError) -> None:
        bad.add(str(error.filename), f"the folder cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if wanted(Path(place, name))]
        yield from (Path(place, name) for name in names)


def _read_pictures(folder: Path, files: list[Path], bad: BadRows) -> Iterator[Record]:
    for file in files:
        label = file.parent.name if file.parent != folder else None
        text = file.with_suffix(".txt")
        words = (label or file.stem).replace("_", " ").replace("-", " ")
        try:
            captions = [words]
            if text.is_file():
                captions = [line.strip() for line in text.read_text("utf-8").splitlines()]
        except (UnicodeDecodeError, OSError) as error:
            bad.add(str(file), f"its captions, {text.name}, cannot be read as UTF-8: {error}")
            continue
        yield Record(str(file), file, [caption for caption in captions if caption], label)


def _read_shard(path: Path, bad: BadRows) -> Iterator[Record]:
    """WebDataset layout: members KEY.png|jpg..., KEY.json, KEY.txt, KEY.cls; a key's members lie side by side.

    Pictures of an uncompressed archive are not read but pointed at.
    """
    try:
        with tarfile.open(path) as tar:
            plain = isinstance(tar.fileobj, io.BufferedReader)
            key, parts = "", dict[str, Any]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if parts and f"{folder}/{stem}" != key:
                    yield from _shard_record(path, key, parts, bad)
                    parts = {}
                key = f"{folder}/{stem}"
                file = tar.extractfile(member)
                if plain and f".{suffix.lower()}" in SUFFIXES:
                    parts[suffix.lower()] = Member(path, member.offset_data, member.size)
                else:
                    parts[suffix.lower()] = file.read() if file else b""
            if parts:
                yield from _shard_record(path, key, parts, bad)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if bad.limit is not None:
            raise DataError(f"{path} cannot be read as a tar archive: {error}") from error
        bad.add(str(path), f"cannot be read as a tar archive, or not to its end: {error}")


def _shard_record(path: Path, key: str, parts: dict[str, Any], bad: BadRows) -> Iterator[Record]:
    where = f"{path}:{key.lstrip('/')}"
    image = next((parts[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in parts), None)
    if image is None:
        bad.add(where, f"no picture among its members {', '.join(sorted(parts))}")
        return
    try:
        meta = json.loads(parts["json"]) if "json" in parts else {}
        captions = meta.get("captions") or meta.get("caption") or []
        captions = [str(each) for each in (captions if isinstance(captions, list) else [captions])]
        if "txt" in parts:
            captions = [line for line in parts["txt"].decode("utf-8").splitlines() if line.strip()]
        label = parts["cls"].decode().strip() if "cls" in parts else meta.get("label")
    except (ValueError, AttributeError) as error:
        bad.add(where, f"its texts cannot be read: {error}")
        return
    yield Record(where, image, captions, label, meta | {"key": key.lstrip("/")})


def pyarrow_for(path: Path) -> Any:
    """pyarrow with its `parquet`. Raises DataError, naming the file that needs it, if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs the package `pyarrow`: pip install 'semblance[train]'") from error
    return pyarrow


def _table_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        arrow = pyarrow_for(path)
        try:
            batches = arrow.parquet.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet ({error}); write it again") from error
        return
    # What is not UTF-8 becomes half surrogate pairs, by which its row is known.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _json_rows(file) if path.suffix == ".jsonl" else _csv_rows(file, "\t" if path.suffix == ".tsv" else ",")
        for number, row in rows:
            if isinstance(row, dict):
                yield number, row
            else:
                bad.add(f"{path}:{number}", row)


def _json_rows(file: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each line's number with its object, or with what is wrong with it."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                line.encode()
                yield number, dict(json.loads(line))
            except UnicodeEncodeError:
                yield number, _NOT_UTF8
            except (ValueError, TypeError, RecursionError) as error:
                yield number, f"no JSON object: {error}"


def _csv_rows(file: TextIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each row with the number of its last line, or what is wrong with it."""
    reader = csv.DictReader(file, delimiter=delimiter)
    while True:
        try:
            row = next(reader)
            json.dumps(row, ensure_ascii=False).encode()
            yield reader.line_num, row
        except StopIteration:
            return
        except UnicodeEncodeError:
            yield reader.line_num, _NOT_UTF8
        except csv.Error as error:  # such as a quote that never ends
            yield reader.line_num, f"no row: {error}"


_NOT_UTF8 = "not UTF-8; save the table in that encoding"
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def _read_table(path: Path, bad: BadRows) -> Iterator[Record]:
    for number, row in _table_rows(path, bad):
        where = f"{path}:{number}"
        name = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
        label = next((str(row[column]) for column in LABEL_COLUMNS if row.get(column)), None)
        url = row.get("url")
        place = path.parent / name if isinstance(name, str) else Remote(url) if url and isinstance(url, str) else None
        if place is None or (caption is None and label is None):
            bad.add(
                where,
                f"needs one of the columns {', '.join(PATH_COLUMNS)}, url and one of {', '.join(CAPTION_COLUMNS)}",
            )
            continue
        captions = (
            [str(c) for c in caption] if isinstance(caption, list) else [str(caption if caption is not None else label)]
        )
        yield Record(where, place, captions, label, row)


def _read_torchvision(name: str, split: str | None) -> Iterator[Record]:
    name, _, root = name.partition(":")
    load_torchvision()
    import torchvision.datasets

    if not hasattr(torchvision.datasets, name):
        raise DataError(f"torchvision has no data set {name!r}; see torchvision.datasets for their names")
    options = getattr(torchvision.datasets, name).__init__.__code__.co_varnames
    keywords: dict[str, Any] = {"root": root or "data"} if "root" in options else {}
    if "train" in options:
        keywords["train"] = split != "val"
    elif "split" in options:
        keywords["split"] = {"val": "test", None: "train"}.get(split, split)
    try:
        data = getattr(torchvision.datasets, name)(**keywords)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"torchvision:{name} in {root or 'data'}: {error}") from error
    classes = getattr(data, "classes", None)
    for index in range(len(data)):
        image, target = data[index][:2]
        label = str(classes[target]) if classes is not None and isinstance(target, int) else str(target)
        yield Record(f"torchvision:{name}[{index}]", image, [label.replace("_", " ")], label)


def _read_hub(name: str, split: str | None, bad: BadRows) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("hf: needs the package `datasets`: pip install 'semblance[hub]'") from error
    for index, row in enumerate(datasets.load_dataset(name, split=split or "train")):
        image = next((value for value in row.values() if isinstance(value, Image.Image)), None)
        caption = next((row[column] for column in (*CAPTION_COLUMNS, *LABEL_COLUMNS) if column in row), None)
        if image is None or caption is None:
            bad.add(f"hf:{name}[{index}]", f"no picture, or none of {', '.join((*CAPTION_COLUMNS, *LABEL_COLUMNS))}")
            continue
        yield Record(f"hf:{name}[{index}]", image, caption if isinstance(caption, list) else [str(caption)])
