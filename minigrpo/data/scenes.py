"""Drawn everyday scenes with true boxes and captions: the world of a general model, which has seen
chest films only as the web shows them.

    python -m minigrpo.data.scenes --output_dir data/scenes --train 2000 --test 100 \\
        --films 1500 --reading 300 --seed 0

One to four things of one colour each on a plain ground; some scenes are black and white. Of every
scene: a caption, the boxes of all things, the box of one of them, and the box of what is in one
place. `--films` adds drawn films with loose captions: vague, incomplete, in part wrong, as captions
on the web are, without a box, a report or a question of the tasks on films. `--reading` adds
reports of films that were never drawn to a file, as text alone. A general model has seen and read
such things somewhere, and reinforcement can strengthen only what is sampled now and then.
"""

import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from minigrpo.data import phantom
from minigrpo.data.boxes import format_boxes
from minigrpo.data.templates import REGION_ANSWERS, draw_template
from minigrpo.run.files import aside, sync_all, write_jsonl
from minigrpo.run.terminal import Parser, fail

SPLITS = ("train", "test")
COLOURS = {
    "red": (200, 50, 45),
    "green": (60, 150, 70),
    "blue": (60, 90, 200),
    "yellow": (235, 205, 60),
    "black": (35, 35, 40),
    "white": (245, 245, 240),
}
GROUNDS = ((150, 190, 225), (120, 165, 110), (205, 190, 160), (165, 165, 170))
GREY = 0.35  # share of black-and-white scenes
GREYS = {"black": (35, 35, 35), "grey": (150, 150, 150), "white": (245, 245, 245)}
GREY_GROUNDS = ((70, 70, 70), (105, 105, 105), (200, 200, 200))
# of the scene's width
SIZES = {"small": (0.12, 0.18), "medium-sized": (0.22, 0.30), "large": (0.36, 0.48)}
# Outlines in the unit square, (x, y) with y downwards; a thing may have several, and "o" is an
# ellipse in (x1, y1, x2, y2).
THINGS = {
    "ball": ["o", (0, 0, 1, 1)],
    "crate": [[(0, 0), (1, 0), (1, 1), (0, 1)]],
    "house": [[(0, 0.45), (0.5, 0), (1, 0.45), (1, 1), (0, 1)]],
    "tree": [[(0.42, 0.6), (0.58, 0.6), (0.58, 1), (0.42, 1)], [(0.5, 0), (1, 0.7), (0, 0.7)]],
    "star": [
        [
            (0.5, 0),
            (0.63, 0.36),
            (1, 0.38),
            (0.7, 0.62),
            (0.81, 1),
            (0.5, 0.78),
            (0.19, 1),
            (0.3, 0.62),
            (0, 0.38),
            (0.37, 0.36),
        ]
    ],
    "cup": [
        [(0, 0), (0.75, 0), (0.65, 1), (0.1, 1)],
        [(0.7, 0.15), (1, 0.15), (1, 0.65), (0.68, 0.65)],
    ],
    "fish": ["o", (0, 0.1, 0.75, 0.9), [(0.65, 0.5), (1, 0), (1, 1)]],
    "boat": [[(0, 0.65), (1, 0.65), (0.8, 1), (0.2, 1)], [(0.45, 0), (0.95, 0.58), (0.45, 0.58)]],
    "ladder": [
        [(0, 0), (0.14, 0), (0.14, 1), (0, 1)],
        [(0.86, 0), (1, 0), (1, 1), (0.86, 1)],
        *([(0, v), (1, v), (1, v + 0.1), (0, v + 0.1)] for v in (0.1, 0.45, 0.8)),
    ],
}
CAPTIONS = (
    "Describe this picture.",
    "What does this picture show?",
    "What can be seen here?",
    "Write a caption for this image.",
)
ALL = (
    "Box every thing in this picture.",
    "Find all things and give their boxes.",
    "Where are the things in this picture?",
)
ONE = (
    "Where is the {label}?",
    "Locate the {label}.",
    "Draw a box around the {label}.",
    "Show the {label} on this image.",
)
PLACED = (
    "What is at the {where}?",
    "Box what is at the {where}.",
    "Find the thing at the {where}.",
)
ANSWERS = tuple(answer for answer in REGION_ANSWERS if "film" not in answer)
# Loose captions of films. The web names a finding in a layman's words or by its name, and places it
# on the image rather than in the patient.
FILM_CAPTIONS = ("A chest X-ray", "An X-ray of a chest", "A chest radiograph", "X-ray")
FILM_NOTES = {
    "cardiomegaly": ("a large heart", "the heart looks large", "cardiomegaly"),
    "pneumothorax": ("something dark", "a dark rim", "a pneumothorax"),
    "pleural effusion": ("something white", "fluid", "a pleural effusion"),
    "consolidation": ("a white patch", "a cloud", "consolidation"),
    "atelectasis": ("a thin white line", "a streak", "atelectasis"),
    "nodule": ("a small white spot", "a round spot", "a nodule"),
    "pacemaker": ("a metal box", "a device", "a pacemaker"),
    "endotracheal tube": ("a tube", "a breathing tube", "an endotracheal tube"),
    "nasogastric tube": ("a long tube", "a feeding tube", "a nasogastric tube"),
}
NOTED = 0.7  # chance that a caption tells of a finding, and that it tells where
MISPLACED = 0.1  # chance that it says a wrong place
INVENTED = 0.1  # chance that it tells of a finding that is not there
NINTHS = (
    *("upper left", "top", "upper right", "left", "middle", "right"),
    *("lower left", "bottom", "lower right"),
)
READING = (
    "Quote a report of a chest X-ray.",
    "What does a radiology report read like?",
    "Give an example of a findings paragraph.",
)


