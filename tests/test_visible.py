"""What a terminal would obey, in a model's answer or name, in a label, in a file's error: it is
shown written out."""

import io
import json
import sys

import pytest

import evaluate
from minigrpo.metrics import markdown_table
from minigrpo.run.args import input_errors
from minigrpo.run.terminal import Steady
from minigrpo.visible import visible

HARM = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\r\u202egpj.exe\x00\x7f\u2028"


def test_what_is_shown():
    harm = "\x1b[31mred\x9b0m\x07\r\x00\x7f\u202e\u2066\u2028\ud800"
    assert visible(harm) == r"\x1b[31mred\x9b0m\x07\r\x00\x7f\u202e\u2066\u2028\ud800"
    for plain in (
        "",
        "Zwerchfell: 3 cm², 心臓, עברית \u200f, \u200d, \U0001fac1",
        "a\tb\nc",
        r"\x1b stays",
    ):
        assert visible(plain) == plain


def test_a_stream_shows_what_it_is_given_and_a_bar_may_go_back():
    seen = io.StringIO()
    steady = Steady(seen)
    print(f"answer {HARM}.", file=steady)
    steady.write("\r 50%|#####")
    steady.write("\r")
    assert seen.getvalue() == f"answer {visible(HARM)}.\n\r 50%|#####\r"
    assert steady.write("\x1b") == 1


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """Stored answers of a model, a label and a source with such names, evaluated: (the folder, what
    was printed)."""
    rows = [
        {
            "id": str(i),
            "image": None,
            "task": "report",
            "question": "Report.",
            "answer": "The heart is large.",
            "label": "mass" + "\x1b[31m",
            "source": "ward\x9b",
        }
        for i in range(12)
    ]
    rows += [row | {"id": f"{row['id']}-other", "label": "none"} for row in rows]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "old").mkdir()
    answers = [{"id": row["id"], "answer": "The heart" + HARM} for row in rows]
    (tmp_path / "old/predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
    (tmp_path / "old/metrics.json").write_text(json.dumps({"model": "m\x1b]0;owned\x07\n| x"}))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--data",
            str(tmp_path / "test.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
            "--predictions",
            str(tmp_path / "old"),
        ],
    )
    evaluate.main()
    return tmp_path / "out", capsys.readouterr().out


def test_nothing_of_an_evaluation_commands_a_terminal(evaluated):
    """Bug: an ESC in a model's name or in a label went to the terminal, to table.md and to
    report.html."""
    folder, printed = evaluated
    table = (folder / "table.md").read_text()
    assert r"Model `m\x1b]0;owned\x07 | x` on" in table and r"| mass\x1b[31m | 12 |" in table
    for text in (
        printed,
        table,
        (folder / "report.html").read_text(),
        (folder / "predictions.jsonl").read_text(),
        (folder / "metrics.json").read_text(),
    ):
        assert text == visible(text) and len(text) > 100


def test_an_error_commands_no_terminal(monkeypatch, capsys):
    """As the interpreter prints it: through sys.stderr."""
    monkeypatch.setattr(sys, "stderr", Steady(sys.stderr))
    with pytest.raises(SystemExit) as ended, input_errors():
        raise ValueError(f"no such task {HARM}")
    print(ended.value, file=sys.stderr)
    assert visible(HARM) in (said := capsys.readouterr().err) and "\x1b" not in said


def test_the_table_of_a_page(tmp_path):
    """Names with line breaks begin no line of their own."""
    page = markdown_table(
        {
            "model": "a\n\n# b",
            "data": "d\r\x1b",
            "baseline": "c\n",
            "tasks": {},
            "not_computed": ["x\n# y\x1b"],
        }
    )
    assert page == (
        "Model `a # b` on `d \\x1b`, greedy, 95% bootstrap intervals. Gain: paired "
        "difference to `c`.\n\nNot computed: x # y\\x1b\n"
    )
