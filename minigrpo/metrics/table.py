"""table.md: every figure with its interval, the findings and sources, and the paper's tables beside
ours.
"""

from ..visible import visible
from .published import GROUNDING, OURS, REPORTS, REWARDS, TABLE_1, TABLE_2, TABLE_3

HEADLINE = {
    "grounding": ("soft_f1", "map50", "ap50", "matched_iou"),
    "report": ("gleu", "rouge_l", "cider", "entity_f1", "radgraph_partial", "radcliq"),
}
FINDINGS = ("chexbert_f1", "finding_sensitivity", "finding_ppv")  # of single findings
MOST = 40  # rows of one breakdown; metrics.json has them all


def markdown_table(metrics: dict, *, published: bool = False) -> str:
    """The whole page from what metrics.json holds; with `published` also the paper's tables, ours
    beside theirs. Names and labels are the data's: what a terminal would obey in them is written
    out."""
    names = {
        name: " ".join(str(metrics[name]).split())
        for name in ("model", "data", "baseline")
        if name in metrics
    }
    lines = [f"Model `{names['model']}` on `{names['data']}`, greedy, 95% bootstrap intervals."]
    if "baseline" in metrics:
        lines[0] += f" Gain: paired difference to `{names['baseline']}`."
    for task, figures in metrics["tasks"].items():
        lines += task_lines(task, figures, metrics.get("difference", {}).get(task))
        for field, groups in metrics.get("breakdown", {}).get(task, {}).items():
            # else it says the same again
            if len(groups) > 1 or figures["n"] not in (group["n"] for group in groups.values()):
                lines += breakdown_lines(task, field, groups)
    lines += [
        line
        for text in metrics.get("not_computed", [])
        for line in ("", f"Not computed: {' '.join(text.split())}")
    ]
    return visible("\n".join([*lines, *(paper_lines(metrics) if published else [])])) + "\n"


def cell(value: dict, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def grid(heads, rows) -> list[str]:
    """A Markdown table with an empty line before it; a bar inside a cell would end it."""
    escaped = [[str(c).replace("|", "\\|").replace("\n", " ") for c in cells] for cells in rows]
    return ["", row(heads), "|" + "---|" * len(heads), *map(row, escaped)]


def task_lines(task: str, figures: dict, gains: dict | None) -> list[str]:
    rows = []
    for name, value in figures.items():
        if name == "n":
            continue
        gain = (gains or {}).get(name)
        metrics_of_task = (
            [cell(gain | {"mean": gain["difference"]}, "+"), f"{gain['p']:.3f}"]
            if gain
            else ["", ""]
        )
        # not asked of the others, or a scorer failed
        some = f" ({value['n']} samples)" if value["n"] != figures["n"] else ""
        rows.append([name, cell(value) + some, *(metrics_of_task if gains else [])])
    return [
        "",
        f"**{task}**, {figures['n']} samples",
        *grid(["metric", "value", *(["gain", "p"] if gains else [])], rows),
    ]


def breakdown_lines(task: str, field: str, groups: dict) -> list[str]:
    names = [
        name
        for name in (*FINDINGS, *HEADLINE.get(task, ("gleu", "rouge_l")))
        if any(name in f for f in groups.values())
    ]
    largest = sorted(groups, key=lambda value: -groups[value]["n"])[:MOST]
    rows = [
        [
            value,
            groups[value]["n"],
            *(cell(groups[value][m]) if m in groups[value] else "" for m in names),
        ]
        for value in largest
    ]
    more = ["", f"... and {len(groups) - MOST} more in metrics.json"] if len(groups) > MOST else []
    return ["", f"{task} by {field.replace('_', ' ')}", *grid([field, "n", *names], rows), *more]


def paper_lines(metrics: dict) -> list[str]:
    """Tables 1, 2 and 3 as the paper lays them out, its rows marked as theirs, for the tasks that
    were evaluated.
    """
    lines, report = [], metrics["tasks"].get("report", {})
    groups = metrics.get("breakdown", {}).get("grounding", {})
    for title, heads, published, task in (
        ("Table 1, reports", REPORTS, TABLE_1, "report"),
        ("Table 2, grounding, mAP@0.5", GROUNDING, TABLE_2, "grounding"),
        ("Table 3, what the report reward does", REWARDS, TABLE_3, "report"),
    ):
        if task in metrics["tasks"]:
            ours = [
                (
                    paper_set(groups, name).get("map50")
                    if task == "grounding"
                    else report.get(OURS.get(name))
                )
                for name in heads
            ]
            rows = [
                [
                    f"**`{metrics['model']}`** (ours)",
                    *(
                        figure(value and value["mean"], name, 100)
                        for name, value in zip(heads, ours)
                    ),
                ]
            ]
            rows += [
                [
                    f"{model} (*theirs*)",
                    *(figure(value, name) for name, value in zip(heads, values)),
                ]
                for model, values in published.items()
            ]
            lines += ["", f"As in the paper's {title}", *grid(["model", *heads], rows)]
    note = (
        "The rows marked *theirs* are published figures on their own test sets: they are comparable"
        " with ours only on the same files. RadCliQ: lower is better. RadGraph F1: ours is the"
        " partial level."
    )
    return ["", note, *lines] if lines else []


def paper_set(groups: dict, name: str) -> dict:
    """Our figures for one of Table 2's columns: a kind of question, or a source named like the data
    set.
    """

    def plain(text):
        return "".join(c for c in text.lower() if c.isalnum())

    return next(
        (
            figures
            for field in ("kind", "source")
            for value, figures in groups.get(field, {}).items()
            if plain(value).startswith(plain(name))
        ),
        {},
    )


def figure(value: float | None, name: str, percent: float = 1) -> str:
    """As the paper prints it: percent with one decimal, RadCliQ with two, whole characters;
    `percent` 100 for a fraction.
    """
    if value is None:
        return "-"
    return (
        f"{value:.2f}"
        if name == "RadCliQ"
        else f"{value:.0f}"
        if name == "characters"
        else f"{percent * value:.1f}"
    )
