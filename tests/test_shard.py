"""--shard over real processes and gloo, in float64: the run of one process that holds everything,
whoever has more to do.
"""

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_grpo
import train_sft
from minigrpo.data import read_jsonl
from minigrpo.policy import Policy
from minigrpo.run import loop, node
from minigrpo.run.distributed import join, rank
from minigrpo.run.guard import retry_smaller_on_oom
from minigrpo.run.shard import full, gathered_layers, same_passes_on_every_rank, shard
from tests.processes import finish, run, start
from tests.test_distributed import assert_same_run, exactly, place, rows  # noqa: F401

ADAM = ["--optimizer", "adamw"]


def main():
    """A program for two processes: rank 0 has two micro-batches, one of a single token an answer,
    rank 1 has one with three blocks.
    """
    folder, samples = Path(sys.argv[1]), read_jsonl(sys.argv[2])
    join("cpu")
    # FSDP2 has a way of its own to sum fp32, and bf16 makes copies of the weights that are
    # gathered.
    for dtype, bf16, checkpointing, error in (
        (torch.float32, True, False, 1e-3),
        (torch.float64, False, True, 1e-10),
    ):
        if dtype == torch.float64:
            torch.set_default_dtype(dtype)
            torch.Tensor.float = torch.Tensor.double
        policy = Policy.from_pretrained(folder, autocast=bf16)
        policy.model.to(dtype)
        policy.head = policy.model.lm_head.weight
        if checkpointing:
            policy.checkpoint_activations()
        one = policy.encode_answers(["a", "no"])

        def first(tokens, mask):
            return (tokens[:, :1], mask[:, :1])

        long = policy.encode_answers(["no effusion", "a small nodule in the left lung"])
        work = [
            [(samples[:2], [first(*one)]), (samples[2:4], [one])],
            [(samples[1:3], [long, one, first(*long)])],
        ]

        def backward(parts, others):
            for (chosen, blocks), weight in same_passes_on_every_rank(
                policy, parts, lambda: others
            ):
                prefix = policy.prefill(policy.encode(chosen))
                loss = sum(
                    own * policy.score(prefix, *block).square().sum()
                    for block, own in same_passes_on_every_rank(policy, blocks)
                )
                (weight * loss).backward()

        backward(work[0] + work[1], [])
        names = [
            name for name, p in policy.model.named_parameters() if ".language_model.layers." in name
        ]
        named = dict(policy.model.named_parameters())
        wanted, count = (
            {name: named[name].grad for name in names},
            sum(named[name].numel() for name in names),
        )
        policy.model.zero_grad()
        prompts = policy.encode(samples[:2])
        with torch.no_grad():
            before = policy.score(prompts, *long)

        shard(policy)
        named = dict(policy.model.named_parameters())
        assert abs(sum(named[name].to_local().numel() for name in names) / count - 0.5) < 0.01
        with torch.no_grad(), gathered_layers(policy):
            assert torch.equal(policy.score(prompts, *long), before)  # to the bit
        found = []
        for mine in (work, [work[0], []], [[], work[1]]):  # a rank may have none
            policy.model.zero_grad()
            backward(mine[rank()], work[1])
            found.append({name: full(named[name].grad) for name in names})
        largest = max(x.abs().max() for x in wanted.values())
        for name in names:
            torch.testing.assert_close(found[0][name], wanted[name], rtol=0, atol=error * largest)
            torch.testing.assert_close(
                found[1][name] + found[2][name], wanted[name], rtol=0, atol=error * largest
            )
        assert largest > 1e-2
        # let go again
        assert all(p.to_local().numel() < p.numel() for p in (named[name] for name in names))
    print("as one")


def test_gradients_are_the_unsharded_ones_whoever_has_more_to_do(place, phantom):
    """One prefill and several blocks behind it, activations kept or not, a rank with fewer passes
    or none. Bug to guard against: a rank whose answers are one token long made no second pass
    through the layers, and the others waited for ever.
    """
    said = run(
        "tests.test_shard",
        [place.folder / "model", phantom / "train.jsonl"],
        place.folder / "engine.log",
        ranks=2,
    )
    assert "as one" in said and "view" not in said


def sharded(rank, gradients=None, stop=False, die=False):
    """As `exactly`, with the gradients put together from all ranks, and what each rank holds beside
    them. `stop` leaves the last checkpoint where it is, as a kill would; with `die`, rank 1 is
    killed in its third update, before its first pass.
    """
    exactly(rank)
    if stop:
        loop.save_final = lambda *given: None
    clip, seen, filled = node.clip_gradients, [], []

    def filling(*given):
        found = same_passes_on_every_rank(*given)
        filled.append(sum(not weight for _, weight in found))
        if die and rank == 1 and len(filled) == 3:
            os.kill(os.getpid(), 9)
        if gradients:
            Path(f"{gradients}.filled-{rank}").write_text(str(sum(filled)))
        return found

    def keeping(parameters, largest):
        found = [full(p.grad).clone() for p in parameters if p.grad is not None]  # on all ranks
        seen.append(found)
        if gradients and rank == 0:
            torch.save(seen, gradients)
        return clip(parameters, largest)

    train_sft.clip_gradients = node.clip_gradients = keeping
    train_sft.same_passes_on_every_rank = node.same_passes_on_every_rank = filling


