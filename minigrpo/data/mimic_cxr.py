"""MIMIC-CXR-JPG with the reports of MIMIC-CXR (credentialed, PhysioNet).

    python -m minigrpo.data.mimic_cxr --root DIR --split test --output_dir OUT

DIR holds `mimic-cxr-2.0.0-split.csv`, `mimic-cxr-2.0.0-metadata.csv`, the films
`files/p10/p10000032/s50414267/DICOM.jpg` and, there or under --reports_root (also in
`mimic-cxr-reports/`), the reports `files/p10/p10000032/s50414267.txt`. One report sample for each
frontal film (PA, AP), only the FINDINGS section (`sections.py`; FINDINGS AND IMPRESSION if there is
nothing else, which is counted), by the official split. `--classification` adds one sample per film
that lists the positive labels of `mimic-cxr-2.0.0-chexpert.csv`. Johnson et al., Scientific Data
6:317, 2019; 1901.07042.
"""

from pathlib import Path

from . import templates
from .convert import adapter_main
from .ledger import Ledger
from .mimic import film_path, official_splits, patient_id
from .rows import (
    Draft,
    find_file,
    number,
    one_paragraph,
    read_csv,
    read_rows,
    readable,
    report_sample,
    sample_rng,
)
from .sections import findings_of, note_section
from .splits import patient_splits


def read(
    root: Path,
    split: str,
    ledger: Ledger,
    reports_root: Path | None = None,
    classification: bool = False,
) -> list[Draft]:
    official = official_splits(root)
    splits = patient_splits(official.values())
    rows = read_rows(
        find_file(root, "mimic-cxr-2.0.0-metadata.csv"),
        ("dicom_id", "subject_id", "study_id", "ViewPosition"),
        ledger,
    )
    labels = positive_labels(root) if classification else {}
    drafts, texts = [], {}
    for key, row in rows:
        dicom, subject, study = row["dicom_id"], row["subject_id"], row["study_id"]
        if dicom not in official:
            ledger.drop([key], "not in the split table")
            continue
        if splits[subject] != split:
            ledger.drop([key], "another split")
            continue
        if row["ViewPosition"] not in ("PA", "AP"):
            ledger.drop([key], "not a frontal film")
            continue
        if (subject, study) not in texts:
            texts[subject, study] = read_findings(reports_root or root, subject, study, ledger)
        text, reason = texts[subject, study]
        common = {"source": "mimic_cxr", "patient": patient_id(subject)}
        samples = [] if reason else [report_sample(f"mimic-{dicom}", text, **common)]
        if labels.get((subject, study)):
            samples.append(labels_sample(f"mimic-{dicom}-labels", labels[subject, study], **common))
        if not samples:
            ledger.drop([key], reason)
        drafts += [
            Draft([key], film_path(root, subject, study, dicom), f"mimic-{dicom}", sample)
            for sample in samples
        ]
    return drafts


def read_findings(root: Path, subject: str, study: str, ledger: Ledger) -> tuple[str, str | None]:
    """(findings, None), or ("", the reason why there are none). Where sections end is counted in
    the ledger."""
    folder = Path("files") / f"p{subject[:2]}" / f"p{subject}"
    paths = [
        path
        for path in (
            root / folder / f"s{study}.txt",
            root / "mimic-cxr-reports" / folder / f"s{study}.txt",
        )
        if path.is_file()
    ]
    if not paths:
        return "", "no report"
    findings = findings_of(paths[0].read_text(encoding="utf-8", errors="replace"))
    if not findings:
        return "", "no or empty findings section"
    note_section(findings, ledger)
    return one_paragraph(findings.text), None


def positive_labels(root: Path) -> dict[tuple[str, str], list[str]]:
    """(subject, study) -> the labels that CheXpert's labeller found present (1.0); uncertain (-1)
    is not present.
    """
    labels_of = {}
    for _, row in read_csv(
        find_file(root, "mimic-cxr-2.0.0-chexpert.csv"), ("subject_id", "study_id", "No Finding")
    ):
        key = row.pop("subject_id"), row.pop("study_id")
        labels_of[key] = [readable(name) for name, value in row.items() if number(value) == 1.0]
    return labels_of


def labels_sample(sample_id: str, labels: list[str], **more) -> dict:
    question, answer = templates.classification_turn(labels, sample_rng(sample_id))
    return {
        "id": sample_id,
        "task": "classification",
        "question": question,
        "answer": answer,
        "label": ", ".join(labels),
    } | more


def arguments(parser) -> None:
    parser.add_argument(
        "--reports_root",
        type=Path,
        default=None,
        help="folder of the report texts; default: --root",
    )
    parser.add_argument(
        "--classification",
        action="store_true",
        help="add a sample per film that lists its CheXpert labels",
    )


def main() -> None:
    adapter_main(read, "films", __doc__, more=arguments)


if __name__ == "__main__":
    main()
