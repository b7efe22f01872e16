"""Attention in the ways people write it, and the transformer modules of torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.registry import image, net, register

_TOKENS = image(2, 6, 5)


class Attention(nn.Module):
    """Separate projections and the fused kernel; sizes from the input, heads from the module."""

    def __init__(self, embed: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, embed)
        self.q, self.k, self.v = (nn.Linear(embed, embed) for _ in range(3))
        self.project = nn.Linear(embed, embed)
        self.head = nn.Linear(embed, 2)

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.view(b, n, self.heads, c // self.heads).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(
            self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        )
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.project(self.attend(x))
        return self.head(x)


@net(
    "attention channel-statistics",
    inputs=_TOKENS,
    width=8,
    movable=["embed", "project"],
    frozen={"head": "output"},
)
def attention_separate() -> nn.Module:
    return Attention()


@net("attention channel-statistics", inputs=_TOKENS, movable=["embed"], frozen={"head": "output"})
def attention_one_head() -> nn.Module:
    return Attention(heads=1)


@net(
    "attention channel-statistics",
    inputs=_TOKENS,
    width=8,
    movable=["embed", "project"],
    frozen={"head": "output"},
)
class AttentionFused(nn.Module):
    """timm's way: one qkv projection, reshape to (3, b, heads, n, dim), unbind; a python scale."""

    def __init__(self, embed: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = embed // heads
        self.scale = self.head_dim**-0.5
        self.embed = nn.Linear(5, embed)
        self.qkv = nn.Linear(embed, 3 * embed, bias=False)
        self.project = nn.Linear(embed, embed)
        self.head = nn.Linear(embed, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.project(y))


@net(
    "attention channel-statistics",
    inputs=_TOKENS,
    movable=["embed", "project"],
    frozen={"head": "output"},
)
class AttentionEinsum(nn.Module):
    """Heads as a raw parameter axis, multiplied by einsum."""

    def __init__(self, embed: int = 16, heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(5, embed)
        self.wq, self.wk, self.wv = (
            nn.Parameter(0.2 * torch.randn(embed, heads, dim)) for _ in range(3)
        )
        self.project = nn.Linear(heads * dim, embed)
        self.head = nn.Linear(embed, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q = torch.einsum("bnc,chd->bhnd", x, self.wq)
        k = torch.einsum("bnc,chd->bhnd", x, self.wk)
        v = torch.einsum("bnc,chd->bhnd", x, self.wv)
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        y = torch.einsum("bhqk,bhkd->bqhd", weights, v)
        return self.head(x + self.project(y.flatten(2)))


@net("attention", movable=["stem", "query", "key", "value"], frozen={"head": "output"})
class NonLocal(nn.Module):
    """SAGAN's and DANet's position attention: 1x1 convolutions, bmm, a learnt scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.query, self.key = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.value = nn.Conv2d(16, 16, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.3))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.size()
        query = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        key = self.key(x).view(b, -1, h * w)
        weights = torch.softmax(torch.bmm(query, key), dim=-1)
        y = torch.bmm(self.value(x).view(b, -1, h * w), weights.permute(0, 2, 1))
        return self.head(self.gamma * y.view(b, -1, h, w) + x)


@net("attention channel-statistics", movable=["stem"], frozen={"head": "output"})
class ChannelAttention(nn.Module):
    """DANet's channel attention: a channel-by-channel matrix, softmax over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.size()
        flat = x.view(b, c, -1)
        energy = torch.bmm(flat, flat.permute(0, 2, 1)) / (h * w)
        y = torch.bmm(energy.softmax(-1), flat).view(b, c, h, w)
        return self.head(x + y)


class MultiheadModel(nn.Module):
    """nn.MultiheadAttention between projections, batch first or second, with its weights unused."""

    def __init__(self, batch_first: bool, embed: int = 16, heads: int = 2, **options: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, embed)
        self.attention = nn.MultiheadAttention(embed, heads, batch_first=batch_first, **options)
        self.hidden = nn.Linear(embed, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.hidden(x + y).relu())


for _first in (True, False):
    register(
        "multihead_batch_first" if _first else "multihead_batch_second",
        lambda first=_first: MultiheadModel(first),  # type: ignore[misc]
        "attention multihead channel-statistics",
        inputs=_TOKENS,
        width=8,
        movable=["hidden"],
        frozen={"head": "output"},
    )


@net(
    "attention multihead counts-channels",
    inputs=lambda: (image(2, 6, 5)(), image(2, 4, 3)()),
    width=8,
    movable=["hidden"],
    frozen={"head": "output"},
)
class CrossAttention(nn.Module):
    """nn.MultiheadAttention with keys of another width, asked for its averaged weights."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 16), nn.Linear(3, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
        self.hidden = nn.Linear(20, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, context = self.left(x), self.right(context)
        y, weights = self.attention(x, context, context)
        return self.head(self.hidden(torch.cat([y, weights], -1)).relu())


@net(
    "attention multihead channel-statistics",
    inputs=_TOKENS,
    width=8,
    movable=["0"],
    frozen={"3": "output"},
)
def transformer_encoder() -> nn.Module:
    """Two standard encoder layers, norm after and norm before; the second copy is not tied."""
    return nn.Sequential(
        nn.Linear(5, 16),
        nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True, dropout=0.1),
        nn.TransformerEncoderLayer(
            16, 2, dim_feedforward=32, batch_first=True, norm_first=True, activation="gelu"
        ),
        nn.Linear(16, 2),
    )


@net(
    "attention parameter channel-statistics",
    width=8,
    movable=["embed", "position@2", "cls@2", "scale@0", "fc1"],
    frozen={"head": "output"},
)
class TinyViT(nn.Module):
    """Patch embedding, class token, positions, layer scale, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, 16))
        self.cls = nn.Parameter(0.1 * torch.randn(1, 1, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.project = nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(0.5 * torch.ones(16))
        self.head = nn.Linear(16, 5)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = x + self.scale * self.attend(self.norm1(x))
        x = x + self.scale * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


@net("attention", movable=["stem", "out"], shrinks=["to_qkv"], frozen={"head": "output"})
class MemoryAttention(nn.Module):
    """Learned keys and values, with axes of their own for heads and channels, stand before those
    of the map: the heads stay, and the channels of each are dropped alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.to_qkv = nn.Conv2d(8, 48, 1)
        self.memory = nn.Parameter(torch.randn(2, 2, 8, 3))
        self.out, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(x).chunk(3, 1))
        first_k, first_v = (t.expand(b, -1, -1, -1) for t in self.memory)
        k, v = torch.cat([first_k, k], -1), torch.cat([first_v, v], -1)
        weights = torch.einsum("bhci,bhcj->bhij", q, k).mul(0.5).softmax(-1)
        y = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(b, -1, h, w)
        return self.head(x + self.out(y))
