"""Disks that are full at each file that a run writes, in bytes and in inodes: no traceback, nothing
half written, and --resume ends as the run that had room. Mounts a tmpfs, so root alone can run it.

    python -m pytest -rP -m slow tests/test_full_disk.py     # the figures of docs/node.md
"""

import itertools
import subprocess
from collections import Counter
from contextlib import contextmanager

import pytest

from minigrpo.run import files
from tests.processes import finish, run, start
from tests.test_nothing_lost import assert_same

PAGE = 4  # KiB: what tmpfs gives out
STEPS = 3
pytestmark = pytest.mark.slow


def letters(answers, samples):
    return [len(set(answer)) / 7 for answer in answers]


def quickly_drawn(rank):
    """A picture takes as long as all else in so small a run; its bytes are written the same way."""
    from minigrpo.run import plots

    plots.draw_runs = lambda runs, path: files.write_aside(path, b"picture" * 6000)


@contextmanager
def disk(place, **limits):
    """A tmpfs at `place`; yields a function that gives it other limits."""

    def mount(*words, **limits):
        options = ",".join(f"{name}={value}" for name, value in limits.items())
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([*words, options]), "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )

    place.mkdir(exist_ok=True)
    done = mount(**limits)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted ({done.stderr.strip()}): run it as root")
    try:
        yield lambda **limits: mount("remount", **limits)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def words_of(program, model, phantom, out):
    words = [
        f"{program}.py",
        "--model",
        model,
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        out,
        "--max_steps",
        STEPS,
        "--save_steps",
        1,
        "--keep_checkpoints",
        1,
        "--learning_rate",
        1e-3,
        "--resume",
    ]
    if program == "train_sft":
        return [*words, "--batch_size", 2, "--eval_data", phantom / "test.jsonl", "--eval_steps", 2]
    return [
        *words,
        "--reward",
        "tests.test_full_disk:letters",
        "--prompts_per_step",
        2,
        "--group_size",
        3,
        "--max_new_tokens",
        8,
        "--updates_per_rollout",
        2,
    ]


def fillings(folder):
    """How many KiB a run has written when each of its files is written, and the most: the first two
    checkpoints, and final/ beside one; a disk of so many is full at that file."""
    pages = [
        -(-path.stat().st_size // (1024 * PAGE)) * PAGE
        for path in sorted((folder / "final").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    ]
    state = 2 * max(pages)  # of AdamW, twice the weights
    checkpoint, logs = [*pages[:-1], state, pages[-1]], 40
    small = range(PAGE, logs + 2 * PAGE, PAGE)
    heaps = [
        list(itertools.accumulate([start, *files]))
        for start, files in (
            (logs, checkpoint),
            (logs + sum(checkpoint), pages),
            (logs + sum(checkpoint), checkpoint),
        )
    ]
    found = {size - rest for heap in heaps for size in heap for rest in (0, PAGE, 3 * PAGE)} | set(
        small
    )
    return sorted(found | set(range(1000, 60_001, 4000)))


@pytest.fixture(scope="module", params=["train_sft", "train_grpo"])
def whole(request, policy, phantom, tmp_path_factory):
    """(program, the model's folder, the folder of its run with room enough)."""
    root = tmp_path_factory.mktemp("whole")
    policy.save_pretrained(root / "model")
    line = words_of(request.param, root / "model", phantom, root / "run")
    run("python", line, root / "log", prepare=quickly_drawn)
    return request.param, root / "model", root / "run"


def sweep(kind, limits, room, whole, phantom, tmp_path):
    program, model, target = whole
    seen = Counter()
    for limit in limits:
        with disk(tmp_path / "disk", **{kind: limit}) as remount:
            line = words_of(program, model, phantom, tmp_path / "disk/run")
            (code,) = finish(start("python", line, tmp_path / "log", prepare=quickly_drawn))
            said = (tmp_path / "log-0").read_text()
            assert code in (0, 1) and "Traceback" not in said and "ignored" not in said, (
                limit,
                said[-3000:],
            )
            assert code == 0 or "error: " in said.splitlines()[-1] and "cannot be" in said, (
                limit,
                said[-3000:],
            )
            left = [str(path) for path in (tmp_path / "disk").rglob("*.part")]
            assert not left, (limit, left)
            assert not remount(**room).returncode
            again = run("python", line, tmp_path / "log", prepare=quickly_drawn)
            assert_same(target, tmp_path / "disk/run")
            assert (tmp_path / "disk/run/curves.png").exists()
            place = (
                "finished"
                if "is finished" in again
                else again.partition("resuming from ")[2].split("\n")[0]
            )
            seen[
                f"{'ended' if code == 0 else 'stopped'}, then"
                f" {place.rpartition('/')[2] or 'step 0'}"
            ] += 1
            seen["checkpoints not saved"] += said.count("not saved")
    print(
        f"{program}, {kind}: {len(limits)} disks of {limits[0]} to {limits[-1]}: no traceback, no"
        f" part, all resumed bit for bit; {dict(seen)}"
    )


def test_a_disk_that_fills_up_at_each_file(whole, phantom, tmp_path):
    sizes = [f"{size}k" for size in fillings(whole[2])]
    sweep("size", sizes, {"size": "300m"}, whole, phantom, tmp_path)


def test_a_disk_without_inodes(whole, phantom, tmp_path):
    sweep("nr_inodes", list(range(2, 56)), {"nr_inodes": 10_000}, whole, phantom, tmp_path)
