"""Where does GRPO have room to gain? Greedy answers, sampled answers and the best of G, before any
RL.

    python -m minigrpo.probe --model runs/demo/sft/final --data runs/demo/films/test.jsonl

For each task, and each kind of question: the reward of the greedy answer, the mean of G sampled
ones, the mean of the best of G, and the share of groups without spread, whose answers all get the
same reward and from which GRPO learns nothing. The difference between `sampled` and `best` is what
a group can teach: a task on which both are equal, or on which most groups have no spread, is the
wrong one to train on.

Run it again on the trained model: the questions and the seed are the same, so two files can be
compared question by question.
"""

import json
import math
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import ProbeArguments

if __name__ == "__main__":
    answer_early(ProbeArguments, __doc__)  # what follows takes seconds to import

import numpy as np
from tqdm import tqdm

from minigrpo.data import Sample, ask_to_think, read_jsonl
from minigrpo.generate import generate
from minigrpo.metrics import interval
from minigrpo.policy import Policy
from minigrpo.rewards import Reward, reward_fn
from minigrpo.rewards.weights import cache_dir
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import make_folder, write_aside
from minigrpo.run.validate import greedy_answers
from minigrpo.visible import visible

FIGURES = ("greedy", "sampled", "best", "no_spread")


@run_errors(lambda: "Nothing has been written", "--rollout_rows or --max_pixels")
def main() -> None:
    with input_errors():
        args = parse_args(ProbeArguments, __doc__)
        output = args.output_file and Path(args.output_file)
        if output:
            if output.exists():
                raise ValueError(f"{output} exists already: give another --output_file")
            make_folder(output.parent)
        reward = reward_fn(
            args.reward,
            box_scale=args.box_scale,
            weights_dir=args.reward_weights,
            device=args.device,
            cache=cache_dir() / "references.sqlite",
        )
        samples = chosen_samples(args, reward)
        policy = Policy.from_pretrained(
            args.model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
        )
        reward.template_opens_think = policy.template_opens_think
    items, errors = probe(policy, samples, reward, args)
    results = {
        "model": args.model,
        "data": args.data,
        "reward": args.reward,
        "group_size": args.group_size,
        "temperature": args.temperature,
        "seed": args.seed,
        "tasks": summarise(items),
        "items": items,
    }
    if output:
        write_aside(output, json.dumps(results, indent=1) + "\n")
    for error in errors:
        print(visible(f"note: the reward could not score some answers: {error}"))
    print(visible(markdown(results)), end="")


def chosen_samples(args: ProbeArguments, reward: Reward) -> list[Sample]:
    """`--samples` samples of each task that the reward covers, evenly spaced over the file."""
    samples = read_jsonl(args.data, task=args.task)
    chosen = []
    for task in sorted(reward.tasks):
        those = [sample for sample in samples if sample.task == task]
        count = min(len(those), args.samples or len(those))
        chosen += [those[k * len(those) // count] for k in range(count)]
    if not chosen:
        raise ValueError(
            f"--reward {args.reward} covers {', '.join(sorted(reward.tasks))}, and {args.data} has"
            f" no such sample with --task {args.task}: choose another --reward or --task"
        )
    return ask_to_think(chosen) if args.think else chosen


def probe(
    policy: Policy, samples: list[Sample], reward: Reward, args: ProbeArguments
) -> tuple[list[dict], list[str]]:
    """({"id", "task", "kind", "greedy": reward, "sampled": G rewards} of each sample, what the
    reward raised). None for a reward that could not be computed.
    """
    greedy, _ = greedy_answers(policy, samples, args.rollout_rows, args.max_new_tokens)
    size = max(1, args.rollout_rows // args.group_size)  # prompts at once
    sampled: list[str] = []
    for begin in tqdm(range(0, len(samples), size), desc="sample", unit="batch"):
        part = samples[begin : begin + size]
        # by its line: whichever other questions are asked, a question's answers stay the same
        prompts = policy.encode(part).numbered([sample.line for sample in part])
        sampled += generate(
            policy,
            prompts,
            group_size=args.group_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            rows_at_once=args.rollout_rows,
        ).texts
    of_greedy = reward(greedy, samples)
    of_sampled = reward(sampled, [s for s in samples for _ in range(args.group_size)])

    def values(scores, rows) -> list[float | None]:
        return [scores.values[r] if scores.valid[r] else None for r in rows]

    items = []
    for k, sample in enumerate(samples):
        rows = range(k * args.group_size, (k + 1) * args.group_size)
        items.append(
            {
                "id": sample.id,
                "task": sample.task,
                "kind": sample.kind,
                "greedy": values(of_greedy, [k])[0],
                "sampled": values(of_sampled, rows),
            }
        )
    return items, list(dict.fromkeys([*of_greedy.errors, *of_sampled.errors]))


def figures_of(item: dict) -> dict[str, float]:
    """`FIGURES` of one question, NaN where the reward gave no value. "no_spread" is 1 if no two of
    its scored answers differ.
    """
    scored = [value for value in item["sampled"] if value is not None]
    return {
        "greedy": math.nan if item["greedy"] is None else item["greedy"],
        "sampled": float(np.mean(scored)) if scored else math.nan,
        "best": max(scored, default=math.nan),
        "no_spread": float(len(set(scored)) < 2),
    }


def summarise(items: list[dict]) -> dict:
    """{task: {"all" | kind: {"n", figure: interval}}} over the questions; kinds only if a task has
    more than one.
    """
    results: dict = {}
    for task in dict.fromkeys(item["task"] for item in items):
        those = [item for item in items if item["task"] == task]
        kinds = sorted({item["kind"] for item in those if item["kind"]})
        groups = {"all": those} | {
            kind: [item for item in those if item["kind"] == kind]
            for kind in kinds
            if len(kinds) > 1
        }
        results[task] = {name: _intervals(group) for name, group in groups.items()}
    return results


def _intervals(items: list[dict]) -> dict:
    rows = [figures_of(item) for item in items]
    result: dict = {"n": len(items)}
    for name in FIGURES:
        if values := [row[name] for row in rows if not math.isnan(row[name])]:
            result[name] = interval(values)
    return result


def markdown(results: dict) -> str:
    """The figures as a table, 95% bootstrap intervals over questions."""

    def cell(figures: dict, name: str) -> str:
        value = figures.get(name)
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" if value else ""

    best = f"best of {results['group_size']}"
    lines = [
        f"Reward `{results['reward']}` of `{results['model']}`, T = {results['temperature']:g}, 95%"
        " bootstrap intervals.",
        "",
        f"| task | questions | n | greedy | sampled | {best} | groups without spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, groups in results["tasks"].items():
        for kind, figures in groups.items():
            cells = [task, kind, figures["n"], *(cell(figures, name) for name in FIGURES)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
