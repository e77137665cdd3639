"""`python -m minigrpo.data.check`: what is in the data, and everything that is wrong with it, at
once.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigrpo.data import check as check_module
from minigrpo.data.check import check, spread
from minigrpo.data.sheet import draw_sheet
from tests.processes import python


def line(number, image, **more):
    return {
        "id": f"s{number}",
        "image": image,
        "task": "grounding",
        "question": "Where is the heart?",
        "patient": f"p{number}",
        "answer": "At [0.10, 0.20, 0.50, 0.60].",
        "boxes": [[0.1, 0.2, 0.5, 0.6]],
        "label": "heart",
    } | more


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.fromarray(
            np.random.default_rng(number).integers(0, 256, (30, 20 + number), dtype=np.uint8)
        ).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, name, *lines) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines)
    )
    return path


def test_all_errors_of_all_files_at_once(folder):
    """read_jsonl stops at ten; a user who mends 40 lines wants to see 40."""
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:100])
    train = write(
        folder,
        "train.jsonl",
        *[line(n, "0.png", boxes=[[0, 0, 2, 1]]) for n in range(40)],
        line(50, "cut.png"),
        "{",
    )
    test = write(folder, "test.jsonl", line(60, "lost.png"), line(61, "1.png"))
    _, errors, _ = check([train, test])
    assert len(errors) == 43
    places = [error.split(": ")[0] for error in errors]
    assert places == [*(f"{train}:{n}" for n in range(1, 43)), f"{test}:1"]
    assert (
        "lies outside 0..1" in errors[0]
        and "cannot be read" in errors[40]
        and "not JSON" in errors[41]
        and "does not exist" in errors[42]
    )


def test_leaks_by_id_patient_and_pixels(folder):
    """A film that was renamed, or stored as another kind of file, is still the same film."""
    Image.open(folder / "2.png").save(folder / "other.bmp")
    train = write(
        folder,
        "train.jsonl",
        line(0, "0.png"),
        line(1, "1.png"),
        line(2, "2.png"),
        line(3, "3.png"),
    )
    test = write(
        folder,
        "test.jsonl",
        line(0, "4.png", patient="new"),
        line(11, "5.png", patient="p1"),
        line(12, "other.bmp"),
        line(13, "4.png"),
    )
    _, errors, _ = check([train, test])
    assert [error.split(": remove")[0] for error in errors] == [
        f"{test}:1: leak: id 's0' is also in {train}:1",
        f"{test}:2: leak: patient 'p1' is also in {train}:2",
        f"{test}:3: leak: film its pixels is also in {train}:3",
    ]


def test_two_training_files_may_share_a_patient(folder):
    one = write(folder / "one", "train.jsonl", line(0, "../0.png"))
    two = write(folder / "two", "train.jsonl", line(7, "../0.png", patient="p0"))
    test = write(folder, "test.jsonl", line(8, "1.png", patient="p0"))
    assert check([one, two])[1] == []
    assert len(check([one, two, test])[1]) == 1


def test_repeats_are_notes(folder):
    Image.open(folder / "0.png").save(folder / "copy.png")
    text, errors, _ = check(
        [write(folder, "train.jsonl", line(0, "0.png"), line(1, "0.png"), line(2, "copy.png"))]
    )
    assert (
        not errors
        and "1 samples repeat another's" in text
        and "1 film files hold the pixels of another" in text
    )


def test_blank_films_are_noted(folder):
    """Six of our 200 real test films are all but white; only the contact sheet showed it."""
    ramp = np.linspace(0, 255, 100 * 100).reshape(100, 100)
    for name, pixels in {"white.png": 240 + ramp * 15 / 255, "ramp.png": ramp}.items():
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    assert 225 <= check_module.look(str(folder / "ramp.png")).contrast <= 232
    text, errors, _ = check(
        [write(folder, "train.jsonl", line(0, "ramp.png"), line(1, "white.png"), line(2, "0.png"))]
    )
    assert not errors and "1 films are nearly all one grey: white.png (line 2)" in text


def test_films_of_doubtful_brightness_are_named(folder):
    """Bug: `check` found no error in films at a fortieth of their brightness: contrast counted as
    full for all but 8 bits."""
    ramp = np.linspace(0, 1, 100 * 100).reshape(100, 100)
    films = {
        "fine16.png": (ramp * 4095).astype(np.uint16),
        "dark8.png": (ramp * 40).astype(np.uint8),
        "dark16.png": (16000 + ramp * 49000).astype(np.uint16) * (ramp > 0.97),
        "flat16.png": (60000 + ramp * 4000).astype(np.uint16),
        "white.png": (ramp * 700).clip(0, 255).astype(np.uint8),
        "black.png": (ramp * 1200 - 945).clip(0, 255).astype(np.uint8),
        "signed.tif": (ramp * 2000 - 1000).astype(np.int32),
    }
    for name, pixels in films.items():
        Image.fromarray(pixels).save(folder / name)
    lines = [line(n, name) for n, name in enumerate(["0.png", *films])]
    text, errors, _ = check([write(folder, "train.jsonl", *lines)])
    assert not errors
    notes = [
        row.strip().removeprefix("note").strip()
        for row in text.splitlines()
        if row.startswith("  note")
    ]
    for part in (
        "1 films are nearly all one grey: flat16.png (line 5)",
        "2 films are dark: 95 of 100 pixels are darker than a quarter of white: "
        "dark8.png (line 3), dark16.png (line 4)",
        "or nearly all pure black: white.png (line 6), black.png (line 7)",
        "1 films have values below 0: the lowest is taken as black: signed.tif (line 8)",
    ):
        assert any(part in note for note in notes), (part, notes)
    assert len(notes) == 4
    assert (
        "depth      4 of 8 bits, 2 of 16 bits in 16, 1 of 12 bits in 16, 1 of signed values" in text
    )


def test_nothing_is_said_of_what_the_phantoms_write(phantom):
    text, errors, _ = check([phantom / "train.jsonl", phantom / "test.jsonl"])
    assert not errors and "note" not in text


def test_boxes_that_are_wrong_are_counted(folder):
    lines = [line(n, "0.png", boxes=[[0, 0, 2, 1]]) for n in range(3)]
    lines.append(line(9, "0.png", answer="At [100, 200, 500, 600]."))
    text, errors, _ = check([write(folder, "train.jsonl", *lines)])
    assert "in lines with errors 3 lie outside 0..1, and 1 answers differ from" in text
    assert len(errors) == 4
    assert "they look like [x1, y1, x2, y2] in 0..1000" in errors[3]


def test_what_a_report_holds_beside_its_findings(folder):
    report = {"image": "0.png", "task": "report", "question": "Report."}
    texts = [
        "No effusion.",
        "No effusion. IMPRESSION: Normal.",
        "No effusion. The heart",
        "ETT: 3 cm above the carina.",
        "Clear\u200b lungs.",
        "Clear.\n\nHeart\tnormal.",
    ]
    lines = [report | {"id": f"r{n}", "answer": text} for n, text in enumerate(texts)]
    text, errors, _ = check([write(folder, "train.jsonl", *lines)])
    assert not errors and "1 reports contain a section heading: r1 (line 2)" in text
    assert "1 reports end in mid-sentence: r2 (line 3)" in text
    assert "1 samples contain control or zero-width characters: r4 (line 5)" in text


@pytest.mark.parametrize(
    "names",
    [
        ("train/x.jsonl", "test/x.jsonl"),
        ("a/train/x.jsonl", "a/val/x.jsonl"),
        ("validate/x.jsonl", "train/x.jsonl"),
        ("train.jsonl", "test.jsonl"),
        ("mimic_train.jsonl", "mimic-Val.jsonl"),
        ("x/trainset/a.jsonl", "x/testing/a.jsonl"),
        ("dev/train-clean.jsonl", "dev/a.jsonl"),
        ("one.jsonl", "two.jsonl"),
    ],
)
def test_the_same_patients_on_two_sides(folder, names):
    """Bug: sides were told by the file's name alone, so patients in train/x.jsonl and test/x.jsonl
    were no leak."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    one, two = (
        write(folder, name, line(n, str(folder / f"{n}.png"), patient="p"))
        for n, name in enumerate(names)
    )
    _, errors, _ = check([one, two])
    assert errors == [f"{two}:1: leak: patient 'p' is also in {one}:1: remove it from one of them"]


