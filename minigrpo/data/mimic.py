"""What the three data sets on MIMIC-CXR films share: the path of a film, its patient, and the
official split.
"""

from pathlib import Path

from .rows import find_file, read_csv


def film_path(root: Path, subject: str, study: str, dicom: str) -> Path:
    return root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"


def patient_id(subject: str) -> str:
    """The same name in every data set on MIMIC films, so that `minigrpo.data.check` recognises a
    person in two of them.
    """
    return f"mimic-{subject}"


def official_splits(root: Path) -> dict[str, tuple[str, str]]:
    """dicom_id -> (subject_id, split) of `mimic-cxr-2.0.0-split.csv`."""
    rows = read_csv(
        find_file(root, "mimic-cxr-2.0.0-split.csv"), ("dicom_id", "subject_id", "split")
    )
    return {row["dicom_id"]: (row["subject_id"], row["split"]) for _, row in rows}


def mimic_root_argument(parser) -> None:
    parser.add_argument(
        "--mimic_root",
        type=Path,
        default=None,
        help="folder of MIMIC-CXR-JPG (files/, *-split.csv, *-metadata.csv); default: --root",
    )
