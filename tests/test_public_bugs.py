"""Bugs found in public GRPO code, one test each where no module's own test guards against it:

never learns to stop (pad == eos)        test_generate: test_end_token_is_inside_the_mask
normaliser per micro-batch               test_loss: test_micro_batches_of_any_size
normaliser over padded tokens            test_loss: test_padding_and_the_order_of_rows
KL of the wrong sign or direction        test_kl: test_on_policy
another prompt's image                   test_policy: test_a_prompt_reads_its_own_image
one tiny image shrinks later ones         test_policy: test_one_small_image_leaves_the_others_alone
log-softmax in bf16                      test_logprob: test_bfloat16_comes_out_in_float32
NaN behind the mask                      test_loss: test_nothing_behind_the_mask_is_read
sampled <|image_pad|> crashes            test_policy: test_image_token_in_an_answer_is_plain_text
one end token of several                 test_generate: test_every_end_token_ends
gradients not summed over ranks          test_ranks: test_ranks_add_up_to_one_process
"""

import math

import pytest
import torch

from minigrpo.data import batch_at
from minigrpo.generate import generate
from minigrpo.logprob import linear_logprob
from minigrpo.loss import group_advantages, grpo_loss, kl_penalty
from minigrpo.policy import Policy
from minigrpo.run.groups import by_token_budget
from tests.test_policy import copy_of, peer_logprob


def test_scoring_sees_a_pad_token_inside_the_prompt(policy, samples):
    """tiny-grpo made the attention mask from token ids, so separators that equal the padding
    vanished from the prompt.
    """
    from dataclasses import replace

    pad = policy.tokenizer.pad_token
    asked = [replace(samples[0], question=f"Old{pad}{pad} findings?{pad}"), samples[1]]
    prompts = policy.encode(asked)
    inside = prompts.mask[0] & (prompts.ids[0] == policy.tokenizer.pad_token_id)
    assert inside.sum() == 3, "the mask covers them, whatever their id"
    tokens, mask = policy.encode_answers(["The lungs are clear.", "No."])
    peer = peer_logprob(policy, prompts, tokens, mask)
    torch.testing.assert_close(policy.score(prompts, tokens, mask), peer, atol=1e-5, rtol=0)


def test_the_log_ratio_points_from_reference_to_policy():
    """rlhf-book reversed the log ratio: k1 had the wrong sign, and k3 was that of the other
    direction.
    """
    logprob, ref = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
    assert (
        kl_penalty(logprob, ref, "k1").item() == 1.0
        and kl_penalty(logprob, ref, "k2").item() == 0.5
    )
    assert kl_penalty(logprob, ref, "k3").item() == pytest.approx(math.exp(-1), abs=1e-6)


def test_nothing_but_the_temperature_shapes_sampling(policy, samples):
    """tiny-grpo, R1-V, VLM-R1: `generate` sampled from the top 50, or as the checkpoint's
    generation_config says, while the scorer saw the whole distribution: the ratio was 1 although
    another policy had been sampled.
    """
    narrow = copy_of(policy)
    narrow.model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0
    )
    prompts = policy.encode(samples[:1])
    free, bound = (
        generate(p, prompts, group_size=32, max_new_tokens=4, seed=0) for p in (policy, narrow)
    )
    assert torch.equal(free.tokens, bound.tokens) and torch.equal(free.logprob, bound.logprob)
    assert len(set(free.tokens[:, 0].tolist())) > 20, (
        "32 draws from an untrained model of 800 tokens seldom agree"
    )


def test_the_ratio_is_one_before_the_first_update(policy, mixed):
    """Many: temperature missing in the scored log-prob, or dropout on in one of both passes."""
    trained = copy_of(policy)
    trained.model.config.text_config.attention_dropout = 0.5
    trained.model.train()
    prompts = trained.encode(mixed)
    rollout = generate(trained, prompts, group_size=2, max_new_tokens=12, temperature=0.7, seed=0)
    logprob = trained.score(prompts, rollout.tokens, rollout.mask, temperature=0.7)
    _, stats = grpo_loss(logprob, rollout.logprob, torch.ones(len(logprob)), rollout.mask)
    assert stats["ratio_deviation"] < 1e-5


def test_rope_state_of_an_earlier_call_is_not_used(policy, mixed):
    """Many: `model.rope_deltas` is hidden state, so one call's positions leaked into the next,
    which moves log-probs by nats.
    """
    prompts, (tokens, mask) = (
        policy.encode(mixed[:2]),
        policy.encode_answers(["The lungs are clear.", "No."]),
    )
    fresh = policy.score(prompts, tokens, mask)
    policy.model.model.rope_deltas = torch.tensor([[-77], [5]])
    try:
        assert torch.equal(policy.score(prompts, tokens, mask), fresh)
    finally:
        policy.model.model.rope_deltas = None


def test_log_probs_are_stored_in_fp32(policy, samples):
    """R1-V, VLM-R1, simple_GRPO: a right log-prob stored as bf16 still moved 14% of the ratios by
    over 2%.
    """
    fast = policy.to("cpu", autocast=True)
    rollout = generate(fast, fast.encode(samples[:2]), group_size=2, max_new_tokens=8, seed=0)
    scored = fast.score(fast.encode(samples[:2]), rollout.tokens, rollout.mask)
    for logprob in (rollout.logprob, scored.detach()):
        shown = logprob[rollout.mask]
        assert shown.dtype == torch.float32 and (shown != shown.bfloat16().float()).any()


