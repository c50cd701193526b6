"""A class-conditional DiT as published: adaLN-zero, attention by einsum, a label instead of a text.

Every subclass of `DiT` differs in how it holds its blocks, how it calls them, or what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH, DIM, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 4, 16, 2, 2, 4, 6, 10
TOKENS = (SIDE // PATCH) ** 2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] modulated by shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
        half = dim // 2
        freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        args = t[:, None].float() * freqs[None]
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.timestep_embedding(t, self.frequencies))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        sim = sim - sim.amax(dim=-1, keepdim=True)
        weights = sim.exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-zero. x [B, N, D], c [B, D] -> [B, N, D]."""

    def __init__(self, dim: int = DIM, num_heads: int = HEADS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """x [B, C, H, W], t [B], y [B] -> [B, C, H, W]."""

    block: Callable[[], nn.Module] = DiTBlock

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(CHANNELS, DIM, PATCH, stride=PATCH)
        self.t_embedder = TimestepEmbedder(DIM)
        self.y_embedder = LabelEmbedder(CLASSES, DIM)
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.02)
        self.make_blocks()
        self.final_layer = FinalLayer(DIM, PATCH, CHANNELS)

    def make_blocks(self) -> None:
        self.blocks = nn.ModuleList([type(self).block() for _ in range(DEPTH)])

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x

    def unpatchify(self, x: Tensor) -> Tensor:
        h = w = int(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], h, w, PATCH, PATCH, CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], CHANNELS, h * PATCH, w * PATCH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.run_blocks(x, c)
        x = self.final_layer(x, c)
        return self.unpatchify(x)

    def block_calls(self) -> list[nn.Module]:
        """The block of every call, in order; a test skips some of them by hand."""
        return list(self.blocks)


# Containers of the blocks.


class SetattrDiT(DiT):
    """A plain list; the blocks are registered one by one."""

    def make_blocks(self) -> None:
        self._blocks = []
        for i in range(DEPTH):
            block = DiTBlock()
            setattr(self, f"block_{i}", block)
            self._blocks.append(block)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x, c)
        return x

    def block_calls(self) -> list[nn.Module]:
        return self._blocks


class GetattrDiT(DiT):
    """Layers with numbers in their names, as in torchvision."""

    def make_blocks(self) -> None:
        for i in range(1, DEPTH + 1):
            self.add_module(f"layer{i}", DiTBlock())

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(1, DEPTH + 1):
            x = getattr(self, f"layer{i}")(x, c)
        return x

    def block_calls(self) -> list[nn.Module]:
        return [getattr(self, f"layer{i}") for i in range(1, DEPTH + 1)]


class ModuleDictDiT(DiT):
    def make_blocks(self) -> None:
        self.blocks = nn.ModuleDict({f"block_{i}": DiTBlock() for i in range(DEPTH)})

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for _name, block in self.blocks.items():
            x = block(x, c)
        return x

    def block_calls(self) -> list[nn.Module]:
        return list(self.blocks.values())


class IteratedSequentialDiT(DiT):
    def make_blocks(self) -> None:
        self.blocks = nn.Sequential(*(DiTBlock() for _ in range(DEPTH)))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DiTBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, c)
        return self.norm(x)


class TrunkDiT(DiT):
    """The blocks and their loop are in a separate module."""

    def make_blocks(self) -> None:
        self.trunk = Trunk()

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return self.trunk(x, c)

    def block_calls(self) -> list[nn.Module]:
        return list(self.trunk.layers)


class EDMPrecond(nn.Module):
    """The preconditioning of EDM around a model. x [B, C, H, W], sigma [B], class_labels [B] -> [B, C, H, W]."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.model = DiT()

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        c_noise = sigma.log() / 4
        predicted = self.model(c_in * x, c_noise.flatten(), class_labels)
        return c_skip * x + c_out * predicted

    def block_calls(self) -> list[nn.Module]:
        return self.model.block_calls()


# Repeated blocks.


class AlbertDiT(DiT):
    """One block that is called at every depth, with an embedding of the depth."""

    def make_blocks(self) -> None:
        self.shared_block = DiTBlock()
        self.depth_embed = nn.Parameter(torch.randn(DEPTH, DIM) * 0.1)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = self.shared_block(x, c + self.depth_embed[i])
        return x

    def block_calls(self) -> list[nn.Module]:
        return [self.shared_block] * DEPTH


class RepeatedDiT(DiT):
    """Neighbouring entries of the list are the same object."""

    def make_blocks(self) -> None:
        first, second = DiTBlock(), DiTBlock()
        self.blocks = nn.ModuleList([first, first, second, second])


class TwiceDiT(DiT):
    """Every block runs twice in a row."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
            x = block(x, c)
        return x

    def block_calls(self) -> list[nn.Module]:
        return [block for block in self.blocks for _ in range(2)]


class SharedModulationDiT(DiT):
    """All blocks share one adaLN linear layer."""

    def make_blocks(self) -> None:
        super().make_blocks()
        shared = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))
        for block in self.blocks:
            block.adaLN_modulation = shared
