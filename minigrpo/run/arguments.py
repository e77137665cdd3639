"""The arguments of the programs, and the checks on them that need no model.

Imports no torch, so that a misspelt argument is reported at once. The checks that need torch are
in `check_with_torch`.
"""

import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minigrpo.choices import (
    AGGREGATIONS,
    ESTIMATORS,
    OUTSIDES,
    RATIO_LEVELS,
    SCALES,
    SCHEDULES,
    SURROGATES,
    TASKS,
)
from minigrpo.own import own_function
from minigrpo.packages import need
from minigrpo.run.args import at_least_one, check_box_scale, check_pixels, checked_device
from minigrpo.run.schedule import rise_of

PARTS = ("vision", "projector", "language")  # of a Qwen3-VL, to freeze
TRACKERS = ("tensorboard", "wandb")  # named like the packages that they need
LARGEST_SEED = 2**40
# the language model's, for adapters
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The help of the three programs below: every argument in one group.
OF_SURROGATES = ("clip_low", "clip_high", "dual_clip", "cispo_cap", "dppo_delta")
OF_SURROGATES += ("sapo_tau_up", "sapo_tau_down")

GROUPS = {
    "data": ["train_data", "eval_data", "data", "task", "task_weights", "max_pixels"],
    "model": ["model", "predictions", "baseline", "freeze", "lora_rank", "lora_alpha"]
    + ["lora_targets", "think", "template_opens_think", "box_scale"],
    "sampling": ["prompts_per_step", "group_size", "max_new_tokens", "temperature"]
    + ["dynamic_sampling"],
    "reward": ["reward", "reward_weights", "reward_device", "reward_timeout", "max_unscored"]
    + ["soft_overlong"],
    "loss": ["kl_coef", "kl_estimator", "kl_ratio", "clip_low", "clip_high", "dual_clip"]
    + ["ratio_level", "surrogate", "cispo_cap", "dppo_delta", "sapo_tau_up", "sapo_tau_down"]
    + ["entropy_coef", "entropy_target", "rollout_cap", "rollout_floor", "rollout_outside"]
    + ["rollout_level", "off_policy_delta", "aggregation", "overlong_filter"]
    + ["advantage_scale", "leave_one_out", "length_baseline"],
    "optimiser": ["learning_rate", "warmup", "lr_schedule", "batch_size", "updates_per_rollout"]
    + ["optimizer", "beta2", "weight_decay", "grad_clip", "max_grad_norm", "max_skipped"],
    "memory": ["bf16", "micro_batch", "micro_tokens", "rollout_rows", "questions_per_image"]
    + ["activation_checkpointing", "shard", "plan"],
    "run": ["output_dir", "max_steps", "eval_steps", "save_steps", "keep_checkpoints", "resume"]
    + ["seed", "device", "track", "published", "report_items", "roofline"],
}
COMMON = {  # what --help shows; --help-all shows the rest, too
    *("train_data", "eval_data", "data", "task", "max_pixels", "model", "predictions", "baseline"),
    *("freeze", "lora_rank", "think", "prompts_per_step", "group_size", "max_new_tokens"),
    *("temperature", "reward", "reward_weights", "kl_coef", "aggregation", "learning_rate"),
    *("batch_size", "updates_per_rollout", "bf16", "micro_batch", "micro_tokens", "plan"),
    *("output_dir", "max_steps", "eval_steps", "save_steps", "resume", "seed", "device"),
}


