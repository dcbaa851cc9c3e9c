"""Mixtures, sources, readers and augmentation: exact, fair, and loud about bad rows."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import DataError
from models.readers import BadRows, Member, decode, file_bytes, read
from training.augment import Augmentation, augment
from training.data import CAPTION_IDS, ArraySource, Mixture, PictureBatches, SceneSource, StreamSource, batches_from
from training.pictures import name_and_weight, open_source

Encoded = Callable[..., bytes]


def _source(name: str, count: int) -> ArraySource:
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return ArraySource(name, images, [[f"{name} {row}"] for row in range(count)])


def _tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[ord(text[0]), int(text.split()[1])] for text in texts])


def _mixture(**options: int) -> Mixture:
    sources, weights = [_source("a", 20), _source("b", 7)], [3.0, 1.0]
    keywords = {"size": 8, "batch_size": 16, "steps": 40, "chunk": 4, **options}
    return Mixture(sources, weights, _tokenize, **keywords)  # type: ignore[arg-type]


def test_a_batch_is_a_function_of_its_step() -> None:
    one, two = _mixture(), _mixture()
    later = [one[step] for step in (7, 3, 7)]
    assert all(torch.equal(later[0][name], later[2][name]) for name in later[0])
    assert all(torch.equal(later[1][name], two[3][name]) for name in later[1])
    assert any(not torch.equal(later[0][name], later[1][name]) for name in later[0])


def test_workers_change_nothing() -> None:
    direct = (_mixture()[step] for step in range(5, 40))
    for batch, expected in zip(batches_from(_mixture(), 5, 2), direct, strict=True):
        assert torch.equal(batch["tokens"], expected["tokens"])
        assert torch.equal(batch["images"], expected["images"])


def test_loading_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    next(batches_from(_mixture(), 0, 0))
    assert torch.equal(torch.rand(4), expected)


def test_epochs_have_every_row_once_and_shares_are_the_weights() -> None:
    mixture = _mixture()
    rows = torch.cat([mixture[step]["tokens"] for step in range(40)])
    for letter, count in (("a", 20), ("b", 7)):
        mine = rows[rows[:, 0] == ord(letter), 1].tolist()
        whole = len(mine) // count * count
        assert set(Counter(mine[:whole]).values()) == {whole // count}
    per_step = [int((mixture[step]["tokens"][:, 0] == ord("a")).sum()) for step in range(40)]
    assert set(per_step) == {12}


def test_ranks_share_a_step_without_overlap() -> None:
    whole = _mixture()
    for step in range(5):
        parts = torch.cat([_mixture(rank=rank, world_size=2)[step]["tokens"] for rank in range(2)])
        assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole[step]["tokens"].tolist()))


def test_shards_are_split_by_rank_and_worker_and_gone_on_with_in_the_midst_of_an_epoch(tmp_path: Path) -> None:
    """Two shards of 24 pictures, each a grey of its own: ranks and workers together have each once an epoch."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(24 * shard, 24 * shard + 24):
                file = io.BytesIO()
                Image.new("L", (8, 8), 5 * number).save(file, "PNG")
                info = tarfile.TarInfo(f"{number}.png")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    source, weight = open_source(str(tmp_path), 8, BadRows(), hold=0, captioned=False)
    assert isinstance(source, StreamSource)

    def seen(rank: int, ranks: int, start: int, end: int) -> list[int]:
        options = {"size": 8, "batch_size": 16, "chunk": 4, "rank": rank, "world_size": ranks, "steps": end}
        batches = batches_from(PictureBatches([source], [weight], **options), start, workers=2)
        return [int(pixel) // 5 for batch in batches for pixel in batch["images"][:, 0, 0, 0]]

    begun = sorted(row for rank in range(4) for row in seen(rank, 4, 0, 2))
    # Two ranks come back of four: what is left of the epoch, the next one, and nothing of what was seen.
    rest = sorted(row for rank in range(2) for row in seen(rank, 2, 2, 3))
    following = sorted(row for rank in range(2) for row in seen(rank, 2, 3, 6))
    assert sorted(begun + rest) == following == list(range(48))


def test_batches_tell_all_captions_of_a_picture() -> None:
    """The first id is that of the caption which is trained on, whatever its case; then the picture's other captions."""

    def ids(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[zlib.crc32(text.lower().encode())] for text in texts])

    gala = ["Gala Apple", "a photo of gala apple", "apple"]
    source = ArraySource("fruit", torch.zeros(3, 3, 8, 8, dtype=torch.uint8), [gala, ["Apple"], ["pear"]])
    mixture = Mixture([source], [1], ids, size=8, batch_size=3, steps=20, chunk=3)
    known = {frozenset(ids(texts).flatten().tolist()) for texts in source.captions}
    for step in range(20):
        batch = mixture[step]
        assert batch["captions"].shape == (3, CAPTION_IDS)
        assert torch.equal(batch["captions"][:, :1], batch["tokens"])
        assert {frozenset(row) for row in batch["captions"].tolist()} == known
    assert len({int(mixture[step]["tokens"].sum()) for step in range(20)}) == 3  # each of the three came first


