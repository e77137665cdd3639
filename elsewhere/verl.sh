#!/usr/bin/env bash
# The paper's GRPO with verl and vLLM, on our checkpoint, data and rewards (docs/node.md). Needs GPUs and verl:
#
#     python -m minigrpo.elsewhere --data mine/train.jsonl --task report --output mine/train.parquet     # and the same for val
#     NODES=4 bash elsewhere/verl.sh runs/sft/final mine/train.parquet mine/val.parquet runs/verl
set -euo pipefail
MODEL=$1 TRAIN=$2 VAL=$3 OUT=$4
REWARDS=$(python -c 'import minigrpo.elsewhere as rewards; print(rewards.__file__)')

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=True algorithm.use_kl_in_reward=False \
    data.train_files="$TRAIN" data.val_files="$VAL" data.image_key=images data.train_batch_size=512 \
    data.max_prompt_length=3072 data.max_response_length=1024 data.truncation=error \
    custom_reward_function.path="$REWARDS" custom_reward_function.name=compute_score \
    +custom_reward_function.reward_kwargs.reward="report\=gleu\,grounding\=soft_f1" \
    actor_rollout_ref.model.path="$MODEL" actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.optim.weight_decay=0.01 actor_rollout_ref.actor.grad_clip=1.0 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=3.0 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    trainer.nnodes="${NODES:-1}" trainer.n_gpus_per_node="${GPUS:-8}" trainer.total_training_steps=300 trainer.save_freq=50 \
    trainer.test_freq=50 trainer.logger='["console"]' trainer.default_local_dir="$OUT"
