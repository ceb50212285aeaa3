"""The network that is trained: a UNet together with its conditioning table."""

from __future__ import annotations

from torch import Tensor, nn

from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.unet import spare_idle_attention


class Denoiser(nn.Module):
    """(z_t (R, C, H, W), times (R,), labels (R,) or context (R, N, D)) -> answer (R, C, H, W).

    ``unet`` gets processors of its own for cross-attention (``spare_idle_attention``).
    """

    def __init__(self, unet: nn.Module, embedder: ClassEmbedder) -> None:
        super().__init__()
        self.unet = unet
        spare_idle_attention(unet)
        self.embedder = embedder

    def forward(self, z_RCHW: Tensor, t_R: Tensor, condition: Tensor) -> Tensor:
        context_RND = self.embedder(condition) if condition.dim() == 1 else condition
        return self.unet(z_RCHW, t_R, context_RND.to(z_RCHW.dtype), return_dict=False)[0]
