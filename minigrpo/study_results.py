"""docs/study.json: the figures of the study, from the evaluations and logs of its runs."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from minigrpo.data import split_thinking
from minigrpo.metrics.bootstrap import interval, paired
from minigrpo.rewards.phantom_entities import entity_f1

# what GRPO is rewarded with, and gains are told in
MAIN = {"report": "gleu", "grounding": "soft_f1"}
SHOWN = {
    "report": (
        "gleu",
        "rouge_l",
        "cider",
        "entities_simple",
        "entities_partial",
        "entities_complete",
        "characters",
        "length",
    ),
    "grounding": ("soft_f1", "map50", "boxes", "length"),
}
COMMON = ("thinking_length", "think_format", "unparseable", "cut_off")
CURVES = (
    "reward",
    "answer_tokens",
    "thinking_words",
    "answer_words",
    "think_format",
    "cut_off",
    "kl",
)
POINTS = 20  # of a curve

Items = dict[str, dict]  # by sample id: metric -> value


def collect(where: dict[str, Path], size, rewards: list[str], *, smoke: bool) -> dict:
    """The whole of study.json; `where` holds the folder of each run."""
    kinds = read_kinds(where["films"] / "test.jsonl")
    evaluations: dict[str, dict[str, Items]] = {}

    def evaluated(name: str, task: str) -> Items:
        if name not in evaluations:
            evaluations[name] = read_items(where[name] / "predictions.jsonl", kinds)
        return evaluations[name][task]

    runs, before, after = {}, {}, {}
    for start in ("general", "domain"):
        for mode in ("direct", "thinking"):
            for task, metric in MAIN.items():
                arm = f"{start}-{mode}-{task}"
                names = [f"{arm}-{seed}" for seed in range(size.seeds)]
                sft, rl = (
                    evaluated(f"{start}-{mode}-sft", task),
                    [evaluated(f"{name}-test", task) for name in names],
                )
                before[arm], after[arm] = values(pooled([sft]), metric), values(pooled(rl), metric)
                runs[arm] = {
                    "sft": summary(pooled([sft]), task),
                    "rl": summary(pooled(rl), task),
                    "gain": gain(after[arm], before[arm]),
                    "seeds": [
                        {
                            "seed": seed,
                            "gain": gain(values(items, metric), before[arm]),
                            "rl": means(items, task),
                            "seconds": seconds(where[name]),
                        }
                        for seed, (name, items) in enumerate(zip(names, rl))
                    ],
                    "curves": curves([where[name] / "metrics.jsonl" for name in names]),
                    "example": example(
                        where[f"{start}-{mode}-sft"], where[f"{names[0]}-test"], task
                    ),
                }
    ablation = {"none": summary(pooled([evaluated("domain-direct-sft", "report")]), "report")}
    for reward in rewards:
        names = [
            f"domain-direct-report-{s}" if reward == "gleu" else f"reward-{reward}-{s}"
            for s in range(size.seeds)
        ]
        items = pooled([evaluated(f"{name}-test", "report") for name in names])
        ablation[reward] = summary(items, "report") | {
            "gain": gain(values(items, "gleu"), before["domain-direct-report"]),
            "curves": curves([where[name] / "metrics.jsonl" for name in names]),
            "example": last_answer(where[f"{names[0]}-test"]),
        }
    cost = [seconds(folder) for folder in where.values()]
    return {
        "smoke": smoke,
        "size": asdict(size),
        "cores": os.cpu_count(),
        "seconds_of_all_runs": round(sum(cost), 1),
        "runs": runs,
        "thinking_over_direct": thinking_over_direct(before, after),
        "general_gains_more": general_gains_more(before, after),
        "ablation": ablation,
    }


def read_kinds(path: Path) -> dict[str, str]:
    """{id of a question for boxes: "all findings", or its kind}."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        r["id"]: r["label"] if r.get("label") == "all findings" else r["kind"]
        for r in rows
        if r["task"] == "grounding"
    }


