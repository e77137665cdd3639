"""Pictures: the curves of a run, and the films and answers of an evaluation."""

import json
import random
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import get_hinting_flag
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from minigrpo.data import Sample, parse_boxes, split_thinking
from minigrpo.data.sample import load_film
from minigrpo.run.files import aside
from minigrpo.run.report import differences

# Panel titles and the figures of metrics.jsonl that each shows; a panel without its first figure is
# left out.
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


def due(seconds: float = REDRAWN) -> Callable[[], bool]:
    """A function that is true once every so many seconds, the first time after that many."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True

    return is_due


def draw_curves(folder: Path) -> None:
    """RUN/metrics.jsonl -> RUN/curves.png, replacing the old one. A picture that cannot be drawn
    does not end a run: the error is printed.
    """
    try:
        draw_runs({str(folder): read_log(folder)}, folder / "curves.png")
    except Exception as error:
        print(
            f"\n{folder / 'curves.png'} could not be drawn ({type(error).__name__}: {error})",
            file=sys.stderr,
            flush=True,
        )


def read_log(folder: Path) -> list[dict]:
    """The rows of RUN/metrics.jsonl, also while the run continues. ValueError if there is none, or
    if it is not a log.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run: it has no metrics.jsonl"
            if folder.exists()
            else f"{folder} does not exist"
        )
    lines, rows = path.read_bytes().split(b"\n"), []
    # behind the last line break: nothing, or a line that is being written
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
            if not all(
                isinstance(value, int | float) for value in [rows[-1]["step"], *rows[-1].values()]
            ):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number} is not the figures of a step, a JSON object of numbers that"
                " include step: remove the line"
            ) from None
    if not rows:
        raise ValueError(f"{path} is empty: the run has not finished a step yet")
    return rows


