"""The loss against tests/oracles.py in value and gradient, by hand at its corners, its invariances,
and the masks that it must not look behind.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.loss import (
    aggregate,
    denominator_of,
    group_advantages,
    grpo_loss,
    kl_penalty,
    overlong_filter,
    policy_loss,
    soft_overlong_penalty,
)
from minigrpo.surrogates import SURROGATES, surrogate_settings
from tests import oracles

PAPER = dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.01)
VARIANTS = {
    "RadVLM-GRPO": PAPER,
    "GRPO": dict(clip_high=0.2, kl_coef=0.04, aggregation="sequence-mean"),
    "DAPO": dict(clip_high=0.28),
    "Dr. GRPO": dict(clip_high=0.2, aggregation="constant", max_tokens=9),
    "GSPO": dict(
        ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean"
    ),
    "CISPO": dict(surrogate="cispo", cispo_cap=2.0, kl_coef=0.1, kl_estimator="k2"),
    "V3.2": dict(PAPER, kl_ratio=True, rollout_cap=1.5, off_policy_delta=0.2),
    "DPPO": dict(surrogate="dppo", dppo_delta=0.1, dppo_cap=1.5),
    "SAPO": dict(surrogate="sapo", ratio_level="sequence", aggregation="sequence-mean"),
    "IcePop": dict(rollout_floor=0.6, rollout_cap=1.5, rollout_outside="drop"),
    "MIS": dict(rollout_level="sequence", rollout_cap=3.0, rollout_outside="drop"),
}
calm = pytest.mark.filterwarnings("ignore:Anomaly Detection")
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def batch(rows=6, tokens=5, seed=0, dtype=torch.float64):
    """logprob (a leaf), old, advantage, mask, ref, rollout; the first row is full, others may be
    empty.
    """
    g = torch.Generator().manual_seed(seed)
    old, shift, ref, rollout = (
        torch.randn(rows, tokens, generator=g, dtype=dtype) for _ in range(4)
    )
    lengths = torch.randint(0, tokens + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = tokens, 0
    mask = torch.arange(tokens) < lengths[:, None]
    return (
        (old + 0.8 * shift).requires_grad_(),
        old,
        torch.randn(rows, generator=g, dtype=dtype),
        mask,
        ref,
        old + 0.5 * rollout,
    )


def loss_of(logprob, old, advantage, mask, ref, rollout, **settings):
    """grpo_loss and its gradient."""
    loss, _ = grpo_loss(
        logprob, old, advantage, mask, ref_logprob=ref, rollout_logprob=rollout, **settings
    )
    return loss.detach(), torch.autograd.grad(loss, logprob)[0]


# ---- against the oracles -------------------------------------------------------------------------

SETTINGS = st.fixed_dictionaries(
    {
        "clip_low": st.floats(0.01, 0.9),
        "clip_high": st.floats(0.01, 0.9),
        "dual_clip": st.none() | st.floats(2, 4),
        "cispo_cap": st.floats(0.5, 3),
        "dppo_delta": st.floats(0.01, 0.3),
        "dppo_cap": st.floats(0.5, 3),
        "sapo_tau_up": st.floats(0.1, 3),
        "sapo_tau_down": st.floats(0.1, 3),
        "rollout_level": st.sampled_from(["token", "sequence"]),
        "rollout_floor": st.floats(0, 0.4),
        "rollout_outside": st.sampled_from(["cut", "drop"]),
        "off_policy_delta": st.none() | st.floats(0, 1),
        "entropy_coef": st.sampled_from([0.0, 0.2]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_ratio": st.booleans(),
        "rollout_cap": st.floats(0.5, 3),
        "aggregation": st.sampled_from(["token-mean", "sequence-mean", "constant"]),
        "max_tokens": st.integers(1, 9),
        "denominator": st.none() | st.floats(0.5, 9),
    }
)
KINDS = st.sampled_from(
    [
        *(("token", name) for name in ("clip", "cispo", "dppo", "sapo")),
        *(("sequence", name) for name in ("clip", "sapo")),
    ]
)


@st.composite
def tensors(draw):
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    mask = torch.tensor(
        draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    ).view(rows, tokens)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    old, *shifts = (torch.randn(rows, tokens, generator=g, dtype=torch.float64) for _ in range(4))
    advantage = torch.randn(rows, generator=g, dtype=torch.float64) * (
        torch.rand(rows, generator=g) < 0.8
    )
    return old, [old + 0.8 * shift for shift in shifts], advantage, mask


@given(
    tensors(),
    SETTINGS,
    KINDS,
    st.booleans(),
    st.sampled_from([torch.bool, torch.float32, torch.long]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_loss_and_gradient_are_the_oracles(numbers, chosen, level_surrogate, corrected, mask_dtype):
    old, (logprob, ref, rollout), advantage, mask = numbers
    ratio_level, surrogate = level_surrogate
    others = set().union(*map(surrogate_settings, SURROGATES))
    others -= set(surrogate_settings(surrogate))
    chosen = {name: value for name, value in chosen.items() if name not in others}
    rollout = rollout if corrected else None
    logprob.requires_grad_()
    loss, _ = grpo_loss(
        logprob,
        old,
        advantage,
        mask.to(mask_dtype),
        ref_logprob=ref,
        rollout_logprob=rollout,
        entropy=logprob.square(),  # it has a gradient of its own
        ratio_level=ratio_level,
        surrogate=surrogate,
        **chosen,
    )
    grad = torch.autograd.grad(loss, logprob)[0]
    variables = oracles.variables(logprob.tolist())
    expected = oracles.grpo(
        variables,
        old.tolist(),
        advantage.tolist(),
        mask.tolist(),
        ref=ref.tolist(),
        rollout=rollout.tolist() if corrected else None,
        entropy=[[x * x for x in row] for row in variables],
        ratio_level=ratio_level,
        surrogate=surrogate,
        **chosen,
    )
    assert loss.item() == pytest.approx(oracles.sg(expected), rel=1e-10, abs=1e-10)
    slope = getattr(expected, "slope", {})
    for (i, t), found in zip(itertools.product(*map(range, grad.shape)), grad.flatten().tolist()):
        assert found == pytest.approx(slope.get((i, t), 0.0), rel=1e-10, abs=1e-10)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(["group", "batch", "none"]),
    st.booleans(),
    st.sampled_from([1e-6, 0.5]),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_advantages_are_the_oracles(groups, size, seed, scale, leave_one_out, eps, share):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(-3, 4, (groups, size), generator=g) / 4 + torch.rand(
        groups, 1, generator=g, dtype=torch.float64
    )
    valid = torch.rand(groups, size, generator=g) < share
    found = group_advantages(
        rewards, scale=scale, leave_one_out=leave_one_out, eps=eps, valid=valid
    )
    expected = oracles.advantages(rewards.tolist(), valid.tolist(), scale, leave_one_out, eps)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


@given(st.integers(1, 12), st.integers(1, 12))
def test_overlong_penalty_is_the_oracle(longest, buffer):
    if buffer > longest:
        with pytest.raises(ValueError, match=rf"1..max_tokens = {longest}, got {buffer}"):
            soft_overlong_penalty(torch.tensor([1]), longest, buffer)
        return
    lengths = torch.arange(longest + 3)
    found = soft_overlong_penalty(lengths, longest, buffer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found,
        torch.tensor([oracles.overlong_penalty(n, longest, buffer) for n in lengths.tolist()]),
    )


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize(
    "a, rho, loss, slope",
    [  # slope: d loss / d logp = rho d loss / d rho
        (1, 0.5, -0.5, -0.5),  # A > 0, low: a good token that became rarer comes back, unclipped
        (1, 0.9, -0.9, -0.9),
        (1, 1.2, -1.2, -1.2),  # inside
        (1, 2.0, -1.28, 0.0),  # high: has risen enough
        (1, 4.0, -1.28, 0.0),  # beyond the dual clip, which is not for A > 0
        (-2, 0.5, 1.6, 0.0),  # A < 0, low: has fallen enough
        (-2, 0.9, 1.8, 1.8),
        (-2, 1.2, 2.4, 2.4),  # inside
        (-2, 2.0, 4.0, 4.0),  # high: a bad token that became likelier is pushed down, unclipped
        (-2, 4.0, 8.0, 8.0),  # beyond the dual clip: without it the loss has no bound
        (0, 4.0, 0.0, 0.0),
    ],
)
def test_clip_region_by_region(a, rho, loss, slope, dual):
    if dual and a < 0 and rho > dual:
        loss, slope = -dual * a, 0.0
    logprob = torch.tensor([[math.log(rho) - 1.5]], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.full((1, 1), -1.5, dtype=torch.float64), torch.tensor([float(a)])
    per_token, stats = policy_loss(logprob, old, advantage, torch.ones(1, 1), dual_clip=dual)
    assert per_token.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(per_token.sum(), logprob)[0].item() == pytest.approx(
        slope, abs=1e-12
    )
    counted = {
        "clip_high": float(rho > 1.28 and a > 0),
        "clip_low": float(rho < 0.8 and a < 0),
        "ratio_deviation": abs(rho - 1),
    }
    counted |= {"clip_dual": float(rho > 3 and a < 0)} if dual else {}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(counted)


def test_edges_are_inside():
    """A ratio exactly at the edge of the clip, the dual clip or the cap is not counted as beyond it
    and has its gradient.
    """
    for a in (2.0, -2.0):
        # the ratio is exactly 1, and both edges of this clip are there
        logprob = torch.zeros(1, 1, requires_grad=True)
        per_token, stats = policy_loss(
            logprob, torch.zeros(1, 1), torch.tensor([a]), torch.ones(1, 1), clip_low=0, clip_high=0
        )
        assert stats["clip_high"] == stats["clip_low"] == 0 and per_token.item() == -a
        assert torch.autograd.grad(per_token.sum(), logprob)[0].item() == -a
    logprob = torch.tensor([[1.3]])
    for a, bound, name in ((-1.0, "dual_clip", "clip_dual"), (1.0, "cispo_cap", "clip_high")):
        options = {bound: logprob.exp().item(), "surrogate": "clip" if a < 0 else "cispo"}
        assert (
            policy_loss(logprob, torch.zeros(1, 1), torch.tensor([a]), torch.ones(1, 1), **options)[
                1
            ][name]
            == 0
        )


def test_an_advantage_of_zero_counts_as_no_clip():
    far = torch.tensor([[5.0, -5.0]])
    _, stats = policy_loss(far, torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2), dual_clip=3.0)
    assert stats["clip_high"] == stats["clip_low"] == stats["clip_dual"] == 0


def test_cispo_by_hand():
    """-sg(min(rho, 5)) A logp: beyond the cap the weight stops growing and the gradient stays."""
    logprob = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, -0.5 - math.log(4.0), -2 - math.log(8)]], dtype=torch.float64)
    per_token, stats = policy_loss(
        logprob, old, torch.tensor([2.0]), torch.ones(1, 3), surrogate="cispo"
    )
    assert per_token.tolist()[0] == pytest.approx([2.0, 4.0, 20.0])
    assert torch.autograd.grad(per_token.sum(), logprob)[0].tolist()[0] == pytest.approx(
        [-2.0, -8.0, -10.0]
    )
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        {"clip_high": 1 / 3, "ratio_deviation": (0 + 3 + 7) / 3}
    )


def test_gspo_by_hand():
    """rho of the answer is the geometric mean of 1 and 4, and moves with either token by half."""
    logprob = torch.tensor([[0.0, math.log(4.0), 9.0]], dtype=torch.float64, requires_grad=True)
    per_token, stats = policy_loss(
        logprob,
        torch.zeros(1, 3),
        torch.tensor([-1.0]),
        torch.tensor([[1, 1, 0]]),
        ratio_level="sequence",
    )
    assert per_token.tolist()[0] == pytest.approx([2.0, 2.0, 0.0]) and stats[
        "ratio_deviation"
    ].item() == pytest.approx(1.0)
    assert torch.autograd.grad(per_token.sum(), logprob)[0].tolist()[0] == pytest.approx(
        [2.0, 2.0, 0.0]
    )


def test_defaults():
    """Clip 0.2 / 0.28 a token, no dual clip, no KL but a k3 in the log, weights up to 2, token
    mean, group std plus 1e-6.
    """
    none, on = torch.zeros(1, 2), torch.ones(1, 2)
    for a, ratios, loss in (
        (1, (1.27, 1.29), (-1.27, -1.28)),
        (-1, (0.81, 0.79), (0.81, 0.8)),
        (-1, (20.0, 1.1), (20.0, 1.1)),
    ):
        logprob = torch.tensor([ratios]).log()
        per_token, stats = policy_loss(logprob, none, torch.tensor([float(a)]), on)
        assert per_token.tolist()[0] == pytest.approx(loss) and "clip_dual" not in stats
        whole, stats = grpo_loss(logprob, none, torch.tensor([float(a)]), on, ref_logprob=none - 9)
        assert whole.item() == pytest.approx(sum(loss) / 2) and "rollout_weight" not in stats
    logprob, ref = torch.full((1, 2), 3.0), torch.full((1, 2), 2.0)
    for options in ({}, {"surrogate": "cispo"}):
        per_token, _ = policy_loss(logprob, none, -on[0, :1], on, **options)
        whole, stats = grpo_loss(logprob, none, -on[0, :1], on, ref_logprob=ref, **options)
        assert whole.item() == pytest.approx(per_token.mean().item()) and stats[
            "kl"
        ].item() == pytest.approx(math.exp(-1))
    assert kl_penalty(logprob, ref).tolist()[0] == pytest.approx([math.exp(-1)] * 2)
    weighed, stats = grpo_loss(none, none, on[0, :1], on, rollout_logprob=none - 1)
    assert weighed.item() == -2.0 and stats["rollout_weight"] == 2.0 and "kl" not in stats
    assert aggregate(
        torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    ).item() == pytest.approx(3.0)
    a = 0.5 / (0.5**0.5 + 1)
    assert group_advantages(torch.tensor([[0.0, 1e-6]])).tolist()[0] == pytest.approx([-a, a])


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])
    found = group_advantages(rewards)
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    torch.testing.assert_close(found[0], torch.tensor([-2.0, -1, 0, 3]) / (std + 1e-6))
    assert found[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(
        group_advantages(rewards, scale="none")[0], torch.tensor([-2.0, -1, 0, 3])
    )
    batch_std = rewards.std()
    torch.testing.assert_close(
        group_advantages(rewards, scale="batch")[0],
        torch.tensor([-2.0, -1, 0, 3]) / (batch_std + 1e-6),
    )
    # 1 - 11/3, 2 - 10/3, 3 - 9/3, 6 - 6/3
    alone = group_advantages(rewards, scale="none", leave_one_out=True)[0]
    torch.testing.assert_close(alone, torch.tensor([-8.0, -4, 0, 12]) / 3)


def test_aggregations_by_hand():
    loss, mask = (
        torch.tensor([[1.0, 2.0], [4.0, 9.0], [7.0, 7.0]]),
        torch.tensor([[1, 1], [1, 0], [0, 0]]),
    )
    for aggregation, total, count in (
        ("token-mean", 7, 3),
        ("sequence-mean", 1.5 + 4, 2),
        ("constant", 7, 30),
    ):
        assert aggregate(
            loss, mask, aggregation=aggregation, max_tokens=10
        ).item() == pytest.approx(total / count)
        assert aggregate(
            loss, mask, aggregation=aggregation, denominator=5
        ).item() == pytest.approx(total / 5)
        assert aggregate(
            loss, mask, aggregation=aggregation, denominator=torch.tensor(4)
        ).item() == pytest.approx(total / 4)
        assert denominator_of(mask, aggregation=aggregation, max_tokens=10).item() == count
    assert denominator_of(mask.bool().to("meta"), aggregation="constant", max_tokens=2).is_meta, (
        "beside its mask, so that NCCL can sum it"
    )
    assert denominator_of(mask).item() == 3 and denominator_of(mask.float()).item() == 3
    assert aggregate(loss, mask, aggregation="constant", max_tokens=1).item() == pytest.approx(
        7 / 3
    )


def test_overlong_filter_takes_whole_answers_out():
    mask, finished = (
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        torch.tensor([1, 0, 1]),
    )
    assert overlong_filter(mask, finished).tolist() == [
        [True, True, False],
        [False] * 3,
        [False] * 3,
    ]
    loss, _ = grpo_loss(
        torch.zeros(3, 3),
        torch.zeros(3, 3),
        torch.tensor([-1.0, -9.0, 5.0]),
        overlong_filter(mask, finished),
    )
    assert loss.item() == 1.0


def test_statistics_are_means_over_tokens():
    logprob, old, advantage, mask, ref, rollout = batch(rows=4, seed=4)
    logprob = logprob.detach().requires_grad_()
    _, stats = grpo_loss(
        logprob,
        old,
        advantage,
        mask,
        ref_logprob=ref,
        rollout_logprob=rollout,
        rollout_floor=0.5,
        off_policy_delta=0.1,
        **PAPER,
    )
    tokens, (n, width) = [], mask.shape
    for i, t in itertools.product(range(n), range(width)):
        if mask[i, t]:
            rho, a = math.exp(logprob[i, t].item() - old[i, t].item()), advantage[i].item()
            weight = math.exp(old[i, t].item() - rollout[i, t].item())
            drift = (rollout - logprob)[i][mask[i]].mean().item()
            tokens.append(
                {
                    "clip_high": rho > 1.28 and a > 0,
                    "clip_low": rho < 0.8 and a < 0,
                    "clip_dual": rho > 3 and a < 0,
                    "ratio_deviation": abs(rho - 1),
                    "kl": oracles.kl(logprob[i, t].item(), ref[i, t].item(), "k3"),
                    "rollout_weight": min(max(weight, 0.5), 2.0),
                    "rollout_outside": not 0.5 <= weight <= 2,
                    "off_policy": a < 0 and drift > 0.1,
                }
            )
    means = {name: sum(token[name] for token in tokens) / len(tokens) for name in tokens[0]}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(means)
    assert all(0 < means[name] < 1 for name in ("rollout_outside", "off_policy"))
    assert not any(value.requires_grad for value in stats.values())


def test_the_gradient_reaches_logprob_alone():
    """old = logprob is the first on-policy step: the old one is a constant, or nothing would be
    learned.
    """
    logprob, old, advantage, mask, ref, rollout = batch()
    others = [x.detach().requires_grad_() for x in (old, advantage, ref, rollout)]
    loss, _ = grpo_loss(
        logprob,
        others[0],
        others[1],
        mask,
        ref_logprob=others[2],
        rollout_logprob=others[3],
        **PAPER,
    )
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None,) * 4
    choices = [{"surrogate": name} for name in SURROGATES]
    for options in ({"ratio_level": "sequence"}, *choices):
        loss, _ = grpo_loss(
            logprob,
            logprob,
            advantage,
            mask,
            ref_logprob=logprob,
            kl_coef=0.1,
            kl_estimator="k2",
            **options,
        )
        expected = torch.where(mask, -advantage[:, None] / mask.sum(), 0.0)
        torch.testing.assert_close(torch.autograd.grad(loss, logprob)[0], expected)


# ---- equal rewards, masks, empty things ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 12345.678, -3.3])
def test_equal_rewards_give_exactly_zero(dtype, value):
    """Float residue of the mean over a tiny std was amplified a thousandfold."""
    for scale, eps, size in itertools.product(("group", "batch", "none"), (1e-6, 0.0), (7, 8, 1)):
        assert (
            group_advantages(torch.full((3, size), value, dtype=dtype), scale=scale, eps=eps) == 0
        ).all()
    some = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    rewards = torch.where(
        some.bool(), torch.full((3, 4), value, dtype=dtype), torch.tensor(float("nan"), dtype=dtype)
    )
    for scale, one_out in itertools.product(("group", "batch", "none"), (False, True)):
        assert (
            group_advantages(rewards, scale=scale, leave_one_out=one_out, eps=0.0, valid=some) == 0
        ).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscored_answers_do_not_count(bad, scale):
    valid = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    clean = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 5.0]], requires_grad=True)
    dirty = torch.where(valid.bool(), clean.detach(), bad).requires_grad_()
    found, expected = (
        group_advantages(x, valid=valid, scale=scale, leave_one_out=True) for x in (dirty, clean)
    )
    assert torch.equal(found, expected) and found[1].tolist() == [0, 0, 0] and found[0, 2] == 0
    divisor = {
        "group": 2**0.5 + 1e-6,
        "batch": torch.tensor([1.0, 3, 2, 2, 5]).std() + 1e-6,
        "none": 1.0,
    }[scale]
    torch.testing.assert_close(found[0, :2], torch.tensor([-2.0, 2.0]) / divisor)
    weights = torch.arange(9.0).view(3, 3)
    grads = [
        torch.autograd.grad((a * weights).sum(), x)[0]
        for a, x in ((found, dirty), (expected, clean))
    ]
    assert torch.equal(*grads) and grads[0].isfinite().all()


def test_a_reward_that_is_not_a_number_is_not_hidden():
    """Inside `valid` a NaN is the caller's bug: it must not pass as a group without spread."""
    rewards = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    for scale in ("group", "none"):
        found = group_advantages(rewards, scale=scale)
        assert found[0].isnan().all() and found[1].isfinite().all()
    assert group_advantages(rewards, scale="batch").isnan().all()


