"""A hybrid of convolution and attention on feature maps [B, C, H, W], as in pixel-space models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.researchers.dit import CHANNELS, CLASSES, DIM, HEADS, TimestepEmbedder

DEPTH = 4


class LayerNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), (DIM,), self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


class MapBlock(nn.Module):
    """x [B, C, H, W], emb [B, C] -> [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(), LayerNorm2d()
        self.emb = nn.Linear(DIM, 2 * DIM)
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1)
        self.local = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.out = nn.Conv2d(DIM, DIM, 1)
        self.mlp = nn.Sequential(nn.Conv2d(DIM, 2 * DIM, 1), nn.GELU(), nn.Conv2d(2 * DIM, DIM, 1))

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, HEADS, c // HEADS, h * w).unbind(1)
        weights = torch.einsum("bhdn,bhdm->bhnm", q, k).mul((c // HEADS) ** -0.5).softmax(-1)
        return self.out(torch.einsum("bhnm,bhdm->bhdn", weights, v).reshape(b, c, h, w) + self.local(x))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(F.silu(emb))[..., None, None].chunk(2, dim=1)
        x = x + self.attend(self.norm1(x) * (1 + scale) + shift)
        return x + self.mlp(self.norm2(x))


class Maps(nn.Module):
    """x [B, C, H, W], time [B], label [B] -> [B, C, H, W]. One resolution throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(CHANNELS, DIM, 3, padding=1), nn.Conv2d(DIM, CHANNELS, 3, padding=1)
        self.embed, self.label = TimestepEmbedder(DIM), nn.Embedding(CLASSES, DIM)
        self.make_blocks()

    def make_blocks(self) -> None:
        self.stages = nn.ModuleList(MapBlock() for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, emb: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, emb)
        return x

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.head(self.run_blocks(self.stem(x), self.embed(time) + self.label(label)))

    def block_calls(self) -> list[nn.Module]:
        return list(self.stages)


class ChannelsLastMaps(Maps):
    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return super().forward(x.to(memory_format=torch.channels_last), time, label)


class HourglassMaps(Maps):
    """Downsampling, a middle at half the resolution, and upsampling with a skip: the middle blocks are cached."""

    def make_blocks(self) -> None:
        self.enter, self.leave = MapBlock(), MapBlock()
        self.down, self.up = nn.Conv2d(DIM, DIM, 2, stride=2), nn.ConvTranspose2d(DIM, DIM, 2, stride=2)
        self.stages = nn.ModuleList(MapBlock() for _ in range(DEPTH + 2))

    def run_blocks(self, x: Tensor, emb: Tensor) -> Tensor:
        skip = self.enter(x, emb)
        x = super().run_blocks(self.down(skip), emb)
        return self.leave(self.up(x) + skip, emb)
