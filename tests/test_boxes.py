"""The parsers meet whatever a model samples: they may never raise, hang, or hand on a number that
is none.
"""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.data import format_boxes, parse_boxes, split_thinking

A, B, C = [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]
SHARDS = [
    "[",
    "]",
    "<think>",
    "</think>",
    ",",
    " ",
    "\n",
    "0.5",
    "1e999",
    "-.5",
    "1.",
    "nan",
    "e",
    "[0,0,1,1]",
    "٣",
]
soup = st.lists(st.one_of(st.sampled_from(SHARDS), st.text(max_size=3)), max_size=40).map("".join)


def test_format_joins_with_commas_and_one_and():
    a, b, c = "[0.10, 0.20, 0.30, 0.40]", "[0.50, 0.50, 0.75, 1.00]", "[0.00, 0.00, 1.00, 1.00]"
    assert format_boxes([]) == ""
    assert format_boxes([A]) == a
    assert format_boxes([A, B]) == f"{a} and {b}"
    assert format_boxes([A, B, C]) == f"{a}, {b} and {c}"


@pytest.mark.parametrize(
    "text, boxes",
    [
        ("The heart is at [0.10, 0.20, 0.30, 0.40].", [(0.1, 0.2, 0.3, 0.4)]),
        ("[0,0,1,1]", [(0, 0, 1, 1)]),
        ("[ +.5 ,-1,\n 1e-1\t, 1.E+0 ]", [(0.5, -1, 0.1, 1)]),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "x"}]```', [(1, 2, 3, 4)]),
        ("[[0, 0, 1, 1], [0, 0, .5, .5]]", [(0, 0, 1, 1), (0, 0, 0.5, 0.5)]),
        ("[0.9, 0.9, 0.1, 0.1]", [(0.9, 0.9, 0.1, 0.1)]),  # reversed: kept, a false positive
        ("[0, 0, 7, 7]", [(0, 0, 7, 7)]),  # outside: kept, a false positive
        ("[1, 2, 3] [1, 2, 3, 4, 5] [1 2 3 4] [a, b, c, d] (0, 0, 1, 1) [0, 0, 1, 1", []),
        ("[nan, 0, 1, 1] [inf, 0, 1, 1] [1e999, 0, 1, 1] [1_0, 0, 1, 1] [٣, 0, 1, 1]", []),
        ("", []),
    ],
)
def test_parse(text, boxes):
    assert parse_boxes(text) == boxes


def test_parse_scale():
    assert parse_boxes("[100, 200, 300, 1000]", scale=1000) == [(0.1, 0.2, 0.3, 1.0)]
    # finite as written, not after scaling
    assert parse_boxes("[1e300, 0, 0, 0]", scale=1e-300) == []


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=6))
@settings(max_examples=60, deadline=None)
def test_parse_reads_back_what_format_wrote(boxes):
    parsed = parse_boxes("It is at " + format_boxes(boxes) + ".")
    assert len(parsed) == len(boxes)
    assert all(abs(x - y) <= 0.005 + 1e-12 for p, b in zip(parsed, boxes) for x, y in zip(p, b))


@pytest.mark.parametrize(
    "text, template_opens_think, expected",
    [
        ("  No effusion.\n", False, ("", "No effusion.", True)),
        ("", False, ("", "", True)),
        ("<think> look </think>\n\nNo effusion.", False, ("look", "No effusion.", True)),
        ("\n<think></think>x", False, ("", "x", True)),
        ("look </think> No effusion.", True, ("look", "No effusion.", True)),
        ("<think>look", False, ("look", "", False)),  # unclosed: all thinking, no answer
        ("look", True, ("look", "", False)),
        ("look </think> x", False, ("look", "x", False)),  # stray close
        ("<think>a</think> b <think>c</think> d", False, ("a b c", "d", False)),  # doubled
        ("<think>a</think> b <think>c", False, ("a c", "b", False)),
        ("<think>a <think> b</think> c", False, ("a  b", "c", False)),
        ("b <think>a</think> c", False, ("b a", "c", False)),  # late
        ("a <think> b", False, ("b", "a", False)),
        ("<think>a</think> b", True, ("a", "b", False)),  # the template's tag and the model's own
        ("</think>a<think>", False, ("", "a", False)),
    ],
)
def test_split_thinking(text, template_opens_think, expected):
    assert split_thinking(text, template_opens_think) == expected


@given(soup, st.booleans())
@settings(max_examples=200, deadline=None)
def test_parsers_survive_any_string(text, template_opens_think):
    assert all(math.isfinite(value) for box in parse_boxes(text) for value in box)
    thinking, answer, ok = split_thinking(text, template_opens_think)
    assert "<think>" not in answer and "</think>" not in answer
    if "think>" not in text and not template_opens_think:
        assert (thinking, answer, ok) == ("", text.strip(), True)


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "[1,",
        "[0.1, 0.2, ",
        " ",
        "[ ",
        "1",
        "[1.1e",
        ".",
        "[0,0,1,1",
        "<think>",
        "</think>",
        "[1 ,  ",
        "[1,1,1,1.",
    ],
)
def test_parsers_are_linear_in_a_huge_text(piece):
    start = time.perf_counter()
    for text in (
        piece * (400_000 // len(piece)),
        "[" + piece * (400_000 // len(piece)),
        "[1, 1, 1, " + "1" * 400_000,
    ):
        parse_boxes(text)
        split_thinking(text)
    assert time.perf_counter() - start < 2  # a quadratic pattern needs minutes


def million_strings(seed):
    """A thousand random strings: shards of boxes and think blocks, digits, and characters from all
    of Unicode.
    """
    draw = random.Random(seed)
    for _ in range(1000):
        parts = [
            draw.choice(SHARDS)
            if draw.random() < 0.7
            else chr(draw.randrange(0x110000))
            if draw.random() < 0.5
            else str(draw.random())
            for _ in range(draw.randrange(25))
        ]
        yield draw.choice(["", " ", ","]).join(parts)


@pytest.mark.slow
@given(st.integers(0, 2**64))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_a_million_strings(seed):
    """Neither parser raises, no number is other than finite, no tag is left in an answer that
    counts.
    """
    for text in million_strings(seed):
        assert all(map(math.isfinite, itertools.chain(*parse_boxes(text, scale=1000))))
        for template_opens_think in (False, True):
            thinking, answer, ok = split_thinking(text, template_opens_think)
            assert (
                not ok
                or "think>" not in answer
                or "<think>" not in answer
                and "</think>" not in answer
            )
