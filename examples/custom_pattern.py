"""Registers a template for a transformer that no built-in pattern fits.

    python examples/custom_pattern.py

The blocks of the transformer pass on two streams, fine and coarse tokens of one image, and nothing in the graph shows
which of them is `hidden_states`. `explain` reports this, and a template gives the names of the streams. The weights are
random, so the results say nothing about quality.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cachedit_fx
from cachedit_fx.testing import check_pattern

WIDTH, HEADS, TOKENS, DEPTH = 64, 4, 64, 6


class Block(nn.Module):
    """Joint attention over both scales, and an MLP for each scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_fine, self.mlp_coarse = (
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, fine: Tensor, coarse: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        tokens = self.norm(torch.cat([fine, coarse], dim=1)) * (1 + scale) + shift
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        fine = fine + mixed[:, : fine.shape[1]]
        coarse = coarse + mixed[:, fine.shape[1] :]
        return fine + self.mlp_fine(fine), coarse + self.mlp_coarse(coarse)


class TwoScaleTransformer(nn.Module):
    """Predicts the noise in latent tokens [B, N, 4] at a timestep [B] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_fine, self.embed_coarse = nn.Linear(4, WIDTH), nn.Linear(4 * 4, WIDTH)
        self.embed_time = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU())
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.to_fine, self.to_coarse = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4 * 4)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        emb = self.embed_time(torch.stack([timestep.cos(), timestep.sin()], dim=-1))
        fine = self.embed_fine(latents)
        coarse = self.embed_coarse(latents.unflatten(1, (-1, 4)).flatten(2))
        for layer in self.layers:
            fine, coarse = layer(fine, coarse, emb)
        return self.to_fine(fine) + self.to_coarse(coarse).unflatten(2, (4, -1)).flatten(1, 2)


def denoise(model: nn.Module, num_steps: int = 12) -> Tensor:
    """Integrates from noise at time 1 to time 0 by Euler steps; returns latents [1, 64, 4]."""
    latents = torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    for time in torch.linspace(1, 1 / num_steps, num_steps):
        latents = latents - model(latents=latents, timestep=time[None]) / num_steps
    return latents


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = TwoScaleTransformer().eval()
    inputs = dict(latents=torch.randn(1, TOKENS, 4), timestep=torch.tensor([0.9]))
    options = dict(Fn_compute_blocks=1, residual_diff_threshold=0.2, max_warmup_steps=2)

    print("1. Why it does not match\n")
    print(shortened(cachedit_fx.explain(model, cache_config=cachedit_fx.CacheConfig(**options), **inputs)))

    template = cachedit_fx.BlockTemplate(
        "two-scale",
        takes=("hidden_states", "encoder_hidden_states"),
        returns=("hidden_states", "encoder_hidden_states"),
        streams={"hidden_states": "fine", "encoder_hidden_states": "coarse"},
    )
    print("\n2. Is the template right?\n")
    print(check_pattern(template, model, inputs))

    print("\n3. The registered template in use\n")
    cachedit_fx.register_pattern(template)
    model.compile(backend="cachedit", options=options, fullgraph=True)
    denoise(model)
    cachedit_fx.summary(model)


def shortened(explanation: cachedit_fx.inspect.Explanation) -> str:
    """Returns the page up to the end of the nearest miss."""
    page = str(explanation).partition("  do:")
    return "".join((*page[:2], page[2].partition("\n")[0]))


if __name__ == "__main__":
    main()
