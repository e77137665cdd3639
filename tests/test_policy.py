"""The written-out forward pass against transformers' own, in values and in gradients."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minigrpo.data import load_image
from minigrpo.encode import mrope_positions, pad_right
from minigrpo.generate import generate
from minigrpo.policy import AnswerCache, Policy
from minigrpo.tiny import tiny_policy
from tests.memory import peak_bytes


def images_of(prompts, b):
    """The patches and grids of prompt b."""
    one = prompts.select(slice(b, b + 1))
    return {"pixel_values": one.pixels, "image_grid_thw": one.grids} if len(one.grids) else {}


def peer_logprob(policy, prompts, tokens, mask, group=1):
    """log-probs [R, T] by one plain forward of the transformers model for each row: no batch, no
    padding, no sharing.
    """
    out = []
    for r in range(len(tokens)):
        b = r // group
        length, answer = int(prompts.mask[b].sum()), tokens[r][mask[r]]
        ids = torch.cat([prompts.ids[b, :length], answer])[None]
        # Positions as transformers makes them for the prompt; answers are text, whatever token
        # stands in them.
        kinds = torch.cat(
            [
                (prompts.ids[b, :length] == policy.model.config.image_token_id).int(),
                torch.zeros(len(answer)).int(),
            ]
        )[None]
        positions, _ = policy.model.model.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            **{k: v for k, v in images_of(prompts, b).items() if k != "pixel_values"},
        )
        logits = policy.model(
            input_ids=ids, position_ids=positions, mm_token_type_ids=kinds, **images_of(prompts, b)
        ).logits
        row = logits[0, length - 1 : -1].log_softmax(-1).gather(1, answer[:, None])[:, 0]
        out.append(torch.cat([row, row.new_zeros(tokens.shape[1] - len(row))]))
    return torch.stack(out)


@pytest.mark.parametrize("group", [1, 3])
def test_score_is_the_transformers_model(policy, mixed, group):
    prompts = policy.encode(mixed)
    answers = [
        f"{'The heart is normal. ' * (1 + r % 3)}[0.{r}, 0.2]" for r in range(len(mixed) * group)
    ]
    tokens, mask = policy.encode_answers(answers)
    found = policy.score(prompts, tokens, mask)
    peer = peer_logprob(policy, prompts, tokens, mask, group)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, peer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("group, checkpointing", [(1, False), (2, False), (2, True), (8, False)])
def test_gradients_of_all_parameters(policy, mixed, group, checkpointing):
    ours, peer = copy_of(policy), copy_of(policy)
    if checkpointing:
        ours.checkpoint_activations()
    prompts = ours.encode(mixed)
    tokens, mask = ours.encode_answers(
        [f"Answer {r}: " + "clear lungs " * (r % 9) for r in range(4 * group)]
    )
    ours.score(prompts, tokens, mask).sum().backward()
    peer_logprob(peer, prompts, tokens, mask, group).sum().backward()
    for (name, a), b in zip(ours.model.named_parameters(), peer.model.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-7, name


def test_activation_checkpointing_trades_memory_for_time(policy, samples):
    """Measured. The gradients are the same to the bit, since the same operations run again."""
    peaks, grads = [], []
    for checkpointing in (False, True):
        ours = copy_of(policy)
        if checkpointing:
            ours.checkpoint_activations()
        prompts, (tokens, mask) = (
            ours.encode(samples[:2]),
            ours.encode_answers(["The lungs are clear, the heart is normal."] * 16),
        )
        # so that the gradients are there in both measurements
        ours.score(prompts, tokens, mask).sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
        peaks.append(peak_bytes(lambda: ours.score(prompts, tokens, mask).sum().backward()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert peaks[1] < 0.6 * peaks[0]


def test_entropy_and_temperature(policy, samples):
    prompts = policy.encode(samples[:2])
    tokens, mask = policy.encode_answers(["one", "two three"])
    logprob, entropy = policy.score(prompts, tokens, mask, temperature=2.0, entropy=True)
    plain = policy.score(prompts, tokens, mask)
    assert (logprob[mask] != plain[mask]).all() and (entropy[mask] > 0).all()
    assert (logprob[~mask] == 0).all() and (entropy[~mask] == 0).all()


def test_positions_are_those_of_transformers(policy, mixed):
    prompts = policy.encode(mixed)
    kinds = (prompts.ids == policy.model.config.image_token_id).int()
    positions, delta = policy.model.model.get_rope_index(
        prompts.ids, kinds, prompts.grids, attention_mask=prompts.mask.long()
    )
    torch.testing.assert_close(prompts.positions, positions)
    torch.testing.assert_close(prompts.next_position, delta[:, 0] + prompts.mask.sum(1))


def test_positions_by_hand():
    """Two words, an image of 2 x 3 merged patches, one word: text resumes after the longer side."""
    ids = torch.tensor([[1, 1, 9, 9, 9, 9, 9, 9, 1]])
    positions, after = mrope_positions(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[1, 4, 6]]), image_id=9, merge=2
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert after.tolist() == [6]


def test_shared_questions_score_like_single_ones(policy, samples):
    """SFT lets the questions about one film share its pass: the same log-likelihood as each on its
    own.
    """
    groups = [
        [s for s in samples if s.patient == name]
        for name in dict.fromkeys(s.patient for s in samples[:9])
    ]
    prompts, blocks = policy.encode_turns(groups)
    assert len(blocks) == max(map(len, groups))
    prefix = policy.prefill(prompts)
    shared = torch.cat(
        [policy.score(prefix, tokens, mask).sum(1, keepdim=True) for tokens, mask, _ in blocks], 1
    )
    for b, group in enumerate(groups):
        answers, answer_mask = policy.encode_answers([s.answer for s in group])
        alone = policy.score(policy.encode(group), answers, answer_mask).sum(1)
        torch.testing.assert_close(
            shared[b, : len(group)].sort()[0], alone.sort()[0], atol=2e-4, rtol=0
        )
        assert (shared[b, len(group) :] == 0).all()


def test_columns_that_a_part_of_a_batch_does_not_reach_cost_nothing_and_change_nothing(
    policy, samples
):
    prompts, (tokens, mask) = (
        policy.encode(samples[:2]),
        policy.encode_answers(["The lungs are clear.", "No."]),
    )
    wide, wide_mask = (torch.nn.functional.pad(x, (0, 50)) for x in (tokens, mask))
    found = policy.score(prompts, wide, wide_mask)
    assert torch.equal(found, torch.nn.functional.pad(policy.score(prompts, tokens, mask), (0, 50)))
    assert policy.score(prompts, tokens, torch.zeros_like(mask)).abs().sum() == 0


def test_groups_of_different_films_are_refused(policy, samples, mixed):
    with pytest.raises(ValueError, match="must share their image"):
        policy.encode_turns([[mixed[0], mixed[1]]])


def test_a_prompt_reads_its_own_image(policy, samples):
    """Bug of R1-V: `repeat` for `repeat_interleave` scored answers with another prompt's image."""
    prompts = policy.encode(samples[:1] + samples[-1:])
    tokens, mask = policy.encode_answers(["same answer"] * 4)
    both = policy.score(prompts, tokens, mask)
    for b in range(2):
        alone = policy.score(prompts.select(slice(b, b + 1)), tokens[:2], mask[:2])
        torch.testing.assert_close(both[2 * b : 2 * b + 2], alone, atol=1e-5, rtol=0)
    assert (both[0] - both[2]).abs().max() > 1e-3


