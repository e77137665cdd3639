"""Programs that come with a checkpoint, such as its chat template, tried out within limits."""

import os
import resource
import signal
import warnings
from collections.abc import Callable

from minigrpo.visible import text_of

# of processor time, so that a busy machine takes none; Qwen3-VL's template takes 0.001
SECONDS = 1.0
MEMORY = 2**28  # bytes, on top of what this process has


def try_out(work: Callable[[], object]) -> None:
    """Run work() in a fork of this process, which the system ends beyond SECONDS or MEMORY.
    ValueError with what it raised, or with the limit that it exceeded; its result is lost.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads do not follow; none is needed
        child = os.fork()
    if not child:
        _work_and_exit(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        fault = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) == signal.SIGPROF
        fault = f"it takes more than {SECONDS:g} s" if late else "its process was ended"
    if fault:
        raise ValueError(fault)


def _work_and_exit(work: Callable[[], object], writing: int) -> None:
    fault = ""
    try:
        if os.path.exists("/proc/self/statm"):  # on Linux; macOS keeps no such limit
            with open("/proc/self/statm") as file:
                taken = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, whatever it does
        work()
    except ValueError as error:
        fault = text_of(error) or "ValueError"
    except BaseException as error:  # whatever a foreign program raises
        fault = f"{type(error).__name__}: {text_of(error)[:200]!r}"
    finally:  # without the clean-up of Python, which would flush what the parent has yet to write
        os.write(writing, fault.encode(errors="backslashreplace")[:4096])
        os._exit(0)
