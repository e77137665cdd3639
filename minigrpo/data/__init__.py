"""Samples, films and the text of answers."""

from .batches import batch_at, group_by_image, prefetch
from .box_forms import scale_note
from .boxes import format_boxes, parse_boxes, split_thinking
from .film import load_image
from .overlap import check_apart
from .sample import DataError, Sample, read_jsonl
from .schema import TASKS
from .thinking import ask_to_think, asks_to_think, with_traces

__all__ = [
    "TASKS",
    "ask_to_think",
    "asks_to_think",
    "batch_at",
    "check_apart",
    "DataError",
    "Sample",
    "format_boxes",
    "group_by_image",
    "load_image",
    "parse_boxes",
    "prefetch",
    "read_jsonl",
    "scale_note",
    "split_thinking",
    "with_traces",
]
