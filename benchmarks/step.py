"""The GRPO step beside Hugging Face's: rollout, scoring with its backward pass, the whole step, and
peak memory.

    python -m benchmarks.step [--shapes report thinking text] [--repeats 3]

Three sides work on the same weights, prompts and answer lengths, in fp32, from images and questions
on: ours; transformers (`generate(num_return_sequences=G)`, one forward and backward over G copies
of each prompt); and TRL's `GRPOTrainer` as released (its `_generate`, its `_compute_loss`, and
`train()`, between whose steps ours run). Without TRL its columns stay empty. Neither side scores
the answers a second time for the old log-probs: on-policy, TRL takes its current ones and we the
sampler's. TRL's activation checkpointing, on by default, is off, as ours is: it would only slow TRL
down, and `memory_vs_trl` compares what both hold then.

`limits` are the ratios that the count of multiplications allows (see `multiplications`). On a CPU,
TRL also projects the prompt's tokens onto the vocabulary, which the count leaves out: a ratio to
TRL may pass its limit, one to transformers should not.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.common import (
    Shape,
    about,
    interleaved,
    loaded,
    own_process,
    peak_bytes,
    random_policy,
    samples_of,
    write,
)
from benchmarks.sides import (
    OursBetween,
    adamw,
    batch_of,
    our_rollout,
    our_score,
    our_step,
    plain_rollout,
    plain_score,
    processor_of,
    trl,
    trl_rollout,
    trl_score,
    trl_trainer,
)
from minigrpo.policy import Policy
from minigrpo.run.args import at_least_one, input_errors, parse_args
from minigrpo.run.roofline import multiplications

SHAPES = {
    "report": Shape(image=441, text=30, answer=60),  # the paper's report run
    "thinking": Shape(image=441, text=30, answer=512),
    "text": Shape(image=0, text=64, answer=128),  # where sharing helps least
}


def gradient_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Relative norm over all parameters."""
    pairs = [(x.grad, y.grad) for x, y in zip(a.parameters(), b.parameters()) if x.grad is not None]
    return (
        (sum((x - y).norm() ** 2 for x, y in pairs) / sum(y.norm() ** 2 for _, y in pairs))
        .sqrt()
        .item()
    )


def limits(shape: Shape, policy: Policy) -> dict[str, float]:
    """How many times fewer multiplications each prompt once takes than once for each of its
    answers.

    The same for rollout, scoring and step, since backward costs twice its forward; only
    `generate(num_return_sequences)` encodes an image once, too, and then the prompt G times.
    """
    n, G = (
        multiplications(
            policy, [4 * shape.image] if shape.image else [], shape.prompt, shape.answer
        ),
        shape.group,
    )
    image, prompt, answers = n["image"], n["prompt"], G * (n["answer"] + n["head"])
    shared, repeated = image + prompt + answers, G * (image + prompt) + answers
    every = dict.fromkeys(
        ("rollout_vs_trl", "score_vs_hf", "score_vs_trl", "step_vs_trl"), repeated / shared
    )
    return {"rollout_vs_hf": (image + G * prompt + answers) / shared} | every


def measure(shape: Shape, folder: Path, *, repeats: int) -> dict:
    """All but the memory, for the checkpoint in `folder`."""
    policy = loaded(folder)
    samples, processor = samples_of(policy, shape, folder), processor_of(policy)
    batch = batch_of(policy, samples, shape)
    peers = {"hf": Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)}
    rollouts = {
        "ours": partial(our_rollout, policy, samples, shape),
        "hf": partial(plain_rollout, peers["hf"], processor, samples, shape),
    }
    scores = {
        "ours": partial(our_score, policy, samples, batch),
        "hf": partial(plain_score, peers["hf"], processor, samples, batch),
    }
    if trl:
        trainer = trl_trainer(folder, processor, samples, shape, max_steps=repeats)
        peers["trl"] = trainer.model
        rollouts["trl"] = partial(trl_rollout, trainer, samples, shape)
        scores["trl"] = partial(trl_score, trainer, processor, samples, batch)

    seconds = {}
    seconds["rollout"], _ = interleaved(repeats, **rollouts)
    seconds["score"], losses = interleaved(repeats, **scores)
    same = {
        side: {
            "loss": abs(losses["ours"] - losses[side]).item(),
            "gradient": gradient_difference(policy.model, model),
        }
        for side, model in peers.items()
    }
    assert all(each["loss"] < 1e-5 for each in same.values()), (
        f"the sides don't compute the same loss: {same}"
    )

    reference, optimizer = loaded(folder).freeze(), adamw(policy)
    step = partial(our_step, policy, reference, optimizer, samples, shape)
    if trl:
        trainer.add_callback(between := OursBetween(step))
        trainer.train()
        seconds["step"] = {
            "ours": statistics.median(between.ours),
            "trl": statistics.median(between.trl),
        }
    else:
        seconds["step"], _ = interleaved(repeats, ours=step)
    ratios = {
        f"{what}_vs_{peer}": each[peer] / each["ours"]
        for what, each in seconds.items()
        for peer in peers
        if peer in each
    }
    return ratios | {
        "limits": limits(shape, policy),
        "seconds": seconds,
        "difference": same,
        "shape": asdict(shape),
    }


def peak_of(side: str, shape: Shape, folder: Path) -> int:
    """Bytes that two steps of a side take above its loaded models, policy and reference; to be
    called in its own process.
    """
    policy = loaded(folder)
    samples = samples_of(policy, shape, folder)
    if side == "trl":
        return peak_bytes(
            trl_trainer(folder, processor_of(policy), samples, shape, max_steps=2).train
        )
    reference, optimizer = loaded(folder).freeze(), adamw(policy)
    return peak_bytes(
        lambda: [our_step(policy, reference, optimizer, samples, shape) for _ in range(2)]
    )


@dataclass
class StepArguments:
    shapes: list[str] = field(
        default_factory=lambda: list(SHAPES), metadata={"help": f"which of {', '.join(SHAPES)}"}
    )
    repeats: int = field(
        default=3, metadata={"help": "rounds of ours, transformers, TRL; the medians count"}
    )
    peak_of: str = field(
        default="",
        metadata={"help": "only print the peak bytes of a side, ours or trl, in this process"},
    )
    model: str = field(default="", metadata={"help": "checkpoint folder, for --peak_of"})

    def check(self) -> None:
        at_least_one(self, "repeats")
        if unknown := set(self.shapes) - set(SHAPES):
            raise ValueError(f"--shapes {' '.join(sorted(unknown))}: there are {', '.join(SHAPES)}")


def main() -> None:
    with input_errors():
        args = parse_args(StepArguments, __doc__)
    if args.peak_of:
        print(peak_of(args.peak_of, SHAPES[args.shapes[0]], Path(args.model)))
        return
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            random_policy().save_pretrained(folder)
            found = measure(SHAPES[name], Path(folder), repeats=args.repeats)
            peaks = {
                side: int(
                    own_process("step", "--shapes", name, "--model", folder, "--peak_of", side)
                )
                for side in (["ours", "trl"] if trl else ["ours"])
            }
        found |= {"peak_bytes": peaks} | (
            {"memory_vs_trl": peaks["ours"] / peaks["trl"]} if trl else {}
        )
        print(
            name,
            {key: round(value, 2) for key, value in found.items() if isinstance(value, float)},
            flush=True,
        )
        write("step.json", {name: found | {"about": about(trl=trl and trl.__version__)}})


if __name__ == "__main__":
    main()
