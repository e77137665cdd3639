"""docs/study.json: the figures of the study, from the evaluations and logs of its runs."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minigrpo.data import split_thinking
from minigrpo.data.scenes import THINGS
from minigrpo.metrics.bootstrap import interval, paired
from minigrpo.metrics.drawn import DRAWN
from minigrpo.rewards.phantom_entities import annotate

# what gains are told in: the clinical metric first, then the one that is nearest to the reward
HEADLINE = {"report": ("entity_f1", "gleu"), "grounding": ("map50", "soft_f1")}
SHOWN = {
    "report": (
        "entity_f1",
        "entity_f1_partial",
        "entity_f1_simple",
        "gleu",
        "rouge_l",
        "cider",
        "characters",
        "unscored",
        "of_scenes",
        "of_films",
        "length",
    ),
    "grounding": ("map50", "soft_f1", "boxes", "of_scenes", "length"),
}
OF_SCENES = re.compile(rf"\b(?:{'|'.join(THINGS)})s?\b")
OF_FILMS = re.compile(r"heart|card|lung|pleural|pneumo|effusion|consolid|nodule|\btubes?\b|bones")
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

    runs: dict = {}
    before: dict[str, Items] = {}
    after: dict[str, Items] = {}
    for start in ("general", "domain"):
        for mode in ("direct", "thinking"):
            for task in HEADLINE:
                arm = f"{start}-{mode}-{task}"
                names = [f"{arm}-{seed}" for seed in range(size.seeds)]
                rl = [evaluated(f"{name}-test", task) for name in names]
                before[arm], after[arm] = evaluated(f"{start}-{mode}-sft", task), pooled(rl)
                runs[arm] = {
                    "sft": summary(before[arm], task),
                    "rl": summary(after[arm], task),
                    "gain": gains(after[arm], before[arm], task),
                    "seeds": [
                        {
                            "seed": seed,
                            "gain": gains(items, before[arm], task),
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
    ablation: dict = {"none": summary(before["domain-direct-report"], "report")}
    for reward in rewards:
        names = [
            f"domain-direct-report-{s}" if reward == "mix" else f"reward-{reward}-{s}"
            for s in range(size.seeds)
        ]
        items = pooled([evaluated(f"{name}-test", "report") for name in names])
        ablation[reward] = summary(items, "report") | {
            "gain": gains(items, before["domain-direct-report"], "report"),
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
        "constant": {task: summary(evaluated("constant", task), task) for task in HEADLINE},
        "references": references(where["films"] / "test.jsonl"),
        "thinking_over_direct": thinking_over_direct(before, after),
        "general_gains_more": general_gains_more(before, after),
        "general_share": general_share(after),
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
    """{task: {id: metric -> value}} of an evaluation: its scores, boxes' also by kind of question,
    and what `wording` counts.
    """
    items: dict[str, Items] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        item = {key: value for key, value in row["scores"].items() if key not in ("id", "task")}
        _, text, ok = split_thinking(row["answer"])
        item |= wording(text if ok else "")
        if row["task"] == "grounding":
            kind = kinds[row["id"]]
            item |= {f"{metric} {kind}": item[metric] for metric in HEADLINE["grounding"]}
        items.setdefault(row["task"], {})[row["id"]] = item
    return items


def wording(text: str) -> dict[str, float]:
    """ "of_scenes", "of_films": 1 where the text names a thing of the scenes, a part or finding of
    films. "unscored": characters of its sentences in which no entity stands.
    """
    sentences = re.findall(r"[^.]+(?:\.|$)", text)
    return {
        "of_scenes": float(bool(OF_SCENES.search(text.lower()))),
        "of_films": float(bool(OF_FILMS.search(text.lower()))),
        "unscored": float(sum(len(s.strip()) for s in sentences if not annotate(s)["entities"])),
    }


def references(path: Path) -> dict[str, float]:
    """Mean "characters" and "unscored" characters of the test films' own reports."""
    rows = map(json.loads, path.read_text().splitlines())
    texts = [row["answer"] for row in rows if row["task"] == "report"]
    return {
        "characters": sum(map(len, texts)) / len(texts),
        "unscored": sum(wording(text)["unscored"] for text in texts) / len(texts),
    }


