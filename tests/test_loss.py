"""The loss by hand, its invariances, and the masks that it must not look behind."""

import math

import pytest
import torch

from minigrpo.loss import aggregate, group_advantages, grpo_loss, kl_penalty, policy_loss

PAPER = dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.01)


def batch(rows=6, tokens=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    old, shift, ref = (torch.randn(rows, tokens, generator=g, dtype=dtype) for _ in range(3))
    lengths = torch.randint(0, tokens + 1, (rows,), generator=g)
    lengths[0] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    return (old + 0.5 * shift).requires_grad_(), old, torch.randn(rows, generator=g, dtype=dtype), mask, ref


def slow_loss(logprob, old, advantage, mask, ref):
    """L = max(-A rho, -A clip(rho)), at most -3 A where A < 0; plus 0.01 k3; mean over all tokens (2512.10691)."""
    total = count = 0
    for i in range(len(mask)):
        for t in range(mask.shape[1]):
            if mask[i, t]:
                a, rho = advantage[i].item(), math.exp(logprob[i, t].item() - old[i, t].item())
                loss = max(-a * rho, -a * min(max(rho, 0.8), 1.28))
                loss = min(loss, -3 * a) if a < 0 else loss
                d = ref[i, t].item() - logprob[i, t].item()
                total, count = total + loss + 0.01 * (math.exp(d) - d - 1), count + 1
    return total / count


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_loss_against_a_slow_loop(seed):
    logprob, old, advantage, mask, ref = batch(seed=seed)
    loss, _ = grpo_loss(logprob, old, advantage, mask, ref_logprob=ref, **PAPER)
    assert loss.item() == pytest.approx(slow_loss(logprob, old, advantage, mask, ref), abs=1e-12)
    loss.backward()
    for i, t in mask.nonzero().tolist()[:6]:  # central differences of the slow loop
        ends = []
        for step in (1e-6, -1e-6):
            moved = logprob.detach().clone()
            moved[i, t] += step
            ends.append(slow_loss(moved, old, advantage, mask, ref))
        assert logprob.grad[i, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)
    assert (logprob.grad[~mask] == 0).all()


@pytest.mark.parametrize("a, rho, loss, slope", [  # slope: d loss / d logp = rho d loss / d rho
    (1, 0.5, -0.5, -0.5), (1, 1.1, -1.1, -1.1), (1, 2.0, -1.28, 0.0), (-1, 0.5, 0.8, 0.0), (-1, 1.1, 1.1, 1.1),
    (-1, 2.0, 2.0, 2.0), (-1, 4.0, 3.0, 0.0)])
def test_clip_region_by_region(a, rho, loss, slope):
    logprob = torch.tensor([[math.log(rho)]], dtype=torch.float64, requires_grad=True)
    per_token, _ = policy_loss(logprob, torch.zeros(1, 1), torch.tensor([float(a)]), torch.ones(1, 1), dual_clip=3.0)
    assert per_token.item() == pytest.approx(loss)
    assert torch.autograd.grad(per_token.sum(), logprob)[0].item() == pytest.approx(slope)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1]])
    found = group_advantages(rewards)
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    torch.testing.assert_close(found[0], torch.tensor([-2.0, -1, 0, 3]) / (std + 1e-6))
    assert found[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(group_advantages(rewards, scale="none")[0], torch.tensor([-2.0, -1, 0, 3]))
    torch.testing.assert_close(group_advantages(rewards, scale="batch")[0], torch.tensor([-2.0, -1, 0, 3]) / (rewards.std() + 1e-6))
    torch.testing.assert_close(group_advantages(rewards, scale="none", leave_one_out=True)[0], torch.tensor([-2.0, -1, 0, 3]) * 4 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 12345.678])
def test_equal_rewards_give_exactly_zero(dtype, value):
    """Float residue of the mean over a tiny std was amplified a thousandfold."""
    for scale in ("group", "batch", "none"):
        assert (group_advantages(torch.full((3, 7), value, dtype=dtype), scale=scale) == 0).all()


