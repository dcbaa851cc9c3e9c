"""Indexes: exact where they say so, near to it and complete where FAISS narrows them, and nothing deleted ever back."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from support import unit_rows, wait_for

from app import duplicates, graphs
from app import index as indexes
from app.collection import NewItem
from app.index import ExactIndex, GrowingIndex, SharedSearch, VectorIndex, make_index
from app.sqlite_collections import SQLiteCollections
from models.errors import DeadlineError, InputError

SIZE = 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs from some hundred vectors on."""
    monkeypatch.setattr(indexes, "_BUILD", 50)
    monkeypatch.setattr(indexes, "_STEP", 2)
    monkeypatch.setattr(indexes, "_LEAST", {"hnsw": 200, "ivfpq": 2_000})
    monkeypatch.setattr(indexes, "_AUTO", {"ivfpq": 2_500, "hnsw": 500})


def _built(kind: str, vectors: np.ndarray, snapshot: Path | None = None) -> GrowingIndex:
    index = make_index(kind, vectors.shape[1], np.arange(len(vectors)), vectors, snapshot)
    assert isinstance(index, GrowingIndex)
    index.wait()
    return index


def _ids(index: VectorIndex, query: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[int]:
    return [hit.id for hit in index.search(query[None], k, allowed)[0]]


def test_an_exact_index_agrees_with_a_loop_through_adds_removes_and_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_BLOCK", 64)  # so that several blocks are put together
    index, known = ExactIndex(8), dict[int, np.ndarray]()
    rng = random.Random(0)
    vectors, queries = unit_rows(300), unit_rows(20, 1)
    for step in range(30):
        fresh = list(range(step * 10, step * 10 + 10))
        index.add(np.array(fresh), vectors[fresh])
        known |= {i: vectors[i] for i in fresh}
        gone = rng.sample(sorted(known), min(len(known), rng.randrange(6)))
        index.remove(np.array([*gone, 99_999], np.int64))
        for i in gone:
            del known[i]
        allowed = None if step % 2 else rng.sample(sorted(known), len(known) // 2)
        k = rng.choice([1, 5, 1000])
        found = index.search(queries, k, None if allowed is None else np.array(allowed))
        for query, hits in zip(queries, found, strict=True):
            choice = known if allowed is None else allowed
            expected = sorted(choice, key=lambda i: (-float(known[i] @ query), i))[:k]
            assert [hit.id for hit in hits] == expected
            assert [hit.score for hit in hits] == pytest.approx([float(known[i] @ query) for i in expected], abs=1e-5)
    assert len(index) == len(known)


def test_equal_scores_come_by_id_wherever_the_cut_is() -> None:
    index = ExactIndex(8)
    same = np.repeat(unit_rows(1), 40, 0)
    index.add(np.random.default_rng(0).permutation(40), same)
    for k in (1, 7, 39, 100):
        assert _ids(index, same[0], k) == list(range(min(k, 40)))


@pytest.mark.parametrize("kind", ["flat", "auto", "hnsw", "ivfpq"])
def test_an_empty_index_and_wrong_vectors(kind: str) -> None:
    index = make_index(kind, 8)
    assert index.search(unit_rows(2), 3) == [[], []]
    assert index.search(unit_rows(1), 3, np.array([], np.int64)) == [[]]
    with pytest.raises(InputError, match="expected"):
        index.add(np.array([1]), unit_rows(1, size=4))
    with pytest.raises(InputError, match="finite"):
        index.search(np.full((1, 8), np.nan, np.float32), 1)
    assert (len(index), index.kind) == (0, "flat")
    with pytest.raises(InputError, match="auto, flat, hnsw, ivfpq"):
        make_index("annoy", 8)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "recall"), [("hnsw", 0.99), ("ivfpq", 0.9)])
