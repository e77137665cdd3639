"""RUN/starts.jsonl: arguments, versions and data of a run, with one line for its start and one for
each --resume.

A line has the arguments, the versions, and checksums of the files that the run learns from.
Differences from an earlier start are reported.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import minigrpo
from minigrpo.data import Sample
from minigrpo.run.files import checksum, write_aside
from minigrpo.run.log import read_rows

FILE = "starts.jsonl"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "peft")
PIECE = 4096  # bytes of a large file that are read at each of 64 places
FREE = {
    "resume",
    "save_steps",
    "output_dir",
    "device",
    "keep_checkpoints",
    "track",
    "reward_timeout",
    "shard",
    "plan",
}  # arguments that may change without a note


def past_starts(folder: Path, first_args: dict) -> list[dict]:
    """The run's starts so far; an older version's run has none but its args.json, `first_args`."""
    rows = [
        row
        for row in read_rows(folder / FILE)[0]
        if all(isinstance(row.get(part, {}), dict) for part in ("args", "versions", "content"))
    ]
    return rows or [{"step": 0, "args": first_args}]


def this_start(args, step: int, samples: Sequence[Sample]) -> dict:
    """The line of a start at `step`, with `samples` to learn from and to validate on."""
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": Path(sys.argv[0]).name,
        "args": asdict(args),
        "versions": versions(),
        "content": content(args, samples),
    }


def add_start(folder: Path, now: dict) -> None:
    """Append a line; earlier ones are not changed, and an incomplete last line is ended."""
    path = folder / FILE
    before = path.read_bytes() if path.exists() else b""
    end = b"\n" if before and not before.endswith(b"\n") else b""
    write_aside(path, before + end + json.dumps(now).encode() + b"\n")


def differences(before: list[dict], now: dict) -> list[str]:
    """A note for everything that differs from an earlier start, and since when."""
    notes = []
    for part, title in (("args", "--{}"), ("versions", "{}"), ("content", "the content of {}")):
        for name, value in now[part].items():
            past = [
                (start[part][name], start["step"])
                for start in before
                if name in start.get(part, {})
            ]
            past = [item for k, item in enumerate(past) if k == 0 or item[0] != past[k - 1][0]]
            if name in FREE or all(was == value for was, _ in past):
                continue
            since = f"since step {past.pop()[1]}" if past[-1][0] == value else "now"
            then = ", ".join(f"{was} from step {step}" for was, step in past)
            notes.append(f"{title.format(name)} is {value} {since}; it was {then}")
            if name == "max_steps" and "warmup" in now["args"]:
                notes[-1] += ". The learning rate's schedule ends there, so the rate jumps"
    return notes


def versions() -> dict[str, str | None]:
    installed: dict[str, str | None] = {
        "minigrpo": minigrpo.__version__,
        "commit": commit(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def commit() -> str | None:
    """The clone's commit, with "-dirty" appended if files were changed; None for an installed
    package.
    """

    def git(*words: str) -> str:
        place = ["git", "-C", str(Path(minigrpo.__file__).parent)]
        return subprocess.run(
            [*place, *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else some other repository around it
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def content(args, samples: Sequence[Sample]) -> dict[str, str]:
    """Summaries of the files that a run learns from, which differ if the files do: data files,
    films (names and sizes), --model, and the module of a user's own reward.
    """
    checksums = {}
    for name in ("train_data", "eval_data"):
        if path := getattr(args, name):
            checksums[f"--{name}"] = of_file(Path(path))
    films = {
        (os.path.relpath(image, os.path.dirname(sample.file)), os.path.getsize(image))
        for sample in samples
        for image in sample.images
    }
    checksums["the films"] = (
        f"{len(films):,} files, {sum(size for _, size in films):,} bytes, " + _hash(sorted(films))
    )
    if Path(args.model).is_dir():
        checksums["--model"] = of_folder(Path(args.model))
    if path := getattr(args, "reward_weights", None):
        checksums["--reward_weights"] = of_folder(Path(path), "*", "*/model.safetensors")
    for name in re.findall(r"([\w.]+):\w+", getattr(args, "reward", "")):
        if file := getattr(sys.modules.get(name), "__file__", None):
            checksums[name] = of_file(Path(file))
    return checksums


def of_file(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes, {checksum(path)[:16]}"


def of_folder(folder: Path, *patterns: str) -> str:
    """A hash of names and sizes of all files, of the bytes of small ones (including the checksum
    file of our checkpoints), and of a sample of large ones, since other weights of the same model
    have the same size.
    """
    paths = {path for pattern in patterns or ("*",) for path in folder.glob(pattern)}
    files = sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path)
        for path in paths
        if path.is_file()
    )
    known = [
        (name, size, checksum(path) if size < 1e6 else sampled(path, size))
        for name, size, path in files
    ]
    return f"{len(files)} files, {sum(size for _, size, _ in files):,} bytes, {_hash(known)}"


def sampled(path: Path, size: int) -> str:
    """A hash of 64 evenly spaced pieces of the file: training changes nearly all weights."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(64):
            file.seek((size - PIECE) * place // 63)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _hash(things: list) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]
