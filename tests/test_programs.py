"""The three programs as a user runs them: small runs, resume, and bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.data import Sample
from minigrpo.run.files import lock
from minigrpo.run.optimizers import sft_optimizers
from minigrpo.tiny import tiny_policy
from tests.processes import finish, grpo, sft, start
from tests.processes import python as run
from train_sft import SftArguments

ROOT = Path(__file__).parent.parent


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_folders_hold_what_they_promise(trained):
    for name, steps in (("sft", 4), ("grpo", 3)):
        assert {p.name for p in (trained / name).iterdir()} >= {
            "args.json",
            "metrics.jsonl",
            "curves.png",
            "final",
        }
        assert [row["step"] for row in rows(trained / name)] == list(range(steps))
    logged = set().union(*rows(trained / "grpo"))  # a step without reports has no reward_gleu
    assert logged >= {
        "reward",
        "reward_gleu",
        "reward_soft_f1",
        "reward_std_in_group",
        "groups_without_spread",
        "kl",
        "entropy",
        "clip_high",
        "clip_low",
        "clip_dual",
        "ratio_deviation",
        "answer_tokens",
        "cut_off",
        "grad_norm",
        "tokens_per_second",
        "seconds_rollout",
        "seconds_reward",
        "seconds_reference",
        "seconds_update",
    }
    groups = json.loads((trained / "grpo/rollouts.jsonl").read_text().splitlines()[0])["groups"]
    assert len(groups[0]["answers"]) == 4 and {"text", "reward", "advantage"} <= set(
        groups[0]["answers"][0]
    )


def documented(program, options=True):
    """Names in the first column of the program's table in docs/metrics.md; or without the rows that
    say `only with`.
    """
    section = (ROOT / "docs/metrics.md").read_text().split(f"\n## `{program}`")[1].split("\n## ")[0]
    cells = [
        row.split("|")[1]
        for row in re.findall(r"^\| `.*", section, re.M)
        if options or "only with" not in row
    ]
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


def test_the_glossary_is_complete_and_not_stale(trained):
    for name in ("sft", "grpo"):
        assert set().union(*rows(trained / name)) == documented(f"train_{name}.py", options=False)


def test_first_update_is_on_policy(trained):
    """The sampler's log-probs are the old ones: the ratio is 1 on the first update of a rollout,
    and not on the later ones.
    """
    args = json.loads((trained / "grpo/args.json").read_text())
    assert args["updates_per_rollout"] == 4
    assert 1e-3 < rows(trained / "grpo")[0]["ratio_deviation"] < 0.2


def test_evaluation_and_paired_comparison(trained, phantom):
    run(
        "evaluate.py",
        "--model",
        "constant",
        "--train_data",
        phantom / "train.jsonl",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        trained / "constant",
    )
    run(
        "evaluate.py",
        "--model",
        trained / "grpo/final",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        trained / "evaluated",
        "--baseline",
        trained / "constant",
        "--max_new_tokens",
        16,
    )
    metrics = json.loads((trained / "evaluated/metrics.json").read_text())
    assert set().union(*metrics["tasks"].values()) == documented("evaluate.py", options=False)
    assert set(metrics["tasks"]["grounding"]) >= {"soft_f1", "map50", "unparseable", "length"}
    assert set(metrics["tasks"]["report"]) >= {"gleu", "rouge_l", "bleu4", "length", "unparseable"}
    gain = metrics["difference"]["grounding"]["soft_f1"]
    both = [
        json.loads((trained / name / "metrics.json").read_text())["tasks"]["grounding"]["soft_f1"][
            "mean"
        ]
        for name in ("evaluated", "constant")
    ]
    assert gain["difference"] == pytest.approx(both[0] - both[1])
    assert {p.name for p in (trained / "evaluated").iterdir()} == {
        "predictions.jsonl",
        "metrics.json",
        "table.md",
        "samples.png",
        "report.html",
    }
    run(
        "evaluate.py",
        "--predictions",
        trained / "evaluated",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        trained / "again",
    )
    again = json.loads((trained / "again/metrics.json").read_text())
    assert again["tasks"] == metrics["tasks"] and again["model"] == metrics["model"]


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_interrupted_run_resumes_bit_for_bit(program, trained, phantom, tmp_path):
    """Ctrl-C finishes the step, leaves a checkpoint and exits with 130; --resume ends where the
    whole run ended.
    """
    command = (
        sft(phantom, tmp_path / "run")
        if program == "sft"
        else grpo(phantom, trained / "sft/final", tmp_path / "run")
    )
    (process,) = start("python", command, tmp_path / "log")
    log = tmp_path / "run/metrics.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert finish([process]) == [130]
    (log.open("a")).write('{"step": 2, "rew')  # what a kill in the middle of a line would leave
    assert "resuming from" in run(*command, "--resume")
    assert same(tmp_path / "run", trained / program)

    def timeless(row):
        return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}

    assert list(map(timeless, rows(tmp_path / "run"))) == list(
        map(timeless, rows(trained / program))
    )
    assert "is finished" in run(*command, "--resume")


def test_resume_without_a_checkpoint_starts_at_zero(phantom, tmp_path, trained):
    assert "no checkpoint" in run(*sft(phantom, tmp_path / "run", "--resume"))
    assert same(tmp_path / "run", trained / "sft")


def letters(answers, samples):
    """A reward that an untrained model's answers differ in; GLEU and soft F1 are 0 for all of
    them.
    """
    return [float(len(set(answer))) for answer in answers]


def test_micro_batches_change_nothing_but_memory(trained, phantom, tmp_path):
    """AdamW hides a gradient of the wrong size, so its norm is compared, too."""
    settings = ["--updates_per_rollout", 2, "--reward", "tests.test_programs:letters"]
    for name, micro in (("run", 1), ("whole", 100_000)):
        run(
            *grpo(
                phantom,
                trained / "sft/final",
                tmp_path / name,
                "--micro_tokens",
                micro,
                *settings,
                steps=1,
            )
        )
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-5
    (one,), (other,) = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert one["reward_std_in_group"] > 0.5 and one["grad_norm"] > 0.1
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_task_weights_reach_the_loss(trained, phantom, tmp_path):
    run(*sft(phantom, tmp_path / "run", "--task_weights", "report=3", steps=1))
    run(*sft(phantom, tmp_path / "same", "--task_weights", "report=3,grounding=3", steps=1))
    assert not same(tmp_path / "run", trained / "sft")
    losses = [
        rows(folder)[0]["loss"] for folder in (trained / "sft", tmp_path / "same", tmp_path / "run")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[2] != losses[0], (
        "weights are relative"
    )
    assert "'reports=2' is not task=weight" in run(
        *sft(phantom, tmp_path / "bad", "--task_weights", "reports=2"), code=1
    )


def test_a_frozen_vision_tower_stays_what_it_was(trained, phantom, tmp_path):
    run(
        *grpo(
            phantom,
            trained / "sft/final",
            tmp_path / "run",
            "--freeze",
            "vision",
            "projector",
            "--advantage_scale",
            "batch",
            "--soft_overlong",
            8,
            "--rollout_cap",
            2,
            "--off_policy_delta",
            1,
            "--entropy_target",
            1,
            "--roofline",
            "--think",
            "--eval_data",
            phantom / "test.jsonl",
            "--eval_steps",
            1,
            steps=1,
        )
    )
    assert set(rows(tmp_path / "run")[0]) == documented("train_grpo.py"), (
        "the glossary has what only options log, too"
    )
    before, after = weights(trained / "sft"), weights(tmp_path / "run")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and not any("visual" in name for name in changed)


def test_settings_file(phantom, tmp_path, trained):
    settings = {
        "model": str(trained / "sft/final"),
        "train_data": str(phantom / "train.jsonl"),
        "learning_rate": "1e-4",
        "prompts_per_step": 4,
        "group_size": 4,
        "max_new_tokens": 16,
        "max_steps": 300,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    run("train_grpo.py", tmp_path / "run.yaml", "--output_dir", tmp_path / "run", "--max_steps", 3)
    assert same(tmp_path / "run", trained / "grpo")


def test_ask_prints_and_draws(trained, phantom, tmp_path):
    film = next((phantom / "films").glob("*.png"))
    said = run(
        "-m",
        "minigrpo.ask",
        "--model",
        trained / "sft/final",
        "--image",
        film,
        "--output",
        tmp_path / "drawn.png",
        "--max_new_tokens",
        8,
    )
    assert said.strip()


def broken(phantom, tmp_path, change):
    """A copy of train.jsonl whose second line `change` has edited."""
    lines = [json.loads(line) for line in (phantom / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = str(phantom / line["image"])
    text = [json.dumps(line) for line in lines]
    text[1] = change(lines[1])
    (tmp_path / "bad.jsonl").write_text("\n".join(text))
    return tmp_path / "bad.jsonl"


def edit(**fields):
    return lambda line: json.dumps({**line, **fields})


@pytest.mark.parametrize(
    "change, message",
    [
        (edit(image="nowhere.png"), "does not exist"),
        (lambda line: "{not json", "not JSON"),
        (edit(task="dance"), "unknown task"),
        (edit(boxes=[[0.1, 0.1, 1.2, 0.5]]), "lies outside 0..1"),
        (edit(boxes=[[0.5, 0.1, 0.4, 0.5]]), "x1 < x2"),
        (edit(answer=" "), "answer"),
        (edit(id="phantom-train-00000-report"), "already"),
    ],
)
def test_bad_line_stops_in_seconds(phantom, tmp_path, change, message):
    data, out = broken(phantom, tmp_path, change), tmp_path / "run"
    began = time.time()
    said = run("train_sft.py", "--model", "tiny", "--train_data", data, "--output_dir", out, code=1)
    assert message in said and f"{data}:2" in said and "Traceback" not in said
    assert time.time() - began < 30 and not out.exists()


def test_truncated_png(phantom, tmp_path):
    shutil.copytree(phantom, tmp_path / "data")
    film = tmp_path / "data/films/phantom-train-00000.png"
    film.write_bytes(film.read_bytes()[:2000])
    said = run(*sft(tmp_path / "data", tmp_path / "run"), code=1)
    assert str(film) in said and "train.jsonl:1" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--reward", "glue"], "gleu"),
        (["--reward", "soft_f1", "--task", "report"], "no sample"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--group_size", 1], "group_size"),
        (["--prompts_per_step", 6], "multiple"),
        (["--max_steps", 0], "max_steps"),
        (["--temperature", 0], "greedy"),
    ],
)
def test_bad_grpo_argument(trained, phantom, tmp_path, extra, message):
    said = run(*grpo(phantom, trained / "sft/final", tmp_path / "run"), *extra, code=1)
    assert message in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(trained, phantom, tmp_path):
    assert "already holds a run" in run(*sft(phantom, trained / "sft"), code=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert "not empty" in run(*sft(phantom, tmp_path / "mine"), code=1)
    assert "not empty" in run(
        "evaluate.py",
        "--model",
        trained / "sft/final",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        trained / "sft",
        code=1,
    )


def test_two_evaluations_do_not_share_a_folder(trained, phantom, tmp_path):
    """Bug: both found it empty, and the second to end wrote over the first one's answers."""
    (tmp_path / "both").mkdir()
    held = lock(tmp_path / "both/.lock")
    words = (
        "evaluate.py",
        "--model",
        "constant",
        "--train_data",
        phantom / "train.jsonl",
        "--data",
        phantom / "test.jsonl",
        "--output_dir",
        tmp_path / "both",
    )
    said = run(*words, code=1)
    assert "in use" in said and [path.name for path in (tmp_path / "both").iterdir()] == [".lock"]
    held.close()  # as a kill would leave it
    run(*words)
    assert not (tmp_path / "both/.lock").exists()


