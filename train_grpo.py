"""Group Relative Policy Optimization (DeepSeekMath 2402.03300) as RadVLM-GRPO (2512.10691) runs it.

    python train_grpo.py --model runs/sft/final --train_data data/phantom/train.jsonl --task report --output_dir runs/report

The loop in `main` is the whole algorithm: sample a group of answers to each question, reward them, compare each with its
group, and raise the log-probs of the better ones, held by the clip and by the KL to the frozen reference.
Where this departs from the paper: token means use the count of the whole update (theirs are per micro-batch), the images
have one pixel budget throughout, and the sampler's own log-probs serve as the old ones.
"""

from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from minigrpo.data import batch_at, read_jsonl
from minigrpo.generate import generate
from minigrpo.loss import ESTIMATORS, SCALES, group_advantages, grpo_loss
from minigrpo.policy import Policy
from minigrpo.rewards import reward_fn
from minigrpo.run.args import RunArguments, at_least_one, input_errors, parse_args
from minigrpo.run.folder import graceful_stop, last_checkpoint, load_optimizers, open_run, save_checkpoint, save_final, stop_early
from minigrpo.run.log import JsonLines, Means, Timer, group_rows, rollout_stats
from minigrpo.run.plots import draw_curves


@dataclass
class GrpoArguments(RunArguments):
    reward: str = field(default="report=gleu,grounding=soft_f1", metadata={
        "help": "a reward, a mix (0.9*soft_f1+0.1*dice), either by task (report=gleu,grounding=soft_f1), or your own as "
                "my_module:my_reward"})
    prompts_per_step: int = field(default=8, metadata={"help": "questions per rollout batch (512 in the paper)"})
    group_size: int = field(default=8, metadata={"help": "answers sampled to each question, G"})
    updates_per_rollout: int = field(default=4, metadata={"help": "optimiser steps on each rollout batch, each on its own prompts"})
    micro_prompts: int = field(default=8, metadata={"help": "prompts (with their groups) per forward and backward pass"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    advantage_scale: str = field(default="group", metadata={
        "help": "what centred rewards are divided by: the group's std (the paper), the whole batch's, or none (Dr. GRPO). In "
                "an easy group the std is small, so `group` weighs its differences as heavily as those of a hard one",
        "choices": list(SCALES)})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and so of the log-probs that are trained"})
    learning_rate: float = field(default=1e-6, metadata={"help": "constant; 1e-6 in the paper, about 1e-4 for a tiny model"})
    freeze_vision: bool = field(default=False, metadata={"help": "keep the vision tower as it is: cheaper, and less to unlearn"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decoupled weight decay"})
    grad_clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    clip_low: float = field(default=0.2, metadata={"help": "the ratio may fall to 1 - clip_low"})
    clip_high: float = field(default=0.28, metadata={"help": "the ratio may rise to 1 + clip_high (DAPO's clip-higher)"})
    dual_clip: float = field(default=3.0, metadata={"help": "bound of the ratio where the advantage is negative"})
    kl_coef: float = field(default=0.01, metadata={"help": "weight of the KL to the frozen reference; 0 drops it"})
    kl_estimator: str = field(default="k3", metadata={"help": "per-token estimate of the KL", "choices": list(ESTIMATORS)})

    def check(self) -> None:
        super().check()
        for name in ("prompts_per_step", "group_size", "updates_per_rollout", "micro_prompts", "max_new_tokens"):
            at_least_one(self, name)
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(f"--prompts_per_step {self.prompts_per_step} must be a multiple of "
                             f"--updates_per_rollout {self.updates_per_rollout}, so that every update has as many prompts")
        if self.group_size < 2:
            raise ValueError("--group_size must be at least 2: an answer alone has no group to be better than")
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}: greedy answers of a group are all equal")


def main() -> None:
    with input_errors():
        args = parse_args(GrpoArguments, __doc__)
        checkpoint = last_checkpoint(args)
        reward = reward_fn(args.reward)
        found = read_jsonl(args.train_data, task=args.task)
        train = [sample for sample in found if sample.task in reward.tasks]
        if not train:
            raise ValueError(f"--reward {args.reward} covers {', '.join(sorted(reward.tasks))}: no sample of "
                             f"{args.train_data} is left (--task {args.task})")
        policy = Policy.from_pretrained(checkpoint or args.model, device=args.device, autocast=args.bf16)
        reference = Policy.from_pretrained(args.model, device=args.device, autocast=args.bf16).freeze()
        folder = open_run(args)

    policy.visual.requires_grad_(not args.freeze_vision)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    start = load_optimizers(checkpoint, optimizer) if checkpoint else 0
    metrics, rollouts = JsonLines(folder / "metrics.jsonl", start), JsonLines(folder / "rollouts.jsonl", start)
    print(f"GRPO: {len(train)} samples ({len(found) - len(train)} left out: --reward covers "
          f"{', '.join(sorted(reward.tasks))}), {args.prompts_per_step} prompts x {args.group_size} answers a step, {args.device}")

    B, G = args.prompts_per_step, args.group_size
    with graceful_stop() as stopping:
        for step in (bar := tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="grpo")):
            timer, means = Timer(), Means()
            samples = batch_at(train, step, B, args.seed)
            with timer.phase("rollout"):
                prompts = policy.encode(samples)  # image and prompt once for each group
                rollout = generate(policy, prompts, group_size=G, max_new_tokens=args.max_new_tokens,
                                   temperature=args.temperature, seed=args.seed * 1_000_003 + step)  # R = B G answers
            with timer.phase("reward"):
                scores = reward(rollout.texts, [s for s in samples for _ in range(G)])
                rewards, valid = torch.tensor(scores.values).view(B, G), torch.tensor(scores.valid).view(B, G)
                advantage = group_advantages(rewards, scale=args.advantage_scale, valid=valid).view(-1).to(policy.device)  # (R,)
            with timer.phase("reference"), torch.no_grad():
                ref_logprob = torch.cat([
                    reference.score(prompts.select(part), rollout.tokens[rows], rollout.mask[rows], temperature=args.temperature)
                    for part, rows in batches_of(range(B), args.micro_prompts, G)])  # (R, T)
            with timer.phase("update"):
                for update, update_rows in batches_of(range(B), B // args.updates_per_rollout, G):
                    tokens = rollout.mask[update_rows].sum()  # what the token mean divides by
                    for part, rows in batches_of(range(update.start, update.stop), args.micro_prompts, G):
                        mask = rollout.mask[rows]
                        logprob, entropy = policy.score(prompts.select(part), rollout.tokens[rows], mask,
                                                        temperature=args.temperature, entropy=True)  # (r, T)
                        loss, stats = grpo_loss(
                            logprob, rollout.logprob[rows], advantage[rows], mask, ref_logprob=ref_logprob[rows],
                            kl_coef=args.kl_coef, kl_estimator=args.kl_estimator, clip_low=args.clip_low,
                            clip_high=args.clip_high, dual_clip=args.dual_clip, denominator=tokens)
                        loss.backward()
                        means.add(mask.sum(), loss=loss.detach() * tokens / mask.sum(),
                                  entropy=entropy.detach()[mask].mean(), **stats)
                    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
                    means.add(1, grad_norm=grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()

            row = {"step": step, **rollout_stats(rewards, valid, scores.parts, rollout), **means.row(), **timer.row()}
            row["tokens_per_second"] = int(rollout.mask.sum()) / sum(timer.seconds.values())
            metrics.write(row)
            rollouts.write({"step": step, "groups": group_rows(samples, rollout, rewards, scores.parts, advantage, groups=2)})
            bar.set_postfix(reward=f"{row['reward']:.3f}", kl=f"{row['kl']:.4f}", tokens=f"{row['answer_tokens']:.0f}")
            if stopping():
                stop_early(folder, step + 1, policy, optimizer)
            if (step + 1) % args.save_steps == 0 and step + 1 < args.max_steps:
                save_checkpoint(folder, step + 1, policy, optimizer)

    save_final(folder, policy)
    draw_curves(folder)
    print(f"saved {folder / 'final'}")


def batches_of(prompts: range, size: int, group_size: int) -> list[tuple[slice, slice]]:
    """Slices of `size` prompts, each with the slice of its answer rows."""
    starts = range(prompts.start, prompts.stop, size)
    parts = [slice(first, min(first + size, prompts.stop)) for first in starts]
    return [(part, slice(part.start * group_size, part.stop * group_size)) for part in parts]


if __name__ == "__main__":
    main()
