"""Parses the --reward argument: which rewards apply to which task, with which weight."""

import difflib
import math
from collections.abc import Callable

from ..data.schema import TASKS
from ..own import own_function
from .clinical import CLINICAL
from .format import format_reward
from .grounding import dice_or_none_reward, dice_reward, soft_f1_reward
from .text import gleu_reward, length_reward

Term = tuple[float, str, Callable]  # weight, name, function

TEXT_TASKS = {"report", "classification", "conversation"}
REWARDS: dict[str, tuple[Callable, set[str]]] = {  # name: (function, the tasks it applies to)
    "gleu": (gleu_reward, TEXT_TASKS),
    "soft_f1": (soft_f1_reward, {"grounding"}),
    "dice": (dice_reward, {"grounding"}),
    "dice_or_none": (dice_or_none_reward, {"grounding"}),
    **{name: (function, {"report"}) for name, (function, _) in CLINICAL.items()},
    "format": (format_reward, set(TASKS)),
    "length": (length_reward, TEXT_TASKS),
}


def _error(spec: str, text: str) -> ValueError:
    return ValueError(f"--reward {spec!r}: {text}")


def _known(word: str, names: list[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f"known: {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _load(name: str, spec: str) -> tuple[Callable, set[str]]:
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        known = _known(name, list(REWARDS))
        raise _error(spec, f"unknown reward {name!r}; {known}; your own is written module:function")
    function = own_function(name, f"--reward {spec!r}", "(answers, samples)")
    return function, set(TASKS)


def _parse_sum(text: str, spec: str) -> list[tuple[float, str, Callable, set[str]]]:
    terms = {}
    for term in text.split("+"):
        factor, star, name = (piece.strip() for piece in term.rpartition("*"))
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            raise _error(
                spec,
                f"bad weight {factor!r} of {name!r}: write a number other than 0, as in 0.5*{name}",
            )
        if name in terms:
            raise _error(spec, f"{name!r} appears twice in one sum: add up its weights")
        terms[name] = (weight, name, *_load(name, spec))
    return list(terms.values())


def parse_spec(spec: str) -> dict[str, list[Term]]:
    """{task: the terms of its weighted sum}. ValueError names the part that is wrong and what to
    write instead.
    """
    pieces = [tuple(text.strip() for text in piece.partition("=")) for piece in spec.split(",")]
    if len(pieces) == 1 and not pieces[0][1]:
        parsed = _parse_sum(spec, spec)
        sums = {
            task: [(weight, name, f) for weight, name, f, tasks in parsed if task in tasks]
            for task in TASKS
        }
        return {task: terms for task, terms in sums.items() if terms}
    sums = {}
    for task, equals, text in pieces:
        if not equals:
            raise _error(spec, f"{task!r} has no task: write task=reward in each part")
        if task not in TASKS:
            raise _error(spec, f"unknown task {task!r}; {_known(task, list(TASKS))}")
        if task in sums:
            raise _error(spec, f"{task} appears twice: join its rewards with +")
        parsed = _parse_sum(text, spec)
        for _, name, _, tasks in parsed:
            if task not in tasks:
                fitting = ", ".join(name for name in REWARDS if task in REWARDS[name][1])
                raise _error(spec, f"{name!r} cannot score {task}; choose from {fitting}")
        sums[task] = [(weight, name, f) for weight, name, f, _ in parsed]
    return sums
