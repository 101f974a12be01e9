"""Optimisers of pretraining: AdamW, Muon for inner matrices, and exponential moving averages of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for inner matrices (Jordan et al. 2024, Muon).

    A convolution counts as a matrix (out, in * height * width). The update is scaled to the size of AdamW's by
    0.2 sqrt(max(rows, columns)) (Liu et al. 2025, Muon is Scalable for LLM Training, Eq. 4), so both share a learning
    rate.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                memory = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(memory, group["momentum"]).flatten(1)  # Nesterov momentum
                by_shape.setdefault((update.shape[0], update.shape[1]), []).append((weight, update))
            for shape, pairs in by_shape.items():
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = orthogonal(torch.stack([update for _, update in pairs])).float() * rate
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update.reshape(weight.shape).to(weight.dtype))


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (k, m, n) near 1 by five Newton-Schulz steps (Jordan et al. 2024)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


_EDGES = ("conv_in", "conv_out", "embedding", "embed", "head")  # names of matrices that Muon is not meant for


def optimizers(
    weights: Mapping[str, nn.Parameter], recipe: Recipe, *, captured: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for inner matrices and AdamW for the rest.

    captured: their steps are to be captured in a CUDA graph, so their rates are tensors on the GPU.
    """
    device = next(iter(weights.values())).device
    rate: Any = torch.tensor(recipe.learning_rate, device=device) if captured else recipe.learning_rate
    inner = {k for k, w in weights.items() if recipe.muon and w.ndim > 1 and not any(part in k for part in _EDGES)}
    rest = {k: w for k, w in weights.items() if k not in inner}
    groups = [
        {"params": [w for w in rest.values() if w.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in rest.values() if w.ndim <= 1], "weight_decay": 0.0},
    ]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=True, capturable=captured)
    ]
    for names in _shared_out(weights, inner, recipe.parts):  # one per core: they step in parallel
        own = [weights[k] for k in names]
        result.append(Muon(own, lr=rate, weight_decay=recipe.weight_decay))
    return result


def set_rate(steppers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of optimisers, in place where it is a tensor."""
    for group in (group for stepper in steppers for group in stepper.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _shared_out(weights: Mapping[str, nn.Parameter], names: Iterable[str], shares: int) -> list[list[str]]:
    """Split matrices into shares with about equal work to orthogonalise, keeping equal shapes together."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in sorted(names):
        rows = weights[name].shape[0]
        shapes.setdefault((rows, weights[name].numel() // rows), []).append(name)
    costs = {shape: min(shape) * shape[0] * shape[1] * len(own) for shape, own in shapes.items()}
    result: list[list[str]] = [[] for _ in range(shares)]
    totals = [0] * shares
    for shape in sorted(costs, key=lambda shape: (-costs[shape], shape)):
        least = totals.index(min(totals))
        totals[least] += costs[shape]
        result[least] += shapes[shape]
    return [own for own in result if own]


class Average(nn.Module):
    """Exponential moving average of weights, faster at the start (Karras et al. 2018, Progressive GAN, Sec. 4)."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        super().__init__()
        self.decay = decay
        self.shadow = {name: weight.detach().clone() for name, weight in weights.items()}

    def share(self, step: int) -> float:
        """How much of the weights the average takes in at a step."""
        return 1.0 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], share: float | Tensor) -> None:
        """Take in the weights with that share; a tensor, on the weights' device, can change in a captured step."""
        shadow, new = list(self.shadow.values()), [weights[name].detach() for name in self.shadow]
        if isinstance(share, float):
            torch._foreach_lerp_(shadow, new, share)
        else:  # the same in three passes: there is no such operation for a tensor
            change = torch._foreach_sub(new, shadow)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(shadow, change)
