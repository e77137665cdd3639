"""`linear_logprob` beside the ways of others: log-probs of N tokens over a vocabulary of V, forward
and backward.

    python -m benchmarks.logprob [--repeats 3]

naive: all logits in fp32 and `log_softmax` (tiny-grpo, rasbt, rlhf-book); checkpoint: chunks of
1,024 tokens whose logits are made again in backward; trl: the function under TRL's GRPOTrainer.
Liger's needs Triton, and so a GPU: it is not here. Time is the median of interleaved runs, memory
the peak above hidden states and head, each in its own process.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.common import about, interleaved, own_process, peak_bytes, write
from minigrpo.logprob import linear_logprob
from minigrpo.run.args import at_least_one, input_errors, parse_args

try:
    from trl.kernels import ChunkedLogProbFunction
except ImportError:
    ChunkedLogProbFunction = None

# (N, V); the naive way takes 7 GB for the last
SIZES = [(1024, 16_384), (8192, 16_384), (1024, 151_936), (4096, 151_936)]
WIDTH = 256


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def in_chunks(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int = 1024) -> Tensor:
    return torch.cat(
        [
            checkpoint(naive, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), target.split(chunk))
        ]
    )


def trl_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # GRPOTrainer's chunk
    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32_768, None, 1.0, ())[0]


WAYS = {"ours": linear_logprob, "naive": naive, "checkpoint": in_chunks}
if ChunkedLogProbFunction:
    WAYS["trl"] = trl_chunks


def inputs(n: int, vocab: int, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, generator=g),
        torch.randn(vocab, width, generator=g) * width**-0.5,
    )
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (n,), generator=g)


def forward_backward(way: str, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    logprob = WAYS[way](hidden, weight, target)
    logprob.sum().backward()
    return logprob.detach()


def measure(n: int, vocab: int, *, repeats: int) -> dict:
    tensors = inputs(n, vocab)
    sides = {way: lambda way=way: forward_backward(way, *tensors) for way in WAYS}
    seconds, found = interleaved(repeats, **sides)
    for way, logprob in found.items():
        torch.testing.assert_close(
            logprob, found["ours"], atol=1e-4, rtol=0, msg=lambda text, way=way: f"{way}: {text}"
        )
    return {"seconds": seconds}


@dataclass
class LogprobArguments:
    repeats: int = field(default=3, metadata={"help": "rounds over all ways; the medians count"})
    peak_of: str = field(
        default="",
        metadata={"help": "only print the peak bytes of one of the ways, in this process"},
    )
    size: list[int] = field(default_factory=list, metadata={"help": "N and V, for --peak_of"})

    def check(self) -> None:
        at_least_one(self, "repeats")


def main() -> None:
    with input_errors():
        args = parse_args(LogprobArguments, __doc__)
    if args.peak_of:
        tensors = inputs(*args.size)
        print(peak_bytes(lambda: forward_backward(args.peak_of, *tensors)))
        return
    rows = []
    for n, vocab in SIZES:
        row = {"tokens": n, "vocabulary": vocab} | measure(n, vocab, repeats=args.repeats)
        alone = ("logprob", "--size", str(n), str(vocab), "--peak_of")
        row["peak_bytes"] = {way: int(own_process(*alone, way)) for way in WAYS}
        for what, name in (("seconds", "time_vs_naive"), ("peak_bytes", "memory_vs_naive")):
            row[name] = row[what]["ours"] / row[what]["naive"]
        rows.append(row)
        print(row, flush=True)
        write("logprob.json", {"about": about(width=WIDTH), "sizes": rows})


if __name__ == "__main__":
    main()
