"""A first minute with GRPO: small pictures, one question, a reward of six lines, and a model that
learns to earn it.

    python -m minigrpo.quick --output_dir runs/quick --seed 0      # make quick

Pictures show two to four things. SFT learns from captions as people write them: true, and most of
them name one or two of the things. The reward asks for all of them, so GRPO has to find answers
that the captions rarely show. Beside it, on the other core, SFT simply continues for the same time.
Writes quick.png, results.md and results.json to output_dir.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()
from minigrpo.run.args import answer_early
from minigrpo.run.arguments import QuickArguments

if __name__ == "__main__":
    answer_early(QuickArguments, __doc__)  # what follows takes seconds to import

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, DrawingArea, HPacker, TextArea, VPacker
from matplotlib.text import Text
from PIL import Image, ImageDraw

from minigrpo.commands import python, typed
from minigrpo.data import Sample, load_image, read_jsonl
from minigrpo.data.scenes import COLOURS, paint
from minigrpo.generate import generate
from minigrpo.metrics.bootstrap import interval, paired
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import aside, make_folder, sync_all, write_aside, write_jsonl
from minigrpo.run.plots import COLORS, draw_line
from minigrpo.run.validate import greedy_answers

QUESTION = "What is here?"
KINDS = [
    f"{colour} {shape}"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("ball", "star", "fish", "house")
]
GROUNDS = ((200, 215, 235), (205, 225, 195), (235, 225, 205), (215, 215, 220))
# a picture has 96 x 64 pixels, and a thing lies anywhere in its cell
COLUMNS, ROWS, CELL = 3, 2, 32
FEWEST, MOST = 2, 4  # things in a picture
CAPTIONS = 4  # of each training picture, by four people, so to say
NAMED = (0.8, 0.12, 0.05, 0.03)  # share of captions that stop after one thing, two, three, four
SPLITS = ("train", "test")
CHOSEN_ON = 400  # training pictures, for the best constant answer
SAMPLES = 4  # sampled answers to each held-out picture
SFT = (
    "--batch_size",
    16,
    "--micro_batch",
    16,
    "--optimizer",
    "muon",
    "--beta2",
    0.98,
    "--learning_rate",
    4e-3,
)
GRPO = (
    "--prompts_per_step",
    16,
    "--updates_per_rollout",
    2,
    "--learning_rate",
    2e-4,
    "--kl_coef",
    0,
    "--freeze",
    "vision",
    "projector",
)
LONGEST = 32  # tokens of an answer
FURTHER = 1.65  # steps of SFT for each of GRPO: at least as many seconds


def reward(answers: list[str], samples: list[Sample]) -> list[float]:
    """Things that are both named and in the picture, as a share of those that are either: 0..1, a
    float for each answer.

    A thing named twice counts as wrong the second time.
    """
    values = []
    for answer, sample in zip(answers, samples, strict=True):
        named, there = answer.split(", "), set(sample.findings)
        right = len(there.intersection(named))
        values.append(right / (len(named) + len(there) - right))
    return values


# ---- pictures and captions -----------------------------------------------------------------------


def draw_picture(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A picture of 96 x 64 pixels and the things in it, all different, such as "red fish", from the
    upper left on.
    """
    count = rng.integers(FEWEST, MOST + 1)
    things = [KINDS[k] for k in rng.choice(len(KINDS), count, replace=False)]
    # drawn at four times the size and reduced: PIL has no soft edges
    size = 4 * COLUMNS * CELL, 4 * ROWS * CELL
    image = Image.new("RGB", size, GROUNDS[rng.integers(len(GROUNDS))])
    pen = ImageDraw.Draw(image)
    for thing, cell in zip(
        things, sorted(rng.choice(COLUMNS * ROWS, count, replace=False).tolist())
    ):
        width = rng.uniform(20, 28)
        x, y = (
            CELL * place + rng.uniform(1, CELL - 1 - width)
            for place in (cell % COLUMNS, cell // COLUMNS)
        )
        colour, shape = thing.split()
        paint(pen, shape, tuple(4 * v for v in (x, y, x + width, y + width)), COLOURS[colour])
    return image.reduce(4), things


def write_caption(things: list[str], rng: np.random.Generator) -> str:
    """From the upper left on, and often incomplete: nothing false, but usually not everything."""
    share = np.array(NAMED[: len(things)])
    return ", ".join(things[: 1 + rng.choice(len(share), p=share / share.sum())])


def write_pictures(folder: Path, *, train: int, test: int, seed: int) -> None:
    """folder/train.jsonl with CAPTIONS lines per picture, test.jsonl with one that names all
    things; the pictures beside them.
    """
    (folder / "pictures").mkdir(parents=True)
    for number, (split, count) in enumerate(zip(SPLITS, (train, test))):
        lines = []
        for index in range(count):
            rng, name = np.random.default_rng([seed, number, index]), f"{split}-{index:04d}"
            image, things = draw_picture(rng)
            with aside(folder / f"pictures/{name}.png", durable=False) as part:
                image.save(part, "PNG", compress_level=1)
            captions = (
                [write_caption(things, rng) for _ in range(CAPTIONS)]
                if split == "train"
                else [", ".join(things)]
            )
            lines += [
                {
                    "id": f"{name}-{place}",
                    "image": f"pictures/{name}.png",
                    "task": "classification",
                    "question": QUESTION,
                    "answer": caption,
                    "findings": things,
                }
                for place, caption in enumerate(captions)
            ]
        sync_all(folder / "pictures")
        write_jsonl(folder / f"{split}.jsonl", lines)


# ---- the programs --------------------------------------------------------------------------------


def start(line: list, threads: int, log: Path | None = None) -> multiprocessing.Process:
    """Run `python LINE` in a fork, which has torch and transformers loaded already; its output goes
    to `log`, if given.
    """
    words = [str(word) for word in line]
    print(f"\n$ {typed(words)}" + (f" > {log}" if log else ""), flush=True)
    process = multiprocessing.get_context("fork").Process(target=run, args=(words, threads, log))
    process.start()
    return process


def run(words: list[str], threads: int, log: Path | None) -> None:
    if log:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(handle, stream)
    torch.set_num_threads(threads)
    python(words)


def wait(process: multiprocessing.Process, what: str, *others: multiprocessing.Process) -> None:
    """Wait until the process ends; if it fails, or on Ctrl-C, the `others` end with it, and this
    program with a message.
    """
    try:
        process.join()
    except KeyboardInterrupt:  # it has the signal too: it finishes its step and leaves a checkpoint
        process.join()
    if process.exitcode:
        for other in others:
            os.kill(other.pid, signal.SIGTERM)
            other.join()
        sys.exit(f"quick: {what} failed, see above")


@run_errors(lambda: "Finished parts are kept", "the number of other programs")
def main() -> None:
    with input_errors():
        args = parse_args(QuickArguments, __doc__)
        out = Path(args.output_dir)
        if out.exists():
            raise ValueError(
                f"{out} exists already: remove it, or choose another --output_dir (make quick"
                " OUT=runs/another)"
            )
        make_folder(out)
    seconds = {"imports": time.perf_counter() - BEGAN}

    began = time.perf_counter()
    print(f"drawing {args.train} pictures to learn from and {args.test} held out")
    write_pictures(out / "data", train=args.train, test=args.test, seed=args.seed)
    seconds["pictures"] = time.perf_counter() - began

    # One core stays free: beside a neighbour, threads as many as cores wait for one another. More
    # than four do not help layers this narrow.
    threads = max(1, min(4, torch.get_num_threads() - 1))
    common = ("--train_data", out / "data/train.jsonl", "--save_steps", 10**6, "--seed", args.seed)
    began = time.perf_counter()
    wait(
        start(
            [
                "train_sft.py",
                "--model",
                "tiny",
                *common,
                *SFT,
                "--max_steps",
                args.sft_steps,
                "--output_dir",
                out / "sft",
            ],
            threads,
        ),
        "SFT",
    )
    seconds["sft"] = time.perf_counter() - began

    began, common = time.perf_counter(), ("--model", out / "sft/final", *common)
    further = start(
        [
            "train_sft.py",
            *common,
            *SFT,
            "--max_steps",
            round(FURTHER * args.grpo_steps),
            "--output_dir",
            out / "further_sft",
        ],
        max(1, threads // 2),
        log=out / "further_sft.log",
    )
    grpo = start(
        [
            "train_grpo.py",
            *common,
            *GRPO,
            "--max_steps",
            args.grpo_steps,
            "--max_new_tokens",
            LONGEST,
            "--reward",
            "minigrpo.quick:reward",
            "--output_dir",
            out / "grpo",
        ],
        max(1, threads // 2),
    )
    wait(grpo, "GRPO", further)
    seconds["grpo"] = time.perf_counter() - began
    wait(further, f"further SFT ({out / 'further_sft.log'})")
    seconds["further_sft"] = time.perf_counter() - began  # side by side with GRPO

    began = time.perf_counter()
    torch.set_num_threads(threads)
    test = read_jsonl(out / "data/test.jsonl")
    answers = {
        name: answer(out / name / "final", test, args.seed)
        for name in ("sft", "further_sft", "grpo")
    }
    results = measure(answers, read_jsonl(out / "data/train.jsonl", verify_images=False), test)
    draw(
        out / "quick.png",
        results,
        [json.loads(line)["reward"] for line in (out / "grpo/metrics.jsonl").open()],
        test,
        answers,
    )
    seconds["evaluation"] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - BEGAN

    results["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    peaks = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    results["peak_memory_mb"] = round(max(peaks) / 1024)
    write_aside(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_aside(out / "results.md", table := markdown(results))
    print(f"\n{table}\nPicture: {out / 'quick.png'}")


# ---- what came of it -----------------------------------------------------------------------------


def answer(model: Path, test: list[Sample], seed: int) -> dict[str, list[str]]:
    """{"greedy": an answer to each sample, "sampled": SAMPLES answers to each, one after the
    other}.
    """
    policy = Policy.from_pretrained(str(model))
    greedy, _ = greedy_answers(policy, test, 128, LONGEST, show=False)
    sampled = [
        text
        for begin in range(0, len(test), 64)
        for text in generate(
            policy,
            policy.encode(test[begin : begin + 64]).numbered(
                list(range(begin, min(begin + 64, len(test))))
            ),
            group_size=SAMPLES,
            max_new_tokens=LONGEST,
            seed=seed,
        ).texts
    ]
    return {"greedy": greedy, "sampled": sampled}


def constant_answer(train: list[Sample]) -> str:
    """The answer with the highest reward when given to every picture: kinds are added greedily one
    by one, and the best of these answers is returned.
    """
    pictures = list({sample.image: sample for sample in train}.values())[:CHOSEN_ON]

    def worth(named: list[str]) -> float:
        return float(np.mean(reward([", ".join(named)] * len(pictures), pictures)))

    path: list[list[str]] = [[]]
    while len(path[-1]) < len(KINDS):
        path.append(max(([*path[-1], kind] for kind in KINDS if kind not in path[-1]), key=worth))
    return ", ".join(max(path[1:], key=worth))


def measure(
    answers: dict[str, dict[str, list[str]]], train: list[Sample], test: list[Sample]
) -> dict:
    """{"sampled" | "greedy": {"before", "after", "further_sft", "constant", "other_picture",
    "gain", "gain_over_further_sft"}}, each with "mean", "low", "high", "n" over the held-out
    pictures. "other_picture" scores the answers after GRPO on the next picture.
    """
    results, constant = {}, constant_answer(train)
    for how, count in (("sampled", SAMPLES), ("greedy", 1)):

        def score(texts: list[str], samples: list[Sample] = test) -> list[float]:
            values = reward(texts, [sample for sample in samples for _ in range(count)])
            return np.array(values).reshape(-1, count).mean(1).tolist()

        before, after, further = (
            score(answers[name][how]) for name in ("sft", "grpo", "further_sft")
        )
        results[how] = {
            name: interval(values)
            for name, values in {
                "before": before,
                "after": after,
                "further_sft": further,
                "constant": score([constant] * len(test) * count),
                "other_picture": score(answers["grpo"][how], test[1:] + test[:1]),
            }.items()
        }
        for name, base in (("gain", before), ("gain_over_further_sft", further)):
            difference = paired(after, base)
            results[how][name] = {"mean": difference.pop("difference"), **difference}
    return results


def markdown(results: dict) -> str:
    def cells(name: str, sign: str = "") -> str:
        figures = [results[how][name] for how in ("sampled", "greedy")]
        return " | ".join(
            f"{f['mean']:{sign}.3f} [{f['low']:{sign}.3f}, {f['high']:{sign}.3f}]" for f in figures
        )

    seconds = results["seconds"]
    rows = [
        ("best constant answer", "constant", ""),
        ("before: SFT", "before", ""),
        (f"SFT and {seconds['further_sft']:.0f} s more of SFT", "further_sft", ""),
        (f"after: SFT and {seconds['grpo']:.0f} s of GRPO", "after", ""),
        ("the same answers, scored on another picture", "other_picture", ""),
        ("gain of GRPO (paired)", "gain", "+"),
        ("gain of GRPO over more SFT (paired)", "gain_over_further_sft", "+"),
    ]
    return (
        "\n".join(
            [
                (
                    f"| reward, {results['greedy']['before']['n']} held-out pictures, 95% intervals"
                    " | sampled | greedy |"
                ),
                "|---|---|---|",
                *(f"| {title} | {cells(name, sign)} |" for title, name, sign in rows),
                "",
                (
                    f"{seconds['total']:.0f} s in all, {results['peak_memory_mb']} MB in the"
                    " largest process."
                ),
            ]
        )
        + "\n"
    )


RIGHT, WRONG, QUIET, BOLD = "#007a5a", "#d55e00", "#6e7781", COLORS[0]  # told apart by everyone


def draw(
    path: Path,
    results: dict,
    rewards: list[float],
    test: list[Sample],
    answers: dict[str, dict[str, list[str]]],
) -> None:
    """The reward over GRPO's steps, and the first six held-out pictures with the greedy answers
    before and after.
    """
    fig = Figure(figsize=(13.5, 4.9), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.9))
    left.suptitle("Reward while GRPO trains", fontsize=13)
    axis = left.subplots()
    draw_line(
        axis, range(1, len(rewards) + 1), rewards, color=BOLD, style="-", points=False, faint=0.35
    )
    for name, title in (
        ("before", "SFT"),
        ("further_sft", "SFT for as long again"),
        ("constant", "best answer that ignores the picture"),
    ):
        value = results["sampled"][name]["mean"]
        axis.axhline(value, color=QUIET, linewidth=1, linestyle=":" if name == "constant" else "--")
        axis.annotate(
            title,
            (1, value),
            # SFT's own label lies below its line, clear of the one just above
            (-4, -3 if name == "before" else 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            va="top" if name == "before" else "bottom",
            fontsize=9,
            color=QUIET,
        )
    axis.set(
        ylim=(0, 1),
        xlim=(1, max(2, len(rewards))),
        xlabel="step",
        ylabel="reward of sampled answers",
    )
    axis.spines[["top", "right"]].set_visible(False)

    right.suptitle(f"“{QUESTION}”  Six held-out pictures; reward and greedy answer", fontsize=13)
    for number, (picture, beside) in enumerate(
        right.subplots(3, 4, width_ratios=(1, 1.3) * 2).reshape(-1, 2)
    ):
        sample = test[number]
        picture.imshow(load_image(sample.images[0]), interpolation="lanczos")
        lines = [
            line
            for title, text in (
                ("true", ", ".join(sample.findings)),
                ("before", answers["sft"]["greedy"][number]),
                ("after", answers["grpo"]["greedy"][number]),
            )
            for line in answer_lines(title, text, sample)
        ]
        beside.add_artist(
            AnchoredOffsetbox(
                "center left",
                child=VPacker(children=lines, pad=0, sep=2),
                frameon=False,
                pad=0,
                borderpad=0,
            )
        )
        for each in (picture, beside):
            each.axis("off")
    with aside(path) as part:
        fig.savefig(part, format="png", dpi=110)


def answer_lines(title: str, answer: str, sample: Sample) -> list[HPacker]:
    """An answer as lines of two things each, after its title and its reward; wrong things in
    another colour, with a cross.
    """
    things, lines, size = answer.split(", "), [], 9.5
    for begin in range(0, len(things), 2):
        label = DrawingArea(66, size)
        if not begin:
            worth = "" if title == "true" else f"{reward([answer], [sample])[0]:.2f}"
            label.add_artist(Text(0, 0, title, color=QUIET, fontsize=size))
            label.add_artist(Text(38, 0, worth, color="black", fontsize=size))
        words = []
        for place, thing in enumerate(things[begin : begin + 2], begin):
            right = thing in sample.findings and thing not in things[:place]
            colour = "black" if title == "true" else RIGHT if right else WRONG
            words.append(
                TextArea(
                    thing + " ✗" * (not right) + "," * (place + 1 < len(things)),
                    textprops={"fontsize": size, "color": colour},
                )
            )
        lines.append(HPacker(children=[label, *words], pad=0, sep=4, align="baseline"))
    return lines


if __name__ == "__main__":
    main()
