"""What the pictures show, and what hinders one."""

import json
import sys
import time

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

import train_grpo
import train_sft
from minigrpo import curves
from minigrpo.data import Sample
from minigrpo.run import loop, plots
from minigrpo.run.plots import draw_curves, draw_samples, spread


@pytest.fixture
def pages(monkeypatch):
    """The page of every picture of answers."""
    found = []

    class Kept(plots.Figure):
        def add_axes(self, *args, **more):
            found.append(super().add_axes(*args, **more))
            return found[-1]

    monkeypatch.setattr(plots, "Figure", Kept)
    return found


def test_samples_show_different_questions():
    """200 samples, five questions about each of 40 films: even steps of 25 showed "Where is the
    right lung?" eight times.
    """
    shown = spread(list(range(200)), 8)
    assert len(set(shown)) == 8 and len({sample % 5 for sample in shown}) > 2
    assert shown == spread(list(range(200)), 8) == sorted(shown), (
        "the same before and after, so that pictures compare"
    )
    assert spread([3, 7], 8) == [3, 7] and spread([], 8) == []


def word_pieces(texts, marks):
    """[(x, baseline, text, colour behind it or None)] of what a page shows, in reading order."""

    def behind(text):
        return next(
            (
                p.get_facecolor()
                for p in marks
                if p.get_facecolor()[3]
                and abs(p.get_x() + 0.02 - text._x) < 1e-6
                and p.get_y() < text._y < p.get_y() + p.get_height()
            ),
            None,
        )

    return sorted((t._y, t._x, t.get_text(), behind(t)) for t in texts)


def test_endless_answers_are_drawn_in_time(tmp_path, pages):
    """Bug: one word of a million letters, or 20,000 boxes, and the picture took hours."""
    film = tmp_path / "film.png"
    Image.new("L", (64, 64)).save(film)
    box = [0.1, 0.2, 0.3, 0.4]
    samples = [
        Sample("w", None, "report", "What?", "The heart " * 50_000),
        Sample("g", str(film), "grounding", "Where?", "There.", boxes=[box]),
    ]
    answers = ["x" * 1_000_000, " ".join(["[0.1, 0.2, 0.3, 0.4]"] * 20_000)]
    began = time.process_time()
    draw_samples(tmp_path / "s.png", samples, answers, ["heart " * 200_000, answers[1]])
    assert time.process_time() - began < 10
    assert any("50 of 20,000 boxes" in text.get_text() for text in pages[0].texts)
    assert any("…" in text.get_text() for text in pages[0].texts)


def test_words_that_differ_are_marked_and_others_are_not(tmp_path, pages):
    """Every prediction was painted red, whatever it said."""
    sample = Sample("r", None, "report", "What is seen?", "The heart is large. No effusion.")
    draw_samples(
        tmp_path / "s.png",
        [sample],
        ["No effusion. The heart is small."],
        ["The heart is large. No pneumothorax."],
    )
    page = pages[0]
    shown = [
        (text, color and to_hex(color))
        for _, _, text, color in word_pieces(page.texts, page.patches)
    ]
    assert shown[2:] == [
        ("What is seen?", None),
        ("reference", None),
        ("The heart is", None),
        ("large.", plots.ONLY_REFERENCE),
        ("No effusion.", None),
        ("before", None),
        ("The heart is large. No", None),
        ("pneumothorax.", plots.NOT_REFERENCE),
        ("prediction", None),
        ("No effusion. The heart is", None),
        ("small.", plots.NOT_REFERENCE),
    ]


