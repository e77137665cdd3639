"""Greedy answers of a checkpoint to a JSONL file, scored with 95% bootstrap intervals.

    python evaluate.py --model runs/report/final --data data/phantom/test.jsonl \\
        --output_dir runs/report/test --baseline runs/sft/test
    # score stored answers again: no model, no GPU
    python evaluate.py --predictions runs/report/test --data data/phantom/test.jsonl \\
        --output_dir runs/report/clinical --reward_weights weights

`--baseline OTHER_EVALUATION` adds the paired difference to another model's answers to the same
file. `--model constant` ignores the film and gives the best constant answers: the best box of each
label and the best report of `--train_data`. A model that does not beat them has not used the film.
Open report.html to look at single answers.
"""

from collections.abc import Callable
from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import EvaluateArguments

if __name__ == "__main__":
    answer_early(EvaluateArguments, __doc__)  # what follows takes seconds to import

from minigrpo.data import Sample, ask_to_think, check_apart, read_jsonl, scale_note
from minigrpo.metrics import breakdown, compare, constant_answers, evaluate_answers, load_clinical
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.distributed import first, gathered, rank, ranks
from minigrpo.run.evaluation import (
    check_empty,
    hold,
    how_to_read,
    read_answers,
    write_pages,
    write_predictions,
)
from minigrpo.run.loop import join_device
from minigrpo.run.validate import greedy_answers

DRAWN = ("phantom", "scenes")  # sources of samples that show no patient


@run_errors(lambda: "Every file in the output folder is whole", "--batch_size or --max_pixels")
def main() -> None:
    with input_errors():
        args = parse_args(EvaluateArguments, __doc__)
        join_device(args)  # the processes of torchrun divide the questions among them
        folder = Path(args.output_dir)
        check_empty(folder)
        gathered(None)  # all have looked before one writes
        samples = read_samples(args)
        clinical, missing = None, []
        if args.reward_weights:
            clinical, missing = load_clinical(args.reward_weights, args.device)
        baseline, _, about_baseline = None, None, {}
        if args.baseline:
            baseline, _, about_baseline = read_answers(args.baseline, samples, "--baseline")
        answer = answers_of(args, samples)
        # before hours of sampling, and after all that can be wrong with the input
        held = hold(folder) if first() else None  # until the program ends
        gathered(None)
    for line in missing:
        print(line)
    answers, cut_off, about = answer()
    if not first():
        return

    # hours of sampling outlive a scorer that fails
    write_predictions(folder / "predictions.jsonl", samples, answers, cut_off)
    reading = how_to_read(about)
    if args.template_opens_think:
        reading["template_opens_think"] = True
    if args.box_scale:
        reading["box_scale"] = args.box_scale
    if note := scale_note(answers, samples, **reading):
        print(f"note: {note}")
    results = evaluate_answers(samples, answers, **reading, clinical=clinical, cut_off=cut_off)
    items = results.pop("items")
    metrics = {
        "model": args.model or about.get("model", args.predictions),
        "data": args.data,
        **reading,
        "tasks": results,
        "breakdown": breakdown(samples, items),
        "not_computed": missing,
    }
    if baseline:
        read_before = how_to_read(about_baseline)
        others = evaluate_answers(samples, baseline, **read_before, clinical=clinical)["items"]
        metrics["baseline"] = args.baseline
        metrics["difference"] = compare(items, others)
    write_predictions(folder / "predictions.jsonl", samples, answers, cut_off, items)
    print(write_pages(folder, metrics, samples, answers, items, baseline, reading, args))
    (folder / ".lock").unlink(missing_ok=True)  # who waits for it finds the folder full
    del held  # and with it the lock


def read_samples(args: EvaluateArguments) -> list[Sample]:
    """The samples of --data; each rank checks its part of the images."""
    samples = read_jsonl(args.data, task=args.task, part=(rank(), ranks()))
    if args.published and (drawn := sum(sample.source in DRAWN for sample in samples)):
        raise ValueError(
            f"--published: {drawn} of the samples are drawn ({', '.join(DRAWN)}), and the paper's"
            " figures are for real films: leave it out"
        )
    return ask_to_think(samples) if args.think else samples


def answers_of(args: EvaluateArguments, samples: list[Sample]) -> Callable[[], tuple]:
    """Load the source of the answers, --predictions or --model. The returned function gives
    (answers, which were cut off or None, what metrics.json says of them).
    """
    if args.predictions:
        stored = read_answers(args.predictions, samples, "--predictions")
        return lambda: stored
    if args.model == "constant":
        train = read_jsonl(args.train_data, task=args.task, verify_images=False)
        if shared := check_apart(train, samples, ("--train_data", f"--data {args.data}")):
            print(f"note: {shared}")
        answers = constant_answers(train, samples)
        return lambda: (answers, None, {})
    policy = Policy.from_pretrained(
        args.model, device=args.device, autocast=args.bf16, max_pixels=args.max_pixels
    )

    def sampled() -> tuple[list[str], list[bool], dict]:
        sampled_answers = greedy_answers(policy, samples, args.batch_size, args.max_new_tokens)
        return *sampled_answers, {"template_opens_think": policy.template_opens_think}

    return sampled


if __name__ == "__main__":
    main()
