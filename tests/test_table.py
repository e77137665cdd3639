"""table.md and the breakdown behind it; evaluate.py's way with stored answers."""

import json
import re
import sys

import pytest

import evaluate
from minigrpo.metrics import breakdown, evaluate_answers, markdown_table
from minigrpo.metrics.published import GROUNDING, OURS, REPORTS, REWARDS, TABLE_1, TABLE_2, TABLE_3
from tests.test_metrics import HEART, grounding, report

TEXT = "[0.3, 0.4, 0.7, 0.8]"


def some():
    """(samples, answers): anatomy always found, abnormality half the time, MS-CXR phrases never; a
    label of nine items.
    """
    samples = [
        grounding(f"a{i}", HEART, kind="anatomy", label="heart", source="chest-imagenome")
        for i in range(10)
    ]
    samples += [
        grounding(f"b{i}", HEART, kind="abnormality", label="mass | nodule", source="VinDr-CXR")
        for i in range(10)
    ]
    samples += [
        grounding(f"p{i}", HEART, kind="phrase", label=f"phrase {i}", source="ms_cxr")
        for i in range(11)
    ]
    samples += [grounding(f"n{i}", HEART, kind="other", label="nine") for i in range(9)]
    answers = [TEXT] * 10 + [TEXT, "none"] * 5 + ["none"] * 11 + [TEXT] * 9
    return samples, answers


def page(samples, answers):
    results = evaluate_answers(samples, answers)
    items = results.pop("items")
    metrics = {
        "model": "m",
        "data": "d",
        "tasks": results,
        "breakdown": breakdown(samples, items),
        "not_computed": ["radgraph: gone"],
    }
    return json.loads(json.dumps(metrics)), markdown_table(metrics, published=True)


def test_breakdown_by_kind_label_and_source():
    samples, answers = some()
    metrics, table = page(samples, answers)
    found = metrics["breakdown"]["grounding"]
    # nine items are too few for a row
    assert set(found["kind"]) == {"anatomy", "abnormality", "phrase"}
    assert set(found["label"]) == {"heart", "mass | nodule"} and set(found["source"]) == {
        "chest-imagenome",
        "VinDr-CXR",
        "ms_cxr",
    }
    assert [found["kind"][k]["map50"]["mean"] for k in ("anatomy", "abnormality", "phrase")] == [
        1,
        0.5,
        0,
    ]
    subset = [(s, a) for s, a in zip(samples, answers) if s.kind == "abnormality"]
    assert found["kind"]["abnormality"] == json.loads(
        json.dumps(evaluate_answers(*map(list, zip(*subset)))["grounding"])
    )
    assert "Not computed: radgraph: gone" in table


