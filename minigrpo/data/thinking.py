"""Thinking, switched on by a suffix of the question. Data, reward and metric read the answer
through `split_thinking`.
"""

from collections.abc import Sequence
from dataclasses import replace

from .boxes import CLOSE, OPEN
from .sample import Sample

# as RadVLM-GRPO has it; Qwen3-VL-Thinking gets no suffix, since its chat template opens the block
SWITCH = "/think"


def asks_to_think(question: str) -> bool:
    """Whether the question ends in the switch."""
    return question.rstrip().endswith(SWITCH)


def ask_to_think(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the switch behind their questions, once; a conversation gets it on every
    turn.
    """

    def switched(question: str) -> str:
        return question if asks_to_think(question) else f"{question.rstrip()} {SWITCH}"

    return [
        replace(
            s,
            question=switched(s.question),
            turns=s.turns and [[switched(q), a] for q, a in s.turns],
        )
        for s in samples
    ]


def think_block(thinking: str, answer: str) -> str:
    """An answer with its trace, laid out as Qwen3 does."""
    return f"{OPEN}\n{thinking.strip()}\n{CLOSE}\n\n{answer}"


def with_traces(samples: Sequence[Sample]) -> list[Sample]:
    """What supervised training says: a sample with a trace is asked to think and answered by trace
    and answer; the others, and conversations, stay as they are. A file that holds a sample both
    ways teaches both, and the switch between them.
    """
    return [
        replace(asked, answer=think_block(s.thinking, s.answer))
        if s.thinking and not s.turns
        else s
        for s, asked in zip(samples, ask_to_think(samples))
    ]
