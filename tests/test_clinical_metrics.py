"""Clinical metrics joined from scorers, on small fakes of them: words stand for conditions and
entities.
"""

import json
import sys
import types

import numpy as np
import pytest

import evaluate
import minigrpo.rewards
from minigrpo.metrics import Clinical, breakdown, compare, evaluate_answers, interval, load_clinical
from minigrpo.metrics.clinical import CHEXBERT, REPORTED, chexbert_statistics
from tests.test_metrics import grounding, report

CONDITIONS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
WORDS = {name.lower().replace(" ", "_"): c for c, name in enumerate(CONDITIONS)}


class FakeCheXbert:
    """`pneumonia` is positive, `pneumonia?` uncertain, `-pneumonia` negative."""

    def labels(self, texts):
        rows = np.zeros((len(texts), 14), dtype=int)
        for row, text in zip(rows, texts):
            assert text, "an empty text reached the scorer"
            for word in text.split():
                row[WORDS[word.strip("-?")]] = 2 if word[0] == "-" else 3 if word[-1] == "?" else 1
        return rows

    def vectors(self, texts):
        return np.array([[1.0, len(text)] for text in texts])


class FakeRadGraph:
    def __init__(self):
        self.seen = []

    def annotate(self, texts):
        assert all(texts)
        self.seen += texts
        return [{"entities": set(text.split())} for text in texts]


class FakeBertScore:
    def __init__(self, model):
        self.model = model

    def score(self, hyps, refs):
        assert all(hyps)
        return [
            0.9 if self.model == REPORTED["model"] else 0.5 if hyp != "pneumonia" else float("nan")
            for hyp in hyps
        ]


def fake_f1(hyp, ref):
    f1 = 2 * len(hyp["entities"] & ref["entities"]) / (len(hyp["entities"]) + len(ref["entities"]))
    return {"simple": f1, "partial": f1 / 2, "complete": f1 / 4, "radcliq": f1 / 5}


@pytest.fixture
def scorers(monkeypatch):
    """minigrpo.rewards with fakes whose weights are a file each."""

    def loader(make, name):
        def from_weights(folder, *, device="cpu", model=name, layer=5, baseline=0.0):
            from pathlib import Path

            if not (Path(folder) / model).exists():
                raise ValueError(f"{model} is missing\nfetch it (416 MB)")
            return make(model)

        return types.SimpleNamespace(from_weights=from_weights)

    modules = {
        "radgraph": {
            "RadGraph": loader(lambda _: FakeRadGraph(), "radgraph-xl"),
            "radgraph_f1": fake_f1,
        },
        "chexbert": {
            "CheXbert": loader(lambda _: FakeCheXbert(), "chexbert.pth"),
            "CONDITIONS": CONDITIONS,
        },
        "bertscore": {"BertScore": loader(FakeBertScore, "distilroberta-base")},
    }
    for name, contents in modules.items():
        module = types.ModuleType(f"minigrpo.rewards.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        minigrpo.rewards,
        "radcliq_v1",
        lambda radgraph, bertscore, s_emb, bleu=0.0: (
            2.450143 - 1.245216 * radgraph - 1.650845 * bertscore - 0.994772 * s_emb
        ),
        raising=False,
    )


@pytest.fixture
def clinical(scorers):
    return Clinical(
        FakeRadGraph(),
        FakeCheXbert(),
        FakeBertScore(REPORTED["model"]),
        FakeBertScore("distilroberta-base"),
    )


def slow_f1(pairs, columns, macro):
    """F1 from lists of decisions, condition by condition."""

    def one(cs):
        both = [(c in a, c in b) for a, b in pairs for c in cs]
        hit, extra, missed = (
            both.count((True, True)),
            both.count((True, False)),
            both.count((False, True)),
        )
        return 2 * hit / (2 * hit + extra + missed) if hit + extra + missed else 0.0

    return np.mean([one([c]) for c in columns]) if macro else one(columns)


