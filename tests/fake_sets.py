"""Small folders in exactly the formats of the eight data sets, with the dirt of the real files."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image


def film(path: Path, seed: int = 0, size: tuple[int, int] = (40, 50), bits: int = 8) -> None:
    """A film of noise, (width, height), 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 255 if bits == 8 else 4095
    pixels = np.random.default_rng(seed).integers(0, top + 1, size[::-1])
    pixels[0, :2] = 0, top
    Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16)).save(path)


def table(path: Path, header: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def openi(root: Path) -> None:
    """30 studies with a frontal and a lateral film each; study 3 is empty, 4 lost its film, 5's
    findings hold a newline and quotes.
    """
    findings = {3: "", 5: 'The heart is\n"normal", lungs clear.'}
    table(
        root / "indiana_reports.csv",
        ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"],
        [
            [
                u,
                "normal",
                "normal",
                "Xray",
                "",
                "None.",
                findings.get(u, f"Lungs of {u} are clear."),
                "Normal.",
            ]
            for u in range(1, 31)
        ]
        + [[99, "normal", "normal", "Xray", "", "", "No film of this one.", ""]],
    )
    rows = [
        [u, f"{u}_IM-{u:04d}-{view}001.dcm.png", kind]
        for u in range(1, 31)
        for view, kind in ((1, "Frontal"), (2, "Lateral"))
    ]
    table(
        root / "indiana_projections.csv",
        ["uid", "filename", "projection"],
        # a row twice, a film without report
        [*rows, rows[0], [77, "77_IM-0077-1001.dcm.png", "Frontal"]],
    )
    for number, (uid, name, _) in enumerate(rows):
        if uid != 4:
            film(root / "images" / "images_normalized" / name, number)


def nih(root: Path) -> None:
    """40 patients with a box each, patient 1 with more, and what a CSV of boxes can have wrong."""
    rows = [
        [f"{p:08d}_000.png", "Atelectasis", 100 + p, 200.5, 300, 250.25, "", "", ""]
        for p in range(1, 41)
    ]
    # a second box of the same label
    rows += [
        ["00000001_000.png", "Atelectasis", 600, 500, 200, 200, "", "", ""],
        ["00000001_000.png", "Infiltrate", 900, 900, 300, 300, "", "", ""],  # past the edge
        ["00000001_000.png", "Mass", "nan", 10, 20, 20, "", "", ""],
        ["00000001_000.png", "Mass", 10, 10, 0, 20, "", "", ""],
        ["00000001_000.png", "Nodule", 10, 10, 2, 2, "", "", ""],
        ["00000001_000.png", "Mass", 1100, 10, 20, 20, "", "", ""],
    ]
    rows.append(rows[0])
    table(
        root / "BBox_List_2017.csv",
        ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", ""],
        rows,
    )
    for p in range(1, 41):
        if p != 7:
            film(root / f"images_{p % 2 + 1:03d}" / "images" / f"{p:08d}_000.png", p)
    # a few films are RGBA
    Image.new("RGBA", (40, 50), (80, 80, 80, 255)).save(
        root / "images_001" / "images" / "00000002_000.png"
    )


def mimic_jpg(root: Path) -> None:
    """Subjects 10000001..10000008: 1-4 train, 5 validate, 6-8 test; PA and lateral film each,
    report texts beside them.
    """
    split, meta, chexpert = [], [], []
    for n in range(1, 9):
        subject, study = 10_000_000 + n, 50_000_000 + n
        for view in ("PA", "LATERAL"):
            dicom = f"dicom{n}-{view.lower()}"
            split.append(
                [dicom, study, subject, "train" if n <= 4 else "validate" if n == 5 else "test"]
            )
            meta.append([dicom, subject, study, view, 50, 40])
            if n != 2:
                film(root / f"files/p10/p{subject}/s{study}/{dicom}.jpg", n)
        chexpert.append([subject, study, *(["", "1.0", "-1.0"] if n % 2 else ["1.0", "", ""])])
        text = (
            " "
            * 33
            + "FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n COMPARISON:  ___.\n\n FINDINGS:"
            " \n \n The lungs of\n "
            + f"{n} are clear: no edema.  \n Heart normal.\n \n IMPRESSION: \n \n No acute"
            " process.\n"
        )
        text = {
            3: text.replace("FINDINGS", "FINDING"),
            4: text.split(" The lungs")[0] + "IMPRESSION: None.\n",
        }.get(n, text)
        if n != 6:
            (root / f"files/p10/p{subject}").mkdir(parents=True, exist_ok=True)
            (root / f"files/p10/p{subject}/s{study}.txt").write_text(text)
    cut = root / "files/p10/p10000007/s50000007/dicom7-pa.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    table(
        root / "mimic-cxr-2.0.0-split.csv", ["dicom_id", "study_id", "subject_id", "split"], split
    )
    table(
        root / "mimic-cxr-2.0.0-metadata.csv",
        ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"],
        [*meta, ["unlisted", 10000001, 50000001, "AP", 50, 40]],
    )
    table(
        root / "mimic-cxr-2.0.0-chexpert.csv",
        ["subject_id", "study_id", "No Finding", "Cardiomegaly", "Edema"],
        chexpert,
    )


