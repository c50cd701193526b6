"""A U-ViT: time and label are tokens, and the second half of the blocks has skips from the first half."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.researchers.dit import CHANNELS, CLASSES, DIM, HEADS, PATCH, TOKENS

EXTRAS = 2  # Tokens besides those of the image: time and label.


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim / num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        qkv = self.qkv(x).reshape(b, length, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, length, c)
        return self.proj(x)


class Block(nn.Module):
    """x [B, L, D], skip [B, L, D] or None -> [B, L, D]."""

    def __init__(self, dim: int = DIM, num_heads: int = HEADS, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class UViT(nn.Module):
    """x [B, C, H, W], timesteps [B], y [B] -> [B, C, H, W]."""

    def __init__(self, half: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(CHANNELS, DIM, kernel_size=PATCH, stride=PATCH)
        self.label_emb = nn.Embedding(CLASSES, DIM)
        self.pos_embed = nn.Parameter(torch.randn(1, EXTRAS + TOKENS, DIM) * 0.02)
        self.make_blocks(half)
        self.norm = nn.LayerNorm(DIM)
        self.decoder_pred = nn.Linear(DIM, PATCH**2 * CHANNELS)
        self.final_layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def make_blocks(self, half: int) -> None:
        self.in_blocks = nn.ModuleList([Block() for _ in range(half)])
        self.mid_block = Block()
        self.out_blocks = nn.ModuleList([Block(skip=True) for _ in range(half)])

    def run_blocks(self, x: Tensor) -> Tensor:
        skips = []
        for blk in self.in_blocks:
            x = blk(x)
            skips.append(x)
        x = self.mid_block(x)
        for blk in self.out_blocks:
            x = blk(x, skips.pop())
        return x

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        time_token = timestep_embedding(timesteps, DIM).unsqueeze(dim=1)
        x = torch.cat((self.label_emb(y).unsqueeze(dim=1), time_token, x), dim=1)
        x = self.run_blocks(x + self.pos_embed)
        x = self.decoder_pred(self.norm(x))
        x = x[:, EXTRAS:, :]
        return self.final_layer(F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (3, 3)), PATCH))

    def block_calls(self) -> list[nn.Module]:
        return [*self.in_blocks, self.mid_block, *self.out_blocks]


class OneListUViT(UViT):
    """All blocks are in one list; the skips are on a stack."""

    def make_blocks(self, half: int) -> None:
        self.blocks = nn.ModuleList(Block(skip=i > half) for i in range(2 * half + 1))

    def run_blocks(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        half = len(self.blocks) // 2
        for i, blk in enumerate(self.blocks):
            if i < half:
                x = blk(x)
                skips.append(x)
            else:
                x = blk(x, skips.pop()) if i > half else blk(x)
        return x

    def block_calls(self) -> list[nn.Module]:
        return list(self.blocks)


class PlainViT(UViT):
    """No skips: the blocks are an nn.Sequential that is called as a whole."""

    def make_blocks(self, half: int) -> None:
        self.blocks = nn.Sequential(*(Block() for _ in range(2 * half)))

    def run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def block_calls(self) -> list[nn.Module]:
        return list(self.blocks)
