"""Greedy answers of a checkpoint to a JSONL file, scored with 95% bootstrap intervals.

    python evaluate.py --model runs/report/final --data data/phantom/test.jsonl \\
        --output_dir runs/report/test --baseline runs/sft/test
    # stored answers scored anew: no model, no GPU
    python evaluate.py --predictions runs/report/test --data data/phantom/test.jsonl \\
        --output_dir runs/report/clinical --reward_weights weights

`--baseline OTHER_EVALUATION` adds the paired difference to another model's answers to the same
file. `--model constant` answers the same whatever the film shows, as well as one can: the best box
of each label and the best report of `--train_data`. What does not beat it has not looked at the
film. Open report.html to look at single answers.
"""

import json
import math
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import EvaluateArguments

if __name__ == "__main__":
    answer_early(EvaluateArguments, __doc__)  # what follows takes seconds to import

from minigrpo.data import Sample, ask_to_think, check_apart, read_jsonl, scale_note
from minigrpo.data.schema import broken_text
from minigrpo.data.text import one_spelling
from minigrpo.metrics import (
    breakdown,
    compare,
    constant_boxes,
    constant_report,
    evaluate_answers,
    load_clinical,
    markdown_table,
)
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.distributed import first, gathered, join, rank, ranks, say
from minigrpo.run.files import lock, make_folder, write_aside, writes
from minigrpo.run.plots import draw_samples
from minigrpo.run.report import write_report
from minigrpo.run.roofline import note_on_bf16
from minigrpo.run.validate import greedy_answers

DRAWN = ("phantom", "scenes")  # sources of samples that show no patient


