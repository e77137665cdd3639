"""A broken file must be refused before training starts, in a message that says where it is broken
and what to do.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigrpo.data import DataError, load_image, read_jsonl

REPORT = {
    "id": "r",
    "image": "film.png",
    "task": "report",
    "question": "Report.",
    "answer": "No effusion.",
}
BOX = {
    "id": "g",
    "image": None,
    "task": "grounding",
    "question": "Where?",
    "answer": "[0.10, 0.20, 0.30, 0.40]",
    "boxes": [[0.1, 0.2, 0.3, 0.4]],
    "kind": "anatomy",
    "label": "heart",
}
TALK = {
    "id": "c",
    "image": None,
    "task": "conversation",
    "turns": [["Effusion?", "No."], ["Sure?", "Yes."]],
}


@pytest.fixture
def write(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "film.png")

    def write(*lines) -> Path:
        """Dicts become JSON; text and bytes stand as they are."""
        raw = [
            json.dumps(line).encode()
            if isinstance(line, dict)
            else line.encode()
            if isinstance(line, str)
            else line
            for line in lines
        ]
        (tmp_path / "data.jsonl").write_bytes(b"\n".join(raw))
        return tmp_path / "data.jsonl"

    return write


def test_reads_every_task_and_resolves_images(write, tmp_path):
    second = tmp_path / "second.png"
    Image.new("RGB", (4, 4)).save(second)
    pair = BOX | {"id": "two", "image": ["film.png", str(second)]}
    file = write(REPORT | {"patient": "p1", "unknown": 1}, "", BOX, TALK, pair)
    report, box, talk, two = read_jsonl(str(file))
    assert (
        report.image == str(tmp_path / "film.png")
        and report.images == [report.image]
        and report.patient == "p1"
    )
    assert (report.file, report.line, box.line) == (str(file), 1, 3)
    assert (
        box.image is None
        and box.images == []
        and box.boxes == [[0.1, 0.2, 0.3, 0.4]]
        and box.label == "heart"
    )
    assert (talk.question, talk.answer, len(talk.turns)) == ("Effusion?", "No.", 2)
    assert two.image == two.images == [str(tmp_path / "film.png"), str(second)]
    assert [sample.id for sample in read_jsonl(file, task="grounding")] == ["g", "two"]


def without(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    "line, wrong, mend",
    [
        ("{nope", "not JSON", "one JSON object a line"),
        (b"\xff\xfe\xff", "not JSON", "UTF-8"),
        ("[" * 100_000, "not JSON", "one JSON object a line"),
        ("[1]", "a JSON list", "one JSON object"),
        ("null", "a JSON NoneType", "one JSON object"),
        (without(REPORT, "id"), '"id" is missing', "its own"),
        (REPORT | {"id": 7}, '"id" is missing or not a text', "its own"),
        (REPORT | {"task": "raport"}, "unknown task 'raport'", "report, grounding"),
        (REPORT | {"task": ["report"]}, "unknown task ['report']", "report, grounding"),
        (
            REPORT | {"question": " "},
            '"question" is missing, empty',
            "write it, or remove the line",
        ),
        (without(REPORT, "answer"), '"answer" is missing', "write it, or remove the line"),
        (
            REPORT | {"answer": 3},
            '"answer" is missing, empty or not a text',
            "write it, or remove the line",
        ),
        (without(TALK, "turns"), '"turns" is missing', "[[question, answer], ...]"),
        (
            TALK | {"turns": [["Effusion?"]]},
            '"turns" is missing or ill-formed',
            "[[question, answer], ...]",
        ),
        (
            TALK | {"turns": [["Effusion?", ""]]},
            '"turns" is missing or ill-formed',
            "none of them empty",
        ),
        (TALK | {"question": ""}, '"question" is missing, empty', "write it"),
        (
            BOX | {"boxes": [[0, 0, 1]]},
            "box [0, 0, 1] is not four finite numbers",
            "write [x1, y1, x2, y2]",
        ),
        (BOX | {"boxes": [[0, 0, 1, "1"]]}, "not four finite numbers", "write [x1, y1, x2, y2]"),
        (BOX | {"boxes": [[0, 0, True, 1]]}, "not four finite numbers", "write [x1, y1, x2, y2]"),
        (
            BOX | {"boxes": [[0, 0, float("nan"), 1]]},
            "not four finite numbers",
            "write [x1, y1, x2, y2]",
        ),
        (
            BOX | {"boxes": [[0, 0, float("inf"), 1]]},
            "not four finite numbers",
            "write [x1, y1, x2, y2]",
        ),
        (
            BOX | {"boxes": [0, 0, 1, 1]},
            "box 0 is not four finite numbers",
            "write [x1, y1, x2, y2]",
        ),
        (BOX | {"boxes": "all"}, "\"boxes\" is 'all'", "write a list of [x1, y1, x2, y2]"),
        (BOX | {"boxes": [[0, 0, 512, 512]]}, "lies outside 0..1", "divide x by the image's width"),
        (
            BOX | {"boxes": [[0, 0, 10**400, 1]]},
            "lies outside 0..1",
            "divide x by the image's width",
        ),
        (BOX | {"boxes": [[0.5, 0, 0.4, 1]]}, "has no area", "x1 < x2"),
        (BOX | {"boxes": [[0, 0.5, 1, 0.5]]}, "has no area", "y1 < y2"),
        (without(BOX, "boxes"), "grounding without boxes", 'add "boxes"'),
        (BOX | {"boxes": None}, "grounding without boxes", "nothing to find"),
        (BOX | {"boxes": []}, '"boxes" is empty, but the answer holds a box', "nothing to find"),
        (
            BOX | {"answer": "It is in the middle."},
            "the answer holds no box",
            'write its boxes as "[x1, y1, x2, y2]"',
        ),
        (BOX | {"kind": "organ"}, "unknown kind 'organ'", "anatomy, abnormality, phrase"),
        (BOX | {"label": 3}, '"label" is 3', "put it in quotes"),
        (REPORT | {"id": "g"}, "id 'g' is already on line 1", "rename one"),
        (without(REPORT, "image"), '"image" is missing', "null for no image"),
        (REPORT | {"image": []}, '"image" is missing or ill-formed', "null for no image"),
        (REPORT | {"image": 3}, '"image" is missing or ill-formed', "null for no image"),
        (REPORT | {"image": "lost.png"}, "lost.png does not exist", "check the path"),
        (REPORT | {"image": "."}, "does not exist", "check the path"),
        (REPORT | {"image": "x" * 5000}, "does not exist", "check the path"),
        (REPORT | {"image": "a\0b"}, "does not exist", "check the path"),
        (REPORT | {"image": "films\\film.png"}, "does not exist", "with / and not \\"),
        (
            REPORT | {"turns": [["Effusion?", "No."]]},
            '"turns" are for conversations',
            'set "task" to "conversation"',
        ),
        (REPORT | {"turns": 5}, '"turns" are for conversations', "or leave them out"),
        (
            REPORT | {"question": "<|image_pad|> Report."},
            '"question" holds <|image_pad|>',
            "remove it",
        ),
        (REPORT | {"answer": "Clear.<|im_end|>"}, '"answer" holds <|im_end|>', "remove it"),
        (
            REPORT | {"answer": "<think>Clear.</think>No effusion."},
            '"answer" holds <think>',
            'write the trace into "thinking"',
        ),
        (
            REPORT | {"answer": "<answer>No effusion.</answer>"},
            '"answer" holds <answer>',
            "without tags",
        ),
        (
            REPORT | {"answer": "No effusion. </ Think >"},
            '"answer" holds </ Think >',
            "without tags",
        ),
        (REPORT | {"thinking": "<think>Clear."}, '"thinking" holds <think>', "leave the tags out"),
        (
            TALK | {"turns": [["Effusion?", "No.</think>"]]},
            '"turns" holds </think>',
            "without tags",
        ),
        (
            REPORT | {"question": "<image>\nReport."},
            '"question" holds <image>',
            '"image" says where images are',
        ),
        (REPORT | {"question": "Report. <video>"}, '"question" holds <video>', "remove it"),
        (
            TALK | {"turns": [["Effusion?", "No."], ["<image> And here?", "No."]]},
            '"turns" holds <image>',
            "remove it",
        ),
        (
            REPORT | {"answer": "\u200b"},
            '"answer" is missing, empty',
            "write it, or remove the line",
        ),
        (
            REPORT | {"answer": "\ufeff\u2060 \u00ad\t"},
            '"answer" is missing, empty',
            "write it, or remove the line",
        ),
        (
            REPORT | {"question": "\u3164\u2800"},
            '"question" is missing, empty',
            "write it, or remove the line",
        ),
        (
            TALK | {"turns": [["Effusion?", "\u200d"]]},
            '"turns" is missing or ill-formed',
            "none of them empty",
        ),
        (REPORT | {"id": "\u202e"}, '"id" is missing or not a text', "its own"),
        (
            REPORT | {"label": "lung\udfff"},
            "\"label\" holds '\\udfff', half a character",
            "correct it",
        ),
        (REPORT | {"image": "~/film.png"}, "does not exist", "write ~ out"),
        (
            '{"id": "r", "answer": "Effusion.", "answer": "No effusion."}',
            "key 'answer' appears twice",
            "one JSON object a line",
        ),
        (
            TALK | {"turns": [["Effusion?", "No\ud83d"]]},
            "\"turns\" holds '\\ud83d', half a character",
            "correct it",
        ),
        (
            REPORT | {"question": "\udc00?"},
            "\"question\" holds '\\udc00', half a character",
            "correct it",
        ),
    ],
)
def test_refuses_a_bad_line(write, line, wrong, mend):
    file = write(BOX, line)
    with pytest.raises(DataError) as error:
        read_jsonl(file)
    message = str(error.value)
    assert message.startswith(f"{file}:2: ") and wrong in message and mend in message


def test_tells_ten_errors_at_once(write):
    file = write(*[{"id": str(i)} | without(REPORT, "id") | {"answer": ""} for i in range(25)])
    with pytest.raises(DataError) as error:
        read_jsonl(file)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{file}:{i}" for i in range(1, 11)]
    assert lines[-1] == "... and 15 more"


def test_refuses_missing_empty_and_unfit_files(write, tmp_path):
    with pytest.raises(DataError, match="none.jsonl: no such file: check the path"):
        read_jsonl(tmp_path / "none.jsonl")
    for text in ("", "\n \n"):
        with pytest.raises(
            DataError, match="data.jsonl:1: the file is empty: write one JSON object a line"
        ):
            read_jsonl(write(text))
    with pytest.raises(
        DataError, match="data.jsonl: no sample has task 'report'; it holds conversation, grounding"
    ):
        read_jsonl(write(BOX, TALK), task="report")
    with pytest.raises(ValueError, match="unknown task 'reports': choose one of all, report"):
        read_jsonl(write(BOX), task="reports")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_found_although_its_header_is_whole(write, tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    assert Image.open(tmp_path / f"cut.{suffix}").size == (64, 64)
    (tmp_path / "text.png").write_text("not an image")
    file = write(
        REPORT,
        REPORT | {"id": "r2", "image": f"cut.{suffix}"},
        REPORT | {"id": "r3", "image": "text.png"},
    )
    with pytest.raises(DataError) as error:
        read_jsonl(file)
    cut, text = str(error.value).splitlines()
    assert (
        cut.startswith(f"{file}:2: image {tmp_path}/cut.{suffix} cannot be read (")
        and "fetch it again" in cut
    )
    assert text.startswith(f"{file}:3: image {tmp_path}/text.png cannot be read (")
    assert len(read_jsonl(file, verify_images=False)) == 3


def test_each_image_is_decoded_once(write, monkeypatch):
    template_opens_think = []
    real = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **more: template_opens_think.append(file) or real(file, **more)
    )
    read_jsonl(write(*[REPORT | {"id": str(i)} for i in range(5)]))
    assert len(template_opens_think) == 1


@pytest.mark.parametrize("peak", [4095, 16383, 65535])
def test_16_bit_films_are_scaled_not_clipped(tmp_path, peak):
    """A 14-bit film read as one of 16 bits came out at a quarter of its brightness."""
    pixels = np.linspace(0, peak, 12).reshape(3, 4).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    image = load_image(tmp_path / "film.png")
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.array_equal(np.asarray(image)[..., 1], np.round(pixels * (255 / peak)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_8_bit_images_keep_their_values(tmp_path, mode):
    Image.new("L", (5, 4), 255).convert(mode).save(tmp_path / "film.png")
    image = load_image(tmp_path / "film.png")
    assert image.mode == "RGB" and (np.asarray(image) == 255).all()


def test_turns_of_a_report_do_not_take_the_place_of_its_answer(write):
    """Bug: train_sft.py trained on the turns of any task, and 5 in their place was a traceback in
    the middle of a run.
    """
    with pytest.raises(DataError, match="this is a report"):
        read_jsonl(write(REPORT | {"turns": [["Weather?", "Fine."]]}))
    assert read_jsonl(write(REPORT | {"turns": []}))[0].answer == "No effusion."


@pytest.mark.parametrize(
    "head, end", [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\xef\xbb\xbf", b"\r\n\r\n")]
)
def test_files_of_windows_editors(write, head, end):
    found = read_jsonl(
        write(head + end.join(json.dumps(line).encode() for line in (REPORT, BOX)) + end)
    )
    assert [sample.id for sample in found] == ["r", "g"]


@pytest.mark.parametrize(
    "orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))]
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_photo_is_shown_the_right_way_up(tmp_path, orientation, corner, suffix):
    """Bug: a film photographed with the phone on its side was seen lying, and its boxes were of
    another picture.
    """
    pixels = np.full((60, 90), 40, np.uint8)
    pixels[:12, :12] = 250
    note = Image.Exif()
    note[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"film.{suffix}", exif=note)
    image = load_image(tmp_path / f"film.{suffix}")
    assert image.size == ((90, 60) if orientation in (1, 3) else (60, 90))
    assert np.asarray(image)[..., 0][corner] > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_orientation_note_is_none(tmp_path):
    Image.new("L", (9, 6), 77).save(tmp_path / "film.jpg", exif=b"Exif\0\0MM\0*nonsense")
    assert load_image(tmp_path / "film.jpg").size == (9, 6)


def test_images_that_no_run_can_take(write, tmp_path):
    """Bug: the image processor refused a strip in the middle of a run; floats from 0 to 1 all
    became black.
    """
    Image.new("L", (1005, 5)).save(tmp_path / "strip.png")
    Image.fromarray(np.random.default_rng(0).random((6, 8), dtype=np.float32)).save(
        tmp_path / "floats.tif"
    )
    file = write(REPORT | {"image": "strip.png"}, REPORT | {"id": "r2", "image": "floats.tif"})
    with pytest.raises(DataError) as error:
        read_jsonl(file)
    strip, floats = str(error.value).splitlines()
    assert (
        f"{file}:1: " in strip
        and "more than 200 times the other" in strip
        and f"{file}:2: " in floats
        and "convert it to 8 or 16 bits" in floats
    )


def test_32_bit_films_are_scaled_not_clipped(tmp_path):
    """Bug: grey levels above 65,535 all became white."""
    Image.fromarray(np.array([[0, 500_000, 1_000_000]], np.int32)).save(tmp_path / "film.tif")
    assert np.asarray(load_image(tmp_path / "film.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_questions_may_speak_of_tags(write):
    """Prompts in the way of R1 say where thinking goes; only what is compared with an answer must
    be free of tags."""
    asked = REPORT | {"question": "Think in <think></think>, then report in <answer></answer>."}
    assert read_jsonl(write(asked))[0].question == asked["question"]


def test_one_spelling_on_both_sides(write):
    """Bug: an accent behind its letter instead of in it made a perfect copy earn GLEU 0.385."""
    from minigrpo.data import split_thinking
    from minigrpo.metrics.items import score_item
    from minigrpo.rewards import reward_fn

    composed = "Kein Erguß, Herz vergrößert, \u00c5 d\u00e9j\u00e0 vu."
    apart = "Kein Erguß, Herz vergro\u0308\u00dfert, A\u030a de\u0301ja\u0300 vu."
    for reference, answer in ((composed, apart), (apart, composed), (apart, apart)):
        (sample,) = read_jsonl(
            write(REPORT | {"answer": reference, "thinking": apart, "question": apart})
        )
        assert sample.answer == sample.thinking == sample.question == composed
        assert split_thinking(answer)[1] == composed
        assert reward_fn("gleu")([answer], [sample]).values == [1.0]
        assert score_item(sample, answer)["gleu"] == 1.0
    (sample,) = read_jsonl(write(TALK | {"turns": [[apart, apart]]}))
    assert sample.turns == [[composed, composed]] and sample.answer == composed


# ---- boxes in the answer beside "boxes" ------------------------------------------------

TWO = [[0.1234, 0.2, 0.3, 0.4], [0.5, 0.55, 0.9, 0.95]]
FIRST, SECOND = "[0.12, 0.20, 0.30, 0.40]", "[0.50, 0.55, 0.90, 0.95]"


@pytest.mark.parametrize(
    "answer, guess",
    [
        (
            "[123, 200, 300, 400] and [500, 550, 900, 950]",
            "they look like [x1, y1, x2, y2] in 0..1000",
        ),
        ("[12.3, 20, 30, 40] and [50, 55, 90, 95]", "they look like [x1, y1, x2, y2] in percent"),
        (
            "[252, 307, 614, 614] and [1024, 844, 1843, 1459]",
            "they look like [x1, y1, x2, y2] in pixels of an image of about 204",
        ),
        (
            "[0.12, 0.20, 0.18, 0.20] and [0.50, 0.55, 0.40, 0.40]",
            "they look like [x, y, width, height]",
        ),
        (
            "[253, 307, 361, 307] and [1024, 844, 819, 614]",
            "they look like [x, y, width, height] in pixels of an image of about 20",
        ),
        (
            "[0.21, 0.30, 0.18, 0.20] and [0.70, 0.75, 0.40, 0.40]",
            "they look like [middle x, middle y, width, height]",
        ),
        (
            "[0.20, 0.12, 0.40, 0.30] and [0.55, 0.50, 0.95, 0.90]",
            "they look like [y1, x1, y2, x2]",
        ),
        (
            "[200, 123, 400, 300] and [550, 500, 950, 900]",
            "they look like [y1, x1, y2, x2] in 0..1000",
        ),
        (
            "[0.30, 0.40, 0.12, 0.20] and [0.90, 0.95, 0.50, 0.55]",
            "they look like [x2, y2, x1, y1]",
        ),
        ("[0.70, 0.20, 0.88, 0.40] and [0.10, 0.55, 0.50, 0.95]", "left and right are swapped"),
        (f"{FIRST} and [0.10, 0.55, 0.50, 0.95]", "the boxes differ"),
        (f"{FIRST} and [0.50, 0.55, 0.90, 0.98]", "the boxes differ"),
        (FIRST, '1 in the answer, 2 in "boxes"; [0.50, 0.55, 0.90, 0.95] is only in "boxes"'),
        (
            f"{FIRST}, {SECOND} and [0.10, 0.10, 0.20, 0.20]",
            '3 in the answer, 2 in "boxes"; [0.10, 0.10, 0.20, 0.20] is only in the answer',
        ),
        (
            f"{FIRST}, {FIRST} and {SECOND}",
            f'3 in the answer, 2 in "boxes"; {FIRST} is only in the answer',
        ),
        (f"{FIRST} and {FIRST}", "the boxes differ"),
    ],
)
def test_an_answer_that_contradicts_its_boxes(write, answer, guess):
    """Bug: nothing was said, and the file's own answer earned a soft F1 of 0."""
    with pytest.raises(DataError) as error:
        read_jsonl(write(REPORT, BOX | {"answer": f"Seen at {answer}.", "boxes": TWO}))
    assert ':2: the boxes in the answer are not "boxes" (' in str(error.value)
    assert guess in str(error.value)
    assert f"write {FIRST} and {SECOND} in the answer, or correct" in str(error.value)


