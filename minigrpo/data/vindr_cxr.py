"""VinDr-CXR: boxes of abnormalities by several readers (credentialed, PhysioNet). Needs `pip
install minigrpo[dicom]`.

    python -m minigrpo.data.vindr_cxr --root DIR --split test --output_dir OUT

DIR holds `annotations_train.csv` and `annotations_test.csv` (image_id, rad_id, class_name, x_min,
y_min, x_max, y_max) and the films `train/IMAGE.dicom`, `test/IMAGE.dicom` (or .dcm). Three readers
read each training film: their boxes of one class are fused (weighted boxes fusion, IoU 0.1, equal
scores). The test boxes are a consensus already, and stay as they are unless several readers are
named. One grounding sample for each film and class; `--detection` adds one a film for all of its
boxes. No valid split was released and no patient is named, so a tenth of the training films, by
hash, is valid. Nguyen et al., Scientific Data 9:429, 2022; 2012.15029.
"""

from collections import defaultdict
from pathlib import Path

from . import templates
from .boxes import format_boxes
from .convert import adapter_main
from .dicom import dicom_size, load_dicom
from .fusion import fuse_boxes
from .ledger import Ledger
from .rows import Draft, grounding_sample, number, read_rows, readable, sample_rng, unit_box
from .splits import patient_splits

CORNERS = ("x_min", "y_min", "x_max", "y_max")


def read(root: Path, split: str, ledger: Ledger, detection: bool = False) -> list[Draft]:
    rows = []
    for name in ("train", "test"):
        path = next(
            (
                p
                for p in (
                    root / f"annotations_{name}.csv",
                    root / "annotations" / f"annotations_{name}.csv",
                )
                if p.is_file()
            ),
            None,
        )
        if path:
            rows += [
                (key, row, name)
                for key, row in read_rows(path, ("image_id", "class_name", *CORNERS), ledger)
            ]
    if not rows:
        raise FileNotFoundError(
            f"--root {root} has no annotations_train.csv or annotations_test.csv: docs/data.md"
            " describes the folder"
        )
    splits = patient_splits((row["image_id"], name) for _, row, name in rows)
    # of each film, those who found nothing included
    readers: dict[str, set[str]] = defaultdict(set)
    for _, row, _ in rows:
        readers[row["image_id"]].add(row.get("rad_id", ""))
    sizes: dict[Path, tuple[int, int] | None] = {}
    # image -> class -> rows
    boxes_of: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for key, row, name in rows:
        image, label = row["image_id"], readable(row["class_name"])
        if splits[image] != split:
            ledger.drop([key], "another split")
            continue
        if label == "no finding":
            ledger.drop([key], "no finding: nothing to find")
            continue
        film = film_path(root, name, image)
        if film not in sizes:
            sizes[film] = dicom_size(film) if film.is_file() else None
        if sizes[film] is None:
            ledger.drop([key], "film missing")
            continue
        box = unit_box(*(number(row[corner]) for corner in CORNERS), *sizes[film], ledger)
        if isinstance(box, str):
            ledger.drop([key], box)
        else:
            boxes_of[image][label].append((key, box, film))
    return [
        draft
        for image, classes in boxes_of.items()
        for draft in film_drafts(image, classes, len(readers[image]) > 1, detection)
    ]


def film_drafts(image: str, classes: dict[str, list], fuse: bool, detection: bool) -> list[Draft]:
    """The drafts of one film; `classes` holds (row, box, film) of each class."""
    fused, drafts = {}, []
    common = {"source": "vindr_cxr", "patient": f"vindr-{image}"}
    for label, rows in classes.items():
        boxes = [box for _, box, _ in rows]
        fused[label] = (
            [[round(x, 4) for x in box] for box in fuse_boxes(boxes)[0]] if fuse else boxes
        )
        sample = grounding_sample(
            f"vindr-{image}-{label}", "abnormality", label, fused[label], **common
        )
        drafts.append(Draft([key for key, *_ in rows], rows[0][2], f"vindr-{image}", sample))
    if detection:
        named = [(label, box) for label in sorted(fused) for box in sorted(fused[label])]
        sample_id = f"vindr-{image}-all"
        question, answer = templates.detection_turn(
            [(label, format_boxes([box])) for label, box in named], sample_rng(sample_id)
        )
        sample = {
            "id": sample_id,
            "task": "grounding",
            "question": question,
            "answer": answer,
            "boxes": [box for _, box in named],
            "kind": "abnormality",
            "label": "all findings",
        } | common
        drafts.append(
            Draft(
                [key for rows in classes.values() for key, *_ in rows],
                drafts[0].film,
                f"vindr-{image}",
                sample,
            )
        )
    return drafts


def film_path(root: Path, folder: str, image: str) -> Path:
    places = [root / folder / f"{image}{suffix}" for suffix in (".dicom", ".dcm")]
    return next((place for place in places if place.is_file()), places[0])


def arguments(parser) -> None:
    parser.add_argument(
        "--detection",
        action="store_true",
        help="add a sample per film that asks for all of its boxes",
    )


def main() -> None:
    adapter_main(read, "boxes", __doc__, load=load_dicom, more=arguments)


if __name__ == "__main__":
    main()
