"""A small convolutional classifier: the judge of sample sets, never a part of what is released.

Shapes: B images, C channels, H height, W width, K classes, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.models.pixels import to_unit_range

LARGEST_SIDE = 64  # larger images are averaged down to this: the judge looks at shapes, not texture
MAX_SHIFT = 2  # pixels of random shift in training


class SmallClassifier(nn.Module):
    """Three strided convolutions, a hidden layer of ``4 * width`` features, one linear head.

    ``forward(images_BCHW in [-1, 1])`` gives logits (B, K); ``features`` gives the penultimate
    activations (B, F), F = ``num_features``. Images of any size are accepted.
    """

    def __init__(self, *, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.body = nn.Sequential(
            _block(channels, width, stride=2),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(4 * width * 16, self.num_features)
        self.head = nn.Linear(self.num_features, classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        if max(images_BCHW.shape[-2:]) > LARGEST_SIDE:
            images_BCHW = F.interpolate(images_BCHW, size=LARGEST_SIDE, mode="area")
        return F.silu(self.hidden(self.body(images_BCHW)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.features(images_BCHW))


def train_classifier(
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    classes: int,
    width: int,
    steps: int,
    batch: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> SmallClassifier:
    """A classifier trained from scratch on uint8 images (N, C, H, W), labels (N,); in eval mode.

    AdamW with a one-cycle learning rate, random shifts of up to two pixels, label smoothing.
    Initial weights and batches depend on ``seed`` and N only, so that sets of equal size are
    judged under the same protocol. Runs on the device of ``images_NCHW``; the global random state
    of torch is left as it was.
    """
    device = images_NCHW.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(channels=images_NCHW.shape[1], classes=classes, width=width)
    model = model.to(device, memory_format=torch.channels_last).train()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=0.15
    )
    for _ in range(steps):
        rows = torch.randint(len(images_NCHW), (batch,), generator=draw).to(device)
        batch_BCHW = _shifted(to_unit_range(images_NCHW[rows]), draw)
        loss = F.cross_entropy(model(batch_BCHW), labels_N[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: SmallClassifier, images_NCHW: Tensor, *, batch: int = 500) -> Tensor:
    """Predicted class (N,), int64, of uint8 images (N, C, H, W)."""
    parts = [model(to_unit_range(part)).argmax(dim=1) for part in images_NCHW.split(batch)]
    return torch.cat(parts)


def _block(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


def _shifted(images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
    """Each image moved by its own whole number of pixels; the border is repeated."""
    count, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, (MAX_SHIFT,) * 4, mode="replicate")
    offset = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1), generator=draw).to(padded.device)
    rows = (offset[0] + torch.arange(height, device=padded.device))[:, None, :, None]
    columns = (offset[1] + torch.arange(width, device=padded.device))[:, None, None, :]
    image = torch.arange(count, device=padded.device)[:, None, None, None]
    channel = torch.arange(padded.shape[1], device=padded.device)[None, :, None, None]
    shifted = padded[image, channel, rows, columns]
    return shifted.contiguous(memory_format=torch.channels_last)
