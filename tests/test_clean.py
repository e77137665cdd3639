"""Reports cut down to this film, by rules and by a model; and reports that must not leave the
machine do not.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigrpo.data import clean, read_jsonl
from minigrpo.data.clean import clean_report
from minigrpo.data.clean_rules import COMPARES, RULES, Rule
from minigrpo.data.findings import stated_findings
from minigrpo.data.rewrite import PROMPT, Endpoint, is_loopback, key_of, rewrite_all
from tests.finding_stems import stems

LINES = (Path(__file__).parent / "data/clean_reports.txt").read_text().splitlines()
CASES = [
    tuple(part.strip() for part in line.split("=>")) for line in LINES if not line.startswith("#")
]


@pytest.mark.parametrize("text, expected", CASES)
def test_sentences_of_real_style(text, expected):
    assert clean_report(text) == expected
    assert clean_report(expected) == expected


def test_there_are_enough_of_them():
    assert len(CASES) >= 145 and sum(not after for _, after in CASES) > 20


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_both_ways(rule):
    assert rule(rule.example) != rule.example
    assert clean_report(rule.example) == rule.result
    assert rule(rule.untouched) == rule.untouched


def test_no_finding_is_lost():
    """By a second reader that shares nothing with the cleaner's own."""
    lost = [(a, stems(a) - stems(b)) for a, b in CASES if stems(a) - stems(clean_report(a))]
    assert not lost
    assert sum(bool(stems(a)) for a, _ in CASES) > 90, "and there was much to lose"


BROKEN = re.compile(
    r"\s[,.;:]|[,;:]\s*\.|\.\.|  |XXXX|___|\b(?:and|or|but|with|without|of|the|an?|is|are|to|"
    r"from)\.$|"
    r"\ban (?=[bcdfghjklmnpqrstvwyz])|\ba (?=[aeio])|^[a-z]|[^.]$"
)


def test_no_sentence_is_broken_and_none_compares():
    for text, _ in CASES:
        after = clean_report(text)
        assert not after or not BROKEN.search(after), (text, after)
        assert not COMPARES.search(after), (text, after)


def test_a_finding_that_the_rules_would_lose_keeps_its_sentence(monkeypatch):
    """Whatever a rule does: the labeller looks at each sentence again."""
    greedy = Rule("greedy", r"effusion", "", "", "", "")
    monkeypatch.setattr(clean, "RULES", [*RULES, greedy])
    assert clean_report("There is a stable left effusion.") == "There is a stable left effusion."
    assert clean_report("There is no effusion.") == "There is no."


@pytest.mark.parametrize(
    "text, stated",
    [
        ("Cardiomegaly without effusion or edema.", {"cardiomegaly"}),
        ("No effusion, but a small nodule.", {"nodule"}),
        ("No pneumothorax. Left effusion.", {"effusion"}),
        ("The effusion has resolved.", set()),
        ("The heart is mildly enlarged.", {"cardiomegaly", "enlargement"}),
        ("No change in the hiatal hernia.", {"hernia"}),
        ("The lungs are free of consolidation.", set()),
        ("Right PICC, removal of the chest tube.", {"device"}),
    ],
)
def test_stated_findings(text, stated):
    assert stated_findings(text) == stated


def test_the_command_prints_a_ledger(tmp_path, monkeypatch, capsys):
    rows = [
        {"id": str(k), "image": None, "task": "report", "question": "Report.", "answer": answer}
        for k, answer in enumerate(("Stable cardiomegaly.", "The left effusion has resolved. Clear "
                                    "lungs.", "Cardiomegaly. A left effusion is seen."))
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["clean", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    clean.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cardiomegaly", "2", "2", "0"] in table and ["effusion", "1", "1", "0"] in table


def test_reports_of_one_film_stay_word_for_word(samples):
    reports = [s.answer for s in samples if s.task == "report"]
    assert len(reports) == 12 and [clean_report(text) for text in reports] == reports


# ---- a real server on this machine ---------------------------------------------------------------


class Server:
    """An OpenAI-compatible server: answers by `reply(body)`, a (status, dict) or a dict, and counts
    what it was asked.
    """

    def __init__(self, reply):
        self.asked, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body, dict(self.headers)))
                status, answer = 200, reply(body)
                if isinstance(answer, tuple):
                    status, answer = answer
                raw = json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", answer["to"])
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self):
                outer.asked.append((self.path, None, dict(self.headers)))
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"


