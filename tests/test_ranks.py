"""The loss over ranks: real processes that talk over gloo, each with its share of the groups."""

import pytest
import torch
import torch.distributed as dist

from minigrpo.loss import denominator_of, group_advantages, grpo_loss
from tests.processes import CONTEXT, finish

GROUPS, SIZE, TOKENS = 4, 3, 5
VARIANTS = {
    "RadVLM-GRPO": dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.01),
    "GRPO": dict(aggregation="sequence-mean", kl_coef=0.04),
    "Dr. GRPO": dict(aggregation="constant", max_tokens=TOKENS),
    "GSPO": dict(ratio_level="sequence", aggregation="sequence-mean"),
}


def shared_batch():
    """The same numbers in every process; the share of the first rank has few tokens and rewards of
    its own.
    """
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(GROUPS, SIZE, generator=g, dtype=torch.float64) * torch.tensor(
        [[1.0], [2.0], [9.0], [3.0]]
    )
    valid = torch.rand(GROUPS, SIZE, generator=g) < 0.8
    logprob, old, ref = (
        torch.randn(GROUPS * SIZE, TOKENS, generator=g, dtype=torch.float64) for _ in range(3)
    )
    lengths = torch.tensor([1, 0, 1] + [TOKENS] * (GROUPS * SIZE - 5) + [2, 0])
    return rewards, valid, logprob, old, ref, torch.arange(TOKENS) < lengths[:, None]


def summed(x):
    """Over all ranks."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def share_of(rank, ranks):
    """Loss and gradient of one rank's groups, for each variant: what the ranks add up to is the
    loss of the whole batch.
    """
    rewards, valid, *tensors = shared_batch()
    groups = slice(rank * GROUPS // ranks, (rank + 1) * GROUPS // ranks)
    advantage = group_advantages(
        rewards[groups],
        scale="batch",
        valid=valid[groups],
        total=summed if ranks > 1 else lambda x: x,
    ).view(-1)
    logprob, old, ref, mask = (x[groups.start * SIZE : groups.stop * SIZE] for x in tensors)
    out = {}
    for name, settings in VARIANTS.items():
        count = denominator_of(
            mask, **{key: settings[key] for key in ("aggregation", "max_tokens") if key in settings}
        )
        if ranks > 1:
            dist.all_reduce(count)
        leaf = logprob.clone().requires_grad_()
        loss, _ = grpo_loss(
            leaf, old, advantage, mask, ref_logprob=ref, denominator=count, **settings
        )
        out[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    return out


def worker(rank, folder):
    """Four processes; the first two of them also make a world of two."""
    torch.set_num_threads(1)
    for ranks in (2, 4):
        if rank < ranks:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks
            )
            torch.save(share_of(rank, ranks), f"{folder}/{ranks}-{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = [CONTEXT.Process(target=worker, args=(rank, str(folder))) for rank in range(4)]
    for process in processes:
        process.start()
    assert finish(processes) == [0] * 4
    return {
        ranks: [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
        for ranks in (2, 4)
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_add_up_to_one_process(shares, ranks, name):
    """Bugs: a mean per rank, averaged, weighs the tokens of a rank with few of them more; a batch
    std per rank differs from rank to rank; gradients that are not summed over ranks are those of a
    part of the batch (minimind).
    """
    loss, grad = share_of(0, 1)[name]
    found = [share[name] for share in shares[ranks]]
    torch.testing.assert_close(sum(part for part, _ in found), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in found]), grad, rtol=0, atol=1e-12)