@calm
@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_behind_the_mask_is_read(bad, variant):
    """Bug of verl: x * mask lets a NaN in a masked place poison the mean."""
    logprob, old, advantage, mask, ref, rollout = batch()
    assert not mask[-1].any(), "a whole row is masked, so its advantage is, too"
    clean = loss_of(logprob, old, advantage, mask, ref, rollout, **variant)
    dirty = [torch.where(mask, x.detach(), bad) for x in (logprob, old, ref, rollout)]
    dirty[0].requires_grad_()
    hidden = torch.where(mask.any(1), advantage, bad)
    with torch.autograd.detect_anomaly(check_nan=True):
        found = loss_of(dirty[0], dirty[1], hidden, mask, dirty[2], dirty[3], **variant)
    assert (
        torch.equal(found[0], clean[0])
        and torch.equal(found[1], clean[1])
        and (found[1][~mask] == 0).all()
    )
    _, stats = grpo_loss(
        dirty[0], dirty[1], hidden, mask, ref_logprob=dirty[2], rollout_logprob=dirty[3], **variant
    )
    assert all(value.isfinite() for value in stats.values())
    per_token = torch.where(mask, ref, bad)
    assert torch.equal(aggregate(per_token, mask), aggregate(torch.where(mask, ref, 0.0), mask))


