"""Samples, films and the text of answers."""

from .batches import batch_at, group_by_image, prefetch
from .boxes import format_boxes, parse_boxes, split_thinking
from .schema import TASKS
from .sample import DataError, Sample, load_image, read_jsonl
from .thinking import ask_to_think, asks_to_think, with_traces

__all__ = ["TASKS", "ask_to_think", "asks_to_think", "batch_at", "DataError", "Sample", "format_boxes", "group_by_image", "load_image",
           "parse_boxes", "prefetch", "read_jsonl", "split_thinking", "with_traces"]
