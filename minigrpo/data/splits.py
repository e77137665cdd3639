"""Who trains and who is tested. The authors' own splits where there are some, else a hash of the
patient.
"""

import hashlib
from collections.abc import Iterable

SPLITS = ("train", "valid", "test")
SPELLINGS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validate": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}


def hash_fraction(text: str) -> float:
    """0..1, the same on every machine and for ever (Python's own hash() changes with each
    start).
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def hash_split(patient: str) -> str:
    """80 / 10 / 10 by the patient."""
    place = hash_fraction(patient)
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


def patient_splits(rows: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """(patient, the authors' split or None) of *all* rows -> patient -> split.

    No row has a split: 80 / 10 / 10 by the patient's hash. Where the authors left out valid or
        test, a tenth of their
    training patients stands in for it, by the same hash; their own test and valid are never
    touched. A patient in two splits, or an unknown name, is an error: nobody can be trained on and
    tested on.
    """
    official: dict[str, str | None] = {}
    for patient, name in rows:
        split = SPELLINGS.get(name.strip().lower()) if name and name.strip() else None
        if split is None and name and name.strip():
            raise ValueError(
                f"patient {patient}: unknown split {name!r}; known are {', '.join(SPELLINGS)}"
            )
        if official.setdefault(patient, split) != split:
            raise ValueError(
                f"patient {patient} is in two splits, {official[patient]} and {split}: a test on"
                " patients that the model was trained on means nothing. Remove the patient from one"
                " of them"
            )
    known = set(official.values()) - {None}
    if not known:
        return {patient: hash_split(patient) for patient in official}
    if None in official.values():
        patient = next(p for p, split in official.items() if split is None)
        raise ValueError(
            f"patient {patient} has no split although others have: fill it in, or remove the rows"
        )
    missing = [split for split in ("test", "valid") if split not in known]
    spare = {split: (number / 10, (number + 1) / 10) for number, split in enumerate(missing)}

    def place(patient: str, split: str) -> str:
        if split != "train":
            return split
        return next(
            (name for name, (low, high) in spare.items() if low <= hash_fraction(patient) < high),
            split,
        )

    return {patient: place(patient, split) for patient, split in official.items()}
