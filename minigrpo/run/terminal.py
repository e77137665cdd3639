"""Command-line input and terminal output of a program, whatever the terminal.

Imports no torch: the data tools use it too.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from minigrpo.visible import messages, visible


class Parser(argparse.ArgumentParser):
    """The parser of the data tools: the module's docstring is the help, and `type=Path` expands
    ~.
    """

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.register("type", Path, _path)

    def parse_args(self, *given, **more):
        steady_output()
        return super().parse_args(*given, **more)


def _path(text: str) -> Path:
    try:
        return Path(path_of(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_of(text: str) -> str:
    """A path with ~ and ~user expanded, which no shell does in `--name=~/x` or a settings file.

    ValueError for one that no file can have: an unknown user's home, too long a name, a null
    character.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(
            f"{text}: no such home folder; write the path in full, or ./{text} if that is its name"
        )
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # what the path is needed for decides
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{text} cannot be a path ({reason}): give another") from None
    return path


def speak_in_turn() -> None:
    """Before an error message: the first rank of torchrun prints at once, which ends the others; a
    rank that failed alone prints a little later.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(3)


def fail(text: str | Exception) -> NoReturn:
    """End the program with `NAME: error: TEXT`, NAME as the user typed it, and the code 1. What the
    text quotes of files (names, labels, ids) can't rewrite the terminal."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {messages(text)}")


class Steady:
    """A stream that never ends the program: output that it cannot write (a full disk, a closed
    pipe) is lost. Control sequences, in a model's answer or a file's name, are shown escaped; a
    progress bar may return to the start of its line.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        inside = text.strip("\r")
        shown = text.replace(inside, visible(inside), 1) if inside else text
        try:
            self._stream.write(shown)
            return len(text)
        except (OSError, ValueError, RuntimeError):  # the last: a signal's message within a print
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError, RuntimeError):
            pass

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def steady_output() -> None:
    """From here on no output ends the program, and characters that the terminal lacks are shown
    as \\u2026."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Steady):
            continue
        steady = Steady(stream or open(os.devnull, "w"))  # None: closed by whoever started us
        try:
            stream.reconfigure(errors="backslashreplace")
        except (AttributeError, OSError, ValueError):
            pass
        if stream is getattr(sys, f"__{name}__"):  # which is flushed when the interpreter ends
            setattr(sys, f"__{name}__", steady)
        setattr(sys, name, steady)
