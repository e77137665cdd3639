"""Programs in processes of their own that start in a moment: forked from a server that has imported everything and run nothing."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # the server's
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_sft", "train_grpo", "evaluate"])


def start(program, arguments, log, *, ranks=1, prepare=None):
    """The processes of `program` (a module's name) as torchrun would start them; rank r writes to LOG-r. `prepare(rank)` is called
    in each before the program."""
    port = free_port()
    processes = [CONTEXT.Process(target=_run, args=(program, [str(word) for word in arguments], f"{log}-{rank}", rank, ranks, port, prepare))
                 for rank in range(ranks)]
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


def run(program, arguments, log, *, ranks=1, prepare=None, code=0):
    codes = finish(start(program, arguments, log, ranks=ranks, prepare=prepare))
    assert codes == [code] * ranks, (codes, *(Path(f"{log}-{rank}").read_text()[-3000:] for rank in range(ranks)))
    return Path(f"{log}-0").read_text()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(program, arguments, log, rank, ranks, port, prepare):
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(ROOT)
    import importlib

    import torch
    torch.set_num_threads(1)
    if prepare:
        prepare(rank)
    sys.argv, module = [f"{program}.py", *arguments], importlib.import_module(program)
    module.draw_curves = lambda folder: None  # half of a small run's time
    module.main()
