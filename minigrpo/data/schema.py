"""What can be wrong with one line of a JSONL file, each error with its mend."""

import math
import re
from collections.abc import Iterator
from typing import Any

from minigrpo.choices import TASKS

from .box_forms import contradiction
from .boxes import parse_boxes
from .text import can_be_seen

KINDS = ("anatomy", "abnormality", "phrase")
TEXTS = ("id", "label", "source", "patient", "question", "answer", "thinking")
_HALF = re.compile(r"[\ud800-\udfff]")  # of a character's UTF-16, which no tokenizer takes
# What Qwen3-VL's tokenizer takes for the chat's own marks.
_MARKS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|"
    r"vision_pad)\|>"
)
_MEDIA = re.compile(r"<(?:image|video|audio)>")  # LLaVA's marks
# A score would read the reference as it reads an answer.
_TAGS = re.compile(r"<\s*/?\s*(?:think|thinking|answer)\s*>", re.I)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and can_be_seen(value)


def _box_error(box: Any) -> str | None:
    numbers = (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) for value in box)
    )
    if not numbers or not all(-math.inf < value < math.inf for value in box):
        return f"box {box!r} is not four finite numbers: write [x1, y1, x2, y2]"
    if not all(0 <= value <= 1 for value in box):
        return f"box {box} lies outside 0..1: divide x by the image's width and y by its height"
    if box[0] >= box[2] or box[1] >= box[3]:
        return f"box {box} has no area: write [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
    return None


def broken_text(text: str) -> str | None:
    """The first half of a character in it, shown as its escape."""
    match = _HALF.search(text)
    return ascii(match[0]) if match else None


def _text_error(name: str, text: Any) -> str | None:
    if not isinstance(text, str):
        return None
    if match := _MEDIA.search(text):
        return f'"{name}" holds {match[0]}: remove it, since "image" says where images are'
    if match := _MARKS.search(text):
        return (
            f'"{name}" holds {match[0]}, a chat token that the program adds itself: remove it'
            ' ("image" says where images are)'
        )
    if broken := broken_text(text):
        return (
            f'"{name}" holds {broken}, half a character: the text was cut or decoded wrongly; '
            "correct it"
        )
    return None


def _tag_error(name: str, text: Any) -> str | None:
    match = _TAGS.search(text) if isinstance(text, str) else None
    if not match:
        return None
    if name == "thinking":
        return f'"thinking" holds {match[0]}: leave the tags out; the program writes them'
    return (
        f'"{name}" holds {match[0]}: write the trace into "thinking" and only the answer into '
        '"answer", both without tags'
    )


def image_names(record: dict) -> list[str]:
    """The image paths as written, none where they are ill-formed."""
    image = record.get("image")
    names = image if isinstance(image, list) else [image]
    return names if all(map(is_text, names)) else []


def record_errors(record: dict) -> Iterator[str]:
    """What is wrong with one line, apart from other lines and the image files."""
    if not is_text(record.get("id")):
        yield '"id" is missing or not a text: give each line its own'
    if "image" not in record or (record["image"] is not None and not image_names(record)):
        yield (
            '"image" is missing or ill-formed: write a path, a list of paths, or null for no image'
        )
    task = record.get("task")
    if task not in TASKS:
        yield f'unknown task {task!r}: set "task" to one of {", ".join(TASKS)}'
    if task == "conversation":
        turns = record.get("turns")
        pairs = isinstance(turns, list) and all(
            isinstance(turn, list) and len(turn) == 2 for turn in turns
        )
        if not turns or not pairs or not all(is_text(text) for turn in turns for text in turn):
            yield (
                '"turns" is missing or ill-formed: write [[question, answer], ...], none of them'
                " empty"
            )
    elif record.get("turns"):
        yield (
            f'"turns" are for conversations, and this is a {task}: set "task" to "conversation", or'
            " leave them out"
        )
    for name in ("question", "answer"):  # a conversation may leave them to its first turn
        if not is_text(record.get(name)) and not (
            task == "conversation" and record.get(name) is None
        ):
            yield f'"{name}" is missing, empty or not a text: write it, or remove the line'
    turns = record["turns"] if isinstance(record.get("turns"), list) else []
    turns = [turn for turn in turns if isinstance(turn, list)]
    named = [(name, record.get(name)) for name in TEXTS]
    said = [("turns", text) for turn in turns for text in turn]
    yield from filter(None, (_text_error(*pair) for pair in named + said))
    replies = [("turns", text) for turn in turns for text in turn[1::2]]  # a question may name tags
    yield from filter(None, (_tag_error(*pair) for pair in named[-2:] + replies))
    for name in ("label", "thinking", "source", "patient"):
        if not isinstance(record.get(name), str | None):
            yield f'"{name}" is {record[name]!r}, not text: put it in quotes, or leave it out'
    if record.get("kind") not in (None, *KINDS):
        yield (
            f'unknown kind {record["kind"]!r}: set "kind" to one of {", ".join(KINDS)}, or leave'
            " it out"
        )
    boxes = record.get("boxes")
    if not isinstance(boxes, list | None):
        yield f'"boxes" is {boxes!r}: write a list of [x1, y1, x2, y2]'
        return
    wrong = list(filter(None, map(_box_error, boxes or [])))
    yield from wrong
    if task == "grounding" and not wrong:
        yield from filter(None, [_grounding_error(record.get("answer"), boxes)])


def _grounding_error(answer: Any, boxes: list | None) -> str | None:
    if boxes is None:
        return (
            'grounding without boxes: add "boxes": [[x1, y1, x2, y2]], or "boxes": [] if there'
            " is nothing to find, or remove the line"
        )
    if not isinstance(answer, str):
        return None
    said = parse_boxes(answer)
    if not boxes:
        return said and (
            '"boxes" is empty, but the answer holds a box: put it into "boxes" too, or answer that'
            " there is nothing to find"
        )
    if not said:
        return 'grounding, but the answer holds no box: write its boxes as "[x1, y1, x2, y2]"'
    return contradiction(answer, boxes)
