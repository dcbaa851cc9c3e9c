"""What every store promises: all or nothing, there after a restart, shown to nobody before and to all after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import new_item, unit_rows

from app.collection import Among, Collection
from app.collections import Collections
from app.filters import Condition
from app.postgres_collections import PostgresCollections
from app.sqlite_collections import SQLiteCollections
from models.errors import ConflictError, InputError, NotFoundError

Open = Callable[[], Collections]


@pytest.fixture(params=["sqlite", "postgres", "milvus"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a store that is empty at first; all that is asked of it is asked of each kind."""
    if request.param == "sqlite":
        return lambda: SQLiteCollections(tmp_path / "data")
    url = request.getfixturevalue("postgres").database()
    milvus = request.getfixturevalue("milvus").uri if request.param == "milvus" else None
    return lambda: PostgresCollections(url, milvus=milvus)


def _create(collections: Collections, name: str = "c") -> Collection:
    return collections.create(name, model="m", fingerprint="f", dimensions=8)


def _kept(collections: Collections) -> list[bytes]:
    """The pictures that are in the store."""
    if isinstance(collections, SQLiteCollections):
        return [path.read_bytes() for path in (collections.folder / "pictures").rglob("*") if path.is_file()]
    assert isinstance(collections, PostgresCollections)
    found = collections._postgres.run(lambda connection: connection.execute("SELECT content FROM pictures").fetchall())
    return [content for (content,) in found]


