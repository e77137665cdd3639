"""Check data before a run: everything that a run would read, all errors at once.

    python -m minigrpo.data.check data/phantom/train.jsonl data/phantom/test.jsonl \\
        --model models/tiny

Prints for each file its counts, lengths, film sizes, boxes and labels, then every error as
`file:line: what is wrong, and what to do`, and draws a contact sheet of films with their boxes.
Each film is decoded once, in parallel, as a run decodes it. Exit status 1 if there is an error.

It also looks for leakage between sides: the same id, patient, or film (by a hash of its pixels,
whatever its name) on two sides is an error. A file belongs to train, valid or test by its name or
its folder (train/mine.jsonl, val/mine.jsonl); other names form one side each. The output says which
file was assigned to which side.
"""

import hashlib
import os
import statistics
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from minigrpo.run.terminal import Parser, fail
from minigrpo.visible import message, printable

from .film import blocks, read_film
from .overlap import side_of
from .sample import DataError, Sample, scan_jsonl
from .sections import HEADING
from .sheet import draw_sheet

FAINT = 32  # grey levels of 256: a film with fewer looks blank
DARK = 64  # 95 pixels in 100 of a film are below this: read at the wrong depth, or hardly exposed
# Shares of pixels at 255 and at 0 beyond which a film was clipped: at most 0.02 and 0.18 in 280
# whole films, drawn and real.
WHITE, BLACK = 0.3, 0.75


@dataclass
class Film:
    """The results of decoding an image file once."""

    size: tuple[int, int] = (0, 0)  # width, height
    digest: bytes = b""  # of size, mode and pixels
    contrast: int = 255  # grey levels of 256 between the darkest and the brightest 5% of the pixels
    depth: str = ""  # of its values, such as "8 bits" or "12 bits in 16"
    faults: tuple[str, ...] = ()  # keys of FAULTS
    error: str | None = None


FAULTS = {
    "grey": "are nearly all one grey",
    "dark": "are dark: 95 of 100 pixels are darker than a quarter of white",
    "clipped": "are clipped: a large part is pure white, or nearly all pure black",
    "signed": "have values below 0: the lowest is taken as black",
}


@dataclass
class File:
    """One JSONL file: its valid samples, and its errors."""

    path: Path
    samples: list[Sample]
    errors: list[tuple[int, str]]  # (line, text)
    users: dict[str, int]  # image path -> the first line that shows it
    notes: list[str] = field(default_factory=list)


def look(path: str) -> Film:
    try:
        image, depth = read_film(path)
    except ValueError as error:
        return Film(error=f"{error}: fetch it again, or remove the line")
    digest = hashlib.blake2b(f"{image.size} {image.mode}".encode(), digest_size=16)
    for _, pixels in blocks(image):
        digest.update(pixels)
    counts = (image if image.mode == "L" else image.convert("L")).histogram()
    passed = list(accumulate(counts))  # pixels at most so bright
    # a thing on a plain ground is no film, and no fault
    aside = 0.05 if image.mode == "L" else 0.001
    low, high = (bisect_left(passed, share * passed[-1]) for share in (aside, 1 - aside))
    faults = {
        "grey": high - low < FAINT and high >= DARK,
        "dark": high < DARK,
        "signed": depth == "signed values",
        "clipped": (
            high - low >= FAINT
            and (counts[255] > WHITE * passed[-1] or counts[0] > BLACK * passed[-1])
        ),
    }
    return Film(
        image.size,
        digest.digest(),
        high - low,
        depth,
        tuple(name for name, holds in faults.items() if holds),
    )


def look_at_all(files: list[File], workers: int) -> dict[str, Film]:
    """Each distinct image of all files, decoded once; decoding and hashing release the GIL."""
    paths = list(dict.fromkeys(path for file in files for path in file.users))
    with ThreadPoolExecutor(workers) as pool:
        results = tqdm(
            pool.map(look, paths, chunksize=16), total=len(paths), desc="films", unit="film"
        )
        films = dict(zip(paths, results))
    for file in files:
        file.errors += [
            (line, films[path].error)
            for path, line in file.users.items()
            if path in films and films[path].error
        ]
    return films


