"""Vision transformers for segmentation: Swin windows, SegFormer's MiT and its all-MLP head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.table import net
from tests.models.registry import image


class DropPath(nn.Module):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1 - self.probability
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


def window_partition(x: Tensor, window: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, c)


def window_reverse(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    b = int(windows.shape[0] / (h * w / window / window))
    x = windows.view(b, h // window, w // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class WindowAttention(nn.Module):
    """Attention inside windows with a learnt table of relative position biases."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.dim, self.window, self.num_heads = dim, window, heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            0.02 * torch.randn((2 * window - 1) ** 2, heads)
        )
        self.relative_position_index: Tensor
        rows = torch.arange(window)
        grid = torch.stack(torch.meshgrid(rows, rows, indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        index = relative[..., 0] * (2 * window - 1) + relative[..., 1]
        self.register_buffer("relative_position_index", index)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        attention = attention + bias.view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attention = attention.view(b // count, count, self.num_heads, n, n)
            attention = (attention + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.num_heads, n, n)
        attention = self.attn_drop(attention.softmax(dim=-1))
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class SwinBlock(nn.Module):
    def __init__(self, dim: int, size: int, window: int, shift: int, heads: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop_path = DropPath(0.1)
        self.attn_mask: Tensor | None
        mask = None
        if shift:
            regions = torch.zeros(1, size, size, 1)
            cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, rows in enumerate(cuts):
                for j, columns in enumerate(cuts):
                    regions[:, rows, columns] = 3 * i + j
            flat = window_partition(regions, window).view(-1, window * window)
            mask = (flat.unsqueeze(1) - flat.unsqueeze(2)).ne(0).float() * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = window_partition(y, self.window).view(-1, self.window * self.window, c)
        y = self.attn(y, self.attn_mask).view(-1, self.window, self.window, c)
        y = window_reverse(y, self.window, h, w)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x))


class PatchExpand(nn.Module):
    """Swin-Unet's way up: a linear layer, then two of its factors into space."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        b, h, w, c = x.shape
        x = x.view(b, h, w, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)
        return self.norm(x)


class SwinUnet(nn.Module):
    def __init__(self, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)
        self.layer1 = nn.Sequential(SwinBlock(dim, 8, 4, 0, heads), SwinBlock(dim, 8, 4, 2, heads))
        self.merge = PatchMerging(dim)
        self.layer2 = SwinBlock(2 * dim, 4, 4, 0, 2 * heads)
        self.expand = PatchExpand(2 * dim)
        self.concat_back = nn.Linear(2 * dim, dim)
        self.up = nn.ConvTranspose2d(dim, 16, 4, stride=4)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch_embed(x).permute(0, 2, 3, 1))
        skip = self.layer1(x)
        x = self.expand(self.layer2(self.merge(skip)))
        x = self.concat_back(torch.cat([x, skip], -1))
        return self.head(self.up(x.permute(0, 3, 1, 2)).relu())


@net(
    "swin channel-statistics",
    inputs=image(2, 3, 32, 32),
    width=12,
    movable=["up"],
    shrinks=["layer1.0.mlp.0"],
    frozen={"head": "output"},
)
def swin_unet() -> nn.Module:
    return SwinUnet()


class EfficientAttention(nn.Module):
    """Keys and values on a grid reduced by a strided convolution."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.num_heads, self.ratio = heads, ratio
        self.scale = (dim // heads) ** -0.5
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        b, n, c = x.shape
        heads = self.num_heads
        q = self.q(x).reshape(b, n, heads, c // heads).permute(0, 2, 1, 3)
        if self.ratio > 1:
            y = x.permute(0, 2, 1).reshape(b, c, h, w)
            x = self.norm(self.sr(y).reshape(b, c, -1).permute(0, 2, 1))
        kv = self.kv(x).reshape(b, -1, 2, heads, c // heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class MixFeedForward(nn.Module):
    """Linear, depthwise convolution on the tokens as an image, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = self.fc1(x)
        b, _, c = x.shape
        x = self.dwconv(x.transpose(1, 2).view(b, c, h, w)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class MixBlock(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = EfficientAttention(dim, heads, ratio)
        self.mlp = MixFeedForward(dim, 4 * dim)
        self.drop_path = DropPath(0.1)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2.0 / (fan_out // module.groups)))

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), h, w))
        return x + self.drop_path(self.mlp(self.norm2(x), h, w))


class OverlapPatchEmbed(nn.Module):
    def __init__(self, into: int, dim: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(into, dim, patch, stride, padding=patch // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        _, _, h, w = x.shape
        return self.norm(x.flatten(2).transpose(1, 2)), h, w


class SegFormer(nn.Module):
    def __init__(self, dims: tuple[int, ...] = (16, 32, 64), embed: int = 32) -> None:
        super().__init__()
        into = (3, *dims[:-1])
        self.patch_embeds = nn.ModuleList(
            OverlapPatchEmbed(i, d, 7 if n == 0 else 3, 4 if n == 0 else 2)
            for n, (i, d) in enumerate(zip(into, dims, strict=True))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList([MixBlock(d, n + 1 if d % (n + 1) == 0 else 2, r)])
            for n, (d, r) in enumerate(zip(dims, (4, 2, 1), strict=True))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in dims)
        self.linears = nn.ModuleList(nn.Linear(d, embed) for d in dims)
        self.fuse = nn.Sequential(
            nn.Conv2d(embed * len(dims), embed, 1, bias=False), nn.BatchNorm2d(embed), nn.ReLU()
        )
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Conv2d(embed, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        maps = []
        for embed, blocks, norm in zip(self.patch_embeds, self.blocks, self.norms, strict=True):
            x, h, w = embed(x)
            for block in blocks:
                x = block(x, h, w)
            x = norm(x).reshape(b, h, w, -1).permute(0, 3, 1, 2).contiguous()
            maps.append(x)
        size = maps[0].shape[2:]
        projected = []
        for linear, level in zip(self.linears, maps, strict=True):
            y = linear(level.flatten(2).transpose(1, 2))
            y = y.permute(0, 2, 1).reshape(b, -1, *level.shape[2:])
            projected.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return self.head(self.dropout(self.fuse(torch.cat(projected[::-1], dim=1))))


@net(
    "segformer channel-statistics",
    inputs=image(2, 3, 64, 64),
    width=8,
    movable=["blocks.1.0.mlp.fc1", "blocks.1.0.mlp.dwconv", "linears.0", "fuse.0"],
    frozen={"head": "output"},
)
def segformer() -> nn.Module:
    return SegFormer()
