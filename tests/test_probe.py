"""minigrpo probe: what the greedy answer, a group and the best of a group earn."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minigrpo.data import read_jsonl
from minigrpo.generate import generate
from minigrpo.probe import chosen_samples, figures_of, markdown, probe, summarise
from minigrpo.rewards import reward_fn
from minigrpo.run.arguments import ProbeArguments
from tests.processes import python


def item(greedy, *sampled, task="report", kind=None):
    return {"id": "a", "task": task, "kind": kind, "greedy": greedy, "sampled": [*sampled]}


def test_figures_of_one_question():
    assert figures_of(item(0.5, 0.2, 0.4, 0.9)) == {
        "greedy": 0.5,
        "sampled": pytest.approx(0.5),
        "best": 0.9,
        "no_spread": 0.0,
    }
    assert figures_of(item(0.5, 0.3, 0.3, None))["no_spread"] == 1.0
    assert figures_of(item(0.5, 0.3, 0.6, None))["sampled"] == pytest.approx(0.45)
    nothing = figures_of(item(None, None, None))
    assert np.isnan([nothing[name] for name in ("greedy", "sampled", "best")]).all()
    assert nothing["no_spread"] == 1.0


def test_summary_by_task_and_kind():
    items = [
        item(1.0, 0.0, 1.0, task="grounding", kind="anatomy"),
        item(0.0, 0.0, 0.0, task="grounding", kind="phrase"),
        item(0.5, 0.5, 0.7),
        item(None, None, 0.9),
    ]
    results = summarise(items)
    assert list(results) == ["grounding", "report"]
    assert list(results["grounding"]) == ["all", "anatomy", "phrase"] and list(
        results["report"]
    ) == ["all"]
    assert results["grounding"]["all"]["sampled"]["mean"] == pytest.approx(0.25)
    assert results["grounding"]["all"]["no_spread"]["mean"] == pytest.approx(0.5)
    assert results["grounding"]["anatomy"]["best"]["mean"] == 1.0
    # the question whose greedy answer could not be scored counts for the others
    assert results["report"]["all"]["greedy"]["n"] == 1
    assert results["report"]["all"]["best"]["mean"] == pytest.approx(0.8)
    table = markdown(
        {"reward": "gleu", "model": "m", "temperature": 1.0, "group_size": 2, "tasks": results}
    )
    assert "| grounding | phrase | 1 |" in table and "best of 2" in table


@pytest.fixture
def args(phantom):
    return ProbeArguments(
        "m", str(phantom / "test.jsonl"), samples=3, group_size=2, max_new_tokens=5
    )


def test_samples_are_spread_over_the_file_and_of_the_reward_s_tasks(args):
    everything = read_jsonl(args.data)
    chosen = chosen_samples(args, reward_fn(args.reward))
    assert [s.task for s in chosen] == ["grounding"] * 3 + ["report"] * 3
    grounding = [s.id for s in everything if s.task == "grounding"]
    thirds = [grounding[k * len(grounding) // 3] for k in range(3)]
    assert [s.id for s in chosen[:3]] == thirds and len(set(thirds)) == 3
    assert {s.task for s in chosen_samples(args, reward_fn("gleu"))} == {"report"}
    assert len(chosen_samples(replace(args, samples=0), reward_fn(args.reward))) == len(everything)
    with pytest.raises(ValueError, match="covers grounding, .* no such sample with --task report"):
        chosen_samples(replace(args, task="report"), reward_fn("soft_f1"))


def test_the_figures_are_those_of_generate_and_the_reward(policy, args):
    """And a question's answers depend on its line and the seed alone."""
    reward = reward_fn("length")
    samples = chosen_samples(args, reward)
    items, errors = probe(policy, samples, reward, args)
    assert not errors and [i["id"] for i in items] == [s.id for s in samples]
    second = samples[1]
    alone = generate(
        policy,
        policy.encode([second]).numbered([second.line]),
        group_size=2,
        max_new_tokens=5,
        seed=0,
    ).texts
    assert items[1]["sampled"] == reward(alone, [second] * 2).values
    few = replace(args, rollout_rows=2)
    assert probe(policy, samples[1:2], reward, few)[0] == items[1:2]


def test_a_reward_that_fails_is_said_and_leaves_none(policy, args):
    def broken(answers, samples):
        raise RuntimeError("out of order")

    reward = reward_fn("length")
    reward.terms["report"] = [(1.0, "broken", broken)]
    items, errors = probe(policy, chosen_samples(args, reward)[:1], reward, args)
    assert items[0]["greedy"] is None and items[0]["sampled"] == [None, None]
    assert any("out of order" in error for error in errors)


def test_the_program(trained, phantom, tmp_path, capsys):
    output = tmp_path / "new/probe.json"
    words = ["-m", "minigrpo.probe", "--model", trained / "sft/final", "--data"]
    words += [phantom / "test.jsonl", "--samples", 2, "--group_size", 2, "--max_new_tokens", 8]
    printed = python(*words, "--output_file", output)
    results = json.loads(output.read_text())
    assert {len(i["sampled"]) for i in results["items"]} == {2} and len(results["items"]) == 4
    assert markdown(results) in printed
    again = python(*words, "--output_file", output, code=1)
    assert f"{output} exists already: give another --output_file" in again


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(group_size=1), "--group_size must be at least 2"),
        (dict(samples=-1), "--samples must not be negative"),
        (dict(temperature=0.0), "--temperature must be above 0"),
        (dict(seed=2**50), "--seed .* is too large"),
        (dict(max_new_tokens=0), "--max_new_tokens"),
    ],
)
def test_bad_arguments(changes, message, args):
    with pytest.raises(ValueError, match=message):
        replace(args, **changes).check()