@variants
def test_empty_masks_are_zero(variant):
    logprob, old, advantage, mask, ref, rollout = batch()
    for rows, count in ((slice(None), None), (slice(0, 0), None), (slice(None), torch.tensor(0))):
        leaf, nothing = logprob.detach()[rows].requires_grad_(), torch.zeros_like(mask[rows])
        loss, grad = loss_of(
            leaf,
            old[rows],
            advantage[rows],
            nothing,
            ref[rows],
            rollout[rows],
            denominator=count,
            **variant,
        )
        assert loss.item() == 0 and (grad == 0).all()
        _, stats = grpo_loss(
            leaf, old[rows], advantage[rows], nothing, ref_logprob=ref[rows], **variant
        )
        assert all(value.item() == 0 for value in stats.values())
    assert group_advantages(torch.zeros(0, 4)).shape == (0, 4)


@calm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_a_ratio_out_of_range_stays_finite(dtype, ratio_level):
    """exp overflows at 89 nats in fp32; inf times an advantage of 0, or times the slope 0 of the
    clip, was NaN.
    """
    logprob = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    ref, old = torch.zeros(3, 2, dtype=dtype), torch.full((3, 2), -1000.0, dtype=dtype)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss, _ = grpo_loss(
            logprob,
            old,
            torch.tensor([0.0, 2.0, -2.0]),
            torch.ones(3, 2),
            ref_logprob=ref,
            kl_coef=0.1,
            kl_ratio=True,
            rollout_logprob=old - 1000,
            dual_clip=3.0,
            ratio_level=ratio_level,
        )
        grad = torch.autograd.grad(loss, logprob)[0]
    assert loss.item() == pytest.approx(2 * (0 - 2 * 1.28 + 3 * 2) / 3) and (grad == 0).all()


