"""One GRPO step and its parts, three times: ours, plain transformers, and TRL's GRPOTrainer as
released.

Every side starts from images and questions and works on the same weights, in fp32, towards the same
loss.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from benchmarks.common import Shape, now
from minigrpo.data import Sample, load_image
from minigrpo.generate import generate
from minigrpo.loss import group_advantages, grpo_loss
from minigrpo.policy import Policy

try:
    import trl
except ImportError:
    trl = None

# the paper's, on our side and on TRL's
LOSS = dict(kl_coef=0.01, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
TRL_LOSS = dict(
    loss_type="dapo",
    beta=0.01,
    epsilon=0.2,
    epsilon_high=0.28,
    delta=3.0,
    use_bias_correction_kl=False,
)
LEARNING_RATE = 1e-6


@dataclass
class Batch:
    """Answers [R, T], and all that the loss wants to know of them."""

    tokens: Tensor
    mask: Tensor
    old: Tensor
    ref: Tensor
    advantage: Tensor  # [R]

    def loss(self, logprob: Tensor) -> Tensor:
        return grpo_loss(
            logprob, self.old, self.advantage, self.mask, ref_logprob=self.ref, **LOSS
        )[0]


def reward(text: str) -> float:
    return float(len(set(text)))  # anything cheap that differs within a group


def backward(model: torch.nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return loss.detach()


# ---- ours ----------------------------------------------------------------------------------------


def our_rollout(policy: Policy, samples: list[Sample], shape: Shape):
    return generate(
        policy, policy.encode(samples), group_size=shape.group, max_new_tokens=shape.answer
    )


def our_score(policy: Policy, samples: list[Sample], batch: Batch) -> Tensor:
    """The loss of given answers, with its gradients."""
    logprob, _ = policy.score(policy.encode(samples), batch.tokens, batch.mask, entropy=True)
    return backward(policy.model, batch.loss(logprob))


def batch_of(policy: Policy, samples: list[Sample], shape: Shape) -> Batch:
    """Random answers; old and reference log-probs lie apart from the policy's, since where they
    agree the loss is 0.
    """
    g, size = torch.Generator().manual_seed(0), (shape.prompts * shape.group, shape.answer)
    tokens = torch.randint(len(policy.head), size, generator=g)
    # transformers would look for its image
    tokens[tokens == policy.model.config.image_token_id] = 0
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        logprob = policy.score(policy.encode(samples), tokens, mask)

    def near():
        return logprob + 0.2 * torch.randn(size, generator=g)

    return Batch(tokens, mask, near(), near(), torch.randn(size[0], generator=g))


def our_step(
    policy: Policy,
    reference: Policy,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    shape: Shape,
) -> None:
    """One pass through the loop of train_grpo.py, with one update."""
    prompts = policy.encode(samples)
    rollout = generate(policy, prompts, group_size=shape.group, max_new_tokens=shape.answer)
    rewards = torch.tensor([reward(text) for text in rollout.texts]).view(-1, shape.group)
    advantage = group_advantages(rewards).view(-1)
    with torch.no_grad():
        ref_logprob = reference.score(prompts, rollout.tokens, rollout.mask)
    logprob, _ = policy.score(prompts, rollout.tokens, rollout.mask, entropy=True)
    loss, _ = grpo_loss(
        logprob, rollout.logprob, advantage, rollout.mask, ref_logprob=ref_logprob, **LOSS
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adamw(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)


# ---- transformers --------------------------------------------------------------------------------


class ImageTextProcessor(Qwen3VLProcessor):
    """Names no video processor: that one needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def processor_of(policy: Policy) -> ImageTextProcessor:
    return ImageTextProcessor(
        policy.image_processor, policy.tokenizer, chat_template=policy.tokenizer.chat_template
    )


def messages(sample: Sample) -> list[dict]:
    images = [{"type": "image", "image": load_image(path)} for path in sample.images]
    return [{"role": "user", "content": images + [{"type": "text", "text": sample.question}]}]


