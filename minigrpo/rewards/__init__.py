"""Rewards: answers in, one float an answer out. `reward_fn` reads the --reward argument:

    gleu                                       one reward, on the tasks it applies to
    0.9*gleu+0.1*soft_f1                       a weighted sum; each term enters on the tasks it applies to
    report=gleu,grounding=0.5*soft_f1+0.5*dice one sum for each task
    my_module:my_reward                        your own, anywhere a name may stand: callable(answers, samples) -> a list
                                               of floats (None or NaN: could not be scored) or a `Scores`

A built-in takes (answers without their thinking, samples, box_scale) and gives an empty answer its floor.
"""

import math
from dataclasses import dataclass, field

from ..data.boxes import split_thinking
from ..data.sample import Sample
from .grounding import dice, soft_f1
from .spec import REWARDS, Term, parse_spec
from .text import gleu

__all__ = ["REWARDS", "Reward", "Scores", "dice", "gleu", "reward_fn", "soft_f1"]


@dataclass
class Scores:
    values: list[float]  # 0.0 where valid is False, so that no NaN travels on
    valid: list[bool]  # False: could not be scored, and must not count as a bad answer
    parts: dict[str, list[float]] = field(default_factory=dict)  # each term unweighted; NaN where it gave nothing


@dataclass
class Reward:
    """callable(answers as the model wrote them, samples) -> Scores, lists of equal length."""

    terms: dict[str, list[Term]]  # for each task
    opened: bool
    box_scale: float

    @property
    def tasks(self) -> set[str]:
        return set(self.terms)

    def __call__(self, answers: list[str], samples: list[Sample]) -> Scores:
        if len(answers) != len(samples):
            raise ValueError(f"{len(answers)} answers for {len(samples)} samples: repeat each sample for its group")
        for sample in samples:
            if sample.task not in self.terms:
                raise ValueError(f"--reward scores {', '.join(self.terms)}, but sample {sample.id!r} is {sample.task}: "
                                 "leave such samples out, or name a reward for them")
        texts = [answer if ok else "" for _, answer, ok in (split_thinking(text, self.opened) for text in answers)]
        scores = Scores([0.0] * len(answers), [True] * len(answers))
        for task in self.terms:
            rows = [row for row, sample in enumerate(samples) if sample.task == task]
            for weight, name, function in self.terms[task] if rows else ():
                chosen = [samples[row] for row in rows]
                if name in REWARDS:
                    result = function([texts[row] for row in rows], chosen, self.box_scale)
                else:
                    result = function([answers[row] for row in rows], chosen)
                _add(scores, rows, weight, name, result)
        scores.values = [value if valid else 0.0 for value, valid in zip(scores.values, scores.valid)]
        return scores


def _add(scores: Scores, rows: list[int], weight: float, name: str, result) -> None:
    if not isinstance(result, Scores):
        values = [math.nan if value is None else float(value) for value in result]
        result = Scores(values, [math.isfinite(value) for value in values])
    parts = {name: result.values} | {f"{name}.{part}": values for part, values in result.parts.items()}
    for part, values in parts.items():
        if len(values) != len(rows):
            raise ValueError(f"reward {part!r} gave {len(values)} values for {len(rows)} answers: return one for each")
        column = scores.parts.setdefault(part, [math.nan] * len(scores.values))
        for row, value in zip(rows, values):
            column[row] = value
    for row, value, valid in zip(rows, result.values, result.valid, strict=True):
        scores.valid[row] &= valid and math.isfinite(value)
        scores.values[row] += weight * value


def reward_fn(spec: str, *, opened: bool = False, box_scale: float = 1.0) -> Reward:
    """The reward of a --reward argument (grammar above). `.tasks` is the set of tasks it can score.

    An answer whose think block is broken counts as empty, which is each built-in's floor. `opened`: the chat template
    already wrote <think>. `box_scale`: what the model's coordinates are divided by.
    """
    return Reward(parse_spec(spec), opened, box_scale)