def chexpert_plus(root: Path) -> None:
    rows = []
    for n in range(1, 61):
        split = "valid" if n > 55 else "train"
        for view in ("view1_frontal", "view2_lateral"):
            path = f"{split}/patient{n:05d}/study1/{view}.jpg"
            rows.append(
                [
                    path,
                    view.split("_")[1].title(),
                    split,
                    "" if n == 3 else f'Lungs clear.\n"Heart" {n}.',
                    "Normal.",
                ]
            )
            if n != 5:
                film(root / "PNG" / path.replace(".jpg", ".png"), n)
    table(
        root / "df_chexpert_plus_240401.csv",
        ["path_to_image", "frontal_lateral", "split", "section_findings", "section_impression"],
        rows,
    )


def chest_imagenome(root: Path) -> None:
    """On `mimic_jpg(root)`, with splits of its own: subjects 1-4 train, 5-6 valid, 7-8 test."""
    folder = root / "silver_dataset"
    rows = {"train": [], "valid": [], "test": []}
    for n in range(1, 9):
        split = "train" if n <= 4 else "valid" if n <= 6 else "test"
        rows[split].append([n - 1, 10_000_000 + n, 50_000_000 + n, f"dicom{n}-pa", "PA"])
        objects = [
            {
                "bbox_name": "right lung",
                "original_x1": 2,
                "original_y1": 5,
                "original_x2": 18,
                "original_y2": 40,
            },
            {
                "bbox_name": "left lung",
                "original_x1": 21,
                "original_y1": 5,
                "original_x2": 44,
                "original_y2": 40,
            },
            {
                "bbox_name": "carina",
                "original_x1": 0,
                "original_y1": 0,
                "original_x2": 0,
                "original_y2": 0,
            },
            {
                "bbox_name": "spine",
                "original_x1": float("nan"),
                "original_y1": 0,
                "original_x2": 9,
                "original_y2": 9,
            },
        ]
        if n != 3:
            path = folder / "scene_graph" / f"dicom{n}-pa_SceneGraph.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps(
                    {"image_id": f"dicom{n}-pa", "objects": objects[2:] if n == 4 else objects}
                )
            )
    for split, found in rows.items():
        table(
            folder / "splits" / f"{split}.csv",
            ["", "subject_id", "study_id", "dicom_id", "ViewPosition"],
            found,
        )
    table(folder / "splits" / "images_to_avoid.csv", ["dicom_id"], [["dicom8-pa"]])


def ms_cxr(root: Path) -> None:
    """On `mimic_jpg(root)`; films of 40 x 50 pixels."""
    header = [
        "category_name",
        "label_text",
        "path",
        "image_width",
        "image_height",
        "x",
        "y",
        "w",
        "h",
        "dicom_id",
    ]

    def row(n, x, y, w, h, text="Left basal opacity.", category="Lung Opacity"):
        return [
            category,
            text,
            f"files/p10/p{10_000_000 + n}/s{50_000_000 + n}/dicom{n}-pa.jpg",
            40,
            50,
            x,
            y,
            w,
            h,
            f"dicom{n}-pa",
        ]

    rows = [
        row(1, 4, 5, 10, 20),
        row(1, 20, 5, 10, 20),
        row(1, 4, 5, 10, 20, 'A "large" effusion,\nleft', "Pleural Effusion"),
        row(1, 4, 5, 10, 20),
        row(1, 30, 40, 20, 20, "Past the edge"),
        row(1, "", 5, 10, 20),
        row(1, 5, 5, 10, 20, ""),
        row(2, 4, 5, 10, 20),
        row(8, 4, 5, 10, 20),
        row(5, 4, 5, 10, 20),
        row(9, 4, 5, 10, 20),
    ]
    table(root / "MS_CXR_Local_Alignment_v1.0.0.csv", header, rows)


