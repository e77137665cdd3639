"""Supervised fine-tuning: the log-likelihood of each answer given its film and question.

    python train_sft.py --model tiny --train_data data/phantom/train.jsonl --output_dir runs/sft

The same `policy.score` that GRPO optimises through: the questions about one film share its pass
through the model, and the loss covers answer tokens alone.
"""

import math
import time
from functools import partial

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import SftArguments, parse_weights

if __name__ == "__main__":
    answer_early(SftArguments, __doc__)  # what follows takes seconds to import

import torch
from tqdm import tqdm

from minigrpo.data import (
    Sample,
    batch_at,
    check_apart,
    group_by_image,
    prefetch,
    read_jsonl,
    with_traces,
)
from minigrpo.lora import add_adapters
from minigrpo.loss import aggregate
from minigrpo.muon import Muon
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args
from minigrpo.run.distributed import (
    balance_over_ranks,
    first,
    join,
    parameters_of_this_rank,
    rank,
    ranks,
    say,
    share_weights,
    sum_gradients,
    total,
)
from minigrpo.run.folder import last_checkpoint, open_run, run_errors, step_of
from minigrpo.run.guard import Skipped, retry_smaller_on_oom
from minigrpo.run.log import JsonLines, peak_memory_gb
from minigrpo.run.plan import explain, plan_sft
from minigrpo.run.plots import draw_curves, due
from minigrpo.run.roofline import note_on_bf16
from minigrpo.run.save import graceful_stop, save_best, save_checkpoint, save_final, stop_early
from minigrpo.run.schedule import learning_rate_at, set_learning_rate
from minigrpo.run.shard import (
    clip_gradients,
    gathered_layers,
    optimizer_param_groups,
    same_passes_on_every_rank,
    shard,
)
from minigrpo.run.state import load_optimizers
from minigrpo.run.track import tracker
from minigrpo.run.validate import mean_loss
from minigrpo.tiny import TINY_PIXELS, tiny_policy

# an image costs about as much as so many characters of text: for sharing out a batch over ranks
IMAGE = 1000


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


def passes(images: list[list[Sample]], questions: int, most: int) -> list[list[list[Sample]]]:
    """The samples of a step as passes of at most `most` groups, each of at most `questions` samples
    about one image; of several ranks, each has groups of its own, about as long in all.
    """
    groups = [
        samples[k : k + questions] for samples in images for k in range(0, len(samples), questions)
    ]
    mine, _ = balance_over_ranks(
        [IMAGE + sum(len(s.question) + len(s.answer) for s in group) for group in groups],
        len(groups),
    )
    groups = [groups[place] for place in mine]
    return [groups[k : k + most] for k in range(0, len(groups), most)]


