"""Each adapter on a small folder of its set's format: every row is accounted for, and what the
authors' release got wrong is right.
"""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigrpo.data import load_image, parse_boxes, read_jsonl
from minigrpo.data.convert import convert
from minigrpo.data.ledger import Ledger
from minigrpo.data.rows import unit_box
from minigrpo.data.splits import hash_split, patient_splits
from tests import fake_sets
from tests.processes import python

ON_MIMIC = ("chest_imagenome", "ms_cxr")
NAMES = (
    "mimic_cxr",
    "chexpert_plus",
    "chest_imagenome",
    "vindr_cxr",
    "ms_cxr",
    "padchest_gr",
    "openi",
    "nih",
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name in NAMES:
        if name in (*ON_MIMIC, "mimic_cxr"):
            fake_sets.mimic_jpg(root / name)
        if name != "mimic_cxr":
            getattr(fake_sets, name)(root / name)
    return root


def run(folders, name, split, out, **options):
    """(samples, ledger) of one conversion; the samples as a program would read them."""
    module = importlib.import_module(f"minigrpo.data.{name}")
    load = getattr(module, "load_dicom", load_image)
    ledger = convert(
        lambda *given: module.read(*given, **options), "rows", folders / name, split, out, load=load
    )
    return read_jsonl(out / f"{split}.jsonl"), ledger


# What must come out of the folders: (samples, kept rows, dropped rows by reason) of each set and
# split, counted by hand.
EXPECTED = {
    ("mimic_cxr", "train"): (
        2,
        {
            "kept": 2,
            "another split": 8,
            "not a frontal film": 4,
            "film missing": 1,
            "no or empty findings section": 1,
            "not in the split table": 1,
        },
    ),
    ("mimic_cxr", "valid"): (
        1,
        {"kept": 1, "another split": 14, "not a frontal film": 1, "not in the split table": 1},
    ),
    ("mimic_cxr", "test"): (
        1,
        {
            "kept": 1,
            "another split": 10,
            "not a frontal film": 3,
            "no report": 1,
            "film cannot be read (OSError)": 1,
            "not in the split table": 1,
        },
    ),
    ("chexpert_plus", "valid"): (5, {"kept": 5, "another split": 110, "not a frontal film": 5}),
    ("chest_imagenome", "train"): (
        1,
        {
            "kept": 1,
            "another split": 4,
            "film missing": 1,
            "no scene graph": 1,
            "no region with a usable box": 1,
        },
    ),
    ("chest_imagenome", "valid"): (2, {"kept": 2, "another split": 6}),
    ("ms_cxr", "train"): (
        3,
        {
            "kept": 4,
            "the same row again": 1,
            "a box that is not four numbers": 1,
            "no phrase": 1,
            "film missing": 1,
            "another split": 2,
            "film not in MIMIC's split table": 1,
        },
    ),
    ("ms_cxr", "valid"): (
        1,
        {
            "kept": 1,
            "the same row again": 1,
            "another split": 8,
            "film not in MIMIC's split table": 1,
        },
    ),
    ("ms_cxr", "test"): (
        1,
        {
            "kept": 1,
            "the same row again": 1,
            "another split": 8,
            "film not in MIMIC's split table": 1,
        },
    ),
    ("padchest_gr", "train"): (
        1,
        {
            "kept": 2,
            "film missing": 2,
            "no boxes": 4,
            "a box that is not four numbers": 2,
            "another split": 15,
            "film not in master_table.csv": 5,
        },
    ),
    ("padchest_gr", "test"): (
        2,
        {
            "kept": 4,
            "no boxes": 4,
            "a box that is not four numbers": 2,
            "another split": 15,
            "film not in master_table.csv": 5,
        },
    ),
    ("vindr_cxr", "test"): (
        1,
        {"kept": 2, "the same row again": 1, "no finding: nothing to find": 1, "another split": 47},
    ),
}


@pytest.mark.parametrize("name, split", EXPECTED)
def test_rows_kept_and_dropped_as_counted_by_hand(folders, tmp_path, name, split):
    samples, ledger = run(folders, name, split, tmp_path)
    count, expected = EXPECTED[name, split]
    found = ledger.counts()
    assert (len(samples), found) == (count, expected)


def command(monkeypatch, capsys, module, *argv) -> tuple[str, str]:
    """(printed, error) of `python -m minigrpo.data.MODULE argv` in this process."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, argv)])
    error = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # runpy sees the module imported already
            runpy.run_module(f"minigrpo.data.{module}", run_name="__main__")
    except SystemExit as stop:
        error = str(stop.code or "")
    return capsys.readouterr().out, error


@pytest.mark.parametrize("name", NAMES)
def test_the_command_accounts_for_every_row_and_writes_what_programs_read(
    folders, tmp_path, name, monkeypatch, capsys
):
    made = {}
    for split in ("train", "valid", "test"):
        printed, error = command(
            monkeypatch,
            capsys,
            name,
            "--root",
            folders / name,
            "--split",
            split,
            "--output_dir",
            tmp_path,
        )
        # the one test film is cut, the other in the gold set
        if (name, split) == ("chest_imagenome", "test"):
            assert "no sample is left for test" in error and "in the gold set" in error
            continue
        assert not error
        (read,) = re.search(r"read +([\d,]+)", printed).groups()
        closed = re.findall(r"^  (?:kept|dropped, .*?) +([\d,]+)$", printed, re.M)
        assert int(read) == sum(map(int, closed)) > 0, printed
        # every film decodes, every box and text is well formed
        made[split] = read_jsonl(tmp_path / f"{split}.jsonl")
        assert f"wrote {len(made[split])} samples" in printed
        assert all(s.source == name and s.patient for s in made[split])
    patients = [{s.patient for s in samples} for samples in made.values()]
    assert sum(map(len, patients)) == len(set().union(*patients))


def test_the_command_as_a_user_types_it(folders, tmp_path):
    line = [
        "-m",
        "minigrpo.data.openi",
        "--root",
        folders / "openi",
        "--split",
        "test",
        "--output_dir",
        tmp_path,
    ]
    subprocess.run([sys.executable, *line], check=True, cwd=ROOT)
    said = python(*line, code=1)
    assert (
        said.startswith("openi.py: error: ")
        and "exists already" in said
        and "Traceback" not in said
    )


@pytest.mark.parametrize("name", NAMES)
def test_two_conversions_agree_byte_for_byte(folders, tmp_path, name):
    """Bug of the authors' release: templates and regions were drawn unseeded, so two evaluations
    differed.
    """
    for out in ("one", "two"):
        run(folders, name, "train", tmp_path / out)
    files = [
        sorted(p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*.*"))
        for out in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) > 1
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files[0]
    )


@pytest.mark.parametrize("name", ["openi", "nih", "padchest_gr"])
def test_nothing_that_exists_is_written_over(folders, tmp_path, name):
    run(folders, name, "train", tmp_path)
    with pytest.raises(ValueError, match="train.jsonl exists already: remove it"):
        run(folders, name, "train", tmp_path)
    (tmp_path / "train.jsonl").unlink()  # a run that was killed after its films
    before = {p: p.read_bytes() for p in (tmp_path / "films").iterdir()}
    with pytest.raises(ValueError, match="already contains .* remove them"):
        run(folders, name, "train", tmp_path)
    assert before == {p: p.read_bytes() for p in (tmp_path / "films").iterdir()}


def test_imagenome_honours_its_split(folders, tmp_path):
    """Bug of the authors' release: the anatomy loader ignored its split argument, so test films
    were trained on.
    """
    by_split = {
        split: {s.patient for s in run(folders, "chest_imagenome", split, tmp_path)[0]}
        for split in ("train", "valid")
    }
    assert by_split == {"train": {"mimic-10000001"}, "valid": {"mimic-10000005", "mimic-10000006"}}


def test_ms_cxr_is_tested_on_mimic_test_films_alone(folders, tmp_path):
    """Bug of the authors' release: MS-CXR was evaluated on a split that was trained on."""
    assert {s.patient for s in run(folders, "ms_cxr", "test", tmp_path)[0]} == {"mimic-10000008"}
    assert {s.patient for s in run(folders, "ms_cxr", "train", tmp_path)[0]} == {"mimic-10000001"}


def test_boxes_of_one_phrase_are_one_sample(folders, tmp_path):
    samples = {
        s.question.split('"')[1] if '"' in s.question else s.question: s
        for s in run(folders, "ms_cxr", "train", tmp_path)[0]
    }
    two = next(s for s in samples.values() if len(s.boxes) == 2)
    assert (
        two.boxes == [[0.1, 0.1, 0.35, 0.5], [0.5, 0.1, 0.75, 0.5]] and two.label == "lung opacity"
    )
    cut = next(s for s in samples.values() if "Past the edge" in s.question)
    assert cut.boxes == [[0.75, 0.8, 1.0, 1.0]]  # 20 x 20 pixels at (30, 40) of 40 x 50
    assert any('A "large" effusion, left' in s.question for s in samples.values())


@pytest.mark.parametrize("name", ["ms_cxr", "nih", "padchest_gr", "vindr_cxr", "chest_imagenome"])
def test_the_answer_says_the_sample_s_boxes(folders, tmp_path, name):
    for sample in run(folders, name, "train", tmp_path)[0]:
        np.testing.assert_allclose(parse_boxes(sample.answer), sample.boxes, atol=0.00501)


def test_vindr_readers_are_fused(folders, tmp_path):
    """Three hearts within reach of one another become their mean; two nodules far apart stay two,
    one cut at the edge.
    """
    samples = {
        s.id: s
        for split in ("train", "valid")
        for s in run(folders, "vindr_cxr", split, tmp_path)[0]
    }
    assert samples["vindr-film0-cardiomegaly"].boxes == [[0.24, 0.5, 0.64, 0.7]]
    assert samples["vindr-film0-nodule/mass"].boxes == [
        [0.1, 0.05, 0.2, 0.1],
        [0.8, 0.05, 1.0, 0.1],
    ]
    (consensus,) = run(folders, "vindr_cxr", "test", tmp_path)[0]
    assert len(consensus.boxes) == 2  # they overlap, but one consensus, not two readers, drew them


def test_vindr_detection_lists_all_boxes_of_a_film(folders, tmp_path):
    samples = {
        s.id: s
        for split in ("train", "valid")
        for s in run(folders, "vindr_cxr", split, tmp_path, detection=True)[0]
    }
    every = samples["vindr-film0-all"]
    assert (
        every.label == "all findings"
        and len(every.boxes) == 3
        and "cardiomegaly at [0.24, 0.50, 0.64, 0.70]" in every.answer
    )


def test_monochrome1_is_inverted(folders, tmp_path):
    """Bug of the authors' release: VinDr conversion left MONOCHROME1 films as negatives."""
    for split in ("train", "valid"):
        run(folders, "vindr_cxr", split, tmp_path)
    negative, plain = (
        np.asarray(Image.open(tmp_path / "films" / f"vindr-{name}.png")).astype(int)
        for name in ("film0", "film3")
    )
    assert negative.shape == (200, 100) and plain[0, 0] == 0 and plain[-1, -1] == 255
    assert np.abs(negative + plain - 255).max() <= 1


def test_vindr_offers_every_split(folders, tmp_path):
    """Bug of the authors' release: VinDr evaluation asked for a split that its loader rejected."""
    train, valid = (run(folders, "vindr_cxr", split, tmp_path)[0] for split in ("train", "valid"))
    assert train and valid and run(folders, "vindr_cxr", "test", tmp_path)[0]
    assert {s.patient for s in train + valid} == {
        "vindr-film0",
        *(f"vindr-film{n}" for n in range(3, 40)),
    }


def test_16_bit_films_become_8_bit_and_8_bit_ones_stay_as_they_are(folders, tmp_path):
    """Bug of PIL: convert("L") on 16-bit grey clips at 255, so a PadChest film came out white."""
    run(folders, "padchest_gr", "test", tmp_path / "padchest")
    for path in (tmp_path / "padchest" / "films").iterdir():
        pixels = np.asarray(Image.open(path))
        assert pixels.dtype == np.uint8 and 110 < pixels.mean() < 145 and pixels.max() == 255
    samples, _ = run(folders, "mimic_cxr", "train", tmp_path / "mimic")
    original = folders / "mimic_cxr/files/p10/p10000001/s50000001/dicom1-pa.jpg"
    assert Path(samples[0].image).read_bytes() == original.read_bytes()


def test_large_films_are_shrunk_with_their_aspect(tmp_path):
    fake_sets.openi(tmp_path / "openi")
    for path in (tmp_path / "openi/images/images_normalized").iterdir():
        fake_sets.film(path, size=(300, 500))
    from minigrpo.data.openi import read

    convert(read, "films", tmp_path / "openi", "test", tmp_path / "out", pixels=20_000)
    for path in (tmp_path / "out/films").iterdir():
        width, height = Image.open(path).size
        assert 19_500 < width * height <= 20_000 and abs(width / height - 300 / 500) < 0.005


def test_mimic_findings_alone(folders, tmp_path):
    first, third = run(folders, "mimic_cxr", "train", tmp_path)[0]  # the third's heading is FINDING
    assert first.answer == "The lungs of 1 are clear: no edema. Heart normal."
    assert first.patient == "mimic-10000001"
    assert third.answer == "The lungs of 3 are clear: no edema. Heart normal."
    assert third.patient == "mimic-10000003"


LUNGS = "The lungs are clear."


@pytest.mark.parametrize(
    "report, expected",
    [
        (
            "FINDINGS:\n {}\n ETT: 3 cm above the carina. Heart normal.\n",
            "{} ETT: 3 cm above the carina. Heart normal.",
        ),
        (
            "FINDINGS:\n LUNGS: Clear.\n HEART AND MEDIASTINUM: Normal.\n IMPRESSION: None.",
            "LUNGS: Clear. HEART AND MEDIASTINUM: Normal.",
        ),
        (
            "FINDINGS: AP: {}\n PA AND LATERAL: {}\n\n CONCLUSION: None.",
            "AP: {} PA AND LATERAL: {}",
        ),
        (
            "FINDINGS:  CHEST (PA AND LAT): {}\n TUBES, LINES: None.",
            "CHEST (PA AND LAT): {} TUBES, LINES: None.",
        ),
        ("FINDING: {}", "{}"),
        ("FINDNGS: {} \n IMPRSSION: Normal.", "{}"),
        ("Findings: {}\nImpression: Normal.", "{}"),
        ("FINDINGS :\n{}\nIMPRESSION :\nNormal.", "{}"),
        ("FINDINGS\n{}\nIMPRESSION\nNormal.", "{}"),
        ("FINDINGS: {} IMPRESSION: Normal.", "{}"),
        ("FINDINGS: {}\n\nRECOMMENDATION(S): CT.", "{}"),
        ("FINDINGS: {}\nRECOMMENDATIONS: CT.", "{}"),
        ("FINDINGS: {}\nWET READ: ___ 9:12 AM\n Normal.", "{}"),
        ("FINDINGS: {}\nNOTIFICATION: Dr. ___.", "{}"),
        ("FINDINGS: {}\nADDENDUM: None.", "{}"),
        (
            (
                "EXAMINATION: CHEST\nCLINICAL  HISTORY: Cough.\nTECHNIQUE: PA.\nCOMPARISON:"
                " None.\nFINDINGS: {}\nREPORT: x"
            ),
            "{}",
        ),
        ("FINDINGS:\n\nFINDINGS: {}\nIMPRESSION: Normal.", "{}"),
        ("FINDINGS/IMPRESSION: {}", "{}"),
        ("FINDINGS AND IMPRESSION:\n{}\nEXAM: x", "{}"),
        ("FINDINGS / IMPRESSION: {}", "{}"),
        ("IMPRESSION/FINDINGS: Else.\nFINDINGS: {}", "{}"),
        (
            "IMPRESSION: Normal.\nFINDINGS: {}\nreport: as the history: says, the exam: is normal.",
            "{} report: as the history: says, the exam: is normal.",
        ),
        ("IMPRESSION: Normal.", None),
        ("FINDINGS:\nIMPRESSION: Normal.", None),
        ("The findings: none.", None),
        ("", None),
    ],
)
def test_only_a_known_section_ends_the_findings(report, expected):
    """Bug: any capitals and a colon at the start of a line ended them, and what followed `ETT:` or
    `LUNGS:` was lost."""
    from minigrpo.data.rows import one_paragraph
    from minigrpo.data.sections import findings_of

    found = findings_of(report.replace("{}", LUNGS))
    assert (found and one_paragraph(found.text)) == (expected and expected.replace("{}", LUNGS))


@pytest.mark.parametrize(
    "name, text",
    [
        ("ETT", "3 cm above the carina."),
        ("LUNGS", "Clear."),
        ("AP", "Rotated film."),
        ("PICC (LEFT)", "In the SVC."),
    ],
)
def test_a_finding_in_capitals_reaches_the_sample(folders, tmp_path, name, text):
    shutil.copytree(folders / "mimic_cxr", tmp_path / "mimic_cxr")
    path = tmp_path / "mimic_cxr/files/p10/p10000001/s50000001.txt"
    path.write_text(path.read_text().replace(" Heart normal.", f" {name}: {text}\n Heart normal."))
    sample, *_ = run(tmp_path, "mimic_cxr", "train", tmp_path / "out")[0]
    assert sample.answer == f"The lungs of 1 are clear: no edema. {name}: {text} Heart normal."


def test_what_is_cut_off_behind_findings_is_counted(folders, tmp_path, monkeypatch, capsys):
    printed, _ = command(
        monkeypatch,
        capsys,
        "mimic_cxr",
        "--root",
        folders / "mimic_cxr",
        "--split",
        "train",
        "--output_dir",
        tmp_path,
    )
    # of 1 and 3, and of 2, whose film is missing
    assert re.search(r"note: reports whose findings end at IMPRESSION +3$", printed, re.M)


def test_chexpert_findings_end_at_the_next_section(tmp_path):
    """Bug: what stood behind another heading within the findings' cell was taken for findings."""
    fake_sets.chexpert_plus(tmp_path / "chexpert_plus")
    path = tmp_path / "chexpert_plus/df_chexpert_plus_240401.csv"
    text = path.read_text().replace('""Heart"" 56.', "ETT: high.\nIMPRESSION: 1. Normal.")
    path.write_text(text.replace('Lungs clear.\n""Heart"" 57.', "IMPRESSION: x"))
    samples, ledger = run(tmp_path, "chexpert_plus", "valid", tmp_path / "out")
    assert {s.patient[-2:]: s.answer for s in samples} == {"56": "Lungs clear. ETT: high."} | {
        str(n): f'Lungs clear. "Heart" {n}.' for n in (58, 59, 60)
    }
    assert (
        ledger.counts()["empty findings"] == 1
        and ledger.notes["reports whose findings end at IMPRESSION"] == 1
    )
    assert (
        ledger.notes["reports whose findings contain lines that begin like a heading (ETT:)"] == 1
    )


def test_mimic_classification_lists_what_is_present(folders, tmp_path):
    samples, ledger = run(folders, "mimic_cxr", "train", tmp_path, classification=True)
    answers = {s.patient: s.answer for s in samples if s.task == "classification"}
    assert answers == {
        "mimic-10000001": "Cardiomegaly.",
        "mimic-10000003": "Cardiomegaly.",
        "mimic-10000004": "No finding.",
    }
    assert ledger.counts()["kept"] == 3  # 3 and 4 have no findings section, but labels


def test_nih_splits_by_patient_and_groups_boxes(folders, tmp_path):
    samples = [
        s for split in ("train", "valid", "test") for s in run(folders, "nih", split, tmp_path)[0]
    ]
    first = {s.label: s.boxes for s in samples if s.patient == "nih-00000001"}
    assert first == {
        "atelectasis": [[0.0986, 0.1958, 0.3916, 0.4402], [0.5859, 0.4883, 0.7812, 0.6836]],
        "infiltrate": [[0.8789, 0.8789, 1.0, 1.0]],
    }
    assert len({s.patient for s in samples}) == 39 and len(samples) == 40  # patient 7 has no film


def test_nih_official_lists_are_honoured_where_they_divide_the_films(folders, tmp_path):
    """In the release all 984 boxes lie in the official test list; a list like that leaves nothing
    to train on and is not used.
    """
    from minigrpo.data.nih import official_lists

    names = [f"{p:08d}_000.png" for p in range(1, 41)]
    (tmp_path / "test_list.txt").write_text("\n".join(names))
    assert official_lists(tmp_path, set(names)) == {}
    (tmp_path / "test_list.txt").write_text("\n".join(names[30:]))
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:30]))
    found = official_lists(tmp_path, set(names))
    assert [found[name] for name in names] == ["train"] * 30 + ["test"] * 10


