"""The arguments of train_grpo.py: that each reaches the loss, that contradictions stop the run and
inert ones are said.
"""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from minigrpo import grpo
from minigrpo.choices import SCHEDULES
from minigrpo.loss import denominator_of
from minigrpo.run import loop
from minigrpo.run.args import parse_args
from minigrpo.run.plots import draw_curves
from minigrpo.run.schedule import learning_rate_at
from train_grpo import GrpoArguments

ROOT = Path(__file__).parent.parent
NEEDED = dict(model="m", train_data="t", output_dir="o")


def half_flat(answers, samples):
    """A reward that is the same for all answers to every second sample, and the answer's letters
    for the others.
    """
    return [
        0.25 if int(sample.id.split("-")[2]) % 2 else len(answer) / 7
        for answer, sample in zip(answers, samples)
    ]


def interrupting(answers, samples, pressed=[]):
    """The same, with one Ctrl-C in the first step."""
    if not pressed:
        pressed.append(os.kill(os.getpid(), signal.SIGINT))
    return half_flat(answers, samples)


def letters(answers, samples):
    return [len(answer) / 7 for answer in answers]


def flat(answers, samples):
    return [1.0] * len(answers)


@pytest.fixture(scope="module")
def train(policy, phantom, tmp_path_factory):
    """train(*arguments) runs the program in this process and returns its folder."""
    model = tmp_path_factory.mktemp("model")
    policy.save_pretrained(model)

    def run(*arguments, folder=None, reward="half_flat", steps=2):
        folder = folder or tmp_path_factory.mktemp("run") / "grpo"
        words = [
            "--model",
            model,
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            folder,
            "--max_steps",
            steps,
            "--reward",
            f"tests.test_train_grpo:{reward}",
            "--prompts_per_step",
            4,
            "--group_size",
            3,
            "--max_new_tokens",
            12,
            "--learning_rate",
            1e-4,
            *arguments,
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train_grpo.py", *map(str, words)])
            # half of a small run's time
            patch.setattr(loop, "draw_curves", lambda folder: None)
            train_grpo.main()
        return folder

    return run


@pytest.fixture
def calls(monkeypatch):
    """What `grpo_loss` is given while training: (positional, keyword) for each call."""
    seen = []

    def spy(*args, **settings):
        seen.append((args, settings))
        return loss(*args, **settings)

    loss = grpo.grpo_loss
    for module in ("loss", "grpo"):  # the check of the arguments, and the step
        monkeypatch.setattr(f"minigrpo.{module}.grpo_loss", spy)
    return seen


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ratio_level="sequence", surrogate="cispo"), "contradict"),
        (dict(dual_clip=1.2), r"must lie above 1 \+ clip_high = 1.28"),
        (dict(clip_low=-0.1), "0 or more"),
        (dict(dual_clip=-1), "--dual_clip must be 0 or more"),
        (dict(kl_coef=-1), "--kl_coef"),
        (dict(rollout_cap=-1), "--rollout_cap"),
        (dict(dynamic_sampling=-1), "--dynamic_sampling"),
        (dict(soft_overlong=-1), "--soft_overlong"),
        (dict(aggregation="mean"), "aggregation must be one of"),
        (dict(cispo_cap=0), "--cispo_cap must be above 0"),
        (dict(cispo_cap=-1), "--cispo_cap"),
        (dict(soft_overlong=300), "--soft_overlong 300 is longer than the longest answer"),
    ],
)
def test_contradictions_stop_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        args = GrpoArguments(**NEEDED, **settings)
        args.check()
        args.check_with_torch()


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(updates_per_rollout=1), "the ratio is 1 by construction"),
        (dict(kl_coef=0, kl_ratio=True), "no KL is computed"),
        (dict(kl_coef=0, kl_estimator="k1"), "--kl_estimator and --kl_ratio are not used"),
        (dict(kl_estimator="k1"), "is 0"),
        (
            dict(surrogate="cispo", clip_low=0.1, dual_clip=0),
            "--surrogate cispo: --clip_low, --dual_clip are not used",
        ),
        (dict(cispo_cap=3.0), "--surrogate clip: --cispo_cap is not used"),
        (dict(surrogate="sapo", dppo_delta=0.1), "sapo: --dppo_delta is not used"),
        (dict(rollout_outside="drop"), "--rollout_cap 0: the sampler's log-probs are trusted"),
        (dict(advantage_scale="decoupled", leave_one_out=True), "--leave_one_out and"),
        (dict(dual_clip=0), "nothing bounds the ratio"),
        (dict(ratio_level="sequence"), "GSPO uses 3e-4"),
        (dict(warmup=0.001), "the first step is at the peak already"),
        (dict(warmup=1, lr_schedule="cosine"), "the learning rate never decays"),
        (dict(max_steps=2, lr_schedule="linear"), "--lr_schedule linear: no step is left"),
    ],
)
def test_inert_settings_are_said(settings, said):
    notes = GrpoArguments(**NEEDED, **settings).inert()
    assert len(notes) == 1 and said in notes[0]


