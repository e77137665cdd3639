"""RadGraph's format and F1 on phantom reports, by rules."""

import json
import re

import pytest
from radgraph.rewards import compute_reward

from minigrpo.data import Sample
from minigrpo.rewards import reward_fn
from minigrpo.rewards.phantom_entities import (
    HEADS,
    MODIFIERS,
    PLACES,
    annotate,
    complete,
    entity_f1,
)

SPEC = "report=minigrpo.rewards.phantom_entities:complete"


def links(text):
    """[(word, label, [(type, word), ...])]."""
    entities = annotate(text)["entities"]
    return [
        (e["tokens"], e["label"], [(kind, entities[to]["tokens"]) for kind, to in e["relations"]])
        for e in entities.values()
    ]


def test_places_modifiers_and_findings():
    assert links("There is a small right pleural effusion.") == [
        ("small", "OBS-DP", [("modify", "effusion")]),
        ("right", "ANAT-DP", [("modify", "pleural")]),
        ("pleural", "ANAT-DP", []),
        ("effusion", "OBS-DP", [("located_at", "pleural")]),
    ]
    assert ("nodule", "OBS-DP", [("located_at", "zone")]) in links(
        "There is a large nodule in the left upper zone."
    )
    assert ("enlarged", "OBS-DP", [("located_at", "heart")]) in links(
        "The heart is mildly enlarged."
    )


def test_a_denial_reaches_to_the_end_of_its_sentence_only():
    found = {
        word: label
        for word, label, _ in links(
            "There is no pleural effusion or pneumothorax. There is mild cardiomegaly."
        )
    }
    assert (
        found["effusion"] == found["pneumothorax"] == "OBS-DA"
        and found["cardiomegaly"] == found["mild"] == "OBS-DP"
    )


def test_the_format_is_radgraphs(samples):
    for s in samples:
        if s.task == "report":
            found = annotate(s.answer)
            words = found["text"].split()
            for number, entity in found["entities"].items():
                assert (
                    words[entity["start_ix"]] == entity["tokens"]
                    and entity["start_ix"] == entity["end_ix"]
                    and number.isdigit()
                )
                assert all(
                    kind in ("modify", "located_at") and to in found["entities"]
                    for kind, to in entity["relations"]
                )


def test_every_level_is_the_packages_own(samples):
    reports = [s.answer for s in samples if s.task == "report"]
    for a, b in zip(reports, reports[1:]):
        simple, partial, full = compute_reward(annotate(a), annotate(b), "all")
        assert entity_f1(a, b) == pytest.approx(
            {"simple": simple, "partial": partial, "complete": full}, abs=1e-12
        )
        assert entity_f1(a, a) == {"simple": 1.0, "partial": 1.0, "complete": 1.0}


@pytest.mark.parametrize(
    "hypothesis, level",
    [
        ("There is a small left pleural effusion.", "complete"),  # the other side
        ("There is a large right pleural effusion.", "complete"),  # the other size
        ("There is no right pleural effusion.", "simple"),
        ("There is a red ball at the top.", "simple"),
        ("", "simple"),
    ],
)
def test_a_wrong_report_scores_less(hypothesis, level):
    assert entity_f1(hypothesis, "There is a small right pleural effusion.")[level] < 0.9


def test_all_words_of_the_phantoms_reports_are_known_or_plain(samples):
    """A new finding must enter the lists, or the reward is blind to it."""
    plain = set(
        """
            a an the is are there and or with its in on over of above both one half exceeds ends
            crosses seen noted present within it no not without
        """.split()
    )
    words = {
        word
        for s in samples
        if s.task == "report"
        for word in re.findall(r"[\w-]+", s.answer.lower())
    }
    assert words - HEADS - MODIFIERS - PLACES - plain == set()


def test_the_reward_reads_the_answer_behind_the_thinking_alone():
    sample = Sample("a", None, "report", "?", "The heart is enlarged.")
    right = "<think>left pneumothorax</think>The heart is enlarged."
    assert complete(
        [right, "<think>The heart is enlarged.", "The heart is enlarged."], [sample] * 3
    ) == [1.0, 0.0, 1.0]
    mixed = reward_fn(f"report=0.5*gleu+0.5*{SPEC.partition('=')[2]}")([right], [sample])
    assert mixed.values == [1.0] and len(mixed.parts) == 2 and json.dumps(mixed.parts)