# ---- splits and the ledger -----------------------------------------------------------------------


def test_patients_in_two_splits_are_refused():
    with pytest.raises(ValueError, match="patient p1 is in two splits, train and test"):
        patient_splits([("p1", "train"), ("p2", "test"), ("p1", "test")])


def test_a_set_with_a_patient_in_two_splits_is_refused(folders, tmp_path):
    fake_sets.padchest_gr(tmp_path / "padchest_gr")
    path = tmp_path / "padchest_gr/master_table.csv"
    path.write_text(path.read_text().replace(",p3,test", ",p0,test"))
    with pytest.raises(ValueError, match="patient p0 is in two splits"):
        run(tmp_path, "padchest_gr", "train", tmp_path / "out")


def test_patients_are_hashed_80_10_10_for_ever():
    """The first ten are written down: a hash that changes would move tested patients into
    training.
    """
    splits = [hash_split(f"patient-{n}") for n in range(20_000)]
    shares = [splits.count(name) / 20_000 for name in ("train", "valid", "test")]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)
    assert splits[:10] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "test",
        "valid",
    ]


def test_a_missing_split_is_a_tenth_of_train_and_leaves_the_others_alone():
    rows = [(f"p{n}", "train" if n < 9000 else "validate") for n in range(10_000)]
    found = patient_splits(rows)
    assert all((found[f"p{n}"] == "valid") == (n >= 9000) for n in range(10_000))
    assert 0.08 < sum(split == "test" for split in found.values()) / 9000 < 0.12