def place(rng, taken: list[list[float]]) -> tuple[str, list[float]] | None:
    """(size, box in 0..1) of a thing that leaves those before it free; None where there is no
    room.
    """
    for _ in range(30):
        size = str(rng.choice(list(SIZES), p=(0.4, 0.35, 0.25)))
        width = rng.uniform(*SIZES[size])
        width, height = width * (shape := float(np.exp(rng.uniform(-0.6, 0.6)))), width / shape
        x, y = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
        box = [x, y, x + width, y + height]
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken):
            return size, box
    return None


def paint(
    pen: ImageDraw.ImageDraw, label: str, box: tuple[float, ...], fill: tuple[int, ...]
) -> None:
    """One of THINGS within `box` (x1, y1, x2, y2 in pixels), in the colour `fill`."""
    x1, y1, x2, y2 = box
    at, shapes = lambda x, y: (x1 + x * (x2 - x1), y1 + y * (y2 - y1)), iter(THINGS[label])
    for shape in shapes:
        if shape == "o":
            u1, v1, u2, v2 = next(shapes)
            pen.ellipse([*at(u1, v1), *at(u2, v2)], fill=fill)
        else:
            pen.polygon([at(*point) for point in shape], fill=fill)


def draw_scene(rng, size: int) -> tuple[Image.Image, list[dict]]:
    """A scene and its things, {"label", "colour", "severity" (its size), "box"}, from the left to
    the right.
    """
    side = 2 * size  # drawn at twice the size and reduced: PIL has no soft edges
    grey = rng.random() < GREY
    grounds, colours = (GREY_GROUNDS, GREYS) if grey else (GROUNDS, COLOURS)
    ground = np.array(grounds[rng.integers(len(grounds))]) + rng.normal(0, 8, 1 if grey else 3)
    image = Image.new("RGB", (side, side), tuple(ground.clip(0, 255).astype(int).tolist()))
    pen, things = ImageDraw.Draw(image), []
    labels = rng.choice(list(THINGS), 1 + rng.choice(4, p=(0.2, 0.3, 0.3, 0.2)), replace=False)
    for label in labels.tolist():
        placed = place(rng, [thing["box"] for thing in things])
        if placed is None:
            break
        colour, (scale, box) = str(rng.choice(list(colours))), placed
        shade = np.array(colours[colour]) + rng.normal(0, 10, 1 if grey else 3)
        fill = tuple(int(c) for c in shade.clip(0, 255))
        paint(pen, label, tuple(side * v for v in box), fill)
        things.append(
            {"label": label, "colour": colour, "severity": scale, "box": [round(v, 4) for v in box]}
        )
    pixels = np.asarray(
        image.reduce(2).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.004) * size)), np.float32
    )
    grain = (*pixels.shape[:2], 1 if grey else 3)
    pixels = pixels + rng.normal(0, rng.uniform(1, 6), grain)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), sorted(
        things, key=lambda thing: thing["box"]
    )


