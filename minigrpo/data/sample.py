"""One sample, and the JSONL file it comes from. Every error in a file is reported before training
starts.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..once import each_key_once
from ..visible import message
from .film import load_image
from .schema import TASKS, image_names, is_text, record_errors
from .text import one_spelling

SHOWN = 10  # errors told at once
LONGEST = 16_000_000  # bytes of a line: a sample with a long conversation has some thousands


class DataError(ValueError):
    """An error in a data file; the message names file, line and what to do."""


@dataclass
class Sample:
    """One line of a JSONL file: a question about a film (or several, or none) with its answer."""

    id: str
    image: str | list[str] | None  # absolute path(s); None for a question about no film
    task: str  # one of TASKS
    question: str
    answer: str
    turns: list[list[str]] | None = None  # conversation: [[question, answer], ...]
    # [[x1, y1, x2, y2], ...] in 0..1; grounding without any: there is nothing to find
    boxes: list[list[float]] = field(default_factory=list)
    kind: str | None = None  # grounding: one of KINDS
    label: str | None = None
    thinking: str | None = None  # a trace to imitate, without its tags
    source: str | None = None
    patient: str | None = None
    findings: Any = None  # what a synthetic film was drawn with
    file: str = ""  # where it was read, for messages
    line: int = 0

    def __post_init__(self):
        """Normalise the spelling of each character, so that equal answers compare equal; ids and
        paths are unchanged.
        """
        for name in ("question", "answer", "thinking"):
            setattr(self, name, getattr(self, name) and one_spelling(getattr(self, name)))
        self.turns = self.turns and [[one_spelling(text) for text in turn] for turn in self.turns]

    @property
    def images(self) -> list[str]:
        """The image paths as a list, in prompt order."""
        return (
            []
            if self.image is None
            else [self.image]
            if isinstance(self.image, str)
            else self.image
        )


def load_film(sample: Sample, path: str) -> Image.Image:
    """`load_image` of one of the sample's images; DataError names file and line, since a film may
    disappear during a run.
    """
    try:
        return load_image(path)
    except ValueError as error:
        place = f"{sample.file}:{sample.line}"
        raise DataError(f"{place}: {error}: restore it, or remove the line") from error


def _decode_error(path: str) -> str | None:
    try:
        load_image(path)  # not the header alone, and not by another way than a run's
    except ValueError as error:
        return f"{error}: fetch it again, or remove the line"
    return None


def _raise(file: Path, errors: list[tuple[int, str]]) -> None:
    if errors:
        shown = "\n".join(
            message(f"{file}:{line}: {text}") for line, text in sorted(errors)[:SHOWN]
        )
        raise DataError(
            shown + (f"\n... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else "")
        )


def _records(file: Path, errors: list[tuple[int, str]]) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that has one; the others go to `errors`, and blank lines
    are ignored.
    """
    with file.open("rb") as stream:
        for line, raw in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
            if len(raw) > LONGEST:
                errors.append(
                    (line, f"longer than {LONGEST // 10**6} MB: write one JSON object a line")
                )
                return  # what follows is more of the same
            try:
                record = json.loads(raw, object_pairs_hook=each_key_once) if raw.strip() else None
            except (ValueError, RecursionError) as error:
                errors.append((line, f"not JSON ({error}): write one JSON object a line, in UTF-8"))
                continue
            if isinstance(record, dict):
                yield line, record
            elif raw.strip():
                errors.append(
                    (line, f"a JSON {type(record).__name__}: write one JSON object {{...}} a line")
                )


def scan_jsonl(
    path: str | os.PathLike,
) -> tuple[list[Sample], list[tuple[int, str]], dict[str, int]]:
    """The samples of the valid lines; (line, what is wrong and what to do) of all others; and the
    first line of each image that exists.

    No image is opened. A conversation without question and answer takes those of its first turn.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file} is a folder: name the JSONL file in it")
    if not file.is_file():
        raise DataError(f"{file}: no such file: check the path, or make the data first")
    samples: list[Sample] = []
    errors: list[tuple[int, str]] = []
    first_line: dict[str, int] = {}  # of each id
    users: dict[str, int] = {}  # the first line that shows each image that is there
    missing: set[str] = set()  # images
    for line, record in _records(file, errors):
        faults = list(record_errors(record))
        first = first_line.setdefault(record["id"], line) if is_text(record.get("id")) else line
        if first != line:
            faults.append(f"id {record['id']!r} is already on line {first}: rename one")
        images = [os.path.abspath(file.parent / name) for name in image_names(record)]
        for name, image in zip(image_names(record), images):
            if image not in users and os.path.isfile(image):
                users[image] = line
            elif image not in users and image not in missing:
                missing.add(image)
                faults.append(
                    f"image {image} does not exist: check the path (relative to {file.parent})"
                    + ", with / and not \\" * ("\\" in name)
                    + ", and write ~ out, since it means a different folder for everyone"
                    * name.startswith("~")
                )
        errors += [(line, text) for text in faults]
        if not faults:
            known = {
                name: record[name]
                for name in Sample.__dataclass_fields__
                if record.get(name) is not None
            }
            if record["task"] == "conversation":
                known = dict(zip(("question", "answer"), record["turns"][0])) | known
            known["image"] = (
                images if isinstance(record["image"], list) else images[0] if images else None
            )
            samples.append(Sample(**known | {"file": str(file), "line": line}))
    return samples, errors, users


def read_jsonl(
    path: str | os.PathLike,
    *,
    task: str = "all",
    verify_images: bool = True,
    part: tuple[int, int] = (0, 1),
) -> list[Sample]:
    """The samples of one JSONL file, all lines checked and, with `verify_images`, each distinct
    image decoded once.

    Processes that read the same file can divide the decoding: `part` (k, n) decodes every n-th
    image, from the k-th. `task` keeps the samples of one task. A conversation without question and
    answer takes those of its first turn. Image paths are absolute or relative to the file.
    DataError reports up to ten errors, each with file, line and what to do.
    """
    if task not in ("all", *TASKS):
        raise ValueError(f"unknown task {task!r}: choose one of all, {', '.join(TASKS)}")
    file = Path(path)
    samples, errors, users = scan_jsonl(file)
    _raise(file, errors)
    if not samples:
        raise DataError(f"{file}:1: the file is empty: write one JSON object a line")
    if verify_images:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
            images = list(users)[part[0] :: part[1]]
            faults = zip((users[image] for image in images), pool.map(_decode_error, images))
            _raise(file, [(line, text) for line, text in faults if text])
    kept = [sample for sample in samples if task in ("all", sample.task)]
    if not kept:
        raise DataError(
            f"{file}: no sample has task {task!r}; it holds"
            f" {', '.join(sorted({s.task for s in samples}))}"
        )
    return kept
