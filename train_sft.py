"""Supervised fine-tuning: the log-likelihood of each answer given its film and question.

    python train_sft.py --model tiny --train_data data/phantom/train.jsonl --output_dir runs/sft

The same `policy.score` that GRPO optimises through: the questions about one film share its pass through the model, and
the loss covers answer tokens alone.
"""

import math
import re
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from minigrpo.data import TASKS, Sample, batch_at, group_by_image, prefetch, read_jsonl
from minigrpo.lora import add_adapters
from minigrpo.loss import aggregate
from minigrpo.policy import Policy
from minigrpo.run.args import RunArguments, at_least_one, input_errors, parse_args
from minigrpo.run.folder import graceful_stop, last_checkpoint, load_optimizers, open_run, save_checkpoint, save_final, stop_early
from minigrpo.run.log import JsonLines
from minigrpo.run.plan import explain, plan_sft
from minigrpo.run.plots import draw_curves
from minigrpo.tiny import TINY_PIXELS, tiny_policy


@dataclass
class SftArguments(RunArguments):
    batch_size: int = field(default=8, metadata={"help": "images per optimisation step, each with all its questions"})
    questions_per_image: int = field(default=8, metadata={"help": "most questions about one image in a pass; they share it"})
    micro_batch: int = field(default=8, metadata={"help": "images per forward and backward pass: as many as memory takes"})
    task_weights: str = field(default="", metadata={
        "help": "how much each token of a task's answers counts, such as report=2; other tasks count 1. The paper repeats its "
                "smaller sets, which costs time"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak; 1e-5 in the paper, about 1e-3 for --model tiny"})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps over which the learning rate rises"})
    optimizer: str = field(default="adamw", metadata={
        "help": "muon (matrices; AdamW for the rest) learns from random weights in half the steps: for --model tiny",
        "choices": ["adamw", "muon"]})
    beta2: float = field(default=0.999, metadata={"help": "AdamW's memory of squared gradients; 0.98 for short runs"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decoupled weight decay"})
    grad_clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})

    def check(self) -> None:
        super().check()
        for name in ("batch_size", "questions_per_image", "micro_batch"):
            at_least_one(self, name)
        parse_weights(self.task_weights)
        if self.lora_rank and self.model == "tiny":
            raise ValueError("--lora_rank with --model tiny: adapters beside random weights learn nothing; train it whole first")