def said(text, **more):
    return {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


@pytest.fixture
def serve():
    servers = []

    def serve(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield serve
    for server in servers:
        server.server.shutdown()


def question(body):
    return body["messages"][-1]["content"]


def test_each_text_is_asked_once_and_answers_keep_their_order(serve, tmp_path):
    server = serve(lambda body: said(question(body).upper()))
    found = rewrite_all(
        Endpoint(server.address, "m", key="secret"),
        ["a", "b", "a", "c"],
        tmp_path / "cache.jsonl",
        workers=3,
    )
    assert found == ["A", "B", "A", "C"]
    assert sorted(question(body) for _, body, _ in server.asked) == ["a", "b", "c"]
    path, body, headers = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert (
        body["messages"][0] == {"role": "system", "content": PROMPT}
        and headers["Authorization"] == "Bearer secret"
    )


def test_a_stopped_run_goes_on_where_it_was(serve, tmp_path, capsys):
    """The server breaks at the third report: two answers are kept, a half-written line is asked
    again, nothing is asked twice.
    """
    broken = True
    server = serve(
        lambda body: (
            (400, {"error": "no"})
            if broken and question(body) == "three"
            else said(question(body) + "!")
        )
    )
    endpoint, cache = Endpoint(server.address, "m"), tmp_path / "cache.jsonl"
    texts = ["one", "two", "three"]
    assert rewrite_all(endpoint, texts, cache, workers=1) == ["one!", "two!", None]
    told = capsys.readouterr().out
    assert "1 of 3 questions got no answer" in told and "answered 400" in told
    cache.write_text(cache.read_text() + '{"key": "half')
    broken, before = False, len(server.asked)
    assert rewrite_all(endpoint, ["one", "two", "three", "four"], cache, workers=1) == [
        "one!",
        "two!",
        "three!",
        "four!",
    ]
    assert [question(body) for _, body, _ in server.asked[before:]] == ["three", "four"]
    assert (
        rewrite_all(endpoint, ["four", "one"], cache, workers=1) == ["four!", "one!"]
        and len(server.asked) == before + 2
    )
    # its answers are its own
    rewrite_all(Endpoint(server.address, "another model"), ["one"], cache, workers=1)
    assert len(server.asked) == before + 3


def test_a_busy_server_is_asked_again(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("minigrpo.data.rewrite.time.sleep", lambda _: None)
    tries = []
    server = serve(
        lambda body: tries.append(1) or ((503, {}) if len(tries) < 3 else said("Clear."))
    )
    assert (
        rewrite_all(Endpoint(server.address, "m"), ["x"], tmp_path / "cache.jsonl") == ["Clear."]
        and len(tries) == 3
    )


@pytest.mark.parametrize(
    "reply, message",
    [
        ({"unexpected": 1}, "OpenAI-compatible"),
        (said("Half a rep", finish_reason="length"), "cut off"),
        ((401, {}), "answered 401"),
    ],
)
def test_bad_answers_are_errors_and_never_kept(serve, tmp_path, monkeypatch, reply, message):
    monkeypatch.setattr("minigrpo.data.rewrite.time.sleep", lambda _: None)
    server = serve(lambda body: reply)
    with pytest.raises(ValueError, match=message):
        rewrite_all(Endpoint(server.address, "m"), ["x"], tmp_path / "cache.jsonl")
    assert (tmp_path / "cache.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Clear <image> lungs.", {}),
        ("Clear.<|im_end|>", {}),
        ("The <answer>lungs</answer> clear.", {}),
        ("<think>Hm", {}),
        ("\u200b\u2060", {}),
        ("Half a rep", {"finish_reason": "content_filter"}),
    ],
)
def test_what_no_report_may_hold_is_no_answer(serve, tmp_path, text, reason):
    """Bug: one such answer made a file that every program refuses as a whole; what a filter had
    cut was kept as a report."""
    server = serve(lambda body: said(text, **reason) if question(body) == "odd" else said("Clear."))
    endpoint, cache = Endpoint(server.address, "m"), tmp_path / "cache.jsonl"
    assert rewrite_all(endpoint, ["odd", "even"], cache) == [None, "Clear."]
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    odd = {"key": key_of("m", PROMPT, "odd"), "answer": text}  # as an older version kept it
    if not reason:
        cache.write_text("".join(json.dumps(row) + "\n" for row in [*rows, odd]))
        assert rewrite_all(endpoint, ["odd", "third"], cache) == [None, "Clear."]


def test_a_redirect_is_not_followed(serve, tmp_path):
    """urllib follows 302, and takes the key along, to an address that nobody checked."""
    other = serve(lambda body: said("Clear."))
    server = serve(lambda body: (302, {"to": f"{other.address}/chat/completions"}))
    with pytest.raises(ValueError, match="answered 302"):
        rewrite_all(Endpoint(server.address, "m", key="secret"), ["x"], tmp_path / "cache.jsonl")
    assert not other.asked


def test_thinking_and_none_are_understood(serve, tmp_path):
    server = serve(
        lambda body: said(
            {"a": "<think>hm</think>\nLungs\n clear.", "b": "NONE", "c": "None seen."}[
                question(body)
            ]
        )
    )
    assert rewrite_all(Endpoint(server.address, "m"), ["a", "b", "c"], tmp_path / "c.jsonl") == [
        "Lungs clear.",
        "",
        "None seen.",
    ]


def test_a_proxy_does_not_see_what_is_meant_for_this_machine(serve, tmp_path, monkeypatch):
    """urllib sends even 127.0.0.1 to the proxy that the environment names."""
    server, proxy = (
        serve(lambda body: said("Clear.")),
        serve(lambda body: said("seen by the proxy")),
    )
    monkeypatch.setenv("http_proxy", proxy.address.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    assert (
        rewrite_all(Endpoint(server.address, "m"), ["x"], tmp_path / "c.jsonl") == ["Clear."]
        and not proxy.asked
    )


# ---- what may leave the machine ------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, here",
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:80/v1", True),
        ("http://127.9.9.9/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://10.0.0.5/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://127.0.0.1@example.com/v1", False),
        ("http://0.0.0.0/v1", False),
        ("http://127.0.0.1.example.com", False),
    ],
)
def test_loopback_is_told_by_what_is_written(address, here):
    assert is_loopback(address) is here


