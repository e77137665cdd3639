"""Files and folders that are complete or absent, even if the process is killed or the disk fills
up.

They are written under a temporary name, synced and renamed, and checked when read. Every file that
a program writes is written here.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHECKSUMS = "checksums.json"


class WriteError(OSError):
    """`path` could not be written, for `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be written ({reason})")
        self.path, self.reason, self.strerror = path, reason, reason

    def __reduce__(self):  # processes send it to each other
        return WriteError, (self.path, self.reason)


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """A context for code that writes `path` and does nothing else: any exception becomes a
    WriteError. A full disk is an OSError in Python, a SafetensorError, and in tokenizers a plain
    Exception.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        plain = isinstance(error, OSError) or type(error) is Exception
        text = getattr(error, "strerror", None) or str(error)
        raise WriteError(path, text if plain else f"{type(error).__name__}: {text}") from error


@contextmanager
def aside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields the temporary path of a file or folder that is renamed to `path` at the end.

    If anything goes wrong, `path` stays as it was, the temporary file is removed, and the error is
    a WriteError. A file that is not `durable` may be lost in a power cut until `sync_all`.
    """
    part = part_of(path)
    try:
        with writes(path):
            remove(part)
            yield part
            seal(part, path, durable=durable)
    except BaseException:  # Ctrl-C, too
        remove(part)
        raise


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file with this content, in UTF-8; if that fails, it stays as it was."""
    if isinstance(content, str):  # half of a surrogate pair, as samplers write, becomes \udc00
        content = content.encode("utf-8", "backslashreplace")
    with aside(path) as part:
        part.write_bytes(content)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One object per line; the folder is created if necessary."""
    with writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def part_of(path: Path) -> Path:
    """The temporary name of a file or folder while it is written."""
    return path.with_name(path.name + ".part")


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder and its contents, if possible."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass


def make_folder(folder: Path) -> None:
    """Create a program's output folder; ValueError if it cannot be created or written to."""
    try:
        str(folder).encode()  # tokenizers, for one, writes to no other path
    except UnicodeEncodeError:
        raise ValueError(f"--output_dir {ascii(str(folder))} is not UTF-8: give another") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} cannot be created ({error.strerror}): give another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"--output_dir {folder} cannot be written into: give another, or change its permissions"
        )


def sync(path: Path) -> None:
    """On return, what was written to the file, or renamed in the folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` of every file of the folder, and of their names."""
    with writes(folder), ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, (folder / name for name in _files(folder))))
        sync(folder)


def seal(part: Path, path: Path, *, durable: bool = True) -> None:
    """Rename `part` to `path` once it is on the disk. A folder gets checksums of its files."""
    if part.is_dir():
        files, mode = _files(part), part.stat().st_mode & 0o666
        for name in files:  # safetensors lets nobody but their owner read them
            os.chmod(part / name, mode)
        with ThreadPoolExecutor(8) as pool:  # hashing and syncing release the GIL
            sums = dict(zip(files, pool.map(lambda name: _sum_and_sync(part / name), files)))
        write_aside(part / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
        for inside in [inner for inner in part.rglob("*") if inner.is_dir()]:
            sync(inside)
    elif durable:
        sync(part)
    os.replace(part, path)
    if durable:
        sync(path.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: a file that is missing or has changed; None if nothing
    is.
    """
    odd = [
        path
        for path in folder.rglob("*")
        if path.exists() and not path.is_dir() and not path.is_file()
    ]
    if odd:  # reading a pipe would wait for ever
        return f"{odd[0].relative_to(folder)} is not a regular file"
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError, RecursionError):
        return f"it has no readable {CHECKSUMS}: it was not finished, or an older version wrote it"
    present = set(_files(folder)) - {CHECKSUMS}
    if not isinstance(sums, dict) or present != set(sums):
        odd = sorted(present ^ set(sums))
        return f"its files are not those that were saved ({', '.join(odd[:3])})"
    try:
        with ThreadPoolExecutor(8) as pool:
            now = dict(zip(sums, pool.map(lambda name: checksum(folder / name), sums)))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    wrong = ", ".join([name for name in sums if now[name] != sums[name]][:3])
    return f"{wrong}: it has changed since it was saved: the checksum differs" if wrong else None


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(path: Path) -> IO | None:
    """Lock a file until the returned handle is closed or its process dies, in whatever way; None if
    another process has the lock. File systems without locks (some Lustre mounts) admit everyone.
    """
    with writes(path):
        handle = path.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError as error:
        print(
            f"note: {path} could not be locked ({error.strerror}): make sure that no other run"
            " writes there"
        )
    return handle


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in paths)


def _sum_and_sync(path: Path) -> str:
    sync(path)
    return checksum(path)
