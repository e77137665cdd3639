"""What a report of a drawn film says, against the drawing."""

from dataclasses import replace

import numpy as np
import pytest

from minigrpo.data import Sample
from minigrpo.data.phantom import draw_film, report
from minigrpo.metrics import breakdown, evaluate_answers
from minigrpo.metrics.drawn import (
    LABELS,
    drawn_findings,
    drawn_scores,
    finding_statistics,
    named_findings,
    positive_predictive_value,
    sensitivity,
)
from minigrpo.metrics.items import score_item


@pytest.mark.parametrize(
    "text, stated",
    [
        ("There is mild cardiomegaly.", {("cardiomegaly", None)}),
        ("The heart is not enlarged. The heart size is normal.", set()),
        ("The cardiac silhouette is mildly enlarged.", {("cardiomegaly", None)}),
        ("A small left pleural effusion is seen.", {("pleural effusion", "left")}),
        (
            "There are small bilateral pleural effusions.",
            {("pleural effusion", "left"), ("pleural effusion", "right")},
        ),
        (
            "There is a small right pleural effusion and a large left pleural effusion.",
            {("pleural effusion", "left"), ("pleural effusion", "right")},
        ),
        ("There is no pneumothorax or effusion.", set()),
        (
            (
                "Two small nodules in the right upper zone and a large nodule in the left lower"
                " zone are seen."
            ),
            {("nodule", "right"), ("nodule", "left")},
        ),
        (
            "There is an endotracheal tube with its tip above the carina.",
            {("endotracheal tube", None)},
        ),
        ("Airway is intubated. Gastric tube crosses the diaphragm.", set()),
        ("A pacemaker over the left chest is present.", {("pacemaker", "left")}),
        ("Severe consolidation", {("consolidation", None)}),  # cut off before its place
        ("", set()),
    ],
)
def test_findings_named_in_words(text, stated):
    assert named_findings(text) == stated


def test_the_writer_s_own_reports_name_what_was_drawn():
    """600 reports in all phrasings: each states every finding of its film and no other."""
    rng, labels = np.random.default_rng(5), set()
    for index in range(200):
        film = draw_film(3, 0, index, 64)
        facts = [{k: v for k, v in vars(f).items() if k != "mask"} for f in film.findings]
        sample = Sample("a", None, "report", "?", "x", source="phantom", findings=facts)
        labels |= {label for label, _ in drawn_findings(sample)}
        for _ in range(3):
            text = " ".join(statement.text for statement in report(film.findings, rng))
            assert named_findings(text) == drawn_findings(sample), text
    assert labels == set(LABELS)


def sample_with(*findings, answer="There is a small left pleural effusion."):
    facts = [{"label": label, "side": side} for label, side in findings]
    return Sample("a", None, "report", "?", answer, source="phantom", findings=facts)


def test_named_missed_invented():
    sample = sample_with(("pleural effusion", "left"), ("cardiomegaly", None), ("nodule", "left"))
    text = "There is a small right pleural effusion. There is mild cardiomegaly."
    scores = drawn_scores(text, sample)
    counts = [scores[f"findings_{name}"] for name in ("named", "missed", "invented")]
    assert counts == [1, 2, 1], "the effusion's side is the other: one missed, one invented"
    row = dict(zip(LABELS, np.array(scores["drawn"]).reshape(-1, 3).tolist()))
    assert row["cardiomegaly"] == [1, 0, 0] and row["pleural effusion"] == [0, 1, 1]
    assert row["nodule"] == [0, 1, 0] and not any(map(sum, [row["pneumothorax"]]))
    assert sensitivity(np.array(scores["drawn"])) == pytest.approx(1 / 3)
    assert positive_predictive_value(np.array(scores["drawn"])) == pytest.approx(1 / 2)


def test_nothing_stated_and_nothing_there():
    row = np.array(finding_statistics(set(), set()))
    assert sensitivity(row) == positive_predictive_value(row) == 0.0


def test_only_the_reports_of_drawn_films_have_these_scores():
    sample = sample_with(("nodule", "left"))
    assert "entity_f1" in score_item(sample, "A nodule.")
    for other in (
        replace(sample, source="openi"),
        replace(sample, findings=None),
        replace(sample, task="classification"),
    ):
        assert not {"entity_f1", "drawn"} & set(score_item(other, "A nodule."))


def test_corpus_figures_are_of_sums_and_the_breakdown_is_by_finding():
    """Two films: 3 of 4 drawn findings named, 1 of 4 named findings not drawn."""
    first = sample_with(("nodule", "left"), ("nodule", "right"), ("cardiomegaly", None))
    second = replace(sample_with(("pneumothorax", "left")), id="b")
    answers = [
        "There is a small nodule in the left upper zone. The heart is mildly enlarged.",
        "There is a small left pneumothorax and a small right pneumothorax.",
    ]
    results = evaluate_answers([first, second], answers)
    report_figures = results["report"]
    assert report_figures["finding_sensitivity"]["mean"] == pytest.approx(3 / 4)
    assert report_figures["finding_ppv"]["mean"] == pytest.approx(3 / 4)
    assert report_figures["findings_missed"]["mean"] == pytest.approx(1 / 2)
    by_label = breakdown([first, second], results["items"])["report"]["drawn_finding"]
    assert list(by_label) == ["cardiomegaly", "nodule", "pneumothorax"]
    assert by_label["nodule"]["n"] == 2
    assert by_label["nodule"]["finding_sensitivity"]["mean"] == pytest.approx(1 / 2)
    assert by_label["nodule"]["finding_ppv"]["mean"] == pytest.approx(1.0)
    assert by_label["pneumothorax"]["finding_ppv"]["mean"] == pytest.approx(1 / 2)
