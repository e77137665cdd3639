"""A cache of scored references: in memory for the run, on disk for the next one.

A step needs each reference G times, and later steps need it again; its annotation depends only on
the text and the model, so these two are the key. SQLite makes each write atomic, even if a process
is killed or several write at once.
"""

import hashlib
import sqlite3
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cached:
    """`score(texts) -> values` with a cache. `model` names what the values depend on besides the
    text.

    `path` None: in memory only, the last `limit` texts. Values on disk go through `pack` and
        `unpack` (bytes).
    """

    def __init__(
        self,
        score: Callable[[list[str]], list],
        model: str,
        path: Path | None = None,
        *,
        pack: Callable[[Any], bytes] = bytes,
        unpack: Callable[[bytes], Any] = bytes,
        limit: int = 65_536,
    ):
        self.score, self.model, self.pack, self.unpack, self.limit = (
            score,
            model,
            pack,
            unpack,
            limit,
        )
        self.memory: OrderedDict[str, Any] = OrderedDict()
        self.disk = _open(path) if path else None
        self.scored = 0  # texts sent to the scorer

    def __call__(self, texts: list[str]) -> list:
        """One value for each text, in order; each distinct text not in the cache is scored once,
        all in one call.
        """
        distinct = list(dict.fromkeys(texts))
        known = {text: self.memory[text] for text in distinct if text in self.memory}
        known |= self._read([text for text in distinct if text not in known])
        missing = [text for text in distinct if text not in known]
        if missing:
            new_scores = dict(zip(missing, self.score(missing), strict=True))
            self.scored += len(missing)
            self._write(new_scores)
            known |= new_scores
        for text in distinct:
            self.memory[text] = known[text]
            self.memory.move_to_end(text)
        while len(self.memory) > self.limit:
            self.memory.popitem(last=False)
        return [known[text] for text in texts]

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.model}\0{text}".encode(errors="surrogatepass")).digest()

    def _read(self, texts: list[str]) -> dict[str, Any]:
        scores = {}
        for text in texts if self.disk else ():
            try:
                row = self.disk.execute(
                    "SELECT value FROM scores WHERE key = ?", (self._key(text),)
                ).fetchone()
                if row:
                    scores[text] = self.unpack(row[0])
            # a damaged row counts as missing: it is scored and written again
            except (sqlite3.Error, ValueError) as error:
                _warn(error)
        return scores

    def _write(self, values: dict[str, Any]) -> None:
        if self.disk:
            try:
                with self.disk:  # one transaction: all rows or none
                    self.disk.executemany(
                        "INSERT OR REPLACE INTO scores VALUES (?, ?)",
                        [(self._key(text), self.pack(value)) for text, value in values.items()],
                    )
            except sqlite3.Error as error:  # a full disk must not end training
                _warn(error)


def _open(path: Path) -> sqlite3.Connection | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = sqlite3.connect(path, timeout=30, check_same_thread=False)
        with disk:
            disk.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
            )
        return disk
    except (OSError, sqlite3.Error) as error:
        warnings.warn(
            f"references are not kept on disk: {path} cannot be used ({error}); delete it, or point"
            " $MINIGRPO_CACHE elsewhere"
        )
        return None


def _warn(error: Exception) -> None:
    warnings.warn(
        f"the cache of scored references on disk failed ({error}): going on without it, scores are"
        " not affected"
    )