def test_chexbert_f1_equals_loops_and_their_resamples(scorers):
    rng = np.random.default_rng(0)
    names = list(WORDS)

    def text():
        return " ".join(
            str(rng.choice(["", "-"])) + str(name) + str(rng.choice(["", "?"]))
            for name in rng.choice(names[:13], rng.integers(1, 5), replace=False)
        )

    refs = [text() for _ in range(40)]
    hyps = [ref if rng.random() < 0.4 else text() if rng.random() < 0.9 else "" for ref in refs]

    # uncertain counts as present
    def there(t):
        return {WORDS[w.strip("?")] for w in t.split() if w[0] != "-"}

    pairs = [(there(a), there(b)) for a, b in zip(hyps, refs)]
    rows = chexbert_statistics(FakeCheXbert(), hyps, refs)
    five = [
        CONDITIONS.index(c)
        for c in ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
    ]
    drawn = np.random.default_rng(0).integers(0, 40, (2000, 40))[:50]
    for name, columns, macro in (
        ("chexbert_micro14", range(14), False),
        ("chexbert_macro14", range(14), True),
        ("chexbert_micro5", five, False),
        ("chexbert_macro5", five, True),
    ):
        wanted = slow_f1(pairs, columns, macro)
        assert (
            interval(rows, CHEXBERT[name])["mean"] == pytest.approx(wanted) and 0.1 < wanted < 0.9
        )
        for pick in drawn:
            sums = np.array(rows)[pick].sum(0)
            assert float(CHEXBERT[name](sums)) == pytest.approx(
                slow_f1([pairs[i] for i in pick], columns, macro)
            )


def test_clinical_scores_of_items(clinical):
    samples = [
        report(0, "pneumonia fracture"),
        report(1, "fracture"),
        report(2, "pneumonia"),
        grounding(3, [0.1, 0.1, 0.2, 0.2]),
    ]
    answers = ["pneumonia pneumonia?", "<think> fracture", "pneumonia", "[0.1, 0.1, 0.2, 0.2]"]
    results = evaluate_answers(samples, answers, clinical=clinical)
    first, empty, failed, boxes = results["items"]
    assert first["radgraph_simple"] == pytest.approx(2 / 4) and first[
        "radgraph_partial"
    ] == pytest.approx(1 / 4)
    assert first["bertscore"] == 0.9
    a, b = np.array([1.0, 20]), np.array([1.0, 18])
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert first["radcliq"] == pytest.approx(
        2.450143 - 1.245216 * 0.1 - 1.650845 * 0.5 - 0.994772 * cosine
    )
    # without a scorer
    assert (empty["radgraph_simple"], empty["bertscore"], empty["radcliq"]) == (
        0,
        pytest.approx(-1.996, abs=1e-3),
        3,
    )
    # NaN: the scorer's failure masks the item
    assert "radcliq" not in failed and failed["radgraph_simple"] == 1
    assert "radcliq" not in boxes and "chexbert" not in boxes
    assert results["report"]["radcliq"]["n"] == 2 and results["report"]["n"] == 3
    # each distinct text once
    assert len(clinical.radgraph.seen) == len(set(clinical.radgraph.seen))
    gains = compare(
        results["items"], evaluate_answers(samples, ["fracture"] * 4, clinical=clinical)["items"]
    )["report"]
    assert gains["radcliq"]["n"] == 2 and gains["chexbert_micro14"]["n"] == 3


def test_radcliq_reads_lower_case_and_2048_characters_and_nothing_else_does(clinical):
    clinical.chexbert.labels = lambda texts: np.zeros((len(texts), 14), dtype=int)
    pad = "x " * 1023 + "yz"  # 2,048 characters
    # of two texts that are the same to it
    equal = 2.450143 - 1.245216 / 5 - 1.650845 / 2 - 0.994772
    (shouted,) = clinical.score(["FRACTURE"], ["fracture"])
    assert shouted["radgraph_simple"] == 0 and shouted["radcliq"] == pytest.approx(equal)
    (cut,) = clinical.score([pad + " tail"], [pad + " end"])
    assert cut["radgraph_simple"] == pytest.approx(2 / 3) and cut["radcliq"] == pytest.approx(equal)


def test_radcliq_has_the_floor_of_its_reward(clinical):
    """The authors' reward gives at most five characters -3; nothing is worse than that."""
    clinical.chexbert.labels = lambda texts: np.zeros((len(texts), 14), dtype=int)
    clinical.radcliq_bertscore.score = lambda hyps, refs: [
        -2.0 if hyp == "nonsense" else 0.5 for hyp in hyps
    ]
    found = clinical.score(["no...", "no....", "nonsense"], ["no effusion"] * 3)
    assert found[0]["radcliq"] == found[2]["radcliq"] == 3 and 0 < found[1]["radcliq"] < 3


