"""Suggestions for arguments that do not exist."""

from difflib import get_close_matches

RENAMED = {  # in 0.2.0
    "how": "aggregation",
    "level": "ratio_level",
    "kind": "surrogate",
    "opened": "template_opens_think",
}
ELSEWHERE = {  # TRL, EasyR1 and LLaMA-Factory
    "num_generations": "--group_size",
    "beta": "--kl_coef",
    "epsilon": "--clip_low below 1 and --clip_high above",
    "epsilon_high": "--clip_high",
    "max_completion_length": "--max_new_tokens",
    "max_response_length": "--max_new_tokens",
    "num_iterations": "--updates_per_rollout, each on its own prompts",
    "loss_type": "--aggregation, --surrogate and --advantage_scale, or a file of configs/",
    "scale_rewards": "--advantage_scale",
    "reward_funcs": "--reward",
    "per_device_train_batch_size": "--prompts_per_step for GRPO, --batch_size for SFT, of all "
    "devices together; --micro_tokens and --micro_batch limit memory",
    "gradient_accumulation_steps": "nothing: it follows from --micro_tokens or --micro_batch",
    "lr_scheduler_type": "--lr_schedule",
    "warmup_ratio": "--warmup",
    "num_train_epochs": "--max_steps: a run is measured in steps, not in epochs",
    "model_name_or_path": "--model",
    "dataset": "--train_data",
    "dataset_name": "--train_data, a JSONL file",
    "template": "nothing: the chat template is that of the checkpoint",
    "cutoff_len": "nothing: texts are never cut; --max_pixels limits images",
    "image_max_pixels": "--max_pixels",
    "finetuning_type": "--lora_rank, or --freeze",
    "gradient_checkpointing": "--activation_checkpointing",
    "top_p": "nothing: answers are drawn from the whole distribution, whose log-probs the loss "
    "uses; a truncated one would be another policy",
    "top_k": "nothing: answers are drawn from the whole distribution, whose log-probs the loss "
    "uses; a truncated one would be another policy",
    "system_prompt": "nothing: write it into the question of each sample",
    "use_vllm": "nothing: sampling is minigrpo's own",
    "report_to": "--track",
    "resume_from_checkpoint": "--resume",
}


def hint(word: str, known: list[str]) -> str:
    """For an argument WORD, such as --beta=0.1, what to write instead; empty if that is not
    known.
    """
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    if name in RENAMED and RENAMED[name] in known:
        return f"--{name} has been called --{RENAMED[name]} since 0.2.0"
    if name in ELSEWHERE:
        there = ELSEWHERE[name]
        missing = there.removeprefix("nothing: ")
        if missing != there:
            return f"there is no --{name}: {missing}"
        return f"instead of --{name} use {there}"
    close = get_close_matches(name, known, n=1)
    return f"did you mean --{close[0]}?" if close else ""
