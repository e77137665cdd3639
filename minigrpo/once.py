"""A JSON object has each key once. Python's own reader would take the last of two equal keys."""

from collections import Counter
from typing import Any


def each_key_once(pairs: list[tuple[str, Any]]) -> dict:
    """The `object_pairs_hook` of json.loads; ValueError names a key that is given twice."""
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"key {twice!r} appears twice in one object: remove one")
    return read