# ---- invariances ---------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_of_any_size(variant, size):
    """Bug of nano-aha-moment, verl, TRL: a count per micro-batch made the learning rate depend on
    its size.
    """
    everything = batch(rows=9)
    mask = everything[3]
    loss, grad = loss_of(*everything, **variant)
    parts = [slice(first, first + size) for first in range(0, 9, size)]
    wanted = {key: variant[key] for key in ("aggregation", "max_tokens") if key in variant}
    count = denominator_of(mask, **wanted)
    assert count == sum(denominator_of(mask[rows], **wanted) for rows in parts)
    found = [
        loss_of(
            *(x.detach()[rows].requires_grad_(x.requires_grad) for x in everything),
            denominator=count,
            **variant,
        )
        for rows in parts
    ]
    torch.testing.assert_close(sum(part for part, _ in found), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in found]), grad, rtol=0, atol=1e-12)


@variants
def test_padding_and_the_order_of_rows(variant):
    """Bug of nano-aha-moment: the normaliser counted padding, so that the learning rate changed
    with the longest answer.
    """
    everything = batch()
    loss, grad = loss_of(*everything, **variant)
    padded = [
        (
            x.detach()
            if x.dim() == 1
            else F.pad(x.detach(), (0, 3), value=float("nan") if x.is_floating_point() else 0)
        )
        for x in everything
    ]
    padded[0].requires_grad_()
    found, slope = loss_of(*padded, **variant)
    torch.testing.assert_close((found, slope[:, :5]), (loss, grad), rtol=0, atol=1e-12)
    assert (slope[:, 5:] == 0).all()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = [x.detach()[order] for x in everything]
    shuffled[0].requires_grad_()
    torch.testing.assert_close(
        loss_of(*shuffled, **variant), (loss, grad[order]), rtol=0, atol=1e-12
    )