SMALL = {
    "train_grpo": ["--micro_tokens", 100, "--prompts_per_step", 6],
    "train_sft": [*ADAM, "--micro_batch", 1, "--questions_per_image", 3],
}


@pytest.fixture(scope="module")
def plain(place):
    """program -> the folder of its run in one process that holds everything; each is made once."""
    made = {}

    def run_of(program):
        if program not in made:
            name = f"plain-{program}"
            run(
                program,
                [*place(program, name), *SMALL[program]],
                place.folder / f"{name}.log",
                prepare=partial(exactly, gradients=place.folder / f"{name}.gradients"),
            )
            made[program] = place.folder / name
        return made[program]

    return run_of


@pytest.mark.parametrize(
    "program, ranks",
    [
        ("train_grpo", 2),
        pytest.param("train_grpo", 4, marks=pytest.mark.slow),
        pytest.param("train_sft", 2, marks=pytest.mark.slow),
        pytest.param("train_sft", 4, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_is_one_run(place, plain, program, ranks):
    """Losses, gradients, weights and rollouts, with micro-batches so small that ranks have
    different numbers of them; with 4 ranks and 3 prompts an update one has none.
    """
    one, name = plain(program), f"shard-{program}-{ranks}"
    more = ["--activation_checkpointing"] if ranks == 4 else []
    run(
        program,
        [*place(program, name), *SMALL[program], "--shard", *more],
        place.folder / f"{name}.log",
        ranks=ranks,
        prepare=partial(sharded, gradients=place.folder / f"{name}.gradients"),
    )
    filled = [
        int(Path(f"{place.folder / name}.gradients.filled-{rank}").read_text())
        for rank in range(ranks)
    ]
    assert sum(filled) > 0  # else this test would not see what a rank does that has less to do
    gradients = [torch.load(f"{folder}.gradients") for folder in (one, place.folder / name)]
    for update, same in zip(*gradients, strict=True):
        for a, b in zip(update, same, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert_same_run(one, place.folder / name)
    if program == "train_grpo":
        for a, b in zip(rows(one, "rollouts"), rows(place.folder / name, "rollouts"), strict=True):

            def text(step):
                return [
                    [g["id"], [(x["text"], x["reward"]) for x in g["answers"]]]
                    for g in step["groups"]
                ]

            assert text(a) == text(b)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_sft", "train_grpo"])
@pytest.mark.parametrize(
    "before, after", [(2, 1), (1, 2), (2, 3)], ids=["2 to plain", "plain to 2", "2 to 3"]
)
def test_a_run_resumes_sharded_or_not(place, plain, program, before, after):
    """A checkpoint knows nothing of slices: any number of ranks goes on from it, with --shard or
    without, in the same run.
    """
    name = f"resume-{program}-{before}-{after}"
    words = [*place(program, name, "--save_steps", 1), *SMALL[program]]
    for ranks, more in ((before, []), (after, ["--resume"])):
        said = run(
            program,
            [*words, *more, *["--shard"] * (ranks > 1)],
            place.folder / f"{name}-{ranks}.log",
            ranks=ranks,
            prepare=partial(sharded, stop=not more),
        )
        assert ("step-000001" in said and "note: --shard" not in said) == bool(more)
    assert_same_run(plain(program), place.folder / name)


@pytest.mark.slow
def test_a_rank_that_dies_while_the_other_is_inside_a_layer_ends_the_run(place):
    """A gathering that fails, fails in the middle of autograd; it must still end with the message
    and not with a traceback.
    """
    words = [*place("train_grpo", "dead", "--save_steps", 1), *SMALL["train_grpo"], "--shard"]
    assert finish(
        start(
            "train_grpo",
            words,
            place.folder / "dead.log",
            ranks=2,
            prepare=partial(sharded, die=True),
        )
    ) == [1, -9]
    said = (place.folder / "dead.log-0").read_text()
    assert "another rank has died" in said and "step-000001" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "kind, more, said",
    [
        (train_sft.SftArguments, {"lora_rank": 8}, "--shard with --lora_rank"),
        (train_grpo.GrpoArguments, {"freeze": ["language"]}, "--shard with --freeze language"),
        (train_sft.SftArguments, {"optimizer": "muon"}, "--shard with --optimizer muon"),
    ],
)
def test_shard_refuses_what_it_cannot_do(kind, more, said):
    with pytest.raises(ValueError, match=f"{said}.*(leave out|use) --"):
        kind(model="m", train_data="t", output_dir="o", shard=True, **more).check()


def test_a_sharded_pass_that_runs_out_of_memory_is_not_done_again_alone(capsys):
    """Bug to guard against: one rank begins its passes anew with smaller ones, while the others
    wait inside a layer for ever.
    """
    args, tries = SimpleNamespace(micro_tokens=64), []

    def work():
        tries.append(args.micro_tokens)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        retry_smaller_on_oom(args, "micro_tokens", work, alone=False)
    assert tries == [64] and "smaller --micro_tokens" in capsys.readouterr().err
