"""Open-i / Indiana University chest films with their reports: open to everyone.

    python -m minigrpo.data.openi --root DIR --split train --output_dir OUT

DIR holds `indiana_reports.csv` (uid, findings, ...), `indiana_projections.csv` (uid, filename,
projection) and the films as PNG in any folder below. One report sample for each frontal film with
findings. A uid is one study of one person, and nobody has two. There are no official splits, so
films are split 80 / 10 / 10 by a hash of the uid. Demner-Fushman et al., JAMIA 23:304-310, 2016.
"""

from pathlib import Path

from .convert import adapter_main
from .ledger import Ledger
from .rows import Draft, find_file, index_films, one_paragraph, read_csv, read_rows, report_sample
from .splits import patient_splits


def read(root: Path, split: str, ledger: Ledger) -> list[Draft]:
    reports: dict[str, str] = {}
    for _, row in read_csv(find_file(root, "indiana_reports.csv"), ("uid", "findings")):
        if reports.setdefault(row["uid"], row["findings"]) != row["findings"]:
            raise ValueError(
                f"indiana_reports.csv: uid {row['uid']} has two different reports: remove one"
            )
    films, drafts = index_films(root), []
    rows = read_rows(
        find_file(root, "indiana_projections.csv"), ("uid", "filename", "projection"), ledger
    )
    splits = patient_splits((row["uid"], None) for _, row in rows)
    for key, row in rows:
        uid, stem = row["uid"], Path(row["filename"]).stem
        if splits[uid] != split:
            ledger.drop([key], "another split")
        elif row["projection"].lower() != "frontal":
            ledger.drop([key], "not a frontal film")
        elif uid not in reports:
            ledger.drop([key], "no report")
        elif not reports[uid]:
            ledger.drop([key], "empty findings")
        else:
            sample = report_sample(
                f"openi-{stem}", one_paragraph(reports[uid]), source="openi", patient=f"openi-{uid}"
            )
            drafts.append(
                Draft(
                    [key],
                    films.get(row["filename"], root / row["filename"]),
                    f"openi-{stem}",
                    sample,
                )
            )
    ledger.notes["reports without a film"] = len(reports.keys() - {row["uid"] for _, row in rows})
    return drafts


def main() -> None:
    adapter_main(read, "films", __doc__)


if __name__ == "__main__":
    main()
