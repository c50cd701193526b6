"""A joint text-image MMDiT with custom rotary attention. Text and image are passed between blocks in many forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.researchers.case import TEXT, TEXT_WIDTH
from tests.researchers.dit import TimestepEmbedder

DEPTH, DIM, HEADS, TOKENS, CHANNELS = 4, 16, 2, 9, 4


def rope(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """positions [N] -> cos and sin, [2, N, dim / 2]."""
    freqs = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = positions[:, None] * freqs[None]
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """x [B, H, N, D], pe [2, N, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = pe
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Stream(nn.Module):
    """The layers of one modality in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(DIM, 4 * DIM)
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.q_norm, self.k_norm = nn.RMSNorm(DIM // HEADS), nn.RMSNorm(DIM // HEADS)
        self.proj = nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def project(self, tokens: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, _, _ = self.mod(F.silu(vec))[:, None].chunk(4, dim=-1)
        parts = self.qkv((1 + scale) * self.norm(tokens) + shift).unflatten(-1, (3, HEADS, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def update(self, tokens: Tensor, attended: Tensor, vec: Tensor) -> Tensor:
        _, _, gate1, gate2 = self.mod(F.silu(vec))[:, None].chunk(4, dim=-1)
        tokens = tokens + gate1 * self.proj(attended)
        return tokens + gate2 * self.mlp(self.norm(tokens))


class MMBlock(nn.Module):
    """img [B, N, D], txt [B, T, D], vec [B, D], pe [2, T + N, d] -> img, txt."""

    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = Stream(), Stream()

    def mix(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.txt.project(txt, vec), self.img.project(img, vec), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in parts)
        out = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
        out = out.transpose(1, 2).flatten(2)
        text_length = txt.shape[1]
        txt_out, img_out = out[:, :text_length], out[:, text_length:]
        return self.img.update(img, img_out, vec), self.txt.update(txt, txt_out, vec)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img, txt = self.mix(img, txt, vec, pe)
        return img, txt


class MMDiT(nn.Module):
    """img [B, N, C], timesteps [B], txt [B, T, E] -> [B, N, C]."""

    block: Callable[[], nn.Module] = MMBlock

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(CHANNELS, DIM), nn.Linear(TEXT_WIDTH, DIM)
        self.time_in = TimestepEmbedder(DIM)
        self.make_blocks()
        self.final = nn.Linear(DIM, CHANNELS)

    def make_blocks(self) -> None:
        self.double_blocks = nn.ModuleList(type(self).block() for _ in range(DEPTH))

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        return img

    def forward(self, img: Tensor, timesteps: Tensor, txt: Tensor) -> Tensor:
        vec = self.time_in(timesteps)
        pe = rope(torch.arange(txt.shape[1] + img.shape[1], device=img.device), DIM // HEADS)
        img = self.run_blocks(self.img_in(img), self.txt_in(txt), vec, pe)
        return self.final(img)

    def block_calls(self) -> list[nn.Module]:
        return list(self.double_blocks)


# Both streams in one container.


class DictBlock(MMBlock):
    """Returns a new dict."""

    def forward(self, streams: dict[str, Tensor], vec: Tensor, pe: Tensor) -> dict[str, Tensor]:
        img, txt = self.mix(streams["img"], streams["txt"], vec, pe)
        return {"img": img, "txt": txt}


class DictMMDiT(MMDiT):
    block = DictBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        streams = {"img": img, "txt": txt}
        for block in self.double_blocks:
            streams = block(streams, vec, pe)
        return streams["img"]


class BatchBlock(MMBlock):
    """Everything is in one dict, which the block modifies."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["img"], batch["txt"] = self.mix(batch["img"], batch["txt"], batch["vec"], batch["pe"])
        return batch


class BatchMMDiT(MMDiT):
    block = BatchBlock

    def make_blocks(self) -> None:
        self.double_blocks = nn.Sequential(*(BatchBlock() for _ in range(DEPTH)))

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        return self.double_blocks({"img": img, "txt": txt, "vec": vec, "pe": pe})["img"]


@dataclass
class State:
    img: Tensor
    txt: Tensor
    vec: Tensor
    pe: Tensor


class DataclassBlock(MMBlock):
    def forward(self, state: State) -> State:
        img, txt = self.mix(state.img, state.txt, state.vec, state.pe)
        return dataclasses.replace(state, img=img, txt=txt)


class DataclassMMDiT(MMDiT):
    block = DataclassBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        state = State(img, txt, vec, pe)
        for block in self.double_blocks:
            state = block(state)
        return state.img


class Streams(NamedTuple):
    img: Tensor
    txt: Tensor


class NamedTupleBlock(MMBlock):
    def forward(self, streams: Streams, vec: Tensor, pe: Tensor) -> Streams:
        return Streams(*self.mix(streams.img, streams.txt, vec, pe))


class NamedTupleMMDiT(MMDiT):
    block = NamedTupleBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        streams = Streams(img, txt)
        for block in self.double_blocks:
            streams = block(streams, vec, pe)
        return streams.img


class ListBlock(MMBlock):
    """A list with any number of modalities."""

    def forward(self, tokens: list[Tensor], vec: Tensor, pe: Tensor) -> list[Tensor]:
        return list(self.mix(*tokens, vec, pe))


class ListMMDiT(MMDiT):
    block = ListBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        tokens = [img, txt]
        for block in self.double_blocks:
            tokens = block(tokens, vec, pe)
        return tokens[0]


class BothLeaveMMDiT(MMDiT):
    """Both streams are used after the blocks, and only the variable names of the model distinguish them."""

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        return img + txt.mean(dim=1, keepdim=True)


# One joined stream.


class JointBlock(nn.Module):
    """tokens [B, T + N, D], vec [B, D], pe -> [B, T + N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()

    def forward(self, tokens: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        q, k, v = self.stream.project(tokens, vec)
        out = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
        return self.stream.update(tokens, out.transpose(1, 2).flatten(2), vec)


class JointMMDiT(MMDiT):
    """Text and image are joined once before the blocks and separated after them."""

    block = JointBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        tokens = torch.cat([txt, img], dim=1)
        for block in self.double_blocks:
            tokens = block(tokens, vec, pe)
        return tokens[:, txt.shape[1] :]


class BatchSecondBlock(MMBlock):
    """img [N, B, D], txt [T, B, D]: the batch is the second dimension."""

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img, txt = self.mix(img.transpose(0, 1), txt.transpose(0, 1), vec, pe)
        return img.transpose(0, 1), txt.transpose(0, 1)


class BatchSecondMMDiT(MMDiT):
    block = BatchSecondBlock

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        img, txt = img.transpose(0, 1).contiguous(), txt.transpose(0, 1).contiguous()
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        return img.transpose(0, 1)


class PipelineOfKwargsMMDiT(MMDiT):
    """The inputs of the blocks are passed on as keyword arguments that every block unpacks."""

    class block(MMBlock):
        def forward(self, img: Tensor, txt: Tensor, **kwargs: Any) -> dict[str, Any]:
            img, txt = self.mix(img, txt, **kwargs)
            return {"img": img, "txt": txt, **kwargs}

    def run_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        state: dict[str, Any] = dict(img=img, txt=txt, vec=vec, pe=pe)
        for block in self.double_blocks:
            state = block(**state)
        return state["img"]


assert TEXT != TOKENS  # Otherwise text and image could be confused.
