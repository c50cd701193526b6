"""DiTs whose loops do more than pass one tensor from block to block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.researchers.case import BATCH
from tests.researchers.dit import DEPTH, DIM, TOKENS, DiT, DiTBlock, modulate


class FusedNormBlock(DiTBlock):
    """As in state-space models with a fused norm: passes the branch and the accumulated residual, both [B, N, D]."""

    def forward(self, x: Tensor, residual: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else x + residual
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = gate.unsqueeze(1) * self.attn(modulate(self.norm1(residual), shift, scale))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(residual), shift_mlp, scale_mlp))
        return x, residual


class FusedNormDiT(DiT):
    block = FusedNormBlock

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual, c)
        return x + residual


class BalancedBlock(DiTBlock):
    """Also returns a balancing loss, [], as mixtures of experts do."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = super().forward(x, c)
        return x, x.softmax(dim=-1).mean(dim=(0, 1)).square().sum()


class SummedLossDiT(DiT):
    block = BalancedBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        total = torch.zeros(())
        for block in self.blocks:
            x, loss = block(x, c)
            total = total + loss
        return self.unpatchify(self.final_layer(x, c)), total


class DroppedLossDiT(DiT):
    block = BalancedBlock

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        losses = []
        for block in self.blocks:
            x, loss = block(x, c)
            losses.append(loss)
        return x


class ZippedDiT(DiT):
    """A second list computes the conditioning of every block."""

    def make_blocks(self) -> None:
        super().make_blocks()
        self.mods = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(DIM, DIM)) for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block, mod in zip(self.blocks, self.mods, strict=True):
            x = block(x, mod(c))
        return x


class RefinedConditionDiT(ZippedDiT):
    """The conditioning itself is passed from block to block."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block, mod in zip(self.blocks, self.mods, strict=True):
            c = c + mod(c)
            x = block(x, c)
        return x


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class StagesDiT(DiT):
    """The outer list contains stages of two blocks each."""

    def make_blocks(self) -> None:
        self.stages = nn.ModuleList(Stage() for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, c)
        return x

    def block_calls(self) -> list[nn.Module]:
        return list(self.stages)


class FirstInputDiT(DiT):
    """The input of the first block is added again after every block."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x, c) + 0.1 * first
        return x


class ShiftedDiT(DiT):
    """The tokens are rolled before every second block, and rolled back after it."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            shift = i % 2
            x = torch.roll(block(torch.roll(x, -shift, dims=1), c), shift, dims=1)
        return x


class BranchBlock(DiTBlock):
    """Returns the branch without the residual."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) - x


class HyperDiT(DiT):
    """Several copies of the stream, [B, S, N, D], are mixed before every block and updated after it."""

    block = BranchBlock
    width = 2

    def make_blocks(self) -> None:
        super().make_blocks()
        self.read = nn.Parameter(torch.ones(DEPTH, self.width) / self.width)
        self.write = nn.Parameter(torch.linspace(0.5, 1, DEPTH * self.width).reshape(DEPTH, self.width))

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        streams = x.unsqueeze(1).expand(-1, self.width, -1, -1)
        for i, block in enumerate(self.blocks):
            x = torch.einsum("s,bsnd->bnd", self.read[i], streams)
            x = block(x, c)
            streams = streams + self.write[i][:, None, None] * x.unsqueeze(1)
        return streams.sum(dim=1)


class NormsBesideDiT(DiT):
    """The norms are in a separate list; the loop adds the output of each block for the normed stream."""

    block = BranchBlock

    def make_blocks(self) -> None:
        super().make_blocks()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(DEPTH))

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), c)
        return x


class ControlledDiT(DiT):
    """One tensor of a list is added after each block."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, controls: list[Tensor] | None = None) -> Tensor:
        self.controls = controls or []
        return super().forward(x, t, y)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block, control in zip(self.blocks, self.controls, strict=True):
            x = block(x, c) + control
        return x


class HalfPrecisionDiT(DiT):
    """The blocks are in bfloat16, everything else in float32."""

    def make_blocks(self) -> None:
        super().make_blocks()
        self.blocks.to(torch.bfloat16)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        x, c = x.to(torch.bfloat16), c.to(torch.bfloat16)
        return super().run_blocks(x, c).float()


class SlicedDiT(DiT):
    """Two loops over slices of the list, with other operations between them."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        half = DEPTH // 2
        for block in self.blocks[:half]:
            x = block(x, c)
        x = x + 0.1 * c.unsqueeze(1)
        for block in self.blocks[half:]:
            x = block(x, c)
        return x


class EarlyTokensDiT(DiT):
    """The middle blocks skip half of the tokens, which are put back before the last block."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        num_first = TOKENS // 2
        x = self.blocks[0](x, c)
        x, rest = x[:, :num_first], x[:, num_first:]
        for block in self.blocks[1:-1]:
            x = block(x, c)
        return self.blocks[-1](torch.cat([x, rest], dim=1), c)


CONTROLS = [torch.full((BATCH, TOKENS, DIM), 0.1 * i) for i in range(DEPTH)]