def test_one_small_image_leaves_the_others_alone(policy, samples, mixed):
    """Bug of VLM-R1: one tiny image shrank all later ones."""
    alone, together = policy.encode(samples[:1]), policy.encode([mixed[1], samples[0]])
    torch.testing.assert_close(together.select(slice(1, 2)).pixels, alone.pixels)


def test_prompts_keep_an_eighth_of_their_pixels(policy, mixed):
    """A step of the paper, 512 films of 1,764 patches, held 5.5 GB of fp32 pixels. They are made
    anew where they are needed, to the bit as the processor makes them.
    """
    prompts, films = (
        policy.encode(mixed),
        [load_image(path) for sample in mixed for path in sample.images],
    )
    whole = policy.image_processor(images=films, return_tensors="pt")["pixel_values"]
    assert torch.equal(prompts.pixels, whole) and len(films) == 4
    assert prompts.patches.nbytes * 8 == whole.nbytes
    assert policy.encode(mixed[3:]).pixels.shape == (0, whole.shape[1])


def test_image_token_in_an_answer_is_plain_text(policy, samples):
    """Bug of our own trial: a sampled <|image_pad|> crashed the scorer, which looked for its
    image.
    """
    prompts = policy.encode(samples[:1])
    tokens = torch.tensor([[5, policy.model.config.image_token_id, 7, policy.encoder.end_id]])
    assert policy.score(prompts, tokens, torch.ones_like(tokens)).isfinite().all()


def test_saved_policy_loads_unchanged(policy, samples, tmp_path):
    policy.save_pretrained(tmp_path / "saved")
    again = Policy.from_pretrained(str(tmp_path / "saved"))
    prompts, (tokens, mask) = (
        policy.encode(samples[:2]),
        policy.encode_answers(["The lungs are clear.", "No."]),
    )
    assert torch.equal(
        policy.score(prompts, tokens, mask), again.score(again.encode(samples[:2]), tokens, mask)
    )
    assert again.end_ids == policy.end_ids and len(again.end_ids) == 2
    import transformers

    plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), policy.model.state_dict().values())
    )