def parse_weights(text: str) -> dict[str, float]:
    """"report=2,grounding=1" -> {"report": 2.0, "grounding": 1.0}."""
    weights = {}
    for piece in filter(None, text.split(",")):
        task, _, weight = (part.strip() for part in piece.partition("="))
        if task not in TASKS or task in weights or not re.fullmatch(r"\d*\.?\d+", weight, re.ASCII) or not float(weight):
            raise ValueError(f"--task_weights {text!r}: {piece!r} is not task=weight with a weight above 0 and a task, named "
                             f"once, of {', '.join(TASKS)}")
        weights[task] = float(weight)
    return weights


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizers(policy: Policy, args: SftArguments) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon (Jordan et al. 2024) for the matrices of the layers, at AdamW's learning rates."""
    parameters = policy.parameters()
    adam = dict(lr=args.learning_rate, betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, **adam)]
    muon = [p for name, p in policy.model.named_parameters() if p.requires_grad and p.dim() == 2 and "embed" not in name]
    # A patch filter adds up 1536 pixels that are bright or dark together: a step that suits the other parameters, taken by
    # all of its weights at once, throws away what the layers behind it have learned. Muon would scale it by its inputs.
    patches = [p for p in parameters if p.dim() > 2]
    chosen = {id(p) for p in muon + patches}
    groups = [{"params": [p for p in parameters if id(p) not in chosen], "scale": 1.0},
              {"params": patches, "scale": patches[0][0].numel() ** -0.5 if patches else 1.0}]
    return [torch.optim.AdamW(groups, **adam), torch.optim.Muon(
        muon, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")]


def passes(images: list[list[Sample]], questions: int, most: int) -> list[list[list[Sample]]]:
    """The samples of a step as passes of at most `most` groups, each of at most `questions` samples about one image."""
    groups = [samples[k : k + questions] for samples in images for k in range(0, len(samples), questions)]
    return [groups[k : k + most] for k in range(0, len(groups), most)]


def main() -> None:
    with input_errors():
        args = parse_args(SftArguments, __doc__)
        checkpoint = last_checkpoint(args)
        train = read_jsonl(args.train_data, task=args.task)
        if args.plan is not None:
            batch = batch_at(group_by_image(train), 0, args.batch_size, args.seed)
            return print(explain(args, lambda args: plan_sft(args, passes(batch, args.questions_per_image, args.micro_batch),
                                                             make_optimizers), "the samples of its first step"))
        load = partial(Policy.from_pretrained, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels)
        if args.lora_rank:
            policy = add_adapters(load(args.model), args, checkpoint)
        elif checkpoint or args.model != "tiny":
            policy = load(checkpoint or args.model)
        else:
            policy = tiny_policy(train, seed=args.seed, pixels=args.max_pixels or TINY_PIXELS).to(args.device, autocast=args.bf16)
        folder = open_run(args)
        images = group_by_image(train)

    policy.freeze(args.freeze)
    if args.activation_checkpointing:
        policy.checkpoint_activations()
    optimizers = make_optimizers(policy, args)
    start = load_optimizers(checkpoint, *optimizers) if checkpoint else 0
    log = JsonLines(folder / "metrics.jsonl", start)
    print(f"SFT: {len(train)} samples on {len(images)} images, {sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M trained parameters, {args.device}")

    def encoded(step: int) -> list:
        batch = batch_at(images, step, args.batch_size, args.seed)
        return [policy.encode_turns(part) for part in passes(batch, args.questions_per_image, args.micro_batch)]

    weights = parse_weights(args.task_weights)

    def weight_of(rows: list[Sample | None]) -> torch.Tensor:  # (R, 1)
        return torch.tensor([[weights.get(row.task, 1.0) if row else 0.0] for row in rows], device=policy.device)

    with graceful_stop() as stopping:
        steps, began = prefetch(encoded, range(start, args.max_steps)), time.perf_counter()
        for step, parts in (bar := tqdm(steps, initial=start, total=args.max_steps, desc="sft")):
            answer_tokens = sum(int(mask.sum()) for _, blocks in parts for _, mask, _ in blocks)
            weighted = [[(tokens, mask, weight_of(rows)) for tokens, mask, rows in blocks] for _, blocks in parts]
            count = sum((mask * weight).sum() for blocks in weighted for _, mask, weight in blocks)  # of the whole batch
            total = 0.0
            for (prompts, _), blocks in zip(parts, weighted):
                prefix = policy.prefill(prompts)  # the image, and what precedes the questions about it, once for them all
                loss = sum(aggregate(-weight * policy.score(prefix, tokens, mask), mask, denominator=count)
                           for tokens, mask, weight in blocks)
                loss.backward()
                total += loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip).item()
            rate = learning_rate_at(step, args.max_steps, args.learning_rate, args.warmup)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("scale", 1.0)
                optimizer.step()
                optimizer.zero_grad()

            seconds = time.perf_counter() - began
            log.write({"step": step, "loss": total, "learning_rate": rate, "grad_norm": grad_norm,
                       "tokens_per_second": answer_tokens / seconds, "seconds": seconds})
            bar.set_postfix(loss=f"{total:.3f}", tokens_per_s=f"{answer_tokens / seconds:.0f}")
            if stopping():
                stop_early(folder, step + 1, policy, *optimizers)
            if (step + 1) % args.save_steps == 0 and step + 1 < args.max_steps:
                save_checkpoint(folder, step + 1, policy, *optimizers)
            began = time.perf_counter()  # waiting for the next batch counts, saving does not

    save_final(folder, policy)
    draw_curves(folder)
    print(f"saved {folder / 'final'}")


if __name__ == "__main__":
    main()