@pytest.mark.parametrize(
    "boxes, guess",
    [
        ([[0.1, 0.2, 0.2, 0.3]], '"boxes" looks like [x, y, width, height]'),
        ([[0.2, 0.1, 0.5, 0.3]], "they look like [y1, x1, y2, x2]"),
    ],
)
def test_boxes_in_another_form_than_the_answer(write, boxes, guess):
    with pytest.raises(DataError, match=guess.replace("[", r"\[")):
        read_jsonl(write(BOX | {"answer": "[0.10, 0.20, 0.30, 0.50]", "boxes": boxes}))


@pytest.mark.parametrize(
    "answer, boxes",
    [
        (f"{FIRST} and {SECOND}", TWO),
        (f"{SECOND} and {FIRST}", TWO),
        (f"A nodule at {FIRST} (mild), a mass at {SECOND}.", TWO),
        ("[0.1234, 0.2, 0.3, 0.4] [0.5, 0.55, 0.9, 0.95]", TWO),
        ("[0.13, 0.20, 0.30, 0.40] and [0.50, 0.55, 0.89, 0.95]", TWO),
        ("[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.9, 1.0]", TWO),
        ("[0.1, 0.2, 0.3, 0.4]", [[0.1499, 0.16, 0.34, 0.44]]),
        ("[0, 0, 1, 1]", [[0.001, 0.0, 1.0, 0.999]]),
        ("[.12,.2,.3,.4] [5e-1,0.55,0.9,0.95]", TWO),
        (f"{FIRST} and {FIRST}", [TWO[0], TWO[0]]),
        ("[0.12, 0.20, 0.30, 0.40] of [1, 2] and [a, b, c, d]", [TWO[0]]),
    ],
)
def test_rounding_and_order_are_no_contradiction(write, answer, boxes):
    assert read_jsonl(
        write(
            BOX | {"answer": answer, "boxes": boxes, "thinking": "Perhaps [0.9, 0.9, 0.95, 0.95]."}
        )
    )


