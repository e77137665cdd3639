"""The switch, what supervised training says of a trace, and what is logged of thinking."""

import json
from dataclasses import replace

import pytest
import torch

from minigrpo.data import Sample, ask_to_think, asks_to_think, split_thinking, with_traces
from minigrpo.data.join import join, parse_file
from minigrpo.generate import Rollout
from minigrpo.metrics import evaluate_answers
from minigrpo.metrics.items import score_item
from minigrpo.rewards import reward_fn
from minigrpo.run.evaluation import read_answers, write_predictions
from minigrpo.run.groups import Groups
from minigrpo.run.log import rollout_stats

PLAIN = Sample("a", None, "report", "What does this show?", "The lungs are clear.")


def test_the_switch_is_put_once():
    once = ask_to_think([PLAIN])
    assert once[0].question == "What does this show? /think" and ask_to_think(once) == once
    assert asks_to_think(once[0].question + "\n") and not asks_to_think(PLAIN.question)


def test_a_sample_with_a_trace_is_asked_to_think_and_reads_back():
    spoken, direct = with_traces([replace(PLAIN, thinking=" both sides alike "), PLAIN])
    assert direct == PLAIN and asks_to_think(spoken.question)
    assert split_thinking(spoken.answer) == ("both sides alike", PLAIN.answer, True)


def test_supervised_training_covers_trace_and_answer(policy, samples):
    """The trace used to be read from the file and never trained on."""
    report = next(s for s in samples if s.task == "report")
    spoken = with_traces([replace(report, thinking="airways: airway free.")])[0]
    _, blocks = policy.encode_turns([[spoken]])
    tokens, mask, _ = blocks[0]
    learned = policy.tokenizer.decode(tokens[0][mask[0]])
    asked = policy.tokenizer.decode(tokens[0][~mask[0]])
    assert (
        learned.startswith("<think>\nairways: airway free.\n</think>\n\n" + report.answer)
        and "/think" in asked
    )


def test_both_ways_of_one_sample_share_its_image(policy, samples):
    both = with_traces([samples[0], replace(samples[0], id="t", thinking="looked.")])
    prompts, blocks = policy.encode_turns([both])
    assert len(prompts.ids) == 1 and len(blocks) == 2


BROKEN = [
    "<think>never closed. The lungs are clear.",
    "<think>a</think>b<think>c</think>The lungs are clear.",
    "The lungs are clear.</think>",
]


@pytest.mark.parametrize("answer", BROKEN)
def test_a_broken_block_scores_the_floor_in_reward_and_metric(answer):
    sample = ask_to_think([PLAIN])[0]
    item = score_item(sample, answer)
    assert (
        reward_fn("gleu")([answer], [sample]).values == [0.0]
        and item["gleu"] == 0.0
        and item["think_format"] == 0.0
    )


def groups(texts, samples):
    rows = len(texts)
    ones = torch.ones(rows, 3)
    rollout = Rollout(
        ones.long(), ones.bool(), ones, torch.tensor([True] * (rows - 1) + [False]), texts, 0, 0
    )
    shape = len(samples), rows // len(samples)
    return Groups(
        samples, rollout, torch.zeros(shape), torch.ones(shape).bool(), {}, [1] * len(samples)
    )


def test_thinking_and_answer_are_logged_apart():
    texts = [
        "<think>one two three</think>The lungs are clear.",
        "<think>cut off in the middle of it",
    ]
    stats = rollout_stats(groups(texts, ask_to_think([PLAIN])))
    assert stats["think_format"] == 0.5 and stats["cut_off"] == 0.5
    assert stats["thinking_words"] == (3 + 7) / 2 and stats["answer_words"] == 2.0
    assert "think_format" not in rollout_stats(groups(texts, [PLAIN]))
    template_opens_think = rollout_stats(
        groups(["one two</think>Clear.", "never closed"], [PLAIN]), template_opens_think=True
    )
    assert (
        template_opens_think["think_format"] == 0.5
        and template_opens_think["thinking_words"] == 2.0
    )


def test_what_the_budget_cut_shows_in_the_evaluation(tmp_path):
    """A cut answer used to look like any other bad one."""
    samples = [PLAIN, replace(PLAIN, id="b")]
    results = evaluate_answers(
        samples, ["The lungs", "The lungs are clear."], cut_off=[True, False]
    )
    assert results["report"]["cut_off"]["mean"] == 0.5
    write_predictions(
        tmp_path / "predictions.jsonl", samples, ["x", "y"], [True, False], results["items"]
    )
    assert read_answers(str(tmp_path), samples, "--predictions")[:2] == (["x", "y"], [True, False])
    write_predictions(tmp_path / "predictions.jsonl", samples, ["x", "y"], None)
    assert read_answers(str(tmp_path), samples, "--predictions")[1] is None


def test_files_are_joined_repeated_and_find_their_images(phantom, tmp_path):
    first = phantom / "train.jsonl"
    joined = join(
        [parse_file(f"{first}=2"), parse_file(str(phantom / "test.jsonl"))],
        tmp_path / "deep/all.jsonl",
    )
    lines = len(first.read_text().splitlines())
    assert len(joined) == 2 * lines + len((phantom / "test.jsonl").read_text().splitlines())
    assert len({record["id"] for record in joined}) == len(joined)
    assert (tmp_path / "deep" / joined[0]["image"]).resolve().is_file()
    with pytest.raises(ValueError, match="is in .* and in"):
        (tmp_path / "copy.jsonl").write_text(
            json.dumps(json.loads(first.read_text().splitlines()[0]) | {"image": None}) + "\n"
        )
        join([(first, 1), (tmp_path / "copy.jsonl", 1)], tmp_path / "all.jsonl")
    for wrong in ("a.jsonl=0", "a.jsonl=many"):
        with pytest.raises(ValueError, match="how often"):
            parse_file(wrong)
