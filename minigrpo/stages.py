"""Several programs, run one after another or side by side, that continue where they were stopped.
For the demo and the study.

Each runs in a fork of this process and in a folder of its own, where done.json is written last:
without it, the program is not done. A training program that was stopped continues from its last
checkpoint; everything else, such as films and evaluations, is removed and started over. A program's
output goes to FOLDER.log.

If this process dies, in whatever way, the programs notice, end as after SIGTERM, and hold the lock
until then.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

import torch

import minigrpo.policy  # noqa: F401  loaded once, for all forks
import minigrpo.run.plots  # noqa: F401
from minigrpo.commands import python, typed
from minigrpo.run.distributed import say
from minigrpo.run.files import lock, write_aside
from minigrpo.run.save import STOP_CODES
from minigrpo.run.terminal import steady_output

DONE, SPENT, LOCK = "done.json", "spent.json", ".lock"
# seconds between two savings of what was spent: as much is not counted where a kill comes
BEAT = 5.0
STATUS = 60.0  # seconds between two lines about progress where the output is no terminal


@dataclass
class Run:
    """One program. Its number of threads depends only on the plan; otherwise a resumed run would
    not give the same bits.
    """

    name: str
    command: list  # what follows `python`; {out} is its own folder, {NAME} that of another run
    alone: bool = False  # has all threads, and nothing runs beside it
    ranks: int = 1  # processes that share its work, as under torchrun

    @property
    def needs(self) -> list[str]:
        return [
            name
            for word in self.command
            for name in re.findall(r"\{([^{}]+)\}", str(word))
            if name != "out"
        ]

    def line(self, where: dict[str, Path]) -> list[str]:
        return [str(word).format(out=where[self.name], **where) for word in self.command]


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def run_all(
    runs: list[Run],
    where: dict[str, Path],
    root: Path,
    *,
    jobs: int,
    threads: int,
    began: float,
    announce: Callable[[Run], str] = lambda run: run.name,
) -> None:
    """Run everything that is not done, each as soon as its inputs are there, at most `jobs` at
    once, which share the `threads`.

    `where` gives the folder of each, somewhere in `root`, which the caller has locked. `announce`
    gives the line before a run. `began`, of time.perf_counter(), is when this process started. A
    run that fails ends the others and the program, as Ctrl-C (exit code 130) and SIGTERM (75) do.
    """
    done = {run.name for run in runs if is_done(where[run.name])}
    waiting, going = [run for run in runs if run.name not in done], {}
    say(f"{len(runs)} runs, {len(done)} of them done already")
    if not waiting:
        return
    spent, screen, ending = Spent(root, began), Screen(), None
    spent.add([], save=True)  # a start counts, however soon it is killed
    with noted_signals() as came:
        try:
            while going or (waiting and not ending):
                for run in (
                    []
                    if ending
                    else startable(waiting, done, [run for _, run in going.values()], jobs)
                ):
                    waiting.remove(run)
                    line, folder = run.line(where), where[run.name]
                    if not folder.exists():
                        spent.forget(folder)
                    screen.say(
                        f"\n[{runs.index(run) + 1} of {len(runs)}] {announce(run)}\n$"
                        f" {typed_for(run, line)}"
                    )
                    screen.follow(run.name, log_of(folder))
                    share = threads if run.alone else max(1, threads // jobs)
                    process = start(line, folder, max(1, share // run.ranks), run.ranks)
                    going[process.sentinel] = process, run
                ended = wait(list(going), timeout=0.5)
                spent.add([where[run.name] for _, run in going.values()], save=bool(ended))
                screen.update()
                if came and not ending:
                    ending = "", STOP_CODES[came[0]]
                    screen.say(
                        "stopping: programs that train finish their step and save a checkpoint"
                        " (Ctrl-C again to abort at once)"
                    )
                    # who has had Ctrl-C from the terminal, as all there have, goes on with that
                    terminate(going)
                for process, run in [going.pop(sentinel) for sentinel in ended]:
                    process.join()
                    screen.leave(run.name)
                    if process.exitcode == 0:
                        seconds = spent.mark_done(where[run.name], run.command)
                        done.add(run.name)
                        screen.say(f"{run.name}: done in {seconds:.0f} s")
                    elif not ending:
                        ending = what_ended(process.exitcode, run, log_of(where[run.name])), 1
                        terminate(going)
        except BaseException:
            terminate(going)
            raise
    if len(done) < len(runs):
        text, code = ending
        say(
            f"{text}{len(done)} of {len(runs)} runs are done; the same command continues from there"
        )
        sys.exit(code)


def terminate(going: dict) -> None:
    for process, _ in going.values():
        process.terminate()


def what_ended(code: int, run: Run, log: Path) -> str:
    """The message about a run that ended with this exit code, which is not 0."""
    if code < 0 or code in STOP_CODES.values():
        return (
            f"{run.name} was stopped"
            f" ({signal.Signals(-code).name if code < 0 else f'exit code {code}'}, {log})\n"
        )
    return f"{run.name} failed ({log}):\n{log.read_text(errors='replace')[-1500:]}\n"


@contextmanager
def noted_signals():
    """Yields a list of the signals received, of Ctrl-C and SIGTERM: a KeyboardInterrupt could come
    between any two lines.
    """
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in STOP_CODES
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def startable(waiting: list[Run], done: set[str], going: list[Run], jobs: int) -> list[Run]:
    """The runs to start now, in order. One that must be alone waits until nothing else runs, and
    holds back those after it.
    """
    chosen: list[Run] = []
    for run in waiting:
        if not done.issuperset(run.needs):
            continue
        busy = going + chosen
        if len(busy) >= jobs or (busy and run.alone) or any(other.alone for other in busy):
            break
        chosen.append(run)
    return chosen


def typed_for(run: Run, line: list[str]) -> str:
    """The command to type for it."""
    text = typed(line)
    if run.ranks == 1:
        return text
    program = text.removeprefix("python ") if text.startswith("python ") else f"-m {text}"
    return f"torchrun --nproc-per-node {run.ranks} {program}"


def start(line: list[str], folder: Path, threads: int, ranks: int = 1) -> multiprocessing.Process:
    """Start the program as a process: training continues from its checkpoint, everything else
    starts over.
    """
    if line[0].startswith("train_"):
        line = [*line, "--resume"]
    elif folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork").Process

    def program(rank: int, port: int) -> None:
        for number in STOP_CODES:
            # which just ends what has no checkpoint to leave, and its own children
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=end_with_parent, daemon=True).start()
        handle = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1, errors="replace")
        steady_output()
        torch.set_num_threads(threads)
        if ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        python(line)

    def all_ranks() -> None:
        """Starts the ranks and ends as they do: if one fails, or on SIGTERM, all get SIGTERM."""
        processes = [fork(target=program, args=(rank, port)) for rank in range(ranks)]

        def end_all(*_) -> None:
            for process in processes:
                if process.pid and process.exitcode is None:
                    os.kill(process.pid, signal.SIGTERM)

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the ranks have it from the terminal, too
        signal.signal(signal.SIGTERM, end_all)
        for process in processes:
            process.start()
        threading.Thread(target=end_with_parent, daemon=True).start()
        going = {process.sentinel: process for process in processes}
        while going:
            for sentinel in wait(list(going)):
                process = going.pop(sentinel)
                process.join()
                if process.exitcode:
                    end_all()
        # A rank that lost another ends with 1: what ended the other is what happened.
        code = next(
            iter(sorted((p.exitcode for p in processes if p.exitcode), key=lambda c: c == 1)), 0
        )
        if code < 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)

    port = free_port() if ranks > 1 else 0
    process = (
        fork(target=all_ranks) if ranks > 1 else fork(target=program, args=(0, 0), name=folder.name)
    )
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def log_of(folder: Path) -> Path:
    """The output of its program, from all its starts."""
    return Path(f"{folder}.log")


def hold(root: Path, patience: float = 60.0) -> IO:
    """The lock of a folder of runs, which the programs inherit: it is free once this process and
    all of them have ended. ValueError if it is not free in time: at once if the process that
    started them still runs, otherwise after so many seconds.
    """
    end, told = time.monotonic() + patience, False
    while (held := lock(root / LOCK)) is None:
        owner = (root / LOCK).read_text()
        if owner.isdecimal() and is_alive(int(owner)):
            raise ValueError(
                f"{root} is in use by process {owner}: wait for it, or end it (kill {owner})"
            )
        if time.monotonic() > end:
            raise ValueError(
                f"{root} is in use: programs that were started there are still running"
            )
        if not told:
            say(f"waiting for the programs that a killed run left running in {root}")
        told = True
        time.sleep(0.5)
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Spent:
    """spent.json: seconds of work on each run and in total, over all starts. Work that was lost in
    a kill counts, too; a kill loses at most the last BEAT seconds of the account.
    """

    def __init__(self, root: Path, began: float):
        self.root, self.last, self.saved, self.figures = (
            root,
            time.perf_counter(),
            began,
            read_spent(root),
        )
        self.figures["starts"] += 1
        self.figures["total"] += self.last - began

    def add(self, going: list[Path], *, save: bool) -> None:
        """Add the time since the last call to the runs in the folders `going`."""
        now, runs = time.perf_counter(), self.figures["runs"]
        for folder in going:
            runs[self.key(folder)] = runs.get(self.key(folder), 0.0) + now - self.last
        self.figures["total"] += now - self.last
        peak = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        self.figures["peak_memory_mb"] = max(self.figures["peak_memory_mb"], peak)
        self.last = now
        if save or now - self.saved > BEAT:
            self.saved = now
            write_aside(self.root / SPENT, json.dumps(self.figures, indent=1) + "\n")

    def forget(self, folder: Path) -> None:
        """Forget the time of a run whose folder was removed."""
        self.figures["runs"].pop(self.key(folder), None)

    def mark_done(self, folder: Path, command: list) -> float:
        """Write done.json; returns the seconds that the run took."""
        seconds = round(self.figures["runs"][self.key(folder)], 1)
        write_aside(folder / DONE, json.dumps({"seconds": seconds, "command": command}) + "\n")
        return seconds

    def key(self, folder: Path) -> str:
        return str(folder.relative_to(self.root))


def read_spent(root: Path) -> dict:
    """{"total", "starts", "peak_memory_mb" (resident, of the largest process), "runs": {folder:
    seconds}}.
    """
    path = root / SPENT
    return (
        json.loads(path.read_text())
        if path.exists()
        else {"total": 0.0, "starts": 0, "peak_memory_mb": 0, "runs": {}}
    )


class Screen:
    """The stages in order, and on a terminal below them the progress bar of each running program,
    read from its log: bars drawn by two processes would overwrite each other. Elsewhere the bars
    are printed from time to time.
    """

    def __init__(self):
        self.logs: dict[str, IO] = {}
        self.bars: dict[str, str] = {}
        self.drawn, self.told, self.terminal = 0, time.monotonic(), sys.stdout.isatty()

    def follow(self, name: str, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self.logs[name], self.bars[name] = log.open(errors="replace", newline=""), ""
        self.logs[name].seek(0, os.SEEK_END)

    def leave(self, name: str) -> None:
        self.logs.pop(name).close()
        del self.bars[name]

    def update(self) -> None:
        before = dict(self.bars)
        for name, log in self.logs.items():
            self.bars[name] = last_bar(log.read()) or self.bars[name]
        if self.terminal and self.bars != before:
            self.say()
        elif not self.terminal and time.monotonic() - self.told > STATUS:
            self.told = time.monotonic()
            self.say(*self.shown(200))

    def say(self, *lines: str) -> None:
        """Print lines above the bars and redraw the bars, all at once, so that nothing flickers."""
        back = f"\x1b[{self.drawn}A\r\x1b[J" if self.drawn else ""
        bars = self.shown(shutil.get_terminal_size().columns) if self.terminal else []
        self.drawn = len(bars)
        print(back + "".join(f"{line}\n" for line in [*lines, *bars]), end="", flush=True)

    def shown(self, width: int) -> list[str]:
        """The bars, without their graphics if there is no room."""
        bars = [f"{name}: {bar}" for name, bar in self.bars.items() if bar]
        return [
            (bar if len(bar) < width else re.sub(r"\|.*?\|", "", bar, count=1))[: width - 1]
            for bar in bars
        ]


def last_bar(text: str) -> str:
    """The last progress bar in a program's output, without its name, which is one word (libraries
    also draw some); empty if there is none.
    """
    bars = (
        re.fullmatch(r"\w+: +(\d+%\|.*\]) *", part) for part in reversed(re.split(r"[\r\n]", text))
    )
    return next((bar[1] for bar in bars if bar), "")
