"""Programs in processes of their own that start in a moment: forked from a server that has imported
everything and run nothing.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# the server's
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_sft", "train_grpo", "evaluate", "pytest"])


def start(program, arguments, log, *, ranks=1, prepare=None):
    """The processes of `program` as torchrun would start them; rank r writes to LOG-r.
    `prepare(rank)` is called in each before the program, which is a module's name, whose main is
    called, or "python", which does with `arguments` what an interpreter does with them:
    `train_sft.py ...`, `-m minigrpo.ask ...`.
    """
    port = free_port()
    processes = [
        CONTEXT.Process(
            target=_run,
            args=(
                program,
                [str(word) for word in arguments],
                f"{log}-{rank}",
                rank,
                ranks,
                port,
                prepare,
                dict(os.environ),
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds=120):
    """Their exit codes; those that outlast `seconds` are killed and have None."""
    end = time.time() + seconds
    for process in processes:
        process.join(max(0.0, end - time.time()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run(program, arguments, log, *, ranks=1, prepare=None, code=0, seconds=120):
    codes = finish(start(program, arguments, log, ranks=ranks, prepare=prepare), seconds)
    assert codes == [code] * ranks, (
        codes,
        *(Path(f"{log}-{rank}").read_text()[-3000:] for rank in range(ranks)),
    )
    return Path(f"{log}-0").read_text()


def python(*line, code=0, curves=False):
    """What `python LINE` prints on both streams; it must exit with `code`. A new interpreter would
    take seconds to import everything, and half of a small run's time goes into its picture of
    `curves`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run(
            "python",
            line,
            Path(folder) / "log",
            code=code,
            prepare=None if curves else without_curves,
        )


def without_curves(rank):
    import minigrpo.run.plots

    minigrpo.run.plots.draw_curves = lambda folder: None


def sft(phantom, out, *extra, steps=4):
    """The line of a small run, for `python`."""
    return [
        "train_sft.py",
        "--model",
        "tiny",
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        out,
        "--max_steps",
        steps,
        "--learning_rate",
        1e-3,
        "--batch_size",
        4,
        *extra,
    ]


def grpo(phantom, model, out, *extra, steps=3):
    return [
        "train_grpo.py",
        "--model",
        model,
        "--train_data",
        phantom / "train.jsonl",
        "--output_dir",
        out,
        "--max_steps",
        steps,
        "--prompts_per_step",
        4,
        "--group_size",
        4,
        "--max_new_tokens",
        16,
        "--learning_rate",
        1e-4,
        *extra,
    ]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(program, arguments, log, rank, ranks, port, prepare, environment):
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    if program != "python":
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.chdir(ROOT)
    import importlib

    import torch

    torch.set_num_threads(1)
    if prepare:
        prepare(rank)
    if program == "python" and arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif program == "python":
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv, module = [f"{program}.py", *arguments], importlib.import_module(program)
        module.draw_curves = lambda folder: None
        module.main()
