"""The tables of docs/performance.md, from benchmarks/results: `python -m benchmarks.table` writes
them anew.
"""

import json
import re
from pathlib import Path

from benchmarks.common import RESULTS
from minigrpo.run.files import write_aside

PAGE = Path(__file__).parent.parent / "docs/performance.md"
ROWS = {
    "rollout_vs_hf": "rollout, times `generate(num_return_sequences=G)`",
    "rollout_vs_trl": "rollout, times TRL",
    "score_vs_hf": "scoring + backward, times transformers",
    "score_vs_trl": "scoring + backward, times TRL",
    "step_vs_trl": "whole step, times TRL",
    "memory_vs_trl": "peak memory, share of TRL's",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)
    )


def source(about: dict) -> str:
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "transformers", "trl") if about.get(name)
    )
    return (
        f"`{about['command']}`, {about['date']}, {about['machine']}, {about['clock']}, {versions}."
    )


def step_table(result: dict) -> str:
    def cell(name: str, found: dict) -> str:
        limit = found["limits"].get(name)
        return f"{found[name]:.2f}" + (f" of {limit:.2f}" if limit else "") if name in found else ""

    def seconds(what: str, found: dict) -> str:
        return " / ".join(
            f"{found['seconds'][what][side]:.1f}" if side in found["seconds"][what] else "-"
            for side in ("ours", "hf", "trl")
        )

    rows = [
        [title, *(cell(name, found) for found in result.values())] for name, title in ROWS.items()
    ]
    rows += [
        [
            f"seconds: {what}, ours / transformers / TRL",
            *(seconds(what, found) for found in result.values()),
        ]
        for what in ("rollout", "score", "step")
    ]
    megabytes = [
        [f"{peak / 1e6:.0f}" for peak in found["peak_bytes"].values()] for found in result.values()
    ]
    losses = [[each["loss"] for each in found["difference"].values()] for found in result.values()]
    rows += [
        ["peak MB above the models, ours / TRL", *(" / ".join(sides) for sides in megabytes)],
        ["largest difference of the loss", *(f"{max(sides):.0e}" for sides in losses)],
    ]
    runs = "\n".join(dict.fromkeys(source(found["about"]) for found in result.values()))
    return table(["", *result], rows) + "\n\n" + runs


def logprob_table(result: dict) -> str:
    ways = list(result["sizes"][0]["seconds"])

    def cell(row, way):
        return f"{row['seconds'][way]:.2f} s, {row['peak_bytes'][way] / 1e6:,.0f} MB"

    rows = [
        [f"{row['tokens']:,}", f"{row['vocabulary']:,}", *(cell(row, way) for way in ways)]
        for row in result["sizes"]
    ]
    return table(["N", "V", *ways], rows) + "\n\n" + source(result["about"])


def growth_table(result: dict) -> str:
    def cells(seconds: dict) -> list[str]:
        return [
            f"{seconds['ours']:.2f}",
            f"{seconds['hf']:.2f}",
            f"{seconds['hf'] / seconds['ours']:.1f}",
        ]

    rows = [
        [
            str(point["shape"][name]) if name != point["varied"] else f"**{point['shape'][name]}**"
            for name in ("group", "text", "answer")
        ]
        + cells(point["seconds"]["rollout"])
        + cells(point["seconds"]["score"])
        for point in result["points"]
    ]
    head = [
        "G",
        "prompt",
        "answer",
        "rollout, s",
        "transformers",
        "ratio",
        "score, s",
        "transformers",
        "ratio",
    ]
    return table(head, rows) + "\n\n" + source(result["about"])


def lora_table(result: dict) -> str:
    rows = [
        [name, f"{run['peak_bytes'] / 1e6:,.0f}", f"{run['checkpoint_bytes'] / 1e6:,.0f}"]
        for name, run in result["runs"].items()
    ]
    return (
        table(["", "peak MB of the run", "MB of a checkpoint"], rows)
        + "\n\n"
        + source(result["about"])
    )


def plan_table(result: dict) -> str:
    rows = [
        [
            name,
            f"{found['plan']:.2f}",
            *(
                f"{found[run]:.2f} ({found['plan'] / found[run]:.2f})"
                for run in ("run, freed at once", "run")
            ),
        ]
        for name, found in result["peak_gb"].items()
    ]
    head = [
        "",
        "GB, planned",
        "GB of the run, freed memory given back (planned / run)",
        "GB of the run as it is (planned / run)",
    ]
    return table(head, rows) + "\n\n" + source(result["about"])


def page_with_tables(page: str) -> str:
    for name, make in (
        ("step", step_table),
        ("logprob", logprob_table),
        ("growth", growth_table),
        ("lora", lora_table),
        ("plan", plan_table),
    ):
        path = RESULTS / f"{name}.json"
        new = make(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        page = re.sub(
            rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- end -->)",
            lambda _: new,
            page,
            count=1,
            flags=re.S,
        )
    return page


if __name__ == "__main__":
    write_aside(PAGE, page_with_tables(PAGE.read_text()))
