"""A transformer in the shape of Wan's own repository: lists of videos, and a rotary embedding that reads their sizes.

`rope_apply` is a function of this Python module. It calls `.tolist()`, so Dynamo breaks the graph in every block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachedit_fx.functors import PatchFunctor

DIM, HEADS, CHANNELS, TEXT, TEXT_WIDTH, DEPTH = 24, 2, 3, 5, 7, 4
PATCH = (1, 2, 2)


def rope_params(length: int, dim: int) -> Tensor:
    """The rotations of each position, complex [length, dim / 2]."""
    angles = torch.outer(torch.arange(length), 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    return torch.polar(torch.ones_like(angles), angles)


def rope_apply(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    """x [B, N, heads, d], grid_sizes int64 [B, 3], freqs complex [length, d / 2] -> x, with its tokens rotated."""
    d = freqs.shape[1]
    of_frame, of_row, of_column = freqs.split([d - 2 * (d // 3), d // 3, d // 3], dim=1)
    rotated = []
    for i, (f, h, w) in enumerate(grid_sizes.tolist()):
        count = f * h * w
        pairs = torch.view_as_complex(x[i, :count].to(torch.float64).unflatten(-1, (-1, 2)))
        angles = torch.cat(
            [
                of_frame[:f].view(f, 1, 1, -1).expand(f, h, w, -1),
                of_row[:h].view(1, h, 1, -1).expand(f, h, w, -1),
                of_column[:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            dim=-1,
        ).reshape(count, 1, -1)
        rotated.append(torch.cat([torch.view_as_real(pairs * angles).flatten(2), x[i, count:]]))
    return torch.stack(rotated).float()


def rope_apply_without_reading(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    """The same, from the position of each token in the sequence: no size is read from a tensor."""
    d = freqs.shape[1]
    of_frame, of_row, of_column = freqs.split([d - 2 * (d // 3), d // 3, d // 3], dim=1)
    position = torch.arange(x.shape[1], device=x.device)[None]
    f, h, w = (size[:, None] for size in grid_sizes.unbind(1))
    is_token = position < f * h * w
    frame, row, column = position // (h * w) * is_token, position // w % h, position % w
    angles = torch.cat([of_frame[frame], of_row[row], of_column[column]], dim=-1)[:, :, None]
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * angles).flatten(3)
    return torch.where(is_token[:, :, None, None], rotated, x).float()


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k = rope_apply(q, grid_sizes, freqs), rope_apply(k, grid_sizes, freqs)
        attended = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
        return self.o(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.self_attn, self.cross_k = SelfAttention(), nn.Linear(DIM, DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(approximate="tanh"), nn.Linear(2 * DIM, DIM))
        self.modulation = nn.Parameter(torch.randn(1, 4, DIM) / DIM**0.5)

    def forward(self, x: Tensor, e: Tensor, grid_sizes: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        shift, scale, gate, out_gate = (self.modulation + e).chunk(4, dim=1)
        x = x + gate * self.self_attn(self.norm1(x) * (1 + scale) + shift, grid_sizes, freqs)
        x = x + F.scaled_dot_product_attention(x, self.cross_k(context), context)
        return x + out_gate * self.ffn(self.norm2(x))


class Wan(nn.Module):
    """x: videos [C, F, H, W], t [B], context: texts [L, D], seq_len: the number of tokens to pad to -> videos."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(CHANNELS, DIM, kernel_size=PATCH, stride=PATCH)
        self.text_embedding, self.time_embedding = nn.Linear(TEXT_WIDTH, DIM), nn.Linear(8, 4 * DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, math.prod(PATCH) * CHANNELS)
        self.freqs = rope_params(64, DIM // HEADS)

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        embedded = [self.patch_embedding(video[None]) for video in x]
        grid_sizes = torch.stack([torch.tensor(video.shape[2:], dtype=torch.long) for video in embedded])
        tokens = [video.flatten(2).transpose(1, 2) for video in embedded]
        hidden = torch.cat([F.pad(video, (0, 0, 0, seq_len - video.shape[1])) for video in tokens])
        angles = t[:, None] * torch.arange(1, 5)
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1)).unflatten(1, (4, DIM))
        text = self.text_embedding(torch.stack([F.pad(one, (0, 0, 0, TEXT - one.shape[0])) for one in context]))
        for block in self.blocks:
            hidden = block(hidden, e=e, grid_sizes=grid_sizes, freqs=self.freqs, context=text)
        return self.unpatchify(self.head(hidden), grid_sizes)

    def unpatchify(self, x: Tensor, grid_sizes: Tensor) -> list[Tensor]:
        videos = []
        for tokens, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
            video = tokens[: f * h * w].view(f, h, w, *PATCH, CHANNELS)
            videos.append(torch.einsum("fhwpqrc->cfphqwr", video).reshape(CHANNELS, f, h * PATCH[1], w * PATCH[2]))
        return videos


class WanPatchFunctor(PatchFunctor):
    """Lets Dynamo capture the loop over the blocks as one graph."""

    def prepare(self, transformer: nn.Module) -> None:
        self.replace_function(transformer, "rope_apply", rope_apply_without_reading)


def calls(steps: int = 6) -> list[dict[str, object]]:
    """The arguments of one generation of two videos."""
    generator = torch.Generator().manual_seed(3)
    videos = [torch.randn(CHANNELS, 2, 4, size, generator=generator) for size in (4, 6)]
    context = [torch.randn(length, TEXT_WIDTH, generator=generator) for length in (TEXT, 3)]
    return [dict(x=videos, t=torch.full((2,), 1 - 0.1 * step), context=context, seq_len=14) for step in range(steps)]