def test_unknown_and_half_filled_splits_are_refused():
    with pytest.raises(ValueError, match="unknown split 'trian'"):
        patient_splits([("p", "trian")])
    with pytest.raises(ValueError, match="patient q has no split although others have"):
        patient_splits([("p", "train"), ("q", "")])


def test_a_row_that_nobody_closed_is_an_error():
    ledger = Ledger("rows")
    ledger.enter(1)
    ledger.enter(2)
    ledger.drop([1], "a reason")
    ledger.drop([1], "another reason")
    with pytest.raises(ValueError, match="1 rows were neither kept nor dropped, such as 2"):
        ledger.table()
    ledger.keep([2])
    assert ledger.counts() == {"kept": 1, "a reason": 1}
    with pytest.raises(ValueError, match="never read"):
        ledger.keep([3])


@pytest.mark.parametrize(
    "corners, expected",
    [
        ((10, 20, 30, 50), [0.1, 0.1, 0.3, 0.25]),
        ((-5, 20, 30, 500), [0.0, 0.1, 0.3, 1.0]),
        ((30, 20, 10, 50), "a box with no area"),
        ((10, 20, 10, 50), "a box with no area"),
        ((100, 20, 120, 50), "a box outside the film"),
        ((-9, 20, 0, 50), "a box outside the film"),
        ((10, 20, 10.3, 50), "a box too thin for two decimals"),
        ((10, 20, 30, 20.5), "a box too thin for two decimals"),
        ((float("nan"), 20, 30, 50), "a box that is not four numbers"),
        ((float("inf"), 20, 30, 50), "a box that is not four numbers"),
    ],
)
def test_boxes_in_pixels(corners, expected):
    """Of a film of 100 x 200. What is cut at the edge is noted; a line or a point would teach the
    model to write one.
    """
    ledger = Ledger("boxes")
    assert unit_box(*corners, 100, 200, ledger) == expected
    assert sum(ledger.notes.values()) == (corners[0] == -5)


