"""How cost grows with the group, the prompt and the answer: ours, and transformers' repeated
prompts beside it.

    python -m benchmarks.growth [--repeats 3]

One text prompt, of 256 tokens, G = 8 and 64-token answers, of which one is varied at a time.
`rollout` samples the answers, `score` computes the loss of given ones with its gradients.
"""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.common import Shape, about, interleaved, random_policy, samples_of, write
from benchmarks.sides import (
    batch_of,
    our_rollout,
    our_score,
    plain_rollout,
    plain_score,
    processor_of,
)
from minigrpo.policy import Policy
from minigrpo.run.args import at_least_one, input_errors, parse_args

BASE = Shape(image=0, text=256, answer=64, prompts=1)
VARIED = {"group": [1, 2, 8, 32], "text": [64, 256, 1024, 2048], "answer": [16, 64, 256, 1024]}


def measure(
    policy: Policy, plain: Qwen3VLForConditionalGeneration, shape: Shape, *, repeats: int
) -> dict:
    # no image, no file
    processor, samples = processor_of(policy), samples_of(policy, shape, Path())
    batch = batch_of(policy, samples, shape)
    rollout, _ = interleaved(
        repeats,
        ours=partial(our_rollout, policy, samples, shape),
        hf=partial(plain_rollout, plain, processor, samples, shape),
    )
    score, _ = interleaved(
        repeats,
        ours=partial(our_score, policy, samples, batch),
        hf=partial(plain_score, plain, processor, samples, batch),
    )
    return {"rollout": rollout, "score": score}


@dataclass
class GrowthArguments:
    repeats: int = field(
        default=3, metadata={"help": "rounds of ours and transformers; the medians count"}
    )

    def check(self) -> None:
        at_least_one(self, "repeats")


def main() -> None:
    with input_errors():
        args = parse_args(GrowthArguments, __doc__)
    policy = random_policy()
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        plain = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for name, values in VARIED.items():
        for value in values:
            shape = replace(BASE, **{name: value})
            seconds = measure(policy, plain, shape, repeats=args.repeats)
            rows.append({"varied": name, "shape": asdict(shape), "seconds": seconds})
            print(rows[-1], flush=True)
            write("growth.json", {"about": about(), "points": rows})


if __name__ == "__main__":
    main()