def find_oddities(file: File, films: dict[str, Film]) -> None:
    """Notes on what may be intended but should be known: duplicate samples and films, films on
    which nothing can be seen.
    """
    said = Counter((tuple(s.images), s.question, s.answer) for s in file.samples)
    if again := sum(said.values()) - len(said):
        file.notes.append(f"{again:,} samples repeat another's film, question and answer")
    shown = {
        path: films[path].digest for path in file.users if path in films and films[path].digest
    }
    if again := len(shown) - len(set(shown.values())):
        file.notes.append(f"{again:,} film files hold the pixels of another")
    for name, text in FAULTS.items():
        note(
            file,
            f"films {text}",
            [(Path(path).name, file.users[path]) for path in shown if name in films[path].faults],
        )
    reports = [sample for sample in file.samples if sample.task == "report"]
    headed = [(s.id, s.line) for s in reports if HEADING.search(s.answer)]
    note(file, "reports contain a section heading", headed)
    cut = [(s.id, s.line) for s in reports if s.answer.rstrip()[-1:] not in ".!?)\"'"]
    note(file, "reports end in mid-sentence", cut)
    odd = [(s.id, s.line) for s in file.samples if hides(" ".join([s.id, *sum(texts_of(s), [])]))]
    note(file, "samples contain control or zero-width characters", odd)


def hides(text: str) -> bool:
    """Whether a text holds characters that don't show; lines and tabs are none of these."""
    plain = " ".join(text.split())
    # the first is quick, and stricter with new letters
    return not plain.isprintable() and printable(plain) != plain


def note(file: File, text: str, lines: list[tuple[str, int]]) -> None:
    """Add a note to the file, if there are any `lines` (name, line): how many, and the first ten by
    name.
    """
    if lines:
        names = ", ".join(f"{name} (line {line})" for name, line in lines[:10])
        file.notes.append(f"{len(lines):,} {text}: {names}{', ...' if len(lines) > 10 else ''}")


def find_leaks(files: list[File], films: dict[str, Film]) -> None:
    """Errors for ids, patients and films that are on two sides, each named once, in the later
    file.
    """
    side = {file.path: side_of(file.path, [other.path for other in files]) for file in files}
    first_use: dict[tuple, tuple[File, int]] = {}
    for file in files:
        mine: dict[tuple, int] = {}
        for sample in file.samples:
            mine.setdefault(("id", sample.id), sample.line)
            if sample.patient:
                mine.setdefault(("patient", sample.patient), sample.line)
            for path in sample.images:
                if path in films and films[path].digest:
                    mine.setdefault(("film", films[path].digest), sample.line)
        for thing, line in mine.items():
            other, first = first_use.setdefault(thing, (file, line))
            if side[other.path] != side[file.path]:
                kind, name = thing
                name = "its pixels" if kind == "film" else repr(name)
                file.errors.append(
                    (
                        line,
                        (
                            f"leak: {kind} {name} is also in {other.path}:{first}: remove it"
                            " from one of them"
                        ),
                    )
                )


