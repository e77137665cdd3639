"""NIH ChestX-ray14, the boxes that radiologists drew by hand: open to everyone.

    python -m minigrpo.data.nih --root DIR --split train --output_dir OUT

DIR holds `BBox_List_2017.csv` (Image Index, Finding Label, Bbox [x, y, w, h] in pixels of 1024 x
1024 films) and the films as PNG in any folder below. One grounding sample for each film and label.
Wang et al., CVPR 2017, 1705.02315.

Splits: the official lists (`train_val_list.txt`, `test_list.txt`) were made for classification, and
in the release as we know it all films with boxes are in the test list. If the lists are in DIR and
do split the films with boxes, they are used (and a tenth of the training patients is valid);
otherwise the patients with boxes are split 80 / 10 / 10 by hash, as the output says. A model
trained on that split must not be evaluated on the official classification test.
"""

from collections import defaultdict
from pathlib import Path

from .convert import adapter_main
from .ledger import Ledger
from .rows import (
    Draft,
    find_file,
    grounding_sample,
    index_films,
    number,
    read_rows,
    readable,
    unit_box,
)
from .splits import patient_splits

SIDE = 1024  # pixels of every film of the release
# the header's one cell "Bbox [x,y,w,h]" holds commas, so a reader sees four
CORNERS = ("Bbox [x", "y", "w", "h]")


def official_lists(root: Path, films: set[str]) -> dict[str, str]:
    """Film -> train or test by the official lists; empty unless they put some of `films` into
    each.
    """
    lists = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (root / name).is_file():
            lists |= dict.fromkeys(films & set((root / name).read_text().split()), split)
    return lists if set(lists.values()) == {"train", "test"} else {}


def read(root: Path, split: str, ledger: Ledger) -> list[Draft]:
    rows = read_rows(
        find_file(root, "BBox_List_2017.csv"), ("Image Index", "Finding Label", *CORNERS), ledger
    )
    official = official_lists(root, {row["Image Index"] for _, row in rows})
    if not official:
        ledger.notes[
            "the official lists do not split these films: split by a hash of the patient"
        ] = len(rows)
    splits = patient_splits(
        (patient_of(row["Image Index"]), official.get(row["Image Index"])) for _, row in rows
    )
    groups: dict[tuple[str, str], list] = defaultdict(list)
    for key, row in rows:
        if splits[patient_of(row["Image Index"])] != split:
            ledger.drop([key], "another split")
            continue
        x, y, w, h = (number(row[name]) for name in CORNERS)
        box = unit_box(x, y, x + w, y + h, SIDE, SIDE, ledger)
        if isinstance(box, str):
            ledger.drop([key], box)
        elif not row["Finding Label"]:
            ledger.drop([key], "no label")
        else:
            groups[row["Image Index"], readable(row["Finding Label"])].append((key, box))
    films, drafts = index_films(root), []
    for (film, label), group in groups.items():
        stem = Path(film).stem
        sample = grounding_sample(
            f"nih-{stem}-{label}",
            "abnormality",
            label,
            [box for _, box in group],
            source="nih",
            patient=f"nih-{patient_of(film)}",
        )
        drafts.append(
            Draft([key for key, _ in group], films.get(film, root / film), f"nih-{stem}", sample)
        )
    return drafts


def patient_of(film: str) -> str:
    """ "00013118_008.png" -> "00013118"."""
    return film.split("_")[0]


def main() -> None:
    adapter_main(read, "boxes", __doc__)


if __name__ == "__main__":
    main()
