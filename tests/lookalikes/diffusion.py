"""A diffusion U-Net: time embedding, scale and shift, group norms, attention, a stack of skips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.table import net
from tests.models.registry import image


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class ResnetBlock(nn.Module):
    def __init__(self, into: int, out: int, embed: int, groups: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, into)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed, 2 * out)
        self.norm2 = nn.GroupNorm(groups, out)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = torch.chunk(
            self.time_emb_proj(F.silu(embedding))[:, :, None, None], 2, dim=1
        )
        y = self.norm2(y) * (1 + scale) + shift
        y = self.conv2(self.dropout(F.silu(y)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return (x + y) / math.sqrt(2.0)


class SpatialAttention(nn.Module):
    """Old-style attention block: 1x1 qkv convolution, split heads, einsum."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *space = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        length = qkv.shape[-1]
        dim = qkv.shape[1] // (3 * self.heads)
        q, k, v = qkv.reshape(b * self.heads, dim * 3, length).split(dim, dim=1)
        scale = 1 / math.sqrt(math.sqrt(dim))
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        y = torch.einsum("bts,bcs->bct", weights, v).reshape(b, -1, length)
        return (flat + self.proj_out(y)).reshape(b, c, *space)


@dataclass
class UNetOutput:
    sample: Tensor


class DiffusionUNet(nn.Module):
    def __init__(self, width: int = 16, embed: int = 32) -> None:
        super().__init__()
        self.width = width
        self.time_embedding = nn.Sequential(
            nn.Linear(width, embed), nn.SiLU(), nn.Linear(embed, embed)
        )
        self.class_embedding = nn.Embedding(5, embed)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            [ResnetBlock(width, width, embed), ResnetBlock(width, 2 * width, embed)]
        )
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=0)
        self.middle = nn.ModuleList(
            [ResnetBlock(2 * width, 2 * width, embed), SpatialAttention(2 * width, 2)]
        )
        self.up = nn.ModuleList(
            [ResnetBlock(4 * width, 2 * width, embed), ResnetBlock(3 * width, width, embed)]
        )
        self.upsample = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.conv_norm_out = nn.GroupNorm(4, 2 * width)
        self.conv_out = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> UNetOutput:
        embedding = self.time_embedding(timestep_embedding(timestep, self.width))
        embedding = embedding + self.class_embedding(label)
        x = self.conv_in(sample)
        skips = [x]
        x = self.down[0](x, embedding)
        skips.append(x)
        x = self.downsample(F.pad(x, (0, 1, 0, 1)))
        x = self.down[1](x, embedding)
        skips.append(x)
        x = self.middle[1](self.middle[0](x, embedding))
        x = self.up[0](torch.cat([x, skips.pop()], dim=1), embedding)
        x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.up[1](torch.cat([x, skips.pop()], dim=1), embedding)
        x = torch.cat([x, skips.pop()], dim=1)
        return UNetOutput(self.conv_out(F.silu(self.conv_norm_out(x))))


@net(
    "diffusion counts-channels",
    inputs=lambda: (image()(), torch.tensor([3, 400]), torch.tensor([1, 4])),
    width=8,
    shrinks=["conv_in", "down.0.conv1", "down.0.time_emb_proj", "time_embedding.0"],
    frozen={"conv_out": "output"},
)
def diffusion_unet() -> nn.Module:
    return DiffusionUNet()
