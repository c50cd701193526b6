"""Exports a transformer with its cache, compiles it with AOTInductor, and runs it in a process without this package.

    python examples/export_aoti.py

The parent process exports and compiles. The child process loads the package with `aoti_load_package` and runs a
generation: it passes the state of each step to the next one. The parent then runs the same generation with
`enable_cache`, and prints the decisions of both and the largest difference of their latents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NUM_STEPS = 16


class Block(nn.Module):
    """One block with attention to the prompt, modulated by the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, scale: Tensor) -> Tensor:
        query, context = self.to_q(self.norm(hidden_states) * scale), encoder_hidden_states
        attended = nn.functional.scaled_dot_product_attention(query, self.to_k(context), self.to_v(context))
        return hidden_states + scale * (attended + self.mlp(hidden_states))


class Transformer(nn.Module):
    """A diffusion transformer that compiles within a minute."""

    def __init__(self, width: int = 16, num_blocks: int = 3) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.proj_out = nn.Linear(width, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        scale = (1 + timestep)[:, None, None]
        hidden_states = self.proj_in(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, scale)
        return (self.proj_out(hidden_states),)


def timesteps() -> list[float]:
    return torch.linspace(1, 1 / NUM_STEPS, NUM_STEPS).tolist()


def run_package(folder: Path) -> None:
    """The child process: a generation with the compiled package."""
    package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    description = json.loads(package.get_metadata()["cachedit_fx"])
    call = torch.load(folder / "call.pt")
    state = tuple(torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"])) for spec in description["state"])
    threshold = torch.tensor(description["threshold"], dtype=torch.float64)
    reused = []
    for step, timestep in enumerate(timesteps()):
        call["timestep"] = torch.full((1,), timestep)
        inputs = tuple(call[spec["name"]] for spec in description["inputs"])
        (velocity,), state, computed, _diff = package(inputs, state, threshold)
        if not computed:
            reused.append(step)
        call["hidden_states"] = call["hidden_states"] - velocity / NUM_STEPS
    assert "cachedit_fx" not in sys.modules
    torch.save({"latents": call["hidden_states"], "reused": reused}, folder / "result.pt")


def main(folder: Path) -> None:
    import cachedit_fx

    torch.manual_seed(0)
    model = Transformer().eval().requires_grad_(False)
    call: dict[str, Any] = dict(
        hidden_states=torch.randn(1, 64, 4), encoder_hidden_states=torch.randn(1, 8, 16), timestep=torch.ones(1)
    )
    config = cachedit_fx.CacheConfig(residual_diff_threshold=0.1)
    exported = cachedit_fx.export(model, call, config)
    print(f"exported: a reused step skips {', '.join(exported.regions)}; the state is")
    for spec in exported.state:
        print(f"  {spec.name:<25} {str(spec.dtype).removeprefix('torch.'):<8} {[*spec.shape]}")
    torch._inductor.aoti_compile_and_package(
        exported.program,
        package_path=str(folder / "model.pt2"),
        inductor_configs={
            "aot_inductor.metadata": exported.metadata,
            "aot_inductor.compile_wrapper_opt_level": "O0",  # Compiles faster. The wrapper only calls the kernels.
        },
    )
    torch.save(call, folder / "call.pt")
    subprocess.run([sys.executable, __file__, str(folder)], check=True)
    found = torch.load(folder / "result.pt")

    cachedit_fx.enable_cache(model, config)
    latents = call["hidden_states"]
    with torch.no_grad():
        for timestep in timesteps():
            (velocity,) = model(latents, call["encoder_hidden_states"], torch.full((1,), timestep))
            latents = latents - velocity / NUM_STEPS
    (stats,) = cachedit_fx.summary(model, logging=False)
    print(f"package:      reused steps {found['reused']}")
    print(f"enable_cache: reused steps {list(stats.cached_steps)}")
    print(f"largest difference of the latents: {float((found['latents'] - latents).abs().max()):.1e}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_package(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
