"""References are scored once: in a run, across runs, and after a run that was killed."""

import itertools
import json
import sqlite3
import time

import pytest

from minigrpo.rewards.cache import Cached
from tests.processes import CONTEXT


def upper(texts):
    return [{"text": text.upper()} for text in texts]


def cached(path, model="m", **settings):
    return Cached(
        upper,
        model,
        path,
        pack=lambda value: json.dumps(value).encode(),
        unpack=json.loads,
        **settings,
    )


def test_each_text_is_scored_once(tmp_path):
    first = cached(tmp_path / "c.sqlite")
    assert first(["a", "b", "a"]) == upper(["a", "b", "a"]) and first.scored == 2
    assert first(["b", "c"]) == upper(["b", "c"]) and first.scored == 3
    again = cached(tmp_path / "c.sqlite")  # the next run
    assert again(["c", "a", "d"]) == upper(["c", "a", "d"]) and again.scored == 1
    assert first([]) == []


def test_other_weights_are_another_cache(tmp_path):
    cached(tmp_path / "c.sqlite")(["a"])
    other = cached(tmp_path / "c.sqlite", model="m2")
    other(["a"])
    assert other.scored == 1


def test_memory_is_bounded(tmp_path):
    small = cached(None, limit=2)
    assert small(["a", "b", "c"]) == upper(["a", "b", "c"]) and list(small.memory) == ["b", "c"]
    small(["b"])
    small(["d"])
    assert list(small.memory) == ["b", "d"]


def test_failure_of_the_scorer_is_not_kept(tmp_path):
    cache = cached(tmp_path / "c.sqlite")
    cache.score = lambda texts: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache(["a"])
    cache.score = upper
    assert cache(["a"]) == upper(["a"])


def write_for_ever(path, said):
    cache = cached(path)
    for n in itertools.count():
        cache([f"{n} {m}" for m in range(50)])
        said.send(n)


def test_kill_while_writing_poisons_nothing(tmp_path):
    path = tmp_path / "c.sqlite"
    for _ in range(3):
        heard, said = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=write_for_ever, args=(path, said))
        process.start()
        heard.recv()
        time.sleep(0.1)
        process.kill()
        process.join()
        texts = [f"{n} {m}" for n in range(3) for m in range(50)]
        cache = cached(path)
        # the first batch at least was whole
        assert cache(texts) == upper(texts) and cache.scored <= 100
        path.unlink()
        for rest in tmp_path.glob("c.sqlite-*"):
            rest.unlink()


def test_damaged_row_is_scored_again(tmp_path):
    cached(tmp_path / "c.sqlite")(["a", "b"])
    with sqlite3.connect(tmp_path / "c.sqlite") as disk:
        disk.execute("UPDATE scores SET value = ?", (b'{"text": "A',))
    again = cached(tmp_path / "c.sqlite")
    with pytest.warns(UserWarning, match="cache of scored references on disk failed"):
        assert again(["a"]) == upper(["a"])
    assert cached(tmp_path / "c.sqlite")(["a"]) == upper(["a"])


def test_file_that_is_no_cache_costs_the_cache_only(tmp_path):
    (tmp_path / "c.sqlite").write_text(
        "not a database, not at all, and longer than a page header would be" * 9
    )
    with pytest.warns(UserWarning, match="references are not kept on disk: .*delete it"):
        assert cached(tmp_path / "c.sqlite")(["a"]) == upper(["a"])
    with pytest.warns(UserWarning, match="point .MINIGRPO_CACHE elsewhere"):
        assert cached(tmp_path / "c.sqlite/below")(["a"]) == upper(["a"])


def test_odd_texts_have_keys(tmp_path):
    odd = ["", "\ud800", "a\0b", "a" * 10**6]
    assert cached(tmp_path / "c.sqlite")(odd) == upper(odd)