def test_what_a_graph_finds_is_there_allowed_exactly_scored_complete_and_nearly_the_best(
    kind: str, recall: float
) -> None:
    rng = np.random.default_rng(2)
    centres = rng.integers(0, 60, 3040)  # in clusters, as what people have is
    everything = unit_rows(60, 0, SIZE)[centres] + 0.7 * unit_rows(3040, 1, SIZE)
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    vectors, late, queries = everything[:3000], everything[3000:], unit_rows(60, 0, SIZE)[:40]
    index = _built(kind, vectors)
    assert index.kind == kind
    removed = rng.permutation(3000)[:600]
    index.remove(removed)
    index.add(np.arange(3000, 3040), late)
    known = dict(enumerate(everything))
    for each in removed.tolist():
        del known[each]
    exact = make_index("flat", SIZE, np.array(list(known)), np.array(list(known.values())))
    for allowed in (None, rng.permutation(list(known))[:1500], rng.permutation(list(known))[:20]):
        for k in (1, 10, 100, 5000):
            right = total = 0
            for query, hits, best in zip(
                queries, index.search(queries, k, allowed), exact.search(queries, k, allowed), strict=True
            ):
                ids = [hit.id for hit in hits]
                assert len(set(ids)) == len(ids) == len(best)
                assert set(ids) <= (known.keys() if allowed is None else set(allowed.tolist()))
                assert [hit.score for hit in hits] == pytest.approx([float(known[i] @ query) for i in ids], abs=1e-5)
                assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.id))
                right += len(set(ids) & {hit.id for hit in best})
                total += len(best)
            assert right >= recall * total, f"k {k}, {None if allowed is None else len(allowed)} allowed"
    assert all(_ids(index, vector, 1) == [3000 + place] for place, vector in enumerate(late))


@pytest.mark.usefixtures("small")
def test_auto_goes_from_one_kind_to_the_next_and_back_and_misses_nothing_on_the_way() -> None:
    index, vectors = make_index("auto", SIZE), unit_rows(3000, 0, SIZE)
    assert isinstance(index, GrowingIndex)
    kinds = []
    for start in range(0, 3000, 100):
        ids = np.arange(start, start + 100)
        index.add(ids, vectors[ids])
        assert all(_ids(index, vectors[each], 1) == [each] for each in ids[::10].tolist())  # while it is built
        index.wait()
        kinds.append(index.kind)
    assert list(dict.fromkeys(kinds)) == ["flat", "hnsw", "ivfpq"]
    index.remove(np.arange(2900))
    index.wait()
    assert (index.kind, len(index)) == ("flat", 100)
    assert sorted(_ids(index, vectors[0], 1000)) == list(range(2900, 3000))


