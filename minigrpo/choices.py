"""What some settings may be. Imports nothing, so that a misspelt one is answered at once; what each
means is said where it is used.
"""

RATIO_LEVELS = ("token", "sequence")  # loss.py, also of the next four
SURROGATES = ("clip", "cispo")
SCALES = ("group", "batch", "none")
ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token-mean", "sequence-mean", "constant")
SCHEDULES = ("constant", "linear", "cosine")  # run/schedule.py
TASKS = ("report", "grounding", "classification", "conversation")  # data/schema.py
SMALLEST = 32 * 32  # pixels of an image: one merged patch of Qwen3-VL
