"""The text of an answer: boxes in it, and the thinking before it. Reward, metric and data all read
answers through these three functions, so that no two of them can disagree about what the model
said.

A box is (x1, y1, x2, y2) as fractions of width and height; in text it is `[0.12, 0.30, 0.45,
0.61]`.
"""

import math
import re
from collections.abc import Sequence

from .text import one_spelling

Box = tuple[float, float, float, float]

# A digit can be matched in one way only and a group ends at its bracket, so the search is linear in
# the text.
_NUMBER = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
_GROUP = re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")

OPEN, CLOSE = "<think>", "</think>"


def format_boxes(boxes: Sequence[Sequence[float]]) -> str:
    """Boxes as the training answers write them: two decimals, "[..], [..] and [..]". No boxes give
    "".
    """
    texts = ["[" + ", ".join(f"{value:.2f}" for value in box) + "]" for box in boxes]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def parse_boxes(text: str, scale: float = 1.0) -> list[Box]:
    """Every group of four finite numbers in brackets, divided by `scale` (1000 for an untuned
    Qwen3-VL), in text order.

    A group that is reversed or outside 0..1 is kept: it overlaps nothing and therefore counts as a
    false positive.
    """
    boxes = []
    for group in _GROUP.finditer(text):
        x1, y1, x2, y2 = (float(number) / scale for number in group.groups())
        # "1e999" is a number to the pattern and inf to float
        if all(map(math.isfinite, (x1, y1, x2, y2))):
            boxes.append((x1, y1, x2, y2))
    return boxes


def split_thinking(text: str, template_opens_think: bool = False) -> tuple[str, str, bool]:
    """(thinking, answer, ok), both stripped and in Unicode's form NFC, like the texts of a `Sample`
    that answers are compared with. `template_opens_think`: the chat template already wrote the
    first `<think>`.

    ok holds for a text without think tags, and for one with exactly one closed block at its start.
    Otherwise (unclosed, doubled, stray or late tags) the answer is the text between the last
    `</think>` and the next `<think>`, and the thinking is the rest: an unclosed block is all
    thinking and no answer.
    """
    text = OPEN * template_opens_think + one_spelling(text)
    opens, closes = text.count(OPEN), text.count(CLOSE)
    ok = opens == closes == 0 or (opens == closes == 1 and text.lstrip().startswith(OPEN))
    before, _, after = text.rpartition(CLOSE)
    answer, _, rest = after.partition(OPEN)
    thinking = f"{before} {rest}".replace(OPEN, "").replace(CLOSE, "")
    return thinking.strip(), answer.strip(), ok
