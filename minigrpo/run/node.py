"""What a step of GRPO needs from the machine, on a node of many ranks where memory runs out,
rewards hang and gradients explode: a hardened `minigrpo.grpo.Node`.
"""

from contextlib import ExitStack, contextmanager

from minigrpo import grpo
from minigrpo.data import batch_at, scale_note
from minigrpo.run.distributed import (
    balance_over_ranks,
    in_order,
    places_of_this_rank,
    ranks,
    share_weights,
    sum_gradients,
    total,
)
from minigrpo.run.groups import Groups, of_all_ranks, padding_share
from minigrpo.run.guard import Skipped, agreed_scores, in_time, retry_smaller_on_oom
from minigrpo.run.log import Means, Timer, peak_memory_gb, rollout_stats
from minigrpo.run.roofline import efficiency
from minigrpo.run.shard import clip_gradients, gathered_layers, same_passes_on_every_rank


class ArmouredNode(grpo.Node):
    """`begin` before each step; afterwards `timer`, `groups` (of all ranks), `mine` (the places of
    this rank's among them) and `replaced` (groups without spread that were replaced) describe
    it."""

    def __init__(self, args, skipped: Skipped, limits: dict | None = None):
        """`limits` of the machine, as `measure_roofline` finds them, are for `row`."""
        self.args, self.skipped, self.limits = args, skipped, limits
        self.sharded = args.shard and ranks() > 1

    def begin(self, number: int) -> None:
        self.number, self.update, self.timer, self.replaced = number, 0, Timer(), 0
        self.skipped_before = self.skipped.count

    @contextmanager
    def phase(self, name, *models):
        with ExitStack() as inside:
            inside.enter_context(self.timer.phase(name))
            for model in models:
                inside.enter_context(gathered_layers(model))
            yield

    def fit(self, size, work, undo=None):
        alone = undo is None or not self.sharded  # ranks go through sharded layers together
        return retry_smaller_on_oom(self.args, size, work, undo or (lambda: None), alone=alone)

    def total(self, x):
        return total(x)

    def passes(self, policy, parts, spare=list):
        return same_passes_on_every_rank(policy, parts, spare)

    def step(self, policy, *optimizers, batch):
        sum_gradients(policy.parameters())
        norm = clip_gradients(policy.parameters(), self.args.grad_clip)
        self.update += 1
        if not self.skipped.accept_or_record(norm, self.number, self.update - 1, batch):
            return None
        for optimizer in optimizers:
            optimizer.step()
        share_weights(policy.parameters())
        return norm

    def collect(self, policy, samples, reward) -> Groups:
        """The step's groups of this rank, in the order of the updates: `grpo.collect` on each rank,
        and again for groups without spread (--dynamic_sampling)."""
        args, count = self.args, self.args.prompts_per_step
        self.template_opens_think = reward.template_opens_think

        def judge(answers, asked):
            return agreed_scores(
                lambda: in_time(reward, answers, asked, args.group_size, args.reward_timeout),
                args.max_unscored,
                self.number,
            )

        places_left, groups = list(range(count)), None
        for refill in range(1 + args.dynamic_sampling):
            seed = args.seed + 1_000_000 * refill  # (seed, step) alone decide: a run can resume
            batch = batch_at(samples, self.number, count, seed)
            mine = places_of_this_rank(len(places_left))
            new_groups = of_all_ranks(
                mine,
                grpo.collect(
                    policy,
                    [batch[place] for place in mine],
                    judge,
                    args,
                    seed * 1_000_003 + self.number,
                    self,
                    mine,
                ),
            )
            groups = groups.replace(places_left, new_groups) if refill else new_groups
            self.replaced += len(places_left) if refill else 0
            places_left = groups.without_spread()
            if not places_left:
                break
        # From here on a rank has the groups of each update that balance the tokens, in order.
        self.groups, prompts = groups, groups.prompts
        self.mine, spans = balance_over_ranks(groups.tokens(), count // args.updates_per_rollout)
        own = groups.take(self.mine)
        if self.replaced or ranks() > 1:
            with self.phase("rollout"):
                prompts = policy.encode(own.samples)
        own.prompts, own.spans = prompts, spans
        return own

    def row(self, policy, done: grpo.Step) -> dict:
        """The figures of the step, for metrics.jsonl."""
        means = Means()
        for weight, figures in done.figures:
            means.add(weight, **figures)
        prompts, rollout = done.groups.prompts, done.groups.rollout
        padding = padding_share(prompts, done.mask, done.parts)
        return {
            **rollout_stats(self.groups, self.template_opens_think),
            "groups_replaced": self.replaced,
            **means.row(),
            "skipped_updates": self.skipped.count - self.skipped_before,
            **self.timer.row(),
            "peak_memory_gb": peak_memory_gb(policy.device),
            **efficiency(policy, prompts, rollout, self.timer.seconds, padding, self.limits),
        }

    def rollouts(self, done: grpo.Step) -> list[dict]:
        """The first two groups of the step, for rollouts.jsonl."""
        return self.groups.rows(in_order(self.mine, done.advantage).flatten(), range(2))

    def scale_note(self) -> str | None:
        """Doubts about --box_scale, from the answers of the step."""
        asked = [s for s in self.groups.samples for _ in range(self.args.group_size)]
        answers = self.groups.rollout.texts
        return scale_note(answers, asked, self.template_opens_think, self.args.box_scale)
