"""Traces: what is refused and why, what is asked of whom, and that a stopped run goes on."""

import base64
import json
import sys
from io import BytesIO

import pytest
from PIL import Image

from minigrpo import cold_start
from minigrpo.data import Sample, read_jsonl, with_traces
from minigrpo.data.phantom import KINDS
from minigrpo.data.traces import REASONS, check_reply, drawn_trace, read_templates
from tests.test_clean import said, serve  # noqa: F401  a fixture

TEMPLATES = read_templates()
GOLD = Sample(
    "a", None, "report", "What does this show?", "The heart is enlarged. The lungs are clear."
)
TRACE = "The heart takes more than half of the chest, and both lungs are alike"


def reply(trace=TRACE, answer=GOLD.answer):
    return f"<think>{trace}</think>\n{answer}"


REFUSED = [
    ("cut off", reply(), False),
    ("no block", GOLD.answer, True),
    ("no block", reply(trace=" "), True),
    ("not exactly one closed block", f"<think>{TRACE}", True),
    ("not exactly one closed block", reply() + reply(), True),
    ("answer changed", reply(answer="The heart is enlarged."), True),
    ("answer changed", reply(answer="Answer: " + GOLD.answer), True),
    ("too short", reply(trace="Enlarged heart"), True),
    ("too long", reply(trace="dense " * 601), True),
    ("holds a mark", reply(trace=f"{TRACE} <|im_end|>"), True),
    ("holds a mark", reply(trace=f"{TRACE} <image>"), True),
    ("holds a mark", reply(trace=f"{TRACE} <answer>"), True),
    ("copies the answer", reply(trace=f"I see it: {GOLD.answer} So it is."), True),
    *(
        ("leaks the answer", reply(trace=f"{TRACE}, {leak}"), True)
        for leak in (
            "as the given answer says",
            "which fits the reference report",
            "Consistent with the report.",
            "The ground truth names it",
            "the answer states cardiomegaly",
            "I was told so",
            "to copy it word for word",
            "matching the provided boxes",
        )
    ),
]


@pytest.mark.parametrize("reason, text, whole", REFUSED)
def test_a_reply_is_refused_for_its_reason(reason, text, whole):
    assert check_reply(text, whole, GOLD, TEMPLATES) == ("", reason)


def test_every_reason_is_tested():
    assert {reason for reason, _, _ in REFUSED} == set(REASONS)


@pytest.mark.parametrize(
    "trace",
    [
        TRACE,
        (
            "The question asks for the trachea. It is given a bend by the aorta; correct position"
            " of the tube."
        ),
        (
            "Question of an effusion: the angle is sharp, so none. The heart is known to look wide"
            " in AP films."
        ),
    ],
)
def test_an_honest_trace_is_kept(trace):
    assert (
        check_reply(reply(trace).replace("clear.", " clear.\n"), True, GOLD, TEMPLATES)[0] == trace
    )


def test_every_phantom_finding_belongs_to_one_system():
    labels = [label for step in TEMPLATES["search"] for label in step["labels"]]
    assert sorted(labels) == sorted(KINDS)
    assert [step["system"] for step in TEMPLATES["search"]] == [
        "airways",
        "lungs",
        "pleura",
        "heart",
        "bones",
        "devices",
    ]


def run(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["cold_start", *map(str, command)])
    cold_start.main()


def test_a_trace_of_nothing_to_find():
    absent = Sample(
        "a", "x.png", "grounding", "Is there any nodule?", "There is no nodule.", label="nodule"
    )
    assert drawn_trace(absent, [], TEMPLATES) == "nothing to find."


def test_the_drawing_is_read_as_it_was_drawn(phantom, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch,
        phantom / "train.jsonl",
        "--teacher",
        "drawing",
        "--output_file",
        tmp_path / "think.jsonl",
    )
    direct, both = read_jsonl(phantom / "train.jsonl"), read_jsonl(tmp_path / "think.jsonl")
    spoken = [s for s in both if s.thinking]
    assert len(spoken) == len(direct) and "refused: none" in capsys.readouterr().out
    assert [(s.id, s.image, s.answer) for s in both if not s.thinking] == [
        (s.id, s.image, s.answer) for s in direct
    ]
    for s in spoken:
        if s.task == "report":
            assert all(f"{step['system']}: " in s.thinking for step in TEMPLATES["search"])
            assert all((f["label"] in s.thinking) for f in s.findings)
            assert all(
                (kind in s.thinking) == any(f["label"] == kind for f in s.findings)
                for kind in KINDS
            )
    assert all(s.question.endswith("/think") for s in with_traces(spoken))


def test_limit_draws_by_seed(phantom, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(
            monkeypatch,
            phantom / "train.jsonl",
            "--teacher",
            "drawing",
            "--limit",
            5,
            "--seed",
            seed,
            "--traces_only",
            "--output_file",
            tmp_path / f"{name}.jsonl",
        )
    a, b, c = ([s.id for s in read_jsonl(tmp_path / f"{name}.jsonl")] for name in "abc")
    assert a == b != c and len(a) == 5


def task_of(body):
    return body["messages"][-1]["content"][-1]["text"]


def good(body):
    """What a teacher that does as it is told would say."""
    return said(f"<think>{TRACE}</think>{task_of(body).rpartition('word for word:')[2].strip()}")


def test_an_endpoint_sees_film_question_and_answer_and_is_not_asked_twice(
    phantom, tmp_path, monkeypatch, serve, capsys
):  # noqa: F811
    server = serve(
        lambda body: (
            said("I will not", finish_reason="length")
            if "report every finding" in task_of(body)
            else good(body)
        )
    )
    command = [
        phantom / "train.jsonl",
        "--teacher",
        server.address,
        "--model",
        "m",
        "--limit",
        6,
        "--cache",
        tmp_path / "cache.jsonl",
    ]
    run(monkeypatch, *command, "--output_file", tmp_path / "think.jsonl")
    assert len(server.asked) == 6
    _, body, _ = server.asked[0]
    system, user = body["messages"]
    assert (
        "Never let on" in system["content"]
        and user["content"][0]["type"] == "image_url"
        and body["max_tokens"] == 2048
    )
    url = user["content"][0]["image_url"]["url"]
    assert Image.open(
        BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))
    ).size == (192, 192)
    kept = [s for s in read_jsonl(tmp_path / "think.jsonl") if s.thinking]
    assert kept and all(s.thinking == TRACE for s in kept)
    run(monkeypatch, *command, "--output_file", tmp_path / "again.jsonl")
    assert len(server.asked) == 6, "all were in the cache"
    assert f"{len(kept)} traces kept" in capsys.readouterr().out


