"""What a step's work is counted as, and that the rates follow from it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minigrpo.generate import generate
from minigrpo.run.roofline import efficiency, measure_roofline, multiplications, update_operations
from tests.test_policy import copy_of


def test_operations_are_those_that_torch_counts(policy, samples):
    """One prompt, one answer: forward and backward as torch's own counter sees them, but for what
    we leave out on purpose (it counts the whole square of a causal attention, its recomputation in
    backward, and the head's).
    """
    prompts, mask = policy.encode(samples[:1]), torch.ones(1, 40, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.score(prompts, torch.zeros(1, 40, dtype=torch.long), mask)
    work = multiplications(policy, prompts.grids.prod(1).tolist(), prompts.ids.shape[1], 40)
    assert 2 * sum(work.values()) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_only_what_is_trained_counts_in_backward(policy, samples):
    prompts, mask = policy.encode(samples[:2]), torch.ones(4, 9, dtype=torch.bool)
    whole = update_operations(policy, prompts, mask)
    frozen = copy_of(policy)
    frozen.visual.requires_grad_(False)
    work = [
        multiplications(
            policy, prompts.grids[b].prod()[None].tolist(), int(prompts.mask[b].sum()), 9
        )
        for b in range(2)
    ]
    assert whole == pytest.approx(
        6 * sum(w["image"] + w["prompt"] + 2 * (w["answer"] + w["head"]) for w in work)
    )
    assert whole - update_operations(frozen, prompts, mask) == pytest.approx(
        4 * sum(w["image"] for w in work)
    )


def test_rates_of_a_step(policy, samples):
    prompts = policy.encode(samples[:2])
    rollout = generate(policy, prompts, group_size=2, max_new_tokens=5, seed=0)
    cache = (
        2
        * sum(p.numel() for p in policy.language_model.layers[0].self_attn.k_proj.parameters())
        // policy.head.shape[1]
    )
    steps = rollout.tokens.shape[1] - 1
    prefix = len(policy.language_model.layers) * cache * 2 * prompts.ids.shape[1] * 4
    assert rollout.bytes_read >= steps * (policy.decoding_bytes() + prefix), (
        "weights and the prompts' keys in every step"
    )
    assert rollout.bytes_read < steps * (policy.decoding_bytes() + 2 * prefix)
    row = efficiency(
        policy,
        prompts,
        rollout,
        {"rollout": 2.0, "update": 4.0, "reward": 1.0},
        0.25,
        {"tflop_per_second": 1e-3, "gb_per_second": 0.5},
    )
    tokens = int(rollout.mask.sum())
    assert (
        row["tokens_per_second"] == tokens / 7
        and row["rollout_tokens_per_second"] == tokens / 2
        and row["padding"] == 0.25
    )
    assert (
        row["rollout_gb_per_second"] == rollout.bytes_read / 2e9
        and row["rollout_of_roofline"] == rollout.bytes_read / 1e9
    )
    assert row["update_of_roofline"] == pytest.approx(
        1000 * update_operations(policy, prompts, rollout.mask) / 4e12
    )
    idle = replace(rollout, row_steps=2 * tokens)
    assert (
        efficiency(policy, prompts, idle, {"rollout": 1.0, "update": 1.0}, 0, None)[
            "wasted_row_steps"
        ]
        == 0.5
    )


def test_the_roofline_is_measured():
    limits = measure_roofline(torch.device("cpu"), torch.float32)
    assert 1e-3 < limits["tflop_per_second"] < 100 and 0.1 < limits["gb_per_second"] < 10_000