def test_nothing_overlaps_or_leaves_the_page_whatever_was_said(tmp_path, pages):
    Image.radial_gradient("L").resize((300, 100)).save(tmp_path / "wide.png")
    Image.radial_gradient("L").resize((50, 200)).save(tmp_path / "high.png")
    wide, high, long = (
        str(tmp_path / "wide.png"),
        str(tmp_path / "high.png"),
        "Is there an effusion, or is there none? " * 9,
    )
    boxes = [[0.1, 0.2, 0.5, 0.9]]
    samples = [
        Sample("1", wide, "grounding", long, "At [0.1, 0.2, 0.5, 0.9].", boxes=boxes),
        Sample("2", high, "grounding", "Where?", "At [0.1, 0.2, 0.5, 0.9].", boxes=boxes),
        Sample("3", wide, "report", long, "The lungs are clear. " * 30),
        Sample("4", None, "conversation", "What?", "W" * 400),
        Sample("5", high, "report", "What?", "No effusion."),
    ]
    answers = [
        "[0.3, 0.2, 0.1, 0.4] and [-1, 5, 2, 9]",
        "",
        "<think>$x_1$ so</think>It costs $5 or $6 \ud800\x00 " + "[0.12, 0.3] " * 80,
        "Mi" * 300,
        "<think>broken",
    ]
    draw_samples(tmp_path / "s.png", samples, answers, answers)
    page = pages[0]
    figure = page.figure
    figure.set_dpi(plots.DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    extents = [text.get_window_extent(renderer) for text in page.texts if text.get_text()]
    films = [image.get_window_extent(renderer) for image in page.images]
    assert len(films) == 4 and len(extents) > 40
    for box in extents + films:
        assert (
            box.x0 >= 0
            and box.y0 >= 0
            and box.x1 <= figure.bbox.width
            and box.y1 <= figure.bbox.height
        )
    boxes = [box.shrunk(0.99, 0.99) for box in extents + films]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    shapes = sorted(round(film.width / film.height, 1) for film in films)
    assert shapes == [0.2, 0.2, 3.0, 3.0], "films were drawn wider than they are"
    assert page.texts[1].get_text().endswith("…"), "a long question"
    headings = [text.get_text() for text in page.texts]
    assert (
        "prediction, its thinking left out" in headings
        and "prediction, its think block broken" in headings
        and headings.count("…") == 2
    )


# ---- curves --------------------------------------------------------------------------------------


def write_log(folder, **figures):
    """A run's log: the values of each figure, None where a step has none."""
    folder.mkdir(parents=True)
    steps = range(max(map(len, figures.values())))
    rows = [
        {"step": step}
        | {name: values[step] for name, values in figures.items() if values[step] is not None}
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Of every picture, {title of a panel: [(steps, values, colour)]}."""
    pictures = []

    class Recorded(plots.Figure):
        def savefig(self, *args, **more):
            pictures.append(
                {
                    axis.get_title(): [
                        (list(line.get_xdata()), list(line.get_ydata()), line.get_color())
                        for line in axis.lines
                    ]
                    for axis in self.axes
                    if axis.lines
                }
            )
            super().savefig(*args, **more)

    monkeypatch.setattr(plots, "Figure", Recorded)
    return pictures


def test_curves_hold_what_validation_found(tmp_path, drawn):
    sft = write_log(tmp_path / "sft", loss=[3.0, 2.0, 1.0, 1.0], eval_loss=[None, 2.5, None, 1.5])
    grpo = write_log(
        tmp_path / "grpo",
        loss=[0.0] * 4,
        reward=[0.1, 0.2, 0.3, 0.4],
        eval_reward=[None, 0.25, None, 0.5],
    )
    for folder in (sft, grpo):
        draw_curves(folder)
        assert Image.open(folder / "curves.png").format == "PNG"
    assert [points[:2] for points in drawn[0]["loss (nats per token)"]][-1] == ([1, 3], [2.5, 1.5])
    assert [points[:2] for points in drawn[1]["reward"]][-1] == ([1, 3], [0.25, 0.5])
    assert "loss (nats per token)" not in drawn[1], "GRPO's loss says little"


@pytest.mark.parametrize(
    "program, more",
    [
        (train_sft, []),
        (
            train_grpo,
            [
                "--reward",
                "tests.test_train_grpo:letters",
                "--max_new_tokens",
                4,
                "--prompts_per_step",
                4,
                "--group_size",
                2,
            ],
        ),
    ],
)
def test_curves_grow_while_a_run_trains_and_never_end_it(
    program, more, policy, phantom, tmp_path, monkeypatch, capsys
):
    """They were drawn once, after the last step; a full disk or a fault of the drawing was a
    traceback then.
    """
    seen, run = [], tmp_path / "run"

    def failing(runs, path):
        seen.append((len(next(iter(runs.values()))), (run / "final").exists()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "draw_runs", failing)
    monkeypatch.setattr(loop, "due", lambda: lambda: True)
    policy.save_pretrained(tmp_path / "model")
    words = [
        "--model",
        tmp_path / "model",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        run,
        "--max_steps",
        2,
        *more,
    ]
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
    program.main()
    assert seen == [(1, False), (2, False), (2, False)], (
        "after each step, and once more before final/ says that all is done"
    )
    assert (run / "final").exists() and capsys.readouterr().err.count(
        "could not be drawn (OSError: [Errno 28] No space left"
    ) == 3


def test_pictures_are_redrawn_once_in_a_while(monkeypatch):
    now = 100.0
    monkeypatch.setattr(plots.time, "monotonic", lambda: now)
    is_due, answers = plots.due(60), []
    for now in (100.0, 159.0, 161.0, 162.0, 220.0, 222.0):
        answers.append(is_due())
    assert answers == [False, False, True, False, False, True]


def test_a_picture_is_whole_or_the_one_before(tmp_path, monkeypatch):
    run = write_log(tmp_path / "run", loss=[1.0, 2.0])
    draw_curves(run)
    before = (run / "curves.png").read_bytes()

    def half(self, path, **_):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(plots.Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        draw_curves(run)
    assert (run / "curves.png").read_bytes() == before


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = write_log(tmp_path / "run", loss=[1.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in plots.read_log(run)] == [0, 1]


def overlay(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, words)])
    curves.main()


def test_runs_are_laid_over_one_another(tmp_path, drawn, monkeypatch):
    one = write_log(tmp_path / "a/report", reward=[0.1, 0.2], kl=[0.0, 0.1])
    other = write_log(tmp_path / "b/report", reward=[0.3, 0.4, 0.5])
    third = write_log(tmp_path / "c/sft", loss=[2.0, 1.0])
    out, names = tmp_path / "all.png", []
    legend = plots.Figure.legend
    monkeypatch.setattr(
        plots.Figure,
        "legend",
        lambda self, lines, labels, **more: (
            names.append(labels) or legend(self, lines, labels, **more)
        ),
    )
    for _ in range(2):  # its own picture may be drawn anew
        overlay(monkeypatch, one, other / "metrics.jsonl", third, "--output", out)
    assert (
        names[-1] == ["a/report", "b/report", "c/sft"]
        and Image.open(out).info["Software"] == "minigrpo.curves"
    )
    assert set(drawn[0]) == {
        "reward",
        "KL to the reference (nats per token)",
        "loss (nats per token)",
    }
    colors = {panel: [color for _, _, color in lines] for panel, lines in drawn[0].items()}
    assert colors["reward"] == [plots.COLORS[0]] * 2 + [plots.COLORS[1]] * 2, (
        "thin and bold of each"
    )
    assert colors["loss (nats per token)"] == [plots.COLORS[2]] * 2
    overlay(monkeypatch, one, other, "--labels", "small", "large", "--output", out)
    assert names[-1] == ["small", "large"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "empty is not a run: it has no metrics.jsonl"),
        (["begun"], "begun/metrics.jsonl is empty: the run has not finished a step yet"),
        (["odd"], "odd/metrics.jsonl:2 is not the figures of a step"),
        (["run", "run/../run"], "is given twice"),
        (["run", "--labels", "a", "b"], "2 --labels for 1 runs"),
        (["run", "other", "--labels", "a", "a"], "--labels a is given twice"),
        (["run", "--output", "run/x.pdf"], "ends in .png"),
        (["run", "--output", "nowhere/x.png"], "no folder nowhere"),
        (["run", "--output", "mine.png"], "mine.png is a file without curves"),
    ],
)
def test_what_cannot_be_laid_over_is_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "odd"):
        write_log(tmp_path / name, loss=[1.0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text("")
    (tmp_path / "odd/metrics.jsonl").write_text('{"step": 0}\n5\n')
    Image.new("L", (8, 8)).save("mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    with pytest.raises(SystemExit) as ended:
        overlay(monkeypatch, *words)
    assert message in str(ended.value.code) and (tmp_path / "mine.png").read_bytes() == before