def test_the_papers_settings_say_nothing():
    for settings in (
        {},
        dict(kl_coef=0),
        dict(kl_estimator="k1", kl_ratio=True),
        dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),
        dict(warmup=0.1, lr_schedule="linear"),
        dict(warmup=1),
    ):
        assert GrpoArguments(**NEEDED, **settings).inert() == []


@pytest.mark.parametrize(
    "name, settings",
    [
        (
            "dapo",
            dict(
                aggregation="token-mean", clip_high=0.28, kl_coef=0, dual_clip=0, dynamic_sampling=4
            ),
        ),
        ("dr_grpo", dict(aggregation="constant", advantage_scale="none", kl_coef=0)),
        ("cispo", dict(surrogate="cispo", cispo_cap=5.0)),
        (
            "gspo",
            dict(
                ratio_level="sequence", aggregation="sequence-mean", clip_low=3e-4, clip_high=4e-4
            ),
        ),
    ],
)
def test_configs_of_other_papers(name, settings):
    needed = [word for key, value in NEEDED.items() for word in (f"--{key}", value)]
    args = parse_args(GrpoArguments, "", [str(ROOT / f"configs/{name}.yaml"), *needed])
    assert {key: getattr(args, key) for key in settings} == settings


def test_every_switch_reaches_the_loss(train, calls):
    train(
        "--ratio_level",
        "sequence",
        "--aggregation",
        "constant",
        "--clip_low",
        0.1,
        "--clip_high",
        0.4,
        "--dual_clip",
        2,
        "--kl_coef",
        0.3,
        "--kl_estimator",
        "k2",
        "--kl_ratio",
        "--entropy_coef",
        0.01,
        "--off_policy_delta",
        0.7,
        "--rollout_level",
        "sequence",
        "--rollout_floor",
        0.5,
        "--rollout_outside",
        "drop",
        "--rollout_cap",
        1.5,
        "--updates_per_rollout",
        2,
        "--micro_tokens",
        1,
        steps=1,
    )
    assert len(calls) == 1 + 4, "the check of the arguments, and a call for every prompt"
    for _, settings in calls[1:]:
        assert settings.pop("rollout_logprob").shape == settings.pop("ref_logprob").shape == (3, 12)
        assert settings.pop("entropy").shape == (3, 12)
        assert settings == dict(
            ratio_level="sequence",
            surrogate="clip",
            aggregation="constant",
            clip_low=0.1,
            clip_high=0.4,
            dual_clip=2.0,
            kl_coef=0.3,
            kl_estimator="k2",
            kl_ratio=True,
            entropy_coef=0.01,
            off_policy_delta=0.7,
            rollout_level="sequence",
            rollout_floor=0.5,
            rollout_outside="drop",
            rollout_cap=1.5,
            max_tokens=12,
            denominator=torch.tensor(2 * 3 * 12),
        )