def draw_runs(runs: dict[str, list[dict]], path: Path) -> None:
    """A panel for each figure over the steps: thin as logged, bold its running mean; with points,
    figures on --eval_data. With several runs, each has a colour and its name (the keys) in the
    legend; with one, each figure of a panel has a colour. The file is replaced as a whole, so a
    viewer never sees half a picture.
    """
    # GRPO's says little
    runs = {
        name: [{k: v for k, v in row.items() if k != "loss" or "reward" not in row} for row in rows]
        for name, rows in runs.items()
    }
    logged = {figure for rows in runs.values() for row in rows for figure in row}
    panels = {
        title: [figure for figure in figures if figure in logged]
        for title, figures in PANELS.items()
        if figures[0] in logged
    }
    columns = min(4, len(panels))
    fig = Figure(figsize=(4 * columns, 2.8 * -(-len(panels) // columns)), layout="constrained")
    axes = fig.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    colors = (
        COLORS if len(runs) <= len(COLORS) else colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
    )
    for axis, (title, figures) in zip(axes.flat, panels.items()):
        for place, rows in enumerate(runs.values()):
            for number, figure in enumerate(figures):
                points = [(row["step"], row[figure]) for row in rows if figure in row]
                if points:
                    color, style = (
                        (colors[place], STYLES[number]) if len(runs) > 1 else (COLORS[number], "-")
                    )
                    draw_line(
                        axis,
                        *zip(*points),
                        color=color,
                        style=style,
                        points=figure.startswith("eval_"),
                        faint=0.25 / len(runs) ** 0.5,
                    )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if len(figures) > 1:
            looks = [
                (
                    dict(color="#555555", linestyle=STYLES[n])
                    if len(runs) > 1
                    else dict(color=COLORS[n])
                )
                for n in range(len(figures))
            ]
            axis.legend(
                [
                    Line2D([], [], marker="." if name.startswith("eval_") else None, **look)
                    for name, look in zip(figures, looks)
                ],
                [name.replace("_", " ") for name in figures],
                fontsize=7,
            )
    fig.supxlabel("step", fontsize=9)
    if len(runs) > 1:
        fig.legend(
            [Line2D([], [], color=color, linewidth=2) for color, _ in zip(colors, runs)],
            list(runs),
            fontsize=9,
            ncols=min(len(runs), 2 * columns),
            loc="outside upper center",
        )
    else:
        fig.suptitle(next(iter(runs)), fontsize=10)
    with aside(path) as part:
        fig.savefig(part, dpi=110, format="png", metadata={"Software": "minigrpo.curves"})


def draw_line(axis, steps, values, *, color, style: str, points: bool, faint: float) -> None:
    if points:
        axis.plot(
            steps, values, color=color, linestyle=style, linewidth=1.2, marker=".", markersize=7
        )
        return
    window = max(1, len(values) // 15)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    axis.plot(steps, values, color=color, alpha=faint, linewidth=0.8)
    axis.plot(
        steps,
        np.convolve(padded, np.ones(window) / window, "valid"),
        color=color,
        linestyle=style,
        linewidth=1.8,
    )


# The page of an evaluation's films and answers, in inches and points.
WIDTH, MARGIN, GAP, LINE, POINTS, DPI, LINES = 10.0, 0.12, 0.14, 0.175, 9.0, 130, 7
TRUE, BEFORE, NOW = "#56b4e9", "#f0e442", "#ff6a13"  # of boxes; they differ in style, too
LOOKS = {
    "true": dict(edgecolor=TRUE, linewidth=2.6),
    "before": dict(edgecolor=BEFORE, linewidth=1.4, linestyle="--"),
    "predicted": dict(edgecolor=NOW, linewidth=1.6),
}
ONLY_REFERENCE, NOT_REFERENCE = "#cde6f7", "#ffd3a8"  # behind words
NO_TEXT = "(no text)"
MAX_BOXES, LONGEST_LINE = 50, 500  # drawn on a film, of each kind; characters
INK, FAINT = "#1c1e21", "#667080"


def draw_samples(
    path: Path,
    samples: list[Sample],
    answers: list[str],
    before: list[str] | None = None,
    *,
    count: int = 4,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
) -> Path:
    """Films with true and predicted boxes, then texts beside their film, with the words marked in
    which they differ from their reference, as in report.html. `before` is another model's answers,
    whose boxes must be fractions of the film. If there is nothing to show (boxes, but no film), no
    picture is drawn.
    """
    grounding = spread(
        [i for i, s in enumerate(samples) if s.task == "grounding" and s.images], 2 * count
    )
    written = spread([i for i, s in enumerate(samples) if s.task != "grounding"], count)
    if not grounding and not written:
        return path
    fig = Figure()
    page, top = fig.add_axes((0, 0, 1, 1)), MARGIN
    page.axis("off")
    if grounding:
        kinds = [kind for kind in LOOKS if before or kind != "before"]
        fig.legend(
            [Rectangle((0, 0), 1, 1, fill=False, **LOOKS[kind]) for kind in kinds],
            [f"{kind} box" for kind in kinds],
            ncols=3,
            fontsize=POINTS,
            loc="upper left",
            borderaxespad=0.4,
            frameon=False,
        )
        top += 0.3
    side = (WIDTH - 2 * MARGIN - (count - 1) * GAP) / count
    for start in range(0, len(grounding), count):
        row = grounding[start : start + count]
        titles = [plain_lines(samples[i].question, side) for i in row]
        top += LINE * max(map(len, titles))
        bottoms = []
        for column, (i, title) in enumerate(zip(row, titles)):
            left = MARGIN + column * (side + GAP)
            write(page, title, left, top - LINE * len(title))
            film = show_film(page, samples[i], left, top + 0.06, side, 1.2 * side)
            boxes = {
                "true": samples[i].boxes,
                "before": parse_boxes(split_thinking(before[i])[1]) if before else [],
                "predicted": parse_boxes(
                    split_thinking(answers[i], template_opens_think)[1], box_scale
                ),
            }
            for kind, of_kind in boxes.items():
                draw_boxes(page, film, of_kind[:MAX_BOXES], **LOOKS[kind])
            if (number := max(map(len, boxes.values()))) > MAX_BOXES:
                note = f"{MAX_BOXES} of {number:,} boxes"
                page.text(film[0] + 0.05, film[3] - 0.06, note, fontsize=POINTS - 1, color=NOW)
            bottoms.append(film[3])
        top = max(bottoms) + GAP
    if written:
        top = key_to_words(page, top)
    for i in written:
        film = show_film(page, samples[i], MARGIN, top, 2.1, 2.3)
        left = film[2] + GAP
        room = WIDTH - MARGIN - left
        # bold letters are wider
        bottom = write(page, plain_lines(samples[i].question, 0.88 * room), left, top, bold=True)
        for name, pieces, color in texts_of(
            samples[i], answers[i], before[i] if before else None, template_opens_think
        ):
            page.text(
                left,
                bottom + 0.2,
                name,
                fontsize=POINTS - 1,
                color=FAINT,
                va="baseline",
                parse_math=False,
            )
            words = [
                (word, piece["changed"])
                for piece in pieces
                for word in clean(piece["text"]).split(" ")
            ]
            bottom = write(page, wrapped(words, room, LINES), left, bottom + 0.22, behind=color)
        top = max(film[3], bottom) + 1.5 * GAP
    page.set(xlim=(0, WIDTH), ylim=(top, 0))
    fig.set_size_inches(WIDTH, top)
    with aside(path) as part:
        fig.savefig(part, dpi=DPI, format="png")
    return path


def texts_of(
    sample: Sample, answer: str, before: str | None, template_opens_think: bool
) -> list[tuple[str, list[dict], str]]:
    """(heading, pieces {"text", "changed"}, colour of what is changed) of the reference and of each
    answer.
    """
    thinking, text, ok = split_thinking(answer, template_opens_think)
    texts = [("reference", differences(sample.answer, text)[0], ONLY_REFERENCE)]
    if before is not None:
        texts.append(
            (
                "before",
                differences(sample.answer, split_thinking(before)[1] or NO_TEXT)[1],
                NOT_REFERENCE,
            )
        )
    about = ", its think block broken" if not ok else ", its thinking left out" if thinking else ""
    return [
        *texts,
        ("prediction" + about, differences(sample.answer, text or NO_TEXT)[1], NOT_REFERENCE),
    ]


def key_to_words(page, top: float) -> float:
    left = MARGIN
    for text, color in (
        ("only in the reference", ONLY_REFERENCE),
        ("not in the reference", NOT_REFERENCE),
    ):
        write(page, [[(text, True)]], left, top, behind=color)
        left += width_of(text) + 2 * GAP
    return top + LINE + GAP


def width_of(text: str) -> float:
    """Its width in inches as drawn by Agg, including a trailing blank."""
    font = get_font(findfont(FontProperties()))
    font.set_size(POINTS, DPI)

    def pixels(text: str) -> float:
        font.set_text(text, 0.0, flags=get_hinting_flag())
        return font.get_width_height()[0] / 64

    return (pixels(text + ".") - pixels(".")) / DPI


def wrapped(words: list[tuple[str, bool]], width: float, most: int) -> list[list[tuple[str, bool]]]:
    """Words in at most `most` lines of at most `width` inches, the last one ending in … where
    words are left out; a word that is wider is cut."""
    lines, used, blank = [[]], 0.0, width_of(" ")
    for word, changed in words:
        # Of a word, no more than a line can hold is measured at a time.
        while (size := width_of(start := word[:LONGEST_LINE])) > width and len(word) > 1:
            keep = max(1, int(len(start) * width / size) - 1)
            lines += [[(word[:keep], changed)], []]
            word, used = word[keep:], 0.0
            if len(lines) > most + 2:
                break
        if used and used + blank + size > width:
            lines.append([])
            used = 0.0
        if len(lines) > most + 2:
            break
        lines[-1].append((word, changed))
        used += size + (blank if used else 0.0)
    lines = [line for line in lines if line]
    if len(lines) > most:
        lines = [*lines[: most - 1], [*lines[most - 1][:-1], ("…", False)]]
    return lines


def plain_lines(text: str, width: float) -> list[list[tuple[str, bool]]]:
    return wrapped([(word, False) for word in clean(text).split()], width, 2)


def write(
    page,
    lines: list[list[tuple[str, bool]]],
    left: float,
    top: float,
    *,
    behind: str | None = None,
    bold: bool = False,
) -> float:
    """Write lines of (word, whether it is marked) below `top`; returns where they end."""
    for number, line in enumerate(lines, 1):
        base, x = top + LINE * number - 0.05, left
        for changed, words in groupby(line, key=lambda pair: pair[1]):
            text = " ".join(word for word, _ in words)
            size = width_of(text)
            if changed:
                page.add_patch(
                    Rectangle(
                        (x - 0.02, base - 0.125), size + 0.04, 0.165, color=behind, linewidth=0
                    )
                )
            page.text(
                x,
                base,
                text,
                fontsize=POINTS,
                color=INK,
                va="baseline",
                parse_math=False,
                weight="bold" if bold else "normal",
            )
            x += size + width_of(" ")
    return top + LINE * len(lines)


def clean(text: str) -> str:
    """Replace half surrogate pairs and control characters, which a sampler may write."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " ")
    )


def show_film(
    page, sample: Sample, left: float, top: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Show the film as large as fits; returns its left, top, right and bottom. Without a film the
    width is 0.
    """
    if not sample.images:
        return left, top, left - GAP, top
    film = load_film(sample, sample.images[0])
    scale = min(width / film.width, height / film.height)
    right, bottom = left + scale * film.width, top + scale * film.height
    film.thumbnail((1024, 1024))
    page.imshow(film, extent=(left, right, bottom, top), aspect="auto", interpolation="antialiased")
    return left, top, right, bottom


def draw_boxes(page, film: tuple[float, float, float, float], boxes: list, **look) -> None:
    """Boxes in fractions of the film, which lies on the page at (left, top, right, bottom)."""
    left, top, right, bottom = film
    for x1, y1, x2, y2 in boxes:
        corner = left + x1 * (right - left), top + y1 * (bottom - top)
        patch = page.add_patch(
            Rectangle(
                corner, (x2 - x1) * (right - left), (y2 - y1) * (bottom - top), fill=False, **look
            )
        )
        patch.set_clip_path(
            Rectangle((left, top), right - left, bottom - top, transform=page.transData)
        )


def spread(indices: list[int], count: int) -> list[int]:
    """At most `count` of the indices, always the same; drawn at random, since even steps would pick
    the same question for every film.
    """
    return sorted(random.Random(0).sample(indices, min(count, len(indices))))
