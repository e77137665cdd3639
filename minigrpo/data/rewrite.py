"""Ask a model at any OpenAI-compatible endpoint, to rewrite reports or for other purposes; answers
are cached, so that a stopped run can be resumed.

The server is not trusted: an answer is limited in size, time and depth, and if it is unreadable or
missing, the question is asked again a few times. A question without an answer is counted, and the
others continue.
"""

import hashlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from ..visible import visible
from .schema import record_errors

# Sets that anyone may download, and the drawn one. Reports of all others, also of files that name
# no source, stay on this machine.
OPEN_SETS = ("openi", "nih", "jsrt", "phantom", "scenes")

PROMPT = """You edit the findings section of a chest X-ray report so that it holds only what can \
be seen on this one film.
Remove every mention of earlier films, comparison, change or stability over time ("unchanged", \
"new", "improved"), of other studies, of
the clinical history, and of recommendations or conversations. Keep every finding that remains, \
in the report's own words and order.
Add nothing. If nothing remains, answer NONE. Answer with the edited text alone."""
NOTHING = "NONE"
TRIES = 5  # of a question: a busy server answers 429 or 5xx, a broken one half an answer
AGAIN = (408, 425, 429)  # and all from 500 on: worth another try
MOST_BYTES = 4 * 2**20  # of an answer; one of 2,048 tokens has some 10 kB
HALF = ("length", "content_filter", "abort")  # finish_reason of an answer that lacks a part
MOST_FAILURES = 20  # questions in a row without an answer: the server is gone, or was never one
LEAST_KEY = 4  # characters of a key that is blanked: "x" would blank half of a message


class NoAnswer(ValueError):
    """A question without a usable answer, and why."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would send the request to an unchecked address."""

    def redirect_request(self, *args):
        return None


class Connection(http.client.HTTPConnection):
    """A connection that another thread can end at any moment, by its `handle`: a server that sends
    one byte per second never times out.
    """

    handle: socket.socket | None = None

    def connect(self):
        super().connect()
        self.handle = self.sock.dup()


class SecureConnection(http.client.HTTPSConnection, Connection):
    """The handle exists before the handshake."""


def _kept(
    kind: type[Connection], request: urllib.request.Request, host: str, **settings
) -> Connection:
    request.connection = kind(host, **settings)
    return request.connection


class Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(partial(_kept, Connection, request), request)


class Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(
            partial(_kept, SecureConnection, request), request, context=ssl.create_default_context()
        )


