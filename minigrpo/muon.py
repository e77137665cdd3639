"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): matrices move along orthogonalised
gradients.

Like torch.optim.Muon with adjust_lr_fn="match_rms_adamw", with one exception: on a CPU the
Newton-Schulz iteration runs in fp32. Torch's runs in bf16 everywhere, which takes 20 times as long
on a CPU without bf16 instructions.
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic a X + b (X X') X + c (X X')^2 X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for parameters that are matrices.

    The step is 0.2 sqrt(max(rows, columns)) times the learning rate (Moonlight, 2502.16982), so
    that its root mean square is that of an AdamW step: both take the same learning rate.
    `weight_decay` is decoupled, as AdamW's.
    """

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalize(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """[m, n] -> about U V' of its singular value decomposition U S V': singular values between 0.7
    and 1.2, in fp32 on a CPU, in bf16 on a GPU. A matrix of zeros stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    wide = x.T if x.shape[0] > x.shape[1] else x  # the smaller of the two products x x' and x' x
    wide = wide / wide.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide
