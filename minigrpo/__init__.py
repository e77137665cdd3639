"""minigrpo: GRPO for vision-language models, from scratch, around a Hugging Face Qwen3-VL.

The algorithm is four files: `policy.py` (the model, one prompt pass per group), `generate.py` (sampling over a
hand-written KV cache), `logprob.py` (log-probs without full logits), `loss.py` (advantages, clip, KL, aggregation),
and the loop that calls them, `train_grpo.py`.
"""

import os

# Read by OpenMP when torch is imported, so this comes before it. Threads that wait for work spin by default: with two
# other programs on two cores a training step takes ten times as long. These sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