@dataclass
class RunArguments:
    """What every training program takes; each adds a learning rate and a warm-up of its own."""

    groups, common = GROUPS, COMMON

    model: str = field(
        metadata={
            "help": (
                "checkpoint folder or hub name of a dense Qwen3-VL; train_sft.py also takes `tiny`,"
                " a small random one"
            )
        }
    )
    train_data: str = field(metadata={"help": "JSONL file of training samples"})
    output_dir: str = field(
        metadata={
            "help": (
                "new run folder: args.json, starts.jsonl, metrics.jsonl, curves.png,"
                " checkpoints/, final/"
            )
        }
    )
    task: str = field(
        default="all",
        metadata={"help": "train on samples of this task only", "choices": [*TASKS, "all"]},
    )
    max_steps: int = field(
        default=300, metadata={"help": "optimisation steps (for GRPO: rollout batches)"}
    )
    save_steps: int = field(
        default=50, metadata={"help": "save a checkpoint, to resume from, every N steps"}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"help": "how many of the newest checkpoints to keep"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": (
                "JSONL file of validation samples; the weights that score best on it are kept in"
                " best/"
            )
        },
    )
    eval_steps: int = field(
        default=50, metadata={"help": "validate every N steps, if --eval_data is given"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decoupled weight decay"})
    grad_clip: float = field(
        default=1.0, metadata={"help": "gradients with a larger norm are scaled down to this one"}
    )
    max_grad_norm: float = field(
        default=1e4,
        metadata={
            "help": (
                "updates whose gradient norm is above this, or NaN, are skipped and their batches"
                " kept in skipped/"
            )
        },
    )
    max_skipped: int = field(
        default=10, metadata={"help": "stop the run once this many updates have been skipped"}
    )
    track: list[str] = field(
        default_factory=list,
        metadata={"help": "also log to these, which must be installed", "choices": list(TRACKERS)},
    )
    seed: int = field(
        default=0,
        metadata={"help": "seeds the data order, sampling and, for --model tiny, the weights"},
    )
    resume: bool = field(
        default=False, metadata={"help": "continue the run in output_dir from its last checkpoint"}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is a GPU"}
    )
    max_pixels: int = field(
        default=0,
        metadata={
            "help": (
                "larger images are shrunk to this many pixels, later too, as the checkpoint stores"
                " the number; 1,024 pixels are a token (the paper: 262144); 0: the limit of --model"
            )
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": (
                "parts not to train: the vision tower, the projector after it, the language model;"
                " cheaper, and less is forgotten"
            ),
            "choices": list(PARTS),
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": (
                "train adapters of this rank instead of the weights (LoRA, 2106.09685; needs peft);"
                " 0: off. GRPO's reference is then the model with its adapters off. Adapters need"
                " a learning rate about ten times as high"
            )
        },
    )
    lora_alpha: float = field(
        default=32.0, metadata={"help": "adapters are scaled by lora_alpha / lora_rank"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: list(LINEAR),
        metadata={
            "help": "linear layers of the language model that get adapters",
            "choices": list(LINEAR),
        },
    )
    bf16: bool = field(
        default=False, metadata={"help": "compute in bfloat16 (weights and optimiser stay in fp32)"}
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata={
            "help": (
                "keep only the input of each layer, and recompute the rest in the backward pass:"
                " less memory, more time"
            )
        },
    )
    shard: bool = field(
        default=False,
        metadata={
            "help": (
                "under torchrun, shard the decoder layers across the ranks (FSDP2): for full"
                " fine-tuning of 8B on 80 GB cards; slower"
            )
        },
    )
    plan: float | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": 0.0,
            "metavar": "GB",
            "help": (
                "load nothing: print how much memory the run will need, and settings that fit into"
                " the memory at hand, or into GB"
            ),
        },
    )

    def check(self) -> None:
        """Settings that can't work are an error at once, not after hours."""
        for name, value in vars(self).items():
            if value != value:  # NaN passes every test for being too small or too large
                raise ValueError(f"--{name} is nan: give it a number")
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(
                f"--seed {self.seed} is too large: the seeds of epochs and steps are derived from"
                f" it; at most {LARGEST_SEED}"
            )
        for name in ("max_steps", "save_steps", "keep_checkpoints", "eval_steps", "max_skipped"):
            at_least_one(self, name)
        for name in ("learning_rate", "grad_clip"):  # a clip at 0 would zero every gradient
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(
                f"--warmup must be between 0 and 1, got {self.warmup}: it is a share of the steps"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight_decay must be 0 or more, got {self.weight_decay}")
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"--max_grad_norm must be above 0, got {self.max_grad_norm}: updates with a larger"
                " norm are skipped"
            )
        for name in self.track:
            need(f"--track {name}", name)
        if self.eval_data and os.path.realpath(self.eval_data) == os.path.realpath(self.train_data):
            raise ValueError(
                f"--eval_data {self.eval_data} is the training data: best/ would keep the weights"
                " that have memorised it. Hold some patients out"
            )
        check_pixels(self.max_pixels)
        if self.plan is not None and (self.model == "tiny" or not 0 <= self.plan < math.inf):
            raise ValueError(
                "--plan needs a checkpoint as --model: a tiny model fits anywhere"
                if self.model == "tiny"
                else f"--plan takes the memory of a device in GB, got {self.plan}"
            )
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must be 0 (off) or more, got {self.lora_rank}")
        if set(self.freeze) == set(PARTS):
            raise ValueError(f"--freeze {' '.join(self.freeze)}: nothing is left to train")
        if self.shard and (self.lora_rank or "language" in self.freeze):
            raise ValueError(
                f"--shard with {'--lora_rank' if self.lora_rank else '--freeze language'}: it is"
                " for layers that are trained, and here they are frozen; leave out --shard"
            )
        if self.lora_rank:
            need("--lora_rank", "peft")
            if self.lora_alpha <= 0:
                raise ValueError(
                    f"--lora_rank {self.lora_rank} needs --lora_alpha above 0, got"
                    f" {self.lora_alpha}"
                )
            if "language" in self.freeze:
                raise ValueError(
                    "--freeze language with --lora_rank: the adapters are in the language model,"
                    " and everything else is frozen already; leave out --freeze"
                )
        elif self.lora_alpha != RunArguments.lora_alpha or self.lora_targets != list(LINEAR):
            raise ValueError(
                "--lora_alpha and --lora_targets are only for adapters: add --lora_rank, or leave"
                " them out to train the weights"
            )

    def check_with_torch(self) -> None:
        """Resolve --device, which must exist."""
        self.device = checked_device(self.device)

    def inert(self) -> list[str]:
        """Settings that have no effect, given the others; logged once, so that nobody tunes
        them.
        """
        from minigrpo.run.distributed import ranks  # imports torch

        notes = [
            (
                self.eval_data and self.eval_steps > self.max_steps,
                (
                    f"--eval_steps {self.eval_steps} is above --max_steps {self.max_steps}: "
                    "--eval_data is never used, and nothing is kept in best/"
                ),
            ),
            (
                self.shard and ranks() == 1,
                "--shard: one process holds all layers; start several with torchrun",
            ),
        ]
        return [note for holds, note in notes if holds]


