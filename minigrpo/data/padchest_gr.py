"""PadChest-GR: sentences of reports with their boxes (credentialed, BIMCV).

    python -m minigrpo.data.padchest_gr --root DIR --split test --output_dir OUT

DIR holds `master_table.csv` (ImageID, split, ...), `grounded_reports_20240819.json` (ImageID,
findings with sentence_en and boxes in 0..1) and the films, 16-bit PNG, in any folder below. One
grounding sample for each sentence with boxes; the official split. Castro et al., 2411.05085.
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
    one_paragraph,
    read_csv,
    read_json,
    unit_box,
)
from .splits import patient_splits


def read(root: Path, split: str, ledger: Ledger) -> list[Draft]:
    owner: dict[str, str] = {}  # of each film; the table has one row for each film and label
    official: list[tuple[str, str]] = []
    for _, row in read_csv(find_file(root, "master_table.csv"), ("ImageID", "split")):
        owner[row["ImageID"]] = row.get("PatientID") or row.get("StudyID") or row["ImageID"]
        official.append((owner[row["ImageID"]], row["split"]))
    splits = patient_splits(official)
    groups: dict[tuple[str, str], list] = defaultdict(list)
    for place, report in enumerate(read_json(find_file(root, "grounded_reports_20240819.json"))):
        film, findings = report.get("ImageID", ""), report.get("findings") or []
        for index, finding in enumerate(findings):
            key = ("grounded_reports_20240819.json", place, index)
            ledger.enter(key)
            if film not in owner or splits[owner[film]] != split:
                ledger.drop(
                    [key], "another split" if film in owner else "film not in master_table.csv"
                )
                continue
            phrase = one_paragraph(finding.get("sentence_en") or "").rstrip(".")
            boxes = [unit_box(*corners(box), 1, 1, ledger) for box in finding.get("boxes") or []]
            good = [box for box in boxes if not isinstance(box, str)]
            if not boxes:
                ledger.drop([key], "no boxes")
            elif not good:
                ledger.drop([key], boxes[0])
            elif not phrase:
                ledger.drop([key], "no English sentence")
            else:
                ledger.notes["boxes left out of a kept sentence"] += len(boxes) - len(good)
                groups[film, phrase].append((key, good))
    films, drafts, count = index_films(root), [], defaultdict(int)
    for (film, phrase), group in groups.items():
        stem = Path(film).stem
        boxes = list({tuple(box): box for _, good in group for box in good}.values())
        sample = grounding_sample(
            f"padchest-{stem}-{count[film]}",
            "phrase",
            phrase,
            boxes,
            phrase,
            source="padchest_gr",
            patient=f"padchest-{owner[film]}",
        )
        count[film] += 1
        drafts.append(
            Draft(
                [key for key, _ in group], films.get(film, root / film), f"padchest-{stem}", sample
            )
        )
    return drafts


def corners(box) -> list[float]:
    """The four numbers of a box; NaN for anything else."""
    return (
        [number(str(value)) for value in box]
        if isinstance(box, list) and len(box) == 4
        else [float("nan")] * 4
    )


def main() -> None:
    adapter_main(read, "sentences", __doc__)


if __name__ == "__main__":
    main()
