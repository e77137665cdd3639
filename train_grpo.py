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
import os
from collections.abc import Callable
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import GrpoArguments

if __name__ == "__main__":
    answer_early(GrpoArguments, __doc__)  # what follows takes seconds to import

import torch
from tqdm import tqdm

from minigrpo.data import Sample, ask_to_think, check_apart, read_jsonl, scale_note
from minigrpo.grpo import grpo_step
from minigrpo.lora import add_adapters
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from minigrpo.rewards.weights import cache_dir
from minigrpo.run.args import input_errors, parse_args
from minigrpo.run.distributed import (
    first,
    in_order,
    join,
    parameters_of_this_rank,
    rank,
    ranks,
    say,
)
from minigrpo.run.folder import last_checkpoint, open_run, run_errors, step_of
from minigrpo.run.guard import Skipped, check_timeout, retry_smaller_on_oom
from minigrpo.run.log import JsonLines, group_rows
from minigrpo.run.node import ArmouredNode
from minigrpo.run.plan import explain, plan_grpo
from minigrpo.run.plots import draw_curves, due
from minigrpo.run.roofline import measure_roofline, note_on_bf16
from minigrpo.run.save import graceful_stop, save_best, save_checkpoint, save_final, stop_early
from minigrpo.run.schedule import learning_rate_at, set_learning_rate
from minigrpo.run.shard import gathered_layers, optimizer_param_groups, shard
from minigrpo.run.state import load_optimizers
from minigrpo.run.track import tracker
from minigrpo.run.validate import mean_reward


def main() -> None:
    with input_errors():
        args = parse_args(GrpoArguments, __doc__)
        join(args.device)  # the other processes of torchrun, if there are any
        check_timeout(args.reward_timeout)
        if args.prompts_per_step < ranks():
            raise ValueError(
                f"--prompts_per_step {args.prompts_per_step} for {ranks()} processes: each needs a"
                " prompt of its own"
            )
        if args.bf16 and (note := note_on_bf16(args.device)):
            say(note)
        checkpoint = last_checkpoint(args)
        reward = reward_fn(
            args.reward,
            box_scale=args.box_scale,
            weights_dir=args.reward_weights,
            device=args.reward_device or args.device,
            cache=cache_dir() / "references.sqlite",
        )
        train, validation, left_out = load_data(args, reward)
        if args.plan is not None:
            return print(
                explain(
                    args,
                    lambda args: plan_grpo(args, train, make_optimizers),
                    f"every answer of {args.max_new_tokens} tokens",
                )
            )

        if args.think:
            train, validation = ask_to_think(train), ask_to_think(validation)
        policy, reference = load_models(args, checkpoint)
        # Thinking's chat template writes the first <think> itself
        reward.template_opens_think = policy.template_opens_think
        start = step_of(checkpoint)
        folder, lock = open_run(args, checkpoint, train + validation)
        folder = folder.absolute()
        metrics = JsonLines(folder / "metrics.jsonl", start)
        rollouts = JsonLines(folder / "rollouts.jsonl", start)

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    (optimizer,) = make_optimizers(policy, args)
    if checkpoint:
        load_optimizers(checkpoint, policy, optimizer)
    skipped, track = (
        Skipped(folder, args, int(sum(metrics.past("skipped_updates")))),
        tracker(args, folder, start),
    )
    best = max(metrics.past("eval_reward"), default=-math.inf)
    say(
        f"GRPO: {len(train)} samples ({left_out} left out: --reward covers"
        f" {', '.join(sorted(reward.tasks))}), {args.prompts_per_step} prompts x {args.group_size}"
        f" answers a step, {ranks()} x {args.device}"
    )
    for note in args.inert():
        say(f"note: {note}")
    limits = (
        measure_roofline(policy.device, torch.bfloat16 if args.bf16 else torch.float32)
        if args.roofline
        else None
    )
    if limits:
        say(
            f"roofline: {limits['tflop_per_second']:.3g} TFLOP/s, {limits['gb_per_second']:.3g}"
            " GB/s"
        )

    node, redraw = ArmouredNode(args, skipped), due()
    memory = "--micro_tokens, --rollout_rows or --max_pixels, or add --activation_checkpointing"
    with lock, run_errors(folder, memory), graceful_stop() as stopping:
        for step in (
            bar := tqdm(
                range(start, args.max_steps),
                initial=start,
                total=args.max_steps,
                desc="grpo",
                disable=not first(),
            )
        ):
            node.begin(step)
            rate = learning_rate_at(
                step, args.max_steps, args.learning_rate, args.warmup, args.lr_schedule
            )
            set_learning_rate([optimizer], rate)
            done = grpo_step(
                policy,
                reference,
                optimizer,
                lambda: node.collect(policy, train, reward),
                args,
                node,
            )
            if step == start and (
                note := scale_note(
                    node.groups.rollout.texts,
                    [s for s in node.groups.samples for _ in range(args.group_size)],
                    reward.template_opens_think,
                    args.box_scale,
                )
            ):
                say(f"note: {note}")

            row = {
                "step": step,
                **node.row(policy, done, reward.template_opens_think, limits),
                "learning_rate": rate,
            }
            if validation and (step + 1) % args.eval_steps == 0:
                with gathered_layers(policy):
                    value = retry_smaller_on_oom(
                        args, "rollout_rows", lambda: mean_reward(policy, validation, reward, args)
                    )
                row |= {} if value is None else {"eval_reward": value}
                if value is not None and value > best:
                    best = value
                    save_best(folder, step + 1, policy)
            metrics.write(row)
            rollouts.write(
                {
                    "step": step,
                    "groups": group_rows(
                        node.groups, in_order(node.mine, done.advantage).flatten(), count=2
                    ),
                }
            )
            track(row)
            kl = {"kl": f"{row['kl']:.4f}"} if "kl" in row else {}
            bar.set_postfix(
                reward=f"{row.get('reward', math.nan):.3f}",
                **kl,
                tokens=f"{row['answer_tokens']:.0f}",
            )
            skipped.stop_if_too_many()
            if code := stopping():
                stop_early(code, folder, step + 1, policy, optimizer, keep=args.keep_checkpoints)
            if (step + 1) % args.save_steps == 0 and step + 1 < args.max_steps:
                save_checkpoint(folder, step + 1, policy, optimizer, keep=args.keep_checkpoints)
            if first() and redraw():
                draw_curves(folder)

        if first():  # before final/, by which --resume knows that nothing is left to do
            draw_curves(folder)
        save_final(folder, args.max_steps, policy, optimizer)
    say(f"saved {folder / 'final'}")