def spread(values: Iterable[float], form: str = "{:,.0f}") -> str:
    """ "median 4, 1 to 9, 95% at most 8"; "none" for nothing."""
    ordered = sorted(values)
    if not ordered:
        return "none"
    figures = (
        statistics.median(ordered),
        ordered[0],
        ordered[-(-95 * len(ordered) // 100) - 1],
        ordered[-1],
    )
    middle, low, high, most = (form.format(value) for value in figures)
    return f"median {middle}, {low} to {most}, 95% at most {high}"


def texts_of(sample: Sample) -> list[list[str]]:
    return sample.turns or [[sample.question, sample.answer]]


def summary(file: File, films: dict[str, Film], tokenizer=None, processor=None) -> str:
    """The figures of one file, one per line."""
    samples = file.samples
    unit = "tokens" if tokenizer else "words"

    def lengths(texts: list[str]) -> list[int]:
        return (
            [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            if tokenizer and texts
            else [len(text.split()) for text in texts]
        )

    shown = [films[path] for path in file.users if path in films and not films[path].error]
    boxes = [box for sample in samples for box in sample.boxes]
    depths = Counter(film.depth for film in shown)
    outside, other = (
        sum(part in text for _, text in file.errors)
        for part in ("lies outside 0..1", 'answer are not "boxes"')
    )
    tasks, labels = Counter(s.task for s in samples), Counter(s.label for s in samples if s.label)
    lines = [
        f"{file.path}",
        f"  samples    {len(samples):,}: "
        + ", ".join(f"{n:,} {task}" for task, n in tasks.most_common()),
        (
            f"  films      {len(shown):,} read; {len({s.patient for s in samples if s.patient}):,}"
            " patients named"
        ),
        f"  width      {spread(film.size[0] for film in shown)} pixels",
        f"  height     {spread(film.size[1] for film in shown)} pixels",
        f"  depth      {', '.join(f'{n:,} of {d}' for d, n in depths.most_common()) or 'none'}",
    ]
    if processor and shown:
        patches = [
            processor.get_number_of_image_patches(film.size[1], film.size[0], {}) for film in shown
        ]
        lines.append(f"  film       {spread(n // processor.merge_size**2 for n in patches)} tokens")
    for name, place in (("question", 0), ("answer", 1)):
        lines.append(
            f"  {name:<10}"
            f" {spread(lengths([turn[place] for s in samples for turn in texts_of(s)]))} {unit}"
        )
    areas = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes)
    lines += [
        f"  boxes      {len(boxes):,}; a grounding sample has "
        f"{spread(len(s.boxes) for s in samples if s.task == 'grounding')}"
        + f"; in lines with errors {outside:,} lie outside 0..1, and {other:,} answers differ from"
        ' "boxes"' * bool(outside or other),
        f"  box area   {spread(areas, '{:.3f}')} of the film",
        "  labels     "
        + (", ".join(f"{n:,} {label}" for label, n in labels.most_common(8)) or "none")
        + (f", and {len(labels) - 8} more" if len(labels) > 8 else ""),
    ]
    return "\n".join(map(message, lines + [f"  note       {text}" for text in file.notes]))


def sides_text(paths: list[Path]) -> str:
    """ "sides: train a.jsonl; test b.jsonl"."""
    sides: dict[str, list[str]] = {}
    for path in paths:
        sides.setdefault(side_of(path, paths), []).append(str(path))
    text = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items())
    alone = " (one side, so nothing was compared)" if len(sides) == 1 else ""
    return message(f"sides  {text}{alone}")


def check(
    paths: list[Path], *, model: str | None = None, workers: int | None = None
) -> tuple[str, list[str], list[File]]:
    """(summary of all files, all errors as "file:line: text" in order, the files)."""
    tokenizer = processor = None
    if model:
        from minigrpo.checkpoint import open_checkpoint  # imports torch

        opened = open_checkpoint(model, weights=False)
        tokenizer, processor = opened.tokenizer, opened.images
    files = [File(path, *scan_jsonl(path)) for path in paths]
    films = look_at_all(files, workers or os.cpu_count() or 1)
    for file in files:
        if not file.samples and not file.errors:
            file.errors.append((1, "the file is empty: write one JSON object a line"))
        find_oddities(file, films)
    find_leaks(files, films)
    errors = [
        message(f"{file.path}:{line}: {text}")
        for file in files
        for line, text in sorted(file.errors)
    ]
    return (
        "\n".join(
            [*(summary(file, films, tokenizer, processor) for file in files), sides_text(paths)]
        ),
        errors,
        files,
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        help="JSONL files; name train and test together to find leaks",
    )
    parser.add_argument(
        "--model",
        help="checkpoint whose tokenizer and image processor count tokens; default: count words",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        help="PNG of films with their boxes; default: beside the first file, as NAME-check.png",
    )
    parser.add_argument(
        "--workers", type=int, help="threads that decode films; default: one per core"
    )
    args = parser.parse_args()
    if len(set(map(os.path.abspath, args.files))) < len(args.files):
        parser.error("the same file is named twice")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    began = time.process_time()
    try:
        text, errors, files = check(args.files, model=args.model, workers=args.workers)
    except (DataError, OSError, ValueError) as error:
        fail(error)
    seconds, count = time.process_time() - began, sum(len(file.samples) for file in files)
    print(
        f"{text}\nread {count:,} samples in {seconds:.1f} s of processor time,"
        f" {count / max(seconds, 1e-9):,.0f} a second"
    )
    sheet = args.sheet or args.files[0].with_name(f"{args.files[0].stem}-check.png")
    replaced = sheet.exists()
    try:
        if draw_sheet(
            sheet,
            [sample for file in files for sample in file.samples],
            bad={line for file in files for line in bad_images(file)},
        ):
            print(f"{sheet}: films with their boxes{', replaced' if replaced else ''}; look at it")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        errors.append(
            f"--sheet {sheet} cannot be written ({reason}): name a .png in a folder that exists"
        )
    if errors:
        print(*errors, sep="\n")
        sys.exit(f"{len(errors):,} errors")
    print("no errors")


def bad_images(file: File) -> list[str]:
    """Images of the file that can't be drawn: those on a line with an error."""
    lines = {line for line, _ in file.errors}
    return [path for path, line in file.users.items() if line in lines]


if __name__ == "__main__":
    main()