def test_pictures_come_as_they_are_and_transparency_on_white() -> None:
    clear = ArraySource("clear", torch.zeros(5, 4, 8, 8, dtype=torch.uint8))
    options = {"size": 8, "batch_size": 16, "steps": 10, "chunk": 4}
    batches = PictureBatches([_source("a", 20), clear], [3.0, 1.0], **options)  # type: ignore[arg-type]
    for step in range(10):
        images = batches[step]["images"]
        assert images.shape == (16, 3, 8, 8)
        assert int((images == 255).all(1).all(1).all(1).sum()) == 4
    numbers = torch.cat([batches[step]["images"][:, 0, 0, 0] for step in range(10)])
    assert sorted(numbers[numbers != 255].tolist()) == sorted([*range(20)] * 6)
    with pytest.raises(ValueError, match="8 x 8 pixels, 9 are wanted"):
        PictureBatches([clear], [1.0], **(options | {"size": 9}))[0]  # type: ignore[arg-type]


def test_batches_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        _mixture(batch_size=18)


def test_scene_source_draws_fresh_pictures() -> None:
    source = SceneSource()
    images, texts = source.draw(np.arange(16), 64, np.random.default_rng(0))
    again, _ = source.draw(np.arange(16), 64, np.random.default_rng(1))
    assert images.shape == (16, 3, 64, 64)
    assert len(texts) == 16
    assert not torch.equal(images, again)