def pooled(seeds: list[Items]) -> Items:
    """Each sample's mean over the seeds: a seed is no new sample. A row of statistics counts as its
    mean row.
    """
    return {
        i: {
            key: np.mean([items[i][key] for items in seeds], axis=0).tolist()
            for key, value in item.items()
            if not isinstance(value, list) or key == "drawn"
        }
        for i, item in seeds[0].items()
    }


def values(items: Items, metric: str) -> list[float]:
    return [item[metric] for item in items.values()]


def summary(items: Items, task: str) -> dict:
    """{metric: {"mean", "low", "high", "n"}}."""
    names = dict.fromkeys(key for item in items.values() for key in item)
    kept = [key for key in names if key.split(" ")[0] in (*SHOWN[task], *COMMON)]
    result = {key: interval([item[key] for item in items.values() if key in item]) for key in kept}
    rows = [item["drawn"] for item in items.values() if "drawn" in item]
    return result | {name: interval(rows, score) for name, score in DRAWN.items() if rows}


def means(items: Items, task: str) -> dict[str, float]:
    return {key: value["mean"] for key, value in summary(items, task).items()}


def gain(a: list[float], b: list[float]) -> dict:
    """{"mean", "low", "high", "p", "n"} of a minus b over the same samples, paired."""
    difference = paired(a, b)
    return {"mean": difference.pop("difference")} | difference


def gains(a: Items, b: Items, task: str) -> dict[str, dict]:
    """{metric: `gain`} of a over b in the task's headline metrics."""
    return {
        metric: gain([a[i][metric] for i in a], [b[i][metric] for i in a])
        for metric in HEADLINE[task]
    }


def thinking_over_direct(before: dict, after: dict) -> dict:
    """{start-task: {"sft", "rl"}: {metric: gain}}: the thinking arm minus the direct one, on the
    same samples.
    """
    return {
        f"{start}-{task}": {
            name: gains(arms[f"{start}-thinking-{task}"], arms[f"{start}-direct-{task}"], task)
            for name, arms in (("sft", before), ("rl", after))
        }
        for start in ("general", "domain")
        for task in HEADLINE
    }


def general_gains_more(before: dict, after: dict) -> dict:
    """{mode-task: {metric: what RL adds to the general start minus what it adds to the domain
    start}}.
    """

    def added(arm: str, metric: str) -> list[float]:
        return [after[arm][i][metric] - before[arm][i][metric] for i in after[arm]]

    return {
        f"{mode}-{task}": {
            metric: gain(
                added(f"general-{mode}-{task}", metric), added(f"domain-{mode}-{task}", metric)
            )
            for metric in metrics
        }
        for mode in ("direct", "thinking")
        for task, metrics in HEADLINE.items()
    }


def general_share(after: dict) -> dict:
    """{mode-task: {metric: {"mean", "low", "high", "n"}}}: the general start's figure after RL over
    the domain start's, samples resampled together; 0 where the latter is.
    """

    def ratio(sums: np.ndarray) -> np.ndarray:
        general, domain = sums[..., 0], sums[..., 1]
        return np.divide(general, domain, out=np.zeros_like(general), where=domain > 0)

    return {
        f"{mode}-{task}": {
            metric: interval(
                [
                    [item[metric], after[f"domain-{mode}-{task}"][i][metric]]
                    for i, item in after[f"general-{mode}-{task}"].items()
                ],
                ratio,
            )
            for metric in metrics
        }
        for mode in ("direct", "thinking")
        for task, metrics in HEADLINE.items()
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
