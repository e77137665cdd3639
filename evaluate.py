"""Greedy answers of a checkpoint to a JSONL file, scored with 95% bootstrap intervals.

    python evaluate.py --model runs/report/final --data data/phantom/test.jsonl --output_dir runs/report/test \
        --baseline runs/sft/test

`--baseline OTHER_EVALUATION` adds the paired difference to another model's answers to the same file. `--model constant`
answers the same whatever the film shows, as well as one can: the best box of each label and the best report of
`--train_data`. What does not beat it has not looked at the film.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from minigrpo.data import Sample, read_jsonl
from minigrpo.generate import generate
from minigrpo.metrics import compare, constant_boxes, constant_report, evaluate_answers
from minigrpo.policy import Policy
from minigrpo.run.args import at_least_one, input_errors, parse_args
from minigrpo.run.plots import draw_samples


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "checkpoint folder, hub name, or `constant`"})
    data: str = field(metadata={"help": "JSONL file of test samples"})
    output_dir: str = field(metadata={"help": "folder to make: predictions.jsonl, metrics.json, table.md, samples.png"})
    task: str = field(default="all", metadata={"help": "evaluate samples of this task only",
                                               "choices": ["report", "grounding", "classification", "conversation", "all"]})
    baseline: str | None = field(default=None, metadata={"help": "another evaluation's folder, to compare with item by item"})
    train_data: str | None = field(default=None, metadata={"help": "where `--model constant` takes its answers from"})
    batch_size: int = field(default=64, metadata={"help": "answers generated at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})

    def check(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            at_least_one(self, name)
        if self.model == "constant" and not self.train_data:
            raise ValueError("--model constant needs --train_data, to choose its answers from")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    with input_errors():
        args = parse_args(EvaluateArguments, __doc__)
        folder = Path(args.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give another --output_dir")
        samples = read_jsonl(args.data, task=args.task)
        baseline = read_predictions(args.baseline, samples) if args.baseline else None
        if args.model == "constant":
            answers = constant_answers(read_jsonl(args.train_data, task=args.task, verify_images=False), samples)
        else:
            policy = Policy.from_pretrained(args.model, device=args.device, autocast=args.bf16)
    if args.model != "constant":
        answers = greedy_answers(policy, samples, args.batch_size, args.max_new_tokens)

    results = evaluate_answers(samples, answers)
    items = results.pop("items")
    metrics = {"model": args.model, "data": args.data, "tasks": results}
    if baseline:
        metrics["baseline"] = args.baseline
        metrics["difference"] = compare(items, [row["scores"] for row in baseline])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w") as file:
        for sample, answer, item in zip(samples, answers, items):
            file.write(json.dumps({"id": sample.id, "task": sample.task, "question": sample.question,
                                   "reference": sample.answer, "answer": answer, "scores": item}) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "table.md").write_text(table := markdown_table(metrics))
    draw_samples(folder / "samples.png", samples, answers, [row["answer"] for row in baseline] if baseline else None)
    print(table)


def greedy_answers(policy: Policy, samples: list[Sample], batch_size: int, max_new_tokens: int) -> list[str]:
    """Answers in the order of the samples; those of like length of question and task are generated together."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].task, len(samples[i].question)))
    answers = [""] * len(samples)
    for first in tqdm(range(0, len(order), batch_size), desc="evaluate", unit="batch"):
        chosen = order[first:first + batch_size]
        rollout = generate(policy, policy.encode([samples[i] for i in chosen]), max_new_tokens=max_new_tokens, temperature=0)
        for i, text in zip(chosen, rollout.texts):
            answers[i] = text
    return answers


def constant_answers(train: list[Sample], samples: list[Sample]) -> list[str]:
    """For each task that has a constant baseline; samples of other tasks are an error."""
    answers = {}
    for task, choose in (("grounding", constant_boxes), ("report", constant_report)):
        test = [s for s in samples if s.task == task]
        if test:
            answers |= zip((s.id for s in test), choose([s for s in train if s.task == task], test))
    missing = sorted({s.task for s in samples if s.id not in answers})
    if missing:
        raise ValueError(f"--model constant has no answer for {', '.join(missing)}: choose --task report or grounding")
    return [answers[s.id] for s in samples]


def read_predictions(folder: str, samples: list[Sample]) -> list[dict]:
    """Another evaluation's rows for these samples, in their order."""
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(f"--baseline {folder} is no evaluation: it holds no predictions.jsonl")
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    missing = [s.id for s in samples if s.id not in rows]
    if missing:
        raise ValueError(f"--baseline {folder} has no answer for {len(missing)} of the samples, such as {missing[0]}: "
                         "evaluate both models on the same file")
    return [rows[s.id] for s in samples]


def markdown_table(metrics: dict) -> str:
    """Mean [95% interval] of every metric, and beside it the paired difference to the baseline."""
    lines = [f"Model `{metrics['model']}` on `{metrics['data']}`, greedy, 95% bootstrap intervals."]
    if "baseline" in metrics:
        lines[0] += f" Gain: paired difference to `{metrics['baseline']}`."
    for task, figures in metrics["tasks"].items():
        gains = metrics.get("difference", {}).get(task)
        lines += ["", f"**{task}**, {figures['n']} samples", "", "| metric | value |" + (" gain | p |" if gains else ""),
                  "|---|---|" + ("---|---|" if gains else "")]
        for name, value in figures.items():
            if name == "n":
                continue
            line = f"| {name} | {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] |"
            if gains:
                gain = gains[name]
                line += f" {gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] | {gain['p']:.3f} |"
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