@dataclass
class SftArguments(RunArguments):
    batch_size: int = field(
        default=8, metadata={"help": "images per optimisation step, each with all its questions"}
    )
    questions_per_image: int = field(
        default=8, metadata={"help": "at most this many questions about one image share a pass"}
    )
    micro_batch: int = field(
        default=8,
        metadata={"help": "images per forward and backward pass: as many as fit in memory"},
    )
    task_weights: str = field(
        default="",
        metadata={
            "help": (
                "weight of each token in the answers of a task, such as report=2; 1 for the other"
                " tasks. The paper repeats its smaller data sets instead, which costs time"
            )
        },
    )
    learning_rate: float = field(
        default=1e-5,
        metadata={
            "help": (
                "peak; it decays to a tenth along half a cosine; 1e-5 in the paper, about 1e-3 for"
                " --model tiny"
            )
        },
    )
    warmup: float = field(
        default=0.03, metadata={"help": "share of the steps over which the learning rate rises"}
    )
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": (
                "muon (for matrices; AdamW for the rest) needs half the steps from random weights:"
                " for --model tiny"
            ),
            "choices": ["adamw", "muon"],
        },
    )
    beta2: float = field(
        default=0.999,
        metadata={"help": "AdamW's decay rate of squared gradients; 0.98 for short runs"},
    )

    def check(self) -> None:
        super().check()
        for name in ("batch_size", "questions_per_image", "micro_batch"):
            at_least_one(self, name)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--beta2 must be at least 0 and below 1, got {self.beta2}")
        parse_weights(self.task_weights)
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "--shard with --optimizer muon: Muon needs whole matrices, and each rank has only"
                " slices; use --optimizer adamw"
            )
        if self.lora_rank and self.model == "tiny":
            raise ValueError(
                "--lora_rank with --model tiny: adapters on random weights learn nothing; train the"
                " whole model first"
            )


def parse_weights(text: str) -> dict[str, float]:
    """ "report=2,grounding=1" -> {"report": 2.0, "grounding": 1.0}."""
    weights = {}
    for piece in filter(None, text.split(",")):
        task, _, weight = (part.strip() for part in piece.partition("="))
        if (
            task not in TASKS
            or task in weights
            or not re.fullmatch(r"\d*\.?\d+", weight, re.ASCII)
            or not float(weight)
        ):
            raise ValueError(
                f"--task_weights {text!r}: {piece!r} is not task=weight; the weight must be above"
                f" 0, and the task one of {', '.join(TASKS)}, named once"
            )
        weights[task] = float(weight)
    return weights


