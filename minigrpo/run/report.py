"""report.html: single answers as a radiologist would look at them, in one file that opens anywhere.

Film with true and predicted boxes, reference and answer with their differences marked, scores; the
page can be sorted and filtered. Nothing is fetched: films are small JPEGs inside the file. Every
text is escaped by the template (report.html beside this).
"""

import base64
import difflib
import io
import random
import re
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from minigrpo.data import Sample, parse_boxes, split_thinking
from minigrpo.data.sample import load_film
from minigrpo.metrics.items import CORPUS
from minigrpo.run.files import write_aside
from minigrpo.visible import visible

SIDE, QUALITY = 448, 80  # of the films; about 30 kB each
BUDGET = 18_000_000  # bytes of films: the file stays below 20 MB
MAX_CHARACTERS, MAX_WORDS, MAX_BOXES = 50_000, 500, 200  # of a text, shown on a card
LEFT_OUT = "… (the rest is in predictions.jsonl)"
WORD = re.compile(r"\[[^\[\]]*\]\S*|\S+")  # a box is one word
FILTERS = ("task", "kind", "label", "source")


def write_report(
    path: Path,
    samples: list[Sample],
    answers: list[str],
    items: list[dict],
    *,
    title: str,
    count: int = 400,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
) -> Path:
    """At most `count` of the samples, always the same ones; fewer if their films would exceed the
    size limit.
    """
    films: dict[str, dict] = {}  # each film once, however many questions are asked of it
    cards, size = {}, 0
    for i in random.Random(0).sample(range(len(samples)), min(count, len(samples))):
        name = samples[i].images[0] if samples[i].images else None
        if name and name not in films:
            film = small_film(samples[i], name) | {"id": f"film{len(films)}"}
            size += len(film["href"])
            if size > BUDGET:
                break
            films[name] = film
        cards[i] = card(
            samples[i], answers[i], items[i], films.get(name), template_opens_think, box_scale
        )
    cards = [cards[i] for i in sorted(cards)]
    metrics = list(dict.fromkeys(name for c in cards for name in c["scores"]))
    choices = {field: sorted({c[field] for c in cards if c[field]}) for field in FILTERS}
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = page.get_template("report.html").render(
        title=title,
        cards=cards,
        films=list(films.values()),
        total=len(samples),
        metrics=metrics,
        choices=choices,
    )
    write_aside(path, visible(text))  # a page is also looked at in a terminal
    return path


def small_film(sample: Sample, name: str) -> dict:
    """{"href": data URL, "width", "height"} of the film, its longer side at most SIDE pixels."""
    image = load_film(sample, name)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.convert("L").save(stream, "JPEG", quality=QUALITY)
    code = base64.b64encode(stream.getvalue()).decode()
    return {
        "href": Markup("data:image/jpeg;base64," + code),
        "width": image.width,
        "height": image.height,
    }


def card(
    sample: Sample,
    answer: str,
    item: dict,
    film: dict | None,
    template_opens_think: bool,
    box_scale: float,
) -> dict:
    """What the template shows of one answer."""
    thinking, text, ok = split_thinking(answer, template_opens_think)
    reference, prediction = differences(sample.answer, text)
    width, height = (film["width"], film["height"]) if film else (SIDE, SIDE)
    boxes = [("true", box) for box in sample.boxes]
    boxes += (
        [("found", box) for box in parse_boxes(text, box_scale)]
        if ok and sample.task == "grounding"
        else []
    )
    return {
        "id": sample.id,
        "task": sample.task,
        "kind": sample.kind,
        "label": sample.label,
        "source": sample.source,
        "question": sample.question,
        "reference": reference,
        "prediction": prediction,
        "thinking": thinking[:MAX_CHARACTERS],
        "broken": not ok,
        "film": film,
        "more_films": max(0, len(sample.images) - 1),
        "scores": shown_scores(item),
        "boxes": [
            {"kind": kind, **rectangle(box, width, height)} for kind, box in boxes[:MAX_BOXES]
        ],
        "more_boxes": max(0, len(boxes) - MAX_BOXES),
        **conditions_of(item),
    }


def shown_scores(item: dict) -> dict[str, float]:
    """Every figure of this one item; of a corpus metric, its value on a corpus of one."""
    scores: dict[str, float] = {}
    for key, value in item.items():
        if key in CORPUS:
            scores |= {
                name: float(f(np.array(value, float)))
                for name, f in CORPUS[key].items()
                if "macro" not in name
            }
        elif key not in ("id", "task"):
            scores[key] = float(value)
    return {name: round(value, 3) for name, value in scores.items()}


def conditions_of(item: dict) -> dict:
    """Names of CheXbert's conditions that the answer shares with, adds to and misses of its
    reference.
    """
    if "chexbert" not in item:
        return {}
    from minigrpo.metrics.clinical import conditions

    rows = np.array(item["chexbert"]).reshape(3, -1)
    return {
        name: [c for c, on in zip(conditions(), row) if on]
        for name, row in zip(("agreed", "added", "missed"), rows)
    }


def rectangle(box, width: int, height: int) -> dict:
    """The box in pixels of the film, for SVG: a reversed one is swapped, a distant one kept near
    the film.
    """
    x1, y1, x2, y2 = (min(max(value, -0.5), 1.5) for value in box)
    return {
        "x": round(min(x1, x2) * width, 1),
        "y": round(min(y1, y2) * height, 1),
        "width": round(abs(x2 - x1) * width, 1),
        "height": round(abs(y2 - y1) * height, 1),
    }


def differences(reference: str, prediction: str) -> tuple[list[dict], list[dict]]:
    """Both texts in pieces {"text", "changed"}: changed are words that the other lacks. Case,
    punctuation and the numbers of boxes don't count, and a sentence that only moved is not a
    difference.
    """
    texts = reference, prediction
    words = [WORD.findall(text[:MAX_CHARACTERS]) for text in texts]
    cut = [len(x) > MAX_CHARACTERS or len(side) > MAX_WORDS for x, side in zip(texts, words)]
    words = [side[:MAX_WORDS] for side in words]  # comparing takes up to the cube of their number
    changed = [[True] * len(side) for side in words]
    spans = [sentence_spans(side) for side in words]
    for key in spans[0].keys() & spans[1].keys():
        for (start, end), (first, last) in zip(spans[0][key], spans[1][key]):
            changed[0][start:end], changed[1][first:last] = (
                [False] * (end - start),
                [False] * (last - first),
            )
    rest = [[i for i, flag in enumerate(flags) if flag] for flags in changed]
    keys = [[plain(side[i]) for i in indices] for side, indices in zip(words, rest)]
    for block in difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            changed[0][rest[0][block.a + i]] = changed[1][rest[1][block.b + i]] = False
    return tuple(
        [
            {"text": " ".join(word for word, _ in group), "changed": flag}
            for flag, group in groupby(zip(side, flags), key=lambda pair: pair[1])
        ]
        + [{"text": LEFT_OUT, "changed": False}] * is_cut
        for side, flags, is_cut in zip(words, changed, cut)
    )


def plain(word: str) -> str:
    return "[]" if word[0] == "[" else "".join(filter(str.isalnum, word)).lower()


def sentence_spans(words: list[str]) -> dict[tuple, list[tuple[int, int]]]:
    """{its plain words: [(first, last + 1), ...]} of the sentences."""
    spans: dict[tuple, list[tuple[int, int]]] = {}
    start = 0
    for i, word in enumerate(words, 1):
        if word[-1] in ".!?" or i == len(words):
            spans.setdefault(tuple(map(plain, words[start:i])), []).append((start, i))
            start = i
    return spans
