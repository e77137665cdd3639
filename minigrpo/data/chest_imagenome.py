"""Chest ImaGenome: boxes of the anatomy on MIMIC-CXR films (credentialed, PhysioNet).

    python -m minigrpo.data.chest_imagenome --root DIR --mimic_root MIMIC --split test \\
        --output_dir OUT

DIR holds `silver_dataset/splits/{train,valid,test}.csv` and
`silver_dataset/scene_graph/DICOM_SceneGraph.json`; MIMIC holds the films and
`mimic-cxr-2.0.0-metadata.csv` with their Rows and Columns. `--regions` grounding samples per film,
chosen from its objects by the film's own seed: the same regions each time. Only the split file of
that name is used, and the films of the gold set (`images_to_avoid.csv`, if present) are left out.
Wu et al., 2108.00316.
"""

from pathlib import Path

from .convert import adapter_main
from .ledger import Ledger
from .mimic import film_path, mimic_root_argument, patient_id
from .rows import (
    Draft,
    find_file,
    grounding_sample,
    number,
    read_csv,
    read_json,
    read_rows,
    sample_rng,
    unit_box,
)
from .splits import SPLITS, patient_splits


def read(
    root: Path, split: str, ledger: Ledger, mimic_root: Path | None = None, regions: int = 1
) -> list[Draft]:
    mimic, folder = mimic_root or root, root / "silver_dataset"
    if regions < 1:
        raise ValueError(f"--regions must be at least 1, got {regions}")
    sizes = {
        row["dicom_id"]: (number(row["Columns"]), number(row["Rows"]))
        for _, row in read_csv(
            find_file(mimic, "mimic-cxr-2.0.0-metadata.csv"), ("dicom_id", "Rows", "Columns")
        )
    }
    gold = find_gold(folder / "splits")
    rows = [
        (key, row, name)
        for name in SPLITS
        for key, row in read_rows(
            find_file(folder / "splits", f"{name}.csv"),
            ("dicom_id", "subject_id", "study_id"),
            ledger,
        )
    ]
    splits = patient_splits((row["subject_id"], name) for _, row, name in rows)
    drafts = []
    for key, row, _ in rows:
        dicom = row["dicom_id"]
        graph = next(
            (
                path
                for path in (
                    folder / "scene_graph" / f"{dicom}_SceneGraph.json",
                    folder / "scene_graph" / "scene_graph" / f"{dicom}_SceneGraph.json",
                )
                if path.is_file()
            ),
            None,
        )
        if splits[row["subject_id"]] != split:
            ledger.drop([key], "another split")
        elif dicom in gold:
            ledger.drop([key], "in the gold set")
        elif graph is None:
            ledger.drop([key], "no scene graph")
        elif dicom not in sizes:
            ledger.drop([key], "not in the metadata table")
        else:
            boxes = region_boxes(read_json(graph), sizes[dicom], ledger)
            names = sorted(boxes)
            if not names:
                ledger.drop([key], "no region with a usable box")
            drawn = sample_rng(f"imagenome-{dicom}").permutation(len(names))[:regions]
            for name in (names[k] for k in sorted(drawn)):
                sample = grounding_sample(
                    f"imagenome-{dicom}-{name}",
                    "anatomy",
                    name,
                    [boxes[name]],
                    source="chest_imagenome",
                    patient=patient_id(row["subject_id"]),
                )
                film = film_path(mimic, row["subject_id"], row["study_id"], dicom)
                drafts.append(Draft([key], film, f"imagenome-{dicom}", sample))
    return drafts


def find_gold(folder: Path) -> set[str]:
    """The dicom_ids that the authors ask to keep out of training, if the file is present."""
    path = folder / "images_to_avoid.csv"
    return (
        {row["dicom_id"] for _, row in read_csv(path, ("dicom_id",))} if path.is_file() else set()
    )


def region_boxes(graph: dict, size: tuple[float, float], ledger: Ledger) -> dict[str, list[float]]:
    """bbox_name -> box in 0..1; a region whose box is unusable goes to the ledger's notes."""
    boxes = {}
    for region in graph.get("objects", []):
        corners = [
            number(str(region.get(f"original_{corner}", ""))) for corner in ("x1", "y1", "x2", "y2")
        ]
        box = unit_box(*corners, *size, ledger)
        if isinstance(box, str) or not region.get("bbox_name"):
            ledger.notes[f"regions left out: {box if isinstance(box, str) else 'no name'}"] += 1
        else:
            boxes[region["bbox_name"]] = box
    return boxes


def arguments(parser) -> None:
    mimic_root_argument(parser)
    parser.add_argument(
        "--regions",
        type=int,
        default=1,
        help="regions drawn per film (default 1; the paper has 80,000 pairs in all)",
    )


def main() -> None:
    adapter_main(read, "films", __doc__, more=arguments)


if __name__ == "__main__":
    main()