@pytest.mark.parametrize(
    "names",
    [
        ("one/train.jsonl", "two/train.jsonl"),
        ("train/a.jsonl", "train/b.jsonl"),
        ("train/a.jsonl", "more/train-2.jsonl"),
        ("Train/a.jsonl", "Train/b.jsonl"),
        ("train.jsonl", "train-clean.jsonl"),
        ("mimic/training/x.jsonl", "nih/train/x.jsonl"),
        ("one/x.jsonl", "two/x.jsonl"),
    ],
)
def test_files_of_one_side_may_share_patients(folder, names):
    for name in names:
        # a folder of all files says nothing
        (folder / "test" / name).parent.mkdir(parents=True, exist_ok=True)
    files = [
        write(folder, f"test/{name}", line(n, str(folder / f"{n}.png"), patient="p"))
        for n, name in enumerate(names)
    ]
    text, errors, _ = check(files)
    assert not errors and "one side, so nothing was compared" in text


def test_it_prints_which_file_it_took_for_which_side(folder):
    files = [
        write(folder, name, line(n, "0.png" if n < 2 else "1.png"))
        for n, name in enumerate(("train.jsonl", "train-2.jsonl", "valid.jsonl"))
    ]
    text, errors, _ = check(files)
    assert not errors and text.endswith(f"sides  train: {files[0]}, {files[1]}; valid: {files[2]}")