def test_unscored_answers_do_not_count():
    rewards, valid = torch.tensor([[1.0, 3.0, float("nan")], [5.0, 1.0, 1.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = group_advantages(rewards, valid=valid)
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 1.0, 0.0]) / (math.sqrt(2) + 1e-6))
    assert found[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_behind_the_mask_is_read(bad):
    """Bug of verl: x * mask lets a NaN in a masked place poison the mean."""
    logprob, old, advantage, mask, ref = batch()
    clean, _ = grpo_loss(logprob, old, advantage, mask, ref_logprob=ref, rollout_logprob=old, **PAPER)
    dirty = [torch.where(mask, x.detach(), bad) for x in (logprob, old, ref)]
    dirty[0].requires_grad_()
    loss, stats = grpo_loss(dirty[0], dirty[1], advantage, mask, ref_logprob=dirty[2], rollout_logprob=dirty[1], **PAPER)
    assert loss.item() == clean.item() and all(v.isfinite() for v in stats.values())
    grads = torch.autograd.grad(loss, dirty[0])[0], torch.autograd.grad(clean, logprob)[0]
    assert torch.equal(*grads)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_share_the_global_token_count(size):
    """Bug of nano-aha-moment, verl, TRL: a count per micro-batch made the learning rate depend on its size."""
    logprob, old, advantage, mask, ref = batch()
    whole, _ = grpo_loss(logprob, old, advantage, mask, ref_logprob=ref, **PAPER)
    parts = sum(grpo_loss(logprob[i:i + size], old[i:i + size], advantage[i:i + size], mask[i:i + size],
                          ref_logprob=ref[i:i + size], denominator=mask.sum(), **PAPER)[0] for i in range(0, 6, size))
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


def test_first_step_has_zero_loss_and_a_gradient():
    """"Loss is 0" questions: on the first on-policy step the ratio is 1 and the advantages sum to 0; the gradient does not."""
    logprob = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    advantage = group_advantages(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)).view(-1)
    loss, stats = grpo_loss(logprob, logprob.detach(), advantage, torch.ones(4, 3))
    assert abs(loss.item()) < 1e-12 and stats["ratio_deviation"] == 0
    torch.testing.assert_close(torch.autograd.grad(loss, logprob)[0], -advantage[:, None].expand(4, 3) / 12)


def test_kl_direction_and_sign():
    """Bug of rlhf-book: the log ratio reversed, so k1 had the wrong sign."""
    logprob, ref = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
    assert kl_penalty(logprob, ref, "k1").item() == 1.0
    assert kl_penalty(logprob, ref, "k2").item() == 0.5
    assert kl_penalty(logprob, ref, "k3").item() == pytest.approx(math.exp(-1), abs=1e-6)


def test_aggregations_by_hand():
    loss, mask = torch.tensor([[1.0, 2.0], [4.0, 9.0], [7.0, 7.0]]), torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert aggregate(loss, mask).item() == pytest.approx(7 / 3)
    assert aggregate(loss, mask, how="sequence-mean").item() == pytest.approx((1.5 + 4) / 2)
    assert aggregate(loss, mask, how="constant", max_tokens=10).item() == pytest.approx(7 / 30)
    assert aggregate(loss, torch.zeros(3, 2)).item() == 0


@pytest.mark.parametrize("call, message", [
    (lambda x: group_advantages(torch.zeros(3)), r"\(3,\)"),
    (lambda x: policy_loss(x, x, torch.zeros(3), x), r"\(3,\) and \(2, 4\)"),
    (lambda x: aggregate(x, torch.zeros(2, 5)), r"\(2, 4\), mask \(2, 5\)"),
    (lambda x: kl_penalty(x, x, "k4"), "k1, k2, k3"),
    (lambda x: aggregate(x, x, how="constant"), "max_tokens"),
    (lambda x: grpo_loss(x, x, torch.zeros(2), x, kl_coef=0.1), "ref_logprob"),
    (lambda x: policy_loss(x, x, torch.zeros(2), x, level="sequence", kind="cispo"), "contradict"),
    (lambda x: policy_loss(x, x, torch.zeros(2), x, dual_clip=1.1), "dual_clip")])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4))


def test_loss_needs_torch_alone():
    import subprocess
    import sys

    code = "import sys, minigrpo.loss; print([m for m in ('transformers', 'numpy.random', 'scipy', 'PIL', 'matplotlib') if m in sys.modules and m != 'numpy.random'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