def plain_inputs(
    processor: ImageTextProcessor, samples: list[Sample], copies: int = 1
) -> dict[str, Tensor]:
    conversations = [messages(sample) for sample in samples for _ in range(copies)]
    return dict(
        processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(padding=True, padding_side="left"),
        )
    )


def plain_rollout(
    model: Qwen3VLForConditionalGeneration, processor, samples: list[Sample], shape: Shape
) -> Tensor:
    inputs = plain_inputs(processor, samples)
    with torch.no_grad():
        return model.generate(
            **inputs,
            num_return_sequences=shape.group,
            max_new_tokens=shape.answer,
            do_sample=True,
            # none: no answer ends early
            top_k=0,
            eos_token_id=model.config.text_config.vocab_size,
        )


def plain_score(
    model: Qwen3VLForConditionalGeneration, processor, samples: list[Sample], batch: Batch
) -> Tensor:
    inputs = plain_inputs(processor, samples, copies=len(batch.tokens) // len(samples))
    follow = {
        "input_ids": batch.tokens,
        "attention_mask": torch.ones_like(batch.tokens),
        "mm_token_type_ids": torch.zeros_like(batch.tokens),
    }
    inputs |= {
        name: torch.cat([inputs[name], more], dim=1)
        for name, more in follow.items()
        if name in inputs
    }
    logits = model(**inputs, logits_to_keep=batch.tokens.shape[1] + 1, use_cache=False).logits[
        :, :-1
    ]
    logprob = logits.float().log_softmax(-1).gather(2, batch.tokens[..., None])[..., 0]
    return backward(model, batch.loss(logprob))


# ---- TRL -----------------------------------------------------------------------------------------


def trl_trainer(
    folder: Path, processor, samples: list[Sample], shape: Shape, *, max_steps: int = 1
):
    """The released GRPOTrainer over a checkpoint folder, one prompt batch and one update a step."""
    from datasets import Dataset

    images = [{"image": load_image(sample.image)} if sample.image else {} for sample in samples]
    rows = [
        {"prompt": [{"role": "user", "content": sample.question}]} | image
        for sample, image in zip(samples, images)
    ]
    # none: no answer ends early
    end = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    args = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=max_steps,
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.answer,
        learning_rate=LEARNING_RATE,
        generation_kwargs=dict(eos_token_id=end),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        **TRL_LOSS,
    )
    trainer = trl.GRPOTrainer(
        model=Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
        args=args,
        reward_funcs=lambda completions, **_: [reward(each[0]["content"]) for each in completions],
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.eos_token_ids = [end]  # without the tokenizer's, which TRL adds: no answer ends early
    # what `train` will set, for a loss outside of it
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_rollout(trainer, samples: list[Sample], shape: Shape) -> None:
    trainer._generate([messages(sample) for sample in samples for _ in range(shape.group)])


def trl_score(trainer, processor, samples: list[Sample], batch: Batch) -> Tensor:
    inputs = plain_inputs(processor, samples, copies=len(batch.tokens) // len(samples))
    ids, kinds = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids", None)
    if "pixel_values" in inputs:
        inputs["num_images"] = [1] * len(ids)
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(batch.tokens)], dim=1)
    inputs |= dict(
        prompt_ids=ids,
        prompt_mask=inputs.pop("attention_mask"),
        completion_ids=batch.tokens,
        completion_mask=batch.mask.long(),
        num_items_in_batch=batch.mask.sum(),
        advantages=batch.advantage,
        old_per_token_logps=batch.old,
        ref_per_token_logps=batch.ref,
    )
    return backward(trainer.model, trainer._compute_loss(trainer.model, inputs))


class OursBetween(TrainerCallback):
    """Ends each of TRL's steps with one of ours, and times both."""

    def __init__(self, step):
        self.step, self.trl, self.ours = step, [], []

    def on_train_begin(self, *_, **__):
        self.start = now()

    def on_step_end(self, *_, **__):
        self.trl.append(now() - self.start)
        self.start = now()
        self.step()
        self.ours.append(now() - self.start)
        self.start = now()