@run_errors(lambda: "Every file in the output folder is whole", "--batch_size or --max_pixels")
def main() -> None:
    with input_errors():
        args = parse_args(EvaluateArguments, __doc__)
        # the other processes of torchrun, if there are any: they share out the questions
        join(args.device)
        if args.bf16 and (note := note_on_bf16(args.device)):
            say(note)
        folder = Path(args.output_dir)
        if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give another --output_dir")
        gathered(None)  # all have looked before one writes
        samples = read_jsonl(args.data, task=args.task, part=(rank(), ranks()))
        if args.published and (drawn := sum(sample.source in DRAWN for sample in samples)):
            raise ValueError(
                f"--published: {drawn} of the samples are drawn ({', '.join(DRAWN)}), "
                "and the paper's figures are of real films: leave it out"
            )
        samples = ask_to_think(samples) if args.think else samples
        clinical, missing = (
            load_clinical(args.reward_weights, args.device) if args.reward_weights else (None, [])
        )
        baseline, _, before = (
            read_answers(args.baseline, samples, "--baseline")
            if args.baseline
            else (None, None, {})
        )
        stored, cut_off = {}, None
        if args.predictions:
            answers, cut_off, stored = read_answers(args.predictions, samples, "--predictions")
        elif args.model == "constant":
            train = read_jsonl(args.train_data, task=args.task, verify_images=False)
            if shared := check_apart(train, samples, ("--train_data", f"--data {args.data}")):
                print(f"note: {shared}")
            answers = constant_answers(train, samples)
        else:
            policy = Policy.from_pretrained(
                args.model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
            )
        # before hours of sampling, and after all that can be wrong with the input
        make_folder(folder)
        held = lock(folder / ".lock") if first() else True  # until the program ends
        if held is None:
            raise ValueError(
                f"{folder} is in use: another evaluation is writing there. Give "
                "another --output_dir"
            )
        if any(path.name != ".lock" for path in folder.iterdir()):  # it has ended since we looked
            raise ValueError(f"{folder} is not empty: give another --output_dir")
        gathered(None)
    for line in missing:
        print(line)
    if args.model not in (None, "constant"):
        answers, cut_off = greedy_answers(policy, samples, args.batch_size, args.max_new_tokens)
        stored = {"template_opens_think": policy.template_opens_think}
    if not first():
        return

    with writes(folder):
        folder.mkdir(parents=True, exist_ok=True)  # should somebody have removed it meanwhile
    # hours of sampling outlive a scorer that fails
    write_predictions(folder / "predictions.jsonl", samples, answers, cut_off)
    reading = {
        "template_opens_think": (
            args.template_opens_think
            or stored.get("template_opens_think", stored.get("opened", False))
        ),
        "box_scale": args.box_scale or stored.get("box_scale", 1.0),
    }
    if note := scale_note(answers, samples, **reading):
        print(f"note: {note}")
    results = evaluate_answers(samples, answers, **reading, clinical=clinical, cut_off=cut_off)
    items = results.pop("items")
    metrics = {
        "model": args.model or stored.get("model", args.predictions),
        "data": args.data,
        **reading,
        "tasks": results,
        "breakdown": breakdown(samples, items),
        "not_computed": missing,
    }
    if baseline:
        read_before = {
            name: before.get(name, default)
            for name, default in (("template_opens_think", False), ("box_scale", 1.0))
        }
        others = evaluate_answers(samples, baseline, **read_before, clinical=clinical)["items"]
        metrics["baseline"] = args.baseline
        metrics["difference"] = compare(items, others)
    write_predictions(folder / "predictions.jsonl", samples, answers, cut_off, items)
    write_aside(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_aside(folder / "table.md", table := markdown_table(metrics, published=args.published))
    draw_samples(folder / "samples.png", samples, answers, baseline, **reading)
    if args.report_items:
        write_report(
            folder / "report.html",
            samples,
            answers,
            items,
            title=f"{metrics['model']} on {args.data}",
            count=args.report_items,
            **reading,
        )
    print(table)
    (folder / ".lock").unlink(missing_ok=True)  # who waits for it finds the folder full


def constant_answers(train: list[Sample], samples: list[Sample]) -> list[str]:
    """For each task that has a constant baseline; samples of other tasks are an error."""
    answers = {}
    for task, choose in (("grounding", constant_boxes), ("report", constant_report)):
        test = [s for s in samples if s.task == task]
        if test:
            answers |= zip((s.id for s in test), choose([s for s in train if s.task == task], test))
    missing = sorted({s.task for s in samples if s.id not in answers})
    if missing:
        raise ValueError(
            f"--model constant has no answer for {', '.join(missing)}: choose --task report or"
            " grounding"
        )
    return [answers[s.id] for s in samples]


def write_predictions(
    path: Path,
    samples: list[Sample],
    answers: list[str],
    cut_off: list[bool] | None,
    items: list[dict] | None = None,
) -> None:
    """predictions.jsonl: an answer a line, as the model wrote it, and with `items` its scores."""
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


def read_answers(
    place: str, samples: list[Sample], argument: str
) -> tuple[list[str], list[bool] | None, dict]:
    """Another evaluation's answers to these samples, in their order, which were cut off (None where
    that is not known of all), and its metrics.json ({} where there is none).
    """
    path = Path(place) / "predictions.jsonl" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise ValueError(f"{argument} {place} is no evaluation: it holds no predictions.jsonl")
    answers, rows = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["id"]
            answers[name] = row["answer"] + ""
            if not isinstance(row.get("cut_off"), bool | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}:{number}: not a prediction: a line is an object with id and answer, two"
                " texts, and perhaps cut_off, true or false"
            ) from None
        if broken := broken_text(answers[name]):
            raise ValueError(
                f"{path}:{number}: the answer holds {broken}, half a character, which "
                "no model writes: write it anew"
            )
        if rows.setdefault(name, row) is not row:
            raise ValueError(
                f"{path}:{number}: a second answer to {name}: which one counts? Remove the other"
            )
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
    """Ids such as 1, 2, 3 fit any file: the answers must be to the samples' own questions, whether
    they asked to think or not.
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
            f"{what} answers other questions: {len(other)} of the samples have an id of it and"
            f" another question, such as {other[0]}: evaluate both models on the same file"
        )
    if changed := sum(rows[s.id].get("reference", s.answer) != s.answer for s in samples):
        print(
            f"note: {changed} references are not those that {what} was scored with; these here"
            " count"
        )


def read_about(path: Path) -> dict:
    """An evaluation's metrics.json, {} where there is none."""
    try:
        about = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({str(error)[:200]}): remove it, and name --template_opens_think "
            "and --box_scale if they were used"
        ) from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no object, so it is no evaluation's: remove it")
    scale, template_opens_think = (
        about.get("box_scale", 1.0),
        about.get("template_opens_think", about.get("opened", False)),
    )
    if (
        type(scale) not in (int, float)
        or not 0 < scale < math.inf
        or type(template_opens_think) is not bool
    ):
        raise ValueError(
            f"{path}: box_scale {scale!r} must be a number above 0, and template_opens_think"
            f" {template_opens_think!r} true or false: write what the answers were made with"
        )
    return about


if __name__ == "__main__":
    main()
