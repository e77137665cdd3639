"""Tiled log-probs against full logits."""

import pytest
import torch

from minigrpo.logprob import linear_logprob
from tests.memory import peak_bytes


def naive(hidden, weight, target, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("tile", [1, 3, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(tile, temperature):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (11, 5))
    )
    target, g, h = (
        torch.randint(11, (7,)),
        torch.randn(7, dtype=torch.float64),
        torch.randn(7, dtype=torch.float64),
    )
    found = linear_logprob(hidden, weight, target, temperature=temperature, tile=tile, entropy=True)
    expected = naive(hidden, weight, target, temperature)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    grads = [
        torch.autograd.grad((x * g + y * h).sum(), (hidden, weight)) for x, y in (found, expected)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gradcheck():
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (6, 3))
    )
    target = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, target, tile=3, temperature=1.7, entropy=True),
        (hidden, weight),
    )


def test_an_entropy_that_is_only_logged_changes_no_gradient():
    torch.manual_seed(0)
    hidden, weight, target = (
        torch.randn(9, 4, requires_grad=True),
        torch.randn(6, 4, requires_grad=True),
        torch.randint(6, (9,)),
    )
    logprob, entropy = linear_logprob(hidden, weight, target, tile=4, temperature=0.8, entropy=True)
    grads = torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True)
    alone = torch.autograd.grad(
        linear_logprob(hidden, weight, target, tile=4, temperature=0.8).sum(), (hidden, weight)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, alone))
    of_entropy = torch.autograd.grad(entropy.sum(), (hidden, weight))
    expected = torch.autograd.grad(naive(hidden, weight, target, 0.8)[1].sum(), (hidden, weight))
    torch.testing.assert_close(of_entropy, expected, atol=1e-5, rtol=0)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [1.0]])
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1]), entropy=True)
    torch.testing.assert_close(logprob, torch.tensor([0.5, 0.5]).log() - torch.tensor([0, 600.0]))
    torch.testing.assert_close(entropy, torch.tensor([2.0, 2.0]).log())


@pytest.mark.parametrize("entropy, tiles", [(False, 1), (True, 2)])
def test_peak_memory_is_tiles_and_not_rows(entropy, tiles):
    """Measured, forward and backward: a tile of logits (two for the entropy), the gradients, and a
    few floats a row.
    """
    V, d, tile = 5000, 16, 64
    weight = torch.randn(V, d, requires_grad=True)

    def step(N, score):
        hidden, target = torch.randn(N, d, requires_grad=True), torch.randint(V, (N,))
        return peak_bytes(
            lambda: torch.autograd.grad(score(hidden, target).sum(), (hidden, weight))
        )

    def ours(hidden, target):
        found = linear_logprob(hidden, weight, target, tile=tile, entropy=entropy)
        return found[0] if entropy else found

    for N in (256, 4096):
        assert step(N, ours) < 4 * (1.05 * tiles * tile * V + 2 * V * d + N * (2 * d + 12))
    assert (
        step(4096, ours)
        < step(4096, lambda hidden, target: naive(hidden, weight, target, 1.0)[0]) / 8
    )


def test_bfloat16_comes_out_in_float32():
    """Bug of R1-V, VLM-R1, simple_GRPO: log-softmax in bf16 moved a third of the ratios by over
    2%.
    """
    torch.manual_seed(0)
    hidden, weight, target = (
        torch.randn(64, 32),
        torch.randn(500, 32) / 6,
        torch.randint(500, (64,)),
    )
    found = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    exact, _ = naive(hidden.bfloat16().double(), weight.bfloat16().double(), target, 1.0)
    assert found.dtype == torch.float32
    assert ((found - exact).exp() - 1).abs().max() < 0.02


def test_frozen_head_costs_no_weight_gradient():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    linear_logprob(hidden, weight, torch.zeros(4, dtype=torch.long)).sum().backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize(
    "shapes", [((4, 3), (6, 2), (4,)), ((4, 3), (6, 3), (5,)), ((4,), (6, 3), (4,))]
)
def test_wrong_shapes_are_named(shapes):
    hidden, weight, target = shapes
    with pytest.raises(ValueError, match=str(hidden).replace("(", r"\(").replace(")", r"\)")):
        linear_logprob(
            torch.randn(hidden), torch.randn(weight), torch.zeros(target, dtype=torch.long)
        )
