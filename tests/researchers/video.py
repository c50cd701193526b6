"""A latent video model: alternating spatial and temporal attention, and some cross-attention to the text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.researchers.case import TEXT_WIDTH
from tests.researchers.dit import TimestepEmbedder

DEPTH, DIM, HEADS, CHANNELS, FRAMES, SIDE = 6, 16, 2, 4, 3, 4
SPATIAL = SIDE * SIDE


class Attend(nn.Module):
    """x [B, N, D], context [B, M, D] -> [B, N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_kv = nn.Linear(DIM, 2 * DIM, bias=False)
        self.to_out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.to_q(x), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Inner(nn.Module):
    """The common part of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = Attend()
        self.ff = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.SiLU(), nn.Linear(2 * DIM, DIM))
        self.scale_shift = nn.Linear(DIM, 2 * DIM)

    def modulated(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, F, S, D], emb [B, D]."""
        shift, scale = self.scale_shift(F.silu(emb))[:, None, None].chunk(2, dim=-1)
        return self.norm1(x) * (1 + scale) + shift


class SpatialBlock(Inner):
    """x [B, F, S, D]; attention within each frame."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, f, s, d = x.shape
        frames = self.modulated(x, emb).reshape(b * f, s, d)
        x = x + self.attn(frames).reshape(b, f, s, d)
        return x + self.ff(self.norm2(x))


class TemporalBlock(Inner):
    """x [B, F, S, D]; attention over time, at each position."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, f, s, d = x.shape
        places = self.modulated(x, emb).transpose(1, 2).reshape(b * s, f, d)
        x = x + self.attn(places).reshape(b, s, f, d).transpose(1, 2)
        return x + self.ff(self.norm2(x))


class CrossBlock(Inner):
    """x [B, F, S, D]; attention to the text [B, T, D]."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, f, s, d = x.shape
        x = x + self.attn(self.modulated(x, emb).reshape(b, f * s, d), text).reshape(b, f, s, d)
        return x + self.ff(self.norm2(x))


class Video(nn.Module):
    """z [B, C, F, H, W], t [B], text [B, T, E] -> [B, C, F, H, W]. Every third block attends to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv3d(CHANNELS, DIM, 1)
        self.text_proj = nn.Linear(TEXT_WIDTH, DIM)
        self.time = TimestepEmbedder(DIM)
        self.frame_embed = nn.Parameter(torch.randn(FRAMES, 1, DIM) * 0.1)
        self.make_blocks()
        self.norm_out, self.proj_out = nn.LayerNorm(DIM), nn.Linear(DIM, CHANNELS)

    def make_blocks(self) -> None:
        kinds = (SpatialBlock, TemporalBlock, CrossBlock)
        self.blocks = nn.ModuleList(kinds[i % 3]() for i in range(DEPTH))

    def run_blocks(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb, text)
        return x

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        b, _, f, h, w = z.shape
        x = self.proj_in(z).permute(0, 2, 3, 4, 1).reshape(b, f, h * w, DIM) + self.frame_embed
        x = self.run_blocks(x, self.time(t), self.text_proj(text))
        x = self.proj_out(self.norm_out(x)).reshape(b, f, h, w, CHANNELS)
        return x.permute(0, 4, 1, 2, 3)

    def block_calls(self) -> list[nn.Module]:
        return list(self.blocks)


class TwoListVideo(Video):
    """As in Latte: a list of spatial and a list of temporal blocks, which alternate."""

    pairs = 4

    def make_blocks(self) -> None:
        self.spatial_blocks = nn.ModuleList(SpatialBlock() for _ in range(self.pairs))
        self.temporal_blocks = nn.ModuleList(TemporalBlock() for _ in range(self.pairs))

    def run_blocks(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        emb = emb + text.mean(dim=1)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, emb, text)
            x = temporal(x, emb, text)
        return x

    def block_calls(self) -> list[nn.Module]:
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]


class SpatialAttention(Inner):
    """Returns the branch without the residual."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, f, s, d = x.shape
        return self.attn(self.modulated(x, emb).reshape(b * f, s, d)).reshape(b, f, s, d)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.net = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class PairedVideo(Video):
    """A list of lists whose members each return a branch; the loop adds the branches."""

    pairs = 4

    def make_blocks(self) -> None:
        self.layers = nn.ModuleList([])
        for _ in range(self.pairs):
            self.layers.append(nn.ModuleList([SpatialAttention(), FeedForward()]))

    def run_blocks(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        emb = emb + text.mean(dim=1)
        for attn, ff in self.layers:
            x = attn(x, emb) + x
            x = ff(x) + x
        return x

    def block_calls(self) -> list[nn.Module]:
        return [block for layer in self.layers for block in layer]


class FoldedVideo(Video):
    """The stream alternates between the shapes [B F, S, D] and [B S, F, D] of spatial and temporal blocks."""

    class Folded(Inner):
        """x [B', N, D], emb [B', D]."""

        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            shift, scale = self.scale_shift(F.silu(emb))[:, None].chunk(2, dim=-1)
            x = x + self.attn(self.norm1(x) * (1 + scale) + shift)
            return x + self.ff(self.norm2(x))

    def make_blocks(self) -> None:
        self.blocks = nn.ModuleList(self.Folded() for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        b, f, s, d = x.shape
        emb = emb + text.mean(dim=1)
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                x = x.reshape(b * f, s, d)
                x = block(x, emb.repeat_interleave(f, 0)).reshape(b, f, s, d)
            else:
                x = x.transpose(1, 2).reshape(b * s, f, d)
                x = block(x, emb.repeat_interleave(s, 0)).reshape(b, s, f, d).transpose(1, 2)
        return x


def unfold(number: int, x: Tensor) -> Tensor:
    """The stream of `FoldedVideo` in the shape of block `number` -> [B, F, S, D]."""
    n, d = x.shape[1:]
    return x.reshape(-1, FRAMES, n, d) if number % 2 == 0 else x.reshape(-1, SPATIAL, n, d).transpose(1, 2)


def fold(number: int, x: Tensor) -> Tensor:
    """The inverse of `unfold`."""
    x = x if number % 2 == 0 else x.transpose(1, 2)
    return x.flatten(0, 1)