@dataclass
class GrpoArguments(RunArguments):
    reward: str = field(
        default="report=gleu,grounding=soft_f1",
        metadata={
            "help": (
                "a reward, a mix (0.9*soft_f1+0.1*dice), one for each task"
                " (report=gleu,grounding=soft_f1), or your own as my_module:my_reward;"
                " docs/rewards.md lists them all"
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
            "help": "where the clinical rewards run: cpu, cuda:1, ...; default: as the policy"
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
        metadata={"help": "append /think to every question, to ask for thinking before the answer"},
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
    group_size: int = field(default=8, metadata={"help": "answers sampled for each question, G"})
    updates_per_rollout: int = field(
        default=4,
        metadata={"help": "optimiser steps on each rollout batch, each on its own prompts"},
    )
    micro_tokens: int = field(
        default=16384,
        metadata={
            "help": (
                "tokens of prompts and answers in one forward and backward pass, padding included;"
                " groups are not split. A smaller number takes less memory and changes only"
                " rounding"
            )
        },
    )
    rollout_rows: int = field(
        default=1024,
        metadata={
            "help": (
                "answers decoded at once; when a group has finished, the next prompt takes its"
                " place"
            )
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    temperature: float = field(
        default=1.0, metadata={"help": "of sampling, and also of the log-probs that are trained"}
    )
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": (
                "groups whose rewards are all equal teach nothing: replace them with other"
                " questions, at most N times a step (DAPO); 0: never"
            )
        },
    )
    soft_overlong: int = field(
        default=0,
        metadata={
            "help": (
                "the last N tokens before --max_new_tokens cost reward, linearly up to 1"
                " (DAPO eq. 13); 0: no cost"
            )
        },
    )
    overlong_filter: bool = field(
        default=False,
        metadata={
            "help": (
                "leave answers that were cut off out of the loss (DAPO), as the reward did not see"
                " how they end"
            )
        },
    )
    advantage_scale: str = field(
        default="group",
        metadata={
            "help": (
                "what centred rewards are divided by: the group's std (the paper), the whole"
                " batch's, the group's mean (MaxRL), or none (Dr. GRPO). In an easy group the std"
                " is small, so `group` weighs its differences as heavily as those of a hard one."
                " decoupled: each reward of a mix by its own std in the group, their sum by the"
                " batch's (GDPO)"
            ),
            "choices": [*SCALES, "decoupled"],
        },
    )
    leave_one_out: bool = field(
        default=False,
        metadata={
            "help": (
                "compare each answer with the mean of the others, which multiplies the advantage"
                " by n / (n - 1) (RLOO); with --advantage_scale none an unbiased policy gradient"
            )
        },
    )
    length_baseline: bool = field(
        default=False,
        metadata={
            "help": (
                "compare each answer with the group's mean weighed by the answers' lengths (OPO,"
                " with --advantage_scale none)"
            )
        },
    )
    ratio_level: str = field(
        default="token",
        metadata={
            "help": (
                "one ratio per token, or their geometric mean over the answer (sequence: GSPO; a"
                " mean over hundreds of tokens hardly moves, so it uses --clip_low 3e-4 --clip_high"
                " 4e-4, with --aggregation sequence-mean)"
            ),
            "choices": list(RATIO_LEVELS),
        },
    )
    surrogate: str = field(
        default="clip",
        metadata={
            "help": (
                "clip: beyond the clip a token has no gradient (PPO); cispo: all keep theirs, with"
                " the ratio as a bounded weight (MiniMax-M1); dppo: none once the token's"
                " probability has moved too far; sapo: it fades away from ratio 1; or your own, as"
                " module:function"
            )
        },
    )
    clip_low: float = field(default=0.2, metadata={"help": "the ratio may fall to 1 - clip_low"})
    clip_high: float = field(
        default=0.28, metadata={"help": "the ratio may rise to 1 + clip_high (DAPO's clip-higher)"}
    )
    dual_clip: float = field(
        default=3.0, metadata={"help": "largest ratio where the advantage is negative; 0: no bound"}
    )
    cispo_cap: float = field(
        default=5.0,
        metadata={"help": "largest weight with --surrogate cispo; its own, not the clip's"},
    )
    dppo_delta: float = field(
        default=0.2,
        metadata={"help": "how far a probability may move with --surrogate dppo, 0 to 1"},
    )
    sapo_tau_up: float = field(
        default=1.0,
        metadata={"help": "how fast the gradient fades with --surrogate sapo, where A > 0"},
    )
    sapo_tau_down: float = field(default=1.05, metadata={"help": "the same, where A is negative"})
    entropy_coef: float = field(
        default=0.0,
        metadata={"help": "weight of an entropy bonus in the loss; 0: none, as in the paper"},
    )
    entropy_target: float = field(
        default=0.0,
        metadata={
            "help": (
                "raise --entropy_coef by 0.005 a step while the entropy in nats per token is below"
                " this, and lower it above (Skywork-OR1); 0: keep it fixed"
            )
        },
    )
    rollout_floor: float = field(
        default=0.0, metadata={"help": "smallest weight with --rollout_cap (IcePop: 0.5)"}
    )
    rollout_outside: str = field(
        default="cut",
        metadata={
            "help": (
                "a weight beyond --rollout_cap or --rollout_floor is cut to it, or the token"
                " dropped (IcePop; with --rollout_level sequence the answer)"
            ),
            "choices": list(OUTSIDES),
        },
    )
    rollout_level: str = field(
        default="token",
        metadata={
            "help": "one weight with --rollout_cap for each token, or their product over an answer",
            "choices": list(RATIO_LEVELS),
        },
    )
    off_policy_delta: float = field(
        default=0.0,
        metadata={
            "help": (
                "leave out bad answers (A below 0) of which the policy has moved away by more nats"
                " per token (DeepSeek-V3.2); 0: none"
            )
        },
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
                "weight of the KL to the frozen reference; 0: no reference is loaded, no KL logged"
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
                "multiply the estimate by the ratio, so that its gradient is that of KL(policy ||"
                " reference) (DeepSeek-V3.2)"
            )
        },
    )
    aggregation: str = field(
        default="token-mean",
        metadata={
            "help": (
                "mean over all tokens of the update (DAPO, the paper), mean over answers of their"
                " means (DeepSeekMath: tokens of long answers count less), or the sum divided by a"
                " constant, answers x --max_new_tokens (Dr. GRPO)"
            ),
            "choices": list(AGGREGATIONS),
        },
    )
    reward_timeout: float = field(
        default=600.0,
        metadata={
            "help": (
                "seconds that the reward may take for a step's answers. If it takes longer, each"
                " group is scored by itself, with as long again for all, and groups without a score"
                " are masked"
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
                "the learning rate after the warm-up: constant (the paper), or decaying to a tenth"
                " over --max_steps along a line or half a cosine; the same for all updates of a"
                " step"
            ),
            "choices": list(SCHEDULES),
        },
    )
    roofline: bool = field(
        default=False,
        metadata={
            "help": (
                "measure the speed of the machine at the start, and log the share of it that each"
                " phase reaches"
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
                f" --updates_per_rollout {self.updates_per_rollout}, so that every update has the"
                " same number of prompts"
            )
        if self.reward_timeout <= 0:
            raise ValueError(f"--reward_timeout must be above 0 seconds, got {self.reward_timeout}")
        if self.group_size < 2:
            raise ValueError(
                "--group_size must be at least 2: a single answer has nothing to be compared with"
            )
        check_box_scale(self.box_scale)
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be above 0, got {self.temperature}: greedy answers to a"
                " question are all equal"
            )
        for name in (
            "dynamic_sampling",
            "soft_overlong",
            "dual_clip",
            "cispo_cap",
            "rollout_cap",
            "rollout_floor",
            "kl_coef",
            "entropy_coef",
            "entropy_target",
            "off_policy_delta",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.surrogate not in SURROGATES and ":" not in self.surrogate:
            raise ValueError(
                f"--surrogate {self.surrogate!r}: choose one of {', '.join(SURROGATES)}, or your"
                " own as module:function"
            )
        if self.leave_one_out and self.length_baseline:
            raise ValueError("--leave_one_out and --length_baseline are two baselines: choose one")
        if self.kl_coef == math.inf:
            raise ValueError(
                "--kl_coef inf: nothing but the KL would count, and the loss would be NaN"
            )
        if self.soft_overlong > self.max_new_tokens:
            raise ValueError(
                f"--soft_overlong {self.soft_overlong} is longer than the longest answer, "
                f"--max_new_tokens {self.max_new_tokens}"
            )
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(
                f"--max_unscored must be between 0 and 1, got {self.max_unscored}: it is a share of"
                " the answers"
            )
        if self.cispo_cap == 0:
            raise ValueError("--cispo_cap must be above 0: it is the largest weight of a token")

    def check_with_torch(self) -> None:
        """Check the devices, and let the loss reject settings that contradict each other."""
        import torch

        from minigrpo.loss import grpo_loss

        super().check_with_torch()
        if self.reward_device:
            self.reward_device = checked_device(self.reward_device, "--reward_device")
        one, given = torch.zeros(1, 1), {"rollout_logprob": None}
        if self.rollout_cap:
            given = {"rollout_logprob": one}
        grpo_loss(
            one, one, one[0], one, ref_logprob=one, entropy=one, **given, **self.loss_settings()
        )

    def loss_settings(self) -> dict:
        """What `grpo_loss` is told at every update."""
        from minigrpo.surrogates import surrogate_settings

        surrogate = self.surrogate
        if surrogate not in SURROGATES:
            takes = "(ratio, advantage, logprob, old_logprob)"
            surrogate = own_function(surrogate, f"--surrogate {surrogate}", takes)
        values = asdict(self) | {"dual_clip": self.dual_clip or None}
        own = {name: values[name] for name in surrogate_settings(surrogate) if name in values}
        return own | dict(
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_ratio=self.kl_ratio,
            ratio_level=self.ratio_level,
            surrogate=surrogate,
            entropy_coef=self.entropy_coef,
            rollout_level=self.rollout_level,
            rollout_floor=self.rollout_floor,
            rollout_cap=self.rollout_cap,
            rollout_outside=self.rollout_outside,
            off_policy_delta=self.off_policy_delta or None,
            aggregation=self.aggregation,
            max_tokens=self.max_new_tokens,
        )

    def inert(self) -> list[str]:
        from minigrpo.run.distributed import ranks  # imports torch

        rise = rise_of(self.max_steps, self.warmup)
        used = self.loss_settings()
        unused = [
            name
            for name in OF_SURROGATES
            if name not in used and getattr(self, name) != getattr(GrpoArguments, name)
        ]
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
                    " it does not hold the policy back"
                ),
            ),
            (
                bool(unused),
                f"--surrogate {self.surrogate}: --{', --'.join(unused)}"
                f" {'are' if len(unused) > 1 else 'is'} not used",
            ),
            (
                not self.rollout_cap
                and (self.rollout_floor, self.rollout_outside, self.rollout_level)
                != (0, "cut", "token"),
                (
                    "--rollout_cap 0: the sampler's log-probs are trusted, so --rollout_floor,"
                    " --rollout_outside and --rollout_level are not used"
                ),
            ),
            (
                self.advantage_scale == "decoupled"
                and (self.leave_one_out or self.length_baseline),
                "--advantage_scale decoupled: --leave_one_out and --length_baseline are not used",
            ),
            (
                self.surrogate == "clip" and not self.dual_clip,
                "--dual_clip 0: nothing bounds the ratio where the advantage is negative",
            ),
            (
                self.warmup > 0 and rise == 1,
                (
                    f"--warmup {self.warmup} of --max_steps {self.max_steps} is at most one step,"
                    " so the first step is at the peak already"
                ),
            ),
            (
                self.lr_schedule != "constant" and self.max_steps - rise <= 1,
                (
                    f"--lr_schedule {self.lr_schedule}: no step is left after "
                    "the warm-up and the peak, so the learning rate never decays"
                ),
            ),
            (
                self.surrogate == "clip"
                and self.ratio_level == "sequence"
                and min(self.clip_low, self.clip_high) > 0.01,
                (
                    "--ratio_level sequence: a mean over the answer hardly moves and will not reach"
                    f" --clip_low {self.clip_low} or --clip_high {self.clip_high}; GSPO uses 3e-4"
                    " and 4e-4"
                ),
            ),
            (
                (prompts := self.prompts_per_step // self.updates_per_rollout) < ranks(),
                (
                    f"{prompts} prompts per update for {ranks()} processes: some will be idle;"
                    " raise --prompts_per_step or lower --updates_per_rollout"
                ),
            ),
        ]
        return super().inert() + [note for holds, note in notes if holds]


