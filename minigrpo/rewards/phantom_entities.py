"""RadGraph's F1 on phantom reports: they use few words, so rules can find what the network finds in
real ones, without its weights.

    --reward minigrpo.rewards.phantom_entities:complete        or :partial, :simple

`annotate` gives RadGraph's annotation of a text, and `radgraph_f1` compares two of them. For real
reports use RadGraph itself; words that are not in the lists below are not entities here.
"""

import re

from ..data.boxes import split_thinking
from ..data.sample import Sample
from .radgraph import radgraph_f1

LEVELS = ("simple", "partial", "complete")
PRESENT, ABSENT, ANATOMY = "OBS-DP", "OBS-DA", "ANAT-DP"
HEADS = set(
    """
        cardiomegaly consolidation nodule nodules atelectasis effusion effusions pneumothorax
        pacemaker tube tubes lines devices tip clear normal enlarged intact blunted intubated
        ratio lead size limits
    """.split()
)
MODIFIERS = set(
    """
        small medium-sized large mild moderate severe extensive linear mildly moderately severely
        bilateral two three endotracheal nasogastric gastric support cardiothoracic
    """.split()
)
PLACES = set(
    """
        heart lungs pleural cardiac silhouette zone chest carina stomach bones costophrenic angle
        airway diaphragm right left upper mid lower sides
    """.split()
)
DENIALS = {"no", "not", "without"}


def annotate(text: str) -> dict:
    """{"text", "entities": {"1": {"tokens", "label", "start_ix", "end_ix", "relations": [[type,
    id], ...]}}}, words counted from 0.

    A run of places is one region: its last word is modified by those before it. Modifiers modify
        the next observation. That is located at the region right before it ("left pneumothorax"),
        at the next one ("nodule in the left upper zone"), or else at the last one ("the heart is
        enlarged"). After a denial, the observations of the sentence are absent.
    """
    words, entities, first = re.findall(r"[\w-]+|[^\w\s]", text.lower()), {}, 0
    for end in [i for i, word in enumerate(words) if word == "."] + [len(words)]:
        _sentence(words, first, end, entities)
        first = end + 1
    return {"text": " ".join(words), "entities": entities}


def _sentence(words: list[str], first: int, end: int, entities: dict) -> None:
    """Adds the entities of words[first:end] in place."""
    ids: dict[int, str] = {}
    denied = next((i for i in range(first, end) if words[i] in DENIALS), end)
    for i in range(first, end):
        if words[i] in HEADS | MODIFIERS | PLACES:
            ids[i] = str(len(entities) + 1)
            label = ANATOMY if words[i] in PLACES else ABSENT if i > denied else PRESENT
            entities[ids[i]] = {
                "tokens": words[i],
                "label": label,
                "start_ix": i,
                "end_ix": i,
                "relations": [],
            }
    heads = [i for i in ids if words[i] in HEADS]
    # last words of runs
    regions = [
        i for i in ids if words[i] in PLACES and not (i + 1 in ids and words[i + 1] in PLACES)
    ]

    def relate(i: int, kind: str, to: int | None) -> None:
        if to is not None:
            entities[ids[i]]["relations"].append([kind, ids[to]])

    for i in ids:
        if words[i] in MODIFIERS:
            relate(i, "modify", next((head for head in heads if head > i), None))
        elif words[i] in PLACES and i not in regions:
            relate(i, "modify", next(region for region in regions if region > i))
        elif words[i] in HEADS:
            limit = next((head for head in heads if head > i), end)
            after = next((r for r in regions if i < r < limit and r + 1 not in heads), None)
            before = next((r for r in reversed(regions) if r < i), None)
            relate(i, "located_at", before if i - 1 in regions or after is None else after)


def entity_f1(hypothesis: str, reference: str) -> dict[str, float]:
    """{"simple", "partial", "complete"}: RadGraph's F1 of two phantom reports, each in 0..1; 0
    where either has no entity.
    """
    scores = radgraph_f1(annotate(hypothesis), annotate(reference))
    return {level: scores[level] for level in LEVELS}


def _reward(level: str, answers: list[str], samples: list[Sample]) -> list[float]:
    """Range 0..1, floor 0, also for a broken think block."""
    texts = [answer if ok else "" for _, answer, ok in map(split_thinking, answers)]
    return [
        entity_f1(text, sample.answer)[level] for text, sample in zip(texts, samples, strict=True)
    ]


def simple(answers: list[str], samples: list[Sample]) -> list[float]:
    return _reward("simple", answers, samples)


def partial(answers: list[str], samples: list[Sample]) -> list[float]:
    return _reward("partial", answers, samples)


def complete(answers: list[str], samples: list[Sample]) -> list[float]:
    return _reward("complete", answers, samples)