def test_every_row_of_a_table_has_its_columns():
    """A bar in a label would have begun a column."""
    table = page(*some())[1]
    for block in re.findall(r"(?:^\|.*\n)+", table, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert r"| mass \| nodule | 10 |" in table


def test_paper_tables_mark_whose_rows_they_are():
    table = page(*some())[1]
    # anatomy, abnormality, MS-CXR, no PadChest-GR
    assert "| **`m`** (ours) | 100.0 | 50.0 | 0.0 | - |" in table
    assert (
        "| RadVLM+RL (*theirs*) | 84.5 | 45.9 | 87.9 | 63.0 |" in table and "Table 1" not in table
    )
    table = page([report(0, "the heart is large")], ["the heart is large"])[1]
    assert (
        "| **`m`** (ours) | 100.0 | - | - | - | - | - | - |" in table
        and "| **`m`** (ours) | 100.0 | - | - | - | - | 18 |" in table
    )
    assert (
        "| RadGraph complete (*theirs*) | 22.8 | 34.1 | 20.1 | 23.5 | 1.20 | 93 |" in table
        and "Table 2" not in table
    )
    assert "| MAIRA-2 (*theirs*) | 17.7 | 46.6 | 52.1 | - | 12.9 | 21.3 | 1.42 |" in table


def test_the_paper_s_figures_stand_there_on_request_alone(files, tmp_path):
    """Bug: every table.md had them, so that a score on our drawn films stood in bold among
    published ones, and read like a claim."""
    folder, run = files
    for arguments, there in (((), False), (("--published",), True)):
        run("--predictions", folder / "old", *arguments)
        table = max(
            folder.glob("out*/table.md"), key=lambda path: path.stat().st_mtime_ns
        ).read_text()
        for text in ("*theirs*", "As in the paper", "RadVLM+RL"):
            assert (text in table) is there


@pytest.mark.parametrize("source", ["phantom", "scenes"])
def test_never_beside_drawn_films(files, source):
    """Whether all or one of them is drawn."""
    folder, run = files
    first, second = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text(
        json.dumps(json.loads(first) | {"source": source}) + "\n" + second
    )
    with pytest.raises(
        SystemExit,
        match="--published: 1 of the samples are drawn .phantom, scenes., and the "
        "paper's figures are for real films",
    ):
        run("--predictions", folder / "old", "--published")
    assert not list(folder.glob("out*"))


def test_published_rows_fit_their_heads():
    for heads, rows in ((REPORTS, TABLE_1), (GROUNDING, TABLE_2), (REWARDS, TABLE_3)):
        assert all(len(values) == len(heads) for values in rows.values())
    assert set(OURS) == set(REPORTS + REWARDS) - {"GREEN"}
    shared = [
        TABLE_1["RadVLM (SFT)"][REPORTS.index(h)]
        for h in ("ROUGE-L", "CheXbert micro", "RadGraph F1", "GREEN", "RadCliQ")
    ]
    assert shared == list(TABLE_3["none (SFT)"][:5])  # the same model in two tables


@pytest.fixture
def files(tmp_path, monkeypatch):
    """run(*arguments) of evaluate.main on two grounding samples, answers stored in a folder `old`,
    in 0..1000.
    """
    rows = [
        {
            "id": i,
            "image": None,
            "task": "grounding",
            "question": "Where?",
            "answer": TEXT,
            "boxes": [HEART],
        }
        for i in "ab"
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "old").mkdir()
    lines = [{"id": i, "answer": "hm</think>[300, 400, 700, 800] \u2028"} for i in "bca"]
    (tmp_path / "old/predictions.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    )
    (tmp_path / "old/metrics.json").write_text(
        '{"model": "qwen", "template_opens_think": true, "box_scale": 1000.0}'
    )

    def run(*arguments):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evaluate.py",
                "--data",
                str(tmp_path / "test.jsonl"),
                "--output_dir",
                str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"),
                *map(str, arguments),
            ],
        )
        evaluate.main()
        return json.loads((tmp_path / sys.argv[4] / "metrics.json").read_text())

    return tmp_path, run


def test_stored_answers_are_read_as_they_were_written(files):
    folder, run = files
    metrics = run("--predictions", folder / "old", "--baseline", folder / "old")
    assert (
        metrics["tasks"]["grounding"]["soft_f1"]["mean"] == 1
        and metrics["tasks"]["grounding"]["think_format"]["mean"] == 1
    )
    assert (metrics["model"], metrics["template_opens_think"], metrics["box_scale"]) == (
        "qwen",
        True,
        1000,
    )
    # the baseline is read by its own settings too
    assert metrics["difference"]["grounding"]["soft_f1"]["difference"] == 0
    # bug: boxes without a film to draw them on ended the program
    assert not list(folder.glob("out*/samples.png"))
    metrics = run("--predictions", folder / "old/predictions.jsonl", "--box_scale", 1)
    assert metrics["tasks"]["grounding"]["soft_f1"]["mean"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --model, to answer the questions, or --predictions"),
        (
            ["--model", "x", "--predictions", "old"],
            "either --model, to answer the questions, or --predictions",
        ),
        (
            ["--predictions", "old", "--box_scale", "0"],
            "--box_scale must be above 0, got 0.0: 1 for fractions, 1000",
        ),
        (["--predictions", "old", "--report_items", "-1"], "--report_items must not be negative"),
        (
            ["--predictions", "nowhere"],
            "--predictions nowhere is not an evaluation: it has no predictions.jsonl",
        ),
        (
            ["--predictions", "old", "--baseline", "nowhere"],
            "--baseline nowhere is not an evaluation",
        ),
        (
            ["--predictions", "old", "--reward_weights", "nowhere"],
            "--reward_weights nowhere is not a folder",
        ),
        (
            ["--predictions", "bad"],
            "predictions.jsonl:2: not a prediction: a line is an object with the texts id and"
            " answer",
        ),
        (
            ["--predictions", "short"],
            "--predictions short has no answer for 1 of the samples, such as b",
        ),
    ],
)
def test_wrong_arguments_say_what_to_do(files, monkeypatch, arguments, message):
    folder, run = files
    monkeypatch.chdir(folder)
    for name, second in (("bad", '{"id": "b", "answer": null}'), ("short", "")):
        (folder / name).mkdir()
        (folder / name / "predictions.jsonl").write_text('{"id": "a", "answer": "x"}\n' + second)
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(*arguments)
