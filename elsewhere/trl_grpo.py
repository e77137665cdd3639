"""The paper's GRPO with TRL and vLLM, on our checkpoint, our data and our rewards (docs/node.md).
Needs GPUs, trl and vllm:

    accelerate launch --num_processes 8 \\
        elsewhere/trl_grpo.py runs/sft/final mine/train.jsonl runs/trl
"""

import sys

from datasets import Dataset

from minigrpo.data import read_jsonl
from minigrpo.elsewhere import trl_reward, trl_rows

REWARD = "report=gleu,grounding=soft_f1"
# 512 prompts x 8 answers a rollout and 4 updates on it, on 8 GPUs: 4096 / 4 / 8 = 128 answers a GPU
# and update, in 16 parts of 8.
PAPER = dict(
    num_generations=8,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=16,
    steps_per_generation=64,
    max_completion_length=1024,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    learning_rate=1e-6,
    lr_scheduler_type="constant",
    weight_decay=0.01,
    max_grad_norm=1.0,
    epsilon=0.2,
    epsilon_high=0.28,
    delta=3.0,
    beta=0.01,
    loss_type="dapo",
    scale_rewards="group",
    bf16=True,
    gradient_checkpointing=True,
)


def make_trainer(model: str, samples: list, output_dir: str, **settings):
    """A GRPOTrainer; `settings` replace those of the paper, or a processor that TRL cannot load by
    itself.
    """
    from trl import GRPOConfig, GRPOTrainer

    processor = settings.pop("processing_class", None)
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(output_dir=output_dir, **{**PAPER, **settings}),
        reward_funcs=trl_reward(REWARD),
        train_dataset=Dataset.from_list(trl_rows(samples)),
        processing_class=processor,
    )


if __name__ == "__main__":
    checkpoint, data, folder = sys.argv[1:]
    make_trainer(
        checkpoint,
        read_jsonl(data, task="report"),
        folder,
        use_vllm=True,
        vllm_mode="colocate",
        max_steps=1200,
    ).train()