def test_no_augmentation_changes_nothing_and_some_changes_each_image_its_own_way() -> None:
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(6, -1, -1, -1).contiguous()
    assert torch.equal(augment(images, 16, Augmentation(), torch.Generator()), images)
    strong = Augmentation((0.3, 1.0), (0.7, 1.4), 0.5, 10, 0.4, 0.4, 0.4, 0.1, 0.2)
    first, second = (augment(images, 16, strong, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6


def test_transparency_shows_the_background_and_no_hidden_colour() -> None:
    images = torch.zeros(8, 4, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255  # red, and wholly transparent
    assert (augment(images, 8, Augmentation(), torch.Generator()) == 255).all()
    coloured = augment(images, 8, Augmentation(background=1.0), torch.Generator().manual_seed(0))
    assert len(coloured[:, :, 0, 0].unique(dim=0)) == 8


def test_flips_mirror() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(augment(images, 16, Augmentation(flip=1.0), torch.Generator()), images.flip(-1))


@pytest.fixture
def photos(tmp_path: Path, encoded: Encoded) -> Path:
    folder = tmp_path / "photos"
    for index, label in enumerate(["red_cats", "dogs", "dogs"]):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{index}.jpg").write_bytes(encoded(index))
    (folder / "dogs" / "2.txt").write_text("a dog asleep\na brown dog\n")
    return folder


def test_folders_give_labels_and_texts_beside_pictures(photos: Path) -> None:
    records = list(read(str(photos), BadRows()))
    assert [(r.label, r.captions) for r in records] == [
        ("dogs", ["dogs"]),
        ("dogs", ["a dog asleep", "a brown dog"]),
        ("red_cats", ["red cats"]),
    ]
    images, kept = decode(records, 16, BadRows())
    assert images.shape == (3, 4, 16, 16)
    assert len(kept) == 3


def test_nothing_below_a_folder_is_left_out_in_silence(
    photos: Path, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to other folders are followed once and in no circle; what cannot be read, or is not, is a bad row."""
    before = {record.where for record in read(str(photos), BadRows())}
    other = tmp_path / "elsewhere"
    (other / "deeper").mkdir(parents=True)
    (other / "deeper/there.png").write_bytes(encoded())
    (other / "back").symlink_to(photos)
    (photos / "linked").symlink_to(other)
    (photos / "linked again").symlink_to(other)
    (photos / "circle").symlink_to(".")
    (photos / "inside").symlink_to(next(each for each in photos.iterdir() if each.is_dir() and not each.is_symlink()))
    after = [record.where for record in read(str(photos), BadRows(0))]
    assert len(after) == len(before) + 1
    assert {*after} - before == {str(photos / "linked/deeper/there.png")}

    scan = os.scandir

    def refused(place: str) -> Any:  # root, whom a test may run as, reads everything
        if place.endswith("deeper"):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return scan(place)

    bad = BadRows()
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)
        assert {record.where for record in read(str(photos), bad)} == before
    assert bad.rows == [f"{photos / 'linked/deeper'}: the folder cannot be read: Permission denied"]

    with tarfile.open(photos / "old.tar", "w") as tar:
        tar.add(other / "deeper/there.png", "shot.png")
    bad = BadRows()
    assert [record.where for record in read(str(photos), bad)] == [f"{photos / 'old.tar'}:shot"]
    assert f"{len(after)} pictures beside shards are not read" in bad.rows[0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_report_bad_rows_with_file_and_line(photos: Path, suffix: str) -> None:
    rows = [
        {"path": "dogs/1.jpg", "caption": "a dog"},
        {"path": "dogs/absent.jpg", "caption": "no such file"},
        {"path": "", "caption": "no path"},
        {"path": "red_cats/0.jpg", "caption": "a cat"},
    ]
    table = photos / f"table{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "caption"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    bad = BadRows()
    _, kept = decode(read(str(table), bad), 16, bad)
    assert [record.captions for record in kept] == [["a dog"], ["a cat"]]
    assert len(bad.rows) == (3 if suffix == ".jsonl" else 2)
    assert all(f"table{suffix}:" in row for row in bad.rows)
    with pytest.raises(DataError, match="--max-bad"):
        decode(read(str(table), strict := BadRows(limit=0)), 16, strict)


def test_what_is_not_utf8_is_a_bad_row(photos: Path) -> None:
    (photos / "dogs" / "2.txt").write_bytes("ein Bär".encode("latin-1"))
    bad = BadRows()
    assert len(list(read(str(photos), bad))) == 2
    assert f"{photos}/dogs/2.jpg: its captions, 2.txt, cannot be read as UTF-8" in bad.rows[0]
    (photos / "t.csv").write_bytes("path,caption\na.jpg,ein Bär\nb.jpg,\U0001f43b\n".encode())
    (photos / "latin.csv").write_bytes("path,caption\na.jpg,ein Bär\nb.jpg,a bear\n".encode("latin-1"))
    (photos / "latin.jsonl").write_bytes(
        '{"path": "a.jpg", "caption": "B\xe4r"}\n{"path": "b.jpg", "caption": "c"}\n'.encode("latin-1")
    )
    for name, good, rows in (("t.csv", 2, []), ("latin.csv", 1, [2]), ("latin.jsonl", 1, [1])):
        assert len(list(read(str(photos / name), bad := BadRows()))) == good
        assert bad.rows == [f"{photos / name}:{row}: not UTF-8; save the table in that encoding" for row in rows]


def test_a_quote_that_never_ends_is_a_bad_row(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('path,caption\na.jpg,one\nb.jpg,"' + "x" * 200_000 + "\nc.jpg,three\n")
    bad = BadRows()
    assert next(read(str(table), bad)).captions == ["one"]
    list(read(str(table), bad))
    assert "field larger than field limit" in bad.rows[0]


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_shards(tmp_path: Path, encoded: Encoded, name: str) -> None:
    members = {
        "a.jpg": encoded(1),
        "a.json": json.dumps({"captions": ["one", "two"], "split": "train"}).encode(),
        "b.png": encoded(2, "PNG"),
        "b.txt": b"three",
        "c.json": b"{}",
        "d.jpg": b"not a picture",
        "d.cls": b"broken",
        "e.gif": encoded(3, "GIF"),
        "e.json": json.dumps({"captions": "no list"}).encode(),
    }
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    bad = BadRows()
    _, kept = decode(read(str(tmp_path / name), bad), 16, bad)
    assert [record.captions for record in kept] == [["one", "two"], ["three"], ["no list"]]
    assert len(bad.rows) == 2
    records = list(read(str(tmp_path), BadRows(), "train"))
    assert [record.meta["key"] for record in records] == ["a", "b", "d", "e"]
    # Of a plain archive nothing but the texts is held.
    assert all(isinstance(record.image, Member if name == "shard.tar" else bytes) for record in records)
    assert [file_bytes(record.image) for record in records] == [
        members[f] for f in ("a.jpg", "b.png", "d.jpg", "e.gif")
    ]  # type: ignore[arg-type]


def test_broken_archives_and_unknown_specs_name_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar")
    for spec, message in ((str(tmp_path / "x.tar"), "tar archive"), ("nowhere", "torchvision:<name>")):
        with pytest.raises(DataError, match=message):
            list(read(spec, BadRows()))
    assert not list(read(str(tmp_path), bad := BadRows(limit=None)))
    assert f"{tmp_path}/x.tar: cannot be read as a tar archive" in bad.rows[0]
    with pytest.raises(DataError, match="no data set"):
        list(read("torchvision:NoSuchSet", BadRows()))


def test_torchvision_sets_by_name(tmp_path: Path) -> None:
    records = list(read("torchvision:FakeData", BadRows()))[:3]
    assert records[0].image.size == (224, 224)  # type: ignore[union-attr]


def test_what_does_not_fit_is_decoded_as_it_is_drawn(photos: Path) -> None:
    (photos / "dogs" / "3.jpg").write_bytes(b"broken")
    bad = BadRows()
    held, _ = open_source(str(photos), 16, BadRows())
    streamed, _ = open_source(str(photos), 16, bad, hold=0)
    assert isinstance(streamed, StreamSource)
    assert streamed.size() == 4
    images, texts = streamed.draw(np.array([0, 2, 2]), 16, np.random.default_rng(0))
    assert images.shape == (3, 3, 16, 16)
    assert texts == [["dogs"], ["red cats"], ["red cats"]]  # the broken row's turn is the next one's
    assert len(bad.rows) == 1
    assert held.size() == 3
    assert sorted(streamed.corpus())[0] == "a brown dog"


def test_weights_and_captions_of_sources(photos: Path) -> None:
    source, weight = open_source(f"{photos}=2.5", 16, BadRows())
    assert weight == 2.5
    assert source.size() == 3
    with pytest.raises(DataError, match="must be a number"):
        open_source("scenes=much", 16, BadRows())
    with pytest.raises(DataError, match="SEMBLANCE_DATA"):
        open_source("emoji", 16, BadRows(), "/no/such/folder")


def test_hub_sets_where_the_package_is_installed(
    monkeypatch: pytest.MonkeyPatch, picture: Callable[..., Image.Image]
) -> None:
    """The rows are those of `datasets`, from a stand-in for its one function: there is no hub to reach here."""
    rows = [{"image": picture(0), "text": "one"}, {"image": picture(1)}, {"image": picture(2), "label": 7}]
    loaded: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        loaded.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    bad = BadRows()
    assert [record.captions for record in read("hf:owner/name", bad)] == [["one"], ["7"]]
    assert loaded == [("owner/name", "train")]
    assert bad.rows[0].startswith("hf:owner/name[1]: no picture, or none of")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"semblance\[hub\]"):
        list(read("hf:owner/name", bad))


def test_a_collage_shows_two_pictures_and_goes_by_the_captions_of_both() -> None:
    """Rows of one grey value each: what a picture shows can be read off it."""
    values = torch.arange(1, 9, dtype=torch.uint8) * 20
    pictures = values.view(8, 1, 1, 1).expand(8, 3, 20, 20).contiguous()
    captions = [[f"{value}", f"grey {value}"] for value in values.tolist()]
    drawn = 0
    for seed in range(10):
        source = ArraySource("grey", pictures, captions, Augmentation(collage=0.5))
        images, texts = source.draw(np.arange(8), 20, np.random.default_rng(seed))
        for row, (image, own) in enumerate(zip(images, texts, strict=True)):
            shown, counts = image[0].unique(return_counts=True)
            share = (counts / 400)[shown == values[row]]
            assert {text.removeprefix("grey ") for text in own} == {str(value) for value in shown.tolist()}
            assert own[0] in captions[row]  # trained on a caption of the picture whose turn it is
            if len(shown) == 2:
                drawn += 1
                assert 0.35 <= float(share) <= 0.65
    assert 15 < drawn < 60


def test_a_weight_is_a_number_above_0_and_a_path_may_have_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "year=2020").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_and_weight("scenes") == ("scenes", None)
    assert name_and_weight("scenes=0.5") == ("scenes", 0.5)
    assert name_and_weight("year=2020") == ("year=2020", None)
    assert name_and_weight(f"{tmp_path}/year=2020=3") == (f"{tmp_path}/year=2020", 3.0)
    assert open_source("scenes=2", 8, BadRows())[1] == 2
    for wrong in ("scenes=0", "scenes=-1", "scenes=nan", "scenes=inf", "scenes=", "year=2021=x"):
        with pytest.raises(DataError, match="the weight after = must be a number above 0"):
            open_source(wrong, 8, BadRows())