def test_the_heads_gradient_is_summed_over_tiles_in_fp32():
    """Noted in TRL: chunked gradients of the head summed in bf16 lose what late chunks add, and the
    entropy drifts down.
    """
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(512, 16).bfloat16(),
        (torch.randn(40, 16) / 4).bfloat16().requires_grad_(),
    )
    target = torch.randint(40, (512,))
    tiled = torch.autograd.grad(linear_logprob(hidden, weight, target, tile=1).sum(), weight)[0]
    exact = weight.detach().double().requires_grad_()
    logp = (hidden.double() @ exact.T).log_softmax(-1).gather(1, target[:, None]).sum()
    error = (tiled - torch.autograd.grad(logp, exact)[0]).abs().max() / tiled.abs().max()
    assert error < 0.005, (
        "one rounding to bf16 is 0.2 to 0.4%; 512 sums in bf16 are off by percents"
    )


def test_padding_moves_no_position(policy, mixed):
    """unsloth: left padding shifted the positions of short prompts, since they were not derived
    from the mask.
    """
    prompts, (tokens, mask) = policy.encode(mixed), policy.encode_answers(["Same answer."] * 4)
    together, lengths = policy.score(prompts, tokens, mask), prompts.mask.sum(1)
    assert lengths.max() > lengths.min() + 5
    for b in range(4):
        alone = policy.encode(mixed[b : b + 1])
        assert torch.equal(alone.positions[:, 0], prompts.positions[:, b, : int(lengths[b])])
        assert alone.next_position[0] == prompts.next_position[b]
        torch.testing.assert_close(
            policy.score(alone, tokens[:1], mask[:1])[0], together[b], atol=1e-5, rtol=0
        )


def test_prompts_are_never_cut(policy, mixed):
    """Many: a prompt truncated to the longest length, through its image tokens: "image features and
    tokens do not match".
    """
    short = copy_of(policy)
    longest, short.tokenizer.model_max_length = short.tokenizer.model_max_length, 8
    try:
        prompts = short.encode(mixed)
    finally:
        short.tokenizer.model_max_length = longest
    assert torch.equal(prompts.ids, policy.encode(mixed).ids)
    assert (prompts.ids == policy.model.config.image_token_id).sum() == prompts.grids.prod(
        1
    ).sum() // 4


@pytest.mark.parametrize("size", range(1, 12))
def test_no_rollout_is_lost(size):
    """tiny-grpo, nanochat: drop_last or an integer division lost the answers that did not fill a
    batch.
    """
    # a prompt and its group take 10 tokens
    parts = by_token_budget([6] * 10, [1] * 10, 4, 10 * size, range(3, 10))
    assert sorted(b for part in parts for b in part) == list(range(3, 10)) and len(parts) == -(
        -7 // size
    )
    seen = [sample for step in range(7) for sample in batch_at(list(range(7)), step, size, seed=0)]
    assert sorted(seen) == sorted(list(range(7)) * size)


def test_cispo_has_a_cap_of_its_own():
    """TRL's default took PPO's 0.2 as CISPO's cap, so that the weight of nearly every token was the
    same constant.
    """
    ratio = torch.tensor([[0.5, 1.0, 2.0, 4.5, 9.0]])
    logprob = torch.full((1, 5), -1.0, requires_grad=True)
    loss, _ = grpo_loss(
        logprob, -1 - ratio.log(), torch.ones(1), torch.ones(1, 5), surrogate="cispo", denominator=1
    )
    weights = -torch.autograd.grad(loss, logprob)[0]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.0, 2.0, 4.5, 5.0]]))


def test_weights_move_at_the_papers_learning_rate(policy, samples, tmp_path):
    """Common: bf16 weights and lr 1e-6: the update is under half an ulp, so nothing is learned.
    Ours are fp32 masters, also from a bf16 checkpoint and with bf16 compute.
    """
    half = copy_of(policy)
    half.model.bfloat16()
    half.save_pretrained(tmp_path)
    trained = Policy.from_pretrained(str(tmp_path), autocast=True)
    prompts, (tokens, mask) = (
        trained.encode(samples[:2]),
        trained.encode_answers(["The lungs are clear.", "No."]),
    )
    before = [p.detach().clone() for p in trained.parameters()]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, weight_decay=0.0)
    trained.score(prompts, tokens, mask).sum().backward()
    optimizer.step()
    touched = moved = 0
    for p, old in zip(trained.parameters(), before):
        felt = p.grad.abs() > 1e-6  # far above AdamW's eps, so its first step is the learning rate
        touched, moved = (
            touched + felt.sum().item(),
            moved + (felt & (p.detach() != old)).sum().item(),
        )
    assert touched > 10_000 and moved > 0.99 * touched


def test_first_step_has_zero_loss_and_a_gradient():
    """Asked everywhere: on the first on-policy step the ratio is 1 and the advantages sum to 0, so
    the loss of equally long answers is 0. The gradient is not.
    """
    logprob = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    advantage = group_advantages(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)).view(-1)
    loss, stats = grpo_loss(logprob, logprob.detach(), advantage, torch.ones(4, 3))
    assert abs(loss.item()) < 1e-12 and stats["ratio_deviation"] == 0
    torch.testing.assert_close(
        torch.autograd.grad(loss, logprob)[0], -advantage[:, None].expand(4, 3) / 12
    )
