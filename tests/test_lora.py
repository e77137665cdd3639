"""Adapters: peft's own numbers, the base model when off, a plain checkpoint when merged, and runs
that resume bit for bit.
"""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import train_grpo
import train_sft
from minigrpo import grpo
from minigrpo.generate import generate
from minigrpo.lora import (
    adapters_off,
    add_adapters,
    check_checkpoint,
    fingerprint,
    merge_adapters,
    save_adapters,
)
from minigrpo.policy import Policy
from minigrpo.run import loop
from minigrpo.run.arguments import LINEAR, PARTS
from minigrpo.run.files import seal
from minigrpo.run.folder import last_checkpoint
from tests.test_policy import copy_of, peer_logprob

ARGS = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=list(LINEAR), seed=0, model="base")


def letters(answers, samples):
    """A reward that an untrained model's answers differ in."""
    return [float(len(set(answer))) for answer in answers]


class Killed(BaseException):
    pass


def adapted(policy, **other):
    """A copy with adapters that do something: B starts at 0."""
    ours = add_adapters(copy_of(policy), SimpleNamespace(**{**vars(ARGS), **other}))
    torch.manual_seed(1)
    for name, weight in ours.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return ours


@pytest.fixture
def batch(policy, mixed):
    return policy.encode(mixed), *policy.encode_answers(
        [f"Answer {r}: " + "clear lungs " * (r % 5) for r in range(8)]
    )


@pytest.fixture(scope="module")
def base(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    policy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(base, phantom, tmp_path_factory):
    """train(*arguments) runs GRPO (or SFT) with LoRA in this process and returns its folder."""

    def run(*arguments, program=train_grpo, folder=None, steps=2, model=base, reward="letters"):
        folder = folder or tmp_path_factory.mktemp("run") / "lora"
        words = [
            "--model",
            model,
            "--train_data",
            phantom / "train.jsonl",
            "--output_dir",
            folder,
            "--max_steps",
            steps,
            "--lora_rank",
            4,
            "--learning_rate",
            1e-3,
        ]
        if program is train_grpo:
            words += [
                "--reward",
                f"tests.test_lora:{reward}",
                "--prompts_per_step",
                4,
                "--group_size",
                3,
                "--max_new_tokens",
                12,
            ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["program.py", *map(str, [*words, *arguments])])
            patch.setattr(loop, "draw_curves", lambda folder: None)
            program.main()
        return folder

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train(steps=4)


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder):
    """Nor the name of the reward, which differs between a run and one that is killed."""
    other = ("second", "memory", "test_lora")
    return [
        {k: v for k, v in row.items() if not any(name in k for name in other)}
        for row in rows(folder)
    ]


def test_new_adapters_change_no_bit_and_are_all_that_trains(policy, batch):
    ours = add_adapters(copy_of(policy), ARGS)
    assert torch.equal(ours.score(*batch), policy.score(*batch))
    names = {name for name, weight in ours.model.named_parameters() if weight.requires_grad}
    layers = len(ours.language_model.layers)
    assert len(names) == 2 * 7 * layers and all(
        ".language_model.layers." in n and ".lora_" in n for n in names
    )
    only = add_adapters(
        copy_of(policy), SimpleNamespace(**{**vars(ARGS), "lora_targets": ["q_proj", "v_proj"]})
    )
    assert len(only.parameters()) == 2 * 2 * layers


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_off_is_the_base_model_bit_for_bit(policy, batch, autocast):
    """In bf16 as well: the reference takes the same path as one that is loaded a second time."""
    ours, alone = adapted(policy), copy_of(policy)
    ours.autocast = alone.autocast = autocast
    before = [p.clone() for p in ours.parameters()]
    assert (ours.score(*batch) - alone.score(*batch)).abs().max() > 0.1
    with torch.no_grad(), adapters_off(ours):
        assert torch.equal(ours.score(*batch), alone.score(*batch))
        sampled = [
            generate(p, batch[0], group_size=2, max_new_tokens=6, seed=3).tokens
            for p in (ours, alone)
        ]
        assert torch.equal(*sampled)
    with pytest.raises(KeyError), adapters_off(ours):
        raise KeyError("an error inside switches them on again")
    assert (
        all(map(torch.equal, ours.parameters(), before))
        and (ours.score(*batch) - alone.score(*batch)).abs().max() > 0.1
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft_around_plain_transformers(
    policy, batch, base, tmp_path, checkpointing
):
    """The peer loads our files: transformers' model, `PeftModel.from_pretrained`, one forward for
    each row.
    """
    ours = adapted(policy)
    save_adapters(ours, tmp_path)
    peer = PeftModel.from_pretrained(
        transformers.Qwen3VLForConditionalGeneration.from_pretrained(base),
        tmp_path,
        is_trainable=True,
    )
    if checkpointing:
        ours.checkpoint_activations()
    found = ours.score(*batch)
    expected = peer_logprob(SimpleNamespace(model=peer.get_base_model().eval()), *batch, group=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.sum().backward()
    expected.sum().backward()
    theirs = {
        name.removeprefix("base_model.model."): weight for name, weight in peer.named_parameters()
    }
    for name, weight in ours.model.named_parameters():
        assert weight.requires_grad == theirs[name].requires_grad == (".lora_" in name)
        if weight.requires_grad:
            assert theirs[name].grad.norm() > 1e-3, name
            assert (weight.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm(), name


def test_bf16_gradients_point_where_those_of_fp32_do(policy, batch):
    ours, grads = adapted(policy), []
    for ours.autocast in (False, True):
        ours.score(*batch).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in ours.parameters()]))
        ours.model.zero_grad()
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