def test_a_server_that_breaks_leaves_what_it_gave(phantom, tmp_path, monkeypatch, serve):
    """A server that was restarted without its model: after so many refusals in a row no more is
    asked, and nothing written."""
    monkeypatch.setattr("minigrpo.data.rewrite.MOST_FAILURES", 2)
    broken = True
    server = serve(lambda body: (400, {}) if broken and len(server.asked) > 3 else good(body))
    command = [
        phantom / "train.jsonl",
        "--teacher",
        server.address,
        "--model",
        "m",
        "--limit",
        7,
        "--workers",
        1,
        "--output_file",
        tmp_path / "think.jsonl",
    ]
    with pytest.raises(SystemExit, match="answered 400 .*2 questions in a row got no answer"):
        run(monkeypatch, *command)
    assert not (tmp_path / "think.jsonl").exists()
    broken, before = False, len(server.asked)
    run(monkeypatch, *command)
    assert len(server.asked) == before + 4, "three were kept"


def test_films_of_credentialed_sets_do_not_leave_the_machine(phantom, tmp_path, monkeypatch):
    """Not reports alone: a grounding sample's film and phrase are the set's, too."""
    lines = [
        json.loads(line) | {"source": "vindr"}
        for line in (phantom / "train.jsonl").read_text().splitlines()
    ]
    file = phantom / "closed.jsonl"
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["task"] == "grounding")
    )
    asked = []
    monkeypatch.setattr(
        cold_start.Endpoint, "chat", lambda self, *_, **__: asked.append(1) or ("", True)
    )
    command = [
        file,
        "--teacher",
        "https://models.example/v1",
        "--model",
        "m",
        "--limit",
        2,
        "--output_file",
        tmp_path / "o.jsonl",
    ]
    with pytest.raises(SystemExit, match="2 of vindr"):
        run(monkeypatch, *command)
    assert not asked and not (tmp_path / "o.jsonl").exists()
    run(monkeypatch, *command, "--allow_sending_reports")
    assert len(asked) == 2


def test_a_checkpoint_on_this_machine_is_a_teacher(policy, phantom, tmp_path, monkeypatch, capsys):
    """The untrained model's replies are refused, each for a reason, and are not generated twice."""
    policy.save_pretrained(tmp_path / "model")
    command = [
        phantom / "train.jsonl",
        "--teacher",
        "checkpoint",
        "--model",
        tmp_path / "model",
        "--limit",
        3,
        "--max_new_tokens",
        8,
        "--workers",
        2,
        "--cache",
        tmp_path / "cache.jsonl",
    ]
    run(monkeypatch, *command, "--traces_only", "--output_file", tmp_path / "a.jsonl")
    told = capsys.readouterr().out
    assert "3 samples asked, 0 traces kept" in told and any(
        f"3 {reason}" in told for reason in REASONS
    )
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 2, "a line a batch"
    from minigrpo import generate

    monkeypatch.setattr(generate, "generate", None)
    run(monkeypatch, *command, "--traces_only", "--output_file", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "extra, mend",
    [
        (["--teacher", "http://127.0.0.1:1/v1"], "needs --model"),
        (["--teacher", "checkpoint"], "needs --model"),
        (["--teacher", "somewhere", "--model", "m"], "write http://HOST:PORT/v1"),
        (["--teacher", "drawing", "--limit", 0], "--limit must be at least 1"),
        (["--teacher", "drawing", "--templates", "nowhere.yaml"], "no such file of templates"),
    ],
)
def test_bad_input_is_said_at_once(extra, mend, phantom, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=mend):
        run(monkeypatch, phantom / "train.jsonl", "--output_file", tmp_path / "o.jsonl", *extra)
    assert not list(tmp_path.iterdir())


def test_a_real_film_has_no_drawing_to_read(phantom, tmp_path, monkeypatch):
    line = json.loads((phantom / "train.jsonl").read_text().splitlines()[0])
    (phantom / "real.jsonl").write_text(
        json.dumps({k: v for k, v in line.items() if k != "findings"}) + "\n"
    )
    with pytest.raises(
        SystemExit, match="real.jsonl:1: no line about this image says what was drawn"
    ):
        run(
            monkeypatch,
            phantom / "real.jsonl",
            "--teacher",
            "drawing",
            "--output_file",
            tmp_path / "o.jsonl",
        )


@pytest.mark.parametrize(
    "text, mend",
    [("search: []", "lacks pin_down"), ("a: [", "is not YAML"), ("just words", "lacks search")],
)
def test_templates_say_what_they_lack(text, mend, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=mend):
        read_templates(tmp_path / "t.yaml")
