"""minigrpo: GRPO for vision-language models, from scratch, around a Hugging Face Qwen3-VL.

The algorithm is four files: `policy.py` (the model, one prompt pass per group), `generate.py` (sampling over a
hand-written KV cache), `logprob.py` (log-probs without full logits), `loss.py` (advantages, clip, KL, aggregation),
and the loop that calls them, `train_grpo.py`.
"""

__version__ = "0.1.0"