@dataclass
class Endpoint:
    address: str  # base address, up to /v1
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0  # seconds for a question, with all its tries

    def __post_init__(self):
        try:
            parts = urlsplit(self.address)
            named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            usable = named and re.fullmatch("[!-~]+", self.address)
        except ValueError:  # a port above 65535, half of an IPv6 address
            usable = False
        if set("@?#") & set(self.address):
            raise ValueError(
                "--endpoint contains a user, a password or a query, which would show in messages:"
                " write http://HOST:PORT/v1, and set OPENAI_API_KEY to the key"
            )
        if not usable:
            raise ValueError(
                f"--endpoint {visible(self.address)!r} is not an address: write http://HOST:PORT/v1"
            )
        self.key = (self.key or "").strip() or None
        if self.key and not re.fullmatch("[!-~]+", self.key):
            raise ValueError(
                "OPENAI_API_KEY contains a space, a line break or a character that no key has: set"
                " it to the key and nothing else"
            )
        # A proxy named in the environment must not see what is meant for this machine.
        no_proxy = [urllib.request.ProxyHandler({})] if is_loopback(self.address) else []
        self._opener = urllib.request.build_opener(NoRedirect, Http, Https, *no_proxy)

    def rewrite(self, text: str) -> str:
        """The model's version of one report, "" if there was nothing to keep."""
        said, whole = self.chat(
            [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
        )
        if not whole:
            raise NoAnswer(
                f"{self.model} was cut off, by a limit or a filter: raise the server's limit, or"
                " truncated reports would be kept"
            )
        said = said.rpartition("</think>")[2].strip()
        report = "" if said.rstrip(".") == NOTHING else " ".join(said.split())
        if wrong := report and unusable(report):
            raise NoAnswer(
                f"{self.model} wrote text that a report must not contain ({self._blank(wrong)})"
            )
        return report

    def chat(self, messages: list[dict], **settings) -> tuple[str, bool]:
        """(the model's answer, whether it is complete). NoAnswer if it is not usable."""
        question = {"model": self.model, "temperature": 0, "messages": messages} | settings
        body, url = json.dumps(question).encode(), f"{self.address.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        end, problem = time.monotonic() + self.timeout, "no time"
        for attempt in range(TRIES):
            left = end - time.monotonic()
            if left <= 0:
                break
            request = urllib.request.Request(url, body, headers)
            problem, final = None, False
            try:
                return self._answer(self._read(request, left))
            except urllib.error.HTTPError as error:
                told = self._blank(f"{error.code} {error.reason}: {error.told}")
                problem = f"{self.address} answered {told}"
                final = error.code < 500 and error.code not in AGAIN
            except NoAnswer as error:
                problem = f"{self.address} {error}"
            except (ConnectionRefusedError, urllib.error.URLError) as error:
                told = self._blank(str(error))
                problem = f"{self.address} does not answer ({told}): is the server running?"
            except Exception as error:  # of a server's bytes http.client and ssl raise many kinds
                told = self._blank(f"{type(error).__name__}: {error}")
                problem = f"{self.address} sent something that is not an answer ({told})"
            if end <= time.monotonic():
                problem = f"{self.address} took longer than {self.timeout:g} s"
            if final:
                break
            time.sleep(max(0.0, min(0.25 * 2**attempt, end - time.monotonic())))
        raise NoAnswer(problem)

    def _read(self, request: urllib.request.Request, seconds: float) -> bytes:
        """The body of the answer, of at most MOST_BYTES. After `seconds` the connection is
        closed.
        """

        def cut():
            handle = getattr(getattr(request, "connection", None), "handle", None)
            try:
                if handle:
                    handle.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is closed already
                pass

        watch = threading.Timer(seconds, cut)
        watch.daemon = True
        watch.start()
        try:
            with self._opener.open(request, timeout=seconds) as response:
                data = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:  # whose text may hold the key, and end never
                error.told = error.read(65_536).decode(errors="replace")
            raise
        finally:
            watch.cancel()
            if handle := getattr(getattr(request, "connection", None), "handle", None):
                handle.close()
        if len(data) > MOST_BYTES:
            raise NoAnswer(f"sent more than {MOST_BYTES:,} bytes")
        return data

    def _answer(self, data: bytes) -> tuple[str, bool]:
        try:
            choice = json.loads(data)["choices"][0]
            said = choice["message"]["content"].strip()
            whole = choice.get("finish_reason") not in HALF
            said.encode()
        except (KeyError, IndexError, TypeError, AttributeError):
            raise NoAnswer(
                "answered without choices[0].message.content: is it an OpenAI-compatible server?"
            ) from None
        except UnicodeEncodeError:
            raise NoAnswer("answered with half a character (a lone surrogate)") from None
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"did not answer in JSON ({self._blank(str(error))})") from None
        return self._without_key(said), whole

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= LEAST_KEY else text

    def _blank(self, text: str) -> str:
        """Text of the server, safe to show in a message: without the key, on one line, at most 300
        characters.
        """
        return visible(" ".join(self._without_key(text).split()))[:300]


def is_loopback(address: str) -> bool:
    """Whether the address is literally this machine: a name other than localhost could later
    resolve to any other.
    """
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(address: str, sources: Sequence[str | None], what: str, allowed: bool) -> None:
    """Reports and films leave this machine only if that is allowed, or if the user says so;
    `sources`: the data set of each sample sent.
    """
    if is_loopback(address) or allowed:
        return
    closed = Counter(source or "no source" for source in sources if source not in OPEN_SETS)
    if closed:
        sets = ", ".join(f"{n:,} of {name}" for name, n in closed.most_common())
        raise ValueError(
            f"--endpoint {address} is not this machine (127.0.0.1, ::1, localhost), and the file"
            f" contains {what} that may not be sent to others ({sets}): the data use agreements of"
            " credentialed data sets forbid sharing them with a third party, such as an online"
            " model, and reports of unknown source may name patients. Serve the model on this"
            " machine, or, if you have the right to send them there, say so with"
            " --allow_sending_reports"
        )


