"""The KL estimators by exact enumeration: what each is worth as a value, and where each pulls as a
loss.

`python tests/test_docs.py --fix` puts the table of this file into docs/algorithm.md.
"""

from pathlib import Path

import pytest
import torch

from minigrpo.loss import kl_penalty

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)  # of a policy over four tokens
REF = torch.tensor([0.5, 0.6, -0.4, -0.2], dtype=torch.float64).log_softmax(0)
# what sampled, once the policy has moved on
OTHER = torch.tensor([-0.5, 0.2, 0.9, 0.4], dtype=torch.float64).log_softmax(0)
ESTIMATORS = {
    "k1": ("k1", False),
    "k2": ("k2", False),
    "k3": ("k3", False),
    "ratio * k1": ("k1", True),
    "ratio * k2": ("k2", True),
    "ratio * k3": ("k3", True),
}


def divergence(p, q):
    """KL(p || q) of two log-probs over the vocabulary, in nats."""
    return (p.exp() * (p - q)).sum()


def expected(name, sampler):
    """E of the estimator over all tokens the sampler may draw, and of its gradient with respect to
    the policy's logits.
    """
    estimator, with_ratio = ESTIMATORS[name]
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    ratio = (logp - sampler).exp()[:, None] if with_ratio else None
    value = (sampler.exp() * kl_penalty(logp[:, None], REF[:, None], estimator, ratio)[:, 0]).sum()
    return value.item(), torch.autograd.grad(value, logits)[0]


def gradient(of):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(of(logits.log_softmax(0)), logits)[0]


POLICY = LOGITS.log_softmax(0)
KL = divergence(POLICY, REF).item()
GRADIENTS = {
    "0": torch.zeros(4, dtype=torch.float64),
    "∇KL(π‖ref)": gradient(lambda p: divergence(p, REF)),
    "∇KL(ref‖π)": gradient(lambda p: divergence(REF, p)),
}
PULLS = {
    "k1": "0",
    "k2": "∇KL(π‖ref)",
    "k3": "∇KL(ref‖π)",
    "ratio * k1": "∇KL(π‖ref)",
    "ratio * k2": "neither",
    "ratio * k3": "∇KL(π‖ref)",
}
UNBIASED = {
    "k1": True,
    "k2": False,
    "k3": True,
    "ratio * k1": True,
    "ratio * k2": False,
    "ratio * k3": True,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_on_policy(name):
    value, slope = expected(name, POLICY)
    assert (abs(value - KL) < 1e-12) == UNBIASED[name]
    for other, exact in GRADIENTS.items():
        assert torch.allclose(slope, exact, rtol=0, atol=1e-12) == (other == PULLS[name])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_off_policy_only_the_ratio_keeps_its_promise(name):
    value, slope = expected(name, OTHER)
    right = (
        abs(value - KL) < 1e-12,
        torch.allclose(slope, GRADIENTS["∇KL(π‖ref)"], rtol=0, atol=1e-12),
    )
    assert right == ((True, True) if name in ("ratio * k1", "ratio * k3") else (False, False))


def table():
    def numbers(x):
        return ", ".join(f"{v + 0.0:.3f}" if abs(v) > 1e-12 else "0" for v in x.tolist())

    def same(a, b):
        return torch.allclose(a, b, rtol=0, atol=1e-12)

    def pull(slope):
        return next((name for name, exact in GRADIENTS.items() if same(slope, exact)), "neither")

    def mean(value):
        return f"{value:.4f}" + " = KL" * (abs(value - KL) < 1e-12)

    lines = [
        (
            f"π = ({numbers(POLICY.exp())}), π_ref = ({numbers(REF.exp())}), and off-policy the"
            " answers come from"
        ),
        f"({numbers(OTHER.exp())}). KL(π‖ref) = {KL:.4f} nats.",
        "",
        (
            "| as a loss | mean, on-policy | mean, off-policy | mean gradient, on-policy | which is"
            " | off-policy it is |"
        ),
        "|" + "---|" * 6,
    ]
    for name in ESTIMATORS:
        (value, slope), (far, far_slope) = expected(name, POLICY), expected(name, OTHER)
        lines.append(
            f"| {name} | {mean(value)} | {mean(far)} | ({numbers(slope)}) | {pull(slope)} |"
            f" {pull(far_slope)} |"
        )
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one():
    assert table() in (Path(__file__).parent.parent / "docs/algorithm.md").read_text(), (
        "python tests/test_docs.py --fix"
    )
