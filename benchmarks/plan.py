"""--plan beside the memory that the same run takes, each in a process of its own, on four shapes.

    OMP_NUM_THREADS=1 python -m benchmarks.plan

glibc keeps much of what was freed, for later; with MALLOC_MMAP_THRESHOLD_ it gives large blocks
back at once, and the resident memory is what the tensors take. Both are measured.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.common import about, own_process, random_policy, resident, write
from minigrpo.data.phantom import Arguments, write_phantom

# Wide: weights and optimiser. Long: activations and keys and values. Adapters: little but the
# weights lasts.
SHAPES = {
    "wide, everything trained": (
        dict(width=768, layers=6),
        "grpo",
        "--group_size 4 --prompts_per_step 4 --max_new_tokens 24 --micro_tokens 512",
    ),
    "long answers": (
        dict(width=256, layers=6),
        "grpo",
        "--group_size 8 --prompts_per_step 8 --max_new_tokens 160 --micro_tokens 8192",
    ),
    "adapters, checkpointing": (
        dict(width=1024, layers=6),
        "grpo",
        (
            "--group_size 4 --prompts_per_step 4 --max_new_tokens 48 --lora_rank 8"
            " --activation_checkpointing"
        ),
    ),
    "supervised": (dict(width=512, layers=6), "sft", "--batch_size 8 --micro_batch 8"),
}


def main() -> None:
    if len(sys.argv) > 1:
        print(one(*sys.argv[1:]))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder) / "films", Arguments(train=40, test=1, seed=0, size=256))
        for name, (shape, _, _) in SHAPES.items():
            random_policy(**shape).save_pretrained(Path(folder) / name)
            found[name] = {
                "plan": float(own_process("plan", name, "plan", folder)),
                "run": float(own_process("plan", name, "run", folder)),
            }
            shutil.rmtree(Path(folder) / f"{name} run")
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
            found[name]["run, freed at once"] = float(own_process("plan", name, "run", folder))
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            print(name, found[name])
    write("plan.json", {"about": about(), "peak_gb": found})


def one(name: str, side: str, folder: str) -> float:
    """GB that a plan foretells, or that a run of two steps took at its peak (every answer is of
    full length).
    """
    import importlib

    from minigrpo.run import plan

    _, program, words = SHAPES[name]
    sys.argv = [
        program,
        "--model",
        f"{folder}/{name}",
        "--train_data",
        f"{folder}/films/train.jsonl",
        "--output_dir",
        f"{folder}/{name} run",
        "--max_pixels",
        str(224 * 224),
        "--max_steps",
        "2",
        "--device",
        "cpu",
        *words.split(),
    ]
    found = []
    if side == "plan":
        sys.argv.append("--plan")
        for maker in ("plan_grpo", "plan_sft"):
            make = getattr(plan, maker)
            setattr(plan, maker, lambda *args, make=make: found.append(make(*args)) or found[-1])
    importlib.import_module(f"train_{program}").main()
    return (found[0].peak if found else resident("VmHWM")) / 1e9


if __name__ == "__main__":
    main()