# ---- dtypes, torch.func, errors ------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(variant, dtype):
    half = [x.detach().to(dtype) if x.is_floating_point() else x for x in batch()]
    half[0].requires_grad_()
    exact = [x.detach().float() if x.is_floating_point() else x for x in half]
    exact[0].requires_grad_()
    found, expected = loss_of(*half, **variant), loss_of(*exact, **variant)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].to(dtype))
    for call in (
        lambda x: group_advantages(x),
        lambda x: kl_penalty(x, x, "k2", x),
        lambda x: aggregate(x, torch.ones(6, 5)),
        lambda x: soft_overlong_penalty(x, 9, 3),
        lambda x: policy_loss(x, x, x[:, 0], torch.ones(6, 5))[0],
    ):
        assert call(half[1]).dtype == torch.float32 and torch.equal(call(half[1]), call(exact[1]))
        assert call(exact[1].double()).dtype == torch.float64


@variants
def test_under_torch_func(variant):
    logprob, old, advantage, mask, ref, rollout = batch()
    _, expected = loss_of(logprob, old, advantage, mask, ref, rollout, **variant)

    def loss(lp, lo, a, m, lr, ro):
        return grpo_loss(lp, lo, a, m, ref_logprob=lr, rollout_logprob=ro, **variant)[0]

    everything = logprob.detach(), old, advantage, mask, ref, rollout
    torch.testing.assert_close(torch.func.grad(loss)(*everything), expected)
    groups = [x.view(2, 3, *x.shape[1:]) for x in everything]
    each = [loss(*(x[b] for x in groups)) for b in range(2)]
    torch.testing.assert_close(torch.func.vmap(loss)(*groups), torch.stack(each))
    slopes = torch.stack([torch.func.grad(loss)(*(x[b] for x in groups)) for b in range(2)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*groups), slopes)
    _, along = torch.func.jvp(lambda lp: loss(lp, *everything[1:]), (everything[0],), (ref,))
    torch.testing.assert_close(along, (expected * ref).sum())
    rewards = advantage.view(3, 1, 2)
    torch.testing.assert_close(
        torch.func.vmap(group_advantages)(rewards)[:, 0], group_advantages(rewards[:, 0])
    )


