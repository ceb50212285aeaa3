"""Which parameters learn from private data, and a check on public data that each of them can.

Every trainable coordinate takes its share of the noise, so a parameter that cannot learn (its
gradient is identically zero) only makes the model worse: such parameters are frozen or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion

Trainable = Literal["transformer", "attention", "output-blocks", "lora"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# With one token the softmax of cross-attention is 1 whatever the query and the key are.
_IDLE_FOR_ONE_TOKEN = (".attn2.to_q.", ".attn2.to_k.", ".norm2.")


def transformer_blocks(unet: nn.Module) -> list[str]:
    """Names of the transformer blocks of a diffusers UNet, in the order input, middle, output.

    A block is norm, proj_in, self-attention, cross-attention, feed-forward and proj_out: what the
    paper calls an attention module. Number n of the paper (from 1) is element n - 1.
    """
    found = [name for name, _ in unet.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(found, key=lambda name: order[name.split(".")[0]])  # stable within each part


def select_trainable(
    denoiser: Denoiser,
    *,
    trainable: Trainable,
    first_block: int = 1,
    lora_rank: int = 8,
) -> dict[str, nn.Parameter]:
    """Set ``requires_grad`` on what learns and on nothing else; return it by name, in model order.

    - "transformer": whole transformer blocks (arXiv 2305.15759, section 4).
    - "attention": query, key, value and output projections of attn1 and attn2.
    - "output-blocks": whole transformer blocks from number ``first_block`` on, counted from 1 in
      the order input, middle, output.
    - "lora": adapters of rank ``lora_rank`` on those projections, added to the UNet in place.

    The learned part of the class table is always among them; with captions there is none, the
    text encoder is frozen. With one context token the query, key and norm of cross-attention are
    left out, because their gradient is identically zero.

    Raises: ConfigError if nothing is left to train.
    """
    denoiser.requires_grad_(False)
    blocks = transformer_blocks(denoiser.unet)
    if not blocks or (trainable == "output-blocks" and first_block > len(blocks)):
        raise ConfigError(
            f"finetune.first_block = {first_block}: the model has {len(blocks)} transformer blocks."
        )
    if trainable == "output-blocks":
        blocks = blocks[first_block - 1 :]
    idle = _idle(denoiser)
    if trainable == "lora":
        _add_adapters(denoiser.unet, _projections(denoiser.unet, blocks, idle), lora_rank)
    for name, parameter in denoiser.unet.named_parameters():
        parameter.requires_grad_(_learns(name, trainable, blocks, idle))
    denoiser.embedder.delta.requires_grad_(denoiser.embedder.kind != "caption")
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def freeze_idle(denoiser: Denoiser) -> None:
    """In place: parameters of the UNet on which no answer depends require no gradient."""
    blocks, idle = transformer_blocks(denoiser.unet), _idle(denoiser)
    for name, parameter in denoiser.unet.named_parameters():
        if _within(name, blocks) and any(part in name for part in idle):
            parameter.requires_grad_(False)


def _idle(denoiser: Denoiser) -> tuple[str, ...]:
    return _IDLE_FOR_ONE_TOKEN if denoiser.embedder.tokens == 1 else ()


def _learns(name: str, trainable: Trainable, blocks: Iterable[str], idle: Iterable[str]) -> bool:
    if not _within(name, blocks) or any(part in name for part in idle):
        return False
    if trainable == "lora":
        return ".lora_" in name
    if trainable == "attention":
        return _is_projection(name.rpartition(".")[0])
    return True


def _within(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _is_projection(module: str) -> bool:
    parts = module.split(".")
    return any(
        parts[i] in ("attn1", "attn2") and ".".join(parts[i + 1 :]) in PROJECTIONS
        for i in range(len(parts))
    )


def _projections(unet: nn.Module, blocks: Iterable[str], idle: Iterable[str]) -> list[str]:
    return [
        name
        for name, _ in unet.named_modules()
        if _within(name, blocks)
        and _is_projection(name)
        and not any(part in f"{name}." for part in idle)
    ]


def _add_adapters(unet: nn.Module, targets: list[str], rank: int) -> None:
    # A fixed seed: every worker and every restart begins from the same adapters. Nothing secret.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
        inject_adapter_in_model(settings, unet)


def fold_adapters(unet: nn.Module) -> nn.Module:
    """A copy of the UNet with its adapters added into the weights: a stock diffusers model again.

    A UNet without adapters is copied as it is.
    """
    folded = copy.deepcopy(unet)
    names = [name for name, m in folded.named_modules() if isinstance(m, BaseTunerLayer)]
    for name in names:
        layer = folded.get_submodule(name)
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(folded.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(folded, "peft_config"):
        del folded.peft_config
    return folded


def verify_all_learn(
    denoiser: Denoiser, diffusion: Diffusion, *, latents_BCHW: Tensor, condition: Tensor
) -> None:
    """Refuse trainable parameters whose gradient is identically zero, judged on public data.

    ``condition`` is labels (B,) or context (B, N, D). Gradients are taken at a slightly shifted
    point, because some (those behind a matrix of zeros, as in adapters) vanish only at the start.
    The parameters are as before when it returns.
    Raises: PrivacyError naming the parameters.
    """
    learning = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    size_of = _gradient_sizes(denoiser, diffusion, learning, latents_BCHW, condition)
    largest = max(size_of.values(), default=0.0)
    # Rounding leaves about 1e-8 of the largest where the exact gradient is zero.
    idle = [name for name, size in size_of.items() if not size > 1e-6 * largest]
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        raise PrivacyError(
            f"The gradient of {', '.join(idle[:3])}{more} is identically zero: these parameters "
            "would take noise and learn nothing. Choose another finetune.trainable, or a model "
            "whose smallest map and number of tokens let them learn."
        )


def _gradient_sizes(
    denoiser: Denoiser,
    diffusion: Diffusion,
    learning: Mapping[str, nn.Parameter],
    latents_BCHW: Tensor,
    condition: Tensor,
) -> dict[str, float]:
    """Largest absolute gradient of each parameter at a shifted point."""
    generator = torch.Generator().manual_seed(0)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    kept = {name: p.detach().clone() for name, p in learning.items()}
    u_B = torch.rand(len(latents_BCHW), generator=generator)
    t_B = diffusion.times_from_uniform(u_B, bias=0.0, spread=None).to(latents_BCHW.device)
    try:
        with torch.enable_grad():
            for p in learning.values():
                p.data.add_(normal(p), alpha=0.02)
            noise = normal(latents_BCHW)
            loss = diffusion.loss_rows(denoiser, latents_BCHW, noise, t_B, condition).mean()
            found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    finally:
        for name, p in learning.items():
            p.data.copy_(kept[name])
    return {
        name: 0.0 if g is None else float(g.abs().max())
        for name, g in zip(learning, found, strict=True)
    }
