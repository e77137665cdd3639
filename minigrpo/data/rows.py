"""What the adapters share for reading: tables, boxes in pixels, seeded wordings, and the resulting
samples.
"""

import csv
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..once import each_key_once
from . import templates
from .boxes import format_boxes
from .ledger import Ledger

csv.field_size_limit(2**27)  # one report in a cell may be longer than csv's 128 KiB
# what a bad or half CSV file raises
UNREADABLE = (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile)


@dataclass
class Draft:
    """A sample before its film is read; `rows` are the ledger's rows that are kept or dropped with
    it.
    """

    rows: list[Hashable]
    film: Path  # where the film lies
    name: str  # what the film is called in the output, unique in the set, without suffix
    sample: dict = field(default_factory=dict)  # a JSONL line without "image"


def find_file(root: Path, *names: str) -> Path:
    """The first of `names` under root, also gzipped. The error lists what was looked for."""
    for name in names:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"--root {root} has no {' or '.join(names)}, nor a .gz of it: docs/data.md describes the"
        " folder"
    )


def read_csv(
    path: Path, columns: Sequence[str]
) -> Iterator[tuple[tuple[str, int], dict[str, str]]]:
    """((file name, row number from 1), row) of a CSV file with a header; quoted newlines and a
    byte-order mark are allowed.

    `columns` must be present. Cells are stripped; a missing one is "".
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            header = [name.strip() for name in reader.fieldnames or []]
        except UNREADABLE as error:
            raise ValueError(
                f"{path}:1: not a readable CSV file ({error}): fetch the file again, in UTF-8"
            ) from None
        reader.fieldnames = header
        if missing := [name for name in columns if name not in header]:
            raise ValueError(
                f"{path}:1: no column {', '.join(missing)}; the header has"
                f" {', '.join(header) or 'nothing'}: is it the right file?"
            )
        try:
            for number, row in enumerate(reader, 1):
                row.pop(None, None)  # cells beyond the header
                yield (
                    (path.name, number),
                    {name: (value or "").strip() for name, value in row.items()},
                )
        except UNREADABLE as error:
            raise ValueError(
                f"{path}:{reader.line_num}: not a readable CSV line ({error}): fetch the file again"
            ) from None


def read_rows(
    path: Path, columns: Sequence[str], ledger: Ledger
) -> list[tuple[tuple[str, int], dict[str, str]]]:
    """`read_csv`, each row entered in the ledger; a second copy of the same row is dropped
    there.
    """
    rows, contents = [], set()
    for key, row in read_csv(path, columns):
        ledger.enter(key)
        content = tuple(row.values())
        if content in contents:
            ledger.drop([key], "the same row again")
        else:
            contents.add(content)
            rows.append((key, row))
    return rows


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}): fetch the file again") from None


def index_films(root: Path, suffixes: Sequence[str] = (".png", ".jpg", ".jpeg")) -> dict[str, Path]:
    """File name -> path of all films anywhere under root, since downloads unpack into folders of
    many shapes.
    """
    films: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders.sort()  # the first of two copies is the same on every machine
        for name in names:
            if name.lower().endswith(tuple(suffixes)):
                films.setdefault(name, Path(folder) / name)
    return films


def unit_box(
    x1: float, y1: float, x2: float, y2: float, width: float, height: float, ledger: Ledger
) -> list[float] | str:
    """A box in pixels as [x1, y1, x2, y2] in 0..1, cut at the film's edge; or the reason why it is
    not valid.

    The text of an answer has two decimals, so a thinner box would be written as a line.
    """
    if not all(map(math.isfinite, (x1, y1, x2, y2, width, height))):
        return "a box that is not four numbers"
    if width <= 0 or height <= 0:
        return "film without size"
    box = [x1 / width, y1 / height, x2 / width, y2 / height]
    cut = [round(min(max(value, 0.0), 1.0), 4) for value in box]
    if box[0] >= box[2] or box[1] >= box[3]:
        return "a box with no area"
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        return "a box outside the film"
    if f"{cut[0]:.2f}" == f"{cut[2]:.2f}" or f"{cut[1]:.2f}" == f"{cut[3]:.2f}":
        return "a box too thin for two decimals"
    ledger.notes["boxes cut at the film's edge"] += int(min(box) < 0 or max(box) > 1)
    return cut


def number(text: str) -> float:
    """A cell as a float; NaN for an empty one and for anything else that is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def sample_rng(sample_id: str) -> np.random.Generator:
    """A random stream of the sample's own: the same wording and the same region in every
    conversion, whatever else is in the data set.
    """
    return np.random.default_rng(int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8]))


def report_sample(sample_id: str, text: str, **more) -> dict:
    return {
        "id": sample_id,
        "task": "report",
        "question": templates.report_question(sample_rng(sample_id)),
        "answer": text,
    } | more


def grounding_sample(
    sample_id: str,
    kind: str,
    label: str,
    boxes: list[list[float]],
    phrase: str | None = None,
    **more,
) -> dict:
    """A region, an abnormality (asked for by its label) or a phrase of a report; boxes from the
    image's left to its right.
    """
    boxes = sorted(boxes)
    turn = templates.phrase_turn if kind == "phrase" else templates.region_turn
    question, answer = turn(phrase or label, format_boxes(boxes), sample_rng(sample_id))
    return {
        "id": sample_id,
        "task": "grounding",
        "question": question,
        "answer": answer,
        "boxes": boxes,
        "kind": kind,
        "label": label,
    } | more


def readable(label: str) -> str:
    """A label as written within a sentence: "Aortic enlargement" in lower case, "ILD" unchanged."""
    return label if label.isupper() else label.lower()


def one_paragraph(text: str) -> str:
    """A report section as one line: runs of white space, quoted newlines among them, become one
    space.
    """
    return " ".join(text.split())