def read_items(path: Path, kinds: dict[str, str]) -> dict[str, Items]:
    """{task: {id: metric -> value}} of an evaluation; reports with the F1 of their entities, boxes
    with map50 by kind of question.
    """
    items: dict[str, Items] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        item = {
            key: value for key, value in row["scores"].items() if isinstance(value, int | float)
        }
        if row["task"] == "report":
            _, text, ok = split_thinking(row["answer"])
            item |= {
                f"entities_{level}": value
                for level, value in entity_f1(text if ok else "", row["reference"]).items()
            }
        else:
            item[f"map50 {kinds[row['id']]}"] = item["map50"]
        items.setdefault(row["task"], {})[row["id"]] = item
    return items


def pooled(seeds: list[Items]) -> Items:
    """Each sample's mean over the seeds: a seed is no new sample."""
    return {
        i: {key: sum(items[i][key] for items in seeds) / len(seeds) for key in item}
        for i, item in seeds[0].items()
    }


def values(items: Items, metric: str) -> dict[str, float]:
    return {i: item[metric] for i, item in items.items()}


def summary(items: Items, task: str) -> dict:
    """{metric: {"mean", "low", "high", "n"}}."""
    names = dict.fromkeys(key for item in items.values() for key in item)
    kept = [key for key in names if key in (*SHOWN[task], *COMMON) or key.startswith("map50 ")]
    return {key: interval([item[key] for item in items.values() if key in item]) for key in kept}


def means(items: Items, task: str) -> dict[str, float]:
    return {key: value["mean"] for key, value in summary(items, task).items()}


def gain(a: dict[str, float], b: dict[str, float]) -> dict:
    """{"mean", "low", "high", "p", "n"} of a minus b over the same samples, paired."""
    difference = paired([a[i] for i in a], [b[i] for i in a])
    return {"mean": difference.pop("difference")} | difference


def thinking_over_direct(before: dict, after: dict) -> dict:
    """{start-task: {"sft", "rl"}}: the thinking arm minus the direct one, on the same samples."""
    return {
        f"{start}-{task}": {
            name: gain(arms[f"{start}-thinking-{task}"], arms[f"{start}-direct-{task}"])
            for name, arms in (("sft", before), ("rl", after))
        }
        for start in ("general", "domain")
        for task in MAIN
    }


def general_gains_more(before: dict, after: dict) -> dict:
    """{mode-task: what RL adds to the general start minus what it adds to the domain start}."""
    added = {arm: {i: after[arm][i] - before[arm][i] for i in after[arm]} for arm in after}
    return {
        f"{mode}-{task}": gain(added[f"general-{mode}-{task}"], added[f"domain-{mode}-{task}"])
        for mode in ("direct", "thinking")
        for task in MAIN
    }


def curves(logs: list[Path]) -> dict[str, list[float]]:
    """{figure: its mean over the seeds in each of up to `POINTS` equal parts of the run}."""
    seeds = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    steps = min(map(len, seeds))
    edges = [round(k * steps / min(POINTS, steps)) for k in range(min(POINTS, steps) + 1)]

    def mean(name, a, b):
        return round(
            sum(row[name] for rows in seeds for row in rows[a:b]) / (len(seeds) * (b - a)), 5
        )

    return {
        name: [mean(name, a, b) for a, b in zip(edges, edges[1:])]
        for name in CURVES
        if name in seeds[0][0]
    }


def seconds(folder: Path) -> float:
    return json.loads((folder / "done.json").read_text())["seconds"]


def answers(folder: Path, accept: Callable[[dict], bool]) -> dict[str, dict]:
    rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    return {row["id"]: row for row in rows if accept(row)}


def example(sft: Path, rl: Path, task: str) -> dict[str, str]:
    """The first test sample's question and reference, and its answers before and after."""
    was, now = (answers(folder, lambda row: row["task"] == task) for folder in (sft, rl))
    first = next(iter(now))
    return {
        "question": now[first]["question"],
        "reference": now[first]["reference"],
        "sft": was[first]["answer"],
        "rl": now[first]["answer"],
    }


def last_answer(rl: Path) -> str:
    return next(iter(answers(rl, lambda row: row["task"] == "report").values()))["answer"]
