"""Pictures: the curves of a run, and the films and answers of an evaluation."""

import json
import os
import random
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from minigrpo.data import Sample, load_image, parse_boxes, split_thinking

# Panel titles and the figures of metrics.jsonl that each shows; a panel without its first figure is left out.
PANELS = {
    "loss (nats per token)": ["loss", "eval_loss"],
    "reward": ["reward", "eval_reward"],
    "spread of rewards in a group": ["reward_std_in_group", "groups_without_spread"],
    "KL to the reference (nats per token)": ["kl"],
    "entropy (nats per token)": ["entropy"],
    "share of tokens clipped": ["clip_high", "clip_low"],
    "answer length (tokens)": ["answer_tokens"],
    "thinking and answer (words)": ["thinking_words", "answer_words"],
    "share of closed think blocks, and cut off": ["think_format", "cut_off"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["learning_rate"],
}
# Okabe and Ito's colours, which people who see no red or no green tell apart.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
STYLES = ["-", "--"]
REDRAWN = 60.0  # seconds; drawing takes up to one
DRAWN_BY = "minigrpo.curves"  # in the PNG's "Software"


def due(seconds: float = REDRAWN) -> Callable[[], bool]:
    """A function that is true once in so many seconds, for the first time after so many."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True
    return is_due


def draw_curves(folder: Path) -> None:
    """RUN/metrics.jsonl -> RUN/curves.png, in place of the one before. A run does not end for want of a picture: what hinders it
    is said."""
    try:
        draw_runs({str(folder): read_log(folder)}, folder / "curves.png")
    except Exception as error:
        print(f"\n{folder / 'curves.png'} could not be drawn ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def read_log(folder: Path) -> list[dict]:
    """The rows of RUN/metrics.jsonl, of a run that goes on, too. ValueError where there is none, or where it is no log."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is no run: it holds no metrics.jsonl" if folder.exists() else f"{folder} does not exist")
    lines, rows = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines[:-1], 1):  # behind the last line break: nothing, or a line that is being written
        try:
            rows.append(json.loads(line))
            if not all(isinstance(value, int | float) for value in [rows[-1]["step"], *rows[-1].values()]):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is not a step's figures, an object of numbers with its step: remove the line") from None
    if not rows:
        raise ValueError(f"{path} is empty: the run has not finished a step yet")
    return rows


