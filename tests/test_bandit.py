"""GRPO on a softmax policy over four arms, whose optimum is known. Nothing is sampled: every group
of answers is enumerated and weighed by its probability, so that the loss is GRPO's exact
expectation.
"""

import itertools

import pytest
import torch

from minigrpo.loss import group_advantages, grpo_loss

REWARDS = torch.tensor([0.2, 0.9, 0.5, 1.0], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
BETA = 0.5


def train(steps, learning_rate, *, size, scale, updates=1, leave_one_out=False, **settings):
    """The policy [4] after `steps` rollouts of some updates each, starting from the reference."""
    groups = torch.tensor(list(itertools.product(range(4), repeat=size)))  # (N, G)
    advantage = group_advantages(REWARDS[groups], scale=scale, leave_one_out=leave_one_out)
    mask = torch.ones(size, 1)
    loss_of = torch.func.vmap(
        lambda logprob, old, a, ref: grpo_loss(logprob, old, a, mask, ref_logprob=ref, **settings)[
            0
        ]
    )
    logits = REF.log().requires_grad_()
    for _ in range(steps):
        old = logits.detach().log_softmax(0)
        for _ in range(updates):
            logprob = logits.log_softmax(0)
            loss = loss_of(
                logprob[groups][..., None],
                old[groups][..., None],
                advantage,
                REF.log()[groups][..., None],
            )
            expected = (old.exp()[groups].prod(1) * loss).sum()
            logits = (
                (logits - learning_rate * torch.autograd.grad(expected, logits)[0])
                .detach()
                .requires_grad_()
            )
    return logits.detach().softmax(0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(dual_clip=3.0),
        dict(surrogate="cispo"),
        dict(surrogate="dppo"),
        dict(surrogate="sapo"),
        dict(off_policy_delta=0.1),
        dict(ratio_level="sequence", aggregation="sequence-mean"),
    ],
)
def test_without_a_reference_the_best_arm_wins(settings):
    policy = train(150, 1.0, size=3, scale="group", updates=2, **settings)
    assert policy.argmax() == 3 and policy[3] > 0.97


def tilted():
    """The maximum of E r - beta KL(pi || ref)."""
    weight = REF * (REWARDS / BETA).exp()
    return weight / weight.sum()


def k3_fixed_point():
    """pi = beta ref / (beta + mean r - r), mean r = E_pi r: where grad E r = beta grad KL(ref ||
    pi). Bisection on mean r.
    """
    low, high = REWARDS.max().item() - BETA, REWARDS.max().item()
    for _ in range(100):
        mean = (low + high) / 2
        policy = BETA * REF / (BETA + mean - REWARDS)
        low, high = (mean, high) if policy.sum() > 1 else (low, mean)
    assert abs((policy * REWARDS).sum() - mean) < 1e-12
    return policy


@pytest.mark.parametrize(
    "estimator, ratio, optimum",
    [("k2", False, tilted()), ("k3", True, tilted()), ("k3", False, k3_fixed_point())],
)
def test_with_a_reference_the_estimator_decides_where_it_ends(estimator, ratio, optimum):
    """k3 as a loss, GRPO's own choice, pulls by KL(ref || pi) and ends elsewhere than the two whose
    pull is KL(pi || ref). Without std and with leave one out the expected policy gradient is
    exactly that of E r.
    """
    assert (tilted() - k3_fixed_point()).abs().max() > 0.03
    policy = train(
        400,
        2.0,
        size=2,
        scale="none",
        leave_one_out=True,
        kl_coef=BETA,
        kl_estimator=estimator,
        kl_ratio=ratio,
    )
    torch.testing.assert_close(policy, optimum, rtol=0, atol=1e-5)


def test_k1_as_a_loss_holds_nothing():
    """Its expected gradient on-policy is 0: the policy runs away from the reference as if there
    were none.
    """
    held, free = (
        train(100, 3.0, size=2, scale="none", leave_one_out=True, kl_coef=beta, kl_estimator="k1")
        for beta in (BETA, 0.0)
    )
    torch.testing.assert_close(held, free, rtol=0, atol=1e-12)
    assert (free - tilted()).abs().max() > 0.2