def main() -> None:
    with input_errors():
        args = parse_args(SftArguments, __doc__)
        join(args.device)  # the other processes of torchrun, if there are any
        if args.bf16 and (note := note_on_bf16(args.device)):
            say(note)
        checkpoint = last_checkpoint(args)
        # with a trace: asked to think
        train = with_traces(read_jsonl(args.train_data, task=args.task, part=(rank(), ranks())))
        validation = (
            with_traces(read_jsonl(args.eval_data, task=args.task, part=(rank(), ranks())))
            if args.eval_data
            else []
        )
        names = "--train_data", f"--eval_data {args.eval_data}"
        if shared := check_apart(train, validation, names):
            say(f"note: {shared}")
        if args.plan is not None:
            batch = batch_at(group_by_image(train), 0, args.batch_size, args.seed)
            return print(
                explain(
                    args,
                    lambda args: plan_sft(
                        args,
                        passes(batch, args.questions_per_image, args.micro_batch),
                        make_optimizers,
                    ),
                    "the samples of its first step",
                )
            )
        load = partial(
            Policy.from_pretrained,
            device=args.device,
            autocast=args.bf16,
            max_pixels=args.max_pixels,
        )
        if args.lora_rank:
            policy = add_adapters(load(args.model), args, checkpoint)
        elif checkpoint or args.model != "tiny":
            policy = load(checkpoint or args.model)
        else:
            policy = tiny_policy(train, seed=args.seed, pixels=args.max_pixels or TINY_PIXELS).to(
                args.device, autocast=args.bf16
            )
        if args.shard:
            shard(policy)
        start = step_of(checkpoint)
        folder, lock = open_run(args, checkpoint, train + validation)
        log = JsonLines(folder / "metrics.jsonl", start)
        images = group_by_image(train)

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    optimizers = make_optimizers(policy, args)
    if checkpoint:
        load_optimizers(checkpoint, policy, *optimizers)
    skipped, track = (
        Skipped(folder, args, int(sum(log.past("skipped_updates")))),
        tracker(args, folder, start),
    )
    best = min(log.past("eval_loss"), default=math.inf)
    say(
        f"SFT: {len(train)} samples on {len(images)} images,"
        f" {sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M trained parameters, {ranks()} x"
        f" {args.device}"
    )
    for note in args.inert():
        say(f"note: {note}")

    def encoded(step: int) -> tuple[list, int]:  # the passes of this rank, and the images of each
        batch, most = batch_at(images, step, args.batch_size, args.seed), args.micro_batch
        return [
            policy.encode_turns(part) for part in passes(batch, args.questions_per_image, most)
        ], most

    weights = parse_weights(args.task_weights)

    def weight_of(rows: list[Sample | None]) -> torch.Tensor:  # (R, 1)
        return torch.tensor(
            [[weights.get(row.task, 1.0) if row else 0.0] for row in rows], device=policy.device
        )

    def accumulate(step: int, made: tuple[list, int], count: torch.Tensor) -> float:
        """Gradients of a step's passes, and their loss; the passes are made anew where they have
        become too large.
        """
        total_loss, (parts, most) = 0.0, made
        parts = parts if most == args.micro_batch else encoded(step)[0]
        # A rank that has no image in this step goes with the first of all, at weight 0.
        for (prompts, blocks), weight in same_passes_on_every_rank(
            policy, parts, lambda: [policy.encode_turns([images[0][:1]])]
        ):
            # the image, and what precedes the questions about it, once for them all
            prefix = policy.prefill(prompts)
            loss = sum(
                own
                * aggregate(
                    -weight_of(rows) * policy.score(prefix, tokens, mask), mask, denominator=count
                )
                for (tokens, mask, rows), own in same_passes_on_every_rank(policy, blocks)
            )
            (weight * loss).backward()
            total_loss += weight * loss.item()
        return total_loss

    memory = "--micro_batch or --max_pixels, or add --activation_checkpointing"
    with lock, run_errors(folder, memory), graceful_stop() as stopping:
        steps, redraw, began = (
            prefetch(encoded, range(start, args.max_steps)),
            due(),
            time.perf_counter(),
        )
        for step, made in (
            bar := tqdm(steps, initial=start, total=args.max_steps, desc="sft", disable=not first())
        ):
            answers = [(mask, rows) for _, blocks in made[0] for _, mask, rows in blocks]
            zero = torch.zeros((), device=policy.device)
            answer_tokens = int(total(sum((mask.sum() for mask, _ in answers), zero)))
            # of the whole batch
            count = total(sum(((mask * weight_of(rows)).sum() for mask, rows in answers), zero))
            loss = retry_smaller_on_oom(
                args,
                "micro_batch",
                lambda: accumulate(step, made, count),
                undo=policy.model.zero_grad,
                alone=not policy.sharded,
            )
            loss = total(torch.tensor(loss, dtype=torch.float64)).item()
            sum_gradients(policy.parameters())
            grad_norm = clip_gradients(policy.parameters(), args.grad_clip)
            rate = learning_rate_at(step, args.max_steps, args.learning_rate, args.warmup, "cosine")
            taken = skipped.accept_or_record(
                grad_norm,
                step,
                0,
                lambda: [vars(row) for _, rows in answers for row in rows if row],
            )
            if taken:
                set_learning_rate(optimizers, rate)
                for optimizer in optimizers:
                    optimizer.step()
                share_weights(policy.parameters())
            policy.model.zero_grad()

            seconds = time.perf_counter() - began
            row = {
                "step": step,
                **({"loss": loss, "grad_norm": grad_norm.item()} if taken else {}),
                "learning_rate": rate,
                "skipped_updates": int(not taken),
                "tokens_per_second": answer_tokens / seconds,
                "seconds": seconds,
                "peak_memory_gb": peak_memory_gb(policy.device),
            }
            if validation and (step + 1) % args.eval_steps == 0:
                parts = passes(
                    group_by_image(validation), args.questions_per_image, args.micro_batch
                )
                with gathered_layers(policy):
                    row["eval_loss"] = mean_loss(policy, map(policy.encode_turns, parts))
                if row["eval_loss"] < best:
                    best = row["eval_loss"]
                    save_best(folder, step + 1, policy)
            log.write(row)
            track(row)
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{answer_tokens / seconds:.0f}")
            skipped.stop_if_too_many()
            if code := stopping():
                stop_early(code, folder, step + 1, policy, *optimizers, keep=args.keep_checkpoints)
            if (step + 1) % args.save_steps == 0 and step + 1 < args.max_steps:
                save_checkpoint(folder, step + 1, policy, *optimizers, keep=args.keep_checkpoints)
            if first() and redraw():
                draw_curves(folder)
            # waiting for the next batch counts, saving and validation do not
            began = time.perf_counter()

        if first():  # before final/, by which --resume knows that nothing is left to do
            draw_curves(folder)
        save_final(folder, args.max_steps, policy, *optimizers)
    say(f"saved {folder / 'final'}")


if __name__ == "__main__":
    main()