@pytest.mark.parametrize(
    "surrogate, own",
    [
        ("clip", dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0)),
        ("cispo", dict(cispo_cap=5.0)),
        ("dppo", dict(dppo_delta=0.2)),
        ("sapo", dict(sapo_tau_up=1.0, sapo_tau_down=1.05)),
        ("tests.test_variants:bounded", {}),
    ],
)
def test_a_surrogate_gets_its_own_settings(surrogate, own):
    found = GrpoArguments(**NEEDED, surrogate=surrogate).loss_settings()
    others = ("clip_low", "clip_high", "dual_clip", "cispo_cap", "dppo_delta", "sapo_tau_up")
    assert {name: found[name] for name in (*others, "sapo_tau_down") if name in found} == own


def test_a_surrogate_of_one_s_own_trains(train):
    log = rows(train("--surrogate", "tests.test_variants:bounded", steps=1))
    assert 0 <= log[0]["bounded"] < 0.5 and "clip_high" not in log[0]


def test_a_mix_of_rewards_is_compared_one_by_one(train):
    train("--advantage_scale", "decoupled", "--reward", "report=0.5*gleu+0.5*length", steps=1)


def test_the_weight_of_the_entropy_follows_its_target(train):
    """Below its target the bonus rises by 0.005 a step, also over a stop."""
    folder = train("--entropy_target", 100, steps=2)
    assert [row["entropy_coef"] for row in rows(folder)] == [0, 0.005]


def test_off_is_off(train, calls):
    train("--dual_clip", 0, "--updates_per_rollout", 1, steps=1)
    (logprob, old, _, mask), settings = calls[1]
    assert settings["dual_clip"] is None and settings["rollout_logprob"] is None
    assert torch.equal(settings["denominator"], mask.sum()) and (logprob - old).abs().max() < 1e-4


def test_without_a_kl_there_is_no_reference(train, calls, monkeypatch, capsys):
    """Bug: --kl_coef 0 still loaded a reference and scored every answer under it, for a KL that was
    only logged.
    """
    loaded, scored, load, score_all = [], [], train_grpo.Policy.from_pretrained, grpo.score_all
    monkeypatch.setattr(
        train_grpo.Policy,
        "from_pretrained",
        lambda *args, **more: loaded.append(1) or load(*args, **more),
    )
    monkeypatch.setattr(grpo, "score_all", lambda *args: scored.append(1) or score_all(*args))
    row = rows(train("--kl_coef", 0, steps=1))[0]
    assert len(loaded) == 1 and not scored and "kl" not in row
    assert "kl=" not in capsys.readouterr().err
    assert all(settings["ref_logprob"] is None for _, settings in calls[1:])
    assert "kl" in rows(train(steps=1))[0] and len(loaded) == 3 and len(scored) == 1


@pytest.mark.parametrize("aggregation", ["sequence-mean", "constant"])
def test_the_denominator_is_the_whole_updates(aggregation, train, calls):
    """Bug of verl, TRL: a mean per micro-batch. Here the parts of an update share one count, and
    add up to its loss.
    """
    whole = train(
        "--aggregation", aggregation, "--updates_per_rollout", 2, "--overlong_filter", steps=1
    )
    first = len(calls)
    parts = train(
        "--aggregation",
        aggregation,
        "--updates_per_rollout",
        2,
        "--overlong_filter",
        "--micro_tokens",
        1,
        steps=1,
    )
    for update in range(2):
        pair = calls[first + 1 + 2 * update : first + 3 + 2 * update]
        expected = denominator_of(
            torch.cat([args[3] for args, _ in pair]), aggregation=aggregation, max_tokens=12
        )
        assert [settings["denominator"] for _, settings in pair] == [expected] * 2
    for name in ("loss", "grad_norm"):
        assert rows(whole)[0][name] == pytest.approx(rows(parts)[0][name], rel=1e-3, abs=1e-6)


