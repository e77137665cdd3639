"""Supervised fine-tuning: the log-likelihood of each answer given its film and question.

    python train_sft.py --model tiny --train_data data/phantom/train.jsonl --output_dir runs/sft

The same `policy.score` that GRPO optimises through: the questions about one film share its pass
through the model, and the loss covers answer tokens alone.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import minigrpo  # noqa: F401  before torch: it says how OpenMP's threads wait
from minigrpo.data import TASKS, Sample, batch_at, group_by_image, prefetch, with_traces
from minigrpo.lora import add_adapters
from minigrpo.muon import Muon
from minigrpo.policy import Policy
from minigrpo.run.args import RunArguments, at_least_one, input_errors, parse_args
from minigrpo.run.distributed import parameters_of_this_rank, ranks, say
from minigrpo.run.log import peak_memory_gb
from minigrpo.run.loop import Run, join_run, read_samples
from minigrpo.run.node import ArmouredNode
from minigrpo.run.plan import explain, plan_sft
from minigrpo.run.shard import optimizer_param_groups, shard
from minigrpo.run.validate import mean_loss
from minigrpo.sft import Batch, encode, sft_step, split
from minigrpo.tiny import TINY_PIXELS, tiny_policy

LESS_MEMORY = "--micro_batch or --max_pixels, or add --activation_checkpointing"


@dataclass
class SftArguments(RunArguments):
    batch_size: int = field(
        default=8, metadata={"help": "images per optimisation step, each with all its questions"}
    )
    questions_per_image: int = field(
        default=8, metadata={"help": "most questions about one image in a pass; they share it"}
    )
    micro_batch: int = field(
        default=8,
        metadata={"help": "images per forward and backward pass: as many as memory takes"},
    )
    task_weights: str = field(
        default="",
        metadata={
            "help": (
                "how much each token of a task's answers counts, such as report=2; other tasks"
                " count 1. The paper repeats its smaller sets, which costs time"
            )
        },
    )
    learning_rate: float = field(
        default=1e-5,
        metadata={
            "help": (
                "peak; it falls along half a cosine to a tenth; 1e-5 in the paper, about 1e-3 for"
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
                "muon (matrices; AdamW for the rest) learns from random weights in half the steps:"
                " for --model tiny"
            ),
            "choices": ["adamw", "muon"],
        },
    )
    beta2: float = field(
        default=0.999, metadata={"help": "AdamW's memory of squared gradients; 0.98 for short runs"}
    )

    def check(self) -> None:
        super().check()
        for name in ("batch_size", "questions_per_image", "micro_batch"):
            at_least_one(self, name)
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--beta2 must lie in 0..1, 1 left out, got {self.beta2}")
        parse_weights(self.task_weights)
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "--shard with --optimizer muon: Muon needs whole matrices, and a rank has slices;"
                " use --optimizer adamw"
            )
        if self.lora_rank and self.model == "tiny":
            raise ValueError(
                "--lora_rank with --model tiny: adapters beside random weights learn nothing; train"
                " it whole first"
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
                f"--task_weights {text!r}: {piece!r} is not task=weight with a weight above 0 and a"
                f" task, named once, of {', '.join(TASKS)}"
            )
        weights[task] = float(weight)
    return weights


def make_optimizers(policy: Policy, args: SftArguments) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon (Jordan et al. 2024) for the matrices of the layers, at AdamW's
    learning rates. Of the parameters that this rank owns.
    """
    parameters = parameters_of_this_rank(policy.parameters())
    adam = dict(lr=args.learning_rate, betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(optimizer_param_groups(parameters), **adam)]
    matrices = {
        id(p) for name, p in policy.model.named_parameters() if p.dim() == 2 and "embed" not in name
    }
    muon = [p for p in parameters if id(p) in matrices]
    # A patch filter adds up 1536 pixels that are bright or dark together: a step that suits the
    # other parameters, taken by all of its weights at once, throws away what the layers behind it
    # have learned. Muon would scale it by its inputs.
    patches = [p for p in parameters if p.dim() > 2]
    chosen = {id(p) for p in muon + patches}
    groups = [
        {"params": [p for p in parameters if id(p) not in chosen], "scale": 1.0},
        {"params": patches, "scale": patches[0][0].numel() ** -0.5 if patches else 1.0},
    ]
    return [torch.optim.AdamW(groups, **adam), Muon(muon, args.learning_rate, args.weight_decay)]


def main() -> None:
    with input_errors():
        args = parse_args(SftArguments, __doc__)
        checkpoint = join_run(args)
        train, validation = map(with_traces, read_samples(args))  # with a trace: asked to think
        images = group_by_image(train)
        if args.plan is not None:
            first_step = batch_at(images, 0, args.batch_size, args.seed)
            parts = split(first_step, args.questions_per_image, args.micro_batch)
            plan = partial(plan_sft, parts, make_optimizers)
            return print(explain(args, plan, "the samples of its first step"))
        policy = load_policy(args, checkpoint, train)
        data = train + validation
        run = Run("sft", args, checkpoint, data, schedule="cosine", best="eval_loss")

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    optimizers = make_optimizers(policy, args)
    node, weights = ArmouredNode(args, run.skipped), parse_weights(args.task_weights)
    trained = sum(p.numel() for p in policy.parameters()) / 1e6
    say(
        f"SFT: {len(train)} samples on {len(images)} images, {trained:.1f}M trained parameters,"
        f" {ranks()} x {args.device}"
    )

    def batch_of(step: int) -> Batch:
        return encode(policy, batch_at(images, step, args.batch_size, args.seed), args)

    def validate() -> float:
        parts = split(group_by_image(validation), args.questions_per_image, args.micro_batch)
        return mean_loss(policy, map(policy.encode_turns, parts))

    batches = prefetch(batch_of, range(run.start, args.max_steps))  # the next one, in a thread
    with run.training(policy, *optimizers, memory=LESS_MEMORY):
        for step, batch in run.steps(batches):
            node.begin(step)
            done = sft_step(policy, optimizers, batch, args, weights, node)
            refused, seconds = done.grad_norm is None, run.seconds()
            row = {} if refused else {"loss": done.loss, "grad_norm": done.grad_norm}
            row |= {
                "skipped_updates": int(refused),
                "tokens_per_second": done.tokens / seconds,
                "seconds": seconds,
                "peak_memory_gb": peak_memory_gb(policy.device),
            }
            shown = {"loss": f"{done.loss:.3f}", "tokens_per_s": f"{done.tokens / seconds:.0f}"}
            run.end_step(step, row, validate if validation else None, **shown)


def load_policy(args: SftArguments, checkpoint: Path | None, train: list[Sample]) -> Policy:
    """The policy to train: --model, or where the run goes on from, with adapters and shards."""

    def load(model: str | Path) -> Policy:
        return Policy.from_pretrained(
            model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
        )

    if args.lora_rank:
        policy = add_adapters(load(args.model), args, checkpoint)
    elif checkpoint or args.model != "tiny":
        policy = load(checkpoint or args.model)
    else:
        policy = tiny_policy(train, seed=args.seed, pixels=args.max_pixels or TINY_PIXELS)
        policy = policy.to(args.device, autocast=args.bf16)
    return shard(policy) if args.shard else policy


if __name__ == "__main__":
    main()
