"""A flow-matching model of mel spectrograms, its streams [L, B, D], with mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.researchers.case import TEXT_WIDTH
from tests.researchers.dit import TimestepEmbedder

DEPTH, DIM, HEADS, MELS, LENGTH, EXPERTS = 4, 16, 2, 8, 11, 3


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DenseExperts(nn.Module):
    """Every expert sees every token. x [L, B, D] -> [L, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(FeedForward() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return torch.einsum("lbde,lbe->lbd", outputs, weights)


class TopKDense(DenseExperts):
    """The weights of all but the best experts are set to 0; sizes do not depend on the data."""

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(dim=-1).topk(2, dim=-1)
        weights = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, scores)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class TopKIndexAdd(DenseExperts):
    """As in Mixtral: each expert gathers its tokens and adds its results back."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        scores, chosen = self.router(tokens).softmax(dim=-1).topk(2, dim=-1)
        final = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            place, row = torch.where(mask[i])
            final.index_add_(0, row, expert(tokens[row]) * scores[row, place, None])
        return final.reshape(x.shape)


class TopKMask(DenseExperts):
    """Each expert selects its tokens with a boolean mask."""

    def forward(self, x: Tensor) -> Tensor:
        best = self.router(x).argmax(dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[best == i] = expert(x[best == i])
        return out


class AudioBlock(nn.Module):
    """x [L, B, D], emb [B, D], memory [T, B, D] -> [L, B, D]. Attention, convolution over time, feed-forward."""

    feed_forward: Callable[[], nn.Module] = FeedForward

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        self.self_attn = nn.MultiheadAttention(DIM, HEADS)
        self.cross_attn = nn.MultiheadAttention(DIM, HEADS)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)
        self.ff = type(self).feed_forward()
        self.film = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, emb: Tensor, memory: Tensor) -> Tensor:
        scale, shift = self.film(emb).chunk(2, dim=-1)
        h = self.norms[0](x) * (1 + scale) + shift
        x = x + self.self_attn(h, h, h, need_weights=False)[0]
        x = x + self.cross_attn(self.norms[1](x), memory, memory, need_weights=False)[0]
        x = x + self.conv(self.norms[2](x).permute(1, 2, 0)).permute(2, 0, 1)
        x = x + self.ff(self.norms[3](x))
        return x


def block_with(experts: Callable[[], nn.Module]) -> type[AudioBlock]:
    return type(f"{experts.__name__}Block", (AudioBlock,), {"feed_forward": experts})


class Audio(nn.Module):
    """mel [B, M, L], sigma [B], text [B, T, E] -> [B, M, L]."""

    block: Callable[[], nn.Module] = AudioBlock

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(MELS, DIM, 1)
        self.memory = nn.Linear(TEXT_WIDTH, DIM)
        self.embed = TimestepEmbedder(DIM)
        self.position = nn.Parameter(torch.randn(LENGTH, 1, DIM) * 0.1)
        self.layers = nn.ModuleList(type(self).block() for _ in range(DEPTH))
        self.head = nn.Conv1d(DIM, MELS, 1)

    def forward(self, mel: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        x = self.stem(mel).permute(2, 0, 1) + self.position[: mel.shape[-1]]
        emb, memory = self.embed(sigma), self.memory(text).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, emb, memory)
        return self.head(x.permute(1, 2, 0))

    def block_calls(self) -> list[nn.Module]:
        return list(self.layers)


class DenseExpertsAudio(Audio):
    block = block_with(DenseExperts)


class TopKDenseAudio(Audio):
    block = block_with(TopKDense)


class IndexAddAudio(Audio):
    block = block_with(TopKIndexAdd)


class MaskAudio(Audio):
    block = block_with(TopKMask)


class WrittenBackAudio(Audio):
    """Some tokens of the stream are overwritten between the blocks, as for infilling around known tokens."""

    def forward(self, mel: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        x = self.stem(mel).permute(2, 0, 1) + self.position[: mel.shape[-1]]
        emb, memory = self.embed(sigma), self.memory(text).transpose(0, 1)
        known = x[:3].clone()
        for layer in self.layers:
            x = layer(x, emb, memory)
            x = torch.cat([known, x[3:]], dim=0)
        return self.head(x.permute(1, 2, 0))
