"""API keys: who may do what, and how often. Made and revoked by `semblance keys`; the data folder has their hashes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.inputs import Name
from app.settings import Settings
from models.errors import ConflictError, ForbiddenError, NotFoundError, RateLimitError, StorageError

log = logging.getLogger(__name__)

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")  # each may do what those before it may
FOLDER = "keys"  # of the data folder
_MINUTE = 60.0


class Key(BaseModel):
    """What is kept of a key, not the key itself. rate: requests a minute; concurrency: requests at once; None: any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    scope: Scope
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    rate: int | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, gt=0)
    created: str


class Keyring:
    """The keys of a folder, one file each, and those that the settings give, which may do everything.

    A running server sees a key come or go at the next request. Where there ever was a key, one is asked for: to revoke
    the last does not open the server.
    """

    def __init__(self, store: Path | None = None, given: Sequence[str] = ()) -> None:
        self.folder = None if store is None else store / FOLDER
        now = _now()
        self._given = [
            Key(name=f"settings-{place}", scope="admin", digest=_digest(token), created=now)
            for place, token in enumerate(given, 1)
        ]
        self._kept: list[Key] = []
        self._damaged: list[StorageError] = []
        self._seen: tuple[int, list[str]] | None = None
        self._required = bool(given)
        self._used: dict[str, _Use] = {}

    @property
    def required(self) -> bool:
        """Whether a request must bring a key."""
        self._look()
        return self._required

    def names(self) -> list[Key]:
        """The keys of the folder, by name. Raises StorageError, naming a file that is none."""
        self._look()
        for error in self._damaged:
            raise error
        return sorted(self._kept, key=lambda key: key.name)

    def find(self, token: str) -> Key | None:
        """The key that `token` is, if it is one."""
        self._look()
        # No salt and no slow hash: a token that was drawn from 256 bits cannot be guessed from its digest. No short cut
        # either: each key costs the same, whether or not an earlier one matched.
        digest = _digest(token)
        found = [key for key in (*self._given, *self._kept) if hmac.compare_digest(digest, key.digest)]
        return found[0] if found else None

    def create(
        self, name: str, scope: Scope = "read", *, rate: int | None = None, concurrency: int | None = None
    ) -> str:
        """Make a key and give it, the only time that it can be seen.

        Raises ConflictError if there is one of that name, pydantic's ValidationError for values that are out of range.
        """
        assert self.folder is not None  # noqa: S101 - a server's keyring alone has none, and makes no keys
        token = f"sem_{secrets.token_urlsafe(32)}"
        key = Key(name=name, scope=scope, digest=_digest(token), rate=rate, concurrency=concurrency, created=_now())
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.folder / f".{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(key.model_dump_json(indent=2))
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, self._file(name))  # whole or not at all, and never in place of another
        except FileExistsError:
            raise ConflictError(f"there is a key {name!r} already; revoke it first, or take another name") from None
        finally:
            draft.unlink(missing_ok=True)
        return token

    def revoke(self, name: str) -> None:
        """Forget a key; the next request that brings it is refused. Raises NotFoundError, naming those there are."""
        known = [key.name for key in self.names()]
        if name not in known:
            raise NotFoundError(f"no key {name!r}; there are: {', '.join(known) or 'none'}")
        self._file(name).unlink()

    @contextmanager
    def use(self, key: Key, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """One request of a key. Raises RateLimitError where it has as many as it may."""
        use = self._used.setdefault(key.digest, _Use())
        use.begin(key, clock())
        try:
            yield
        finally:
            use.running -= 1

    def _file(self, name: str) -> Path:
        assert self.folder is not None  # noqa: S101 - see create
        return self.folder / f"{name}.json"

    def _look(self) -> None:
        """Read the folder if it has changed."""
        if self.folder is None:
            return
        try:
            seen = self.folder.stat().st_mtime_ns, sorted(os.listdir(self.folder))
        except FileNotFoundError:
            self._kept = []
            return
        except OSError as error:  # and nobody is let in as if there were none
            raise StorageError(f"{self.folder} cannot be read ({error.strerror}): make it readable") from error
        self._required = True
        if seen == self._seen:
            return
        kept, damaged = [], []
        for name in seen[1]:
            if name.endswith(".json"):
                try:
                    kept.append(_read(self.folder / name))
                except FileNotFoundError:  # revoked at this moment
                    continue
                except StorageError as error:  # nobody can bring that one; the others go on
                    log.error("%s", error)
                    damaged.append(error)
        self._kept, self._seen, self._damaged = kept, seen, damaged


class _Use:
    """What a key has of its allowance: requests under way, and the time until which those it made are paid for.

    The latter is the generic cell rate algorithm (ITU-T I.371): a minute's worth may come at once, and no more.
    """

    def __init__(self) -> None:
        self.running = 0
        self._paid = 0.0

    def begin(self, key: Key, now: float) -> None:
        if key.concurrency is not None and self.running >= key.concurrency:
            raise RateLimitError(f"key {key.name!r} may have {key.concurrency} requests under way, and has them")
        if key.rate is not None:
            paid = max(now, self._paid) + _MINUTE / key.rate
            if (early := paid - now - _MINUTE) > 1e-9:
                raise RateLimitError(f"key {key.name!r} may make {key.rate} requests a minute", retry_after=early)
            self._paid = paid
        self.running += 1


def needs(scope: Scope) -> Any:
    """A route's dependency: the request's key, where one is asked for, must have the scope. Raises ForbiddenError."""

    async def check(request: Request) -> None:  # of FastAPI, what is not async costs a thread
        key: Key | None = request.scope["state"].get("key")
        if key is not None and SCOPES.index(key.scope) < SCOPES.index(scope):
            raise ForbiddenError(f"key {key.name!r} has the scope {key.scope}, and this needs {scope}")

    return Depends(check)


def _read(file: Path) -> Key:
    try:
        return Key.model_validate_json(file.read_bytes())
    except ValidationError:
        raise StorageError(f"{file} is damaged or no key's file: delete it, and make the key anew") from None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def keys_to_serve(settings: Settings) -> Keyring:
    """The keys of a server that is about to start. Raises StorageError for a damaged one, which is told now and not to
    whoever brings it, and ForbiddenError as Settings.check_exposure."""
    keys = Keyring(settings.store, settings.plain_keys)
    keys.names()
    settings.check_exposure(keyed=keys.required)
    return keys
