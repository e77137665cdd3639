"""Chat templates are programs that come with a checkpoint: they run in a process of their own.

The renderer is transformers' own, whose sandbox keeps a template from files and from Python. What
it keeps no template from is a loop without end, or a string of gigabytes: so the process has
`SECONDS` of processor time for a conversation and `MEMORY` bytes, and the system ends it beyond
them. It starts in a moment, and ends with the program.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import ModuleType

SECONDS = 1.0  # of processor time, so that a busy machine takes none; Qwen3-VL's takes 0.0001
MEMORY = 2**28  # on top of what Python and jinja take
LONGEST = 2**22  # characters

_lock, _renderers = threading.Lock(), {}  # by process: a fork starts its own


def render(tokenizer, messages: list[dict], *, answer: bool = True) -> str:
    """A conversation as tokenizer.chat_template writes it; with `answer`, up to where the assistant
    begins. ValueError where the template fails or exceeds its bounds."""
    request = json.dumps({"conversations": [messages], "chat_template": tokenizer.chat_template,
                          "add_generation_prompt": answer, **tokenizer.special_tokens_map})
    with _lock:
        for _ in range(2):  # once more where somebody else has ended the process
            process = _renderers.get(os.getpid()) or _start()
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except OSError:
                reply = b""
            if reply:
                break
            code = _end(process)
            if code == -signal.SIGPROF:
                raise ValueError(f"it takes more than {SECONDS:g} s for one conversation")
        else:
            raise ValueError(f"its process ended with {code}, perhaps for lack of memory")
    reply = json.loads(reply)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


def _start() -> subprocess.Popen:
    # A session of its own: Ctrl-C goes to all processes of a terminal, and the program decides.
    process = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    _renderers[os.getpid()] = process
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen) -> int:
    """Its exit code; it ends with its input."""
    _renderers.pop(os.getpid(), None)
    for stream in (process.stdin, process.stdout):
        try:
            stream.close()
        except OSError:  # what was not yet written
            pass
    return process.wait()


def renderer():
    """transformers' own, without the rest of transformers, which takes a second to import."""
    place = find_spec("transformers").submodule_search_locations[0]
    try:
        for name in ("transformers", "transformers.utils"):
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [place if name == "transformers" else f"{place}/utils"]
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception:  # a version that wants more of itself
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template


def serve() -> None:
    """The process that renders: a line of JSON in, a line of JSON out."""
    render_jinja_template = renderer()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all processes of a job
    if os.path.exists("/proc/self/statm"):  # on Linux; macOS keeps no such limit
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends it, whatever it does
        try:
            (text,), _ = render_jinja_template(tools=None, documents=None, **json.loads(line))
            if len(text) > LONGEST:
                raise ValueError(f"it writes more than {LONGEST:,} characters")
            reply = {"text": text}
        except Exception as error:  # whatever jinja and the operations of a template raise
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]!r}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
