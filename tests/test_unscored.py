"""Answers that the reward could not score: they teach nothing, no validation without scores is the
best, no phase outlasts the others."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from minigrpo import grpo
from minigrpo.generate import Rollout
from minigrpo.rewards import BadReward, Scores
from minigrpo.run import guard, loop, node
from minigrpo.run.distributed import PATIENCE
from minigrpo.run.guard import in_time
from train_grpo import GrpoArguments

MINE = "tests.test_unscored"


@pytest.fixture(scope="module")
def model(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy.save_pretrained(folder)
    return folder


@pytest.fixture
def train(model, phantom, tmp_path, monkeypatch):
    """train(reward, *arguments) runs the program in this process and returns its folder."""

    def run(reward, *arguments, folder=None, steps=1):
        folder = folder or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        words = [
            "--model",
            model,
            "--task",
            "report",
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            folder,
            "--max_steps",
            steps,
            "--reward",
            f"{MINE}:{reward}",
            "--prompts_per_step",
            2,
            "--group_size",
            4,
            "--updates_per_rollout",
            1,
            "--max_new_tokens",
            8,
            "--learning_rate",
            1e-3,
            "--max_unscored",
            1,
            *arguments,
        ]
        monkeypatch.setattr("sys.argv", ["train_grpo.py", *map(str, words)])
        monkeypatch.setattr(loop, "draw_curves", lambda folder: None)  # takes its time
        train_grpo.main()
        return folder

    return run


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ---- what they teach -----------------------------------------------------------------------------


def letters(answers, samples):
    return [len(set(answer)) / 7 for answer in answers]


def every_fourth_missing(answers, samples):
    return [None if n % 4 == 1 else value for n, value in enumerate(letters(answers, samples))]


def nothing(answers, samples):
    return [None] * len(answers)


@pytest.mark.parametrize(
    "settings",
    [
        ["--aggregation", "token-mean"],
        ["--aggregation", "constant", "--advantage_scale", "none"],
        pytest.param(["--aggregation", "sequence-mean"], marks=pytest.mark.slow),
        pytest.param(
            ["--advantage_scale", "batch", "--leave_one_out", "true"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--ratio_level", "sequence", "--aggregation", "sequence-mean"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_gradient_is_that_of_a_batch_without_them(train, monkeypatch, settings):
    """Bug: they stayed in the count of tokens and in the KL, which pulled every token of them back
    to the reference. k1 with the ratio, since k3 has no gradient where policy and reference are
    one."""
    generate, clip, sampled, gradients = grpo.generate, node.clip_gradients, [], []

    def sampling(*args, **more):
        sampled.append(generate(*args, **more))
        return sampled[0]

    def without(policy, prompts, **more):
        r = sampled[0]
        kept = torch.tensor([n % 4 != 1 for n in range(len(r.texts))])
        return Rollout(
            r.tokens[kept],
            r.mask[kept],
            r.logprob[kept],
            r.finished[kept],
            [text for n, text in enumerate(r.texts) if n % 4 != 1],
            r.row_steps,
            r.bytes_read,
        )

    def keeping(parameters, *rest):
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(parameters, *rest)

    monkeypatch.setattr(node, "clip_gradients", keeping)
    settings = ["--kl_coef", 0.5, "--kl_estimator", "k1", "--kl_ratio", "true", *settings]
    monkeypatch.setattr(grpo, "generate", sampling)
    (row,) = rows(train("every_fourth_missing", *settings))
    monkeypatch.setattr(grpo, "generate", without)
    (other,) = rows(train("letters", *settings, "--group_size", 3))
    assert row["unscored"] == 0.25 and other["unscored"] == 0 and row["grad_norm"] > 1e-3
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for name in ("loss", "kl", "entropy", "grad_norm", "reward", "reward_std_in_group"):
        assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_a_step_without_any_score_changes_no_weight(train, model):
    """Bug: AdamW decayed the weights, and moved them by momentum, on updates that taught nothing.
    No figure is made up either."""
    folder = train("nothing", steps=2)
    before = load_file(model / "model.safetensors")
    after = load_file(folder / "final/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for row in rows(folder):
        assert (
            row["unscored"] == 1 and not {"reward", "loss", f"reward_{MINE}:nothing"} & row.keys()
        )
    assert {
        answer["reward"]
        for row in rows(folder, "rollouts")
        for group in row["groups"]
        for answer in group["answers"]
    } == {None}


# ---- validation ----------------------------------------------------------------------------------


def is_validation(samples):
    return samples[0].id.startswith("phantom-test")


def worse_each_time(answers, samples, calls=[]):
    """In validation -1 to all answers at first, later nothing; then NaN, or a score to one answer
    of many."""
    if not is_validation(samples):
        return letters(answers, samples)
    calls.append(1)
    if len(calls) == 1:
        return [-1.0] * len(answers)
    return [
        [None] * len(answers),
        [float("nan")] * len(answers),
        [9.0] + [None] * (len(answers) - 1),
    ][(len(calls) - 2) % 3]


def test_a_validation_without_scores_has_no_value_and_is_no_best(train, phantom, capsys):
    """Bug: its value was 0.0, better than any negative reward: best/ was replaced by whatever was
    there. One answer of many does not speak for all of them either."""
    folder = train(
        "worse_each_time",
        "--eval_data",
        phantom / "test.jsonl",
        "--eval_steps",
        1,
        "--max_unscored",
        0.5,
        steps=4,
    )
    assert [row.get("eval_reward") for row in rows(folder)] == [-1.0, None, None, None]
    assert [path.name for path in (folder / "best").iterdir()] == ["step-000001"]
    assert capsys.readouterr().err.count(": this validation is left out") == 3


def dict_in_validation(answers, samples):
    return dict.fromkeys(answers, 1.0) if is_validation(samples) else letters(answers, samples)


# ---- rewards that return, or do, what they should not --------------------------------------------


def a_dict(answers, samples):
    return dict(enumerate(answers))


def too_few(answers, samples):
    return [1.0]


@pytest.mark.parametrize(
    "reward, said",
    [
        ("a_dict", "gave dict"),
        ("too_few", "gave 1 values for 8 answers"),
        ("dict_in_validation", "gave dict"),
    ],
)
def test_a_reward_of_wrong_shape_ends_with_a_message(train, phantom, reward, said):
    """Bug: the right last line, under a traceback."""
    with pytest.raises(SystemExit) as ended:
        train(reward, "--eval_data", phantom / "test.jsonl", "--eval_steps", 1)
    told = str(ended.value)
    assert told.startswith(f"train_grpo.py: error: reward '{MINE}:{reward}' {said}")
    assert ": return " in told


def leaves(answers, samples):
    sys.exit(0)


def test_a_reward_that_exits_ends_with_its_name(train):
    """Bug: exit code 0, and no final/."""
    with pytest.raises(SystemExit) as ended:
        train("leaves", "--max_unscored", 0.1)
    told = f"the reward could not score 8 of 8 answers: {MINE}:leaves: SystemExit: 0"
    assert told in str(ended.value)


def wanders(answers, samples):
    Path("away").mkdir(exist_ok=True)
    os.chdir("away")
    return letters(answers, samples)


def test_a_reward_that_wanders_takes_no_file_along(train, phantom, tmp_path, monkeypatch):
    """Bug: the rest of a run whose --output_dir and --train_data are relative was looked for, and
    written, from where the reward was."""
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning,
        match=f"reward '{MINE}:wanders' changed the working directory from .*away: it has "
        "been restored",
    ):
        train(
            "wanders",
            "--train_data",
            os.path.relpath(phantom / "train.jsonl"),
            folder=Path("here"),
            steps=2,
        )
    assert (tmp_path / "here/final/model.safetensors").is_file()
    assert len(rows(tmp_path / "here")) == 2
    assert not any((tmp_path / "away").iterdir())


def writes_on_samples(answers, samples):
    scores = letters(answers, samples)
    for sample in samples:
        sample.question, sample.answer, sample.boxes = "overwritten", "overwritten", [[0, 0, 1, 1]]
    answers.clear()
    return scores


def changes_torch(answers, samples):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return letters(answers, samples)


def test_a_reward_can_change_neither_samples_nor_torch(train, tmp_path):
    """Bug: rollouts.jsonl held what the reward had written into the samples; with another default
    dtype the next step was a traceback."""
    train("letters", folder=tmp_path / "plain", steps=2)
    train("writes_on_samples", folder=tmp_path / "writes", steps=2)
    with pytest.warns(UserWarning, match="changed torch's default dtype from torch.float32 to"):
        train("changes_torch", folder=tmp_path / "torch", steps=2)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    for other in ("writes", "torch"):
        files = [tmp_path / run / "rollouts.jsonl" for run in ("plain", other)]
        # parts are named by the reward
        assert files[0].read_text() == files[1].read_text().replace(
            {"writes": "writes_on_samples", "torch": "changes_torch"}[other], "letters"
        )


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Odd(float):
    def __float__(self):
        raise Mute


def raises_mute(answers, samples):
    raise Mute


def gives_odd(answers, samples):
    return [Odd(1.0)] * len(answers)


@pytest.mark.parametrize(
    "reward, said",
    [
        ("raises_mute", "could not score 8 of 8 answers: {}:raises_mute: Mute: Mute without text"),
        ("gives_odd", "reward '{}:gives_odd' gave list that cannot be read (Mute: Mute without"),
    ],
)
def test_an_exception_without_a_text_is_named(train, capsys, reward, said):
    """Bug: a traceback of the exception's own __str__."""
    with pytest.raises(SystemExit) as ended:
        train(reward, "--max_unscored", 0.1)
    assert said.format(MINE) in str(ended.value) + capsys.readouterr().err


