"""What some settings may be. It imports no torch, so that a misspelt one is answered at once; what
each means is said where it is used.
"""

from typing import Literal, get_args

# loss.py
RatioLevel = Literal["token", "sequence"]
SURROGATES = ("clip", "cispo", "dppo", "sapo")
Scale = Literal["group", "batch", "mean", "none"]
Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token-mean", "sequence-mean", "constant"]
Outside = Literal["cut", "drop"]
RATIO_LEVELS, SCALES, ESTIMATORS, AGGREGATIONS, OUTSIDES = map(
    get_args, (RatioLevel, Scale, Estimator, Aggregation, Outside)
)
SCHEDULES = ("constant", "linear", "cosine")  # run/schedule.py
TASKS = ("report", "grounding", "classification", "conversation")  # data/schema.py
SMALLEST = 32 * 32  # pixels of an image: one merged patch of Qwen3-VL
