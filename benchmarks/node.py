"""What docs/node.md states: two ranks beside one, with --shard and without, the cost of a
checkpoint, and memory over many steps.

    OMP_NUM_THREADS=1 python -m benchmarks.node --what ranks shard checkpoint soak

Every run is `torchrun` or the program itself, as a user starts it, one thread a process, tiny
model, phantom films.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from minigrpo.data import read_jsonl
from minigrpo.data.phantom import Arguments, write_phantom
from minigrpo.run.args import parse_args
from minigrpo.run.files import write_aside
from minigrpo.tiny import tiny_policy

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results/node.json"


@dataclass
class NodeArguments:
    what: list[str] = field(
        default_factory=lambda: ["ranks", "shard", "checkpoint", "soak"],
        metadata={"help": "what to measure", "choices": ["ranks", "shard", "checkpoint", "soak"]},
    )
    steps: int = field(
        default=12,
        metadata={"help": "steps of each run for ranks and checkpoint; the first two are left out"},
    )
    rounds: int = field(default=3, metadata={"help": "runs of one and of two ranks, in turn"})
    soak: int = field(default=500, metadata={"help": "GRPO steps of the soak"})


def words(program: str, folder: Path, name: str, steps: int, *more) -> list[str]:
    shape = {
        "train_sft": ["--batch_size", 16, "--learning_rate", 1e-3],
        "train_grpo": [
            "--prompts_per_step",
            16,
            "--group_size",
            8,
            "--max_new_tokens",
            48,
            "--learning_rate",
            1e-4,
        ],
    }[program]
    return [
        str(word)
        for word in (
            f"{program}.py",
            "--model",
            folder / "model",
            "--train_data",
            folder / "data/train.jsonl",
            "--output_dir",
            folder / name,
            "--max_steps",
            steps,
            "--device",
            "cpu",
            *shape,
            *more,
        )
    ]


def run(arguments: list[str], ranks: int = 1) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds(row: dict) -> float:
    return (
        row["seconds"]
        if "seconds" in row
        else sum(value for name, value in row.items() if name.startswith("seconds_"))
    )


def measure_ranks(folder: Path, args: NodeArguments) -> dict:
    """Median seconds of a step on one and on two ranks, the same work, runs in turn; and the
    speed-up of each round.
    """
    found = {}
    for program in ("train_sft", "train_grpo"):
        medians = {1: [], 2: []}
        for number in range(args.rounds):
            for ranks in (1, 2):
                name = f"{program}-{number}-{ranks}"
                run(words(program, folder, name, args.steps), ranks)
                medians[ranks].append(statistics.median(map(seconds, rows(folder / name)[2:])))
        found[program] = {
            "one": medians[1],
            "two": medians[2],
            "speed_up": [a / b for a, b in zip(medians[1], medians[2])],
        }
    return found


def measure_shard(folder: Path, args: NodeArguments) -> dict:
    """Median seconds of a GRPO step on two ranks, and of its update, without and with --shard, runs
    in turn.
    """
    found = {"plain": [], "shard": [], "plain_update": [], "shard_update": []}
    for number in range(args.rounds):
        for kind, more in (("plain", []), ("shard", ["--shard"])):
            name = f"shard-{number}-{kind}"
            run(words("train_grpo", folder, name, args.steps, *more), 2)
            steps = rows(folder / name)[2:]
            found[kind].append(statistics.median(map(seconds, steps)))
            found[f"{kind}_update"].append(
                statistics.median(row["seconds_update"] for row in steps)
            )
    return found


def measure_checkpoint(folder: Path, args: NodeArguments) -> dict:
    """Seconds of a save, median, beside those of a step: with a save after every step, from inside
    the program.
    """
    found = {}
    for program in ("train_sft", "train_grpo"):
        timed = (
            f"import sys, time, {program} as p\nsave = p.save_checkpoint\ndef timed(*a, **k):\n   "
            " s = time.perf_counter(); save(*a, **k); print('SAVED', time.perf_counter() -"
            " s)\np.save_checkpoint = timed\np.main()"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                timed,
                *words(program, folder, f"save-{program}", args.steps, "--save_steps", 1)[1:],
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        saves = [float(x) for x in re.findall(r"SAVED ([\d.e-]+)", done.stdout)]
        step = statistics.median(map(seconds, rows(folder / f"save-{program}")[2:]))
        found[program] = {
            "seconds_save": statistics.median(saves),
            "seconds_step": step,
            "share_at_save_steps_50": statistics.median(saves) / (50 * step),
        }
    return found


def measure_soak(folder: Path, args: NodeArguments) -> dict:
    """Resident memory of one GRPO run, sampled at every tenth of its steps."""
    process = subprocess.Popen(
        [
            sys.executable,
            *words(
                "train_grpo",
                folder,
                "soak",
                args.soak,
                "--prompts_per_step",
                2,
                "--group_size",
                4,
                "--max_new_tokens",
                16,
                "--updates_per_rollout",
                2,
            ),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    memory, seen, log = {}, psutil.Process(process.pid), folder / "soak/metrics.jsonl"
    while process.poll() is None:
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if steps and steps // (args.soak // 10) not in memory:
            memory[steps // (args.soak // 10)] = seen.memory_info().rss / 2**20
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
    return {
        "steps": args.soak,
        "code": process.returncode,
        "mib_at_each_tenth": [round(value, 1) for _, value in sorted(memory.items())],
    }


def main() -> None:
    args = parse_args(NodeArguments, __doc__)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom(folder / "data", Arguments(train=60, test=4, seed=0, size=192))
        tiny_policy(read_jsonl(folder / "data/train.jsonl"), seed=0).save_pretrained(
            folder / "model"
        )
        for what in args.what:
            results[what] = globals()[f"measure_{what}"](folder, args)
            write_aside(RESULTS, json.dumps(results, indent=1) + "\n")
            print(what, json.dumps(results[what], indent=1))


if __name__ == "__main__":
    main()