# ---- deadlines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 8, 64, 4096])
def test_a_phase_has_one_budget_below_the_others_patience(monkeypatch, samples, groups):
    """Bug: (1 + groups) x --reward_timeout: with 64 groups a hanging reward took 11 hours, and
    after half an hour the other ranks gave this one up for dead. With the real constants."""
    given, clock = [], [0.0]

    def hangs(seconds, work, *more):
        given.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(guard, "_within", hangs)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for seconds in (
        GrpoArguments.reward_timeout,
        getattr(guard, "LONGEST_TIMEOUT", GrpoArguments.reward_timeout),
    ):
        given.clear()
        found = in_time(None, ["a"] * 2 * groups, [samples[0]] * 2 * groups, 2, seconds)
        assert not any(found.valid) and len(found.valid) == 2 * groups
        assert sum(given) == pytest.approx(2 * seconds)
        assert sum(given) <= 0.76 * PATIENCE.total_seconds()


def test_time_that_some_groups_leave_is_the_others(samples):
    """Of 10 groups one hangs and one is slow: the slow one has the time that the quick ones before
    it did not take."""
    answers, given = [str(n) for n in range(10)], samples[:10]

    def reward(answers, asked):
        hangs, slow = len(asked) > 1 or asked[0] is given[1], asked[0] is given[8]
        time.sleep(30 if hangs else 0.15 if slow else 0)
        return Scores([1.0], [True])

    began = time.time()
    found = in_time(reward, answers, given, 1, 0.5)
    assert found.valid == [n != 1 for n in range(10)] and time.time() - began < 3


