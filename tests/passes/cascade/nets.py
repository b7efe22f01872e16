"""Small networks for cascades, and volumes with something to find in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Small", "Threshold", "balls", "quiet"]


class Small(nn.Module):
    """A convolutional network of any number of axes, with batch norm."""

    def __init__(self, channels: int = 1, classes: int = 2, axes: int = 2, width: int = 6) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        self.first = conv(channels, width, 3, padding=1)
        self.norm = norm(width)
        self.second = conv(width, width, 3, padding=1)
        self.head = conv(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        logits: Tensor = self.head(self.second(x).relu())
        return logits


class Threshold(nn.Module):
    """Two classes without training: what is above a half is foreground."""

    def __init__(self, channels: int = 1, axes: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.conv = conv(channels, 2, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[1, 0] = 1.0
            self.conv.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(x)
        return logits


def quiet(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.double().eval()


def balls(count: int, size: int, axes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy images (count, 1, *size) of one ball each, and labels (count, *size)."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) + 0.5] * axes, indexing="ij"))
    centres = size * (0.3 + 0.4 * torch.rand(count, axes, generator=generator))
    far = (grid - centres.view(count, axes, *[1] * axes)).square().sum(1).sqrt()
    labels = (far < size * 0.3).long()
    noise = 0.5 * torch.randn(count, 1, *[size] * axes, generator=generator)
    return labels.unsqueeze(1) + noise, labels
