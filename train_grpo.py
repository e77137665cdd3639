"""Group Relative Policy Optimization (DeepSeekMath 2402.03300) as RadVLM-GRPO (2512.10691) runs it.

    python train_grpo.py --model runs/sft/final --train_data data/phantom/train.jsonl \\
        --task report --output_dir runs/report

One step, the algorithm, is `grpo_step` in minigrpo/grpo.py; the loop in `main` takes the steps,
logs, validates and saves.

The defaults are the paper's. Other papers' settings are files: configs/dapo.yaml, dr_grpo.yaml,
gspo.yaml, cispo.yaml:

    python train_grpo.py configs/dapo.yaml --model runs/sft/final --train_data ...
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import GrpoArguments

if __name__ == "__main__":
    answer_early(GrpoArguments, __doc__)  # what follows takes seconds to import

from minigrpo.data import Sample, ask_to_think
from minigrpo.grpo import grpo_step
from minigrpo.lora import add_adapters
from minigrpo.loss import next_entropy_coef
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from minigrpo.rewards.weights import cache_dir
from minigrpo.run.args import input_errors, parse_args
from minigrpo.run.distributed import ranks, say
from minigrpo.run.guard import check_timeout
from minigrpo.run.loop import Run, join_run, read_samples
from minigrpo.run.node import ArmouredNode
from minigrpo.run.optimizers import grpo_optimizers
from minigrpo.run.plan import explain, plan_grpo
from minigrpo.run.roofline import roofline
from minigrpo.run.shard import shard
from minigrpo.run.validate import mean_reward

LESS_MEMORY = "--micro_tokens, --rollout_rows or --max_pixels, or add --activation_checkpointing"


def main() -> None:
    with input_errors():
        args = parse_args(GrpoArguments, __doc__)
        checkpoint = join_run(args)
        check_timeout(args.reward_timeout)
        if args.prompts_per_step < ranks():
            raise ValueError(
                f"--prompts_per_step {args.prompts_per_step} for {ranks()} processes: each needs a"
                " prompt of its own"
            )
        reward = reward_fn(
            args.reward,
            box_scale=args.box_scale,
            weights_dir=args.reward_weights,
            device=args.reward_device or args.device,
            cache=cache_dir() / "references.sqlite",
        )
        train, validation, left_out = load_data(args, reward)
        if args.plan is not None:
            longest = f"every answer of {args.max_new_tokens} tokens"
            return print(explain(args, partial(plan_grpo, train), longest))
        policy, reference = load_models(args, checkpoint)
        # Thinking's chat template writes the first <think> itself
        reward.template_opens_think = policy.template_opens_think
        data, schedule = train + validation, args.lr_schedule
        run = Run("grpo", args, checkpoint, data, schedule=schedule, best="eval_reward")
        rollouts = run.lines("rollouts.jsonl")

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    (optimizer,) = grpo_optimizers(policy, args)
    node = ArmouredNode(args, run.skipped, roofline(args) if args.roofline else None)
    say(
        f"GRPO: {len(train)} samples ({left_out} left out: --reward covers"
        f" {', '.join(sorted(reward.tasks))}), {args.prompts_per_step} prompts x {args.group_size}"
        f" answers a step, {ranks()} x {args.device}"
    )

    def validate() -> float | None:
        return node.fit("rollout_rows", lambda: mean_reward(policy, validation, reward, args))

    if past := list(run.log.past("entropy_coef")):  # where a run goes on
        args.entropy_coef = next_entropy_coef(
            past[-1], list(run.log.past("entropy"))[-1], args.entropy_target
        )

    with run.training(policy, optimizer, memory=LESS_MEMORY):
        for step in run.steps():
            node.begin(step)
            groups = partial(node.collect, policy, train, reward)
            done = grpo_step(policy, reference, optimizer, groups, args, node)
            if step == run.start and (note := node.scale_note()):
                say(f"note: {note}")
            row = node.row(policy, done)
            if args.entropy_target:
                row["entropy_coef"] = args.entropy_coef
                args.entropy_coef = next_entropy_coef(
                    args.entropy_coef, row["entropy"], args.entropy_target
                )
            rollouts.write({"step": step, "groups": node.rollouts(done)})
            run.end_step(step, row, validate if validation else None, **summary(row))


def summary(row: dict) -> dict[str, str]:
    """What the progress bar shows of a step's figures."""
    kl = {"kl": f"{row['kl']:.4f}"} if "kl" in row else {}
    reward = f"{row.get('reward', math.nan):.3f}"
    return {"reward": reward, **kl, "tokens": f"{row['answer_tokens']:.0f}"}


def load_data(args: GrpoArguments, reward: Callable) -> tuple[list[Sample], list[Sample], int]:
    """The samples that the reward covers, for training and for validation, and the number of
    training samples that it does not cover.
    """
    everything, validation = read_samples(args)
    train = [sample for sample in everything if sample.task in reward.tasks]
    validation = [sample for sample in validation if sample.task in reward.tasks]
    for samples, name in ((train, "train_data"), (validation, "eval_data")):
        if not samples and (file := getattr(args, name)):
            raise ValueError(
                f"--reward {args.reward} covers {', '.join(sorted(reward.tasks))}: no sample of"
                f" --{name} {file} has such a task (--task {args.task})"
            )
    left_out = len(everything) - len(train)
    if args.think:
        train, validation = ask_to_think(train), ask_to_think(validation)
    return train, validation, left_out


def load_models(args: GrpoArguments, checkpoint: Path | None) -> tuple[Policy, Policy | None]:
    """The policy and its frozen reference, None without KL; with adapters they are one model."""

    def load(model: str) -> Policy:
        policy = Policy.from_pretrained(
            model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
        )
        return shard(policy) if args.shard else policy

    if args.lora_rank:
        policy = reference = add_adapters(load(args.model), args, checkpoint)
    else:
        policy, reference = (
            load(checkpoint or args.model),
            load(args.model).freeze() if args.kl_coef else None,
        )
        if reference and [p.shape for p in policy.model.parameters()] != [
            p.shape for p in reference.model.parameters()
        ]:
            raise ValueError(
                f"--model {args.model} has other layers or tokens than {checkpoint}, so it can't be"
                " its reference: resume with the --model that the run was started with"
            )
    return policy, reference


if __name__ == "__main__":
    main()