def test_a_timeout_that_the_others_would_not_wait_for(monkeypatch):
    guard.check_timeout(float("inf"))  # alone, nobody waits
    monkeypatch.setattr(guard, "ranks", lambda: 2)
    guard.check_timeout(GrpoArguments.reward_timeout)
    for seconds in (676, float("inf")):
        with pytest.raises(
            ValueError,
            match=r"--reward_timeout (676|inf) with 2 processes: .* after 30 "
            r"minutes .* give at most 675 seconds",
        ):
            guard.check_timeout(seconds)


def test_a_problem_of_one_rank_ends_all(monkeypatch, capsys):
    """The message comes from the first rank, whoever had the problem; the others leave with a code,
    and nobody waits."""

    def wrong():
        raise BadReward("reward 'mine' gave nonsense")

    fine = Scores([1.0], [True])
    for work, theirs in (
        (wrong, ([True], [], None)),
        (lambda: fine, (None, None, "reward 'mine' gave nonsense")),
    ):
        for first, code in ((True, "error: reward 'mine' gave nonsense"), (False, 1)):
            monkeypatch.setattr(guard, "gathered", lambda mine: [mine, theirs])
            monkeypatch.setattr(guard, "first", lambda: first)
            with pytest.raises(SystemExit) as ended:
                guard.agreed_scores(work, 1.0, 0)
            assert ended.value.code == code or str(code) in str(ended.value.code)
