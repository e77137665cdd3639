"""The whole road, as commands that you could type: films, SFT, GRPO for both tasks, evaluation
before and after.

    # make demo
    python -m minigrpo.demo --output_dir runs/demo --seed 0
    # make demo-real
    python -m minigrpo.demo --output_dir runs/real --data FOLDER --model runs/demo/sft/final

FOLDER holds train.jsonl and test.jsonl; without one, phantom films are drawn. Leaves results.json,
results.md and the pictures in output_dir. Every command is printed before it runs; what it prints
is kept in a .log beside its folder.

Stopped (Ctrl-C, kill -9, a power cut) and begun again with the same command, it goes on: finished
stages are kept, SFT and GRPO go on from their last checkpoint, and it ends with the same weights,
bit for bit. --fresh (make demo FRESH=1) begins anew.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

BEGAN = time.perf_counter()
from minigrpo.run.args import answer_early
from minigrpo.run.arguments import DemoArguments

if __name__ == "__main__":
    answer_early(DemoArguments, __doc__)  # what follows takes seconds to import

import torch

from minigrpo import programs
from minigrpo.commands import COMMANDS
from minigrpo.metrics import interval, paired
from minigrpo.probe import figures_of
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import CHECKSUMS, checksum, make_folder, part_of, write_aside
from minigrpo.stages import DONE, LOCK, SPENT, Run, hold, is_done, read_spent, run_all

# The reward of each task. Reports of drawn films have a clinical one that needs no weights.
REWARDS = {"report": "minigrpo.rewards.phantom_entities:complete", "grounding": "soft_f1"}
REAL_REWARDS = REWARDS | {"report": "gleu"}
TASKS = tuple(REWARDS)
SHOWN = {
    "report": [
        "entity_f1",
        "entity_f1_partial",
        "finding_sensitivity",
        "finding_ppv",
        "findings_missed",
        "findings_invented",
        "gleu",
        "length",
    ],
    "grounding": ["map50", "soft_f1", "boxes"],
}
BEGUN = "demo.json"  # what a demo was begun with: the mark of its folder
RESULTS = ("results.json", "results.md")


@dataclass
class Size:
    """How large a demo is. The tiny model wants larger steps than a real one (paper: SFT 1e-5, GRPO
    1e-6); the loss constants are the paper's.
    """

    sft_steps: int
    sft_rate: float
    grpo_steps: dict[str, int]
    films: int = 0  # to draw for training; 0: --data has them
    test: int = 0
    pixels: int = 224  # of a film's side
    batch: int = 10  # films a step of SFT
    prompts: int = 16  # a step of GRPO
    longest: int = 192  # answer in tokens
    probed: int = 200  # questions of each task, sampled before and after GRPO
    save: int = 50  # steps between checkpoints
    measured: dict[str, float] = field(default_factory=dict)  # seconds of each stage


MEASURED_ON = "two cores of an AMD EPYC, nothing beside it"
PHANTOM = Size(
    films=2400,
    test=300,
    sft_steps=820,
    sft_rate=4e-3,
    grpo_steps={"report": 110, "grounding": 125},
    measured={
        "films": 43,
        "sft": 231,
        "evaluate constant": 15,
        "evaluate sft": 16,
        "probe sft": 19,
        "grpo report": 215,
        "evaluate report": 9,
        "probe report": 11,
        "grpo grounding": 193,
        "evaluate grounding": 8,
        "probe grounding": 9,
    },
)
REAL = Size(sft_steps=150, sft_rate=2e-3, grpo_steps={"report": 20, "grounding": 20})
SMOKE = Size(
    films=12,
    test=4,
    pixels=64,
    sft_steps=12,
    sft_rate=4e-3,
    grpo_steps={"report": 3, "grounding": 8},
    batch=4,
    prompts=4,
    longest=24,
    save=2,
    probed=4,
)


@run_errors(lambda: "The same command goes on from what is done", "the number of other programs")
def main() -> None:
    with input_errors():
        args = parse_args(DemoArguments, __doc__)
        size = SMOKE if args.smoke else PHANTOM if args.data is None else REAL
        runs, out = plan(size, args), Path(args.output_dir)
        where = {"films": Path(args.data)} if args.data is not None else {}
        where |= {name: out / folder for name, folder in FOLDERS.items() if name not in where}
        held, begun = begin(out, args, runs)  # `held` as long as this process lives
        for run in runs:  # two processes share the films of a step: two threads in one gain nothing
            run.ranks = begun["jobs"] if run.command[0] == "train_sft.py" else 1
        if not all(is_done(where[run.name]) for run in runs):
            # a stage was removed by hand, to do it again
            (out / "results.json").unlink(missing_ok=True)

    def announce(run: Run) -> str:
        return f"{run.name}{estimate(run, runs, where, size.measured, begun['jobs'])}"

    run_all(
        runs,
        where,
        out,
        jobs=begun["jobs"],
        threads=begun["threads"],
        began=BEGAN,
        announce=announce,
    )
    if not (out / "results.json").exists():
        spent = read_spent(out)
        results = collect(out)
        results["seconds"] = {
            run.name: json.loads((where[run.name] / DONE).read_text())["seconds"] for run in runs
        }
        results["seconds"]["total"] = round(spent["total"], 1)
        results |= {"starts": spent["starts"], "peak_memory_mb": spent["peak_memory_mb"]}
        write_aside(out / "results.md", markdown(results))
        write_aside(out / "results.json", json.dumps(results, indent=2) + "\n")
    pictures = sorted(path for run in runs for path in where[run.name].glob("*.png"))
    print(f"\n{(out / 'results.md').read_text()}\nPictures: {', '.join(map(str, pictures))}")


FOLDERS = {
    "films": "films",
    "sft": "sft",
    "evaluate constant": "constant/test",
    "evaluate sft": "sft/test",
    "probe sft": "sft/probe",
    "grpo grounding": "grounding",
    "grpo report": "report",
    "evaluate grounding": "grounding/test",
    "evaluate report": "report/test",
    "probe grounding": "grounding/probe",
    "probe report": "report/probe",
}


def plan(size: Size, args: DemoArguments) -> list[Run]:
    """The stages. The two runs of GRPO need nothing of each other, and one thread each side by side
    is faster than two threads one after another: layers this narrow gain a third from the second
    thread.
    """
    seed, runs = ["--seed", args.seed], []
    if size.films and args.data is None:
        runs.append(
            Run(
                "films",
                [
                    "-m",
                    "minigrpo.data.phantom",
                    "--output_dir",
                    "{out}",
                    "--train",
                    size.films,
                    "--test",
                    size.test,
                    "--size",
                    size.pixels,
                    *seed,
                ],
                alone=True,
            )
        )
    train, test = "{films}/train.jsonl", "{films}/test.jsonl"
    runs.append(
        Run(
            "sft",
            [
                "train_sft.py",
                "--model",
                args.model,
                "--train_data",
                train,
                "--output_dir",
                "{out}",
                "--batch_size",
                size.batch,
                "--questions_per_image",
                8,
                "--micro_batch",
                10,
                "--task_weights",
                "report=2",
                "--optimizer",
                "muon",
                "--beta2",
                0.98,
                "--max_steps",
                size.sft_steps,
                "--learning_rate",
                size.sft_rate,
                "--save_steps",
                size.save,
                *seed,
            ],
            alone=True,
        )
    )
    evaluate = [
        "evaluate.py",
        "--data",
        test,
        "--max_new_tokens",
        size.longest,
        "--output_dir",
        "{out}",
    ]
    runs.append(Run("evaluate constant", [*evaluate, "--model", "constant", "--train_data", train]))
    runs.append(
        Run(
            "evaluate sft",
            [*evaluate, "--model", "{sft}/final", "--baseline", "{evaluate constant}"],
        )
    )
    rewards = REWARDS if args.data is None else REAL_REWARDS

    def probe(run: str, model: str, tasks: tuple[str, ...]) -> Run:
        """Sampled answers to the same questions with the same seed, before GRPO and after."""
        return Run(
            run,
            [
                "-m",
                "minigrpo.probe",
                "--model",
                f"{{{model}}}/final",
                "--data",
                test,
                "--reward",
                ",".join(f"{task}={rewards[task]}" for task in tasks),
                "--samples",
                size.probed,
                "--max_new_tokens",
                size.longest,
                "--output_file",
                "{out}/probe.json",
            ],
        )

    for task in TASKS:  # the longer one first: the evaluations run beside it
        runs.append(
            Run(
                f"grpo {task}",
                [
                    "train_grpo.py",
                    "--model",
                    "{sft}/final",
                    "--train_data",
                    train,
                    "--task",
                    task,
                    "--reward",
                    f"{task}={rewards[task]}",
                    "--max_steps",
                    size.grpo_steps[task],
                    "--output_dir",
                    "{out}",
                    "--learning_rate",
                    5e-5,
                    "--prompts_per_step",
                    size.prompts,
                    "--micro_tokens",
                    1200,
                    "--freeze",
                    "vision",
                    "projector",
                    "--max_new_tokens",
                    size.longest,
                    "--save_steps",
                    size.save,
                    *seed,
                ],
            )
        )
    runs.append(probe("probe sft", "sft", TASKS))
    for task in TASKS:
        runs.append(
            Run(
                f"evaluate {task}",
                [
                    *evaluate,
                    "--model",
                    f"{{grpo {task}}}/final",
                    "--task",
                    task,
                    "--baseline",
                    "{evaluate sft}",
                ],
            )
        )
        runs.append(probe(f"probe {task}", f"grpo {task}", (task,)))
    return runs


# ---- the folder ----------------------------------------------------------------------------------


def begin(out: Path, args: DemoArguments, runs: list[Run]) -> tuple:
    """The lock of the folder, which is made if need be, and what its demo was begun with.
    ValueError for a folder that no demo has made, or whose demo was begun with something else than
    what holds now.
    """
    check_folder(out)
    make_folder(out)
    held = hold(out)
    if args.fresh:
        empty(out)
    now = begun_with(args, runs)
    if not (out / BEGUN).exists():
        write_aside(out / BEGUN, json.dumps(now, indent=1) + "\n")
    begun = read_begun(out)
    if other := different(begun, now):
        raise ValueError(
            f"{out} holds a demo that {other}. Begin anew with --fresh (make demo FRESH=1), which"
            " removes that one, or choose another --output_dir (make demo OUT=runs/another)"
        )
    return held, begun


def begun_with(args: DemoArguments, runs: list[Run]) -> dict:
    """All that the results depend on; the numbers of threads and of runs side by side stay what
    they were when it was begun.
    """
    inputs = (
        [Path(args.data) / name for name in ("train.jsonl", "test.jsonl")]
        if args.data is not None
        else []
    )
    if args.model != "tiny":
        sealed = Path(args.model) / CHECKSUMS
        inputs.append(sealed if sealed.is_file() else Path(args.model) / "config.json")
    arguments = {
        name: value if name == "seed" or value in (None, "tiny") else os.path.realpath(value)
        for name, value in asdict(args).items()
        if name in ("seed", "data", "model")
    }
    return {
        "arguments": arguments,
        "inputs": {os.path.realpath(path): checksum(path) for path in inputs},
        "programs": programs_sum(),
        "commands": [[run.name, *map(str, run.command)] for run in runs],
        # One core stays free: beside a neighbour, threads as many as cores wait for one
        # another.
        "threads": max(1, torch.get_num_threads() - 1),
        "jobs": min(2, os.cpu_count() or 1),
    }


def programs_sum() -> str:
    """A checksum of all our code: of the package, and of the three programs where they lie beside
    it.
    """
    files = {*Path(programs.__file__).parent.rglob("*.py")}
    files |= {
        Path(programs.__path__[0]) / program
        for program, _ in COMMANDS.values()
        if program.endswith(".py")
    }
    return hashlib.sha256("".join(map(checksum, sorted(files))).encode()).hexdigest()


def different(begun: dict, now: dict) -> str | None:
    """What it was begun with that is no longer so; None where nothing is."""
    for name, value in now["arguments"].items():
        if begun["arguments"].get(name) != value:
            return f"was begun with --{name} {begun['arguments'].get(name)}, and now it is {value}"
    for name, value in now["inputs"].items():
        if begun["inputs"].get(name) != value:
            return f"was begun when {name} was another file than it is now"
    if begun["commands"] != now["commands"]:
        return "was begun with other commands: by another version of it, or with or without --smoke"
    return (
        "was begun with another version of the programs"
        if begun["programs"] != now["programs"]
        else None
    )


def read_begun(out: Path) -> dict:
    try:
        begun = json.loads((out / BEGUN).read_text())
        return {
            name: begun[name]
            for name in ("arguments", "inputs", "programs", "commands", "threads", "jobs")
        }
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{out / BEGUN} is not what a demo has written: put it back, or remove {out} yourself"
        ) from None


def entries(out: Path) -> list[Path]:
    """What a demo leaves in its folder; demo.json, by which it is known, at the end."""
    tops = dict.fromkeys(Path(folder).parts[0] for folder in FOLDERS.values())
    files = [*RESULTS, SPENT, BEGUN]
    return [out / name for top in tops for name in (top, f"{top}.log")] + [
        place for name in files for place in (part_of(out / name), out / name)
    ]


def check_folder(out: Path) -> None:
    """ValueError for a folder with something in it that no demo has made."""
    if (
        out.is_dir()
        and not (out / BEGUN).exists()
        and any(path.name not in (LOCK, part_of(out / BEGUN).name) for path in out.iterdir())
    ):
        raise ValueError(
            f"{out} exists already and holds no demo to go on with (no {BEGUN}): remove it, or"
            " choose another --output_dir (make demo OUT=runs/another)"
        )


def empty(out: Path) -> None:
    """Remove a demo and nothing else. Killed within, it leaves a folder in which no stage counts as
    finished that isn't whole.
    """
    known = entries(out)
    if others := sorted(
        path.name for path in out.iterdir() if path not in known and path.name != LOCK
    ):
        raise ValueError(
            f"--fresh would remove {out}, but no demo has written {', '.join(others)}: move that"
            " elsewhere first"
        )
    for folder in FOLDERS.values():
        (out / folder / DONE).unlink(missing_ok=True)
    for path in known:
        (
            shutil.rmtree(path)
            if path.is_dir() and not path.is_symlink()
            else path.unlink(missing_ok=True)
        )


# ---- time ----------------------------------------------------------------------------------------


def estimate(
    run: Run, runs: list[Run], where: dict[str, Path], measured: dict[str, float], jobs: int
) -> str:
    """What is said of a stage before it begins: how long it took when measured, and how long the
    rest may take, at the pace at which the finished stages went here; nothing where nothing was
    measured.
    """
    if not measured:
        return ""

    def share(one):
        return measured[one.name] / (1 if one.alone else jobs)  # two run side by side

    finished = [one for one in runs if is_done(where[one.name])]
    pace = sum(
        json.loads((where[one.name] / DONE).read_text())["seconds"] for one in finished
    ) / max(1e-9, sum(measured[one.name] for one in finished))
    left = sum(share(one) for one in runs if one not in finished) * (pace if finished else 1)
    return (
        f": {measured[run.name]:.0f} s when measured ({MEASURED_ON}); all that is left may take"
        f" {left / 60:.1f} minutes{' at the pace so far' if finished else ''}"
    )


# ---- results -------------------------------------------------------------------------------------


def collect(out: Path) -> dict:
    """{task: {"constant" | "sft" | "grpo": {metric: interval}, "grpo-sft" | "sft-constant":
    {metric: paired interval}}}.
    """
    read = {
        path.parent.parent.name: json.loads(path.read_text())
        for path in out.glob("*/test/metrics.json")
    }
    results: dict = {}
    for task in TASKS:
        results[task] = {
            name: read[run]["tasks"][task]
            for name, run in (("constant", "constant"), ("sft", "sft"), ("grpo", task))
        }
        for name, run in (("sft-constant", "sft"), ("grpo-sft", task)):
            results[task][name] = {
                metric: {"mean": gain.pop("difference"), **gain}
                for metric, gain in read[run]["difference"][task].items()
            }
        probes = [
            [
                figures_of(item)
                for item in json.loads((out / run / "probe/probe.json").read_text())["items"]
                if item["task"] == task
            ]
            for run in ("sft", task)
        ]
        results[task]["sampled"] = sampled_figures(*probes)
        rewards = [
            json.loads(line)["reward"]
            for line in (out / task / "metrics.jsonl").read_text().splitlines()
        ]
        # of the answers that were trained on: other questions in each step
        tenth = max(1, len(rewards) // 10)
        results[task]["progress"] = {
            "first_tenth": sum(rewards[:tenth]) / tenth,
            "last_tenth": sum(rewards[-tenth:]) / tenth,
        }
    return results


def sampled_figures(before: list[dict], after: list[dict]) -> dict:
    """The rewards of G sampled answers to each of the same test questions: "before", "after" and
    "gain" (paired) of their mean, and of "best" and "no_spread" before GRPO.
    """

    def column(rows: list[dict], name: str) -> list[float]:
        return [row[name] for row in rows]

    gain = paired(column(after, "sampled"), column(before, "sampled"))
    return {
        "before": interval(column(before, "sampled")),
        "after": interval(column(after, "sampled")),
        "gain": {"mean": gain.pop("difference"), **gain},
        "best": interval(column(before, "best")),
        "no_spread": interval(column(before, "no_spread")),
    }


def markdown(results: dict) -> str:
    def cell(value: dict, sign: str = "") -> str:
        return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"

    lines = []
    for task, names in SHOWN.items():
        metrics = results[task]
        lines += [
            f"**{task}** ({metrics['sft']['n']} test samples, greedy, 95% bootstrap intervals)",
            "",
            "| metric | constant answer | SFT | SFT + GRPO | gain of GRPO (paired) |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {' | '.join(cell(metrics[m][name]) for m in ('constant', 'sft', 'grpo'))}"
            f" | {cell(metrics['grpo-sft'][name], '+')} |"
            for name in names
            if name in metrics["sft"]  # real films lack the drawing's truth
        ]
        sampled, progress = metrics["sampled"], metrics["progress"]
        lines += [
            "",
            (
                f"Reward of 8 sampled answers (T = 1) to each of {sampled['before']['n']} test"
                f" questions: {sampled['before']['mean']:.3f} before GRPO,"
                f" {sampled['after']['mean']:.3f} after it, gain {cell(sampled['gain'], '+')}; the"
                f" best of the 8 before GRPO {sampled['best']['mean']:.3f}, groups without spread"
                f" {sampled['no_spread']['mean']:.0%}. Along the training:"
                f" {progress['first_tenth']:.3f} in the first tenth of the steps,"
                f" {progress['last_tenth']:.3f} in the last."
            ),
            "",
        ]
    again = f" of work in {results['starts']} starts" if results["starts"] > 1 else " in all"
    lines.append(
        f"{results['seconds']['total']:.0f} s{again}, {results['peak_memory_mb']} MB at the peak in"
        " the largest process."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
