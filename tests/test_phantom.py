"""Drawn films: what is written about one is what was drawn, and the same seed draws it again."""

import json
import re
import sys
from pathlib import Path
from string import Formatter

import numpy as np
import pytest
from PIL import Image

from minigrpo.data import parse_boxes, phantom, read_jsonl, scenes, templates
from minigrpo.data.phantom import (
    DETAILS,
    KINDS,
    REMARKS,
    SIDES,
    Arguments,
    box_of,
    draw_film,
    film_samples,
    report,
    write_phantom,
)
from minigrpo.metrics.drawn import named_findings
from minigrpo.rewards.phantom_entities import annotate, entity_f1
from tests.processes import python

SIZE = 96
NAMES = {  # how a report calls a finding
    "cardiomegaly": r"cardiomegaly|(heart|silhouette) is \w*ly enlarged",
    "pleural effusion": r"effusions?\b",
    "consolidation": "consolidation",
    "nodule": r"nodules?\b",
    "pneumothorax": "pneumothorax",
    "atelectasis": "atelectasis",
    "pacemaker": "pacemaker",
    "endotracheal tube": "endotracheal tube",
    "nasogastric tube": "nasogastric tube",
}
NEGATED = re.compile(r"\b(no|not|without)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def films():
    return [draw_film(3, 0, k, SIZE) for k in range(120)]


@pytest.fixture(scope="module")
def samples(films):
    return [
        film_samples(film, f"p{k}", f"films/p{k}.png", np.random.default_rng(k))
        for k, film in enumerate(films)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    assert write_phantom(folder, Arguments(train=6, test=3, seed=5, size=SIZE), workers=2)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_same_seed_same_bytes_whatever_the_count_and_the_workers(folder, tmp_path):
    write_phantom(tmp_path, Arguments(train=4, test=4, seed=5, size=SIZE), workers=1)
    for name in ("phantom-train-00003", "phantom-test-00002"):
        assert (tmp_path / "films" / f"{name}.png").read_bytes() == (
            folder / "films" / f"{name}.png"
        ).read_bytes()
    for split, shared in (("train", 4), ("test", 3)):
        first, second = (lines(path / f"{split}.jsonl") for path in (folder, tmp_path))
        first, second = (
            [x for x in group if int(x["patient"][-5:]) < shared] for group in (first, second)
        )
        assert first == second and {x["patient"][-5:] for x in first} == {
            f"{k:05d}" for k in range(shared)
        }


def test_prose_is_unscored_and_changes_nothing_else(folder, tmp_path):
    arguments = Arguments(train=6, test=3, seed=5, size=SIZE, prose=True)
    assert write_phantom(tmp_path, arguments, workers=1)
    lengths = []
    for plain, spoken in zip(*(lines(f / "train.jsonl") for f in (folder, tmp_path)), strict=True):
        if plain["task"] == "report":
            short, long = plain.pop("answer"), spoken.pop("answer")
            assert short in long and entity_f1(long, short)["complete"] == 1
            lengths.append(len(long) / len(short))
        assert plain == spoken
    assert min(lengths) >= 1 and np.mean(lengths) > 1.2
    for text in (text for options, _ in phantom.PROSE for text in options):
        assert annotate(text)["entities"] == {} and named_findings(text) == set()


def test_another_seed_and_another_split_draw_other_films():
    pixels = [
        draw_film(*which, SIZE).pixels for which in ((3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1))
    ]
    for k, a in enumerate(pixels):
        assert all(not np.array_equal(a, b) for b in pixels[k + 1 :])


def test_patients_of_train_and_test_are_disjoint(folder):
    train, test = (
        {x["patient"] for x in lines(folder / f"{split}.jsonl")} for split in ("train", "test")
    )
    assert (len(train), len(test)) == (6, 3) and not train & test


def test_the_reader_of_training_accepts_the_files(folder):
    read = [*read_jsonl(folder / "train.jsonl"), *read_jsonl(folder / "test.jsonl")]
    assert len({sample.id for sample in read}) == len(read)
    assert {sample.task for sample in read} == {"report", "grounding"}
    with Image.open(folder / lines(folder / "train.jsonl")[0]["image"]) as image:
        assert (image.mode, image.size, image.format) == ("L", (SIZE, SIZE), "PNG")


def test_schema_and_number_of_samples(samples):
    for film in samples:
        asked = [x.get("label") == "all findings" for x in film[1:]]
        assert film[0]["task"] == "report" and all(x["task"] == "grounding" for x in film[1:])
        assert asked in ([[True], [True, False]] if film[0]["findings"] else [[False]])
        for x in film:
            assert {
                "id",
                "image",
                "task",
                "question",
                "answer",
                "boxes",
                "source",
                "patient",
            } <= set(x)
            assert x["source"] == "phantom" and not Path(x["image"]).is_absolute()
        assert all(
            x["kind"] in ("anatomy", "abnormality", "phrase") and x["label"] and x["boxes"]
            for x in film[1:]
        )


def test_a_findings_box_is_the_bounding_box_of_its_mask(films):
    for film in films:
        for finding in film.findings:
            ys, xs = np.nonzero(finding.mask)
            expected = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / SIZE
            np.testing.assert_allclose(finding.box, expected, atol=1e-4)


def test_boxes_are_valid_also_as_two_decimals(samples):
    for x in (x for film in samples for x in film):
        for x1, y1, x2, y2 in x["boxes"] + parse_boxes(x["answer"]):
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_a_grounding_answer_says_its_boxes_from_left_to_right(samples):
    for x in (x for film in samples for x in film[1:]):
        # those follow the order of the names
        assert x["boxes"] == sorted(x["boxes"]) or x["label"] == "all findings"
        np.testing.assert_allclose(parse_boxes(x["answer"]), x["boxes"], atol=0.0051)


def test_an_abnormality_is_answered_with_all_boxes_of_its_label(films, samples):
    for film, written in zip(films, samples, strict=True):
        asked, drawn = (
            {x["label"]: x["boxes"] for x in written if x.get("kind") == "abnormality"},
            {},
        )
        for f in film.findings:
            drawn.setdefault(f.label, []).append(f.box)
        assert asked.pop("all findings", []) == [f.box for f in film.findings]
        assert all(boxes == sorted(drawn[label]) for label, boxes in asked.items())


def test_all_findings_are_named_before_their_boxes(films, samples):
    for film, written in zip(films, samples, strict=True):
        for x in (x for x in written if x.get("label") == "all findings"):
            names = re.split(
                r" at \[[^\]]*\](?:, | and |\.)",
                re.sub("^(I see|Seen:|On this film:) ", "", x["answer"]),
            )
            wanted = [f"{f.side or ''} {f.label}".strip() for f in film.findings]
            assert names == [*wanted, ""]


def test_a_phrase_is_in_the_report_and_its_boxes_are_what_it_describes(films, samples):
    for film, written in zip(films, samples, strict=True):
        for x in (x for x in written if x.get("kind") == "phrase"):
            phrase = next(
                s for s in written[0]["answer"].split(".") if s and s.strip() in x["question"]
            ).strip()
            of_label = [f for f in film.findings if f.label == x["label"]]
            for side in SIDES:  # a phrase that names one side only must not point to the other
                if side in phrase and not any(
                    word in phrase for word in (*(set(SIDES) - {side}), "bilateral")
                ):
                    assert all(f.side == side for f in of_label if f.box in x["boxes"])
            if len(of_label) == 1:
                assert x["boxes"] == [of_label[0].box]


def test_the_patients_right_is_on_the_images_left(films):
    def middle(box):
        return (box[0] + box[2]) / 2

    for film in films:
        for part in ("lung", "clavicle"):
            assert box_of(film.regions[f"right {part}"])[2] < middle(
                box_of(film.regions[f"left {part}"])
            )
        assert middle(box_of(film.regions["aortic arch"])) > middle(
            box_of(film.regions["upper mediastinum"])
        )
        for f in film.findings:
            if f.side:
                assert abs(middle(f.box) - middle(box_of(film.regions[f"{f.side} lung"]))) < 0.2


def test_the_heart_is_wide_exactly_when_it_is_called_so(films):
    for film in films:
        heart, right, left = (
            box_of(film.regions[name]) for name in ("cardiac silhouette", "right lung", "left lung")
        )
        ratio = (heart[2] - heart[0]) / (left[2] - right[0])
        # drawn above 0.515; at 96 pixels, 0.03 is one
        enlarged = any(f.label == "cardiomegaly" for f in film.findings)
        assert ratio > 0.485 if enlarged else ratio < 0.53


def test_a_report_states_exactly_what_was_drawn(films, samples):
    for film, written in zip(films, samples, strict=True):
        present = {f.label for f in film.findings}
        sentences = [s.strip() for s in written[0]["answer"].split(".") if s.strip()]
        assert 3 <= len(sentences) <= 12
        stated, denied = set(), set()
        for sentence in sentences:
            named = {
                label for label, name in NAMES.items() if re.search(name, sentence, re.IGNORECASE)
            }
            (denied if NEGATED.search(sentence) else stated).update(named)
        assert stated == present and not denied & present
        text = written[0]["answer"].lower()
        assert re.search("effusion|pneumothorax", text) and re.search("heart|cardi", text)
        if "clear" in text:
            assert not present & {"consolidation", "nodule", "atelectasis"}
        if "no support devices" in text or "no lines or tubes" in text:
            assert not present & {"pacemaker", "endotracheal tube", "nasogastric tube"}
        for f in film.findings:  # where and how bad
            assert f.side is None or f.side in text or "bilateral" in text
            if f.label in ("consolidation", "nodule", "atelectasis"):
                assert f"{f.side} {f.zone} zone" in text


def test_the_likeliest_report_is_shorter_than_most(films):
    """What makes room for RL: after the findings, stopping beats each single remark, yet most
    reports go on.
    """
    film = next(
        film
        for film in films
        if len(film.findings) == 2 and all(f.label in DETAILS for f in film.findings)
    )
    remarks = [text.split()[0] for text in (*REMARKS, *(DETAILS[f.label] for f in film.findings))]
    told = [
        " ".join(s.text for s in report(film.findings, np.random.default_rng(k)))
        for k in range(600)
    ]
    first = [
        min(
            ((text.find(remark), remark) for remark in remarks if remark in text),
            default=(0, "stop"),
        )[1]
        for text in told
    ]
    shares = {name: first.count(name) / len(told) for name in first}
    assert max(shares, key=shares.get) == "stop" and shares["stop"] < 0.5 and len(shares) == 4


def test_the_number_of_boxes_is_a_real_question(films):
    for label in ("pleural effusion", "nodule", "consolidation"):
        count = [sum(f.label == label for f in film.findings) for film in films]
        assert any(n == 1 for n in count) and sum(n > 1 for n in count) > 0.15 * sum(
            n > 0 for n in count
        )
    kinds = [len({f.label for f in film.findings}) for film in films]
    assert set(kinds) == {0, 1, 2, 3, 4} and 0.03 < np.mean(np.array(kinds) == 0) < 0.3
    assert {f.label for film in films for f in film.findings} == set(KINDS)


def test_the_same_run_again_is_told_and_leaves_the_files(folder):
    before = (folder / "train.jsonl").stat().st_mtime_ns
    flags = ["--output_dir", folder, "--train=6", "--test=3", "--seed=5", f"--size={SIZE}"]
    assert (
        "already" in python("-m", "minigrpo.data.phantom", *flags)
        and (folder / "train.jsonl").stat().st_mtime_ns == before
    )


def test_films_need_no_seed(tmp_path, monkeypatch):
    for number, module in enumerate((phantom, scenes)):
        flags = ["--output_dir", tmp_path / str(number), "--train", 1, "--test", 1, "--size", 32]
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()
    assert json.loads((tmp_path / "0/phantom.json").read_text())["seed"] == 0
    drawn, film = (
        np.array(Image.open(next(tmp_path.glob("0/films/*train*.png")))),
        draw_film(0, 0, 0, 32),
    )
    assert (drawn == film.pixels).all() and len(
        (tmp_path / "1/train.jsonl").read_text().splitlines()
    ) > 1


def test_presence_asks_after_what_may_not_be_there(folder, films, samples, tmp_path):
    """Half of these questions have an answer without a box; the other lines stay what they were."""
    asked = []
    for k, (film, before) in enumerate(zip(films, samples, strict=True)):
        rng = np.random.default_rng(k)
        written = film_samples(film, f"p{k}", f"films/p{k}.png", rng, presence=1)
        assert written[:-1] == before
        x = written[-1]
        assert x["boxes"] == sorted(f.box for f in film.findings if f.label == x["label"])
        assert bool(x["boxes"]) == bool(parse_boxes(x["answer"])) and x["label"] in x["question"]
        assert bool(x["boxes"]) != bool(NEGATED.search(x["answer"]))
        asked.append(bool(x["boxes"]))
    assert 0.3 < np.mean(asked) < 0.6
    write_phantom(tmp_path / "asked", Arguments(6, 3, seed=5, size=SIZE, presence=1))
    absent = [s for s in read_jsonl(tmp_path / "asked/train.jsonl", task="grounding")]
    assert len(absent) == 6 + sum(x["task"] == "grounding" for x in lines(folder / "train.jsonl"))
    # made by a version that could not ask
    (folder / "phantom.json").write_text(json.dumps({"train": 6, "test": 3, "seed": 5, "size": 96}))
    assert not write_phantom(folder, Arguments(train=6, test=3, seed=5, size=SIZE))


def test_another_runs_folder_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match=f"{folder}.*choose another --output_dir"):
        write_phantom(folder, Arguments(train=6, test=3, seed=6, size=SIZE))
    (tmp_path / "train.jsonl").write_text("")  # a run killed before its phantom.json
    with pytest.raises(SystemExit, match="did not finish"):
        write_phantom(tmp_path, Arguments(train=6, test=3, seed=5, size=SIZE))


def test_templates():
    def fields(text):
        return [name for _, name, _, _ in Formatter().parse(text) if name]

    for group, count, names in (
        (templates.REPORT_QUESTIONS, 15, []),
        (templates.REGION_QUESTIONS, 20, ["label"]),
        (templates.REGION_ANSWERS, 20, ["boxes", "label"]),
        (templates.PRESENCE_QUESTIONS, 4, ["label"]),
        (templates.ABSENT_ANSWERS, 3, ["label"]),
        (templates.PHRASE_QUESTIONS, 8, ["label"]),
        (templates.PHRASE_ANSWERS, 8, ["boxes"]),
    ):
        assert len(set(group)) == len(group) == count and all(
            sorted(fields(text)) == names for text in group
        )
    turns = [
        templates.region_turn("heart", "[0.10, 0.20, 0.30, 0.40]", np.random.default_rng(k))
        for k in (0, 0, 1, 2, 3)
    ]
    assert turns[0] == turns[1] and len(set(turns)) > 1
    assert (
        "{" not in "".join(turns[0])
        and "heart" in turns[0][0]
        and parse_boxes(turns[0][1]) == [(0.1, 0.2, 0.3, 0.4)]
    )
