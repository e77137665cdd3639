"""What adapters save: peak memory of a GRPO run, models included, and the size of a checkpoint to
resume from.

    python -m benchmarks.lora

A random model of 110M parameters, two steps of 4 phantom films with 4 answers each, every run in a
process of its own.
"""

import sys
import tempfile
from pathlib import Path

import train_grpo
from benchmarks.common import about, own_process, random_policy, resident, write
from minigrpo.data.phantom import Arguments, write_phantom
from minigrpo.run import loop

RUNS = {
    "all weights": [],
    "all weights, no KL": ["--kl_coef", "0"],
    "LoRA, rank 16": ["--lora_rank", "16"],
    "LoRA, rank 16, no KL": ["--lora_rank", "16", "--kl_coef", "0"],
}
SHAPE = [
    "--max_steps",
    "2",
    "--save_steps",
    "1",
    "--prompts_per_step",
    "4",
    "--group_size",
    "4",
    "--max_new_tokens",
    "32",
]


def letters(answers, samples):
    """A reward that random answers differ in."""
    return [float(len(set(answer))) for answer in answers]


def train(*words: str) -> None:
    """train_grpo.py without its last step, which would remove the checkpoint; prints its peak of
    resident memory.
    """
    loop.save_final = loop.draw_curves = lambda *_: None
    sys.argv = ["train_grpo.py", *words]
    train_grpo.main()
    print(resident("VmHWM"))


def measure(folder: Path) -> dict:
    found = {}
    for number, (name, extra) in enumerate(RUNS.items()):
        run = folder / f"run{number}"
        peak = own_process(
            "lora",
            "train",
            "--model",
            str(folder / "model"),
            "--train_data",
            str(folder / "train.jsonl"),
            "--output_dir",
            str(run),
            "--reward",
            "benchmarks.lora:letters",
            *SHAPE,
            *extra,
        )
        size = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*"))
        found[name] = {"peak_bytes": int(peak), "checkpoint_bytes": size}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(width=768, layers=6)
        policy.save_pretrained(folder / "model")
        write_phantom(folder, Arguments(train=12, test=1, seed=0, size=192))
        write(
            "lora.json",
            {
                "about": about(),
                "parameters": sum(p.numel() for p in policy.parameters()),
                "runs": measure(folder),
            },
        )


if __name__ == "__main__":
    train(*sys.argv[2:]) if sys.argv[1:2] == ["train"] else main()
