"""minigrpo: GRPO for vision-language models, from scratch, around a Hugging Face Qwen3-VL.

The algorithm is five files: `grpo.py` (one step), `policy.py` (the model, one prompt pass per
    group), `generate.py` (sampling
over a hand-written KV cache), `logprob.py` (log-probs without full logits), `loss.py` (advantages,
clip, KL, aggregation).
"""

import os

# Read by OpenMP when torch is imported, so this comes before it. Threads that wait for work spin
# for milliseconds by default: with two other programs on two cores a training step takes ten times
# as long. Threads that sleep at once make it twice as long with nothing beside it. These spin for
# some tens of microseconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.2.0"
