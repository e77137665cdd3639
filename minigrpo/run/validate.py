"""Greedy answers and validation, divided among the ranks."""

from collections.abc import Iterable

import torch
from tqdm import tqdm

from minigrpo.data import Sample
from minigrpo.generate import generate
from minigrpo.policy import Policy
from minigrpo.rewards import BadReward
from minigrpo.run.distributed import first, gathered, rank, ranks, total
from minigrpo.run.guard import end_for, in_time, warn


def greedy_answers(
    policy: Policy, samples: list[Sample], batch_size: int, max_new_tokens: int, show: bool = True
) -> tuple[list[str], list[bool]]:
    """Answers in the order of the samples, and which of them `max_new_tokens` cut off; the same on
    every rank.

    Samples of the same task with questions of similar length are batched together, in the same
    batches whatever the number of ranks.
    """
    order = sorted(range(len(samples)), key=lambda i: (samples[i].task, len(samples[i].question)))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    mine = {}
    for chosen in tqdm(
        batches[rank() :: ranks()], desc="evaluate", unit="batch", disable=not (show and first())
    ):
        rollout = generate(
            policy,
            policy.encode([samples[i] for i in chosen]),
            max_new_tokens=max_new_tokens,
            temperature=0,
        )
        mine |= zip(chosen, zip(rollout.texts, (~rollout.finished).tolist()))
    by_place = {place: each for theirs in gathered(mine) for place, each in theirs.items()}
    return [by_place[i][0] for i in range(len(samples))], [
        by_place[i][1] for i in range(len(samples))
    ]


def mean_reward(policy: Policy, samples: list[Sample], reward, args) -> float | None:
    """The mean reward of greedy answers to the samples, over those that could be scored in time;
    the first rank scores. None if more than a share --max_unscored could not be: otherwise the mean
    of a few could become the best.
    """
    (answers, _), mean, problem = (
        greedy_answers(policy, samples, args.rollout_rows, args.max_new_tokens, show=False),
        None,
        None,
    )
    if first():
        try:
            scores = in_time(reward, answers, samples, 1, args.reward_timeout)
            values = [value for value, ok in zip(scores.values, scores.valid) if ok]
            failed = len(samples) - len(values)
            if values and failed <= args.max_unscored * len(samples):
                mean = sum(values) / len(values)
            if failed:
                end = "" if mean is not None else ": this validation is left out"
                warn(
                    f"the reward could not score {failed} of {len(samples)} answers to "
                    f"--eval_data ({'; '.join(scores.errors) or 'NaN'}){end}"
                )
        except BadReward as error:
            problem = str(error)
    mean, problem = gathered((mean, problem))[0]
    end_for(problem)
    return mean


@torch.no_grad()
def mean_loss(policy: Policy, parts: Iterable) -> float:
    """Nats per answer token; `parts` is this rank's share of the validation samples, as
    `policy.encode_turns` gives it.
    """
    loss = tokens = torch.zeros((), dtype=torch.float64, device=policy.device)
    for prompts, blocks in parts:
        prefix = policy.prefill(prompts)
        for answer, mask, _ in blocks:
            loss, tokens = (
                loss - policy.score(prefix, answer, mask).double().sum(),
                tokens + mask.sum(),
            )
    return (total(loss) / total(tokens)).item()
