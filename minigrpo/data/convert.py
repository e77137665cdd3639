"""The program behind every adapter: read the files of a data set, write `OUT/SPLIT.jsonl` and its
films, and report what became of each row.

An adapter is a function (root, split, ledger) -> drafts; `convert` reads the films in parallel,
writes what can be read, closes the ledger and prints it. It is not a program by itself: each data
set has its own, such as

    python -m minigrpo.data.openi --help
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minigrpo.run.files import WriteError, aside, sync_all, write_jsonl
from minigrpo.run.terminal import Parser, fail

from .film import header, load_image
from .ledger import Ledger
from .rows import Draft
from .splits import SPLITS

# above what any run sees (the paper's largest is 451,584), far below what a detector writes
PIXELS = 1024 * 1024
Reader = Callable[[Path, str, Ledger], list[Draft]]


def shrink(film: Image.Image, pixels: int) -> Image.Image:
    """`film` in at most so many pixels, keeping its aspect ratio; a smaller one is unchanged."""
    scale = math.sqrt(pixels / (film.width * film.height))
    if scale >= 1:
        return film
    return film.resize(
        (max(1, int(film.width * scale)), max(1, int(film.height * scale))),
        Image.Resampling.LANCZOS,
    )


def write_film(
    source: Path, stem: Path, pixels: int, load: Callable[[Path], Image.Image]
) -> tuple[str, str | None]:
    """(suffix of the film written as `stem` + suffix, None), or ("", the reason why there is none).

    An 8-bit PNG or JPEG that fits is copied byte for byte; anything else becomes an 8-bit grey PNG.
    """
    if not source.is_file():
        return "", "film missing"
    suffix = source.suffix.lower()
    try:
        film = load(source)  # decodes it whole: a truncated film must show here
        small = shrink(film, pixels)
        plain = suffix in (".png", ".jpg", ".jpeg") and not header(source)[0].startswith("I")
        if small is not film or not plain:
            suffix = ".png"
            small = small.convert("L")
            with aside(stem.with_name(f"{stem.name}.png"), durable=False) as part:
                small.save(part, "PNG", compress_level=3)
        else:
            data = source.read_bytes()
            with aside(stem.with_name(stem.name + suffix), durable=False) as part:
                part.write_bytes(data)
    except (ImportError, WriteError):  # a decoder that is not installed; a full disk
        raise
    except Exception as error:  # decoders raise a dozen kinds, all of which mean the same
        return "", f"film cannot be read ({type(error.__cause__ or error).__name__})"
    return suffix, None


def convert(
    read: Reader,
    unit: str,
    root: Path,
    split: str,
    out: Path,
    *,
    pixels: int = PIXELS,
    load=load_image,
    workers: int | None = None,
) -> Ledger:
    """Write one split of one data set; returns the ledger of its rows. Existing splits and films
    are never overwritten.
    """
    target, films = out / f"{split}.jsonl", out / "films"
    if not root.is_dir():
        raise FileNotFoundError(
            f"--root {root} is not a folder: give the one with the files of the data set"
            " (docs/data.md)"
        )
    if target.exists():
        raise ValueError(f"{target} exists already: remove it, or give another --output_dir")
    ledger = Ledger(unit)
    drafts = read(root, split, ledger)
    check_drafts(drafts)
    films.mkdir(parents=True, exist_ok=True)
    # each film once, whatever is asked about it
    source = {draft.name: draft.film for draft in drafts}
    taken = {path.stem for path in films.iterdir()}
    if clash := [name for name in source if name in taken]:
        raise ValueError(
            f"{films} already contains {clash[0]} and {len(clash) - 1} more films of this split,"
            " from a run that did not finish or from another split: remove them, or give another"
            " --output_dir"
        )
    # decoding releases the GIL
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        write = pool.map(lambda name: write_film(source[name], films / name, pixels, load), source)
        written = dict(zip(source, tqdm(write, total=len(source), desc="films", unit="film")))
    lines = []
    for draft in drafts:
        suffix, reason = written[draft.name]
        if reason:
            ledger.drop(draft.rows, reason)
        else:
            ledger.keep(draft.rows)
            lines.append(
                {"id": draft.sample["id"], "image": f"films/{draft.name}{suffix}"} | draft.sample
            )
    ledger.samples = Counter(line["task"] for line in lines)
    table = ledger.table()  # fails on a row that nobody closed, before anything is written
    if not lines:
        raise ValueError(f"no sample is left for {split}:\n{table}")
    sync_all(films)
    write_jsonl(target, lines)
    return ledger


def check_drafts(drafts: list[Draft]) -> None:
    """Check that ids and film names are unique."""
    twice = [name for name, n in Counter(draft.sample["id"] for draft in drafts).items() if n > 1]
    if twice:
        raise ValueError(
            f"id {twice[0]!r} and {len(twice) - 1} more would name two samples: the files of the"
            " data set list one film twice"
        )
    films: dict[str, Path] = {}
    for draft in drafts:
        if films.setdefault(draft.name, draft.film) != draft.film:
            raise ValueError(
                f"two films are called {draft.name}: {films[draft.name]} and {draft.film}"
            )


def adapter_main(
    read: Reader, unit: str, doc: str, load=load_image, more: Callable | None = None
) -> None:
    """`python -m minigrpo.data.NAME --root DIR --split test --output_dir OUT`; `more` adds an
    adapter's own arguments.
    """
    parser = Parser(doc)
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of the data set as downloaded"
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder for SPLIT.jsonl and films/; splits may share it",
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=PIXELS,
        help=f"larger films are shrunk to this many; the aspect ratio stays (default {PIXELS:,})",
    )
    if more:
        more(parser)
    options = vars(parser.parse_args())
    root, split, out, pixels = (
        options.pop(name) for name in ("root", "split", "output_dir", "pixels")
    )
    if pixels < 32 * 32:
        parser.error(f"--pixels {pixels} is less than one image token (1024)")
    try:
        ledger = convert(
            lambda *given: read(*given, **options), unit, root, split, out, pixels=pixels, load=load
        )
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(ledger.table())
    tasks = ", ".join(f"{n:,} {task}" for task, n in ledger.samples.items())
    print(f"wrote {sum(ledger.samples.values()):,} samples ({tasks}) to {out / f'{split}.jsonl'}")


def main() -> None:
    print(__doc__)
    sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)


if __name__ == "__main__":
    main()
