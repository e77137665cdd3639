"""LLaVA / ShareGPT JSON, to and from our JSONL.

    python -m minigrpo.data.sharegpt llava.json --output_file data/mine/train.jsonl \\
        --image_root films --task report
    python -m minigrpo.data.sharegpt data/mine/train.jsonl --output_file llava.json

Which way it goes follows from the suffix. The JSON is a list of {"id", "image": path or list of
paths (absent: none), "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt",
"value": "..."}]}. What that format has no place for (task, boxes, label, patient, ...) is written
as further keys, which its readers ignore and ours takes up, so a round trip loses nothing. Without
a "task": several turns are a conversation, a single answer with boxes is grounding, any other is
`--task`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from minigrpo.once import each_key_once
from minigrpo.run.files import write_aside, write_jsonl
from minigrpo.run.terminal import Parser, fail

from .boxes import parse_boxes
from .sample import DataError, Sample, read_jsonl
from .schema import TASKS, record_errors

IMAGE = "<image>"
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")
EXTRA = ("kind", "label", "thinking", "source", "patient", "findings")


def to_sharegpt(sample: Sample, folder: Path) -> dict:
    """One item; image paths relative to `folder`."""
    images = [os.path.relpath(path, folder) for path in sample.images]
    turns = sample.turns or [[sample.question, sample.answer]]
    talk = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)
    ]
    talk[0]["value"] = f"{IMAGE}\n" * len(images) + talk[0]["value"]
    item = {"id": sample.id} | (
        {"image": images if isinstance(sample.image, list) else images[0]} if images else {}
    )
    item |= {"conversations": talk, "task": sample.task} | (
        {"boxes": sample.boxes} if sample.boxes or sample.task == "grounding" else {}
    )
    return item | {
        name: getattr(sample, name) for name in EXTRA if getattr(sample, name) is not None
    }


def turns_of(item: dict) -> list[list[str]]:
    """[[question, answer], ...] without image marks; ValueError says what is wrong with the
    item.
    """
    talk = item.get("conversations")
    if (
        not isinstance(talk, list)
        or not talk
        or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in talk)
    ):
        raise ValueError(
            '"conversations" is missing or ill-formed: write [{"from": "human", "value": ...},'
            ' {"from": "gpt", "value": ...}]'
        )
    speakers = [t.get("from") for t in talk]
    for number, who in enumerate(speakers):
        if who not in (ANSWERS if number % 2 else ASKS):
            raise ValueError(
                f"turn {number + 1} is from {who!r}: human and gpt must alternate, human first"
                " (there is no system turn: put it into the question)"
            )
    if len(talk) % 2:
        raise ValueError("the last question has no answer: add it, or remove the question")
    texts = [t["value"] for t in talk]
    images = item.get("image")
    count = 0 if images is None else len(images) if isinstance(images, list) else 1
    marks = sum(text.count(IMAGE) for text in texts)
    if marks != count:
        raise ValueError(f"{marks} {IMAGE} for {count} images: write one {IMAGE} for each")
    if any(IMAGE in text for text in texts[1:]):
        raise ValueError(
            f"{IMAGE} after the first question: minigrpo shows all images before it; move it there"
        )
    texts[0] = texts[0].replace(IMAGE, "").strip()
    return [list(pair) for pair in zip(texts[::2], texts[1::2])]


def from_sharegpt(item: dict, images: list[str], task: str) -> dict:
    """One JSONL line; `images` are the item's paths as they shall be written."""
    turns = turns_of(item)
    boxes = item.get("boxes")
    if boxes is None:
        boxes = [list(box) for box in parse_boxes(turns[0][1])] if len(turns) == 1 else []
    found = item.get("task") or (
        "conversation" if len(turns) > 1 else "grounding" if boxes else task
    )
    image = None if not images else images if isinstance(item["image"], list) else images[0]
    line = {
        "id": str(item.get("id", "")),
        "image": image,
        "task": found,
        "question": turns[0][0],
        "answer": turns[0][1],
    }
    line |= ({"turns": turns} if found == "conversation" else {}) | (
        {"boxes": boxes} if boxes or "boxes" in item else {}
    )
    return line | {name: item[name] for name in EXTRA if item.get(name) is not None}


def read_sharegpt(path: Path, image_root: Path, folder: Path, task: str) -> Iterator[dict]:
    """The JSONL lines of a file, image paths relative to `folder`; DataError tells what is wrong
    with all of its items.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): this format is one list of objects") from None
    if not isinstance(items, list):
        raise DataError(f"{path}: a JSON {type(items).__name__}, not a list of objects")
    if not items:
        raise DataError(f"{path}: the list is empty: write at least one object")
    lines, errors, ids = [], [], {}
    for number, item in enumerate(items, 1):
        place = f"{path}: item {number}" + (
            f" ({item['id']})" if isinstance(item, dict) and item.get("id") else ""
        )
        try:
            if not isinstance(item, dict):
                raise ValueError(f"a JSON {type(item).__name__}: write an object")
            names = item.get("image") or []
            names = names if isinstance(names, list) else [names]
            if not all(isinstance(name, str) for name in names):
                raise ValueError('"image" is ill-formed: write a path or a list of paths')
            line = from_sharegpt(
                item, [os.path.relpath(image_root / name, folder) for name in names], task
            )
            wrong = list(record_errors(line))
            if ids.setdefault(line["id"], number) != number:
                wrong.append(
                    f"id {line['id']!r} is already that of item {ids[line['id']]}: rename one"
                )
            wrong += [
                f"image {image_root / name} does not exist: check --image_root"
                for name in names
                if not (image_root / name).is_file()
            ]
            errors += [f"{place}: {text}" for text in wrong]
            lines.append(line)
        except ValueError as error:
            errors.append(f"{place}: {error}")
    if errors:
        raise DataError("\n".join(errors))
    yield from lines


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "file",
        type=Path,
        help=".json (to read it) or .jsonl (to write it as LLaVA / ShareGPT JSON)",
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        required=True,
        help=".jsonl or .json, whichever the input is not",
    )
    parser.add_argument(
        "--image_root",
        type=Path,
        help="what the JSON's image paths are relative to; default: its own folder",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="report",
        help="task of single answers without boxes (default report)",
    )
    args = parser.parse_args()
    source, target = args.file, args.output_file
    if {source.suffix, target.suffix} != {".json", ".jsonl"}:
        parser.error(f"one file must be .json and the other .jsonl, got {source} and {target}")
    try:
        if target.exists():
            raise ValueError(f"{target} exists already: remove it, or give another --output_file")
        if not source.is_file():
            raise ValueError(f"{source}: no such file")
        if source.suffix == ".json":
            lines = list(
                read_sharegpt(source, args.image_root or source.parent, target.parent, args.task)
            )
            write_jsonl(target, lines)
        else:
            lines = [
                to_sharegpt(sample, target.parent)
                for sample in read_jsonl(source, verify_images=False)
            ]
            target.parent.mkdir(parents=True, exist_ok=True)
            write_aside(target, json.dumps(lines, ensure_ascii=False, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{target}: {len(lines):,} samples")


if __name__ == "__main__":
    main()