def test_missing_weights_are_said_in_a_line_each(scorers, tmp_path):
    for name in ("chexbert.pth", "distilroberta-base"):
        (tmp_path / name).touch()
    clinical, missing = load_clinical(str(tmp_path))
    assert (
        clinical.radgraph is None
        and clinical.bertscore is None
        and clinical.chexbert
        and clinical.radcliq_bertscore
    )
    assert missing == [
        "radgraph is left out: radgraph-xl is missing fetch it (416 MB)",
        "bertscore is left out: distilbert-base-uncased is missing fetch it (416 MB)",
    ]
    scores = clinical.score(["pneumonia", ""], ["pneumonia", "pneumonia"])
    assert [set(s) for s in scores] == [{"chexbert"}] * 2  # RadCliQ needs all three
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="the weights of none of the scorers.*radgraph-xl is missing"
    ):
        load_clinical(str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match="--reward_weights nowhere is not a folder: name the one with"
    ):
        load_clinical("nowhere")


def test_breakdown_by_condition(clinical):
    samples = [report(i, "pneumonia" if i % 2 else "fracture") for i in range(8)]
    items = evaluate_answers(samples, ["pneumonia"] * 8, clinical=clinical)["items"]
    found = breakdown(samples, items)["report"]["finding"]
    assert found["Pneumonia"]["n"] == 4 and found["Pneumonia"]["chexbert_f1"][
        "mean"
    ] == pytest.approx(2 * 4 / (8 + 4))
    assert found["Fracture"]["n"] == 4 and found["Fracture"]["chexbert_f1"]["mean"] == 0
    assert found["Edema"] == {"n": 0, "chexbert_f1": {"mean": 0, "low": 0, "high": 0, "n": 8}}


@pytest.fixture
def stored(scorers, tmp_path, monkeypatch):
    """Six stored answers, all weights, and the command line that scores them into `out`."""
    rows = [
        {
            "id": str(i),
            "image": None,
            "task": "report",
            "question": "Report.",
            "answer": ["pneumonia", "fracture"][i % 2],
        }
        for i in range(6)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stored = [{"id": str(i), "answer": "pneumonia fracture"} for i in range(6)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, stored)))
    (tmp_path / "weights").mkdir()
    for name in ("chexbert.pth", "distilroberta-base", "radgraph-xl", "distilbert-base-uncased"):
        (tmp_path / "weights" / name).touch()
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--predictions",
            str(tmp_path / "predictions.jsonl"),
            "--data",
            str(tmp_path / "test.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
            "--reward_weights",
            str(tmp_path / "weights"),
            "--published",
        ],
    )


def test_stored_predictions_get_clinical_metrics_without_a_model(stored, tmp_path):
    evaluate.main()
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["not_computed"] == [] and metrics["tasks"]["report"]["radgraph_simple"][
        "mean"
    ] == pytest.approx(2 / 3)
    assert metrics["tasks"]["report"]["chexbert_micro14"]["mean"] == pytest.approx(2 * 6 / (12 + 6))
    table = (tmp_path / "out/table.md").read_text()
    radcliq, f1 = (
        metrics["tasks"]["report"][name]["mean"] for name in ("radcliq", "radgraph_partial")
    )
    # Table 1's order
    assert (
        f"| 90.0 | 66.7 | {100 * 2 * 2 / 3 / 14:.1f} | {100 * f1:.1f} | - | {radcliq:.2f} |"
        in table
    )
    page = (tmp_path / "out/report.html").read_text()
    assert "agreed Pneumonia" in page and "</mark> Fracture</p>" in page


def test_answers_outlive_a_scorer_that_fails(stored, tmp_path, monkeypatch):
    def fail(self, texts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeRadGraph, "annotate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate.main()
    rows = list(map(json.loads, (tmp_path / "out/predictions.jsonl").read_text().splitlines()))
    assert [row["answer"] for row in rows] == ["pneumonia fracture"] * 6