def test_batch_std_of_one_rank_is_that_of_its_rewards(tmp_path):
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 9.0]])
    alone = group_advantages(rewards, scale="batch")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(
            group_advantages(rewards.requires_grad_(), scale="batch").detach(), alone
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: group_advantages(torch.zeros(3)), r"got \(3,\) and None"),
        (lambda x: group_advantages(torch.zeros(3, 0)), r"got \(3, 0\) and None"),
        (
            lambda x: group_advantages(x, valid=torch.ones(4, 2)),
            r"valid of the same shape, got \(2, 4\) and \(4, 2\)",
        ),
        (
            lambda x: group_advantages(x, scale="std"),
            "scale must be one of group, batch, mean, none, got 'std'",
        ),
        (
            lambda x: policy_loss(x, x, torch.zeros(3), x),
            r"advantage must be \[R\] for logprob \[R, T\], got \(3,\) and \(2, 4\)",
        ),
        (lambda x: policy_loss(x[0], x[0], x[0], x[0]), r"got \(4,\) and \(4,\)"),
        (
            lambda x: policy_loss(x, x.T, x[:, 0], x),
            r"one shape, \[R, T\]: logprob \(2, 4\), old_logprob \(4, 2\), mask \(2, 4\)",
        ),
        (
            lambda x: policy_loss(x, x, x[:, 0], x[:, :1]),
            r"logprob \(2, 4\), old_logprob \(2, 4\), mask \(2, 1\)",
        ),
        (lambda x: aggregate(x, torch.zeros(2, 5)), r"per_token \(2, 4\), mask \(2, 5\)"),
        (
            lambda x: aggregate(x[0], x[0], denominator=1),
            r"per_token must be \[R, T\] and denominator one number, got \(4,\) and \(\)",
        ),
        (
            lambda x: aggregate(x, x, denominator=x[0]),
            r"denominator one number, got \(2, 4\) and \(4,\)",
        ),
        (
            lambda x: aggregate(x, x, aggregation="mean"),
            "aggregation must be one of token-mean, sequence-mean, constant, got 'mean'",
        ),
        (
            lambda x: aggregate(x, x, aggregation="mean", denominator=1),
            "aggregation must be one of",
        ),
        (
            lambda x: aggregate(x, x, aggregation="constant"),
            'aggregation="constant" needs max_tokens of 1 or more, got None',
        ),
        (
            lambda x: aggregate(x, x, aggregation="constant", max_tokens=0),
            "needs max_tokens of 1 or more, got 0",
        ),
        (
            lambda x: denominator_of(x, aggregation="constant"),
            "needs max_tokens of 1 or more, got None",
        ),
        (
            lambda x: grpo_loss(x, x, x[:, 0], x, aggregation="constant"),
            "needs max_tokens of 1 or more, got None",
        ),
        (lambda x: denominator_of(x[0]), r"mask must be \[R, T\], got \(4,\)"),
        (lambda x: denominator_of(x, aggregation="mean"), "aggregation must be one of"),
        (
            lambda x: overlong_filter(x, torch.ones(4)),
            r"finished must be \[R\] for mask \[R, T\], got \(4,\) and \(2, 4\)",
        ),
        (lambda x: overlong_filter(x[0], torch.ones(4)), r"got \(4,\) and \(4,\)"),
        (lambda x: soft_overlong_penalty(x, 4, 0), r"buffer must lie in 1..max_tokens = 4, got 0"),
        (lambda x: kl_penalty(x, x, "k4"), "estimator must be one of k1, k2, k3, got 'k4'"),
        (lambda x: kl_penalty(x, x[:1]), r"logprob \(2, 4\), ref_logprob \(1, 4\)"),
        (
            lambda x: kl_penalty(x, x, "k3", x[:, :1]),
            r"logprob \(2, 4\), ref_logprob \(2, 4\), ratio \(2, 1\)",
        ),
        (
            lambda x: grpo_loss(x, x, torch.zeros(2), x, ref_logprob=x[:1]),
            r"logprob \(2, 4\), .*, ref_logprob \(1, 4\)",
        ),
        (
            lambda x: grpo_loss(x, x, torch.zeros(2), x, rollout_logprob=x[:1]),
            r"logprob \(2, 4\), .*, rollout_logprob \(1, 4\)",
        ),
        (
            lambda x: grpo_loss(x[:1], x, torch.zeros(2), x),
            r"logprob \(1, 4\), old_logprob \(2, 4\), mask \(2, 4\)",
        ),
        (
            lambda x: grpo_loss(x, x[:1], torch.zeros(2), x),
            r"logprob \(2, 4\), old_logprob \(1, 4\), mask \(2, 4\)",
        ),
        (
            lambda x: grpo_loss(x, x, torch.zeros(2), x[:1]),
            r"logprob \(2, 4\), old_logprob \(2, 4\), mask \(1, 4\)",
        ),
        (
            lambda x: grpo_loss(x, x, torch.zeros(2), x, kl_coef=0.1),
            "kl_coef=0.1 needs ref_logprob",
        ),
        (
            lambda x: policy_loss(x, x, torch.zeros(2), x, ratio_level="group"),
            "ratio_level must be one of token, sequence, got 'group'",
        ),
        (
            lambda x: policy_loss(x, x, torch.zeros(2), x, surrogate="ppo"),
            "surrogate must be one of clip, cispo, dppo, sapo, got 'ppo'",
        ),
        (
            lambda x: policy_loss(
                x, x, torch.zeros(2), x, ratio_level="sequence", surrogate="cispo"
            ),
            (
                '^ratio_level="sequence" and surrogate="cispo" contradict each other: it weighs'
                " single tokens$"
            ),
        ),
        (
            lambda x: policy_loss(x, x, torch.zeros(2), x, clip_low=-0.1),
            "clip_low and clip_high must be 0 or more, got -0.1 and 0.28",
        ),
        (lambda x: policy_loss(x, x, torch.zeros(2), x, clip_high=-0.1), "got 0.2 and -0.1"),
        (
            lambda x: policy_loss(x, x, torch.zeros(2), x, clip_high=0.5, dual_clip=1.5),
            r"dual_clip must lie above 1 \+ clip_high = 1.5, got 1.5",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4))


