"""The study's tables and figures, from study.json alone; the paper's published figures stand beside
ours.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be set first

from minigrpo.metrics.published import REWARDS, TABLE_1, TABLE_2, TABLE_3  # noqa: E402
from minigrpo.metrics.table import cell, figure, grid  # noqa: E402
from minigrpo.run.files import aside, write_aside  # noqa: E402
from minigrpo.study_results import HEADLINE  # noqa: E402

ARMS = [f"{start}-{mode}" for start in ("general", "domain") for mode in ("direct", "thinking")]
THEIRS = {
    "general-direct": ("Qwen3-VL", "Qwen3-VL+RL"),
    "general-thinking": ("Qwen3-VL-Thinking", "Qwen3-VL-Thinking+RL"),
    "domain-direct": ("RadVLM (SFT)", "RadVLM+RL"),
    "domain-thinking": (None, "RadVLM-Thinking+RL"),
}
TITLES = {"entity_f1": "entity F1", "gleu": "GLEU", "map50": "mAP@0.5", "soft_f1": "soft F1"}
THEIR_REWARD = {
    "none": "none (SFT)",
    "mix": "RadCliQ",
    "gleu": "GLEU",
    "radgraph": "RadGraph complete",
    "bertscore": "BERTScore",
}
KINDS = ("anatomy", "abnormality", "phrase", "all findings")  # of questions for boxes
GAINED = HEADLINE["report"]
NOTHING = "Not run yet: `make study` fills this part in."


def tables(results: dict) -> str:
    """All tables as Markdown; in a result without runs, a line that says so."""
    runs = results["runs"]
    if not runs:
        return NOTHING
    size = results["size"]
    seeds = len(next(iter(runs.values()))["seeds"])
    lines = [
        f"{size['films']} films to learn from, {size['test']} to test on; {seeds}"
        f" seed{'s' * (seeds > 1)} of GRPO over one SFT a start; greedy answers; 95% bootstrap"
        " intervals over test samples, each with its mean over the seeds. All runs took"
        f" {results['seconds_of_all_runs'] / 3600:.2f} hours of process time on {results['cores']}"
        " cores."
    ]
    if results["smoke"]:
        lines += ["", "**A smoke run: models of a few steps, whose figures mean nothing.**"]
    lines += [
        "",
        "### What RL adds",
        *gains(runs),
        "",
        "### Thinking against direct",
        *contrast(results["thinking_over_direct"]),
        "",
        "### How much more the general start gains",
        *general(results["general_gains_more"]),
        "",
        "### How near the general start comes",
        *nearness(results),
        "",
        "### Table 1: reports",
        *table_1(runs, results["constant"]["report"]),
        "",
        "### Table 2: grounding, mAP@0.5",
        *table_2(runs, results["constant"]["grounding"]),
        "",
        "### Table 3: what the reward does to reports",
        *table_3(results["ablation"], results["references"]),
        "",
        "### One answer of each arm",
        *examples(runs),
    ]
    return "\n".join(lines)


def gains(runs: dict) -> list[str]:
    rows = []
    for name, run in runs.items():
        arm, task = name.rsplit("-", 1)
        for metric in HEADLINE[task]:
            clinical = metric == HEADLINE[task][0]
            rows.append(
                [
                    arm,
                    f"{task}, {TITLES[metric]}",
                    cell(run["sft"][metric]),
                    cell(run["rl"][metric]),
                    cell(run["gain"][metric], "+"),
                    ", ".join(f"{seed['gain'][metric]['mean']:+.3f}" for seed in run["seeds"]),
                    their_gain(arm, task) if clinical else "",
                ]
            )
    return grid(["arm", "task", "SFT", "SFT + RL", "gain", "by seed", "theirs"], rows)


def their_gain(arm: str, task: str) -> str:
    """RadGraph F1 of reports, mean mAP@0.5 of grounding, in points."""
    before, after = THEIRS[arm]
    if before is None:
        return "-"
    if task == "report":
        return f"{TABLE_1[after][4] - TABLE_1[before][4]:+.1f} RadGraph F1"
    return f"{(sum(TABLE_2[after]) - sum(TABLE_2[before])) / len(TABLE_2[after]):+.1f} mAP@0.5"


def contrast(cells: dict) -> list[str]:
    rows = [
        [*name.split("-"), TITLES[metric], *(cell(both[k][metric], "+") for k in ("sft", "rl"))]
        for name, both in cells.items()
        for metric in both["sft"]
    ]
    heads = ["start", "task", "metric", "thinking - direct, SFT", "thinking - direct, SFT + RL"]
    return grid(heads, rows)


def general(cells: dict) -> list[str]:
    return grid(
        ["mode", "task", "metric", "gain of general - gain of domain"],
        [
            [*name.split("-"), TITLES[metric], cell(value, "+")]
            for name, by_metric in cells.items()
            for metric, value in by_metric.items()
        ],
    )


def nearness(results: dict) -> list[str]:
    """The general start after RL over the domain start after RL; boxes also by kind of question,
    beside the best constant answer, which never looks at the film.
    """
    runs, constant, rows = results["runs"], results["constant"], []
    for name, by_metric in results["general_share"].items():
        task = name.split("-")[1]
        for metric, share in by_metric.items():
            for kind in ("", *(KINDS if task == "grounding" else ())):
                key = f"{metric} {kind}".strip()
                pair = [runs[f"{start}-{name}"]["rl"].get(key) for start in ("general", "domain")]
                if None in pair:  # no such question among the few of a smoke run
                    continue
                rows.append(
                    [
                        *name.split("-"),
                        f"{TITLES[metric]}{', ' if kind else ''}{kind}",
                        *(f"{value['mean']:.3f}" for value in pair),
                        cell(share)
                        if not kind
                        else f"{pair[0]['mean'] / pair[1]['mean']:.3f}"
                        if pair[1]["mean"]
                        else "-",
                        f"{constant[task][key]['mean']:.3f}",
                    ]
                )
    heads = ["mode", "task", "metric", "general + RL", "domain + RL", "share", "constant answer"]
    return grid(heads, rows)


def table_1(runs: dict, constant: dict) -> list[str]:
    rows = [["constant answer", *figures_1(constant), *["-"] * 7]]
    for arm in ARMS:
        for stage, theirs in zip(("sft", "rl"), THEIRS[arm]):
            cells = runs[f"{arm}-report"][stage]
            paper = TABLE_1.get(theirs)
            rows.append(
                [
                    f"{arm}, {'SFT + RL' if stage == 'rl' else 'SFT'}",
                    *figures_1(cells),
                    *thinking(cells),
                    theirs or "-",
                    *(
                        (
                            figure(paper[0], "ROUGE-L"),
                            figure(paper[4], "RadGraph F1"),
                            figure(paper[6], "RadCliQ"),
                        )
                        if paper
                        else ("-",) * 3
                    ),
                ]
            )
    heads = [
        "arm",
        "entity F1",
        "partial",
        "simple",
        "findings' sensitivity",
        "PPV",
        "GLEU",
        "ROUGE-L",
        "CIDEr",
        "words",
        "names things of scenes",
        "of films",
        "thinking words",
        "closed",
        "cut off",
        "*theirs*",
        "ROUGE-L",
        "RadGraph F1",
        "RadCliQ",
    ]
    return grid(heads, rows)


def figures_1(cells: dict) -> list[str]:
    percent = (
        *("entity_f1", "entity_f1_partial", "entity_f1_simple"),
        *("finding_sensitivity", "finding_ppv", "gleu", "rouge_l"),
    )
    return [
        *(f"{100 * cells[metric]['mean']:.1f}" for metric in percent),
        f"{cells['cider']['mean']:.2f}",
        f"{cells['length']['mean']:.1f}",
        *(f"{100 * cells[metric]['mean']:.0f}" for metric in ("of_scenes", "of_films")),
    ]


def thinking(cells: dict) -> tuple[str, str, str]:
    """Words of thinking, share of closed blocks, share cut off, as percent."""
    words = f"{cells['thinking_length']['mean']:.1f}" if "thinking_length" in cells else "-"
    closed = f"{100 * cells['think_format']['mean']:.0f}" if "think_format" in cells else "-"
    return words, closed, f"{100 * cells['cut_off']['mean']:.0f}"


def table_2(runs: dict, constant: dict) -> list[str]:
    rows = [["constant answer", *figures_2(constant), *["-"] * 8]]
    for arm in ARMS:
        for stage, theirs in zip(("sft", "rl"), THEIRS[arm]):
            cells = runs[f"{arm}-grounding"][stage]
            rows.append(
                [
                    f"{arm}, {'SFT + RL' if stage == 'rl' else 'SFT'}",
                    *figures_2(cells),
                    *thinking(cells),
                    theirs or "-",
                    *([f"{value:.1f}" for value in TABLE_2[theirs]] if theirs else ["-"] * 4),
                ]
            )
    return grid(
        [
            "arm",
            *KINDS,
            "all",
            "soft F1",
            "boxes",
            "names things of scenes",
            "thinking words",
            "closed",
            "cut off",
            "*theirs*",
            "anatomy",
            "abnormality",
            "MS-CXR",
            "PadChest-GR",
        ],
        rows,
    )


def figures_2(cells: dict) -> list[str]:
    ours = [f"map50 {kind}" for kind in KINDS] + ["map50", "soft_f1"]
    return [
        *(f"{100 * cells[key]['mean']:.1f}" if key in cells else "-" for key in ours),
        f"{cells['boxes']['mean']:.2f}",
        f"{100 * cells['of_scenes']['mean']:.0f}",
    ]


def table_3(ablation: dict, references: dict) -> list[str]:
    """ "unscored" are the characters of sentences that hold no entity."""
    metrics = ("entity_f1", "finding_sensitivity", "gleu", "rouge_l")
    lengths = [f"{references[key]:.0f}" for key in ("characters", "unscored")]
    rows = [["the films' own reports", *[""] * 6, *lengths, *["-"] * 4]]
    for reward, cells in ablation.items():
        theirs = TABLE_3.get(THEIR_REWARD.get(reward))
        rows.append(
            [
                reward,
                *(cell(cells[m]) for m in metrics),
                *(cell(cells["gain"][m], "+") if "gain" in cells else "" for m in GAINED),
                *(f"{cells[m]['mean']:.0f}" for m in ("characters", "unscored")),
                *([figure(theirs[k], REWARDS[k]) for k in (0, 2, 4, 5)] if theirs else ["-"] * 4),
            ]
        )
    return grid(
        [
            "reward",
            "entity F1",
            "findings' sensitivity",
            "GLEU",
            "ROUGE-L",
            *(f"gain in {TITLES[metric]}" for metric in GAINED),
            "characters",
            "unscored",
            "*theirs*: ROUGE-L",
            "RadGraph F1",
            "RadCliQ",
            "characters",
        ],
        rows,
    )


def examples(runs: dict) -> list[str]:
    lines = []
    for name, run in runs.items():
        answers = {
            key: " ".join(text.split()).replace("<", "&lt;") for key, text in run["example"].items()
        }
        lines += [
            "",
            f"**{name}**: {answers['question']}",
            "",
            f"- reference: {answers['reference']}",
            f"- SFT: {answers['sft']}",
            f"- SFT + RL: {answers['rl']}",
        ]
    return lines


def page_text(page: Path) -> str:
    """The page as it is, or a new one; SystemExit for one without the markers that the results
    stand between.
    """
    text = (
        page.read_text()
        if page.exists()
        else "# The study on phantoms\n\n<!-- results -->\n<!-- end -->\n"
    )
    if not re.search(r"<!-- results -->\n.*<!-- end -->", text, re.S):
        raise SystemExit(f"{page} has no `<!-- results -->` ... `<!-- end -->` to render into")
    return text


def write_page(page: Path, results: dict) -> None:
    """Renders the part of the page between its markers anew; the prose around it stays."""
    text = page_text(page)
    body = tables(results)
    if results["runs"]:
        body = (
            "\n\n".join(f"![{title}](images/study-{name}.png)" for name, title in FIGURES.items())
            + "\n\n"
            + body
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_aside(
        page,
        re.sub(
            r"(?<=<!-- results -->\n).*(?=<!-- end -->)", lambda _: body + "\n", text, flags=re.S
        ),
    )


FIGURES = {
    "gains": "Before and after RL, with 95% intervals",
    "rewards": "Sampled reward over the runs, mean over the seeds",
    "lengths": "Length of answers over the runs",
    "ablation": "Length under each reward",
}


def draw_figures(results: dict, folder: Path) -> list[Path]:
    """before/after, reward curves, length curves, and lengths under each reward, as
    study-NAME.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs, ablation = (
        results["runs"],
        {k: v for k, v in results["ablation"].items() if "curves" in v},
    )
    drawn = {
        "gains": before_after(runs),
        "rewards": curve_figure(runs, ("report", "grounding"), "reward", "sampled reward"),
        "lengths": curve_figure(
            runs, ("report", "grounding"), "answer_tokens", "tokens, thinking included"
        ),
        "ablation": curve_figure(
            {f"{name}-report": v for name, v in ablation.items()},
            ("report",),
            "answer_tokens",
            "tokens",
        ),
    }
    paths = []
    for name, fig in drawn.items():
        fig.suptitle(FIGURES[name] + (" (smoke run)" if results["smoke"] else ""), fontsize=10)
        with aside(path := folder / f"study-{name}.png") as part:
            fig.savefig(part, format="png", dpi=100)
        plt.close(fig)
        paths.append(path)
    return paths


def before_after(runs: dict):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, (task, (metric, _)) in zip(axes, HEADLINE.items()):
        for row, arm in enumerate(ARMS):
            for stage, color in (("sft", "#9a6700"), ("rl", "#cf222e")):
                value = runs[f"{arm}-{task}"][stage][metric]
                axis.plot(
                    [value["low"], value["high"]], [row, row], color=color, alpha=0.5, linewidth=3
                )
                axis.plot(
                    value["mean"],
                    row,
                    "o",
                    color=color,
                    label={"sft": "SFT", "rl": "SFT + RL"}[stage] if row == 0 else None,
                )
        axis.set_yticks(range(len(ARMS)), ARMS, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{task}: {TITLES[metric]}", fontsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    return fig


def curve_figure(runs: dict, tasks: tuple[str, ...], key: str, label: str):
    """One panel a task, one line a run whose name ends in it."""
    fig, axes = plt.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks), 3), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks):
        for name, run in runs.items():
            if name.endswith(task):
                points = run["curves"][key]
                axis.plot(
                    [(k + 0.5) / len(points) for k in range(len(points))],
                    points,
                    marker=".",
                    label=name.removesuffix(f"-{task}"),
                )
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("share of the run's steps", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.25)
    fig.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    return fig
