"""One step of Group Relative Policy Optimization: the code that `train_grpo.py` runs.

Sample a group of answers to each question, reward them, compare each with its group, and raise the
log-probs of the better ones, limited by the clip and by the KL to a frozen reference: DeepSeekMath
(2402.03300, algorithm 1), with the settings of RadVLM-GRPO (2512.10691).

Where this departs from the papers:
- A mean over tokens divides by the count of the whole update; theirs divides in each micro-batch,
  so that their loss depends on how a batch is split.
- The old log-probs are the sampler's own, which equal what the trainer would compute (RadVLM-GRPO
  scores the answers again). `rollout_cap` is for samplers of which that is not true.
- The reference is always the initial model (DeepSeekMath replaces it from time to time).
- An answer that could not be scored is left out: of the loss, the KL and the token count.

Shapes: B questions, G answers to each, R = B G answers (rows), T tokens of the longest answer.
Everything else (ranks, running out of memory, timing) is behind `Node`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigrpo.generate import generate
from minigrpo.lora import adapters_off
from minigrpo.loss import (
    decoupled_advantages,
    denominator_of,
    group_advantages,
    grpo_loss,
    overlong_filter,
    soft_overlong_penalty,
)
from minigrpo.run.groups import Groups, micro_batches


class Node:
    """A single process. `run/node.py` has the one for many ranks, which handles failures."""

    grad_clip = 1.0

    def phase(self, name, *models):
        """A context around each phase of a step, which runs passes through `models`."""
        return nullcontext()

    def fit(self, size, work, undo=None):
        """work(), repeated with a smaller `size` if memory runs out."""
        return work()

    def total(self, x):
        """The sum over all ranks."""
        return x

    def passes(self, policy, parts, spare=list):
        """The micro-batches of this rank, each with its weight; `spare()` gives some of weight 0
        for a rank that must make as many passes as the others.
        """
        return [(part, 1.0) for part in parts]

    def step(self, policy, *optimizers, batch=None):
        """Update the weights. Returns the norm of the gradients, or None if the update is refused;
        `batch()` gives the rows to record then.
        """
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), self.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        return norm


@dataclass
class Step:
    """The results of a step, for the log."""

    groups: Groups
    mask: Tensor  # [R, T] bool, what was trained on
    advantage: Tensor  # [B, G]
    figures: list = field(default_factory=list)  # (weight, {name: mean over that weight})
    parts: list = field(default_factory=list)  # the micro-batches of all updates


def collect(policy, samples, reward, args, seed, node=Node(), places=None) -> Groups:
    """G answers to each of the B samples, and their rewards. `places` are the positions of the
    samples in the whole batch, which seed their answers.
    """
    with node.phase("rollout", policy):
        prompts = policy.encode(samples)  # image and prompt once for each group
        prompts = prompts if places is None else prompts.numbered(places)
        rollout = node.fit(
            "rollout_rows",
            lambda: generate(
                policy,
                prompts,
                group_size=args.group_size,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=seed,
                rows_at_once=args.rollout_rows,
            ),
        )  # R answers
    with node.phase("reward"):
        scores = reward(rollout.texts, [s for s in samples for _ in range(args.group_size)])  # R
        rewards = torch.tensor(scores.values).view(-1, args.group_size)  # (B, G)
        if args.soft_overlong:
            penalty = soft_overlong_penalty(
                rollout.mask.sum(1).cpu(), args.max_new_tokens, args.soft_overlong
            )  # (R,)
            rewards = rewards + penalty.view(-1, args.group_size)
            scores.parts["overlong"] = penalty.tolist()
    valid = torch.tensor(scores.valid).view(-1, args.group_size)  # (B, G)
    lengths = prompts.mask.sum(1).tolist()
    return Groups(samples, rollout, rewards, valid, scores.parts, lengths, prompts)


def grpo_step(
    policy, reference, optimizer, collect: Callable[[], Groups], args, node=Node()
) -> Step:
    """Collect the groups, and update the policy `args.updates_per_rollout` times on them."""
    groups = collect()
    prompts, rollout = groups.prompts, groups.rollout
    valid = groups.valid.flatten().to(policy.device)  # (R,) whether the answer was scored
    mask = rollout.mask & valid[:, None]  # (R, T)
    if args.overlong_filter:
        mask = overlong_filter(mask, rollout.finished)

    advantage = advantages(groups, args, node)  # (B, G), each answer compared with its group
    step = Step(groups, mask, advantage)
    advantage = advantage.flatten().to(policy.device)  # (R,)

    def logprobs(model):  # (R, T), without gradient
        with node.phase("reference", model), torch.no_grad():
            return node.fit("micro_tokens", lambda: score_all(model, prompts, rollout, args))

    ref_logprob, old_logprob = None, rollout.logprob  # (R, T)
    if args.kl_coef:
        with adapters_off(reference):
            ref_logprob = logprobs(reference)
    if args.rollout_cap:
        old_logprob = logprobs(policy)

    for among in groups.updates(args.updates_per_rollout):  # each update has prompts of its own
        span = slice(among.start * args.group_size, among.stop * args.group_size)
        # Tokens of the whole update, on all ranks: the loss does not depend on the micro-batches.
        scored = mask[span][valid[span]]
        count = denominator_of(scored, aggregation=args.aggregation, max_tokens=args.max_new_tokens)
        denominator = node.total(count)

        def spare():
            return micro_batches(prompts, mask, range(1), args.micro_tokens)

        def gradients():
            loss_sum, figures = torch.zeros((), device=policy.device), []
            parts = micro_batches(prompts, mask, among, args.micro_tokens)
            for (part, rows), weight in node.passes(policy, parts, spare):
                answers = prompts.select(part), rollout.tokens[rows], mask[rows]  # (r, T)
                logprob, entropy = policy.score(
                    *answers, temperature=args.temperature, entropy=True
                )  # (r, T)
                loss, stats = grpo_loss(
                    logprob,
                    old_logprob[rows],
                    advantage[rows],
                    mask[rows],
                    ref_logprob=None if ref_logprob is None else ref_logprob[rows],
                    entropy=entropy,
                    rollout_logprob=rollout.logprob[rows] if args.rollout_cap else None,
                    denominator=denominator,
                    **args.loss_settings(),
                )
                (weight * loss).backward()
                if weight:
                    loss_sum += loss.detach()
                    tokens = mask[rows].sum()
                    stats["entropy"] = entropy.detach().sum() / tokens.clamp(min=1)
                    figures.append((tokens, stats))
            return loss_sum, figures, parts

        with node.phase("update"):
            loss, figures, parts = node.fit("micro_tokens", gradients, policy.model.zero_grad)
            # Without a token there is nothing to learn, and AdamW would still move by its momentum.
            norm = None
            if denominator:
                norm = node.step(policy, optimizer, batch=lambda: groups.rows(advantage, among))
            policy.model.zero_grad()
        step.parts += parts
        if norm is not None:
            step.figures += [*figures, (1, {"loss": node.total(loss), "grad_norm": norm})]
    return step


def advantages(groups, args, node=Node()) -> Tensor:
    """A = (r - mean) / (std + eps) [B, G] of the step's groups, or as args say."""
    if args.advantage_scale == "decoupled":
        rewards, weights, valid = groups.terms(args.reward)
        return decoupled_advantages(rewards, weights, valid=valid, total=node.total)
    lengths = groups.rollout.mask.sum(1).view(groups.rewards.shape).cpu()
    return group_advantages(
        groups.rewards,
        scale=args.advantage_scale,
        leave_one_out=args.leave_one_out,
        lengths=lengths if args.length_baseline else None,
        valid=groups.valid,
        total=node.total,
    )


def score_all(policy, prompts, rollout, args) -> Tensor:
    """Log-probs [R, T] of all answers of a step, one micro-batch at a time."""
    logprob = torch.zeros_like(rollout.logprob)
    everything = range(len(prompts.ids))
    for part, rows in micro_batches(prompts, rollout.mask, everything, args.micro_tokens):
        logprob[rows] = policy.score(
            prompts.select(part),
            rollout.tokens[rows],
            rollout.mask[rows],
            temperature=args.temperature,
        )
    return logprob
