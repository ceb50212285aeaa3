"""Counted work: floating-point operations of a step, whoever performs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Work:
    """Operations (a multiplication and an addition count as two) of products and convolutions.

    ``forward`` and ``activation_backward`` are what any method must do for these trainable
    parameters; ``weight_gradients`` is what summing a layer's gradients over the batch takes at the
    least: as much as the layer's forward pass.
    """

    forward: int
    activation_backward: int
    weight_gradients: int

    @property
    def total(self) -> int:
        return self.forward + self.activation_backward + self.weight_gradients

    def as_dict(self) -> dict[str, int]:
        return {f"flops_{name}": value for name, value in asdict(self).items()}


def work_of(
    model: nn.Module, parameters: Sequence[nn.Parameter], losses: Callable[[], Tensor]
) -> Work:
    """Counted on one plain forward and backward pass, attention as its plain products."""
    forward, backward, learning = FlopCounterMode(display=False), FlopCounterMode(display=False), []
    chosen = {id(parameter) for parameter in parameters}
    hooks = [
        module.register_forward_hook(_counter(module, learning))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) in chosen
    ]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            with forward:
                loss = losses().sum()
            with backward:
                torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    weights = sum(learning)
    return Work(forward.get_total_flops(), backward.get_total_flops() - weights, weights)


def _counter(module: nn.Module, found: list[int]) -> Callable[..., None]:
    """Multiplications of one forward pass of a layer, times two: outputs times their fan-in."""
    fan_in = module.weight[0].numel()

    def count(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(2 * output.numel() * fan_in)

    return count


def performed(run: Callable[[], object]) -> int:
    """Operations of products and convolutions that a call really performs."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()
