"""CheXpert Plus (registration at Stanford AIMI).

    python -m minigrpo.data.chexpert_plus --root DIR --split train --output_dir OUT

DIR holds `df_chexpert_plus_240401.csv` (path_to_image, frontal_lateral, split, section_findings,
...) and the films at `path_to_image` below DIR, or below `PNG/` and as .png. One report sample for
each frontal film with a findings section (about a quarter of all rows have one), up to the heading
of another section, if it has one. The official split has only train and valid, so a tenth of the
training patients, by hash, is test. Chambon et al., 2405.19538.
"""

from pathlib import Path, PurePosixPath

from .convert import adapter_main
from .ledger import Ledger
from .rows import Draft, find_file, one_paragraph, read_rows, report_sample
from .sections import findings_of, note_section
from .splits import patient_splits

CSV = "df_chexpert_plus_240401.csv"


def read(root: Path, split: str, ledger: Ledger) -> list[Draft]:
    rows = read_rows(
        find_file(root, CSV),
        ("path_to_image", "frontal_lateral", "split", "section_findings"),
        ledger,
    )
    splits = patient_splits((patient_of(row["path_to_image"]), row["split"]) for _, row in rows)
    drafts = []
    for key, row in rows:
        path = PurePosixPath(row["path_to_image"])
        if splits[patient_of(row["path_to_image"])] != split:
            ledger.drop([key], "another split")
        elif row["frontal_lateral"].lower() != "frontal":
            ledger.drop([key], "not a frontal film")
        elif not (findings := findings_of("FINDINGS:\n" + row["section_findings"])):
            ledger.drop([key], "empty findings")
        else:
            note_section(findings, ledger)
            # patient00001-study1-view1_frontal
            name = "chexpert-" + "-".join(path.with_suffix("").parts[-3:])
            sample = report_sample(
                name,
                one_paragraph(findings.text),
                source="chexpert_plus",
                patient=f"chexpert-{patient_of(row['path_to_image'])}",
            )
            drafts.append(Draft([key], film_path(root, path), name, sample))
    return drafts


def patient_of(path: str) -> str:
    """ "train/patient00001/study1/view1_frontal.jpg" -> "patient00001"."""
    patients = [part for part in PurePosixPath(path).parts if part.startswith("patient")]
    if not patients:
        raise ValueError(
            f"{CSV}: path_to_image {path!r} has no patientNNNNN folder: is it the released file?"
        )
    return patients[0]


def film_path(root: Path, path: PurePosixPath) -> Path:
    """The path of the film: the releases differ in folder and suffix."""
    places = [
        root / folder / path.with_suffix(suffix)
        for folder in ("", "PNG", "PNG/PNG")
        for suffix in (path.suffix, ".png")
    ]
    return next((place for place in places if place.is_file()), places[0])


def main() -> None:
    adapter_main(read, "films", __doc__)


if __name__ == "__main__":
    main()
