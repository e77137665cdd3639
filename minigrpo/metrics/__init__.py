"""What evaluate.py reports: metrics of answers with bootstrap intervals, and differences between
two models.
"""

from .bootstrap import interval, paired
from .cider import cider_d
from .clinical import Clinical, load_clinical
from .constant import constant_answers, constant_boxes, constant_report
from .grounding import average_precision, coco_average_precision, detection_statistics
from .summary import breakdown, compare, evaluate_answers
from .table import markdown_table
from .text import bleu4, bleu_statistics, rouge, rouge_l

__all__ = [
    "Clinical",
    "average_precision",
    "bleu4",
    "bleu_statistics",
    "breakdown",
    "cider_d",
    "coco_average_precision",
    "compare",
    "constant_answers",
    "constant_boxes",
    "constant_report",
    "detection_statistics",
    "evaluate_answers",
    "interval",
    "load_clinical",
    "markdown_table",
    "paired",
    "rouge",
    "rouge_l",
]
