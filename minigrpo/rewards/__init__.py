"""Rewards: answers in, one float per answer out. `reward_fn` reads the --reward argument:

    gleu                     one reward, on the tasks it applies to
    0.9*gleu+0.1*soft_f1     a weighted sum; each term enters on the tasks it applies to
    report=gleu,grounding=0.5*soft_f1+0.5*dice
                             one sum for each task
    my_module:my_reward      your own, anywhere a name can be: callable(answers, samples) -> a
                             list of numbers (None: not scored) or a `Scores`

A built-in reward scores answers without their thinking and gives an empty one its floor. An answer
on which a scorer fails, by an exception or NaN, is marked as not scored, since the model is not at
fault. docs/rewards.md has each reward's formula, range, floor and cost.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ..data.boxes import split_thinking
from ..data.sample import Sample
from ..visible import text_of
from .clinical import CLINICAL, Scorers
from .grounding import dice, dice_or_none, soft_f1
from .radcliq import radcliq_v1
from .spec import REWARDS, Term, parse_spec
from .text import gleu, length

__all__ = [
    "REWARDS",
    "BadReward",
    "Reward",
    "Scores",
    "dice",
    "dice_or_none",
    "gleu",
    "length",
    "radcliq_v1",
    "reward_fn",
    "soft_f1",
]

LARGEST = 1e15  # of a reward: fp32, which compares them, overflows at the square of 2e19


class BadReward(ValueError):
    """A reward did not return one score per answer. The message names the reward and says what to
    return.
    """


@dataclass
class Scores:
    """A reward's result for N answers, in order; every list has N entries, except `errors`."""

    values: list[float]  # 0.0 where valid is False, so that no NaN travels on
    valid: list[bool]  # False: could not be scored, and must not count as a bad answer
    # each term unweighted; NaN where it gave nothing
    parts: dict[str, list[float]] = field(default_factory=dict)
    # what scorers raised: the first few that differ
    errors: list[str] = field(default_factory=list)


@dataclass
class Reward:
    """callable(answers as the model wrote them, samples) -> Scores, lists of equal length."""

    terms: dict[str, list[Term]]  # for each task
    template_opens_think: bool
    box_scale: float
    scorers: Scorers

    @property
    def tasks(self) -> set[str]:
        return set(self.terms)

    def __call__(self, answers: list[str], samples: list[Sample]) -> Scores:
        if len(answers) != len(samples):
            raise ValueError(
                f"{len(answers)} answers for {len(samples)} samples: repeat each sample for its"
                " group"
            )
        for sample in samples:
            if sample.task not in self.terms:
                raise ValueError(
                    f"--reward scores {', '.join(self.terms)}, but sample {sample.id!r} is"
                    f" {sample.task}: leave such samples out, or name a reward for them"
                )
        texts = [
            answer if ok else ""
            for _, answer, ok in (
                split_thinking(text, self.template_opens_think) for text in answers
            )
        ]
        scores = Scores([0.0] * len(answers), [True] * len(answers))
        for task in self.terms:
            rows = [row for row, sample in enumerate(samples) if sample.task == task]
            for weight, name, function in self.terms[task] if rows else ():
                call = self._bound(name, function, answers, texts, samples)
                _add(scores, rows, weight, name, scored(call, rows, name, scores.errors))
        if any(valid and abs(value) > LARGEST for value, valid in zip(scores.values, scores.valid)):
            _note(scores.errors, f"a value beyond {LARGEST:g}, too large to compare within a group")
        scores.valid = [
            valid and abs(value) <= LARGEST for value, valid in zip(scores.values, scores.valid)
        ]
        scores.values = [
            value if valid else 0.0 for value, valid in zip(scores.values, scores.valid)
        ]
        return scores

    def _bound(
        self,
        name: str,
        function: Callable,
        answers: list[str],
        texts: list[str],
        samples: list[Sample],
    ) -> Callable:
        """callable(rows) -> the term's scores of these rows. A user's own function gets the answers
        as written.
        """
        own = name not in REWARDS
        raw = own or name == "format"
        extra = () if own else (self.scorers,) if name in CLINICAL else (self.box_scale,)
        if name == "format":
            extra = (self.template_opens_think, self.box_scale)
        return lambda rows: function(
            [(answers if raw else texts)[row] for row in rows],
            # A function of one's own may write on them, and they are the run's.
            [deepcopy(samples[row]) if own else samples[row] for row in rows],
            *extra,
        )