MASKED = {
    "overlong_filter": lambda x, mask: overlong_filter(mask, torch.ones(2)),
    "group_advantages": lambda x, mask: group_advantages(x, valid=mask),
    "policy_loss": lambda x, mask: policy_loss(x, x, torch.zeros(2), mask),
    "denominator_of": lambda x, mask: denominator_of(mask),
    "aggregate": lambda x, mask: aggregate(x, mask),
    "grpo_loss": lambda x, mask: grpo_loss(x, x, torch.zeros(2), mask),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_a_tensor_of_0_and_1(name):
    """Bug: 0.5 counted as 1, and a list was an AttributeError of torch."""
    x, call = torch.zeros(2, 4), MASKED[name]
    what = "valid" if name == "group_advantages" else "mask"
    for mask in (torch.tensor([[1, 1, 0.5, 0]] * 2), torch.tensor([[1, 0, 2, 0]] * 2)):
        with pytest.raises(ValueError, match=f"{what} must hold 0 and 1 alone, got (0.5|2)"):
            call(x, mask)
    for mask in ([[1, 1, 0, 0]] * 2, None) if what == "mask" else ([[1, 1, 0, 0]] * 2,):
        with pytest.raises(TypeError, match=f"{what} must be a tensor, got (list|NoneType)"):
            call(x, mask)
    for mask in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.long)):
        torch.testing.assert_close(call(x, mask), call(x, mask.bool()))
    with pytest.raises(TypeError, match="(logprob|rewards|per_token) must be a tensor, got list"):
        grpo_loss([[0.0]], x, torch.zeros(2), x) if what == "mask" else group_advantages([[0.0]])


def test_a_bool_mask_is_not_looked_at(monkeypatch):
    """On a GPU, looking would wait for it at every call."""
    monkeypatch.setattr(torch.Tensor, "__ne__", None)
    mask = torch.ones(2, 4, dtype=torch.bool)
    grpo_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2), mask)


def test_loss_needs_torch_alone():
    code = (
        "import sys, minigrpo.loss; print([m for m in ('transformers', 'scipy', 'PIL',"
        " 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )
