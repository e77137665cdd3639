"""What two files have in common: films by their content, patients by their names, samples as a
whole."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .sample import Sample
from .splits import SPELLINGS

WORDS = SPELLINGS | {"eval": "valid", "evaluation": "valid"}


def side_of(path: Path, among: Sequence[Path]) -> str:
    """train, valid or test, as the file's name says, or else the nearest folder's that not all
    files share, or else its own folder's; else the file's name.

    "mimic/train-clean.jsonl" and "train/reports.jsonl" are for training, "val/reports.jsonl" for
    validation.
    """
    whole = Path(os.path.abspath(path))
    common = os.path.commonpath([os.path.dirname(os.path.abspath(other)) for other in among])
    for part in reversed(whole.relative_to(common).with_suffix("").parts):
        words = "".join(char if char.isalpha() else " " for char in part.lower()).split()
        sides = {
            WORDS[word] for word in (word.removesuffix("set") for word in words) if word in WORDS
        }
        if len(sides) == 1:
            return sides.pop()
    return WORDS.get(whole.parent.name.lower(), path.name)


def check_apart(
    train: Sequence[Sample], others: Sequence[Sample], names: tuple[str, str]
) -> str | None:
    """ValueError if all the others are also training samples; a note if some of their films or
    patients are. `names`: those of the arguments.

    Films are the same if they are one file or have the same bytes, whatever their names.
    """
    twin = same_files(film_paths(train), film_paths(others))
    plain = {
        id(s): (s.question, s.answer, str(s.turns), *(twin[path] for path in s.images))
        for s in (*train, *others)
    }
    known = {plain[id(sample)] for sample in train}
    if others and all(plain[id(sample)] in known for sample in others):
        raise ValueError(
            f"{names[1]} is a copy of {names[0]}, or of a part of it: all of its {len(others):,}"
            " samples are trained on, so it would measure memorisation. Hold some patients out"
        )
    films = {twin[path] for path in film_paths(others)}
    shared = len(films & {twin[path] for path in film_paths(train)})
    patients = {s.patient for s in others if s.patient}
    both = len(patients & {s.patient for s in train})
    if not shared and not both:
        return None
    return (
        f"{shared:,} of {len(films):,} films and {both:,} of {len(patients):,} patients of "
        f"{names[1]} are also in {names[0]}, so it partly measures memorisation; "
        "`python -m minigrpo.data.check` on both files names them"
    )


def film_paths(samples: Iterable[Sample]) -> list[str]:
    return list(dict.fromkeys(path for sample in samples for path in sample.images))


def same_files(first: Sequence[str], second: Sequence[str]) -> dict[str, str]:
    """path -> one name for all paths of either list that are the same file, or hold the same bytes
    as one of the other list.

    Only files of a size that occurs in both are read.
    """
    name: dict[str, str] = {}
    real = [{path: os.path.realpath(path) for path in paths} for paths in (first, second)]
    sizes = [
        {path: os.path.getsize(path) for path in set(paths.values()) if os.path.isfile(path)}
        for paths in real
    ]
    common = set(sizes[0].values()) & set(sizes[1].values())
    for paths, size in zip(real, sizes):
        for path, place in paths.items():
            name[path] = content_of(place) if size.get(place) in common else place
    return name


def content_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