@pytest.mark.usefixtures("small")
def test_what_is_added_and_removed_while_a_graph_is_built_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, begun, go_on = unit_rows(600, 0, SIZE), threading.Event(), threading.Event()
    empty = graphs.empty

    def slow(*args: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return empty(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "empty", slow)
    index = make_index("hnsw", SIZE, np.arange(500), vectors[:500])
    assert isinstance(index, GrowingIndex)
    assert begun.wait(30)
    index.remove(np.arange(0, 500, 2))
    index.add(np.arange(500, 600), vectors[500:])
    assert _ids(index, vectors[550], 1) == [550]
    go_on.set()
    index.wait()
    assert index.kind == "hnsw"
    left = {*range(1, 500, 2), *range(500, 600)}
    assert set(_ids(index, vectors[0], 1000)) == left
    assert all((_ids(index, vectors[each], 1) == [each]) is (each in left) for each in range(0, 600, 7))


@pytest.mark.usefixtures("small")
def test_a_graph_that_cannot_be_built_leaves_searches_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(graphs, "empty", fail)
    vectors = unit_rows(300, 0, SIZE)
    index = _built("hnsw", vectors)
    assert index.kind == "flat"
    assert "stay exact" in caplog.text
    index.add(np.array([300]), unit_rows(1, 9, SIZE))
    assert _ids(index, vectors[7], 1) == [7]


class _Gpu:
    """A GPU as FAISS offers one, its work done by the processor. widths: of every search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: bool = True) -> None:
        self.widths: list[int] = []
        self.trained = 0

        def take(resources: object, device: int, index: Any, options: Any = None) -> Any:
            if options is None:
                self.trained += 1
                return index
            if not room:
                raise RuntimeError("out of memory")
            assert options.useFloat16
            copy = faiss.clone_index(index)

            def search(queries: np.ndarray, width: int, params: Any) -> Any:
                assert params.sel is None
                assert max(width, params.nprobe) <= 2048
                self.widths.append(width)
                return copy.search(queries, width, params=params)

            return SimpleNamespace(search=search)

        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        for name, stand_in in {
            "StandardGpuResources": SimpleNamespace,
            "GpuClonerOptions": SimpleNamespace,
            "index_cpu_to_gpu": take,
        }.items():
            monkeypatch.setattr(faiss, name, stand_in, raising=False)


@pytest.mark.usefixtures("small")
def test_codes_are_searched_on_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, vectors = _Gpu(monkeypatch), unit_rows(2_500, 0, SIZE)
    index = _built("ivfpq", vectors)
    assert gpu.trained == 1
    assert [_ids(index, vectors[each], 1) for each in range(9)] == [[each] for each in range(9)]
    assert gpu.widths == [256] * 9
    gpu.widths.clear()
    index.remove(np.arange(0, 1_000, 2))
    assert _ids(index, vectors[7], 1) == [7]
    assert not any(each < 1_000 and each % 2 == 0 for each in _ids(index, vectors[8], 30))
    index.add(np.array([8]), vectors[8:9])  # what comes back is found once
    assert _ids(index, vectors[8], 5).count(8) == 1
    assert gpu.widths == [512, 2 * 16 * 30, 512]
    assert set(_ids(index, vectors[7], 5, np.arange(500, 1_500))) <= set(range(500, 1_500))  # a GPU takes no selector
    assert len(gpu.widths) == 3


@pytest.mark.usefixtures("small")
def test_codes_that_have_no_room_on_a_gpu_are_searched_beside_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, vectors = _Gpu(monkeypatch, room=False), unit_rows(2_500, 0, SIZE)
    index = _built("ivfpq", vectors)
    assert index.kind == "ivfpq"
    assert "searched on the processor" in caplog.text
    assert _ids(index, vectors[7], 1) == [7]
    assert gpu.widths == []


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were built from nothing."""
    built, empty = [], graphs.empty

    def counted(kind: str, exact: ExactIndex, ids: np.ndarray) -> object:
        built.append(kind)
        return empty(kind, exact, ids)

    monkeypatch.setattr(graphs, "empty", counted)
    return built


@pytest.mark.usefixtures("small")
def test_a_snapshot_saves_the_building_and_forgets_what_was_deleted_since(tmp_path: Path, building: list[str]) -> None:
    vectors, place = unit_rows(500, 0, SIZE), tmp_path / "index" / "1"
    _built("hnsw", vectors, place).close()
    assert building == ["hnsw"]
    left = np.arange(30, 500)  # what went and came between the snapshot and the end is told by the store
    index = make_index(
        "hnsw", SIZE, np.append(left, 500), np.concatenate([vectors[left], unit_rows(1, 5, SIZE)]), place
    )
    assert (index.kind, building) == ("hnsw", ["hnsw"])
    assert _ids(index, unit_rows(1, 5, SIZE)[0], 1) == [500]
    assert not {*_ids(index, vectors[3], 20)} & set(range(30))
    assert all(_ids(index, vectors[each], 1) == [each] for each in range(30, 500, 9))
    index.close()


@pytest.mark.usefixtures("small")
def test_a_graph_is_asked_for_as_many_as_its_data_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no direction is preferred, 64 candidates have eight of the ten nearest among them."""
    monkeypatch.setattr(indexes, "_STEP", 0)  # the graph is followed whatever it costs
    easy = _built("hnsw", np.repeat(unit_rows(300, 0, SIZE), 2, 0) + 0.1 * unit_rows(600, 1, SIZE))
    assert easy._state.graph is not None
    assert easy._state.graph.breadth == 64
    place, vectors = tmp_path / "index" / "1", unit_rows(8000, 0, 256)
    index = _built("hnsw", vectors, place)
    assert index._state.graph is not None
    breadth = index._state.graph.breadth
    assert breadth > 64

    def recall() -> float:
        queries = unit_rows(50, 9, 256)
        return float(
            np.mean([len({*_ids(index, each, 10)} & {*_ids(index._exact, each, 10)}) / 10 for each in queries])
        )

    assert recall() > 0.93
    state = index._state
    index._state = replace(state, graph=replace(state.graph, breadth=64))
    assert recall() < 0.87
    index.close()
    monkeypatch.setattr(graphs, "breadth_of", lambda *_: pytest.fail("it is kept with the snapshot"))
    again = make_index("hnsw", 256, np.arange(8000), vectors, place)
    assert isinstance(again, GrowingIndex)
    assert again._state.graph is not None
    assert again._state.graph.breadth == breadth
    again.close()


@pytest.mark.usefixtures("small")
def test_a_search_that_a_graph_would_make_slower_looks_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    index = _built("hnsw", unit_rows(500, 0, SIZE))
    followed: list[int] = []
    real = graphs.candidates

    def counted(*arguments: Any) -> Any:
        followed.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(graphs, "candidates", counted)
    for k in (10, 62, 63):  # of 4 k candidates each
        _ids(index, unit_rows(1, 1, SIZE)[0], k)
    assert followed == [10, 62]
    monkeypatch.setattr(indexes, "_STEP", 8)
    _ids(index, unit_rows(1, 1, SIZE)[0], 10)
    assert followed == [10, 62]
    index.close()


@pytest.mark.usefixtures("small")
def test_a_few_items_that_are_replaced_again_and_again_do_not_wear_a_graph(building: list[str]) -> None:
    index = _built("hnsw", unit_rows(300, 0, SIZE))
    for row in range(300, 700):
        index.add(np.array([row]), unit_rows(1, row, SIZE))
        if row > 300:
            index.remove(np.array([row - 1]))
    index.wait()
    assert (building, len(index), index.indexed) == (["hnsw"], 301, 300)
    assert _ids(index, unit_rows(1, 699, SIZE)[0], 1) == [699]
    index.close()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _forget(file: Path) -> None:
    file.unlink()


def _newer(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


def _empty_json(file: Path) -> None:
    file.write_text("{}")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(suffix, damage) for suffix in (".faiss", ".npy") for damage in (_flip, _cut, _forget)]
    + [(".json", damage) for damage in (_cut, _newer, _empty_json)],
)
def test_row_37_a_damaged_snapshot_is_noticed_dropped_and_made_again(
    tmp_path: Path, building: list[str], caplog: pytest.LogCaptureFixture, suffix: str, damage: Callable[[Path], None]
) -> None:
    vectors, place = unit_rows(300, 0, SIZE), tmp_path / "1"
    _built("hnsw", vectors, place).close()
    damage(place.with_suffix(suffix))
    index = _built("hnsw", vectors, place)
    assert "dropped and will be built again" in caplog.text
    assert (index.kind, building) == ("hnsw", ["hnsw", "hnsw"])
    assert all(_ids(index, vectors[each], 1) == [each] for each in range(0, 300, 9))
    make_index("hnsw", SIZE, np.arange(300), vectors, place).close()
    assert len(building) == 2  # the new one is whole


@pytest.mark.usefixtures("small")
def test_a_snapshot_of_another_store_is_dropped(
    tmp_path: Path, building: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As after the database alone was restored from a backup, and went on with numbers that it had given before."""
    vectors, place = unit_rows(300, 0, SIZE), tmp_path / "1"
    _built("hnsw", vectors, place).close()
    vectors[290] = unit_rows(1, 8, SIZE)[0]
    index = _built("hnsw", vectors, place)
    assert "other vectors" in caplog.text
    assert building == ["hnsw", "hnsw"]
    assert _ids(index, vectors[290], 1) == [290]


def test_searches_that_meet_are_made_as_one_and_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, index = unit_rows(200), ExactIndex(8)
    index.add(np.arange(200), vectors)
    begun, go_on, sizes = threading.Event(), threading.Event(), []
    exact = index.search

    def slow(queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[list[indexes.Hit]]:
        sizes.append(len(queries))
        begun.set()
        assert go_on.wait(30)
        return exact(queries, k, allowed)

    monkeypatch.setattr(index, "search", slow)
    shared, found = SharedSearch(index), dict[int, list[int]]()

    def search(each: int) -> None:
        found[each] = [hit.id for hit in shared.search(vectors[[each]], each % 3 + 1)[0]]

    threads = [threading.Thread(target=search, args=(each,)) for each in range(20)]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(shared._asked) == 19)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sizes == [1, 19]
    for each, ids in found.items():
        assert ids == [hit.id for hit in exact(vectors[[each]], each % 3 + 1)[0]]


def test_a_search_that_fails_fails_for_all_that_shared_it_and_the_next_goes_through() -> None:
    index = ExactIndex(8)
    index.add(np.arange(5), unit_rows(5))
    shared = SharedSearch(index)
    with pytest.raises(InputError, match="expected"):
        shared.search(unit_rows(1, size=4), 1)
    index._ids = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        shared.search(unit_rows(1), 1)
    index._ids = np.arange(16)
    assert len(shared.search(unit_rows(1), 3)[0]) == 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_duplicates_are_grouped_as_by_a_loop_over_all_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_PART", 64)
    rng, centres = np.random.default_rng(0), unit_rows(300, 0, SIZE)
    sizes = np.array([40, 7, 3, 2, 2, *[1] * 295])  # a group of 40 is more than the neighbours of one item
    vectors = np.repeat(centres, sizes, 0) + rng.uniform(0, 0.05, (sizes.sum(), 1)) * unit_rows(sizes.sum(), 1, SIZE)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[rng.permutation(sizes.sum())].astype("f4")
    index = make_index(kind, SIZE, np.arange(len(vectors)), vectors)
    if isinstance(index, GrowingIndex):
        index.wait()
    assert index.kind == kind
    threshold = 0.99
    near = vectors @ vectors.T >= threshold
    reached = np.linalg.matrix_power(near.astype(np.int64), 8) > 0
    expected = sorted({tuple(np.flatnonzero(row)) for row in reached if row.sum() > 1}, key=lambda g: (-len(g), g[0]))
    found = duplicates.duplicate_groups(index, threshold, None, lambda: None)
    assert [tuple(sorted(each for each, _ in group)) for group in found] == expected
    assert len(found[0]) > 16
    for group in found:
        assert group[0][0] == min(each for each, _ in group)
        assert [score for _, score in group[1:]] == sorted((score for _, score in group[1:]), reverse=True)
        assert all(
            score == pytest.approx(float(vectors[each] @ vectors[group[0][0]]), abs=1e-6) for each, score in group
        )
    only = duplicates.duplicate_groups(index, threshold, np.array(expected[0][:5]), lambda: None)
    assert [{each for each, _ in group} for group in only] == [set(expected[0][:5])]

    def stop() -> None:
        raise DeadlineError("enough")

    with pytest.raises(DeadlineError, match="enough"):
        duplicates.duplicate_groups(index, threshold, None, stop)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_groups_behind_more_copies_than_an_item_has_neighbours_are_one(kind: str) -> None:
    """a and b in 40 copies each, and c, d, e around each of 90 unequal ones, which are near to one another."""
    rng = np.random.default_rng(0)
    a, b, *centres = unit_rows(5, 0, SIZE)
    b = a + 0.1 * b / np.linalg.norm(b)
    clouds = [centre + 0.02 * offset for centre in centres for offset in unit_rows(90, 1, SIZE)]
    bridges = [centre + 0.05 * offset for centre, offset in zip(centres, unit_rows(3, 2, SIZE), strict=True)]
    vectors = np.array([*[a] * 40, *[b] * 40, *clouds, *bridges], np.float32)[rng.permutation(80 + 270 + 3)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = make_index(kind, SIZE, np.arange(len(vectors)), vectors)
    if isinstance(index, GrowingIndex):
        index.wait()
    found = duplicates.duplicate_groups(index, 0.99, None, lambda: None)
    assert sorted(map(len, found)) == [80, 91, 91, 91]


@pytest.mark.usefixtures("small")
def test_a_collection_keeps_its_kind_and_its_snapshot_goes_with_it(tmp_path: Path, building: list[str]) -> None:
    vectors = unit_rows(260, 0, SIZE)
    with SQLiteCollections(tmp_path) as collections:
        made = collections.create("c", model="m", fingerprint="f", dimensions=SIZE, index="hnsw")
        for start in range(0, 260, 52):
            made.add([NewItem("text", vectors[i], f"i{i}", f"c{i}") for i in range(start, start + 52)])
        made._index.wait()  # type: ignore[attr-defined]
        made.delete("i7")
        assert made.info().index == "hnsw"
    (tmp_path / "index" / "99.faiss").write_text("of a collection that is no more")
    with SQLiteCollections(tmp_path) as collections:
        made = collections.get("c")
        assert (made.info().index, made.info().count, building) == ("hnsw", 259, ["hnsw"])
        assert [made.search(vectors[i], 1)[0].item.id for i in (0, 100, 259)] == ["i0", "i100", "i259"]
        assert "i7" not in {hit.item.id for hit in made.search(vectors[7], 300)}
        assert {file.stem for file in (tmp_path / "index").iterdir()} == {str(made.key)}
        collections.delete("c")
        assert not list((tmp_path / "index").iterdir())
