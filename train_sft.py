"""Supervised fine-tuning: the log-likelihood of each answer given its film and question.

    python train_sft.py --model tiny --train_data data/phantom/train.jsonl --output_dir runs/sft

It uses the same `policy.score` that GRPO optimises through: the questions about one film share its
pass through the model, and the loss covers only answer tokens.
"""

from functools import partial
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import SftArguments, parse_weights

if __name__ == "__main__":
    answer_early(SftArguments, __doc__)  # what follows takes seconds to import

from minigrpo.data import Sample, batch_at, group_by_image, prefetch, with_traces
from minigrpo.lora import add_adapters
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args
from minigrpo.run.distributed import ranks, say
from minigrpo.run.log import peak_memory_gb
from minigrpo.run.loop import Run, join_run, read_samples
from minigrpo.run.node import ArmouredNode
from minigrpo.run.optimizers import sft_optimizers
from minigrpo.run.plan import explain, plan_sft
from minigrpo.run.shard import shard
from minigrpo.run.validate import mean_loss
from minigrpo.sft import encode, sft_step, split
from minigrpo.tiny import tiny_policy

LESS_MEMORY = "--micro_batch or --max_pixels, or add --activation_checkpointing"


def main() -> None:
    with input_errors():
        args = parse_args(SftArguments, __doc__)
        checkpoint = join_run(args)
        train, validation = map(with_traces, read_samples(args))  # with a trace: asked to think
        images = group_by_image(train)
        if args.plan is not None:
            first_step = batch_at(images, 0, args.batch_size, args.seed)
            parts = split(first_step, args.questions_per_image, args.micro_batch)
            plan = partial(plan_sft, parts)
            return print(explain(args, plan, "the samples of its first step"))
        policy = load_policy(args, checkpoint, train)
        data = train + validation
        run = Run("sft", args, checkpoint, data, schedule="cosine", best="eval_loss")

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    optimizers = sft_optimizers(policy, args)
    node, weights = ArmouredNode(args, run.skipped), parse_weights(args.task_weights)
    trained = sum(p.numel() for p in policy.parameters()) / 1e6
    say(
        f"SFT: {len(train)} samples on {len(images)} images, {trained:.1f}M trained parameters,"
        f" {ranks()} x {args.device}"
    )

    def batch_of(step: int):
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
    """The policy to train: --model, or the checkpoint to resume from, with adapters and shards."""

    def load(model: str | Path) -> Policy:
        return Policy.from_pretrained(
            model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
        )

    if args.lora_rank:
        policy = add_adapters(load(args.model), args, checkpoint)
    elif checkpoint or args.model != "tiny":
        policy = load(checkpoint or args.model)
    else:
        policy = tiny_policy(train, seed=args.seed, pixels=args.max_pixels)
        policy = policy.to(args.device, autocast=args.bf16)
    return shard(policy) if args.shard else policy


if __name__ == "__main__":
    main()