def test_a_film_of_another_depth_or_mode_is_the_same_film(folder):
    """What a run sees is compared: the adapters' 8-bit copy of a 16-bit film, a grey film stored as
    colour."""
    pixels = (np.random.default_rng(9).integers(0, 4096, (30, 40))).astype(np.uint16)
    Image.fromarray(pixels).save(folder / "deep.png")
    Image.open(folder / "1.png").convert("RGB").save(folder / "colour.png")
    from minigrpo.data import load_image

    load_image(folder / "deep.png").convert("L").save(folder / "plain.tif")
    train = write(folder, "train.jsonl", line(0, "deep.png"), line(1, "1.png"))
    test = write(folder, "test.jsonl", line(10, "plain.tif"), line(11, "colour.png"))
    assert [error.split(": remove")[0] for error in check([train, test])[1]] == [
        f"{test}:{n}: leak: film its pixels is also in {train}:{n}" for n in (1, 2)
    ]


def test_control_characters_are_shown_escaped(folder):
    """Bug: an ESC in a label, id or file name reached the terminal."""
    esc = "\x1b[2J\u202e"
    bad = write(
        folder,
        "train.jsonl",
        line(0, "0.png", label=f"heart{esc}"),
        line(1, f"lost{esc}.png"),
        line(2, "0.png", id=f"s{esc}", task=esc),
        line(f"3{esc}", "1.png"),
        line(f"3{esc}", "1.png"),
        line(4, "0.png", patient=f"p{esc}"),
    )
    test = write(
        folder,
        "test.jsonl",
        line(14, "2.png", patient=f"p{esc}", answer=f"{esc} [0.10, 0.20, 0.50, 0.60]"),
    )
    text, errors, _ = check([bad, test])
    assert len(errors) == 4 and "".join([*errors, *text.splitlines()]).isprintable()
    assert "heart\\x1b[2J\\u202e" in text
    assert "samples contain control or zero-width characters" in text


def test_a_film_that_vanishes_while_it_is_checked(folder, monkeypatch):
    """Bug: a film that was there when its line was read, and not when it was template_opens_think,
    was left out in silence.
    """
    train = write(folder, "train.jsonl", line(0, "0.png"), line(1, "1.png"))
    real = check_module.scan_jsonl

    def scan(path):
        found = real(path)
        (folder / "1.png").unlink()
        return found

    monkeypatch.setattr(check_module, "scan_jsonl", scan)
    _, errors, _ = check([train])
    assert len(errors) == 1 and errors[0].startswith(
        f"{train}:2: image {folder}/1.png cannot be read (no such file)"
    )