def report(number, source="mimic_cxr", answer="Unchanged small effusion. Heart normal."):
    line = {
        "id": f"r{number}",
        "image": None,
        "task": "report",
        "question": "Report.",
        "answer": answer,
    }
    return line | ({"source": source} if source else {})


def run(monkeypatch, capsys, *argv) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["clean", *map(str, argv)])
    error = ""
    try:
        clean.main()
    except SystemExit as stop:
        error = str(stop.code or "")
    return capsys.readouterr().out, error


@pytest.fixture
def write(tmp_path):
    def write(*records):
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
        return tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    return write


@pytest.mark.parametrize(
    "source",
    [
        "mimic_cxr",
        "chexpert_plus",
        "chest_imagenome",
        "vindr_cxr",
        "ms_cxr",
        "padchest_gr",
        None,
        "our hospital",
    ],
)
def test_credentialed_and_unknown_reports_stay_here(write, monkeypatch, capsys, source):
    """The message says why and what to do; nothing is connected to before."""
    monkeypatch.setattr("minigrpo.data.clean.rewrite_all", lambda *_: pytest.fail("was sent"))
    file, out = write(report(0, "openi"), report(1, source))
    _, error = run(
        monkeypatch,
        capsys,
        file,
        "--output_file",
        out,
        "--endpoint",
        "http://198.51.100.7/v1",
        "--model",
        "m",
    )
    assert (
        "data use agreements" in error
        and "--allow_sending_reports" in error
        and f"1 of {source or 'no source'}" in error
    )
    assert not out.exists()


def test_open_reports_and_allowed_ones_are_sent(write, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(
        "minigrpo.data.clean.rewrite_all",
        lambda endpoint, texts, *_: sent.extend(texts) or list(texts),
    )
    away = ["--endpoint", "http://198.51.100.7/v1", "--model", "m"]
    file, out = write(report(0, "openi"))
    assert run(monkeypatch, capsys, file, "--output_file", out, *away)[1] == "" and len(sent) == 1
    file, out = write(report(0, "mimic_cxr"))
    out.unlink()
    assert (
        run(monkeypatch, capsys, file, "--output_file", out, *away, "--allow_sending_reports")[1]
        == ""
        and len(sent) == 2
    )


def test_the_command_by_rules_and_by_a_server(write, monkeypatch, capsys, serve, tmp_path):
    box = {
        "id": "g",
        "image": None,
        "task": "grounding",
        "question": "Where?",
        "answer": "[0.10, 0.20, 0.30, 0.40]",
        "boxes": [[0.1, 0.2, 0.3, 0.4]],
    }
    talk = {
        "id": "c",
        "image": None,
        "task": "conversation",
        "turns": [["Effusion?", "Unchanged."]],
    }
    file, out = write(report(0), report(1, answer="The heart is unchanged."), box, talk)
    printed, error = run(monkeypatch, capsys, file, "--output_file", out)
    assert (
        not error
        and "4 samples read, 3 kept, 1 dropped" in printed
        and "2 reports, 2 changed" in printed
    )
    first, *rest = read_jsonl(out)
    assert (
        first.answer == "Small effusion. Heart normal."
        and [s.id for s in rest] == ["g", "c"]
        and rest[1].turns == talk["turns"]
    )
    assert "exists already" in run(monkeypatch, capsys, file, "--output_file", out)[1]
    server = serve(lambda body: said("Heart normal."))
    printed, error = run(
        monkeypatch,
        capsys,
        file,
        "--output_file",
        tmp_path / "deep/llm.jsonl",
        "--endpoint",
        server.address,
        "--model",
        "m",
    )
    assert (
        not error
        and [s.answer for s in read_jsonl(tmp_path / "deep/llm.jsonl") if s.task == "report"]
        == ["Heart normal."] * 2
    )
    assert (tmp_path / "deep/llm.cache.jsonl").exists() and len(server.asked) == 2


def test_films_are_found_from_the_new_place(phantom, monkeypatch, capsys, tmp_path):
    _, error = run(
        monkeypatch,
        capsys,
        phantom / "train.jsonl",
        "--output_file",
        tmp_path / "elsewhere/train.jsonl",
    )
    assert not error
    assert [s.image for s in read_jsonl(tmp_path / "elsewhere/train.jsonl")] == [
        s.image for s in read_jsonl(phantom / "train.jsonl")
    ]
