"""A contact sheet: films with their boxes, and what was asked, to see with one's own eyes that
boxes lie where they should.
"""

import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minigrpo.run.files import aside

from .sample import Sample, load_image

TILE, CAPTION = 256, 64  # pixels
COLOURS = ("#ff4d4d", "#39d353", "#58a6ff", "#ffa657", "#d2a8ff", "#f2cc60")


def draw_sheet(
    path: Path,
    samples: list[Sample],
    *,
    count: int = 24,
    columns: int = 6,
    bad: set[str] = frozenset(),
) -> bool:
    """`count` samples, drawn at random but always the same, those with boxes first; False if no
    film can be shown.
    """
    usable = [s for s in samples if s.images and not set(s.images) & bad]
    boxed, other = [s for s in usable if s.boxes], [s for s in usable if not s.boxes]
    chosen = random.Random(0).sample(boxed, min(count, len(boxed)))
    chosen += random.Random(0).sample(other, min(count - len(chosen), len(other)))
    if not chosen:
        return False
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "white")
    for place, sample in enumerate(chosen):
        sheet.paste(tile(sample), (place % columns * TILE, place // columns * (TILE + CAPTION)))
    with aside(path) as part:
        sheet.save(part, Image.registered_extensions()[path.suffix.lower()])
    return True


def tile(sample: Sample) -> Image.Image:
    """One film in its own aspect, its boxes, and its id and question below."""
    film = load_image(sample.images[0])
    film.thumbnail((TILE - 4, TILE - 4))
    picture = Image.new("RGB", (TILE, TILE + CAPTION), "white")
    left, top = (TILE - film.width) // 2, (TILE - film.height) // 2
    picture.paste(film, (left, top))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for number, (x1, y1, x2, y2) in enumerate(sample.boxes):
        pen.rectangle(
            (
                left + x1 * film.width,
                top + y1 * film.height,
                left + x2 * film.width,
                top + y2 * film.height,
            ),
            outline=COLOURS[number % len(COLOURS)],
            width=2,
        )
    words = (
        f"{sample.id}: {sample.question}"
        if sample.task != "report"
        else f"{sample.id}: {sample.answer}"
    )
    for number, line in enumerate(textwrap.wrap(words, 42)[:4]):
        pen.text((4, TILE + 14 * number), line, fill="black", font=font)
    return picture