def test_the_learning_rate_over_a_run():
    rates = {
        name: [learning_rate_at(step, 21, 2.0, 0.25, name) for step in range(21)]
        for name in SCHEDULES
    }
    for name, found in rates.items():
        assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]) and found[5] == 2.0, (
            "round(0.25 * 21) = 5 steps of warm-up"
        )
        assert found[5:] == sorted(found[5:], reverse=True) and min(found[5:]) >= 0.2
    assert set(rates["constant"][5:]) == {2.0}
    assert rates["linear"][13] == pytest.approx(1.1) == rates["cosine"][13], (
        "half-way between 2 and a tenth of it"
    )
    assert rates["linear"][9] == pytest.approx(1.55) and rates["cosine"][9] == pytest.approx(
        1.1 + 0.9 * math.cos(math.pi / 4)
    )
    assert (
        learning_rate_at(0, 1, 1e-6, 0.0, "constant")
        == learning_rate_at(7, 9, 1e-6, 0.0, "constant")
        == 1e-6
    )

    # as it was written in train_sft.py, to the last bit
    def of_sft(step, steps, peak, warmup):
        return (
            peak * (step + 1) / rise
            if step < (rise := max(1, round(warmup * steps)))
            else peak * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))
        )

    for case in [
        (step, steps, 4e-3, warmup)
        for steps in (1, 2, 880)
        for warmup in (0, 0.03, 1)
        for step in range(steps)
    ]:
        assert learning_rate_at(*case, "cosine") == of_sft(*case)


def test_the_learning_rate_reaches_every_update_and_the_log(train, monkeypatch):
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: taken.append(self.param_groups[0]["lr"]) or step(self),
    )
    folder = train("--warmup", 0.5, "--lr_schedule", "linear", "--updates_per_rollout", 2, steps=4)
    expected = [5e-5, 1e-4, 1e-4, 5.5e-5]
    assert taken == pytest.approx([rate for rate in expected for _ in range(2)])
    assert [row["learning_rate"] for row in rows(folder)] == pytest.approx(expected)
    row = rows(folder)[-1]
    phases = sum(row[f"seconds_{name}"] for name in ("rollout", "reward", "reference", "update"))
    assert phases <= row["seconds"] < phases + 1 and 0.05 < row["peak_memory_gb"] < 50


def test_activation_checkpointing_reaches_the_policy_and_changes_nothing(train, monkeypatch):
    turned_on, method = [], train_grpo.Policy.checkpoint_activations
    monkeypatch.setattr(
        train_grpo.Policy,
        "checkpoint_activations",
        lambda policy: turned_on.append(policy) or method(policy),
    )
    plain, checkpointed = train(steps=1), train("--activation_checkpointing", steps=1)
    assert len(turned_on) == 1 and same(plain, checkpointed)


def test_rollout_cap_scores_before_the_updates(train, calls):
    """The old log-probs are the trainer's, the same for all updates; the weight corrects for the
    sampler.
    """
    folder = train("--rollout_cap", 2, "--updates_per_rollout", 2, "--micro_tokens", 1, steps=1)
    for (logprob, old, _, mask), settings in calls[1:3]:
        assert torch.equal(logprob.detach(), old), "the first update is exactly on-policy"
        assert not torch.equal(old, settings["rollout_logprob"])
    (logprob, old, _, _), settings = calls[3]
    assert (
        not torch.equal(logprob.detach(), old)
        and (old - settings["rollout_logprob"]).abs().max() < 1e-4
    )
    assert rows(folder)[0]["rollout_weight"] == pytest.approx(1, abs=1e-4)


def test_overlong_answers(train, calls):
    """--overlong_filter: rows that were cut off are not trained on; --soft_overlong: long answers
    cost reward.
    """
    folder = train("--overlong_filter", "--soft_overlong", 12, "--updates_per_rollout", 1, steps=1)
    (_, _, _, mask), _ = calls[1]
    row = rows(folder)[0]
    assert row["cut_off"] > 0 and (~mask.any(1)).float().mean().item() == pytest.approx(
        row["cut_off"]
    )
    assert row["reward_overlong"] == pytest.approx(-row["answer_tokens"] / 12)
    for group in rows(folder, "rollouts")[0]["groups"]:
        for answer in group["answers"]:
            assert answer["reward"] == pytest.approx(
                answer["tests.test_train_grpo:half_flat"] + answer["overlong"]
            )


