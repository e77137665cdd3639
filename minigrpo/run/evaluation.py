"""The folder of an evaluation: writing its answers, and reading those of another evaluation."""

import json
import math
from pathlib import Path
from typing import IO

from minigrpo.data import Sample
from minigrpo.data.schema import broken_text
from minigrpo.data.text import one_spelling
from minigrpo.metrics import markdown_table
from minigrpo.once import each_key_once
from minigrpo.run.files import lock, make_folder, write_aside, writes
from minigrpo.run.plots import draw_samples
from minigrpo.run.report import write_report


def check_empty(folder: Path) -> None:
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another --output_dir")


def hold(folder: Path) -> IO:
    """Create the folder, empty and locked for this process as long as the returned handle lives."""
    make_folder(folder)
    held = lock(folder / ".lock")
    if held is None:
        raise ValueError(
            f"{folder} is in use: another evaluation is writing there. Give another --output_dir"
        )
    check_empty(folder)  # that other evaluation may have ended since we looked
    return held


def write_predictions(
    path: Path,
    samples: list[Sample],
    answers: list[str],
    cut_off: list[bool] | None,
    items: list[dict] | None = None,
) -> None:
    """predictions.jsonl: one answer per line, as the model wrote it, with its scores if `items` is
    given.
    """
    with writes(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)  # should somebody have removed it meanwhile
    lines, nothing = [], [None] * len(samples)
    for sample, answer, cut, item in zip(samples, answers, cut_off or nothing, items or nothing):
        row = {
            "id": sample.id,
            "task": sample.task,
            "question": sample.question,
            "reference": sample.answer,
            "answer": answer,
        }
        row |= {} if cut is None else {"cut_off": cut}
        lines.append(json.dumps(row | ({"scores": item} if item else {})) + "\n")
    write_aside(path, "".join(lines))


def write_pages(
    folder: Path, metrics: dict, samples, answers, items, baseline, reading, args
) -> str:
    """metrics.json, table.md, samples.png and report.html; returns the table. `items`: the scores
    of each answer. `reading`: what `how_to_read` gave."""
    write_aside(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_aside(folder / "table.md", table := markdown_table(metrics, published=args.published))
    draw_samples(folder / "samples.png", samples, answers, baseline, **reading)
    if args.report_items:
        title, count = f"{metrics['model']} on {args.data}", args.report_items
        page = folder / "report.html"
        write_report(page, samples, answers, items, title=title, count=count, **reading)
    return table


def read_answers(
    place: str, samples: list[Sample], argument: str
) -> tuple[list[str], list[bool] | None, dict]:
    """Another evaluation's answers to these samples, in their order; which were cut off (None
    unless that is known for all); and its metrics.json ({} if there is none).
    """
    path = Path(place) / "predictions.jsonl" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise ValueError(f"{argument} {place} is not an evaluation: it has no predictions.jsonl")
    answers, rows = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=each_key_once)
            name = row["id"]
            answers[name] = row["answer"] + ""
            if not isinstance(row.get("cut_off"), bool | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}:{number}: not a prediction: a line is an object with the texts id and"
                " answer, and optionally cut_off, true or false"
            ) from None
        if broken := broken_text(answers[name]):
            raise ValueError(
                f"{path}:{number}: the answer holds {broken}, half a character, which no model"
                " writes: correct the line"
            )
        if rows.setdefault(name, row) is not row:
            raise ValueError(f"{path}:{number}: a second answer to {name}: remove one of the two")
    absent = [s.id for s in samples if s.id not in answers]
    if absent:
        raise ValueError(
            f"{argument} {place} has no answer for {len(absent)} of the samples, such as"
            f" {absent[0]}: evaluate both models on the same file"
        )
    check_same_questions(rows, samples, f"{argument} {place}")
    cuts = [rows[s.id].get("cut_off") for s in samples]
    return (
        [answers[s.id] for s in samples],
        None if None in cuts else cuts,
        read_about(path.parent / "metrics.json"),
    )


def check_same_questions(rows: dict[str, dict], samples: list[Sample], what: str) -> None:
    """Ids such as 1, 2, 3 fit any file: the answers must be to the questions of the samples, with
    or without /think.
    """

    def plain(question):
        return one_spelling(question).rstrip().removesuffix("/think").rstrip()

    other = [
        s.id
        for s in samples
        if plain(str(rows[s.id].get("question", s.question))) != plain(s.question)
    ]
    if other:
        raise ValueError(
            f"{what} answers other questions: {len(other)} of the samples share an id with it but"
            f" not the question, such as {other[0]}: evaluate both models on the same file"
        )
    if changed := sum(rows[s.id].get("reference", s.answer) != s.answer for s in samples):
        print(
            f"note: {changed} references differ from those that {what} was scored with; those of"
            " --data are used"
        )


def read_about(path: Path) -> dict:
    """An evaluation's metrics.json, or {} if there is none."""
    try:
        about = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({str(error)[:200]}): remove it, and give --template_opens_think"
            " and --box_scale if they were used"
        ) from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not a JSON object, so no evaluation wrote it: remove it")
    opens, scale = how_to_read(about).values()
    if type(scale) not in (int, float) or not 0 < scale < math.inf or type(opens) is not bool:
        raise ValueError(
            f"{path}: box_scale {scale!r} must be a number above 0, and template_opens_think"
            f" {opens!r} true or false: write the values that the answers were made with"
        )
    return about


def how_to_read(about: dict) -> dict:
    """The settings for reading an evaluation's answers, from its metrics.json."""
    opens = about.get("template_opens_think", about.get("opened", False))
    return {"template_opens_think": opens, "box_scale": about.get("box_scale", 1.0)}