@dataclass
class EvaluateArguments:
    groups, common = GROUPS, COMMON

    data: str = field(metadata={"help": "JSONL file of test samples"})
    output_dir: str = field(
        metadata={
            "help": (
                "folder to create: predictions.jsonl, metrics.json, table.md, report.html,"
                " samples.png"
            )
        }
    )
    model: str | None = field(
        default=None, metadata={"help": "checkpoint folder, hub name, or `constant`"}
    )
    predictions: str | None = field(
        default=None,
        metadata={
            "help": (
                "instead of a model: the folder of an evaluation, or its predictions.jsonl, whose"
                " answers are scored again"
            )
        },
    )
    task: str = field(
        default="all",
        metadata={"help": "evaluate samples of this task only", "choices": [*TASKS, "all"]},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "another evaluation's folder, to compare with item by item"}
    )
    train_data: str | None = field(
        default=None, metadata={"help": "where `--model constant` takes its answers from"}
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "help": (
                "folder with the weights of RadGraph, CheXbert and BERTScore; without it the"
                " clinical metrics are left out"
            )
        },
    )
    batch_size: int = field(default=64, metadata={"help": "answers generated at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    box_scale: float | None = field(
        default=None,
        metadata={
            "help": (
                "what the model's coordinates are divided by: 1000 for an untuned Qwen3-VL;"
                " default: 1, or as stored with --predictions"
            )
        },
    )
    think: bool = field(
        default=False,
        metadata={"help": "append /think to every question, to ask for thinking before the answer"},
    )
    template_opens_think: bool = field(
        default=False,
        metadata={
            "help": (
                "the chat template writes the first <think> itself, as Qwen3-VL-Thinking's does:"
                " only for --predictions that do not say so; with --model it is known"
            )
        },
    )
    max_pixels: int = field(
        default=0,
        metadata={
            "help": "larger images are shrunk to this many pixels; 0: as --model was trained"
        },
    )
    published: bool = field(
        default=False,
        metadata={
            "help": (
                "put the paper's published figures beside ours in table.md: for real films only,"
                " and comparable only on the same files"
            )
        },
    )
    report_items: int = field(
        default=400,
        metadata={"help": "answers shown in report.html, drawn at random; 0: no report.html"},
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is a GPU"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})

    def check(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            at_least_one(self, name)
        check_pixels(self.max_pixels)
        if self.report_items < 0:
            raise ValueError(f"--report_items must not be negative, got {self.report_items}")
        if self.box_scale is not None:
            check_box_scale(self.box_scale)
        if (self.model is None) == (self.predictions is None):
            raise ValueError(
                "give either --model, to answer the questions, or --predictions, to score stored"
                " answers"
            )
        if self.model == "constant" and not self.train_data:
            raise ValueError("--model constant needs --train_data, to choose its answers from")
        if self.train_data and self.model != "constant":
            raise ValueError(
                "--train_data is where --model constant takes its answers from: leave it out with"
                " other models"
            )
        if self.train_data and os.path.realpath(self.train_data) == os.path.realpath(self.data):
            raise ValueError(
                f"--train_data {self.train_data} is also --data: the constant answers would be"
                " chosen on the samples that they are tested on"
            )
        if self.model == "constant" and (
            self.template_opens_think or self.box_scale not in (None, 1)
        ):
            raise ValueError(
                "--model constant writes boxes in 0..1 and never thinks: leave out"
                " --template_opens_think and --box_scale"
            )

    def check_with_torch(self) -> None:
        """Resolve --device, which must exist."""
        self.device = checked_device(self.device)


@dataclass
class ProbeArguments:
    model: str = field(metadata={"help": "checkpoint folder or hub name"})
    data: str = field(metadata={"help": "JSONL file of questions"})
    reward: str = field(
        default="report=gleu,grounding=soft_f1",
        metadata={"help": "the reward to train with, written as for GRPO (docs/rewards.md)"},
    )
    task: str = field(
        default="all",
        metadata={"help": "ask the questions of this task only", "choices": [*TASKS, "all"]},
    )
    samples: int = field(
        default=200, metadata={"help": "questions of each task, evenly spaced; 0: all"}
    )
    group_size: int = field(default=8, metadata={"help": "answers sampled for each question, G"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON file to write: the figures, and the rewards of each question"},
    )
    rollout_rows: int = field(default=256, metadata={"help": "answers decoded at once"})
    reward_weights: str | None = field(
        default=None, metadata={"help": "folder with the files of the clinical rewards"}
    )
    box_scale: float = field(
        default=1.0,
        metadata={
            "help": "what the model's coordinates are divided by: 1000 for an untuned Qwen3-VL"
        },
    )
    think: bool = field(
        default=False,
        metadata={"help": "append /think to every question, to ask for thinking before the answer"},
    )
    max_pixels: int = field(
        default=0,
        metadata={
            "help": "larger images are shrunk to this many pixels; 0: as --model was trained"
        },
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is a GPU"}
    )
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})
    seed: int = field(default=0, metadata={"help": "the same seed samples the same answers"})

    def check(self) -> None:
        for name in ("max_new_tokens", "rollout_rows"):
            at_least_one(self, name)
        check_pixels(self.max_pixels)
        check_box_scale(self.box_scale)
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(f"--seed {self.seed} is too large: at most 2**40 either way")
        if self.group_size < 2:
            raise ValueError("--group_size must be at least 2: one answer is not a group")
        if self.samples < 0:
            raise ValueError(f"--samples must not be negative, got {self.samples}; 0: all")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be above 0, got {self.temperature}: the greedy answer is"
                " measured beside the sampled ones"
            )

    def check_with_torch(self) -> None:
        """Resolve --device, which must exist."""
        self.device = checked_device(self.device)


@dataclass
class AskArguments:
    model: str = field(metadata={"help": "checkpoint folder or hub name"})
    image: str = field(metadata={"help": "image file"})
    question: str = field(
        default="Write the findings of this chest X-ray.", metadata={"help": "what to ask"}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "where to write the film with its boxes; default: beside the image, as "
            "NAME-boxes.png"
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    box_scale: float = field(
        default=1.0,
        metadata={
            "help": "what the model's coordinates are divided by: 1000 for an untuned Qwen3-VL"
        },
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is a GPU"}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})

    def check(self) -> None:
        at_least_one(self, "max_new_tokens")
        if not self.question.strip():
            raise ValueError("--question is empty: ask something")
        check_box_scale(self.box_scale)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 (greedy) or more, got {self.temperature}")

    def check_with_torch(self) -> None:
        """Resolve --device, which must exist."""
        self.device = checked_device(self.device)


@dataclass
class TinyArguments:
    train_data: str = field(
        metadata={"help": "JSONL file whose questions and answers train the tokenizer"}
    )
    output_dir: str = field(metadata={"help": "checkpoint folder to create"})
    seed: int = field(default=0, metadata={"help": "of the random weights"})


@dataclass
class ElsewhereArguments:
    data: str = field(metadata={"help": "JSONL file of samples"})
    output: str = field(metadata={"help": "parquet file to create, films included"})
    task: str = field(
        default="all", metadata={"help": "samples of this task only", "choices": [*TASKS, "all"]}
    )


@dataclass
class QuickArguments:
    output_dir: str = field(default="runs/quick", metadata={"help": "folder to create"})
    seed: int = field(default=0, metadata={"help": "of pictures, weights, data order and sampling"})
    train: int = field(default=1600, metadata={"help": "pictures to learn from"})
    test: int = field(
        default=256, metadata={"help": "held-out pictures, on which everything is measured"}
    )
    sft_steps: int = field(default=140, metadata={"help": "steps of SFT, 16 pictures each"})
    grpo_steps: int = field(
        default=70, metadata={"help": "steps of GRPO, 16 pictures with 8 answers each"}
    )

    def check(self) -> None:
        for name in ("train", "sft_steps", "grpo_steps"):
            at_least_one(self, name)
        if self.test < 6:
            raise ValueError(
                f"--test must be at least 6, got {self.test}: quick.png shows six of them"
            )
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")


@dataclass
class DemoArguments:
    output_dir: str = field(
        default="runs/demo",
        metadata={"help": "folder to create, or that of a demo that was stopped, to resume it"},
    )
    seed: int = field(default=0, metadata={"help": "of films, weights, data order and sampling"})
    data: str | None = field(
        default=None,
        metadata={"help": "folder with train.jsonl and test.jsonl; default: draw phantoms"},
    )
    model: str = field(
        default="tiny", metadata={"help": "what SFT starts from: a checkpoint, or `tiny`"}
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "run every stage as small as possible, to check that it works"},
    )
    fresh: bool = field(
        default=False,
        metadata={"help": "start over: remove what an earlier demo left in output_dir"},
    )

    def check(self) -> None:
        for name in ("train.jsonl", "test.jsonl") if self.data is not None else ():
            if not (Path(self.data) / name).is_file():
                raise ValueError(
                    f"--data {self.data!r} has no {name}: give a folder with train.jsonl and"
                    " test.jsonl (make demo-real DATA=FOLDER)"
                )
        if self.model != "tiny" and not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"--model {self.model} is not a checkpoint folder: run the demo first, or name"
                " another"
            )


@dataclass
class StudyArguments:
    output_dir: str = field(
        default="runs/study", metadata={"help": "where the runs go, each in a folder of its own"}
    )
    json: str = field(
        default="docs/study.json", metadata={"help": "results to write, or with --table to read"}
    )
    page: str = field(
        default="docs/study.md",
        metadata={
            "help": "page whose results are updated, or that is created; figures go to images/ "
            "beside it; empty: no page"
        },
    )
    table: bool = field(
        default=False, metadata={"help": "run nothing: render tables and figures from --json"}
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "run every step as small as possible, to check that it works"},
    )
    seeds: int | None = field(default=None, metadata={"help": "seeds of GRPO; default 3"})
    jobs: int = field(
        default=os.cpu_count() or 1,
        metadata={"help": "runs at once; each gets its share of the cores"},
    )
    reward_weights: str | None = field(
        default=None,
        metadata={
            "help": "folder with BERTScore's weights: adds it to the rewards that are compared"
        },
    )

    def check(self) -> None:
        if self.jobs < 1 or (self.seeds is not None and self.seeds < 1):
            raise ValueError("--jobs and --seeds must be at least 1")