def test_merged_adapters_are_a_plain_checkpoint(policy, batch, tmp_path):
    """Within 2e-5 in log-prob (fp32 rounding of W + BA); what is saved then gives the merged
    model's bits.
    """
    ours = adapted(policy)
    before = ours.score(*batch)
    with pytest.raises(ValueError, match="merge_adapters first"):
        ours.save_pretrained(tmp_path)
    merge_adapters(ours)
    ours.save_pretrained(tmp_path)
    again = Policy.from_pretrained(str(tmp_path))
    assert weights(tmp_path).keys() == {
        n for n in policy.model.state_dict() if n != "lm_head.weight"
    }
    assert torch.equal(again.score(*batch), ours.score(*batch))
    torch.testing.assert_close(again.score(*batch), before, atol=2e-5, rtol=0)


def test_a_run_loads_one_model_and_trains_the_adapters_alone(train, base, monkeypatch):
    loaded, load = [], Policy.from_pretrained
    monkeypatch.setattr(
        train_grpo.Policy,
        "from_pretrained",
        lambda *args, **more: loaded.append(load(*args, **more)) or loaded[-1],
    )
    folder = train("--activation_checkpointing", "--updates_per_rollout", 1)
    assert len(loaded) == 1, "the reference is the policy with its adapters off"
    assert rows(folder)[0]["kl"] == 0 and rows(folder)[1]["kl"] > 1e-6
    before, after = weights(base), weights(folder / "final")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if ".language_model.layers." in name and name.split(".")[-2] in LINEAR
    }


def test_the_reference_scores_as_a_model_that_is_loaded_apart(train, base, monkeypatch):
    alone, score, pairs = Policy.from_pretrained(str(base)), grpo.score_all, []

    def both(policy, *rest):
        pairs.append((score(policy, *rest), score(alone, *rest)))
        return pairs[-1][0]

    monkeypatch.setattr(grpo, "score_all", both)
    train()
    assert len(pairs) == 2 and all(torch.equal(*pair) for pair in pairs), (
        "in the second step the adapters have moved"
    )


def test_final_holds_the_merged_model_and_the_adapters(trained, base):
    plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(base)
    merged = (
        PeftModel.from_pretrained(plain, trained / "final/adapter").merge_and_unload().state_dict()
    )
    assert all(
        torch.equal(weight, merged[name]) for name, weight in weights(trained / "final").items()
    )
    assert not (trained / "checkpoints").exists()


def test_a_killed_run_resumes_bit_for_bit(train, trained, tmp_path, monkeypatch):
    folder, advantages, steps = tmp_path / "run", grpo.group_advantages, iter(range(4))

    def killing(*args, **settings):
        if next(steps) == 2:
            raise Killed
        return advantages(*args, **settings)

    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(grpo, "group_advantages", killing)
        train("--save_steps", 1, folder=folder, steps=4)
    older, checkpoint = sorted((folder / "checkpoints").iterdir())
    assert (older.name, checkpoint.name) == ("step-000001", "step-000002")
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer-00000.safetensors"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert not (checkpoint / "model.safetensors").exists()
    train("--save_steps", 1, "--resume", folder=folder, steps=4)
    a, b = weights(folder / "final"), weights(trained / "final")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert without_time(folder) == without_time(trained)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sft_with_adapters(train, base, optimizer):
    # all films, in every step
    folder = train("--optimizer", optimizer, "--batch_size", 12, program=train_sft, steps=3)
    losses = [row["loss"] for row in rows(folder)]
    assert losses[-1] < losses[0]
    before, after = weights(base), weights(folder / "final")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name
        for name in before
        if ".language_model.layers." in name and name.split(".")[-2] in LINEAR
    }


def stop(train, *arguments, **more):
    """What the program said when it ended itself."""
    with pytest.raises(SystemExit) as stopped:
        train(*arguments, **more)
    return str(stopped.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lora_rank", -4], "--lora_rank must be 0 (off) or more, got -4"),
        (["--lora_alpha", 0], "--lora_alpha above 0"),
        (["--freeze", "language"], "leave out --freeze"),
        (["--model", "tiny"], "train the whole model first"),
    ],
)
def test_arguments_that_cannot_work(train, tmp_path, arguments, message):
    program = train_sft if "tiny" in arguments else train_grpo
    said = stop(train, *arguments, program=program, folder=tmp_path / "run")
    assert message in said and "\n" not in said and not (tmp_path / "run").exists()


