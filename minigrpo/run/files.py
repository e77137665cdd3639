"""Files and folders that are whole or absent, whatever kills the process: written aside, synced, renamed; checked when read."""

import fcntl
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

CHECKSUMS = "checksums.json"


def make_folder(folder: Path) -> None:
    """A program's output folder; ValueError where none can be made or nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be made ({error.strerror}): give another") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written into: give another, or change its permissions")


def write_aside(path: Path, text: str) -> None:
    """The file with this text, or as it was before."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written to the file, or renamed in the folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(aside: Path, folder: Path) -> None:
    """The finished folder `aside` becomes `folder`, with a checksum of each of its files, all of it on the disk before it bears
    its name."""
    files = _files(aside)
    with ThreadPoolExecutor(8) as pool:  # hashing and syncing release the GIL
        sums = dict(zip(files, pool.map(lambda name: _sum_and_sync(aside / name), files)))
    write_aside(aside / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
    for inside in [path for path in aside.rglob("*") if path.is_dir()]:
        sync(inside)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
    sync(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: a file that is missing, or not as it was written; None where all is well."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return f"it has no readable {CHECKSUMS}: it was not finished, or an older version made it"
    present = set(_files(folder)) - {CHECKSUMS}
    if not isinstance(sums, dict) or present != set(sums):
        odd = sorted(present ^ set(sums))
        return f"its files are not those that were saved ({', '.join(odd[:3])})"
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: checksum(folder / name), sums)
        wrong = [name for name, now in zip(sums, found) if now != sums[name]]
    return f"{', '.join(wrong[:3])}: not as it was saved, the checksum differs" if wrong else None


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> IO | None:
    """The lock of a file, until the returned handle is closed or its process dies, however it dies; None where another process
    has it. File systems without locks (some Lustre mounts) let everyone in."""
    handle = path.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError as error:
        print(f"note: no lock on {path} ({error.strerror}): take care that no other run writes there")
    return handle


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _sum_and_sync(path: Path) -> str:
    sync(path)
    return checksum(path)