def load_data(args: GrpoArguments, reward: Callable) -> tuple[list[Sample], list[Sample], int]:
    """The samples that the reward covers, for training and for validation, and how many for
    training it does not.
    """
    # Absolute, so that films are found whatever a reward of the user's own does to the working
    # directory.
    found = read_jsonl(os.path.abspath(args.train_data), task=args.task, part=(rank(), ranks()))
    validation = []
    if args.eval_data:
        validation = read_jsonl(
            os.path.abspath(args.eval_data), task=args.task, part=(rank(), ranks())
        )
    names = "--train_data", f"--eval_data {args.eval_data}"
    if shared := check_apart(found, validation, names):
        say(f"note: {shared}")
    validation = [sample for sample in validation if sample.task in reward.tasks]
    train = [sample for sample in found if sample.task in reward.tasks]
    if not train:
        raise ValueError(
            f"--reward {args.reward} covers {', '.join(sorted(reward.tasks))}: no sample of "
            f"{args.train_data} is left (--task {args.task})"
        )
    if args.eval_data and not validation:
        raise ValueError(
            f"--reward {args.reward} covers no sample of --eval_data {args.eval_data} (--task"
            f" {args.task})"
        )
    return train, validation, len(found) - len(train)


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
                " its reference: resume with the --model that the run began with"
            )
    return policy, reference


def make_optimizers(policy: Policy, args: GrpoArguments) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(
            optimizer_param_groups(parameters_of_this_rank(policy.parameters())),
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
        )
    ]


if __name__ == "__main__":
    main()
