"""Muon: momentum whose matrix updates are made orthogonal (Keller Jordan, 2024), batched over equal shapes."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor


def orthogonalize(stack: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on a stack [n, rows, columns] of matrices; singular values end near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return cast(Tensor, x.transpose(1, 2) if tall else x)


class Muon(torch.optim.Optimizer):
    """For weight matrices only; `run` is map, or the map of a thread pool."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
        run: Callable[..., Iterable[Tensor]] = map,
    ) -> None:
        super().__init__(list(weights), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._run = run

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                by_shape[tuple(weight.shape)].append(weight)
            stacks = [
                torch.stack([self._momentum(weight, group["momentum"]) for weight in same])
                for same in by_shape.values()
            ]
            for same, updates in zip(by_shape.values(), self._run(orthogonalize, stacks), strict=True):
                rows, columns = same[0].shape
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, update in zip(same, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        gradient = weight.grad
        if gradient is None:
            raise ValueError("A weight has no gradient. Give the optimizer only weights that are used.")
        moment = cast(Tensor, self.state[weight].setdefault("moment", torch.zeros_like(weight)))
        moment.lerp_(gradient, 1 - momentum)
        return gradient.lerp(moment, momentum)
