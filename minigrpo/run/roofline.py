"""How much work a step takes, and how close to the machine's limits it runs.

Only necessary work counts: a multiplication and its addition are 2 operations; padding, rows that
have ended and recomputation in a backward pass are not counted, so they show as a lower rate. M is
1e6, G 1e9, T 1e12.
"""

import time

import torch

from minigrpo.encode import Prompts
from minigrpo.generate import Rollout
from minigrpo.policy import Policy
from minigrpo.run.distributed import ranks, say, total


def multiplications(
    policy: Policy, patches: list[int], prompt: int, answer: int
) -> dict[str, float]:
    """Multiplications of one forward pass: for the images of one prompt, the prompt, one answer
    after it, and the logits of that answer.

    `patches` of each image, `prompt` and `answer` in tokens. A token is multiplied with every
    weight of the layers once, and in each layer with each key that it sees twice (score and value).
    """
    text, vision, visual = (
        policy.model.config.text_config,
        policy.model.config.vision_config,
        policy.visual,
    )

    def weights(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)

    layers = weights(policy.language_model.layers)
    key = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim

    # keys that the tokens start .. stop - 1 see
    def causal(start, stop):
        return (stop - start) * (start + 1 + stop) / 2

    merged = visual.spatial_merge_size**2
    return {
        "image": sum(
            n * weights(visual.patch_embed, visual.blocks)
            + 2 * vision.depth * vision.hidden_size * n**2
            + n / merged * weights(visual.merger, visual.deepstack_merger_list)
            for n in patches
        ),
        "prompt": prompt * layers + causal(0, prompt) * key,
        # the last token is not read
        "answer": max(0, answer - 1) * layers + causal(prompt, prompt + max(0, answer - 1)) * key,
        "head": answer * policy.head.numel(),
    }


def update_operations(policy: Policy, prompts: Prompts, mask: torch.Tensor) -> float:
    """Operations of one forward and backward pass over all prompts and answers of a step; mask [R,
    T].

    The backward pass costs one forward pass for the gradient of the input, if anything before it is
    trained, and one for the weights that are trained.
    """

    def times(module: torch.nn.Module, reached: bool) -> float:
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters() if p.dim() > 1]
        trained = sum(size for size, trains in sizes if trains)
        return 2 + trained / sum(size for size, _ in sizes) if trained or reached else 1.0

    group, answers = len(mask) // len(prompts.ids), mask.sum(1).tolist()
    patches = prompts.grids.prod(1).split(prompts.images.tolist())
    vision, text = times(policy.visual, reached=False), times(policy.language_model, reached=True)
    total = 0.0
    for b, length in enumerate(prompts.mask.sum(1).tolist()):
        for row in range(group):
            work = multiplications(
                policy, patches[b].tolist() if row == 0 else [], length, answers[b * group + row]
            )
            if row:
                work["prompt"] = 0.0
            total += (
                work["image"] * vision + (work["prompt"] + work["answer"] + work["head"]) * text
            )
    return 2 * total


def efficiency(
    policy: Policy,
    prompts: Prompts,
    rollout: Rollout,
    seconds: dict[str, float],
    padding: float,
    limits: dict[str, float] | None,
) -> dict[str, float]:
    """A step's rates for its log line: tokens, bytes and operations over the `seconds` of their
    phases, and what was wasted.

    `limits` of `measure_roofline` add the shares of what the machine can do. Over ranks: `prompts`
    and the rollout's rows are this rank's, the rates those of all; `row_steps` and `bytes_read` are
    of all already.
    """
    tokens = int(total(rollout.mask.sum()))
    operations = total(
        torch.tensor(update_operations(policy, prompts, rollout.mask), dtype=torch.float64)
    ).item()
    row = {
        "tokens_per_second": tokens / sum(seconds.values()),
        "rollout_tokens_per_second": tokens / seconds["rollout"],
        "rollout_gb_per_second": rollout.bytes_read / seconds["rollout"] / 1e9,
        "update_tflop_per_second": operations / seconds["update"] / 1e12,
        "wasted_row_steps": 1 - tokens / rollout.row_steps,
        "padding": padding,
    }
    if limits:
        row["rollout_of_roofline"] = (
            row["rollout_gb_per_second"] / limits["gb_per_second"] / ranks()
        )
        row["update_of_roofline"] = (
            row["update_tflop_per_second"] / limits["tflop_per_second"] / ranks()
        )
    return row


def measure_roofline(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The machine's peak rates: {"tflop_per_second"} of a matrix product in `dtype`,
    {"gb_per_second"} of reading memory.

    Takes about a second. Memory is read by a sum over 256 MB of fp32, which fits in no cache.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, memory = (
        torch.randn(side, side, device=device, dtype=dtype),
        torch.ones(64_000_000, device=device),
    )
    return {
        "tflop_per_second": 2 * side**3 / _fastest(lambda: a @ a, device) / 1e12,
        "gb_per_second": 4 * len(memory) / _fastest(memory.sum, device) / 1e9,
    }


def roofline(args) -> dict[str, float]:
    """`measure_roofline` for a run's device and precision; the result is also printed."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    limits = measure_roofline(torch.device(args.device), dtype)
    flops, bytes_read = limits["tflop_per_second"], limits["gb_per_second"]
    say(f"roofline: {flops:.3g} TFLOP/s, {bytes_read:.3g} GB/s")
    return limits


def note_on_bf16(device: str) -> str | None:
    """A note on what --bf16 costs on a CPU without bf16 instructions, measured on a matrix product;
    None if it costs nothing.
    """
    if torch.device(device).type != "cpu":
        return None
    a = torch.randn(512, 512)
    seconds = {
        dtype: _fastest(lambda: a.to(dtype) @ a.to(dtype), torch.device("cpu"), times=2)
        for dtype in (torch.float32, torch.bfloat16)
    }
    factor = seconds[torch.bfloat16] / seconds[torch.float32]
    return (
        f"note: --bf16: this CPU has no fast bf16: a matrix product takes {factor:.0f} times as"
        " long as in fp32; leave --bf16 out"
        if factor > 1.5
        else None
    )


def _fastest(run, device: torch.device, times: int = 5) -> float:
    seconds = []
    for _ in range(times + 1):  # the first one warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