@pytest.mark.parametrize("program", ["train_sft.py", "train_grpo.py", "evaluate.py"])
def test_help_explains_every_argument(program):
    said = run(program, "--help")
    assert "--output_dir" in said and "JSONL" in said


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("train_sft.py", marks=pytest.mark.slow),
        "train_grpo.py",
        pytest.param("evaluate.py", marks=pytest.mark.slow),
    ],
)
def test_a_new_interpreter_can_start_it(program):
    """The other tests fork where everything has been imported: an import that is missing here would
    not be missed there.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import {program.removesuffix('.py')}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_patch_filters_take_small_steps():
    """Bug: AdamW moved the patch filters as fast as single weights, which cost 0.04 soft F1 and
    0.04 GLEU after SFT.
    """
    policy = tiny_policy([Sample("0", None, "report", "What is seen?", "The lungs are clear.")])
    args = SftArguments(
        model="tiny", train_data="x", output_dir="y", optimizer="muon", learning_rate=4e-3
    )
    filters = policy.visual.patch_embed.proj.weight
    before = filters.detach().clone()
    filters.grad = torch.ones_like(filters)
    for optimizer in sft_optimizers(policy, args):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * group.get("scale", 1.0)
        optimizer.step()
    assert 0 < (filters - before).abs().max() < 2 * args.learning_rate / filters[0].numel() ** 0.5