def where(box: list[float]) -> str:
    """The ninth of the image that holds the middle of a box, such as "upper left", "left" or "top";
    "middle" for the central one.
    """
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row, column = (
        ("upper", "", "lower")[min(2, int(3 * y))],
        ("left", "", "right")[min(2, int(3 * x))],
    )
    return (
        f"{row} {column}".strip()
        if column
        else {"upper": "top", "": "middle", "lower": "bottom"}[row]
    )


def named(thing: dict) -> str:
    """A thing of a scene, or what a caption says of a film, in words."""
    words = (thing[key] for key in ("severity", "colour", "label") if key in thing)
    return " ".join(words)


def place_of(thing: dict) -> str:
    return thing["where"] if "where" in thing else where(thing["box"])


def named_with_box(thing: dict) -> str:
    return f"{thing['label']} at {format_boxes([thing['box']])}"


def together(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def scene_samples(things: list[dict], name: str, image: str, rng) -> list[dict]:
    """The lines about one scene: caption, all boxes, the box of one thing, and the box of what is
    in one place.
    """
    caption = " ".join(
        f"There is a {named(thing)} at the {where(thing['box'])}." for thing in things
    )
    one, other = things[rng.integers(len(things))], things[rng.integers(len(things))]
    there = where(other["box"])
    placed = [thing for thing in things if where(thing["box"]) == there]
    answer = "I see " + together([named_with_box(thing) for thing in things]) + "."
    common = {"image": image, "source": "scenes", "findings": things}
    grounding = common | {"task": "grounding", "kind": "abnormality"}
    return [
        {
            "id": f"{name}-caption",
            "task": "classification",
            "question": draw_template(CAPTIONS, rng),
            "answer": caption,
        }
        | common,
        {
            "id": f"{name}-all",
            "label": "all things",
            "question": draw_template(ALL, rng),
            "answer": answer,
            "boxes": [thing["box"] for thing in things],
        }
        | grounding,
        {
            "id": f"{name}-one",
            "label": one["label"],
            "question": draw_template(ONE, rng).format(label=one["label"]),
            "boxes": [one["box"]],
            "answer": (
                draw_template(ANSWERS, rng).format(
                    label=one["label"], boxes=format_boxes([one["box"]])
                )
            ),
        }
        | grounding,
        {
            "id": f"{name}-place",
            "label": there,
            "question": draw_template(PLACED, rng).format(where=there),
            "boxes": [thing["box"] for thing in placed],
            "answer": "I see " + together([named_with_box(thing) for thing in placed]) + ".",
        }
        | grounding,
    ]


def write_scene(job: tuple[str, int], *, seed: int, size: int, folder: Path) -> list[dict]:
    split, index = job
    rng, name = (
        np.random.default_rng([seed, SPLITS.index(split), index, 2]),
        f"scene-{split}-{index:05d}",
    )
    image, things = draw_scene(rng, size)
    with aside(folder / "scenes" / f"{name}.png", durable=False) as part:
        image.save(part, "PNG", compress_level=3)
    return scene_samples(things, name, f"scenes/{name}.png", rng)


def film_notes(film: phantom.Film, rng) -> list[dict]:
    """What the web tells of a film, {"label": a phrase, "where"}: some of its findings and parts,
    and now and then what is not there.
    """
    seen = [(f.label, f.box) for f in film.findings if rng.random() < NOTED]
    notes = [
        (FILM_NOTES[label][rng.integers(len(FILM_NOTES[label]))], where(box)) for label, box in seen
    ]
    if rng.random() < INVENTED:
        phrases = FILM_NOTES[str(rng.choice(list(FILM_NOTES)))]
        notes.append((str(rng.choice(phrases)), str(rng.choice(NINTHS))))
    parts = rng.choice(list(film.regions), rng.integers(1, 4), replace=False)
    notes += [(f"the {part}", where(phantom.box_of(film.regions[part]))) for part in parts.tolist()]
    return [
        {"label": phrase, "where": str(rng.choice(NINTHS)) if rng.random() < MISPLACED else place}
        for phrase, place in notes
    ]


def film_caption(notes: list[dict], rng) -> str:
    """One caption of several that a film may have: the notes in any order, some without a place."""
    told = [
        f"{note['label']} at the {note['where']}" if rng.random() < NOTED else note["label"]
        for note in rng.permutation(np.array(notes, dtype=object)).tolist()
    ]
    return f"{draw_template(FILM_CAPTIONS, rng)} with {together(told)}."


def write_film(index: int, *, seed: int, size: int, folder: Path) -> list[dict]:
    """A film that no data set holds, with two loose captions: its split, 3, is neither train nor
    test.
    """
    rng, name = np.random.default_rng([seed, 3, index, 3]), f"film-{index:05d}"
    film = phantom.draw_film(seed, 3, index, size)
    with aside(folder / "scenes" / f"{name}.png", durable=False) as part:
        Image.fromarray(film.pixels).save(part, "PNG", compress_level=3)
    notes = film_notes(film, rng)
    return [
        {
            "id": f"{name}-caption-{k}",
            "image": f"scenes/{name}.png",
            "task": "classification",
            "question": draw_template(CAPTIONS, rng),
            "answer": film_caption(notes, rng),
            "source": "scenes",
            "findings": notes,
        }
        for k in range(2)
    ]


def read_report(index: int, *, seed: int) -> dict:
    """A report as text alone, of a film that no data set holds: its split, 2, is neither train nor
    test.
    """
    rng = np.random.default_rng([seed, 2, index, 3])
    statements = phantom.report(phantom.draw_film(seed, 2, index, 96).findings, rng)
    text = " ".join(s.text for s in phantom.with_prose(statements, rng))
    return {
        "id": f"reading-{index:05d}",
        "image": None,
        "task": "classification",
        "question": draw_template(READING, rng),
        "answer": text,
        "source": "scenes",
    }


def write_scenes(
    output_dir: str | Path,
    *,
    train: int,
    test: int,
    reading: int,
    seed: int,
    size: int,
    films: int = 0,
    workers: int | None = None,
) -> None:
    folder = Path(output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: remove it, or choose another --output_dir")
    (folder / "scenes").mkdir(parents=True)
    counts, lines = {"train": train, "test": test}, {split: [] for split in SPLITS}
    with multiprocessing.Pool(workers or os.cpu_count()) as pool:
        jobs = [(split, k) for split in SPLITS for k in range(counts[split])]
        scenes = tqdm(
            pool.imap(partial(write_scene, seed=seed, size=size, folder=folder), jobs, chunksize=8),
            total=len(jobs),
            desc="scenes",
        )
        for (split, _), samples in zip(jobs, scenes, strict=True):
            lines[split] += samples
        captioned = pool.imap(
            partial(write_film, seed=seed, size=size, folder=folder), range(films), chunksize=8
        )
        for samples in tqdm(captioned, total=films, desc="films"):
            lines["train"] += samples
        lines["train"] += pool.imap(partial(read_report, seed=seed), range(reading), chunksize=8)
    sync_all(folder / "scenes")
    for split in SPLITS:
        write_jsonl(folder / f"{split}.jsonl", lines[split])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, required=True, help="scenes to learn from")
    parser.add_argument("--test", type=int, default=0, help="scenes to test on")
    parser.add_argument("--films", type=int, default=0, help="films with loose captions")
    parser.add_argument("--reading", type=int, default=0, help="reports as text, without a film")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    options = vars(parser.parse_args())
    try:
        write_scenes(**options)
    except (ValueError, OSError) as error:
        fail(error)
    print(
        f"wrote {options['train']} + {options['test']} scenes, {options['films']} films with"
        f" loose captions and {options['reading']} reports to {options['output_dir']}"
    )


if __name__ == "__main__":
    main()
