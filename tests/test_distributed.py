"""The programs on 1, 2 and 4 ranks, real processes over gloo, in float64: one run, however many
there are; and ranks that die.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.run.distributed import balance_over_ranks
from minigrpo.run.folder import checkpoints
from tests.processes import finish, free_port, run, start

ROOT = Path(__file__).parent.parent
# The clock's, the machine's; and how prompts are padded and rows decoded depends on the ranks.
COUNTED_BY_TIME = ("second", "memory", "padding", "row_steps")


def letters(answers, samples, calls=[]):
    """Half of the groups have no spread, so that --dynamic_sampling replaces them; some answers
    have no score. With DIE, rank 1 is killed at its fourth call, in step 1 or 2: `reward_fn` tries
    a reward out, and a step asks once or twice."""
    calls.append(1)
    if os.environ.get("DIE") and os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), 9)

    def score(answer, sample):
        if len(answer) % 3 == 2 and "train" in sample.id:
            return None
        return 0.25 if int(sample.id.split("-")[2]) % 2 else len(set(answer)) / 7

    return list(map(score, answers, samples))


def hangs_on_one_rank(answers, samples):
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return letters(answers, samples)


def exactly(rank, gradients=None, die=""):
    """Everything in float64; the first rank writes the gradients of every update to a file."""
    import transformers

    os.environ["DIE"] = die
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    load, clip, seen = (
        transformers.Qwen3VLForConditionalGeneration.from_pretrained,
        torch.nn.utils.clip_grad_norm_,
        [],
    )
    import minigrpo.policy

    minigrpo.policy.Qwen3VLForConditionalGeneration.from_pretrained = lambda *a, **more: load(
        *a, **more | {"dtype": torch.float64}
    )

    def keeping(parameters, *rest):
        if gradients and rank == 0:
            seen.append([p.grad.clone() for p in parameters if p.grad is not None])
            torch.save(seen, gradients)
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = keeping


@pytest.fixture(scope="module")
def place(policy, phantom, tmp_path_factory):
    """A folder with the model, and the arguments of a run there: place(program, name, *more)."""
    folder = tmp_path_factory.mktemp("ranks")
    policy.save_pretrained(folder / "model")

    def arguments(program, name, *more, steps=2):
        words = [
            "--model",
            folder / "model",
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            folder / name,
            "--max_steps",
            steps,
            "--eval_data",
            phantom / "test.jsonl",
            "--eval_steps",
            2,
            "--learning_rate",
            1e-3,
            *more,
        ]
        if program == "train_sft":
            return [*words, "--batch_size", 5, "--task_weights", "report=2", "--optimizer", "muon"]
        return [
            *words,
            "--reward",
            "tests.test_distributed:letters",
            "--prompts_per_step",
            4,
            "--group_size",
            3,
            "--max_new_tokens",
            8,
            "--updates_per_rollout",
            2,
            "--advantage_scale",
            "batch",
            "--dynamic_sampling",
            1,
            "--rollout_cap",
            2,
            "--max_unscored",
            1,
        ]

    arguments.folder = folder
    return arguments


@pytest.fixture(scope="module")
def runs(place):
    """(program, ranks) -> its folder; each run is made once."""
    made = {}

    def run_of(program, ranks):
        if (program, ranks) not in made:
            name = f"{program}-{ranks}"
            run(
                program,
                place(program, name),
                place.folder / f"{name}.log",
                ranks=ranks,
                prepare=partial(exactly, gradients=place.folder / f"{name}.gradients"),
            )
            made[program, ranks] = place.folder / name
        return made[program, ranks]

    return run_of


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(word in key for word in COUNTED_BY_TIME):
                assert a[key] == pytest.approx(b[key], rel=1e-8, abs=1e-8), key
    a, b = load_file(one / "final/model.safetensors"), load_file(other / "final/model.safetensors")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-8) for k in a)
    assert (
        {p.name for p in (one / "best").iterdir()}
        == {p.name for p in (other / "best").iterdir()}
        == {"step-000002"}
    )


@pytest.mark.parametrize(
    "program, ranks",
    [
        ("train_sft", 2),
        ("train_grpo", 4),
        pytest.param("train_sft", 4, marks=pytest.mark.slow),
        pytest.param("train_grpo", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_are_one_run(runs, program, ranks):
    """Loss, gradients and every figure of one process, for any number; with 4 ranks and 2 prompts
    an update some have none.
    """
    one, many = runs(program, 1), runs(program, ranks)
    gradients = [torch.load(f"{folder}.gradients") for folder in (one, many)]
    assert max(g.abs().max() for update in gradients[0] for g in update) > 1e-2
    for update, same in zip(*gradients, strict=True):
        for a, b in zip(update, same, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert_same_run(one, many)
    if program == "train_grpo":
        for a, b in zip(rows(one, "rollouts"), rows(many, "rollouts"), strict=True):

            def text(step):
                return [
                    [g["id"], [(x["text"], x["reward"]) for x in g["answers"]]]
                    for g in step["groups"]
                ]

            assert text(a) == text(b)
        row = rows(one)[0]
        assert row["groups_replaced"] > 0 and row["reward_std_in_group"] > 0
        assert max(row["unscored"] for row in rows(one)) > 0


def test_a_rank_that_dies_ends_the_run_which_resumes_on_another_number(runs, place):
    """Bug to guard against: the other ranks wait for ever in a collective. They end with a message,
    and the checkpoint is whole.
    """
    settings = place("train_grpo", "killed", "--save_steps", 1)
    began = time.time()
    codes = finish(
        start(
            "train_grpo",
            settings,
            place.folder / "killed.log",
            ranks=4,
            prepare=partial(exactly, die="yes"),
        )
    )
    assert codes[1] == -9 and codes[0] == codes[2] == codes[3] == 1 and time.time() - began < 60
    said = (place.folder / "killed.log-0").read_text()
    assert "another rank has died" in said and "step-000001" in said
    assert "resuming from" in run(
        "train_grpo",
        [*settings, "--resume"],
        place.folder / "resumed.log",
        ranks=2,
        prepare=exactly,
    )
    assert_same_run(place.folder / "killed", runs("train_grpo", 1))


def test_a_reward_that_hangs_on_one_rank_masks_its_answers(place):
    """The run goes on, and ends well, with half of the answers; the patience is the real one, the
    timeout small (`test_a_phase_has_one_budget_below_the_others_patience` has the real one)."""
    words = [
        *place("train_grpo", "hangs", "--reward_timeout", 0.2),
        "--reward",
        "tests.test_distributed:hangs_on_one_rank",
        "--dynamic_sampling",
        0,
    ]
    run("train_grpo", words, place.folder / "hangs.log", ranks=2)
    unscored = [row["unscored"] for row in rows(place.folder / "hangs")]
    assert len(unscored) == 2 and 0.5 <= min(unscored) <= max(unscored) < 1
    assert "no reward in time for the answers to" in (place.folder / "hangs.log-1").read_text()
    assert (place.folder / "hangs/final").is_dir()


@pytest.mark.slow
def test_evaluation_on_two_ranks(place, phantom):
    for ranks in (1, 2):
        run(
            "evaluate",
            [
                "--model",
                place.folder / "model",
                "--data",
                phantom / "test.jsonl",
                "--output_dir",
                place.folder / f"e{ranks}",
                "--batch_size",
                3,
                "--max_new_tokens",
                6,
                "--report_items",
                0,
            ],
            place.folder / f"e{ranks}.log",
            ranks=ranks,
        )
    one, two = ((place.folder / f"e{ranks}/predictions.jsonl").read_text() for ranks in (1, 2))
    assert one == two and len(one.splitlines()) > 3


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_dealing_is_whole_and_even(ranks, monkeypatch):
    """Every thing once, in its own part, and no rank has more than the largest thing above
    another.
    """
    costs = [5, 90, 3, 44, 44, 1, 7, 60, 2, 2, 80, 9]
    monkeypatch.setattr("minigrpo.run.distributed.ranks", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("minigrpo.run.distributed.rank", lambda: rank)
        mine, spans = balance_over_ranks(costs, 6)
        assert [i for span in spans for i in span] == list(range(len(mine)))
        assert all(mine[i] // 6 == part for part, span in enumerate(spans) for i in span)
        shares.append([[mine[i] for i in span] for span in spans])
    for part in range(2):
        assert sorted(i for share in shares for i in share[part]) == list(
            range(6 * part, 6 * part + 6)
        )
        loads = [sum(costs[i] for i in share[part]) for share in shares]
        assert max(loads) - min(loads) <= max(costs[6 * part : 6 * part + 6])
    assert all(sum(share, []) for share in shares)


def test_bad_input_is_said_once(place):
    words = place("train_grpo", "bad")
    words[words.index("--train_data") + 1] = Path("/nowhere.jsonl")
    codes = finish(start("train_grpo", words, place.folder / "bad.log", ranks=2), 20)
    said = [(place.folder / f"bad.log-{rank}").read_text() for rank in range(2)]
    assert (
        codes == [1, 1]
        and "/nowhere.jsonl: no such file" in said[0]
        and not any("Traceback" in text for text in said)
    )


def torchrun(words, log, die=""):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--shutdown-timeout",
        "60",
        "train_grpo.py",
    ]
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=ROOT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "DIE": die, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["a rank is killed", "SIGTERM"])
def test_under_torchrun_itself(place, end):
    """A rank that is killed, or a cluster's warning: the job ends by itself, and --resume finishes
    it.
    """
    name = end.split()[0]
    words, log = place("train_grpo", name, "--save_steps", 1, steps=4), place.folder / f"{name}.txt"
    job = torchrun(words, log, die="yes" if name == "a" else "")
    rows_file = place.folder / name / "metrics.jsonl"
    while (
        name == "SIGTERM"
        and job.poll() is None
        and not (rows_file.exists() and rows_file.read_text())
    ):
        time.sleep(0.05)
    if name == "SIGTERM":
        job.terminate()
    assert (
        job.wait(400) != 0
        and "Traceback"
        not in log.read_text().split("ChildFailedError")[0].split("torch/distributed")[0]
    )
    assert checkpoints(place.folder / name), log.read_text()
    assert torchrun([*words, "--resume"], log).wait(400) == 0, log.read_text()
    assert "resuming from" in log.read_text() and len(rows(place.folder / name)) == 4


@pytest.mark.slow
def test_a_rank_that_is_done_first_ends_well():
    """Bug: every third time, gloo's threads aborted (code 134) a rank that had ended while another
    still drew its curves.
    """
    program = (
        "import time, torch; from minigrpo.run.distributed import join, gathered, rank,"
        " total\njoin('cpu')\nfor i in range(20): gathered(i); total(torch.ones(1000))\nif rank()"
        " == 0: time.sleep(0.5)"
    )
    for _ in range(8):
        where = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        both = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in "01"
        ]
        assert [process.wait(60) for process in both] == [0, 0]