def test_bfloat16_autocast_stays_close(policy, samples):
    fast = policy.to("cpu", autocast=True)
    prompts, (tokens, mask) = (
        policy.encode(samples[:2]),
        policy.encode_answers(["The lungs are clear.", "No."]),
    )
    found = fast.score(prompts, tokens, mask)
    assert found.dtype == torch.float32
    assert (found - policy.score(prompts, tokens, mask)).abs().max() < 0.1
    assert len(generate(fast, prompts, max_new_tokens=4).texts) == 2


def test_bfloat16_caches_hold_bfloat16(policy, samples):
    """Bug: the norms' fp32 weights made fp32 keys, so --bf16 kept caches half as large again, and
    each decoding step cast all of them: `--plan` for 8B showed 232 GB where 155 would do.
    """
    fast, prompts, cache = (
        policy.to("cpu", autocast=True),
        policy.encode(samples[:2]),
        AnswerCache(4),
    )
    with torch.no_grad():
        prefix, zero = fast.prefill(prompts), torch.zeros(2, dtype=torch.long)
        fast.decode(prefix, zero, zero, cache)
    held = [*prefix.keys, *prefix.values, *(x for stores in cache.layers.values() for x in stores)]
    assert {x.dtype for x in held} == {torch.bfloat16} and policy.prefill(prompts).keys[
        0
    ].dtype == torch.float32


def test_bfloat16_casts_the_weights_once_a_rollout(policy, samples):
    """Bug: each decoding step cast every weight anew, which took half of the time with --bf16."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten._to_copy.default and args[0] is weight
            return func(*args, **(kwargs or {}))

    fast, prompts, counts = policy.to("cpu", autocast=True), policy.encode(samples[:1]), []
    weight = fast.language_model.layers[0].self_attn.q_proj.weight
    for tokens in (2, 6):
        with Casts() as casts:
            casts.seen = 0
            generate(fast, prompts, max_new_tokens=tokens, seed=0)
        counts.append(casts.seen)
    assert counts == [1, 1]  # for the prompt and all of the answer


def moved(policy, samples, *, compute, weights=torch.float32, steps):
    """How far AdamW steps of 1e-6 (the paper's) move each weight, and the losses on the way."""
    ours = copy_of(policy)
    ours.model.to(weights)
    ours.autocast = compute == torch.bfloat16
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6, weight_decay=0.01)
    prompts, (tokens, mask), losses = (
        ours.encode(samples[:1]),
        ours.encode_answers(["The lungs are clear."]),
        [],
    )
    for _ in range(steps):
        loss = -ours.score(prompts, tokens, mask).sum() / mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.cat(
        [(p.detach() - b).float().flatten() for p, b in zip(ours.parameters(), before)]
    ), torch.tensor(losses)


@pytest.mark.parametrize("steps", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_steps_of_one_millionth_move_a_bf16_model_as_they_move_an_fp32_one(samples, steps):
    """Bug of many: with bf16 weights such a step is under half an ulp, and most of them never move.
    --bf16 keeps them in fp32.
    """
    policy = tiny_policy(samples, width=64, layers=1, pixels=64 * 64)
    (exact, losses), (mixed, mixed_losses) = (
        moved(policy, samples, compute=dtype, steps=steps)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (
        torch.cosine_similarity(exact, mixed, dim=0) > 0.99
        and 0.98 < mixed.norm() / exact.norm() < 1.02
    )
    fall = losses[0] - losses[-1]
    assert fall > 0.003 * steps and (losses - mixed_losses).abs().max() < 0.01
    stuck, _ = moved(
        policy, samples, compute=torch.bfloat16, weights=torch.bfloat16, steps=steps // 5
    )
    assert (stuck == 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "content, message",
    [({}, "has no config.json"), ({"config.json": '{"model_type": "bert"}'}, "bert model")],
)
def test_a_folder_that_is_no_checkpoint(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Policy.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_pad_right_masks_by_length_and_not_by_id():
    """Bug of tiny-grpo: pad == eos, and a mask made from ids hid the end token, so the model never
    learned to stop.
    """
    ids, mask = pad_right([[7, 0], [0]], pad=0)
    assert ids.tolist() == [[7, 0], [0, 0]] and mask.tolist() == [[True, True], [True, False]]


def copy_of(policy):
    again = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.image_processor)
    again.model.requires_grad_(True)
    return again