def test_each_film_is_decoded_once(folder, monkeypatch):
    looked = []
    real = check_module.look
    monkeypatch.setattr(check_module, "look", lambda path: looked.append(path) or real(path))
    lines = [line(n, f"{n % 3}.png") for n in range(30)]
    check([write(folder, "train.jsonl", *lines), write(folder, "test.jsonl", *lines)])
    assert len(looked) == 3


def test_figures(folder):
    report = {
        "id": "r",
        "image": "0.png",
        "task": "report",
        "question": "Report.",
        "answer": "The lungs are clear.",
    }
    talk = {
        "id": "c",
        "image": None,
        "task": "conversation",
        "turns": [["Effusion?", "No."], ["Are you sure?", "Yes, I am."]],
    }
    text, errors, _ = check(
        [write(folder, "train.jsonl", line(0, "0.png"), line(1, "5.png"), report, talk)]
    )
    figures = dict(row.strip().split("  ", 1) for row in text.splitlines()[1:])
    figures = {name: value.strip() for name, value in figures.items()}
    assert not errors and figures["samples"].startswith("4: 2 grounding, 1 report, 1 conversation")
    assert figures["films"] == "2 read; 2 patients named"
    assert figures["width"] == "median 22, 20 to 25, 95% at most 25 pixels"
    # 4 4 1 1 3 words
    assert figures["question"].endswith("words") and "median 3, 1 to 4" in figures["question"]
    assert (
        figures["box area"].startswith("median 0.160, 0.160 to 0.160")
        and figures["labels"] == "2 heart"
    )
    assert spread([]) == "none"
    assert spread(range(1, 101)) == "median 50, 1 to 100, 95% at most 95"


def test_lengths_in_the_checkpoint_s_tokens(folder, policy, tmp_path):
    policy.save_pretrained(tmp_path / "tiny")
    path = write(folder, "train.jsonl", line(0, "0.png"))
    text, _, _ = check([path], model=str(tmp_path / "tiny"))
    count = len(
        policy.tokenizer("At [0.10, 0.20, 0.50, 0.60].", add_special_tokens=False)["input_ids"]
    )
    assert f"answer     median {count}, {count} to {count}" in text and "tokens" in text
    from minigrpo.data import read_jsonl

    slots = policy.encoder.images(read_jsonl(path)).slots[0][0]
    assert f"film       median {slots}, {slots} to {slots}" in text


def test_contact_sheet_draws_boxes_where_they_lie(folder):
    Image.new("L", (200, 100), 0).save(folder / "wide.png")
    from minigrpo.data import read_jsonl

    samples = read_jsonl(
        write(
            folder,
            "train.jsonl",
            line(0, "wide.png", answer="[0.25, 0.00, 0.50, 1.00]", boxes=[[0.25, 0.0, 0.5, 1.0]]),
        )
    )
    assert draw_sheet(folder / "sheet.png", samples)
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB")).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 120)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    # the film is smaller than a tile and stands in its middle
    width, height, left, top = 252 - 52, 100, 28, 78
    assert (
        abs(columns[0] - (left + 0.25 * width)) <= 2
        and abs(columns[-1] - (left + 0.5 * width)) <= 2
    )
    assert abs(rows[0] - top) <= 2 and abs(rows[-1] - (top + height)) <= 2
    assert not draw_sheet(folder / "none.png", [])


def test_the_command(folder):
    good = write(folder, "train.jsonl", line(0, "0.png"))
    assert (
        python("-m", "minigrpo.data.check", good).endswith("no errors\n")
        and (folder / "train-check.png").exists()
    )
    bad = write(folder, "bad.jsonl", line(0, "lost.png"))
    said = python("-m", "minigrpo.data.check", good, bad, code=1)
    assert f"{bad}:1: image" in said and "replaced" in said and "1 errors\n" in said
