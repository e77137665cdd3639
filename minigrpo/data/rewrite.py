"""Ask a model at any OpenAI-compatible endpoint, to rewrite reports or what else; answers are kept, so that a run can stop and go on."""

import hashlib
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

# Sets that anyone may download, and the drawn one. Reports of all others, also of files that name no source, stay on this machine.
OPEN_SETS = ("openi", "nih", "jsrt", "phantom", "scenes")

PROMPT = """You edit the findings section of a chest X-ray report so that it holds only what can be seen on this one film.
Remove every mention of earlier films, comparison, change or stability over time ("unchanged", "new", "improved"), of other studies, of
the clinical history, and of recommendations or conversations. Keep every finding that remains, in the report's own words and order.
Add nothing. If nothing remains, answer NONE. Answer with the edited text alone."""
NOTHING = "NONE"
RETRIES = 5  # a busy server answers 429 or 5xx


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the request to an address that nobody checked."""

    def redirect_request(self, *args):
        return None


@dataclass
class Endpoint:
    address: str  # base address, up to /v1
    model: str
    key: str | None = None
    timeout: float = 120.0

    def __post_init__(self):
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--endpoint {self.address!r} is no address: write http://HOST:PORT/v1")
        # A proxy named in the environment must not see what is meant for this machine.
        handlers = [NoRedirect] + ([urllib.request.ProxyHandler({})] if is_loopback(self.address) else [])
        self._opener = urllib.request.build_opener(*handlers)

    def rewrite(self, text: str) -> str:
        """The model's version of one report, "" where it found nothing to keep."""
        said, whole = self.chat([{"role": "system", "content": PROMPT}, {"role": "user", "content": text}])
        if not whole:
            raise ValueError(f"{self.model} was cut off at its longest answer: raise the server's limit, or half reports would be kept")
        said = said.rpartition("</think>")[2].strip()
        return "" if said.rstrip(".") == NOTHING else " ".join(said.split())

    def chat(self, messages: list[dict], **settings) -> tuple[str, bool]:
        """(what the model says, whether it came to its end)."""
        body = {"model": self.model, "temperature": 0, "messages": messages} | settings
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.address.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        answer = self._send(request)
        try:
            choice = answer["choices"][0]
            return choice["message"]["content"].strip(), choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"{self.address} answered without choices[0].message.content: is it an OpenAI-compatible server?") from None

    def _send(self, request: urllib.request.Request) -> dict:
        for attempt in range(RETRIES):
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                if (error.code != 429 and error.code < 500) or attempt == RETRIES - 1:
                    told = error.read()[:300].decode(errors="replace")
                    raise ValueError(f"{self.address} answered {error.code} {error.reason}: {told}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == RETRIES - 1:
                    raise ValueError(f"{self.address} does not answer ({error}): is the server running?") from None
            except ValueError as error:
                raise ValueError(f"{self.address} did not answer in JSON ({error})") from None
            time.sleep(0.25 * 2**attempt)
        raise AssertionError("unreachable")


def is_loopback(address: str) -> bool:
    """Whether the address is this machine, by what is written: a name other than localhost could be resolved anew to any place."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(address: str, sources: Sequence[str | None], what: str, allowed: bool) -> None:
    """Reports and films leave this machine only if they may, or if the user says so; `sources`: the set of each sample sent."""
    if is_loopback(address) or allowed:
        return
    closed = Counter(source or "no source" for source in sources if source not in OPEN_SETS)
    if closed:
        sets = ", ".join(f"{n:,} of {name}" for name, n in closed.most_common())
        raise ValueError(f"--endpoint {address} is not this machine (127.0.0.1, ::1, localhost), and the file holds {what} that may "
                         f"not be sent to others ({sets}): the data use agreements of credentialed sets forbid to share them with a third "
                         "party, such as an online model, and reports of unknown source may name patients. Serve the model on this "
                         "machine, or, if you have the right to send them there, say so with --allow_sending_reports")


def rewrite_all(endpoint: Endpoint, texts: Sequence[str], cache: Path, workers: int = 8) -> list[str]:
    """A rewritten text for each, in order. Each distinct text is asked once; `cache` gains a line with every answer."""
    keys = [key_of(endpoint.model, PROMPT, text) for text in texts]
    return ask_all(endpoint.rewrite, texts, keys, cache, workers, "rewrite")


def key_of(*parts) -> str:
    """What an answer depends on, as the name under which it is kept."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def ask_all(ask: Callable, questions: Sequence, keys: Sequence[str], cache: Path, workers: int, what: str) -> list:
    """`ask(question)` for each, in order, a JSON value. Each key is asked once; `cache` gains a line with every answer."""
    known = read_cache(cache)
    new = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
    with cache.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        if file.tell() and not cache.read_bytes().endswith(b"\n"):
            file.write("\n")  # a run that was killed within a line
        try:
            for key, answer in zip(new, tqdm(pool.map(ask, new.values()), total=len(new), desc=what)):
                known[key] = answer
                file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C: ask no more
            raise
    return [known[key] for key in keys]


def read_cache(cache: Path) -> dict:
    """Answers of earlier runs; a line that a killed run left half written is asked again."""
    known = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").split("\n") if cache.is_file() else []:
        try:
            record = json.loads(line)
            known[record["key"]] = record["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return known
