"""One step of supervised fine-tuning, the code that `train_sft.py` runs: raise the log-likelihood
of each answer, given its image and question.

    loss = - sum over answer tokens of weight * log-prob / sum over answer tokens of weight

with the weight of the answer's task. The log-probs come from `policy.score`, through which GRPO
also optimises, and the questions about one image share its pass through the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigrpo.data import Sample
from minigrpo.grpo import Node
from minigrpo.loss import aggregate
from minigrpo.run.distributed import balance_over_ranks

IMAGE = 1000  # an image costs about as much as so many characters of text


@dataclass
class Batch:
    """The samples of a step, grouped by image, and this rank's passes over them."""

    images: list[list[Sample]]
    micro_batch: int  # the images of a pass, at most
    passes: list[tuple]  # (prompts, blocks), each as `policy.encode_turns` returns them


@dataclass
class SftStep:
    """What a step leaves behind, for the log."""

    loss: float  # nats a token; before the update
    grad_norm: float | None  # None where the update was refused
    tokens: int  # of the answers, on all ranks


def encode(policy, images: list[list[Sample]], args) -> Batch:
    """The samples about each image of a step -> the inputs of the model."""
    parts = split(images, args.questions_per_image, args.micro_batch)
    return Batch(images, args.micro_batch, [policy.encode_turns(part) for part in parts])


def sft_step(policy, optimizers: list, batch: Batch, args, weights=None, node=Node()) -> SftStep:
    """`weights`: the weight of a task's tokens, by its name; 1 if absent."""

    def weight_of(rows: list[Sample | None]) -> Tensor:  # (R, 1), 0 for an empty row
        values = [(weights or {}).get(row.task, 1.0) if row else 0.0 for row in rows]
        return torch.tensor(values, device=policy.device)[:, None]

    # Of the whole batch, on all ranks: the loss does not depend on the micro-batches.
    answers = [(mask, rows) for _, blocks in batch.passes for _, mask, rows in blocks]
    zero = torch.zeros((), device=policy.device)
    tokens = int(node.total(sum((mask.sum() for mask, _ in answers), zero)))
    count = node.total(sum(((mask * weight_of(rows)).sum() for mask, rows in answers), zero))

    def spare():
        return [policy.encode_turns([batch.images[0][:1]])]

    def gradients() -> float:
        fits = batch.micro_batch == args.micro_batch  # else memory ran out, and passes are smaller
        parts = batch.passes if fits else encode(policy, batch.images, args).passes
        loss_sum = 0.0
        for (prompts, blocks), weight in node.passes(policy, parts, spare):
            prefix = policy.prefill(prompts)  # the image, once for all questions about it
            loss = 0.0
            for (ids, mask, rows), own in node.passes(policy, blocks):
                logprob = policy.score(prefix, ids, mask)  # (R, T)
                loss += own * aggregate(-weight_of(rows) * logprob, mask, denominator=count)
            (weight * loss).backward()
            loss_sum += weight * loss.item()
        return loss_sum

    loss = node.fit("micro_batch", gradients, policy.model.zero_grad)
    loss = node.total(torch.tensor(loss, dtype=torch.float64)).item()
    asked = [row for _, rows in answers for row in rows if row]
    norm = node.step(policy, *optimizers, batch=lambda: [vars(row) for row in asked])
    policy.model.zero_grad()
    return SftStep(loss, None if norm is None else float(norm), tokens)


def split(images: list[list[Sample]], questions: int, most: int) -> list[list[list[Sample]]]:
    """Split the samples of a step into passes of at most `most` groups, each of at most `questions`
    samples about one image. Each rank has its own groups, of about equal total length.
    """
    groups = [
        samples[k : k + questions] for samples in images for k in range(0, len(samples), questions)
    ]
    costs = [IMAGE + sum(len(s.question) + len(s.answer) for s in group) for group in groups]
    mine, _ = balance_over_ranks(costs, len(groups))
    groups = [groups[place] for place in mine]
    return [groups[k : k + most] for k in range(0, len(groups), most)]
