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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import minigrpo  # noqa: F401  before torch: it says how OpenMP's threads wait
from minigrpo.data import Sample, ask_to_think
from minigrpo.grpo import grpo_step
from minigrpo.lora import add_adapters
from minigrpo.loss import AGGREGATIONS, ESTIMATORS, RATIO_LEVELS, SCALES, SURROGATES, grpo_loss
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from minigrpo.rewards.weights import cache_dir
from minigrpo.run.args import (
    RunArguments,
    at_least_one,
    check_box_scale,
    checked_device,
    input_errors,
    parse_args,
)
from minigrpo.run.distributed import parameters_of_this_rank, ranks, say
from minigrpo.run.guard import check_timeout
from minigrpo.run.loop import Run, join_run, read_samples
from minigrpo.run.node import ArmouredNode
from minigrpo.run.plan import explain, plan_grpo
from minigrpo.run.roofline import roofline
from minigrpo.run.schedule import SCHEDULES, rise_of
from minigrpo.run.shard import optimizer_param_groups, shard
from minigrpo.run.validate import mean_reward

LESS_MEMORY = "--micro_tokens, --rollout_rows or --max_pixels, or add --activation_checkpointing"


@dataclass
class GrpoArguments(RunArguments):
    reward: str = field(
        default="report=gleu,grounding=soft_f1",
        metadata={
            "help": (
                "a reward, a mix (0.9*soft_f1+0.1*dice), either by task"
                " (report=gleu,grounding=soft_f1), or your own as my_module:my_reward;"
                " docs/rewards.md lists all"
            )
        },
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "help": (
                "folder with the files of the clinical rewards (docs/rewards.md); without it they"
                " come from the Hugging Face hub"
            )
        },
    )
    reward_device: str | None = field(
        default=None,
        metadata={
            "help": "where the clinical rewards run: cpu, cuda:1, ...; without it beside the policy"
        },
    )
    max_unscored: float = field(
        default=0.1,
        metadata={
            "help": (
                "largest share of a step's answers that the reward may fail to score (they are"
                " masked); beyond it the run stops"
            )
        },
    )
    think: bool = field(
        default=False,
        metadata={"help": "put /think behind every question: thinking before the answer"},
    )
    box_scale: float = field(
        default=1.0,
        metadata={
            "help": "what the model's coordinates are divided by: 1000 for an untuned Qwen3-VL"
        },
    )
    prompts_per_step: int = field(
        default=8, metadata={"help": "questions per rollout batch (512 in the paper)"}
    )
    group_size: int = field(default=8, metadata={"help": "answers sampled to each question, G"})
    updates_per_rollout: int = field(
        default=4,
        metadata={"help": "optimiser steps on each rollout batch, each on its own prompts"},
    )
    micro_tokens: int = field(
        default=16384,
        metadata={
            "help": (
                "tokens of prompts and answers in one forward and backward pass, padding included;"
                " a group stays whole. Smaller takes less memory, and changes nothing but rounding"
            )
        },
    )
    rollout_rows: int = field(
        default=1024,
        metadata={
            "help": (
                "answers decoded at once; where a group has ended, a waiting prompt takes its place"
            )
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    temperature: float = field(
        default=1.0, metadata={"help": "of sampling, and so of the log-probs that are trained"}
    )
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": (
                "groups whose rewards are all equal teach nothing: ask other questions in their"
                " place, at most so many times a step (DAPO)"
            )
        },
    )
    soft_overlong: int = field(
        default=0,
        metadata={
            "help": (
                "the last so many tokens before --max_new_tokens cost reward, linearly up to 1"
                " (DAPO eq. 13); 0: no cost"
            )
        },
    )
    overlong_filter: bool = field(
        default=False,
        metadata={
            "help": (
                "keep answers that were cut off out of the loss (DAPO): what they were about to say"
                " was not judged"
            )
        },
    )
    advantage_scale: str = field(
        default="group",
        metadata={
            "help": (
                "what centred rewards are divided by: the group's std (the paper), the whole"
                " batch's, or none (Dr. GRPO). In an easy group the std is small, so `group` weighs"
                " its differences as heavily as those of a hard one"
            ),
            "choices": list(SCALES),
        },
    )
    leave_one_out: bool = field(
        default=False,
        metadata={
            "help": (
                "compare each answer with the mean of the others, which is n / (n - 1) times the"
                " advantage (RLOO); with --advantage_scale none an unbiased policy gradient"
            )
        },
    )
    ratio_level: str = field(
        default="token",
        metadata={
            "help": (
                "one ratio a token, or the geometric mean over the answer (sequence: GSPO, which"
                " clips at --clip_low 3e-4 --clip_high 4e-4, for a mean over hundreds of tokens"
                " hardly moves, and uses --aggregation sequence-mean)"
            ),
            "choices": list(RATIO_LEVELS),
        },
    )
    surrogate: str = field(
        default="clip",
        metadata={
            "help": (
                "clip: beyond the clip a token has no gradient (PPO); cispo: all keep theirs, with"
                " the ratio as a bounded weight (MiniMax-M1)"
            ),
            "choices": list(SURROGATES),
        },
    )
    clip_low: float = field(default=0.2, metadata={"help": "the ratio may fall to 1 - clip_low"})
    clip_high: float = field(
        default=0.28, metadata={"help": "the ratio may rise to 1 + clip_high (DAPO's clip-higher)"}
    )
    dual_clip: float = field(
        default=3.0,
        metadata={"help": "bound of the ratio where the advantage is negative; 0: none"},
    )
    cispo_cap: float = field(
        default=5.0,
        metadata={"help": "largest weight with --surrogate cispo; its own, not the clip's"},
    )
    rollout_cap: float = field(
        default=0.0,
        metadata={
            "help": (
                "for a sampler whose probabilities are not exactly the trainer's (bf16, another"
                " engine): score the answers once more before the updates and weigh each token by"
                " min(pi_old / pi_sampler, rollout_cap), usually 2 (truncated importance weights,"
                " 1802.01561); 0: trust the sampler's log-probs"
            )
        },
    )
    kl_coef: float = field(
        default=0.01,
        metadata={
            "help": (
                "weight of the KL to the frozen reference; 0: no reference is kept and no KL logged"
            )
        },
    )
    kl_estimator: str = field(
        default="k3", metadata={"help": "per-token estimate of the KL", "choices": list(ESTIMATORS)}
    )
    kl_ratio: bool = field(
        default=False,
        metadata={
            "help": (
                "multiply the estimate by the ratio, which makes the gradient that of KL(policy ||"
                " reference) (DeepSeek-V3.2)"
            )
        },
    )
    aggregation: str = field(
        default="token-mean",
        metadata={
            "help": (
                "mean over the update's tokens (DAPO, the paper), over answers of their own means"
                " (DeepSeekMath: tokens of long answers count less), or the sum over answers x"
                " --max_new_tokens, a constant (Dr. GRPO)"
            ),
            "choices": list(AGGREGATIONS),
        },
    )
    reward_timeout: float = field(
        default=600.0,
        metadata={
            "help": (
                "seconds that the reward may take for a step's answers. Where it takes longer, each"
                " group is asked alone, for as long again in all, and groups without an answer are"
                " masked"
            )
        },
    )
    learning_rate: float = field(
        default=1e-6, metadata={"help": "peak; 1e-6 in the paper, about 1e-4 for a tiny model"}
    )
    warmup: float = field(
        default=0.0,
        metadata={"help": "share of the steps over which the learning rate rises; 0 in the paper"},
    )
    lr_schedule: str = field(
        default="constant",
        metadata={
            "help": (
                "the learning rate after the warm-up: at its peak throughout (the paper), or"
                " falling to a tenth along a line or half a cosine; of --max_steps, all updates of"
                " a step alike"
            ),
            "choices": list(SCHEDULES),
        },
    )
    roofline: bool = field(
        default=False,
        metadata={
            "help": (
                "measure at the start what the machine can do, and log which share of it each phase"
                " reaches"
            )
        },
    )

    def check(self) -> None:
        super().check()
        for name in (
            "prompts_per_step",
            "group_size",
            "updates_per_rollout",
            "micro_tokens",
            "rollout_rows",
            "max_new_tokens",
        ):
            at_least_one(self, name)
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(
                f"--prompts_per_step {self.prompts_per_step} must be a multiple of"
                f" --updates_per_rollout {self.updates_per_rollout}, so that every update has as"
                " many prompts"
            )
        if self.reward_timeout <= 0:
            raise ValueError(f"--reward_timeout must be above 0 seconds, got {self.reward_timeout}")
        if self.group_size < 2:
            raise ValueError(
                "--group_size must be at least 2: an answer alone has no group to be better than"
            )
        check_box_scale(self.box_scale)
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be above 0, got {self.temperature}: greedy answers of a group"
                " are all equal"
            )
        for name in (
            "dynamic_sampling",
            "soft_overlong",
            "dual_clip",
            "cispo_cap",
            "rollout_cap",
            "kl_coef",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.kl_coef == math.inf:
            raise ValueError(
                "--kl_coef inf: nothing but the KL would count, and the loss would be NaN"
            )
        if self.soft_overlong > self.max_new_tokens:
            raise ValueError(
                f"--soft_overlong {self.soft_overlong} is longer than the longest answer, "
                f"--max_new_tokens {self.max_new_tokens}"
            )
        if self.reward_device:
            self.reward_device = checked_device(self.reward_device, "--reward_device")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(
                f"--max_unscored must lie in 0..1, got {self.max_unscored}: it is a share of the"
                " answers"
            )
        if self.cispo_cap == 0:
            raise ValueError("--cispo_cap must be above 0: it is the largest weight of a token")
        one = torch.zeros(1, 1)
        # the loss knows which settings contradict
        grpo_loss(one, one, one[0], one, ref_logprob=one, **self.loss_settings())

    def advantage_settings(self) -> dict:
        """What `group_advantages` is told at every step."""
        return dict(scale=self.advantage_scale, leave_one_out=self.leave_one_out)

    def loss_settings(self) -> dict:
        """What `grpo_loss` is told at every update."""
        return dict(
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_ratio=self.kl_ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip or None,
            ratio_level=self.ratio_level,
            surrogate=self.surrogate,
            cispo_cap=self.cispo_cap,
            rollout_cap=self.rollout_cap,
            aggregation=self.aggregation,
            max_tokens=self.max_new_tokens,
        )

    def inert(self) -> list[str]:
        clip, rise = self.surrogate == "clip", rise_of(self.max_steps, self.warmup)
        notes = [
            (
                self.updates_per_rollout == 1,
                (
                    "--updates_per_rollout 1: the ratio is 1 by construction, so --ratio_level,"
                    " --surrogate, the clips and --cispo_cap change nothing"
                ),
            ),
            (
                self.kl_coef == 0
                and (self.kl_ratio or self.kl_estimator != GrpoArguments.kl_estimator),
                "--kl_coef 0: no KL is computed, so --kl_estimator and --kl_ratio are not used",
            ),
            (
                self.kl_coef > 0 and self.kl_estimator == "k1" and not self.kl_ratio,
                (
                    "--kl_estimator k1 without --kl_ratio: its expected gradient on-policy is 0, so"
                    " it holds nothing"
                ),
            ),
            (not clip, "--surrogate cispo: --clip_low, --clip_high and --dual_clip are not used"),
            (
                clip and self.cispo_cap != GrpoArguments.cispo_cap,
                f"--surrogate clip: --cispo_cap {self.cispo_cap} is not used",
            ),
            (
                clip and not self.dual_clip,
                "--dual_clip 0: nothing bounds the ratio where the advantage is negative",
            ),
            (
                self.warmup > 0 and rise == 1,
                (
                    f"--warmup {self.warmup} of --max_steps {self.max_steps} is one step at most,"
                    " so the first step is at the peak already"
                ),
            ),
            (
                self.lr_schedule != "constant" and self.max_steps - rise <= 1,
                (
                    f"--lr_schedule {self.lr_schedule}: no step is left behind "
                    "the warm-up and the peak, so the learning rate never falls"
                ),
            ),
            (
                self.ratio_level == "sequence" and min(self.clip_low, self.clip_high) > 0.01,
                (
                    "--ratio_level sequence: a mean over the answer hardly moves and will not meet"
                    f" --clip_low {self.clip_low} or --clip_high {self.clip_high}; GSPO has 3e-4"
                    " and 4e-4"
                ),
            ),
            (
                (prompts := self.prompts_per_step // self.updates_per_rollout) < ranks(),
                (
                    f"{prompts} prompts an update for {ranks()} processes: some wait for the"
                    " others; raise --prompts_per_step or lower --updates_per_rollout"
                ),
            ),
        ]
        return super().inert() + [note for holds, note in notes if holds]


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
            return print(explain(args, partial(plan_grpo, train, make_optimizers), longest))
        policy, reference = load_models(args, checkpoint)
        # Thinking's chat template writes the first <think> itself
        reward.template_opens_think = policy.template_opens_think
        data, schedule = train + validation, args.lr_schedule
        run = Run("grpo", args, checkpoint, data, schedule=schedule, best="eval_reward")
        rollouts = run.lines("rollouts.jsonl")

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    (optimizer,) = make_optimizers(policy, args)
    node = ArmouredNode(args, run.skipped, roofline(args) if args.roofline else None)
    say(
        f"GRPO: {len(train)} samples ({left_out} left out: --reward covers"
        f" {', '.join(sorted(reward.tasks))}), {args.prompts_per_step} prompts x {args.group_size}"
        f" answers a step, {ranks()} x {args.device}"
    )

    def validate() -> float | None:
        return node.fit("rollout_rows", lambda: mean_reward(policy, validation, reward, args))

    with run.training(policy, optimizer, memory=LESS_MEMORY):
        for step in run.steps():
            node.begin(step)
            groups = partial(node.collect, policy, train, reward)
            done = grpo_step(policy, reference, optimizer, groups, args, node)
            if step == run.start and (note := node.scale_note()):
                say(f"note: {note}")
            row = node.row(policy, done)
            rollouts.write({"step": step, "groups": node.rollouts(done)})
            run.end_step(step, row, validate if validation else None, **summary(row))


def summary(row: dict) -> dict[str, str]:
    """What the progress bar shows of a step's figures."""
    kl = {"kl": f"{row['kl']:.4f}"} if "kl" in row else {}
    reward = f"{row.get('reward', math.nan):.3f}"
    return {"reward": reward, **kl, "tokens": f"{row['answer_tokens']:.0f}"}


def load_data(args: GrpoArguments, reward: Callable) -> tuple[list[Sample], list[Sample], int]:
    """The samples that the reward covers, for training and for validation, and how many for
    training it does not.
    """
    everything, validation = read_samples(args)
    train = [sample for sample in everything if sample.task in reward.tasks]
    validation = [sample for sample in validation if sample.task in reward.tasks]
    for samples, name in ((train, "train_data"), (validation, "eval_data")):
        if not samples and (file := getattr(args, name)):
            raise ValueError(
                f"--reward {args.reward} covers {', '.join(sorted(reward.tasks))}: no sample of "
                f"--{name} {file} is left (--task {args.task})"
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
