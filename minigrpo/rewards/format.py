"""Whether an answer has the required form, whatever it says."""

from ..data.boxes import CLOSE, parse_boxes, split_thinking
from ..data.sample import Sample
from ..data.thinking import asks_to_think


def well_formed(answer: str, sample: Sample, template_opens_think: bool, box_scale: float) -> bool:
    """One closed think block where the question asks for it (` /think` at its end, or a template
    that opens the block), none or one elsewhere; a text after it; and for grounding at least one
    box inside the image, or no box where there is nothing to find.
    """
    _, text, ok = split_thinking(answer, template_opens_think)
    if (template_opens_think or asks_to_think(sample.question)) and CLOSE not in answer:
        return False
    if sample.task == "grounding":
        inside = [
            0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            for x1, y1, x2, y2 in parse_boxes(text, box_scale)
        ]
        return ok and (any(inside) if sample.boxes else bool(text) and not inside)
    return ok and bool(text)


def format_reward(
    answers: list[str], samples: list[Sample], template_opens_think: bool, box_scale: float
) -> list[float]:
    """`well_formed` as 0 or 1, floor 0; `answers` as the model wrote them. Source: the format
    reward of DeepSeek-R1 (2501.12948). Not in the paper. Every answer of a trained model gets 1, so
    it soon teaches nothing.
    """
    return [
        float(well_formed(answer, sample, template_opens_think, box_scale))
        for answer, sample in zip(answers, samples, strict=True)
    ]
