"""MS-CXR: phrases of reports with their boxes on MIMIC-CXR films (credentialed, PhysioNet).

    python -m minigrpo.data.ms_cxr --root DIR --mimic_root MIMIC --split test --output_dir OUT

DIR holds `MS_CXR_Local_Alignment_v1.0.0.csv` (x, y, w, h, image_width, image_height, label_text,
dicom_id, category_name, path); MIMIC holds the films and `mimic-cxr-2.0.0-split.csv`. All boxes of
one film with the same text are one sample; the split is MIMIC's own, so that no model trained on
MIMIC reports is tested on its training films. Boecking et al., ECCV 2022, 2204.09817.
"""

from collections import defaultdict
from pathlib import Path

from .convert import adapter_main
from .ledger import Ledger
from .mimic import mimic_root_argument, official_splits, patient_id
from .rows import (
    Draft,
    find_file,
    grounding_sample,
    number,
    one_paragraph,
    read_rows,
    readable,
    unit_box,
)
from .splits import patient_splits

COLUMNS = (
    "x",
    "y",
    "w",
    "h",
    "image_width",
    "image_height",
    "label_text",
    "dicom_id",
    "category_name",
    "path",
)


def read(root: Path, split: str, ledger: Ledger, mimic_root: Path | None = None) -> list[Draft]:
    mimic = mimic_root or root
    official = official_splits(mimic)
    splits = patient_splits(official.values())
    groups: dict[tuple[str, str], list] = defaultdict(list)
    for key, row in read_rows(
        find_file(root, "MS_CXR_Local_Alignment_v1.0.0.csv"), COLUMNS, ledger
    ):
        if row["dicom_id"] not in official:
            ledger.drop([key], "film not in MIMIC's split table")
            continue
        if splits[official[row["dicom_id"]][0]] != split:
            ledger.drop([key], "another split")
            continue
        x, y, w, h, width, height = (number(row[name]) for name in COLUMNS[:6])
        box = unit_box(x, y, x + w, y + h, width, height, ledger)
        if isinstance(box, str):
            ledger.drop([key], box)
        elif not row["label_text"]:
            ledger.drop([key], "no phrase")
        else:
            groups[row["dicom_id"], one_paragraph(row["label_text"]).rstrip(".")].append(
                (key, row, box)
            )
    drafts, count = [], defaultdict(int)
    for (dicom, phrase), group in groups.items():
        row = group[0][1]
        sample = grounding_sample(
            f"mscxr-{dicom}-{count[dicom]}",
            "phrase",
            readable(row["category_name"]),
            [box for *_, box in group],
            phrase,
            source="ms_cxr",
            patient=patient_id(official[dicom][0]),
        )
        count[dicom] += 1
        drafts.append(
            Draft(
                [key for key, *_ in group],
                (mimic / row["path"]).with_suffix(".jpg"),
                f"mscxr-{dicom}",
                sample,
            )
        )
    return drafts


def main() -> None:
    adapter_main(read, "boxes", __doc__, more=mimic_root_argument)


if __name__ == "__main__":
    main()
