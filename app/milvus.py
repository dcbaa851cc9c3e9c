"""Vectors in Milvus, for collections that no memory of one machine holds; the truth is elsewhere
(app/reconciliation.py).

What was found of the servers it speaks to: milvus-lite (a folder, or a process of `python -m milvus_lite`) has FLAT and
HNSW and no IVF_PQ, which it takes and then never builds, pages without order unless it is told "iterator". A server
(2.3) waits up to 0.2 s at a Strong call for its clock; many searches at once wait together. A Bounded one sees what is
some seconds old (`common.gracefulTime`, 5 by itself) and does not wait.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.index import KINDS, ExactIndex, Ids, Vectors, checked_rows
from models.errors import ConflictError, InputError, StorageError
from models.retrieval import Hit

T = TypeVar("T")

_TYPES = {"flat": "FLAT", "hnsw": "HNSW", "ivfpq": "IVF_PQ"}
_MOST = 16_384  # candidates that Milvus gives to one query, and rows to one page
# Ids in one expression. 10,000 are read in some milliseconds, and from 50,000 on the reading is what takes the time.
_CHUNK = 8_192
_MESSAGE = 16 << 20  # bytes of vectors in one message, of the 64 MiB that a server takes
_ROUNDING = 1e-5  # by how much Milvus' scores may differ from ours
_STALE = 10.0  # seconds after which a Bounded call sees a write, twice what Milvus says
STARTING = 60.0  # seconds in which a Milvus must be there that is started beside us
_MISSING, _RELEASED = 100, 101  # Milvus' codes for a collection that is not there, and for one that is not loaded


class _WentError(Exception):
    """Something that was found has been removed before it was read. It may have been replaced, and what took its place
    is found by another look alone."""


class MilvusIndex:
    """A VectorIndex in a collection of Milvus: `row`, the key, and `vector`. Whatever was written is found.

    Milvus says where to look, and what it names is scored here by the vectors that it keeps, so scores are cosines of
    float32 and equal ones come by id whatever it searches by. Every call may be made twice (upsert, delete by key,
    search), so one that fails is made again until `patience` is over, as long as a server takes to start again.

    written: a number that grows with every write of any process, once Milvus has it and before whoever waits for it is
    answered. Searches wait for Milvus' clock while it grows and for some seconds after, or always where it is None.
    """

    written: Callable[[], int] | None = None

    def __init__(
        self,
        uri: str,
        name: str,
        dimensions: int,
        kind: str = "auto",
        patience: Callable[[], float] = lambda: STARTING,
    ) -> None:
        """uri: http://HOST:PORT of a server, or a file NAME.db for milvus-lite. kind: as make_index takes it; "auto" is
        what is there, or "hnsw". Graphs hold every vector in Milvus' memory, "ivfpq" a sixteenth of the bytes.
        patience: gives seconds, for each call anew.

        Raises InputError for a kind that the server does not have, ConflictError for a collection that was made
        otherwise, StorageError for a server that does not answer; so do all methods.
        """
        if kind not in KINDS:
            raise InputError(f"index {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        self.dimensions = dimensions
        self._seen = (-1, 0.0)  # what `written` was, and since when
        self._uri, self._name, self._patience = uri, name, patience
        self._milvus = _pymilvus()
        self._client: Any = self._retried(partial(self._milvus.MilvusClient, uri))
        self.kind = self._opened(kind)
        self._call("load_collection", name)

    def __len__(self) -> int:
        return self._count("Strong")

    @property
    def indexed(self) -> int:
        """How many vectors of sealed segments have their graph or codes; Milvus looks at the others one by one."""
        if self.kind == "flat":
            return 0
        return min(len(self), int(self._call("describe_index", self._name, "vector")["indexed_rows"]))

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """ids (N,), vectors (N, D); an id that is there is replaced. What fails half way may be in part there."""
        vectors = checked_rows(vectors, self.dimensions)
        for part in self._parts(len(ids)):
            pairs = zip(ids[part].tolist(), vectors[part], strict=True)
            self._call("upsert", self._name, [{"row": row, "vector": vector} for row, vector in pairs])

    def remove(self, ids: Ids) -> None:
        """Forget these; unknown ids are passed over."""
        for chunk in _chunks(ids):
            self._call("delete", self._name, ids=chunk.tolist())

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        """As VectorIndex.search.

        Up to 8,192 allowed ids are an expression. More are first looked for among more candidates, as many as twice k
        allowed ones should be among, and only where that falls short in expressions of 8,192 each, one after
        another. A query for more than Milvus gives, 16,384, is answered by all vectors, a page at a time.
        """
        queries, level = checked_rows(queries, self.dimensions), self._level()
        while True:
            with suppress(_WentError):
                return self._search(queries, k, allowed, level)
            level = "Strong"

    def _search(self, queries: Vectors, k: int, allowed: Ids | None, level: str) -> list[list[Hit]]:
        """As `search`. Raises _WentError if something was removed between being named and being read."""
        found: list[list[Hit]] = [[] for _ in queries]
        left = np.arange(len(queries))
        limit = self._width(k) if allowed is None else _MOST + 1
        if allowed is not None and len(allowed) > _CHUNK:
            limit = self._width(max(k, 2 * k * self._count(level) // len(allowed)))
        while len(left) and limit <= _MOST:
            near, complete = self._near(queries[left], k, limit, level, allowed=allowed)
            for place, hits in zip(left.tolist(), near, strict=True):
                found[place] = hits
            left = left[~complete]
            limit = _MOST if limit < _MOST < 4 * limit else 4 * limit
        if len(left):
            named = allowed is None  # by Milvus, else by who asks, and some may never have been there
            chunks = self.pages(level=level) if allowed is None else _chunks(allowed)
            among = self._among(queries[left], k, chunks, named, level)
            for place, hits in zip(left.tolist(), among, strict=True):
                found[place] = hits
        return found

    def ids(self) -> Ids:
        """Every id, ascending."""
        return np.concatenate([np.empty(0, np.int64), *self.pages()])

    def pages(self, last: int | None = None, level: str = "Strong") -> Iterator[Ids]:
        """Every id up to `last`, ascending, in arrays of at most 8,192; what comes or goes meanwhile may be in it."""
        # As pymilvus' own iterator asks, but every page by itself, so that each may be asked for again.
        options: dict[str, Any] = {"limit": _CHUNK, "iterator": "True", "reduce_stop_for_best": "True"}
        upto, within = ("", "") if last is None else (f" and row <= {last}", f"row <= {last}")
        while page := self._query(within, ["row"], level, **options):
            keys = np.array([each["row"] for each in page], np.int64)
            yield keys
            within = f"row > {keys[-1]}{upto}"

    def vectors(self, ids: Ids) -> tuple[Ids, Vectors]:
        """Those of the ids that are there, in their order, with their vectors."""
        return self._vectors(ids, "Strong")

    def close(self) -> None:
        """Let go of the connection; Milvus goes on building."""
        self._client.close()

    def drop(self) -> None:
        """Delete the collection of Milvus, and close."""
        self._call("drop_collection", self._name)
        self.close()

    def _opened(self, kind: str) -> str:
        """Make the collection and its index where they are not there yet. -> the kind it has."""
        if kind == "ivfpq" and self._call("get_server_version").startswith("milvus_lite"):
            raise InputError(f"milvus-lite at {self._uri} has no index 'ivfpq'; choose flat or hnsw, or run a server")
        types = self._milvus.DataType
        if not self._call("has_collection", self._name):  # and another may make it meanwhile
            schema = self._milvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("row", types.INT64, is_primary=True)
            schema.add_field("vector", types.FLOAT_VECTOR, dim=self.dimensions)
            make = partial(self._client.create_collection, self._name, schema=schema, consistency_level="Strong")
            self._retried(lambda timeout: self._client.has_collection(self._name) or make(timeout=timeout))
        fields = {each["name"]: each for each in self._call("describe_collection", self._name)["fields"]}
        size = fields.get("vector", {}).get("params", {}).get("dim")
        if fields.keys() != {"row", "vector"} or int(size) != self.dimensions:
            raise ConflictError(
                f"collection {self._name!r} of Milvus at {self._uri} has fields {', '.join(fields)} and vectors of "
                f"{size} numbers, not row, vector and {self.dimensions}; drop it, or give another name"
            )
        wanted = "hnsw" if kind == "auto" else kind
        if not self._call("list_indexes", self._name):
            index = self._milvus.MilvusClient.prepare_index_params()
            options = _options(wanted, self.dimensions)
            index.add_index("vector", _TYPES[wanted], "vector", metric_type="IP", params=options)
            build = partial(self._client.create_index, self._name, index)
            self._retried(lambda timeout: self._client.list_indexes(self._name) or build(timeout=timeout))
        built = self._call("describe_index", self._name, "vector")["index_type"]
        if kind != "auto" and built != _TYPES[kind]:
            raise ConflictError(
                f"collection {self._name!r} of Milvus at {self._uri} has an index {built}, not {_TYPES[kind]}; "
                "drop it and let it be filled again"
            )
        return next(known for known, name in _TYPES.items() if name == built)

    def _near(
        self, queries: Vectors, k: int, limit: int, level: str, *, among: Ids | None = None, allowed: Ids | None = None
    ) -> tuple[list[list[Hit]], NDArray[np.bool_]]:
        """The k best of `limit` candidates of each query, and whether there can be no better ones. among: an expression
        narrows the candidates to these, of which there are no fewer than `limit`. allowed: others are passed over."""
        options = {
            "limit": limit,
            "filter": "" if among is None else f"row in {among.tolist()}",
            "search_params": {"metric_type": "IP", "params": _search_options(self.kind, limit)},
            "consistency_level": level,
        }
        found: list[list[Hit]] = []
        complete: list[bool] = []
        at_once = max(1, _MESSAGE // (4 * self.dimensions * limit))
        for start in range(0, len(queries), at_once):
            block = queries[start : start + at_once]
            answers = self._call("search", self._name, block, **options)
            named = np.unique([row for answer in answers for row in answer.ids]).astype(np.int64)
            # Who has named them has them, so nothing need be waited for; another replica may not have them yet.
            candidates = self._candidates(named, "Eventually", "Strong")
            if len(candidates) < len(named):
                raise _WentError
            for answer, hits in zip(answers, candidates.search(block, k, allowed), strict=True):
                found.append(hits)
                complete.append(self._complete(answer, hits, k, limit, level, among is not None))
        return found, np.array(complete)

    def _candidates(self, ids: Ids, *consistencies: str) -> ExactIndex:
        """Those of the ids that are there, with their vectors; what is not found with one consistency by the next."""
        exact = ExactIndex(self.dimensions)
        for consistency in consistencies:
            exact.add(*self._vectors(np.setdiff1d(ids, exact.ids()), consistency))
        return exact

    def _complete(self, answer: Any, hits: list[Hit], k: int, limit: int, level: str, narrowed: bool) -> bool:
        """Whether what Milvus did not name cannot be among the k best; of approximate kinds, whether there are k."""
        if len(answer.ids) < limit and (
            self.kind == "flat" or (not narrowed and len(answer.ids) >= self._count(level))
        ):
            return True  # that is all there are
        if len(hits) < k:
            return False  # a filter, or the parts of a graph that no path leads to
        # Equal scores come by id, and at the cut Milvus takes any of them. Those of codes are no measure of it.
        return self.kind == "ivfpq" or answer.distances[-1] < hits[-1].score - _ROUNDING

    def _among(self, queries: Vectors, k: int, chunks: Iterable[Ids], named: bool, level: str) -> list[list[Hit]]:
        """The k best of each query among ids that come in chunks, of which none is too long for an expression. named:
        all of them were there."""
        best: list[list[Hit]] = [[] for _ in queries]
        for chunk in chunks:
            limit, complete = self._width(k), np.zeros(len(queries), bool)
            if limit < len(chunk):
                found, complete = self._near(queries, k, limit, level, among=chunk)
            if not complete.all():
                candidates = self._candidates(chunk, level, "Strong")
                if named and len(candidates) < len(chunk):
                    raise _WentError
                found = candidates.search(queries, k)
            best = [
                sorted(one + two, key=lambda hit: (-hit.score, hit.id))[:k]
                for one, two in zip(best, found, strict=True)
            ]
        return best

    def _vectors(self, ids: Ids, consistency: str) -> tuple[Ids, Vectors]:
        known: dict[int, Any] = {}
        for part in self._parts(len(ids)):
            page = self._query(f"row in {ids[part].tolist()}", ["row", "vector"], consistency)
            known |= {each["row"]: np.asarray(each["vector"], np.float32) for each in page}
        there = [each for each in ids.tolist() if each in known]
        rows = np.array([known[each] for each in there], np.float32).reshape(-1, self.dimensions)
        return np.array(there, np.int64), rows

    def _level(self) -> str:
        """The consistency with which all that was written is seen."""
        if self.written is None:
            return "Strong"
        written = self.written()
        if written != self._seen[0]:
            self._seen = written, time.monotonic()
        return "Strong" if time.monotonic() - self._seen[1] < _STALE else "Bounded"

    def _count(self, level: str) -> int:
        return int(self._query("", ["count(*)"], level)[0]["count(*)"])

    def _width(self, k: int) -> int:
        """Candidates to ask for at first: codes tell near ones apart badly, the others want a few for equal scores."""
        return max(256, 16 * k) if self.kind == "ivfpq" else k + 16

    def _parts(self, count: int) -> Iterator[slice]:
        """Rows in messages that a server takes."""
        size = max(1, min(_CHUNK, _MESSAGE // (4 * self.dimensions)))
        return (slice(start, start + size) for start in range(0, count, size))

    def _query(self, filter: str, fields: list[str], consistency: str = "Strong", **options: Any) -> Any:
        options |= {"filter": filter, "output_fields": fields, "consistency_level": consistency}
        return self._call("query", self._name, **options)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._retried(partial(getattr(self._client, method), *arguments, **options))

    def _retried(self, call: Callable[..., Any]) -> Any:
        """What a call of the client gives, made again while the server starts or cannot be reached."""
        grpc = importlib.import_module("grpc")
        patience, pause = self._patience(), 0.1
        end = time.monotonic() + patience
        while True:
            try:
                return call(timeout=max(0.1, end - time.monotonic()))
            except (self._milvus.MilvusException, grpc.RpcError) as error:
                # A server that starts has many words for it, so all but this one is taken for something that passes.
                if getattr(error, "code", None) == _MISSING:
                    gone = (
                        f"Milvus at {self._uri} has no collection {self._name!r} any more; open it again, and fill it"
                    )
                    raise StorageError(gone) from error
                if time.monotonic() + pause > end:
                    raise StorageError(
                        f"Milvus at {self._uri} did not answer in {patience:g} s: {error}; see that it runs and "
                        "that this machine reaches it"
                    ) from error
                if getattr(error, "code", None) == _RELEASED:  # as milvus-lite has it after each start
                    with suppress(self._milvus.MilvusException, grpc.RpcError):
                        self._client.load_collection(self._name, timeout=max(0.1, end - time.monotonic()))
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def collections_of(uri: str, prefix: str) -> set[str]:
    """The names of the collections there that begin so. Raises StorageError for a server that does not answer."""
    return {name for name in _asked(uri, lambda client: client.list_collections()) if name.startswith(prefix)}


def drop(uri: str, name: str) -> None:
    """Delete a collection there. Raises StorageError for a server that does not answer."""
    _asked(uri, lambda client: client.drop_collection(name))


def _asked(uri: str, question: Callable[[Any], T]) -> T:
    """What is asked once, when a server starts; it may be that Milvus is starting too."""
    milvus, end = _pymilvus(), time.monotonic() + STARTING
    while True:
        try:
            client = milvus.MilvusClient(uri, timeout=STARTING)
            try:
                return question(client)
            finally:
                client.close()
        except milvus.MilvusException as error:
            if time.monotonic() > end:
                raise StorageError(f"Milvus at {uri} does not answer: {error}; see that it runs") from error
        time.sleep(0.2)


def _chunks(ids: Ids) -> Iterator[Ids]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


def _options(kind: str, dimensions: int) -> dict[str, int]:
    """What a kind is built with, as app/index.py builds it; lists are those of one segment, of at most 1 GiB."""
    if kind == "hnsw":
        return {"M": 32, "efConstruction": 100}
    if kind == "ivfpq":
        codes = next(parts for parts in range(max(1, dimensions // 8), 0, -1) if dimensions % parts == 0)
        return {"nlist": 1024, "m": codes, "nbits": 8}
    return {}


def _search_options(kind: str, limit: int) -> dict[str, int]:
    """How widely a kind looks; ef must not be below the candidates that are asked for, nor above 32,768."""
    return {"flat": {}, "hnsw": {"ef": max(128, 2 * limit)}, "ivfpq": {"nprobe": 128}}[kind]


def _pymilvus() -> Any:
    """The client, which takes a while to import, and may not be there."""
    try:
        pymilvus = importlib.import_module("pymilvus")
    except ImportError:
        raise StorageError("collections in Milvus need its client: pip install 'semblance[milvus]'") from None
    # It logs whatever fails with a traceback, also what is tried again; what fails at last is raised.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    return pymilvus