def test_leave_one_out_and_scale_reach_the_advantages(train):
    groups = rows(
        train("--advantage_scale", "none", "--leave_one_out", steps=1, reward="letters"), "rollouts"
    )[0]["groups"]
    rewards, advantages = (
        torch.tensor([[a[name] for a in group["answers"]] for group in groups])
        for name in ("reward", "advantage")
    )
    torch.testing.assert_close(
        advantages, 1.5 * (rewards - rewards.mean(1, keepdim=True)), atol=1e-6, rtol=0
    )
    assert (advantages != 0).any()


def test_dynamic_sampling_replaces_groups_without_spread(train, calls):
    plain, dynamic = train("--seed", 1), train("--dynamic_sampling", 3, "--seed", 1)
    before, after = rows(plain)[0], rows(dynamic)[0]  # the same policy, still
    assert (
        before["groups_replaced"] == 0
        and after["groups_replaced"] >= 4 * before["groups_without_spread"] > 0
    )
    assert after["groups_without_spread"] < before["groups_without_spread"]
    assert all(args[0].shape[0] == 3 for args, _ in calls if len(args[0]) > 1), (
        "four updates of one group each, as ever"
    )
    samples = {
        json.loads(line)["id"]
        for line in open(json.loads((dynamic / "args.json").read_text())["train_data"])
    }
    for step in rows(dynamic, "rollouts"):
        for group in step["groups"]:
            assert group["id"] in samples
            for answer in group["answers"]:  # each answer still has the reward of its own sample
                expected = 0.25 if int(group["id"].split("-")[2]) % 2 else len(answer["text"]) / 7
                assert answer["reward"] == pytest.approx(expected)


def test_dynamic_sampling_is_bounded(train):
    row = rows(train("--dynamic_sampling", 2, reward="flat", steps=1))[0]
    assert row["groups_replaced"] == 2 * 4 and row["groups_without_spread"] == 1


def test_a_resumed_run_replaces_the_same_groups(train, tmp_path):
    # its second step has another learning rate
    settings = ["--dynamic_sampling", 2, "--rollout_cap", 2, "--warmup", 1]
    whole = train(*settings)
    with pytest.raises(SystemExit) as stop:
        train(*settings, folder=tmp_path / "run", reward="interrupting")
    assert stop.value.code == 130 and len(rows(tmp_path / "run")) == 1
    train(*settings, "--resume", folder=tmp_path / "run")
    assert same(whole, tmp_path / "run") and rows(whole)[1]["groups_replaced"] > 0


def test_an_update_whose_answers_were_all_cut_off_does_no_harm(train, calls, monkeypatch):
    sample = grpo.generate
    monkeypatch.setattr(
        grpo,
        "generate",
        lambda *args, **settings: replace(
            rollout := sample(*args, **settings), finished=torch.zeros_like(rollout.finished)
        ),
    )
    # the weights stay, and no figure of an update is logged
    folder = train("--overlong_filter", steps=1)
    assert not any(args[3].any() for args, _ in calls[1:])
    row = rows(folder)[0]
    assert (
        row["cut_off"] == 1
        and row["skipped_updates"] == 0
        and not {"loss", "kl", "grad_norm"} & row.keys()
    )


def test_boxes_at_another_scale_are_said(train, monkeypatch, capsys):
    """Bug: an untuned Qwen3-VL writes boxes in 0..1000; all of them scored 0, and nothing said
    so."""
    real = grpo.generate

    def thousands(*args, **settings):
        rollout = real(*args, **settings)
        return replace(rollout, texts=["At [120, 200, 300, 400]."] * len(rollout.texts))

    monkeypatch.setattr(grpo, "generate", thousands)
    train("--task", "grounding", reward="letters", steps=1)
    said = capsys.readouterr().out
    assert "note: 12 of 12 boxes that the model wrote lie outside 0..1" in said
    assert "(--box_scale is 1): should it be 1000?" in said
    train("--task", "grounding", "--box_scale", 1000, reward="letters", steps=1)
    assert "--box_scale" not in capsys.readouterr().out


def test_curves_of_a_cispo_run(train):
    """A run with --surrogate cispo logs no clip_low: drawing its curves failed after the last
    step.
    """
    draw_curves(folder := train("--surrogate", "cispo", steps=1))
    assert (folder / "curves.png").stat().st_size > 1000