def test_boxes_of_other_tasks_are_their_own(write):
    """A report has boxes of its findings and no box in its text; a conversation may speak of one of
    several."""
    talk = TALK | {
        "turns": [["Where is the heart?", f"At {FIRST}."], ["And the aorta?", f"At {SECOND}."]],
        "boxes": [TWO[0]],
    }
    classified = REPORT | {
        "id": "k",
        "task": "classification",
        "answer": f"Nodule {SECOND}",
        "boxes": TWO,
    }
    assert len(read_jsonl(write(REPORT | {"boxes": TWO}, talk, classified))) == 3


def test_thousands_of_boxes_are_compared_in_order(write):
    """A matching of 20,000 boxes with 20,000 would take 3 GB."""
    boxes = [[round(0.00001 * k, 5), 0.1, 0.9, 0.9] for k in range(20_000)]
    answer = " ".join(f"[{', '.join(map(str, box))}]" for box in boxes)
    assert read_jsonl(write(BOX | {"answer": answer, "boxes": boxes}))
    for changed in (boxes[1000:], boxes[::-1]):
        with pytest.raises(DataError, match="the boxes in the answer are not"):
            read_jsonl(write(BOX | {"answer": answer, "boxes": changed}))


def test_control_characters_do_not_reach_the_terminal(write):
    """Bug: an ESC in a path or an id was printed as it stood, and could rewrite what the terminal
    shows."""
    with pytest.raises(DataError) as error:
        read_jsonl(
            write(
                REPORT | {"image": "film\x1b]0;owned\x07.png"},
                REPORT | {"id": "t", "task": "\x9b2J\u202e"},
            )
        )
    assert str(error.value).count("\n") == 1 and str(error.value).replace("\n", "").isprintable()
    assert "film\\x1b]0;owned\\x07.png" in str(error.value)


def test_a_message_is_short_whatever_it_quotes(write):
    with pytest.raises(DataError) as error:
        read_jsonl(write(REPORT | {"boxes": "x" * 1_000_000}))
    assert len(str(error.value)) < 3000 and "write a list of [x1, y1, x2, y2]" in str(error.value)
