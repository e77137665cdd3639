"""What some settings may be. It imports no torch, so that a misspelt one is answered at once; what
each means is said where it is used.
"""

from typing import Literal, get_args

# loss.py
RatioLevel = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo"]
Scale = Literal["group", "batch", "none"]
Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token-mean", "sequence-mean", "constant"]
RATIO_LEVELS, SURROGATES, SCALES, ESTIMATORS, AGGREGATIONS = map(
    get_args, (RatioLevel, Surrogate, Scale, Estimator, Aggregation)
)
SCHEDULES = ("constant", "linear", "cosine")  # run/schedule.py
TASKS = ("report", "grounding", "classification", "conversation")  # data/schema.py
SMALLEST = 32 * 32  # pixels of an image: one merged patch of Qwen3-VL
