"""The first minute: what its pictures, captions and reward are, and that a small run of it leaves
all its files.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minigrpo import quick
from minigrpo.data import Sample, read_jsonl
from tests.processes import python


def sample(*things):
    return Sample(
        id="a",
        image=None,
        task="classification",
        question=quick.QUESTION,
        answer="",
        findings=things,
    )


@pytest.mark.parametrize(
    "answer, value",
    [
        ("red ball, blue fish", 1),
        ("blue fish, red ball", 1),
        ("red ball", 1 / 2),
        ("red ball, red ball", 1 / 3),  # twice: the second is wrong
        ("red ball, blue fish, green tree", 2 / 3),
        ("blue ball", 0),
        ("Red ball", 0),
        ("", 0),
    ],
)
def test_reward(answer, value):
    assert quick.reward([answer], [sample("red ball", "blue fish")]) == pytest.approx([value])


def test_captions_are_true_and_most_are_not_whole():
    rng, whole = np.random.default_rng(0), 0
    for _ in range(500):
        _, things = quick.draw_picture(rng)
        named = quick.write_caption(things, rng).split(", ")
        assert named == things[: len(named)]
        whole += len(named) == len(things)
    assert 0 < whole < 150


def test_a_picture_shows_what_it_is_said_to():
    """Each thing's colour is in the picture, and no colour of a thing that is not there."""
    for seed in range(40):
        image, things = quick.draw_picture(np.random.default_rng(seed))
        assert image.size == (96, 64) and quick.FEWEST <= len(set(things)) <= quick.MOST
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        for colour in ("red", "green", "blue", "yellow"):
            close = np.abs(pixels - quick.COLOURS[colour]).max(1) < 12
            assert (close.sum() > 20) == any(thing.startswith(colour) for thing in things)


def test_train_and_test_share_no_picture(tmp_path):
    quick.write_pictures(tmp_path, train=30, test=20, seed=0)
    train, test = (read_jsonl(tmp_path / f"{split}.jsonl") for split in quick.SPLITS)
    pixels = {s.images[0]: np.asarray(Image.open(s.images[0])).tobytes() for s in [*train, *test]}
    assert len(train) == 30 * quick.CAPTIONS and len(test) == 20
    assert len(set(pixels.values())) == len(pixels) == 50
    assert all(quick.reward([s.answer], [s]) == [1] for s in test)


def test_the_constant_answer_is_the_best_of_its_length():
    """By trying all answers of one thing and of two."""
    rng = np.random.default_rng(1)
    train = []
    for number in range(60):
        things = [str(thing) for thing in rng.choice(quick.KINDS[:4], 2, replace=False)]
        train.append(replace(sample(*things), image=str(number)))

    def worth(text):
        return np.mean(quick.reward([text] * len(train), train))

    best = worth(quick.constant_answer(train))
    pairs = [f"{a}, {b}" for a in quick.KINDS[:4] for b in quick.KINDS[:4] if a != b]
    assert best >= max(map(worth, quick.KINDS)) and best >= max(map(worth, pairs)) - 0.02


def test_measure_is_paired():
    test = [sample("red ball", "blue fish")] * 6
    poor, good = ["red ball"] * 6, ["red ball, blue fish"] * 6
    answers = {
        name: {"greedy": texts, "sampled": [t for t in texts for _ in range(quick.SAMPLES)]}
        for name, texts in {"sft": poor, "further_sft": poor, "grpo": good}.items()
    }
    results = quick.measure(answers, test, test)
    for how in ("sampled", "greedy"):
        figures = results[how]
        assert figures["before"]["mean"] == 0.5 and figures["after"]["mean"] == 1
        for name in ("gain", "gain_over_further_sft"):
            assert [figures[name][key] for key in ("mean", "low", "high")] == [0.5] * 3


def test_a_small_run(tmp_path):
    out = tmp_path / "quick"
    said = python(
        "-m",
        "minigrpo.quick",
        "--output_dir",
        out,
        "--train",
        16,
        "--test",
        6,
        "--sft_steps",
        2,
        "--grpo_steps",
        1,
    )
    results = json.loads((out / "results.json").read_text())
    for how in ("sampled", "greedy"):
        for name in ("before", "after", "gain"):
            assert {"mean", "low", "high"} <= set(results[how][name])
    assert results["seconds"]["total"] > 0 and "gain of GRPO (paired)" in said
    assert Image.open(out / "quick.png").size[0] > 1000
    before = (out / "results.json").read_bytes()
    assert "exists already" in python("-m", "minigrpo.quick", "--output_dir", out, code=1)
    assert (out / "results.json").read_bytes() == before
