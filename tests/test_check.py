"""`python -m minigrpo.data.check`: what is in the data, and everything that is wrong with it, at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigrpo.data import check as check_module
from minigrpo.data.check import check, spread
from minigrpo.data.sheet import draw_sheet

ROOT = Path(__file__).parent.parent


def line(number, image, **more):
    return {"id": f"s{number}", "image": image, "task": "grounding", "question": "Where is the heart?", "patient": f"p{number}",
            "answer": "At [0.10, 0.20, 0.50, 0.60].", "boxes": [[0.1, 0.2, 0.5, 0.6]], "label": "heart"} | more


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 20 + number), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, name, *lines) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines))
    return path


def test_all_errors_of_all_files_at_once(folder):
    """read_jsonl stops at ten; a user who mends 40 lines wants to see 40."""
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:100])
    train = write(folder, "train.jsonl", *[line(n, "0.png", boxes=[[0, 0, 2, 1]]) for n in range(40)], line(50, "cut.png"), "{")
    test = write(folder, "test.jsonl", line(60, "lost.png"), line(61, "1.png"))
    _, errors, _ = check([train, test])
    assert len(errors) == 43
    places = [error.split(": ")[0] for error in errors]
    assert places == [*(f"{train}:{n}" for n in range(1, 43)), f"{test}:1"]
    assert "leaves 0..1" in errors[0] and "cannot be read" in errors[40] and "not JSON" in errors[41] and "does not exist" in errors[42]


def test_leaks_by_id_patient_and_pixels(folder):
    """A film that was renamed, or stored as another kind of file, is still the same film."""
    Image.open(folder / "2.png").save(folder / "other.bmp")
    train = write(folder, "train.jsonl", line(0, "0.png"), line(1, "1.png"), line(2, "2.png"), line(3, "3.png"))
    test = write(folder, "test.jsonl", line(0, "4.png", patient="new"), line(11, "5.png", patient="p1"), line(12, "other.bmp"),
                 line(13, "4.png"))
    _, errors, _ = check([train, test])
    assert [error.split(": remove")[0] for error in errors] == [
        f"{test}:1: leak: id 's0' stands in {train}:1 too", f"{test}:2: leak: patient 'p1' stands in {train}:2 too",
        f"{test}:3: leak: film its pixels stands in {train}:3 too"]


def test_two_training_files_may_share_a_patient(folder):
    one = write(folder / "one", "train.jsonl", line(0, "../0.png"))
    two = write(folder / "two", "train.jsonl", line(7, "../0.png", patient="p0"))
    test = write(folder, "test.jsonl", line(8, "1.png", patient="p0"))
    assert check([one, two])[1] == []
    assert len(check([one, two, test])[1]) == 1


def test_repeats_are_notes(folder):
    Image.open(folder / "0.png").save(folder / "copy.png")
    text, errors, _ = check([write(folder, "train.jsonl", line(0, "0.png"), line(1, "0.png"), line(2, "copy.png"))])
    assert not errors and "1 samples repeat another's" in text and "1 film files hold the pixels of another" in text


def test_blank_films_are_noted(folder):
    """Six of our 200 real test films are all but white; only the contact sheet showed it."""
    ramp = np.linspace(0, 255, 100 * 100).reshape(100, 100)
    for name, pixels in {"white.png": 240 + ramp * 15 / 255, "ramp.png": ramp}.items():
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    assert 225 <= check_module.look(str(folder / "ramp.png")).contrast <= 232
    text, errors, _ = check([write(folder, "train.jsonl", line(0, "ramp.png"), line(1, "white.png"), line(2, "0.png"))])
    assert not errors and "1 films are nearly all of one grey: white.png (line 2)" in text


def test_each_film_is_decoded_once(folder, monkeypatch):
    looked = []
    real = check_module.look
    monkeypatch.setattr(check_module, "look", lambda path: looked.append(path) or real(path))
    lines = [line(n, f"{n % 3}.png") for n in range(30)]
    check([write(folder, "train.jsonl", *lines), write(folder, "test.jsonl", *lines)])
    assert len(looked) == 3


def test_figures(folder):
    report = {"id": "r", "image": "0.png", "task": "report", "question": "Report.", "answer": "The lungs are clear."}
    talk = {"id": "c", "image": None, "task": "conversation", "turns": [["Effusion?", "No."], ["Are you sure?", "Yes, I am."]]}
    text, errors, _ = check([write(folder, "train.jsonl", line(0, "0.png"), line(1, "5.png"), report, talk)])
    figures = dict(row.strip().split("  ", 1) for row in text.splitlines()[1:])
    figures = {name: value.strip() for name, value in figures.items()}
    assert not errors and figures["samples"].startswith("4: 2 grounding, 1 report, 1 conversation")
    assert figures["films"] == "2 read; 2 patients named"
    assert figures["width"] == "median 22, 20 to 25, 95% at most 25 pixels"
    assert figures["question"].endswith("words") and "median 3, 1 to 4" in figures["question"]  # 4 4 1 1 3 words
    assert figures["box area"].startswith("median 0.160, 0.160 to 0.160") and figures["labels"] == "2 heart"
    assert spread([]) == "none"
    assert spread(range(1, 101)) == "median 50, 1 to 100, 95% at most 95"


def test_lengths_in_the_checkpoint_s_tokens(folder, policy, tmp_path):
    policy.save_pretrained(tmp_path / "tiny")
    path = write(folder, "train.jsonl", line(0, "0.png"))
    text, _, _ = check([path], model=str(tmp_path / "tiny"))
    count = len(policy.tokenizer("At [0.10, 0.20, 0.50, 0.60].", add_special_tokens=False)["input_ids"])
    assert f"answer     median {count}, {count} to {count}" in text and "tokens" in text
    from minigrpo.data import read_jsonl
    slots = policy._images(read_jsonl(path)).slots[0][0]
    assert f"film       median {slots}, {slots} to {slots}" in text


def test_contact_sheet_draws_boxes_where_they_lie(folder):
    Image.new("L", (200, 100), 0).save(folder / "wide.png")
    from minigrpo.data import read_jsonl
    samples = read_jsonl(write(folder, "train.jsonl", line(0, "wide.png", answer="[0.25, 0.00, 0.50, 1.00]", boxes=[[0.25, 0.0, 0.5, 1.0]])))
    assert draw_sheet(folder / "sheet.png", samples)
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB")).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 120)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    width, height, left, top = 252 - 52, 100, 28, 78  # the film is smaller than a tile and stands in its middle
    assert abs(columns[0] - (left + 0.25 * width)) <= 2 and abs(columns[-1] - (left + 0.5 * width)) <= 2
    assert abs(rows[0] - top) <= 2 and abs(rows[-1] - (top + height)) <= 2
    assert not draw_sheet(folder / "none.png", [])


def test_the_command(folder):
    good = write(folder, "train.jsonl", line(0, "0.png"))

    def run(*argv):
        return subprocess.run([sys.executable, "-m", "minigrpo.data.check", *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    done = run(good)
    assert done.returncode == 0 and done.stdout.endswith("no errors\n") and (folder / "train-check.png").exists(), done.stderr
    bad = write(folder, "bad.jsonl", line(0, "lost.png"))
    done = run(good, bad)
    assert done.returncode == 1 and f"{bad}:1: image" in done.stdout and "replaced" in done.stdout and done.stderr.endswith("1 errors\n")
