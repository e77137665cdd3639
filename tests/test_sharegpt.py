"""LLaVA / ShareGPT JSON and back."""

import json
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from minigrpo.data import DataError, read_jsonl
from minigrpo.data.sharegpt import read_sharegpt, to_sharegpt
from tests.processes import python


def said(*texts):
    return [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def read(tmp_path):
    (tmp_path / "films").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8), 50).save(tmp_path / "films" / name)

    def read(*items, task="report"):
        (tmp_path / "llava.json").write_text(json.dumps(items))
        lines = list(read_sharegpt(tmp_path / "llava.json", tmp_path / "films", tmp_path, task))
        (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return read_jsonl(tmp_path / "lines.jsonl")

    return read


def test_what_llava_files_hold(read, tmp_path):
    report, box, talk, two, none = read(
        {"id": "r", "image": "a.png", "conversations": said("<image>\nReport.", "Clear lungs.")},
        {
            "id": 7,
            "image": "a.png",
            "conversations": said("Where is the heart?\n<image>", "At [0.10, 0.20, 0.30, 0.40]."),
        },
        {
            "id": "t",
            "image": "b.png",
            "conversations": said("<image>\nEffusion?", "No.", "Sure?", "Yes."),
        },
        {
            "id": "p",
            "image": ["a.png", "b.png"],
            "conversations": said("<image>\n<image>\nCompare.", "Alike."),
        },
        {"id": "n", "conversations": said("What is an effusion?", "Fluid.")},
    )
    assert (report.task, report.question, report.answer) == ("report", "Report.", "Clear lungs.")
    assert (box.id, box.task, box.question, box.boxes) == (
        "7",
        "grounding",
        "Where is the heart?",
        [[0.1, 0.2, 0.3, 0.4]],
    )
    assert talk.task == "conversation" and talk.turns == [["Effusion?", "No."], ["Sure?", "Yes."]]
    assert (
        two.images == [str(tmp_path / "films" / name) for name in ("a.png", "b.png")]
        and none.image is None
    )


def test_round_trip_loses_nothing(samples, tmp_path):
    """LLaVA has no place for boxes in four decimals, labels and patients: they travel as keys that
    its readers ignore.
    """
    talk = replace(
        samples[0],
        id="talk",
        task="conversation",
        turns=[["Effusion?", "No."], ["Sure?", "Yes."]],
        question="Effusion?",
        answer="No.",
    )
    pair = replace(samples[0], id="pair", image=[samples[0].image, samples[-1].image])
    text = replace(samples[0], id="text", image=None)
    given = [*samples, talk, pair, text]
    (tmp_path / "llava.json").write_text(
        json.dumps([to_sharegpt(sample, tmp_path) for sample in given])
    )
    lines = read_sharegpt(tmp_path / "llava.json", tmp_path, tmp_path, "report")
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, lines)))
    again = read_jsonl(tmp_path / "again.jsonl", verify_images=False)
    assert [replace(s, file="", line=0) for s in again] == [
        replace(s, file="", line=0) for s in given
    ]


def test_written_files_are_what_llava_reads(samples, tmp_path):
    item = to_sharegpt(samples[0], tmp_path)
    assert item["conversations"][0] == {"from": "human", "value": f"<image>\n{samples[0].question}"}
    assert (
        item["conversations"][1] == {"from": "gpt", "value": samples[0].answer}
        and (tmp_path / item["image"]).resolve().is_file()
    )


@pytest.mark.parametrize(
    "item, wrong",
    [
        ({"id": "x"}, '"conversations" is missing'),
        ({"id": "x", "conversations": said("Q?")}, "the last question has no answer"),
        (
            {
                "id": "x",
                "conversations": [{"from": "system", "value": "Be brief."}, *said("Q?", "A.")],
            },
            "turn 1 is from 'system'",
        ),
        ({"id": "x", "conversations": said("Q?", "A.")[::-1]}, "turn 1 is from 'gpt'"),
        (
            {"id": "x", "image": "a.png", "conversations": said("Q?", "A.")},
            "0 <image> for 1 images",
        ),
        ({"id": "x", "conversations": said("<image>Q?", "A.")}, "1 <image> for 0 images"),
        (
            {"id": "x", "image": "a.png", "conversations": said("Q?", "A.", "<image>?", "B.")},
            "after the first question",
        ),
        (
            {"id": "x", "image": "lost.png", "conversations": said("<image>Q?", "A.")},
            "does not exist: check --image_root",
        ),
        (
            {"id": "x", "image": "a.png", "conversations": said("<image>Q?", " ")},
            '"answer" is missing',
        ),
        ({"conversations": said("Q?", "A.")}, '"id" is missing'),
        ({"id": "ok", "conversations": said("Q?", "A.")}, "id 'ok' is already that of item 1"),
        ({"id": "x", "conversations": said("Q?", "[0.9, 0.9, 0.1, 0.1]")}, "has no area"),
        ("x", "a JSON str: write an object"),
    ],
)
def test_a_bad_item_is_named(read, item, wrong):
    with pytest.raises(DataError) as error:
        read({"id": "ok", "conversations": said("Q?", "A.")}, item)
    message = str(error.value)
    assert "llava.json: item 2" in message and wrong in message


def test_a_question_with_nothing_to_find_goes_both_ways(read):
    [sample] = read({
        "id": "x", "task": "grounding", "boxes": [],
        "conversations": said("Is there any nodule?", "There is no nodule."),
    })  # fmt: skip
    assert (sample.task, sample.boxes, sample.answer) == ("grounding", [], "There is no nodule.")
    assert to_sharegpt(sample, [])["boxes"] == []


def test_the_command_both_ways(phantom, tmp_path):
    run = partial(python, "-m", "minigrpo.data.sharegpt")
    run(phantom / "train.jsonl", "--output_file", tmp_path / "llava.json")
    run(tmp_path / "llava.json", "--output_file", tmp_path / "deep" / "train.jsonl")
    first, again = (
        read_jsonl(phantom / "train.jsonl"),
        read_jsonl(tmp_path / "deep" / "train.jsonl"),
    )
    assert [(s.id, s.image, s.boxes) for s in first] == [(s.id, s.image, s.boxes) for s in again]
    assert "exists already" in run(
        phantom / "train.jsonl", "--output_file", tmp_path / "llava.json", code=1
    )
