"""Compares the boxes in an answer with the true ones: whether they are the same, and if not, in
which form they may be written.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from .boxes import Box, format_boxes, parse_boxes, split_thinking

# how far rounding takes a number of two decimals or more (cut off at worst), and of one
ROUNDED, COARSE = 0.01, 0.05
MOST_PAIRED = 100  # boxes of a line that may stand in another order than the answer's
Boxes = Sequence[Sequence[float]]
Form = Callable[[float, float, float, float], Box]
FORMS: dict[str, Form] = {
    "[x1, y1, x2, y2]": lambda a, b, c, d: (a, b, c, d),
    "[x, y, width, height]": lambda a, b, c, d: (a, b, a + c, b + d),
    "[y1, x1, y2, x2]": lambda a, b, c, d: (b, a, d, c),
    "[middle x, middle y, width, height]": lambda a, b, c, d: (
        a - c / 2,
        b - d / 2,
        a + c / 2,
        b + d / 2,
    ),
    "[x1, x2, y1, y2]": lambda a, b, c, d: (a, c, b, d),
    "[x2, y2, x1, y1]": lambda a, b, c, d: (c, d, a, b),
}
SCALES = {"": 1, " in 0..1000": 1000, " in percent": 100}


def contradiction(answer: str, boxes: Boxes) -> str | None:
    """What is wrong, and what to do, if the boxes written in `answer` differ from `boxes` by more
    than rounding. Both must have some.
    """
    said = parse_boxes(answer)
    coarse = all(abs(value - round(value, 1)) < 1e-9 for box in said for value in box)
    near = (COARSE if coarse else ROUNDED) + 1e-6
    if same_boxes(said, boxes, near):
        return None
    mend = format_boxes(boxes[:4]) + (" ..." if len(boxes) > 4 else "")
    if len(said) != len(boxes):
        guess = counted(said, boxes, near)
    else:
        guess = next(guesses(said[:MOST_PAIRED], boxes[:MOST_PAIRED], near), "the boxes differ")
    return (
        f'the boxes in the answer are not "boxes" ({guess}): write {mend} in the answer, or '
        'correct "boxes"'
    )


def same_boxes(said: Boxes, boxes: Boxes, near: float) -> bool:
    """Whether each box is once on either side, in any order, with no number further off than
    `near`.
    """
    if len(said) != len(boxes):
        return False
    a, b = np.asarray(said, float), np.asarray(boxes, float)  # [N, 4]
    if (np.abs(a - b) <= near).all():
        return True
    if len(said) > MOST_PAIRED:
        return False
    far = np.abs(a[:, None] - b[None]).max(-1) > near  # [N, N]
    return not far[linear_sum_assignment(far)].any()


def guesses(said: Boxes, boxes: Boxes, near: float) -> Iterator[str]:
    """The forms in which the answer's boxes, or else "boxes", would agree; both have the same
    number.
    """
    for scale_name, scale in SCALES.items():
        for name, form in FORMS.items():
            if same_boxes([[value / scale for value in form(*box)] for box in said], boxes, near):
                yield f"they look like {name}{scale_name}"
    for name, form in FORMS.items():
        if size := pixels_of([form(*box) for box in said], boxes, near):
            yield f"they look like {name} in pixels of an image of about {size[0]} x {size[1]}"
    for name, form in FORMS.items():
        if same_boxes(said, [form(*box) for box in boxes], near):
            yield f'"boxes" looks like {name}'
    if same_boxes([(1 - x2, y1, 1 - x1, y2) for x1, y1, x2, y2 in said], boxes, near):
        yield "left and right are swapped"


def counted(said: Boxes, boxes: Boxes, near: float) -> str:
    """ "3 in the answer, 2 in "boxes"; [..] is in the answer alone"."""
    text = f'{len(said)} in the answer, {len(boxes)} in "boxes"'
    more, fewer, where = said, boxes, "the answer"
    if len(said) < len(boxes):
        more, fewer, where = boxes, said, '"boxes"'
    if len(more) > MOST_PAIRED:
        return text
    far = np.abs(np.asarray(more, float)[:, None] - np.asarray(fewer, float)[None]).max(-1) > near
    rows, columns = linear_sum_assignment(far)
    if far[rows, columns].any():
        return text
    extra = sorted(set(range(len(more))) - set(rows.tolist()))
    return f"{text}; {format_boxes([more[i] for i in extra[:4]])} is only in {where}"


def pixels_of(said: Boxes, boxes: Boxes, near: float) -> tuple[int, int] | None:
    """(width, height) of an image in whose pixels `said` would be `boxes`, one by one; None if
    there is none."""
    size = []
    for axis in (0, 1):
        ratios = [a[k] / b[k] for a, b in zip(said, boxes) for k in (axis, axis + 2) if b[k] > 0.05]
        size.append(statistics.median(ratios) if ratios else 0)
    width, height = size
    if not (2 < width < 1e5 and 2 < height < 1e5):
        return None
    scaled = [(x1 / width, y1 / height, x2 / width, y2 / height) for x1, y1, x2, y2 in said]
    return (round(width), round(height)) if same_boxes(scaled, boxes, near) else None


def scale_note(
    answers: Sequence[str],
    samples: Sequence,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
) -> str | None:
    """A note if most boxes that a model wrote, for the grounding samples, are read at the wrong
    scale.
    """
    texts = [
        split_thinking(answer, template_opens_think)[1]
        for answer, sample in zip(answers, samples)
        if sample.task == "grounding"
    ]
    largest = [max(map(abs, box)) for text in texts for box in parse_boxes(text)]
    outside = sum(value > 1.001 * box_scale for value in largest)
    if 2 * outside > len(largest):
        thousands = 2 * sum(value <= 1000 for value in largest) > len(largest)
        return (
            f"{outside:,} of {len(largest):,} boxes that the model wrote lie outside 0..1 and so"
            f" score nothing (--box_scale is {box_scale:g}): should it be"
            f" {'1000' if thousands else 'the side of the image in pixels'}?"
        )
    if box_scale >= 100 and largest and 2 * sum(value <= 1 for value in largest) > len(largest):
        return (
            f"most of the {len(largest):,} boxes that the model wrote are fractions already, "
            f"and --box_scale {box_scale:g} divides them: should it be 1?"
        )
    return None
