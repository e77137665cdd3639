"""The newer surrogates, weights and advantages by hand, and a surrogate of one's own. In value and
gradient they stand beside tests/oracles.py in test_loss.py.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.choices import SURROGATES as NAMES
from minigrpo.loss import (
    decoupled_advantages,
    group_advantages,
    grpo_loss,
    next_entropy_coef,
    off_policy_rows,
    policy_loss,
    rollout_weights,
)
from minigrpo.surrogates import SURROGATES, surrogate_settings
from tests import oracles

F64 = torch.float64


def one(probability, old, a, surrogate, **more):
    """(loss, d loss / d logp, stats) of a single token, given its probability then and now."""
    logprob = torch.tensor([[math.log(probability)]], dtype=F64, requires_grad=True)
    loss, stats = policy_loss(
        logprob,
        torch.tensor([[math.log(old)]], dtype=F64),
        torch.tensor([float(a)]),
        torch.ones(1, 1),
        surrogate=surrogate,
        **more,
    )
    (slope,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), slope.item(), {name: value.item() for name, value in stats.items()}


@pytest.mark.parametrize(
    "now, old, a, slope, taken",
    [
        (0.5, 0.4, 1, -1.25, None),  # moved up by 0.1
        (0.7, 0.4, 1, 0.0, "clip_high"),  # by 0.3, where A wants it
        (0.7, 0.4, -1, 1.75, None),  # by 0.3, where A doesn't
        (0.1, 0.4, -1, 0.0, "clip_low"),
        (0.1, 0.4, 1, -0.25, None),
        (0.009, 0.001, 1, -9.0, None),  # a ratio of 9 that moved the policy by 0.008
        (0.19, 0.001, 1, -20.0, None),  # the weight is capped, the gradient stays
        (0.1, 0.4, 0, 0.0, None),
    ],
)
def test_dppo_region_by_region(now, old, a, slope, taken):
    loss, found, stats = one(now, old, a, "dppo")
    assert found == pytest.approx(slope, rel=1e-9)
    assert loss == pytest.approx(slope * math.log(now), rel=1e-9)
    assert {name for name in ("clip_high", "clip_low") if stats[name]} == {taken} - {None}


@pytest.mark.parametrize("a, tau", [(2, 1.0), (-2, 1.05)])
def test_sapo_by_hand(a, tau):
    """Slope A at rho = 1, as without a clip; 4 p (1 - p) rho A elsewhere, p = sigmoid."""
    loss, slope, _ = one(0.4, 0.4, a, "sapo")
    assert slope == pytest.approx(-a) and loss == pytest.approx(-2 / tau * a)
    for rho in (0.25, 2.0):
        p = 1 / (1 + math.exp(-tau * (rho - 1)))
        loss, slope, stats = one(0.4 * rho, 0.4, a, "sapo")
        assert loss == pytest.approx(-4 / tau * p * a)
        assert slope == pytest.approx(-4 * p * (1 - p) * rho * a)
        assert set(stats) == {"ratio_deviation"}
    assert one(0.8, 0.4, a, "sapo", sapo_tau_up=9, sapo_tau_down=9)[1] == pytest.approx(0, abs=0.01)


def test_sapo_is_gspo_with_a_gate_at_the_answer_s_level():
    logprob = torch.tensor([[0.0, math.log(4.0)]], dtype=F64, requires_grad=True)
    loss, _ = policy_loss(
        logprob,
        torch.zeros(1, 2, dtype=F64),
        torch.ones(1),
        torch.ones(1, 2),
        surrogate="sapo",
        ratio_level="sequence",
    )
    assert loss.tolist()[0] == pytest.approx([-4 / (1 + math.exp(-1))] * 2)  # of rho = 2


# ---- one's own -----------------------------------------------------------------------------------


def plain(ratio, advantage, logprob, old_logprob):
    return -ratio * advantage


def bounded(ratio, advantage, logprob, old_logprob, *, bound=2.0):
    return -ratio.clamp(max=bound) * advantage, {"bounded": ratio > bound}


def test_a_surrogate_of_one_s_own():
    assert one(0.4, 0.1, 1, plain)[:2] == pytest.approx((-4, -4))
    loss, slope, stats = one(0.4, 0.1, 1, bounded, bound=3.0)
    assert (loss, slope) == (pytest.approx(-3), 0)
    assert stats == pytest.approx({"bounded": 1, "ratio_deviation": 3})
    x = torch.zeros(2, 3, requires_grad=True)
    whole, _ = grpo_loss(x, x.detach(), torch.ones(2), torch.ones(2, 3), surrogate=plain)
    assert whole == -1
    with pytest.raises(ValueError, match="surrogate's loss"):
        policy_loss(x, x, torch.ones(2), torch.ones(2, 3), surrogate=lambda *_: torch.ones(2))


def test_settings_belong_to_their_surrogate():
    assert tuple(SURROGATES) == NAMES
    assert surrogate_settings("clip") == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}
    assert surrogate_settings("cispo") == {"cispo_cap": 5.0}
    assert surrogate_settings("dppo") == {"dppo_delta": 0.2, "dppo_cap": 20.0}
    assert surrogate_settings("sapo") == {"sapo_tau_up": 1.0, "sapo_tau_down": 1.05}
    assert surrogate_settings(bounded) == {"bound": 2.0} and surrogate_settings(plain) == {}
    for surrogate, more, message in (
        (
            "cispo",
            dict(clip_low=0.2),
            'surrogate "cispo" has no setting clip_low; it has cispo_cap',
        ),
        (plain, dict(bound=1), 'surrogate "plain" has no setting bound; it has none'),
        ("dppo", dict(dppo_delta=1.5), "dppo_delta is a difference of probabilities, 0..1"),
        ("dppo", dict(dppo_delta=-0.1), "dppo_delta is a difference of probabilities, 0..1"),
        ("dppo", dict(dppo_cap=0), "dppo_cap above 0"),
        ("cispo", dict(cispo_cap=0), "cispo_cap must be above 0, got 0"),
        ("sapo", dict(sapo_tau_up=0), "must be above 0, got 0 and 1.05"),
        ("sapo", dict(sapo_tau_down=0), "must be above 0, got 1.0 and 0"),
        ("dppo", dict(ratio_level="sequence"), "contradict each other"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            one(0.4, 0.1, 1, surrogate, **more)


# ---- weights and rows ----------------------------------------------------------------------------

RATIOS = torch.tensor([[0.4, 1.0, 2.5], [0.5, 2.0, 3.0]], dtype=F64)
SEEN = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, [[0.4, 1, 2], [0.5, 2, 1]]),
        (dict(floor=0.5), [[0.5, 1, 2], [0.5, 2, 1]]),
        (dict(floor=0.5, outside="drop"), [[0, 1, 0], [0.5, 2, 1]]),  # the edges stay
        (dict(level="sequence", cap=3), [[1, 1, 1], [1, 1, 1]]),
        (dict(level="sequence", cap=0.9), [[0.9] * 3] * 2),
        (dict(level="sequence", cap=0.9, outside="drop"), [[0] * 3] * 2),
    ],
)
def test_rollout_weights_by_hand(more, expected):
    old = torch.full((2, 3), -1.0, dtype=F64, requires_grad=True)
    weight, beyond = rollout_weights(old, (old - RATIOS.log()).detach(), SEEN, **more)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=F64))
    assert not weight.requires_grad
    changed = (weight - torch.where(SEEN, RATIOS, 1.0)).abs() > 1e-9
    if more.get("level") != "sequence":
        assert (beyond == changed).all()


def test_a_weight_out_of_all_bounds_is_no_nan():
    old = torch.tensor([[1e4, 0.0]])
    for outside, first in (("drop", 0.0), ("cut", 2.0)):
        weight, _ = rollout_weights(old, torch.zeros(1, 2), old.bool() | True, outside=outside)
        assert weight.tolist() == [[first, 1.0]]


def test_off_policy_rows_by_hand():
    """Bad answers that fell by more than 0.5 nats a token; a good one stays however far it fell."""
    sampled, mask = torch.zeros(4, 2), torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]]).bool()
    logprob = torch.tensor([[-1.2, 0.0], [-0.4, -0.4], [-0.6, 9.0], [-5.0, -5.0]])
    found = off_policy_rows(logprob, sampled, torch.tensor([-1.0, -1, -1, 1]), mask, 0.5)
    assert found.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="off_policy_delta must be 0 or more, got -1"):
        off_policy_rows(logprob, sampled, torch.ones(4), mask, -1)


def test_the_sampler_s_log_probs_decide_what_is_off_policy():
    x, mask, a = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([-1.0])
    for rollout, dropped in ((None, 0), (x + 1, 1), (x - 1, 0)):
        _, stats = grpo_loss(x, x, a, mask, rollout_logprob=rollout, off_policy_delta=0.5)
        assert stats["off_policy"] == dropped


def test_bad_bounds_are_named():
    x = torch.zeros(1, 2)
    for more, message in (
        (dict(floor=2.0), "must be 0 <= floor < cap, got 2.0 and 2.0"),
        (dict(floor=-0.1), "must be 0 <= floor < cap, got -0.1 and 2.0"),
        (dict(level="word"), "rollout_level must be one of token, sequence, got 'word'"),
        (dict(outside="keep"), "rollout_outside must be one of cut, drop, got 'keep'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rollout_weights(x, x, x.bool(), **more)
    with pytest.raises(ValueError, match="entropy_coef=0.1 needs entropy"):
        grpo_loss(x, x, x[0, :1], x, entropy_coef=0.1)


def test_the_entropy_bonus_pulls_up():
    logits = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    p = logits.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    loss, _ = grpo_loss(
        p[..., 0], p[..., 0].detach(), torch.zeros(1), torch.ones(1, 1), entropy=entropy,
        entropy_coef=0.5,
    )  # fmt: skip
    assert loss.item() == pytest.approx(-0.5 * entropy.item())
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope[0, 0, 0] > 0 > slope[0, 0, 1]  # a step down evens the two out


def test_the_adaptive_weight_of_entropy():
    assert next_entropy_coef(0.0, 0.1, 0.2) == 0.005
    assert next_entropy_coef(0.01, 0.2, 0.2, step=0.1) == pytest.approx(0.11)  # at the target, too
    assert next_entropy_coef(0.01, 0.3, 0.2) == pytest.approx(0.005)
    assert next_entropy_coef(0.001, 0.3, 0.2) == 0


# ---- advantages ----------------------------------------------------------------------------------


def test_maxrl_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = group_advantages(rewards, scale="mean")
    expected = [[3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0] * 4, [0] * 4]
    torch.testing.assert_close(found, torch.tensor(expected))
    with pytest.raises(ValueError, match="rewards of 0 or more, got -0.5"):
        group_advantages(torch.tensor([[1.0, -0.5]]), scale="mean")


def test_opo_by_hand():
    """The baseline is the mean reward of a token: (1 * 1 + 3 * 0) / 4 = 0.25."""
    rewards, lengths = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1, 3], [2, 9]])
    found = group_advantages(rewards, lengths=lengths, scale="none")
    torch.testing.assert_close(found, torch.tensor([[0.75, -0.25], [0, 0]]))
    assert (found[0] * lengths[0]).sum() == 0
    both = group_advantages(
        torch.tensor([[1.0, 0.0, 7.0]]),
        lengths=torch.tensor([[1, 3, 5]]),
        scale="none",
        valid=torch.tensor([[1, 1, 0]]),
    )
    torch.testing.assert_close(both, torch.tensor([[0.75, -0.25, 0]]))
    with pytest.raises(ValueError, match="two baselines"):
        group_advantages(rewards, lengths=lengths, leave_one_out=True)
    with pytest.raises(ValueError, match="lengths of the same shape"):
        group_advantages(rewards, lengths=lengths[:1])


def test_opo_divides_by_the_std_about_the_mean():
    rewards, lengths = torch.tensor([[1.0, 0.0, 0.5]], dtype=F64), torch.tensor([[1, 3, 2]])
    found = group_advantages(rewards, lengths=lengths, eps=0.25)
    torch.testing.assert_close(found, (rewards - 2 / 6) / (0.5 + 0.25))


def gdpo(rewards, weights, valid, eps):
    """2601.05242, in loops."""
    count, groups, size = rewards.shape
    mixed = np.zeros((groups, size))
    for k in range(count):
        alone = oracles.advantages(rewards[k].tolist(), valid[k].tolist(), "group", False, eps)
        mixed += weights[k, :, None] * np.array(alone)
    scored = valid.any(0)
    every = mixed[scored]
    if len(every) < 2 or every.std(ddof=1) == 0:
        return np.zeros((groups, size))
    return np.where(scored, (mixed - every.mean()) / (every.std(ddof=1) + eps), 0)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31), st.booleans()
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decoupled_advantages_are_the_loops(count, groups, size, seed, own_mixes):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 4, (count, groups, size)) / 4
    weights = rng.uniform(0.1, 1, (count, groups) if own_mixes else count)
    valid = rng.random((count, groups, size)) < 0.8
    found = decoupled_advantages(
        torch.tensor(rewards), torch.tensor(weights), valid=torch.tensor(valid), eps=0.1
    )
    mixes = np.broadcast_to(weights.reshape(count, -1), (count, groups))
    np.testing.assert_allclose(found, gdpo(rewards, mixes, valid, 0.1), atol=1e-10)


def test_gdpo_hears_the_quiet_reward():
    """A reward of small differences is lost in the sum, and not when each has its own scale."""
    loud = torch.tensor([[0.0, 0, 1, 1]])
    quiet = torch.tensor([[0.0, 0.01, 0.0, 0.01]])
    summed = group_advantages(loud + quiet)
    decoupled = decoupled_advantages(torch.stack([loud, quiet]), torch.ones(2))
    assert summed[0, 1] - summed[0, 0] < 0.05 and decoupled[0, 1] - decoupled[0, 0] > 0.9
    assert decoupled[0, 1] == pytest.approx(decoupled[0, 2].item(), abs=1e-3)


def test_decoupled_shapes_are_checked():
    x = torch.zeros(2, 3, 4)
    for rewards, weights in ((x[0], torch.ones(2)), (x, torch.ones(3)), (x, torch.ones(2, 4))):
        with pytest.raises(ValueError, match=r"rewards \[K, B, G\] and weights \[K\] or \[K, B\]"):
            decoupled_advantages(rewards, weights)
    with pytest.raises(TypeError, match="weights must be a tensor, got list"):
        decoupled_advantages(x, [1, 1])


def test_decoupled_advantages_over_ranks():
    """The batch's mean and std are those of all processes."""
    torch.manual_seed(0)
    rewards, weights = torch.rand(2, 4, 3, dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)
    whole = decoupled_advantages(rewards, weights)
    halves = rewards[:, :2], rewards[:, 2:]
    sums: list = []
    for _ in range(4):  # sums that stand on sums settle one after another
        sums = [a + b for a, b in zip(*(said(half, weights, sums) for half in halves))]
    found = [decoupled_advantages(h, weights, total=answer(sums)) for h in halves]
    torch.testing.assert_close(torch.cat(found), whole)


def answer(sums):
    told = iter(sums)
    return lambda x: next(told)


def said(half, weights, sums):
    """What this half puts into each sum when the sums are `sums`."""
    mine, told = [], iter(sums)
    decoupled_advantages(half, weights, total=lambda x: mine.append(x) or next(told, x))
    return mine