def scored(call: Callable, rows: list[int], name: str, errors: list[str]) -> Scores:
    """`call(rows)`. If it raises, halves are tried, down to the single rows that can't be scored,
    which get NaN. Four single failures before any success mean that the scorer itself is broken:
    the rest gets NaN untried.
    """
    failed, succeeded = 0, 0

    def attempt(part: list[int]) -> Scores:
        nonlocal failed, succeeded
        nothing = Scores([math.nan] * len(part), [False] * len(part))
        if failed >= 4 and not succeeded:
            return nothing
        try:
            result = _at_home(call, part, name)
        except KeyboardInterrupt as error:
            if threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C
            _note(errors, f"{name}: {type(error).__name__}: {text_of(error)}")
        except BaseException as error:  # must not end a run of days: --max_unscored decides
            _note(errors, f"{name}: {type(error).__name__}: {text_of(error)}")
        else:
            succeeded += 1
            try:
                return as_scores(result, len(part), name)
            except BadReward:
                raise
            except Exception as error:  # of a number or a list of a class of their own
                raise BadReward(
                    f"reward {name!r} gave {type(result).__name__} that cannot be read"
                    f" ({type(error).__name__}: {text_of(error)}): return a list of numbers"
                ) from None
        if len(part) == 1:
            failed += 1
            return nothing
        a, b = attempt(part[: len(part) // 2]), attempt(part[len(part) // 2 :])
        no_a, no_b = [math.nan] * len(a.values), [math.nan] * len(b.values)
        parts = {
            part: a.parts.get(part, no_a) + b.parts.get(part, no_b) for part in a.parts | b.parts
        }
        return Scores(a.values + b.values, a.valid + b.valid, parts, a.errors + b.errors)

    return attempt(rows)


def _note(errors: list[str], text: str) -> None:
    if text not in errors and len(errors) < 5:
        errors.append(text)


def _at_home(call: Callable, part: list[int], name: str) -> Any:
    """call(part), then restore the state that the run relies on: a reward that changes the working
    directory would redirect the run's files, and torch's defaults decide the precision of
    everything else.
    """
    before = _surroundings()
    try:
        return call(part)
    finally:
        after = _surroundings()
        for what, value in before.items():
            if after[what] != value:
                RESTORE[what](value)
                warnings.warn(
                    f"reward {name!r} changed {what} from {value} to {after[what]}: it has been"
                    " restored"
                )


RESTORE = {
    "the working directory": os.chdir,
    "torch's default dtype": torch.set_default_dtype,
    "torch's default device": lambda device: torch.set_default_device(
        None if device.type == "cpu" else device
    ),
    "whether torch keeps gradients": torch.set_grad_enabled,
}


def _surroundings() -> dict[str, Any]:
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = "a folder that no longer exists"
    defaults = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    return dict(zip(RESTORE, (here, *defaults)))


def as_scores(result: Any, count: int, name: str) -> Scores:
    """What a reward returned for `count` answers. BadReward for anything but a sequence of numbers
    or None, or a `Scores` of such."""
    if not isinstance(result, Scores):
        values = _floats(result, count, name)
        return Scores(values, [math.isfinite(value) for value in values])
    values = _floats(result.values, count, f"{name}.values")
    valid = [
        bool(ok) and ok == ok and math.isfinite(value)
        for ok, value in zip(_floats(result.valid, count, f"{name}.valid"), values)
    ]
    named = isinstance(result.parts, dict) and all(isinstance(part, str) for part in result.parts)
    if not named:
        raise BadReward(
            f"reward {name!r} gave parts that are not a dict with names: return "
            "{name: a number for each answer}"
        )
    parts = {part: _floats(given, count, f"{name}.{part}") for part, given in result.parts.items()}
    return Scores(values, valid, parts, [text_of(error) for error in result.errors])


def _floats(given: Any, count: int, name: str) -> list[float]:
    """A list, a tuple, or a vector of NumPy, torch or pandas -> floats, NaN for None and for
    anything not finite.
    """
    vector = getattr(given, "ndim", None) == 1 and hasattr(given, "tolist")
    flat = given.tolist() if vector else given
    wrong = not isinstance(flat, list | tuple)
    # A number of NumPy, or a tensor without dimensions, is its item.
    plain = [] if wrong else [x.item() if getattr(x, "ndim", None) == 0 else x for x in flat]
    if wrong or not all(x is None or isinstance(x, Real) for x in plain):
        raise BadReward(
            f"reward {name!r} gave {type(given).__name__} "
            f"{' '.join(repr(given).split())[:60]}: return a list with a number, or "
            "None, for each answer"
        )
    if len(plain) != count:
        raise BadReward(
            f"reward {name!r} gave {len(plain)} values for {count} answers: return one for each"
        )
    return [_float(x) for x in plain]


def _float(x: Real | None) -> float:
    try:
        value = math.nan if x is None else float(x)
    except OverflowError:  # an int of hundreds of digits
        return math.nan
    return value if math.isfinite(value) else math.nan


def _add(scores: Scores, rows: list[int], weight: float, name: str, result: Scores) -> None:
    parts = {name: result.values} | {
        f"{name}.{part}": values for part, values in result.parts.items()
    }
    for part, values in parts.items():
        column = scores.parts.setdefault(part, [math.nan] * len(scores.values))
        for row, value in zip(rows, values, strict=True):
            column[row] = value
    for error in result.errors:
        _note(scores.errors, f"{name}: {error}")
    for row, value, valid in zip(rows, result.values, result.valid, strict=True):
        scores.valid[row] &= valid
        scores.values[row] += weight * value


def reward_fn(
    spec: str,
    *,
    template_opens_think: bool = False,
    box_scale: float = 1.0,
    weights_dir: str | None = None,
    device: str = "cpu",
    cache: Path | None = None,
) -> Reward:
    """The reward of a --reward argument (grammar above). `.tasks` is the set of tasks it can score.

    An answer whose think block is broken counts as empty, which is each built-in's floor.
    `template_opens_think`: the chat template already wrote <think>. `box_scale`: what the model's
    coordinates are divided by. `weights_dir` (None: the hub) and `device` are for the clinical
    rewards, whose models are loaded here; `cache`: a file that keeps their scored references
    between runs.
    """
    terms, scorers = parse_spec(spec), Scorers(weights_dir, device, cache)
    for name in {name for task in terms.values() for _, name, _ in task if name in CLINICAL}:
        for scorer in CLINICAL[name][1]:
            getattr(scorers, scorer)
    return Reward(terms, template_opens_think, box_scale, scorers)
