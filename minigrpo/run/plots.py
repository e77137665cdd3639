"""Pictures: the curves of a run, and the films and answers of an evaluation."""

import json
import random
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be set first
import numpy as np  # noqa: E402

from minigrpo.data import Sample, load_image, parse_boxes, split_thinking  # noqa: E402

# Panel titles and the figures of metrics.jsonl that each shows; a panel without data is left out.
PANELS = {
    "loss (nats per token)": ["loss"],
    "reward": ["reward"],
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


def draw_curves(folder: Path) -> Path:
    """RUN/metrics.jsonl -> RUN/curves.png: each figure over the steps, thin as logged and bold as a running mean."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    grpo = "reward" in rows[0]
    logged = {name for row in rows for name in row}
    panels = {title: [name for name in names if name in logged] for title, names in PANELS.items()
              if names[0] in logged and not (grpo and title.startswith("loss"))}
    columns = min(4, len(panels))
    fig, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(4 * columns, 2.8 * -(-len(panels) // columns)),
                             squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for number, name in enumerate(names):
            steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
            window = max(1, len(values) // 15)
            smooth = np.convolve(np.pad(values, (window // 2, window - 1 - window // 2), mode="edge"),
                                 np.ones(window) / window, "valid")
            axis.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth, color=f"C{number}", linewidth=1.8, label=name.replace("_", " "))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if len(names) > 1:
            axis.legend(fontsize=7)
    fig.supxlabel("step", fontsize=9)
    fig.suptitle(str(folder), fontsize=10)
    path = folder / "curves.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


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
    fig = plt.figure(figsize=(3.2 * count, sum(heights)), layout="constrained")
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
        fig.legend(handles=[plt.Line2D([], [], color=c, linestyle=s, label=n) for n, c, s in names], ncols=3, fontsize=8,
                   loc="outside upper center")
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


def show_film(axis, sample: Sample) -> None:
    if sample.images:
        axis.imshow(load_image(sample.images[0]), extent=(0, 1, 1, 0), aspect="auto")
    axis.axis("off")


def draw_boxes(axis, boxes: list, color: str, *, width: float = 1.5, style: str = "-") -> None:
    for x1, y1, x2, y2 in boxes:
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, linestyle=style))


def spread(indices: list[int], count: int) -> list[int]:
    """At most `count` of the indices, always the same; drawn, since even steps would meet the same question of every film."""
    return sorted(random.Random(0).sample(indices, min(count, len(indices))))
