"""LoRA (Hu et al. 2106.09685) through `peft`: small trained matrices beside frozen linear layers, y
= W x + alpha / r * B A x.

B starts at 0, so the first policy is the base model; with the adapters off it remains the base
model, so GRPO needs no second copy of the weights as its reference. `peft` puts the adapters into
the model's own modules, in place. Defaults follow "LoRA Without Regret" (Schulman, 2025): every
linear layer, alpha 32, and ten times the learning rate of full training.
"""

import hashlib
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

from minigrpo import trust
from minigrpo.checks import check_finite, reading
from minigrpo.policy import Policy


def settings(args) -> dict:
    """Arguments of peft's LoraConfig; a checkpoint must have been made with the same."""
    layers = (
        rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(args.lora_targets)})"
    )
    return dict(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=layers)


def check_checkpoint(checkpoint: Path, args) -> None:
    """Refuse, before anything is loaded, to resume with adapters other than those in the
    checkpoint.
    """
    path = checkpoint / "adapter_config.json"
    if not path.exists():
        if args.lora_rank:
            raise ValueError(
                f"{checkpoint} holds whole weights, not adapters: resume it with --lora_rank 0"
            )
        return
    before, now = trust.parse(path, trust.read_text(path)), settings(args)
    for name, argument in (
        ("r", "lora_rank"),
        ("lora_alpha", "lora_alpha"),
        ("target_modules", "lora_targets"),
    ):
        if before.get(name) != now[name]:
            had = str(before.get(name)).rsplit("(", 1)[-1].strip(")").replace("|", " ")
            raise ValueError(
                f"{checkpoint} holds adapters with another --{argument}: resume it with"
                f" --{argument} {had}"
            )


def add_adapters(policy: Policy, args, checkpoint: Path | None = None) -> Policy:
    """Add adapters of --lora_rank to --lora_targets, new from --seed or from the checkpoint; only
    they are trained. Returns the policy.
    """
    # seconds to import, so only here
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    # peft asks for it by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    if checkpoint is not None:
        base = checkpoint / "base.json"
        if trust.parse(base, trust.read_text(base) or "").get("fingerprint") != fingerprint(
            policy.model
        ):
            raise ValueError(
                f"--model {args.model} is not the model that the adapters in {checkpoint} were"
                f" trained on: give the one that {checkpoint.parent.parent / 'args.json'} names,"
                " unchanged"
            )
    torch.manual_seed(args.seed)  # of A, which starts random
    policy.adapters = get_peft_model(
        policy.model, LoraConfig(**settings(args), lora_dropout=0.0, bias="none")
    )
    if checkpoint is not None:
        path = checkpoint / "adapter_model.safetensors"
        # the weights alone: peft's settings are ours
        with reading(str(path), "resume from another checkpoint"):
            loaded = set_peft_model_state_dict(policy.adapters, load_file(path, str(policy.device)))
            if odd := [
                *loaded.unexpected_keys,
                *(name for name in loaded.missing_keys if ".lora_" in name),
            ]:
                raise ValueError(f"{odd[0]} is missing or superfluous")
        check_finite(path, policy.model)
    return policy


def adapters_off(policy: Policy):
    """A context in which the policy is its base model: GRPO's reference. A policy without adapters
    is unchanged.
    """
    return nullcontext() if policy.adapters is None else policy.adapters.disable_adapter()


def save_adapters(policy: Policy, folder: Path) -> None:
    """Save them in peft's format, for `PeftModel.from_pretrained(base model, folder)`, with a
    record of their base model.
    """
    # "auto" would ask the hub about the vocabulary
    policy.adapters.save_pretrained(folder, save_embedding_layers=False)
    (folder / "base.json").write_text(json.dumps({"fingerprint": fingerprint(policy.model)}) + "\n")


def merge_adapters(policy: Policy) -> None:
    """Replace each pair by W + alpha / r * B A: a plain model again, the same function up to
    rounding.
    """
    policy.adapters.merge_and_unload()
    policy.adapters = None


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of names, shapes and about a thousand values of every base weight: the same with and
    without adapters.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            values = weight.detach().flatten()[:: max(1, weight.numel() // 1024)]
            digest.update(
                f"{name.replace('.base_layer.', '.')} {tuple(weight.shape)}".encode()
                + values.float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()