def test_without_peft_the_message_says_what_to_install(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = stop(train, folder=tmp_path / "run")
    assert (
        "needs peft: pip install peft" in said
        and "\n" not in said
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (["--lora_rank", 8], "resume it with --lora_rank 4"),
        (["--lora_rank", 0], "resume it with --lora_rank 4"),
        (["--lora_alpha", 16], "resume it with --lora_alpha 32"),
        (["--lora_targets", "q_proj"], "resume it with --lora_targets q_proj k_proj"),
    ],
)
def test_resuming_with_other_adapters(train, interrupted, change, message):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    assert message in stop(train, "--resume", *change, folder=interrupted)
    assert before == {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}


@pytest.fixture(scope="module")
def interrupted(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        # as if the run had died while saving
        patch.setattr(loop, "save_final", lambda *args: None)
        train("--save_steps", 1, folder=folder)
    return folder


def test_resuming_on_another_base_model(train, interrupted, base, policy, tmp_path):
    """One matrix of another scale is another model; adapters are none of its business."""
    other = copy.deepcopy(policy.model)
    other.model.language_model.layers[0].mlp.up_proj.weight.data *= 1.001
    other.save_pretrained(tmp_path / "other")
    for part in (policy.tokenizer, policy.image_processor):
        part.save_pretrained(tmp_path / "other")
    said = stop(train, "--resume", folder=interrupted, model=tmp_path / "other")
    assert "is not the model that the adapters in" in said and str(tmp_path / "other") in said
    assert fingerprint(other) != fingerprint(policy.model) == fingerprint(adapted(policy).model)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("base.json", b"{", "base.json is not usable JSON"),
        ("base.json", b"{}", "is not the model that the adapters"),
        ("adapter_config.json", b"[]", "adapter_config.json is not usable JSON"),
        ("adapter_config.json", b"{}", "adapters with another --lora_rank"),
        ("adapter_model.safetensors", b"", "adapter_model.safetensors cannot be used"),
        ("adapter_model.safetensors", "NaN", "holds NaN or infinity"),
        ("adapter_model.safetensors", "less", "cannot be used"),
        ("adapter_config.json", "code", None),
    ],
)
def test_adapters_that_cannot_be_used(policy, interrupted, tmp_path, file, content, message):
    """What peft would make of adapter_config.json is not asked: adapters are made of the
    arguments.
    """
    checkpoint = shutil.copytree(
        next((interrupted / "checkpoints").glob("step-*")), tmp_path / "a/b/step"
    )
    path, args = checkpoint / file, SimpleNamespace(**vars(ARGS) | {"lora_alpha": 32.0})
    if content in ("NaN", "less"):
        weights = load_file(path)
        name = next(iter(weights))
        weights[name].view(-1)[0] = float("nan")
        save_file({key: x for key, x in weights.items() if content == "NaN" or key != name}, path)
    elif content == "code":
        path.write_text(
            json.dumps(
                json.loads(path.read_text())
                | {
                    "auto_mapping": {"parent_library": "os"},
                    "base_model_name_or_path": "elsewhere",
                    "peft_type": "X",
                }
            )
        )
    else:
        path.write_bytes(content)

    def resume():
        check_checkpoint(checkpoint, args)
        return add_adapters(copy_of(policy), args, checkpoint)

    if message:
        with pytest.raises(ValueError, match=message):
            resume()
    else:
        assert resume().adapters is not None


def test_whole_weights_do_not_resume_with_adapters(tmp_path):
    (tmp_path / "checkpoints/step-000002.part").mkdir(parents=True)
    seal(tmp_path / "checkpoints/step-000002.part", tmp_path / "checkpoints/step-000002")
    with pytest.raises(ValueError, match="resume it with --lora_rank 0"):
        last_checkpoint(SimpleNamespace(**vars(ARGS), resume=True, output_dir=str(tmp_path)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("program", [train_sft, train_grpo])
def test_frozen_parts_stay_what_they_were(train, base, program, part):
    folder = train("--lora_rank", 0, "--freeze", part, program=program, steps=1)
    before, after = weights(base), weights(folder / "final")
    where = {
        name: "language" if "visual" not in name else "projector" if "merger" in name else "vision"
        for name in before
    }
    assert {where[name] for name in before if not torch.equal(before[name], after[name])} == set(
        PARTS
    ) - {part}


def test_all_frozen_is_refused(train, tmp_path):
    assert "nothing is left to train" in stop(
        train, "--lora_rank", 0, "--freeze", *PARTS, folder=tmp_path / "run"
    )