def draw_runs(runs: dict[str, list[dict]], path: Path) -> None:
    """A panel for each figure over the steps: thin as logged, bold its running mean; with points, what --eval_data gave. Of
    several runs each has a colour and its name (the keys) in the legend; of one, each figure of a panel has a colour. Written
    aside: a reader of the picture sees a whole one."""
    runs = {name: [{k: v for k, v in row.items() if k != "loss" or "reward" not in row} for row in rows]  # GRPO's says little
            for name, rows in runs.items()}
    logged = {figure for rows in runs.values() for row in rows for figure in row}
    panels = {title: [figure for figure in figures if figure in logged] for title, figures in PANELS.items() if figures[0] in logged}
    columns = min(4, len(panels))
    fig = Figure(figsize=(4 * columns, 2.8 * -(-len(panels) // columns)), layout="constrained")
    axes = fig.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    colors = COLORS if len(runs) <= len(COLORS) else colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    for axis, (title, figures) in zip(axes.flat, panels.items()):
        for place, rows in enumerate(runs.values()):
            for number, figure in enumerate(figures):
                found = [(row["step"], row[figure]) for row in rows if figure in row]
                if found:
                    color, style = (colors[place], STYLES[number]) if len(runs) > 1 else (COLORS[number], "-")
                    draw_line(axis, *zip(*found), color=color, style=style, points=figure.startswith("eval_"), faint=0.25 / len(runs) ** 0.5)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if len(figures) > 1:
            looks = [dict(color="#555555", linestyle=STYLES[n]) if len(runs) > 1 else dict(color=COLORS[n]) for n in range(len(figures))]
            axis.legend([Line2D([], [], marker="." if name.startswith("eval_") else None, **look) for name, look in zip(figures, looks)],
                        [name.replace("_", " ") for name in figures], fontsize=7)
    fig.supxlabel("step", fontsize=9)
    if len(runs) > 1:
        fig.legend([Line2D([], [], color=color, linewidth=2) for color, _ in zip(colors, runs)], list(runs), fontsize=9,
                   ncols=min(len(runs), 2 * columns), loc="outside upper center")
    else:
        fig.suptitle(next(iter(runs)), fontsize=10)
    aside = path.with_name(path.name + ".part")
    fig.savefig(aside, dpi=110, format="png", metadata={"Software": DRAWN_BY})
    os.replace(aside, path)


def draw_line(axis, steps, values, *, color, style: str, points: bool, faint: float) -> None:
    if points:
        axis.plot(steps, values, color=color, linestyle=style, linewidth=1.2, marker=".", markersize=7)
        return
    window = max(1, len(values) // 15)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    axis.plot(steps, values, color=color, alpha=faint, linewidth=0.8)
    axis.plot(steps, np.convolve(padded, np.ones(window) / window, "valid"), color=color, linestyle=style, linewidth=1.8)


TRUE, BEFORE, NOW = "#39d353", "#ffa657", "#ff4d4d"


def draw_samples(path: Path, samples: list[Sample], answers: list[str], before: list[str] | None = None, *,
                 count: int = 4, opened: bool = False, box_scale: float = 1.0) -> Path:
    """Films with true and predicted boxes, then reports beside their reference; `before` is another model's answers,
    whose boxes are taken to be fractions of the film. Nothing to show (boxes, but no film): no picture."""
    grounding = spread([i for i, s in enumerate(samples) if s.task == "grounding" and s.images], 2 * count)
    written = spread([i for i, s in enumerate(samples) if s.task != "grounding"], count)
    film_rows = -(-len(grounding) // count)
    heights = [3.3] * film_rows + [2.6] * len(written)
    if not heights:
        return path
    fig = Figure(figsize=(3.2 * count, sum(heights)), layout="constrained")
    grid = fig.add_gridspec(len(heights), count, height_ratios=heights)
    for number, i in enumerate(grounding):
        axis = fig.add_subplot(grid[number // count, number % count])
        show_film(axis, samples[i])
        draw_boxes(axis, samples[i].boxes, TRUE, width=2.5)
        if before:
            draw_boxes(axis, parse_boxes(split_thinking(before[i])[1]), BEFORE, style="--")
        draw_boxes(axis, parse_boxes(split_thinking(answers[i], opened)[1], box_scale), NOW)
        axis.set_title("\n".join(textwrap.wrap(samples[i].question, 38)[:2]), fontsize=8)
    for row, i in enumerate(written, start=film_rows):
        show_film(fig.add_subplot(grid[row, 0]), samples[i])
        axis = fig.add_subplot(grid[row, 1:])
        axis.axis("off")
        texts = [("reference", samples[i].answer, "#1a7f37")] + ([("before", before[i], "#9a6700")] if before else [])
        top = 1.0
        for name, text, color in texts + [("prediction", answers[i], "#cf222e")]:
            lines = textwrap.wrap(f"{name}: {text}", 145)[:5]
            axis.text(0, top, "\n".join(lines), fontsize=8, va="top", color=color, transform=axis.transAxes)
            top -= 0.075 * len(lines) + 0.06
    names = [("true box", TRUE, "-")] + ([("before", BEFORE, "--")] if before else []) + [("predicted", NOW, "-")]
    if grounding:
        fig.legend(handles=[Line2D([], [], color=c, linestyle=s, label=n) for n, c, s in names], ncols=3, fontsize=8,
                   loc="outside upper center")
    fig.savefig(path, dpi=100)
    return path


def show_film(axis, sample: Sample) -> None:
    if sample.images:
        axis.imshow(load_image(sample.images[0]), extent=(0, 1, 1, 0), aspect="auto")
    axis.axis("off")


def draw_boxes(axis, boxes: list, color: str, *, width: float = 1.5, style: str = "-") -> None:
    for x1, y1, x2, y2 in boxes:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, linestyle=style))


def spread(indices: list[int], count: int) -> list[int]:
    """At most `count` of the indices, always the same; drawn, since even steps would meet the same question of every film."""
    return sorted(random.Random(0).sample(indices, min(count, len(indices))))