def padchest_gr(root: Path) -> None:
    """16-bit films; one table row for each film and label."""
    names = [f"2168401113_{n:02d}.png" for n in range(6)]
    splits = ["train", "train", "validation", "test", "test", "train"]
    table(
        root / "master_table.csv",
        ["StudyID", "ImageID", "PatientID", "split", "label"],
        [
            [f"s{n}", name, f"p{n}", splits[n], label]
            for n, name in enumerate(names[:5])
            for label in ("nodule", "effusion")
        ],
    )
    box = [0.1, 0.2, 0.3, 0.4]
    reports = [
        {
            "StudyID": f"s{n}",
            "ImageID": name,
            "findings": [
                {
                    "sentence_en": "Nodule in the right apex.",
                    "sentence_es": "Nódulo.",
                    "abnormal": True,
                    "boxes": [box, [0.5, 0.5, 0.6, 1.0000002]],
                },
                {"sentence_en": "No effusion.", "abnormal": False},
                {"sentence_en": "Old fracture.", "boxes": []},
                {"sentence_en": "Bad box.", "boxes": [[0.1, 0.2, None, 0.4]]},
                {"sentence_en": "Nodule in the right apex.", "boxes": [box]},
            ],
        }
        for n, name in enumerate(names)
    ]
    (root / "grounded_reports_20240819.json").write_text(json.dumps(reports))
    for n, name in enumerate(names):
        if n != 1:
            film(root / "Padchest_GR_files" / "PadChest_GR" / name, n, bits=16)


def dicom_film(
    path: Path, pixels: np.ndarray, *, photometric: str = "MONOCHROME2", bits: int = 12, **tags
) -> None:
    """A DICOM file of one film, pixels [height, width]."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = (
        ExplicitVRLittleEndian,
        "1.2.840.10008.5.1.4.1.1.1.1",
    )
    meta.MediaStorageSOPInstanceUID = generate_uid()
    film = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    film.SOPClassUID, film.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    film.Rows, film.Columns = pixels.shape
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, photometric
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = (
        16,
        bits,
        bits - 1,
        0,
    )
    for name, value in tags.items():
        setattr(film, name, value)
    film.PixelData = pixels.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, film)


def vindr_cxr(root: Path) -> None:
    """Films of 100 x 200: film0 by three readers, film1 without finding, film2 without file,
    film3... with one box each; t0, t1 for test.
    """
    header = ["image_id", "rad_id", "class_name", "x_min", "y_min", "x_max", "y_max"]
    rows = [
        ["film0", "R1", "Cardiomegaly", 20, 100, 60, 140],
        ["film0", "R2", "Cardiomegaly", 24, 104, 64, 144],
        ["film0", "R3", "Cardiomegaly", 28, 96, 68, 136],
        ["film0", "R1", "Nodule/Mass", 10, 10, 20, 20],
        ["film0", "R2", "Nodule/Mass", 80, 10, 120, 20],
        ["film0", "R3", "ILD", "nan", "nan", "nan", "nan"],
        ["film0", "R1", "Cardiomegaly", 20, 100, 60, 140],
        *[["film1", f"R{n}", "No finding", "", "", "", ""] for n in (1, 2, 3)],
        ["film2", "R1", "ILD", 1, 1, 50, 50],
    ]
    rows += [[f"film{n}", "R1", "Aortic enlargement", 10, 10, 50, 50] for n in range(3, 40)]
    table(root / "annotations_train.csv", header, rows)
    without = [name for name in header if name != "rad_id"]
    table(
        root / "annotations_test.csv",
        without,
        [
            ["t0", "Nodule/Mass", 10, 10, 40, 40],
            ["t0", "Nodule/Mass", 12, 12, 44, 44],
            ["t1", "No finding", "", "", "", ""],
        ],
    )
    ramp = np.linspace(0, 4095, 200 * 100).reshape(200, 100)
    for n in (0, 1, *range(3, 40)):
        dicom_film(
            root / "train" / f"film{n}.dicom",
            ramp,
            photometric="MONOCHROME1" if n == 0 else "MONOCHROME2",
        )
    for n in (0, 1):
        dicom_film(root / "test" / f"t{n}.dicom", ramp)
