"""Our sampler against transformers' `generate`, and against our own scorer."""

import torch

from minigrpo.generate import generate, sample
from tests.test_policy import copy_of, images_of


def test_greedy_is_transformers_token_for_token(policy, mixed):
    prompts = policy.encode(mixed)
    rollout = generate(policy, prompts, max_new_tokens=24, temperature=0)
    for b in range(len(mixed)):
        ids = prompts.ids[b, :int(prompts.mask[b].sum())][None]
        kinds = (ids == policy.model.config.image_token_id).int()
        policy.model.model.rope_deltas = None  # stale state of the last call
        peer = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                                     **images_of(prompts, b), max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        assert rollout.tokens[b][rollout.mask[b]].tolist() == peer.tolist()


def test_sampled_logprob_is_the_scored_one(policy, mixed):
    """Sampler and scorer must agree, or the ratio is not 1 at step 0: M-RoPE, padding, images, temperature, end tokens."""
    prompts = policy.encode(mixed)
    for temperature in (1.0, 0.7):
        rollout = generate(policy, prompts, group_size=3, max_new_tokens=20, temperature=temperature, seed=1)
        scored = policy.score(prompts, rollout.tokens, rollout.mask, temperature=temperature)
        assert rollout.tokens.shape == scored.shape == (12, rollout.tokens.shape[1])
        torch.testing.assert_close(rollout.logprob, scored.detach(), atol=1e-4, rtol=0)


def test_groups_that_ended_are_dropped_without_a_trace(policy, mixed):
    """Every tenth token ends here, so groups leave the batch at different steps; those that stay keep their own cache."""
    short = copy_of(policy)
    short.end_ids = list(range(0, len(policy.tokenizer), 10))
    prompts = short.encode(mixed * 2)
    rollout = generate(short, prompts, group_size=2, max_new_tokens=40, seed=0)
    last = rollout.mask.sum(1).view(-1, 2).amax(1).sort()[0]
    assert last[2] < last[-1] - 2, "more than a quarter of the groups ended early, so some were dropped"
    scored = short.score(prompts, rollout.tokens, rollout.mask)
    torch.testing.assert_close(rollout.logprob, scored.detach(), atol=1e-4, rtol=0)
    for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished.tolist()):
        assert [t in short.end_ids for t in tokens[mask].tolist()] == [False] * (int(mask.sum()) - 1) + [finished]


def test_end_token_is_inside_the_mask(policy, samples):
    """Bug of tiny-grpo, simple_GRPO, nanochat: the end token masked out of the loss, so the model never learns to stop."""
    rollout = generate(policy, policy.encode(samples[:2]), group_size=16, max_new_tokens=200, temperature=1.5, seed=0)
    assert rollout.finished.any(), "a random model of 800 tokens ends some of 32 answers within 200"
    for row in range(32):
        tokens = rollout.tokens[row][rollout.mask[row]].tolist()
        ends = [t in policy.end_ids for t in tokens]
        assert not any(ends[:-1]) and ends[-1] == bool(rollout.finished[row])
        assert (rollout.tokens[row][~rollout.mask[row]] == policy.tokenizer.pad_token_id).all()
        assert (rollout.logprob[row][~rollout.mask[row]] == 0).all()


def test_every_end_token_ends(policy, samples):
    """Bug: only one of the generation config's end tokens honoured, so answers run on past the end."""
    prompts = policy.encode(samples[:1])
    first = generate(policy, prompts, max_new_tokens=6, temperature=0).tokens[0].tolist()
    other = copy_of(policy)
    other.end_ids = [policy.end_ids[0], first[3]]
    rollout = generate(other, prompts, max_new_tokens=6, temperature=0)
    stop = first.index(first[3]) + 1
    assert rollout.tokens[0].tolist() == first[:stop] and rollout.finished.all()


def test_same_seed_same_answers(policy, samples):
    prompts = policy.encode(samples[:2])
    a, b, c = (generate(policy, prompts, group_size=4, max_new_tokens=8, seed=s) for s in (3, 3, 4))
    assert a.texts == b.texts and torch.equal(a.logprob, b.logprob) and a.texts != c.texts


def test_sampling_follows_the_distribution():
    """Bug of R1-V, VLM-R1: `generate` sampled from the top 50 of the generation config while the scorer saw all tokens."""
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 6, dtype=torch.float64) / 3, torch.randn(80, 6, dtype=torch.float64)
    for temperature in (1.0, 0.5):
        p = (hidden @ head.T / temperature).softmax(-1)[0]
        tokens, logprob = sample(hidden.expand(200_000, -1), head, temperature, torch.Generator().manual_seed(0))
        counted = torch.bincount(tokens, minlength=80) / len(tokens)
        assert (counted - p).abs().max() < 4 * (p * (1 - p) / len(tokens)).sqrt().max() + 1e-4
        assert (counted > 0).sum() > 50
        torch.testing.assert_close(logprob.double(), p.log()[tokens], atol=1e-5, rtol=0)