def rewrite_all(
    endpoint: Endpoint, texts: Sequence[str], cache: Path, workers: int = 8
) -> list[str | None]:
    """A rewritten text for each, in order, None where there is no answer. Each distinct text is
    asked once; `cache` gains a line with every answer."""
    keys = [key_of(endpoint.model, PROMPT, text) for text in texts]
    return ask_all(endpoint.rewrite, texts, keys, cache, workers, "rewrite", is_report)


def key_of(*parts) -> str:
    """A key for the cache, made of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def ask_all(
    ask: Callable,
    questions: Sequence,
    keys: Sequence[str],
    cache: Path,
    workers: int,
    what: str,
    fits: Callable[[object], bool],
) -> list:
    """`ask(question)` for each, in order, a JSON value that `fits`, None where it raised NoAnswer.
    Each key is asked once; `cache` gains a line with every answer, as soon as it comes. ValueError
    where MOST_FAILURES questions in a row, or all, get no answer."""
    known = read_cache(cache, fits)
    new = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
    failures: Counter[str] = Counter()
    in_a_row = 0
    with cache.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        if file.tell() and not cache.read_bytes().endswith(b"\n"):
            file.write("\n")  # a run that was killed within a line
        try:
            waiting = {pool.submit(ask, question): key for key, question in new.items()}
            for done in (bar := tqdm(as_completed(waiting), total=len(new), desc=what)):
                key = waiting.pop(done)
                try:
                    answer, in_a_row = done.result(), 0
                except NoAnswer as error:
                    failures[str(error)] += 1
                    in_a_row += 1
                    bar.set_postfix(failed=failures.total())
                    if in_a_row == MOST_FAILURES or failures.total() == len(new):
                        raise ValueError(
                            f"{error}. {in_a_row} questions in a row got no answer, so no more are"
                            f" asked; the answers so far are in {cache}, and the same command"
                            " continues from there"
                        ) from None
                    continue
                known[key] = answer
                file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error or Ctrl-C: ask no more
            raise
    if failures:
        reasons = "; ".join(f"{n:,} times: {reason}" for reason, n in failures.most_common(3))
        print(
            f"note: {failures.total():,} of {len(new):,} questions got no answer ({reasons}). To"
            f" ask them again, use --cache {cache} and another --output_file"
        )
    return [known.get(key) for key in keys]


def is_text(answer: object) -> bool:
    """Whether it is a text that can be written."""
    try:
        return isinstance(answer, str) and bool(answer.encode() or True)
    except UnicodeEncodeError:
        return False


def unusable(answer: str, thinking: str | None = None) -> str | None:
    """Why a file with this answer in a line would be refused, or None."""
    line = {
        "id": "asked",
        "image": None,
        "task": "report",
        "question": "asked",
        "answer": answer,
        "thinking": thinking,
    }
    return next(record_errors(line), None)


def is_report(answer: object) -> bool:
    """Whether it is a result of `Endpoint.rewrite`: "", or a text that is allowed in a report."""
    return is_text(answer) and not (answer and unusable(answer))


def is_reply(answer: object) -> bool:
    """Whether it is a result of `Endpoint.chat`: a text, and whether it is complete."""
    pair = isinstance(answer, list | tuple) and len(answer) == 2
    return pair and is_text(answer[0]) and isinstance(answer[1], bool)


def read_cache(cache: Path, fits: Callable[[object], bool]) -> dict:
    """Answers of earlier runs; a line that is incomplete after a kill, or invalid, is asked
    again.
    """
    known = {}
    for line in (
        cache.read_text(encoding="utf-8", errors="replace").split("\n") if cache.is_file() else []
    ):
        try:
            record = json.loads(line)
            if fits(record["answer"]):
                known[record["key"]] = record["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return known
