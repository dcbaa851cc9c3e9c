"""The store against a plain dict, by whatever order of calls hypothesis thinks of, closed and opened in between."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.collection import NewItem
from app.sqlite_collections import SQLiteCollections
from models.errors import InputError, NotFoundError

IDS = st.sampled_from([f"i{number}" for number in range(6)])
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
CAPTIONS = st.none() | st.text(LETTERS, max_size=20)
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
METADATA = st.dictionaries(st.text(LETTERS, min_size=1, max_size=5), VALUES | CAPTIONS, max_size=3)
VECTORS = st.lists(st.integers(-3, 3), min_size=4, max_size=4).filter(any)
ITEMS = st.tuples(IDS, CAPTIONS, METADATA, VECTORS)


class Store(RuleBasedStateMachine):
    """known: what the collection must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.known: dict[str, tuple[str | None, dict[str, Any], np.ndarray]] = {}

    @initialize(kind=st.sampled_from(["auto", "flat", "hnsw"]))
    def begin(self, kind: str) -> None:
        self.collections = SQLiteCollections(Path(self.folder.name))
        self.collections.create("mine", model="m", fingerprint="f", dimensions=4, index=kind)

    @property
    def mine(self) -> Any:
        return self.collections.get("mine")

    @rule(items=st.lists(ITEMS, min_size=1, max_size=4))
    def add(self, items: list[Any]) -> None:
        new = [NewItem("text", np.array(v, "f4"), id, caption, metadata) for id, caption, metadata, v in items]
        if len({id for id, *_ in items}) < len(items):
            with pytest.raises(InputError):
                self.mine.add(new)
            return
        assert self.mine.add(new) == [id for id, *_ in items]
        for id, caption, metadata, vector in items:
            unit = np.array(vector, "f4")
            self.known[id] = caption, metadata, unit / np.linalg.norm(unit)

    @rule(id=IDS)
    def delete(self, id: str) -> None:
        if self.known.pop(id, None) is None:
            with pytest.raises(NotFoundError):
                self.mine.delete(id)
        else:
            self.mine.delete(id)

    @rule()
    def open_again(self) -> None:
        self.collections.close()
        self.collections = SQLiteCollections(Path(self.folder.name))

    @rule(query=VECTORS, k=st.integers(1, 8))
    def search(self, query: list[int], k: int) -> None:
        unit = np.array(query, "f4")
        unit /= np.linalg.norm(unit)
        hits = self.mine.search(unit, k)
        scores = {id: float(vector @ unit) for id, (_, _, vector) in self.known.items()}
        assert len(hits) == min(k, len(scores))
        assert len({hit.item.id for hit in hits}) == len(hits)
        for hit, best in zip(hits, sorted(scores.values(), reverse=True), strict=False):
            assert hit.score == pytest.approx(scores[hit.item.id], abs=1e-5)
            assert hit.score == pytest.approx(best, abs=1e-5)

    @invariant()
    def holds_what_it_must(self) -> None:
        if not hasattr(self, "collections"):
            return
        items, vectors = self.mine.sample(100)
        found = {item.id: (item.caption, item.metadata) for item in items}
        assert found == {id: (caption, metadata) for id, (caption, metadata, _) in self.known.items()}
        for item, vector in zip(items, vectors, strict=True):
            assert np.allclose(vector, self.known[item.id][2], atol=1e-6)
        assert self.mine.coverage[0] == len(self.known)

    def teardown(self) -> None:
        if hasattr(self, "collections"):
            self.collections.close()
        self.folder.cleanup()


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
