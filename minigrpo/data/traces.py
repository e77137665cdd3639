"""Traces of thought: the templates of reasoning, the filters that every trace passes, and traces
read off a drawing.
"""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from .boxes import split_thinking
from .rewrite import unusable
from .sample import Sample
from .scenes import named, place_of, where

TEMPLATES = Path(__file__).with_name("reasoning.yaml")
NEEDED = ("search", "pin_down", "system", "user", "leaks", "words", "drawn")
# Why a reply is refused, in the order in which it is looked at.
REASONS = (
    "cut off",
    "no block",
    "not exactly one closed block",
    "answer changed",
    "too short",
    "too long",
    "leaks the answer",
    "copies the answer",
    "holds a mark",
)


def read_templates(path: Path = TEMPLATES) -> dict:
    """The templates of a file, those of `leaks` compiled."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of templates") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    missing = [name for name in NEEDED if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: see {TEMPLATES.name} for the form")
    try:
        return content | {"leaks": [re.compile(leak, re.IGNORECASE) for leak in content["leaks"]]}
    except re.error as error:
        raise ValueError(f"{path}: a pattern of leaks is not valid ({error})") from None


def messages_for(sample: Sample, templates: dict) -> tuple[str, str]:
    """(what the teacher is, what it is asked) for one sample."""
    search = "\n".join(f"- {step['system']}: {step['look']}" for step in templates["search"])
    pin_down = "; ".join(
        f"{name} ({how})" for step in templates["pin_down"] for name, how in step.items()
    )
    text = templates["user"][sample.task].format(
        question=sample.question, answer=sample.answer, search=search, pin_down=pin_down
    )
    return templates["system"].strip(), text.strip()


def check_reply(reply: str, whole: bool, sample: Sample, templates: dict) -> tuple[str, str]:
    """(trace, "") where the reply may be learned from, otherwise ("", the reason of `REASONS`)."""
    thinking, answer, ok = split_thinking(reply)

    def plain(text):
        return " ".join(text.split())

    words, bounds = len(thinking.split()), templates["words"]
    refused = (
        not whole,
        not thinking,
        not ok,
        plain(answer) != plain(sample.answer),
        words < bounds["least"],
        words > bounds["most"],
        any(leak.search(thinking) for leak in templates["leaks"]),
        plain(sample.answer) in plain(thinking),
        unusable(sample.answer, thinking) is not None,
    )
    reason = next((reason for reason, holds in zip(REASONS, refused, strict=True) if holds), "")
    return ("" if reason else thinking, reason)


# ---- a teacher that reads the drawing ------------------------------------------------------------


def drawn_trace(sample: Sample, drawn: list[dict], templates: dict) -> str:
    """What is to be seen on a drawn film or scene, in the order of a search; `drawn` is the list of
    what was drawn on it.
    """
    words = templates["drawn"]
    if sample.source == "scenes":
        return "; ".join(f"{place_of(f)}, {named(f)}" for f in drawn) + "."
    if sample.task == "grounding" and sample.label != "all findings":
        spots = [
            words["box"].format(label=sample.label, size=size_of(box, words), where=where(box))
            for box in sample.boxes
        ]
        number = words["count"].get(len(spots), len(spots))
        return ". ".join([f"{number} to find", *spots]) + "."
    steps = []
    for step in templates["search"]:
        phrases = [finding_words(f, drawn, words) for f in drawn if f["label"] in step["labels"]]
        if phrases or sample.task != "grounding":  # asked for boxes, one passes over what is clear
            steps.append(f"{step['system']}: {', '.join(phrases) or step['clear']}.")
    return " ".join(steps)


def finding_words(finding: dict, drawn: list[dict], words: dict) -> str:
    """One finding with its side and zone, compared with the other side."""
    text = words["finding"].format(
        severity=finding["severity"] or "", label=finding["label"], place=finding["zone"] or ""
    )
    side = finding["side"]
    if side:
        other = {"right": "left", "left": "right"}[side]
        both = any(f["label"] == finding["label"] and f["side"] == other for f in drawn)
        text = (
            f"{text.strip()} {side}"
            if both
            else words["one_side"].format(label=text.strip(), side=side, other=other)
        )
    return " ".join(text.split())


def size_of(box: list[float], words: dict) -> str:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return next(name for name, most in words["sizes"].items() if area <= most)


def drawing_teacher(samples: list[Sample], templates: dict) -> Callable[[Sample], tuple[str, bool]]:
    """callable(sample) -> (reply, True) of drawn films and scenes; the drawing is noted on one line
    about each image.
    """
    drawn = {
        sample.images[0]: sample.findings
        for sample in samples
        if sample.images and sample.findings is not None
    }

    def teach(sample: Sample) -> tuple[str, bool]:
        if not sample.images or sample.images[0] not in drawn:
            raise ValueError(
                f"{sample.file}:{sample.line}: no line about this image says what was drawn:"
                " --teacher drawing is for phantom films and drawn scenes"
            )
        trace = drawn_trace(sample, drawn[sample.images[0]], templates)
        return (f"<think>\n{trace}\n</think>\n\n{sample.answer}", True)

    return teach
