"""Our sampler against transformers' `generate`, and against our own scorer."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from minigrpo.generate import Decoding, draw, generate, random_streams, rows_to_keep, sample
from tests.test_policy import copy_of, images_of


def test_greedy_is_transformers_token_for_token(policy, mixed):
    prompts = policy.encode(mixed)
    rollout = generate(policy, prompts, max_new_tokens=24, temperature=0)
    for b in range(len(mixed)):
        ids = prompts.ids[b, : int(prompts.mask[b].sum())][None]
        kinds = (ids == policy.model.config.image_token_id).int()
        policy.model.model.rope_deltas = None  # stale state of the last call
        peer = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            **images_of(prompts, b),
            max_new_tokens=24,
            do_sample=False,
        )[0, ids.shape[1] :]
        assert rollout.tokens[b][rollout.mask[b]].tolist() == peer.tolist()


def test_sampled_logprob_is_the_scored_one(policy, mixed):
    """Sampler and scorer must agree, or the ratio is not 1 at step 0: M-RoPE, padding, images,
    temperature, end tokens.
    """
    prompts = policy.encode(mixed)
    for temperature in (1.0, 0.7):
        rollout = generate(
            policy, prompts, group_size=3, max_new_tokens=20, temperature=temperature, seed=1
        )
        scored = policy.score(prompts, rollout.tokens, rollout.mask, temperature=temperature)
        assert rollout.tokens.shape == scored.shape == (12, rollout.tokens.shape[1])
        torch.testing.assert_close(rollout.logprob, scored.detach(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def short(policy):
    """Every tenth token ends an answer here, so rows and groups leave the batch at different
    steps.
    """
    short = copy_of(policy)
    short.end_ids = list(range(0, len(policy.tokenizer), 10))
    return short


@pytest.mark.parametrize("group", [1, 2, 8])
def test_rows_that_ended_are_dropped_without_a_trace(short, mixed, group):
    prompts = short.encode(mixed * 2)
    rollout = generate(short, prompts, group_size=group, max_new_tokens=40, seed=0)
    last = rollout.mask.sum(1).view(-1, group).amax(1).sort()[0]
    assert last[2] < last[-1] - 2, (
        "more than a quarter of the groups ended early, so some were dropped"
    )
    scored = short.score(prompts, rollout.tokens, rollout.mask)
    torch.testing.assert_close(rollout.logprob, scored.detach(), atol=1e-4, rtol=0)
    for tokens, mask, finished in zip(rollout.tokens, rollout.mask, rollout.finished.tolist()):
        assert [t in short.end_ids for t in tokens[mask].tolist()] == [False] * (
            int(mask.sum()) - 1
        ) + [finished]


def test_an_answer_does_not_depend_on_its_company(short, mixed, monkeypatch):
    """Rows draw from streams of their own: alone, at another place in another batch, in a larger
    group, with and without compaction, and under another limit, an answer stays what it is.
    """
    prompts, settings = short.encode(mixed), dict(max_new_tokens=30, seed=3)
    whole = generate(short, prompts, group_size=3, **settings)

    def same(rollout, rows):
        width = min(rollout.tokens.shape[1], whole.tokens.shape[1])
        assert torch.equal(rollout.mask[:, :width], whole.mask[rows, :width])
        assert torch.equal(rollout.tokens[:, :width], whole.tokens[rows, :width])
        torch.testing.assert_close(
            rollout.logprob[:, :width], whole.logprob[rows, :width], atol=1e-5, rtol=0
        )

    for b in range(4):
        same(
            generate(short, prompts.select(slice(b, b + 1)), group_size=3, **settings),
            slice(3 * b, 3 * b + 3),
        )
    backwards = replace(short.encode(mixed[::-1]), stream_id=prompts.stream_id.flip(0))
    same(
        generate(short, backwards, group_size=3, **settings),
        torch.arange(12).view(4, 3).flip(0).flatten(),
    )
    same(
        generate(short, prompts, group_size=2, **settings),
        torch.arange(12).view(4, 3)[:, :2].flatten(),
    )
    same(generate(short, prompts, group_size=3, **settings | {"max_new_tokens": 7}), slice(0, 12))
    for rows in (1, 3, 6, 9):  # waiting prompts take the rows of groups that have ended
        same(generate(short, prompts, group_size=3, rows_at_once=rows, **settings), slice(0, 12))
    monkeypatch.setattr("minigrpo.generate.CHECK_EVERY", {"cpu": 8})  # as on a GPU
    for rows in (6, None):
        same(generate(short, prompts, group_size=3, rows_at_once=rows, **settings), slice(0, 12))
    kept = []
    monkeypatch.setattr(
        "minigrpo.generate.rows_to_keep",
        lambda going: (
            kept.append(rows_to_keep(going)[1].tolist())
            or (torch.ones(len(going), dtype=torch.bool), torch.arange(going.numel()))
        ),
    )
    same(generate(short, prompts, group_size=3, **settings), slice(0, 12))
    assert min(map(len, kept)) < 8, "compaction would have dropped rows"


def test_waiting_prompts_take_over_rows(short, mixed):
    """Many waves: the ring of keys comes round, an answer never sees those of the one whose row it
    took, and fewer rows idle.
    """
    # 24 prompts: streams go by their number, so that equal prompts differ
    prompts = short.encode(mixed * 6)
    settings = dict(group_size=2, max_new_tokens=25, seed=5)
    whole, waves = (
        generate(short, prompts, **settings),
        generate(short, prompts, rows_at_once=6, **settings),
    )
    assert (
        torch.equal(whole.tokens, waves.tokens)
        and torch.equal(whole.mask, waves.mask)
        and whole.texts == waves.texts
    )
    torch.testing.assert_close(whole.logprob, waves.logprob, atol=1e-5, rtol=0)
    useful, longest = int(waves.mask.sum()), waves.mask.sum(1).view(-1, 3, 2).amax((1, 2))
    assert useful <= waves.row_steps < 6 * int(longest.sum()), (
        "fewer than one batch of three prompts after the other"
    )
    greedy = [
        generate(short, prompts, max_new_tokens=25, temperature=0, rows_at_once=rows).tokens
        for rows in (None, 5)
    ]
    assert torch.equal(*greedy)


def test_prompts_survive_waiting_prompts(short, mixed):
    """A waiting prompt once wrote its mask through a view into the prompts' own: the next call saw
    other prompts.
    """
    prompts = short.encode(mixed)
    before = {name: value.clone() for name, value in vars(prompts).items()}
    generate(short, prompts, max_new_tokens=9, seed=0, rows_at_once=1)
    assert all(torch.equal(value, before[name]) for name, value in vars(prompts).items())


def test_a_phase_of_decoding_is_short():
    tree = ast.parse(Path(inspect.getfile(Decoding)).read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert function.end_lineno - body[0].lineno < 35, function.name


def test_rows_to_keep_by_hand():
    going = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    groups, rows = rows_to_keep(going)
    assert groups.tolist() == [True, False, True]
    assert rows.tolist() == [0, 2, 11, 8], (
        "the third group has one open row, and an ended one to be as large as the first"
    )


def test_random_streams_are_uniform_and_independent():
    """Streams are seeded by neighbouring numbers, so bad seeding would show between rows, prompts,
    seeds or first numbers.
    """
    a, b = (random_streams(seed, list(range(64)), 8, 64) for seed in (0, 1))
    assert a.shape == (512, 64) and a.dtype == torch.float64 and 0 <= a.min() and a.max() < 1
    pairs = [
        (a[1:], a[:-1]),
        (a[8:], a[:-8]),
        (a, b),
        (a[:, 1:], a[:, :-1]),
        (a[1:, :1], a[:-1, :1]),
        (a[:, :1], b[:, :1]),
    ]
    for numbers in (a.flatten(), a[:, 0], b[:, 0], a[0]):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    for x, y in pairs:
        assert (
            abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])
            < 4 / x.numel() ** 0.5
        )
    assert torch.equal(random_streams(0, [5], 2, 9), a[40:42, :9]), (
        "the row is its prompt's number and its place, nothing else"
    )
    assert random_streams(-1, [0], 1, 1) != random_streams(1, [0], 1, 1)


@pytest.mark.parametrize("size", [5, 128, 1000])
def test_draw_finds_the_share_that_the_number_falls_into(size):
    torch.manual_seed(0)
    weight = torch.rand(400, size) ** 8  # many small ones
    weight[torch.rand(weight.shape) < 0.2] = 0
    weight[:, size // 2] += 1
    uniform = torch.rand(400, dtype=torch.float64)
    uniform[0], uniform[1] = 0, 1 - 2**-53
    end = weight.double().cumsum(1)
    expected = torch.searchsorted(end, uniform[:, None] * end[:, -1:], right=True)[:, 0]
    found = draw(weight, uniform)
    assert (found == expected)[2:].float().mean() > 0.99, (
        "the fp32 sums of blocks move a border by 1e-7"
    )
    assert (weight.gather(1, found[:, None]) > 0).all()


def test_end_token_is_inside_the_mask(policy, samples):
    """Bug of tiny-grpo, simple_GRPO, nanochat: the end token masked out of the loss, so the model
    never learns to stop.
    """
    rollout = generate(
        policy,
        policy.encode(samples[:2]),
        group_size=16,
        max_new_tokens=200,
        temperature=1.5,
        seed=0,
    )
    assert rollout.finished.any(), "a random model of 800 tokens ends some of 32 answers within 200"
    for row in range(32):
        tokens = rollout.tokens[row][rollout.mask[row]].tolist()
        ends = [t in policy.end_ids for t in tokens]
        assert not any(ends[:-1]) and ends[-1] == bool(rollout.finished[row])
        assert (rollout.tokens[row][~rollout.mask[row]] == policy.tokenizer.pad_token_id).all()
        assert (rollout.logprob[row][~rollout.mask[row]] == 0).all()


def test_every_end_token_ends(policy, samples):
    """Bug: only one of the generation config's end tokens honoured, so answers run on past the
    end.
    """
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
    """Bug of R1-V, VLM-R1: `generate` sampled from the top 50 of the generation config while the
    scorer saw all tokens.
    """
    torch.manual_seed(0)
    hidden, head = (
        torch.randn(1, 6, dtype=torch.float64) / 3,
        torch.randn(300, 6, dtype=torch.float64),
    )
    for temperature in (1.0, 0.5):
        p = (hidden @ head.T / temperature).softmax(-1)[0]
        uniform = torch.rand(
            100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        tokens, logprob = sample(hidden.expand(100_000, -1), head, temperature, uniform)
        counted = torch.bincount(tokens, minlength=300) / len(tokens)
        assert (counted - p).abs().max() < 4 * (p * (1 - p) / len(tokens)).sqrt().max() + 1e-4
        assert (counted > 0).sum() > 50
        torch.testing.assert_close(logprob.double(), p.log()[tokens], atol=1e-5, rtol=0)
