"""The optimisers of both programs, over the parameters that this rank updates."""

import torch

from minigrpo.muon import Muon
from minigrpo.policy import Policy
from minigrpo.run.distributed import parameters_of_this_rank
from minigrpo.run.shard import optimizer_param_groups


def grpo_optimizers(policy: Policy, args) -> list[torch.optim.Optimizer]:
    """AdamW, in a list of its own: `grpo_step` takes one optimiser."""
    groups = optimizer_param_groups(parameters_of_this_rank(policy.parameters()))
    return [torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)]


def sft_optimizers(policy: Policy, args) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon (Jordan et al. 2024) for the matrices of the layers, at AdamW's
    learning rates, and AdamW for the rest.
    """
    parameters = parameters_of_this_rank(policy.parameters())
    adam = dict(lr=args.learning_rate, betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(optimizer_param_groups(parameters), **adam)]
    matrices = {
        id(p) for name, p in policy.model.named_parameters() if p.dim() == 2 and "embed" not in name
    }
    muon = [p for p in parameters if id(p) in matrices]
    # A patch filter sums 1536 pixels that are bright or dark together: a step that suits the other
    # parameters, taken by all of its weights at once, destroys what the later layers have learned.
    # Muon would scale it by its inputs.
    patches = [p for p in parameters if p.dim() > 2]
    chosen = {id(p) for p in muon + patches}
    groups = [
        {"params": [p for p in parameters if id(p) not in chosen], "scale": 1.0},
        {"params": patches, "scale": patches[0][0].numel() ** -0.5 if patches else 1.0},
    ]
    return [torch.optim.AdamW(groups, **adam), Muon(muon, args.learning_rate, args.weight_decay)]
