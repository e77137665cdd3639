"""One sample, and the JSONL file it comes from. All that can be wrong with a file is said before training starts."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .schema import TASKS, image_names, is_text, record_errors

SHOWN = 10  # errors told at once
LONGEST = 16_000_000  # bytes of a line: a sample with a long conversation has some thousands
MOST_PIXELS = 100_000_000  # of an image: a mammogram has 20 million; a small file can claim billions
MOST_STRETCHED = 200  # longer side over shorter: Qwen3-VL's processor refuses more, and would in the middle of a run


class DataError(ValueError):
    """Something in a data file is wrong; the message names file, line and mend."""


@dataclass
class Sample:
    """One line of a JSONL file: a question about a film (or several, or none) with its answer."""

    id: str
    image: str | list[str] | None  # absolute path(s); None for a question about no film
    task: str  # one of TASKS
    question: str
    answer: str
    turns: list[list[str]] | None = None  # conversation: [[question, answer], ...]
    boxes: list[list[float]] = field(default_factory=list)  # [[x1, y1, x2, y2], ...] in 0..1
    kind: str | None = None  # grounding: one of KINDS
    label: str | None = None
    thinking: str | None = None  # a trace to imitate, without its tags
    source: str | None = None
    patient: str | None = None
    findings: Any = None  # what a synthetic film was drawn with
    file: str = ""  # where it was read, for messages
    line: int = 0

    @property
    def images(self) -> list[str]:
        """The image paths as a list, in prompt order."""
        return [] if self.image is None else [self.image] if isinstance(self.image, str) else self.image


def load_image(path: str | os.PathLike) -> Image.Image:
    """The image as 8-bit RGB, the right way up. PIL alone would clip 16-bit grey at 255, and so turn a film white."""
    with Image.open(path) as image:
        check_image(image)
        image = upright(image)
        if not image.mode.startswith("I"):
            return image.convert("RGB")
        pixels = np.asarray(image).astype(np.float64)
    # Detectors give 12, 14 or 16 bits, all stored in a 16-bit file: the fewest that hold the film are its own.
    full = next((full for full in (4095, 16383, 65535) if pixels.max() <= full), pixels.max())
    return Image.fromarray((pixels * (255 / full)).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def check_image(image: Image.Image) -> None:
    """Before any pixel is decoded: ValueError for an image that no run can take."""
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{size}, more than {MOST_PIXELS // 10**6} million: make it smaller")
    if max(image.size) > MOST_STRETCHED * min(image.size):
        raise ValueError(f"{size}: one side is more than {MOST_STRETCHED} times the other, so it is no film: crop it")
    if image.mode == "F":
        raise ValueError("its pixels are floats, and which of them is white is not known: store 8 or 16 bits")


def upright(image: Image.Image) -> Image.Image:
    """The image as viewers show it, and as boxes were drawn on it: a camera stores it on its side, with a note (EXIF) to turn it."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # the note itself may be broken in many ways, and is then none
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _decode_error(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            check_image(image)
            image.load()  # open() reads the header only; a truncated file shows here
    except Exception as error:  # PIL's decoders raise a dozen kinds, all of which mean the same
        return f"image {path} cannot be read ({error}): fetch it again, or remove the line"
    return None


def _raise(file: Path, errors: list[tuple[int, str]]) -> None:
    if errors:
        shown = "\n".join(f"{file}:{line}: {text}" for line, text in sorted(errors)[:SHOWN])
        raise DataError(shown + (f"\n... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""))


def _records(file: Path, errors: list[tuple[int, str]]) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that holds one; the others go to `errors`, blank lines nowhere."""
    with file.open("rb") as stream:
        for line, raw in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
            if len(raw) > LONGEST:
                errors.append((line, f"longer than {LONGEST // 10**6} MB: write one JSON object a line"))
                return  # what follows is more of the same
            try:
                record = json.loads(raw) if raw.strip() else None
            except (ValueError, RecursionError) as error:
                errors.append((line, f"not JSON ({error}): write one JSON object a line, in UTF-8"))
                continue
            if isinstance(record, dict):
                yield line, record
            elif raw.strip():
                errors.append((line, f"a JSON {type(record).__name__}: write one JSON object {{...}} a line"))


def scan_jsonl(path: str | os.PathLike) -> tuple[list[Sample], list[tuple[int, str]], dict[str, int]]:
    """The samples of the lines that are right; (line, what is wrong and its mend) of all others; and each image's first line.

    Images must exist, but none is opened. A conversation without question and answer takes those of its first turn.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file} is a folder: name the JSONL file in it")
    if not file.is_file():
        raise DataError(f"{file}: no such file: check the path, or make the data first")
    samples: list[Sample] = []
    errors: list[tuple[int, str]] = []
    first_line: dict[str, int] = {}  # of each id
    users: dict[str, int] = {}  # the first line that shows each image
    for line, record in _records(file, errors):
        found = list(record_errors(record))
        first = first_line.setdefault(record["id"], line) if is_text(record.get("id")) else line
        if first != line:
            found.append(f"id {record['id']!r} stands on line {first} already: rename one")
        images = [os.path.abspath(file.parent / name) for name in image_names(record)]
        for image in images:
            if users.setdefault(image, line) == line and not os.path.isfile(image):
                found.append(f"image {image} does not exist: check the path (relative to {file.parent})"
                             + ", with / and not \\" * ("\\" in image))
        errors += [(line, text) for text in found]
        if not found:
            known = {name: record[name] for name in Sample.__dataclass_fields__ if record.get(name) is not None}
            if record["task"] == "conversation":
                known = dict(zip(("question", "answer"), record["turns"][0])) | known
            known["image"] = images if isinstance(record["image"], list) else images[0] if images else None
            samples.append(Sample(**known | {"file": str(file), "line": line}))
    return samples, errors, users


def read_jsonl(path: str | os.PathLike, *, task: str = "all", verify_images: bool = True, part: tuple[int, int] = (0, 1)) -> list[Sample]:
    """The samples of one JSONL file, all lines checked and, with `verify_images`, each distinct image decoded once.

    Processes that read the same file can share out the decoding: `part` (k, n) decodes every n-th image, from the k-th.
    `task` keeps the samples of one task. A conversation without question and answer takes those of its first turn.
    Image paths are absolute or relative to the file. DataError tells up to ten errors, each with file, line and mend.
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
            images = list(users)[part[0]::part[1]]
            found = zip((users[image] for image in images), pool.map(_decode_error, images))
            _raise(file, [(line, text) for line, text in found if text])
    kept = [sample for sample in samples if task in ("all", sample.task)]
    if not kept:
        raise DataError(f"{file}: no sample has task {task!r}; it holds {', '.join(sorted({s.task for s in samples}))}")
    return kept