# ---- bad input -----------------------------------------------------------------------------------


def test_errors_name_what_to_do(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder: give the one"):
        run(tmp_path, "openi", "train", tmp_path / "out")
    (tmp_path / "openi").mkdir()
    with pytest.raises(FileNotFoundError, match="has no indiana_reports.csv.* docs/data.md"):
        run(tmp_path, "openi", "train", tmp_path / "out")
    (tmp_path / "openi/indiana_reports.csv").write_text("uid,finding\n1,clear\n")
    with pytest.raises(
        ValueError, match="indiana_reports.csv:1: no column findings; the header has uid, finding"
    ):
        run(tmp_path, "openi", "train", tmp_path / "out")


def test_the_page_on_data_names_commands_and_arguments_that_exist():
    page = (ROOT / "docs/data.md").read_text()
    modules = set(re.findall(r"minigrpo\.data\.([a-z_]+)", page))
    code = "".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "minigrpo").rglob("*.py")]
    )
    assert set(NAMES) < modules and all(
        (ROOT / f"minigrpo/data/{name}.py").is_file() for name in modules
    )
    arguments = set(re.findall(r"--([a-z_0-9]+)", page))
    assert len(arguments) > 12
    assert all(
        f'"--{name}"' in code or re.search(rf"^    {name}: ", code, re.M) for name in arguments
    )


def test_gzipped_tables_are_read(folders, tmp_path):
    import gzip

    shutil.copytree(folders / "mimic_cxr", tmp_path / "mimic_cxr")
    path = tmp_path / "mimic_cxr/mimic-cxr-2.0.0-metadata.csv"
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert len(run(tmp_path, "mimic_cxr", "train", tmp_path / "out")[0]) == 2


def test_lines_are_json_in_utf8(folders, tmp_path):
    lines = []
    for split in ("train", "valid", "test"):
        run(folders, "openi", split, tmp_path)
        lines += map(
            json.loads, (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        )
    assert any(line["answer"] == 'The heart is "normal", lungs clear.' for line in lines)
    assert len(lines) == 28  # 30 frontal films, less one without findings and one that is missing
