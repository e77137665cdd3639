"""Our loss against TRL's own, from rewards to the scalar and its gradient: `make test-peers`
installs TRL and runs this.

TRL's GRPOTrainer is called, not copied: what samples, scores and calls a model is replaced by fixed
tensors, and `_generate_and_score_completions` (advantages, token counts, importance weights) and
`_compute_loss` run as released.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minigrpo.loss import group_advantages, grpo_loss

trl = pytest.importorskip("trl", reason="TRL is not installed: `make test-peers` installs it")
accelerate = pytest.importorskip("accelerate")  # comes with TRL
pytestmark = pytest.mark.peers

B, G, T, LIMIT = 3, 4, 6, 10  # prompts, answers each, longest answer, most tokens allowed
CLIP = dict(epsilon=0.2, epsilon_high=0.28)
PAPER = dict(clip_low=0.2, clip_high=0.28)


@pytest.fixture
def batch():
    """Rewards [B, G]; log-probs [R, T] of policy, sampling-time policy, reference and sampler; mask
    [R, T].
    """
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (B * G, 1), generator=g)
    lengths[0] = T
    old, mask = random(B * G, T) - 2, torch.arange(T) < lengths
    logprob = (old + 0.8 * random(B * G, T)).requires_grad_()  # ratios on both sides of every bound
    return SimpleNamespace(
        rewards=random(B, G),
        logprob=logprob,
        old=old,
        ref=old + 0.5 * random(B * G, T),
        rollout=old + 0.5 * random(B * G, T),
        mask=mask,
    )


def trl_trainer(batch, tmp_path, kind=None, **settings):
    """A GRPOTrainer without model and data; `settings` are its own. Old log-probs count, as after a
    first update.
    """
    config = trl.GRPOConfig if kind is None else trl.RLOOConfig
    settings = (
        dict(
            num_generations=G,
            max_completion_length=LIMIT,
            per_device_train_batch_size=B * G,
            num_iterations=2,
            gradient_accumulation_steps=1,
        )
        | settings
    )
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    # __init__ would want a model, a tokenizer and data
    trainer = object.__new__(kind or trl.GRPOTrainer)
    trainer.__dict__.update(vars(args))  # TRL keeps most settings under their own names
    model, reference = (
        SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2)
    )
    trainer.__dict__.update(
        args=args,
        accelerator=accelerate.Accelerator(cpu=True),
        state=SimpleNamespace(global_step=0),
        model=model,
        ref_model=reference,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        chat_template_kwargs={},
        environment_factories=None,
        environments=None,
        tools=None,
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer._calculate_rewards = lambda *_: batch.rewards.view(-1, 1)
    lengths = batch.mask.sum(1).tolist()
    answers, sampled = (
        [[1] * n for n in lengths],
        [row[:n].tolist() for row, n in zip(batch.rollout, lengths)],
    )
    prompts, texts = [[1]] * B * G, [""] * B * G
    trainer._generate = lambda _: (
        (prompts, answers, texts)
        if kind
        else (prompts, answers, None, texts, sampled if args.use_vllm else None, {}, None, [])
    )
    # anything else is the policy's own log-probs
    known = {id(model): batch.old, id(reference): batch.ref}
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        (logprob := known.get(id(model), model)),
        torch.zeros_like(logprob),
        None,
    )
    # TRL turns the sampler's lists into tensors of the default type
    torch.set_default_dtype(torch.float64)
    try:
        inputs = trainer._generate_and_score_completions([{"prompt": "?"}] * B * G)
    finally:
        torch.set_default_dtype(torch.float32)
    return trainer, inputs


def trl_loss(batch, tmp_path, **settings):
    trainer, inputs = trl_trainer(batch, tmp_path, **settings)
    return trainer._compute_loss(batch.logprob, inputs)


def our_loss(batch, *, scale="group", **settings):
    advantage = group_advantages(batch.rewards, scale=scale, eps=1e-4).view(-1)  # TRL's eps
    return grpo_loss(
        batch.logprob, batch.old, advantage, batch.mask, ref_logprob=batch.ref, **settings
    )[0]


def same(batch, ours, theirs, atol=1e-6):
    gradients = [torch.autograd.grad(loss, batch.logprob)[0] for loss in (ours, theirs)]
    difference = max((ours - theirs).abs().item(), (gradients[0] - gradients[1]).abs().max().item())
    print(f"largest difference to TRL, value or gradient: {difference:.1e}")
    assert gradients[0].abs().max() > 1e-3, "a loss without gradient would agree with anything"
    return difference <= atol


K3 = dict(beta=0.1, use_bias_correction_kl=False)
VARIANTS = {  # name: (TRL's settings, ours)
    "grpo": (dict(loss_type="grpo"), dict(aggregation="sequence-mean", clip_high=0.2)),
    "token mean (dapo)": (dict(loss_type="dapo"), dict(clip_high=0.2)),
    "token mean (bnpo)": (dict(loss_type="bnpo"), dict(clip_high=0.2)),
    "dr_grpo": (
        dict(loss_type="dr_grpo", scale_rewards="none"),
        dict(aggregation="constant", max_tokens=LIMIT, scale="none", clip_high=0.2),
    ),
    "clip-higher": (dict(loss_type="dapo", **CLIP), PAPER),
    "dual clip": (dict(loss_type="dapo", delta=3.0, **CLIP), dict(dual_clip=3.0, **PAPER)),
    "k3": (dict(loss_type="dapo", **CLIP, **K3), dict(kl_coef=0.1, **PAPER)),
    "k3 times ratio": (
        dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=True, **CLIP),
        dict(kl_coef=0.1, kl_ratio=True, **PAPER),
    ),
    "the paper's": (
        dict(loss_type="dapo", delta=3.0, beta=0.01, use_bias_correction_kl=False, **CLIP),
        dict(dual_clip=3.0, kl_coef=0.01, **PAPER),
    ),
    "gspo": (
        dict(
            loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
        ),
        dict(ratio_level="sequence", aggregation="sequence-mean", clip_low=3e-4, clip_high=4e-4),
    ),
    "gspo, wide clip": (
        dict(loss_type="grpo", importance_sampling_level="sequence", **CLIP, **K3),
        dict(ratio_level="sequence", aggregation="sequence-mean", kl_coef=0.1, **PAPER),
    ),
    "cispo": (dict(loss_type="cispo", epsilon_high=5.0), dict(surrogate="cispo", cispo_cap=5.0)),
    "sapo": (
        dict(loss_type="sapo", sapo_temperature_pos=0.875, sapo_temperature_neg=1.25),
        dict(surrogate="sapo", sapo_tau_up=0.875, sapo_tau_down=1.25, aggregation="sequence-mean"),
    ),
    "off-policy sequence mask": (
        dict(loss_type="dapo", off_policy_mask_threshold=0.1, **CLIP),
        dict(off_policy_delta=0.1, **PAPER),
    ),
    "off-policy sequence mask of a sampler": (
        dict(
            loss_type="dapo",
            off_policy_mask_threshold=0.1,
            use_vllm=True,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=2.0,
            **CLIP,
        ),
        dict(off_policy_delta=0.1, rollout_cap=2.0, **PAPER),
    ),
    "batch std": (
        dict(loss_type="dapo", scale_rewards="batch", **CLIP),
        dict(scale="batch", **PAPER),
    ),
    "no std": (dict(loss_type="dapo", scale_rewards="none", **CLIP), dict(scale="none", **PAPER)),
    "truncated importance weight": (
        dict(
            loss_type="dapo",
            use_vllm=True,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=2.0,
            **CLIP,
            **K3,
        ),
        dict(kl_coef=0.1, rollout_cap=2.0, **PAPER),
    ),
    **{
        f"importance weights, {level} {mode}": (
            dict(
                loss_type="dapo",
                use_vllm=True,
                vllm_importance_sampling_mode=f"{level}_{mode}",
                vllm_importance_sampling_clip_min=0.5,
                vllm_importance_sampling_clip_max=2.0,
                **CLIP,
            ),
            dict(
                rollout_level=level,
                rollout_floor=0.5,
                rollout_cap=2.0,
                rollout_outside=outside,
                **PAPER,
            ),
        )
        for level in ("token", "sequence")
        for mode, outside in (("truncate", "cut"), ("mask", "drop"))
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_are_trls(name, batch, tmp_path):
    theirs, ours = VARIANTS[name]
    rollout = {"rollout_logprob": batch.rollout} if theirs.get("use_vllm") else {}
    assert same(batch, our_loss(batch, **ours, **rollout), trl_loss(batch, tmp_path, **theirs))


def close(theirs, ours):
    print(f"largest difference to TRL's advantages: {(theirs - ours).abs().max():.1e}")
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale, batch, tmp_path):
    """Unscored answers, too: NaN in TRL, `valid` here."""
    batch.rewards[0, 1] = batch.rewards[2, 3] = torch.nan
    _, inputs = trl_trainer(batch, tmp_path, scale_rewards=scale)
    ours = group_advantages(batch.rewards, scale=scale, eps=1e-4, valid=~batch.rewards.isnan())
    close(inputs["advantages"].view(B, G), ours)


def test_leave_one_out_is_trls_rloo(batch, tmp_path):
    batch.rewards[0, 1] = torch.nan
    _, inputs = trl_trainer(batch, tmp_path, kind=trl.RLOOTrainer, beta=0.0)
    ours = group_advantages(
        batch.rewards, scale="none", leave_one_out=True, valid=~batch.rewards.isnan()
    )
    close(inputs["advantages"].view(B, G), ours)


# Where we differ: docs/algorithm.md, "We and TRL", names each and quotes the figures.


def in_parts(batch, tmp_path, **settings):
    """TRL's loss of each half of the rows, all from one rollout batch."""
    settings = (
        CLIP | dict(steps_per_generation=2, per_device_train_batch_size=B * G // 2) | settings
    )
    trainer, inputs = trl_trainer(batch, tmp_path, **settings)
    halves = slice(0, B * G // 2), slice(B * G // 2, B * G)

    def pick(rows):
        return {k: v if v.dim() == 0 else v[rows] for k, v in inputs.items()}

    return [trainer._compute_loss(batch.logprob[rows], pick(rows)) for rows in halves], halves


def relative(theirs, ours):
    found = abs(theirs.item() / ours.item() - 1)
    print(f"relative difference to TRL: {found:.4f}")
    return found


def test_micro_batches_of_an_update(batch, tmp_path):
    """TRL's dapo shares the global token count, as we do; its bnpo counts in each micro-batch."""
    ours = our_loss(batch, **PAPER)
    dapo, _ = in_parts(batch, tmp_path, loss_type="dapo", gradient_accumulation_steps=2)
    bnpo, _ = in_parts(batch, tmp_path, loss_type="bnpo", gradient_accumulation_steps=2)
    assert same(batch, ours, sum(dapo)) and relative(sum(bnpo), ours) > 0.01


def test_updates_of_a_rollout(batch, tmp_path):
    """TRL's dapo divides every update by the rollout's mean token count, ours by the update's
    own.
    """
    losses, halves = in_parts(batch, tmp_path, loss_type="dapo")
    tokens = [batch.mask[rows].sum() for rows in halves]
    advantage = group_advantages(batch.rewards, eps=1e-4).view(-1)
    for loss, rows, count in zip(losses, halves, tokens):
        ours, _ = grpo_loss(batch.logprob[rows], batch.old[rows], advantage[rows], batch.mask[rows])
        assert loss.item() == pytest.approx(ours.item() * count.item() / (sum(tokens).item() / 2))
    assert relative(loss, ours) > 0.01


def test_empty_answers(batch, tmp_path):
    """TRL's grpo counts answers without a token (an overlong filter leaves such) in the mean, our
    sequence-mean does not.
    """
    trainer, inputs = trl_trainer(batch, tmp_path, loss_type="grpo", **CLIP)
    batch.mask[3] = inputs["completion_mask"][3] = 0
    theirs, ours = (
        trainer._compute_loss(batch.logprob, inputs),
        our_loss(batch, aggregation="sequence-mean", **PAPER),
    )
    assert theirs.item() * B * G == pytest.approx(ours.item() * (B * G - 1))


def test_equal_rewards(batch, tmp_path):
    """The residue of the mean of equal fp32 rewards, over a small eps: TRL passes it on, we give
    exactly 0.
    """
    rewards = torch.full((B, G), 0.9)
    # the fp32 mean of three 0.9 misses them by an ulp, that of four does not
    rewards[:, 3] = torch.nan
    _, inputs = trl_trainer(SimpleNamespace(**vars(batch) | {"rewards": rewards}), tmp_path)
    print(f"TRL's advantage for equal rewards: {inputs['advantages'].abs().max():.1e}")
    assert 0 < inputs["advantages"].abs().max() < 1e-3
    assert (group_advantages(rewards, valid=~rewards.isnan()) == 0).all()


def test_default_cap_of_cispo(batch, tmp_path):
    """TRL's default cap is the PPO clip 0.2, below almost every ratio: the weight is a constant."""
    trainer, inputs = trl_trainer(batch, tmp_path, loss_type="cispo")
    ratio = (batch.logprob - batch.old).exp().detach()
    constant = -0.2 * inputs["advantages"][:, None] * batch.mask / batch.mask.sum()
    (gradient,) = torch.autograd.grad(trainer._compute_loss(batch.logprob, inputs), batch.logprob)
    print(f"ratios above TRL's default cap: {(ratio > 0.2)[batch.mask].double().mean():.2f}")
    torch.testing.assert_close(gradient[ratio > 0.2], constant[ratio > 0.2])


def test_kl_ratio_at_sequence_level(batch, tmp_path):
    """With GSPO, TRL weighs the KL by the sequence's ratio; ours stays per token, as the samples'
    weight is.
    """
    theirs = trl_loss(
        batch, tmp_path, loss_type="grpo", importance_sampling_level="sequence", beta=0.1, **CLIP
    )
    ours = our_loss(
        batch,
        ratio_level="sequence",
        aggregation="sequence-mean",
        kl_coef=0.1,
        kl_ratio=True,
        **PAPER,
    )
    assert relative(theirs, ours) > 0.01