def test_everything_is_there_after_a_restart(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        assert made.add([new_item(i) for i in range(20)]) == [f"i{i}" for i in range(20)]
        made.add([new_item(3, vector=unit_rows(1, 100)[0], caption="new")])
        made.delete("i7")
        before = made.search(unit_rows(1, 5)[0], 100)
        info = made.info()
    with opened() as collections:
        again = collections.get("c")
        after = again.search(unit_rows(1, 5)[0], 100)
        assert [hit.item for hit in after] == [hit.item for hit in before]
        # A row that has moved may be summed in another order.
        assert [hit.score for hit in after] == pytest.approx([hit.score for hit in before], abs=1e-6)
        assert again.info() == info
        assert again.info().count == 19
        assert again.get("i3").caption == "new"
        assert again.picture("i4") == b"picture 1"
        with pytest.raises(NotFoundError, match="holds 19"):
            again.get("i7")


def test_a_batch_is_stored_whole_or_not_at_all(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        for wrong, message in (
            ([new_item(1), new_item(2, vector=np.zeros(8, np.float32))], "zero"),
            ([new_item(1), new_item(2, vector=np.full(8, np.nan, np.float32))], "not finite"),
            ([new_item(1), new_item(2, vector=np.ones(4, np.float32))], "shape"),
            ([new_item(1), new_item(2), new_item(1)], "given twice"),
        ):
            with pytest.raises(InputError, match=message) as caught:
                made.add(wrong)
            assert caught.value.index == len(wrong) - 1
        assert made.info().count == 0
        assert made.add([]) == []


def test_replacing_leaves_one_row_and_unused_pictures_go(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        made.add([new_item(0), new_item(1), new_item(3)])  # 0 and 3 share their picture
        made.delete("i0")
        assert made.picture("i3") == b"picture 0"
        made.add([new_item(3, picture=b"other"), new_item(1, kind="text", picture=None)])
        assert _kept(collections) == [b"other"]
        assert made.info().count == 2
        collections.delete("c")
        assert not _kept(collections)
        assert collections.names() == []


def test_what_is_written_to_a_deleted_collection_is_refused(opened: Open) -> None:
    with opened() as collections:
        made, other = _create(collections), _create(collections, "other")
        collections.delete("c")
        with pytest.raises(NotFoundError, match="has been deleted"):
            made.add([new_item(1)])
        other.add([new_item(1)])
        assert other.info().count == 1


def test_a_replaced_item_is_never_missed(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        made.add([new_item(1), new_item(2)])
        done, missed = threading.Event(), []

        def look() -> None:
            while not done.is_set():
                if {hit.item.id for hit in made.search(unit_rows(1)[0], 10)} != {"i1", "i2"}:
                    missed.append(1)
                if [hit.item.id for hit in made.search(unit_rows(1, 1)[0], 1)] != ["i1"]:
                    missed.append(2)

        reader = threading.Thread(target=look)
        reader.start()
        for _ in range(100):
            made.add([new_item(1)])
        done.set()
        reader.join()
        assert not missed


def test_names_models_and_missing_collections(opened: Open) -> None:
    with opened() as collections:
        first = _create(collections, "a")
        assert _create(collections, "a") is first
        with pytest.raises(ConflictError, match="model 'm'"):
            collections.create("a", model="n", fingerprint="g", dimensions=8)
        for name in ("", "../x", "a/b", ".hidden", "x" * 65, "ü"):
            with pytest.raises(InputError, match="name"):
                _create(collections, name)
        with pytest.raises(NotFoundError, match="there are: a"):
            collections.get("b")


def test_row_34_add_delete_and_search_at_once(opened: Open) -> None:
    """Row 34: an id is never returned after its delete was acknowledged."""
    with opened() as collections:
        made = _create(collections)
        made.add([new_item(i) for i in range(40)])
        failures: list[BaseException] = []
        deleted: set[str] = set()
        done = threading.Event()

        def change(offset: int) -> None:
            for i in range(offset, 40, 2):
                made.delete(f"i{i}")
                deleted.add(f"i{i}")
                made.add([new_item(100 + i)])

        def look() -> None:
            while not done.is_set():
                gone = set(deleted)
                found = {hit.item.id for hit in made.search(unit_rows(1)[0], 1000)}
                assert not found & gone

        def guarded(work: object, *args: object) -> None:
            try:
                work(*args)  # type: ignore[operator]
            except BaseException as error:
                failures.append(error)

        readers = [threading.Thread(target=guarded, args=(look,)) for _ in range(2)]
        writers = [threading.Thread(target=guarded, args=(change, offset)) for offset in range(2)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
        assert not failures
        assert made.info().count == 40


def test_a_search_finds_what_a_loop_finds(opened: Open) -> None:
    rng = np.random.default_rng(0)
    vectors, weights = unit_rows(300), rng.integers(0, 50, 300).tolist()
    kinds, words = rng.choice(["image", "text"], 300).tolist(), rng.choice(["1", "one", "eins"], 300).tolist()
    cases = [
        (lambda i: True, {}),
        (lambda i: kinds[i] == "text", {"target": "text"}),
        (lambda i: i in (3, 5, 250), {"ids": ["i3", "i5", "i250", "nowhere"]}),
        (lambda i: 10 <= weights[i] < 20, {"filters": [Condition("weight", bounds=((">=", 10), ("<", 20)))]}),
        (lambda i: words[i] in ("1", "eins"), {"filters": [Condition("word", ("1", "eins"))]}),
        (lambda i: weights[i] in (1, 7), {"filters": [Condition("weight", (1, 7.0))]}),
        (lambda i: words[i] >= "f", {"filters": [Condition("word", bounds=((">=", "f"),))]}),
        (lambda i: i % 2 == 0, {"filters": [Condition("even", (True,))]}),
        (lambda i: False, {"filters": [Condition("weight", ("one",))]}),
        (lambda i: False, {"filters": [Condition("elsewhere", (None,))]}),
        (lambda i: True, {"filters": [Condition("nothing", (None,))]}),
    ]
    with opened() as collections:
        made = _create(collections)
        for start in range(0, 300, 60):
            made.add(
                [
                    new_item(
                        i,
                        kind=kinds[i],
                        vector=vectors[i],
                        metadata={"weight": weights[i], "word": words[i], "even": i % 2 == 0, "nothing": None},
                    )
                    for i in range(start, start + 60)
                ]
            )
        for passes, options in cases:
            query = unit_rows(1, 1000)[0]
            among = [i for i in range(300) if passes(i)]
            order = sorted(among, key=lambda i: -float(vectors[i] @ query))
            for k, offset in ((7, 0), (5, 10), (1000, 0)):
                hits = made.search(query, k, offset=offset, **options)
                assert [hit.item.id for hit in hits] == [f"i{i}" for i in order[offset : offset + k]]
                expected = [float(vectors[i] @ query) for i in order[offset : offset + k]]
                assert [hit.score for hit in hits] == pytest.approx(expected, abs=1e-6)
        best = {weights[i]: i for i in sorted(range(300), key=lambda i: float(vectors[i] @ query))}
        grouped = made.search(query, 1000, group_by="weight")
        assert {hit.item.id for hit in grouped} == {f"i{i}" for i in best.values()}


def test_metadata_comes_back_as_it_was_written(opened: Open) -> None:
    metadata = {
        "z": 1,
        "a": 1.0,
        "large": 1e22,
        "exact": 0.1,
        "long": 12345678901234567890,
        "": "",
        "ü\n": [],
        "b": None,
    }
    with opened() as collections:
        _create(collections).add([new_item(1, metadata=metadata)])
        found = collections.get("c").get("i1").metadata
    assert repr(found) == repr(metadata)


def test_pages_vectors_and_samples(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        names = ["a", "B", "ä", "Z", "0", "_", "aa", "~"]
        made.add([new_item(i, id=name) for i, name in enumerate(names)])
        assert [item.id for item in made.page(100)] == sorted(names)
        assert [item.id for item in made.page(3, after="Z")] == ["_", "a", "aa"]
        assert [item.id for item in made.page(2, among=Among(ids=["ä", "B", "nowhere"]))] == ["B", "ä"]
        assert made.vectors(["Z", "a"]) == pytest.approx(np.stack([unit_rows(1, i)[0] for i in (3, 0)]), abs=1e-6)
        with pytest.raises(NotFoundError, match="'nowhere'"):
            made.vectors(["a", "nowhere"])
        items, vectors = made.sample(4)
        assert [item.id for item in items] == ["a", "ä", "0", "aa"]
        assert vectors == pytest.approx(np.stack([unit_rows(1, i)[0] for i in (0, 2, 4, 6)]), abs=1e-6)
        shown = made.page_with_vectors(2, after="Z", among=Among(ids=["ä", "B", "a", "_", "aa"]))
        assert [item for item, _ in shown] == [made.get("_"), made.get("a")]
        assert np.array_equal([vector for _, vector in shown], made.vectors(["_", "a"]))
        assert made.page_with_vectors(2, after="ä") == []


def test_duplicates_and_statistics(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        made.add([new_item(i, kind="text" if i % 5 == 4 else "image") for i in range(20)])
        made.add([new_item(50 + i, vector=unit_rows(1, i)[0], metadata={"i": "word"}) for i in range(3)])
        total, groups = made.duplicates(0.999, 2)
        assert total == 3
        assert [[hit.item.id for hit in group] for group in groups] == [["i0", "i50"], ["i1", "i51"]]
        found = made.statistics()
        assert found["kinds"] == {"image": 19, "text": 4, "pictures": 3}
        frequent = [{"value": "word", "items": 3}]
        assert found["metadata"] == [{"key": "i", "items": 23, "values": 21, "min": 0, "max": 19, "frequent": frequent}]
        assert found["cosines"]["nearest"]["p50"] > found["cosines"]["random"]["p50"]


def test_one_takes_another_s_place_only_when_it_lacks_nothing(opened: Open) -> None:
    with opened() as collections:
        made = _create(collections)
        made.add([new_item(i) for i in range(10)])
        staged = collections.stage("c", "n", "g", 8)
        assert collections.staged("c") is staged
        assert collections.names() == ["c"]
        assert [item.id for item in collections.lacking("c", "", 3)] == ["i0", "i1", "i2"]
        staged.add([new_item(i, vector=unit_rows(1, 100 + i)[0]) for i in range(9)] + [new_item(77)])
        assert [item.id for item in collections.lacking("c", "", 100)] == ["i9"]
        assert not collections.switch("c")
        staged.add([new_item(9, vector=unit_rows(1, 109)[0])])
        made.add([new_item(3, caption="another")])
        assert [item.id for item in collections.lacking("c", "", 100)] == ["i3"]
        staged.add([new_item(3, caption="another", vector=unit_rows(1, 103)[0])])
        assert collections.switch("c")
        now = collections.get("c")
        assert (now.model, now.info().count, collections.staged("c")) == ("n", 10, None)
        assert [hit.item.id for hit in now.search(unit_rows(1, 104)[0], 1)] == ["i4"]
        with pytest.raises(NotFoundError):
            made.add([new_item(11)])
        collections.stage("c", "m", "f", 8)
        collections.unstage("c")
        assert collections.staged("c") is None
        assert now.picture("i4") == b"picture 1"


def test_writers_of_the_same_items_leave_each_whole(opened: Open) -> None:
    """However they meet, an id has one row, with the picture and the vector of one of them."""
    with opened() as collections:
        made, failures = _create(collections), list[BaseException]()

        def write(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(15):
                    ids = rng.permutation(12)[:6].tolist()
                    made.add([new_item(i, vector=unit_rows(1, seed)[0], picture=b"of %d" % seed) for i in ids])
                    try:
                        made.delete(f"i{ids[0]}")
                    except NotFoundError:
                        continue
            except BaseException as error:
                failures.append(error)

        writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failures
        there = made.page(100)
        assert made.info().count == len(there) == len({item.id for item in there})
        for item, vector in made.page_with_vectors(100):
            seed = int(made.picture(item.id).split()[-1])
            assert vector == pytest.approx(unit_rows(1, seed)[0], abs=1e-6)
        assert {hit.item.id for hit in made.search(unit_rows(1)[0], 100)} == {item.id for item in there}
        assert sorted(set(_kept(collections))) == sorted({made.picture(item.id) for item in there})


def test_thumbnails_are_kept_and_go_with_their_picture(opened: Open) -> None:
    made = list[bytes]()

    def make(picture: bytes) -> bytes:
        made.append(picture)
        return b"small " + picture + b"\xff\xd9"

    with opened() as collections:
        collection = _create(collections)
        collection.add([new_item(1)])
        for _ in range(3):
            assert collection.picture("i1", 64, make) == b"small picture 1\xff\xd9"
        collection.picture("i1", 65, make)  # a size nobody asks for often is made, and not kept
        collection.picture("i1", 65, make)
        assert len(made) == 3
        collection.delete("i1")
        assert not _kept(collections)
        collection.add([new_item(1)])
        collection.picture("i1", 64, make)
        assert len(made) == 4
