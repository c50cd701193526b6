"""One variant in a process of its own: compiles, then runs a step whenever the driver asks for one.

Reads lines from standard input (`compile`, `computed`, `reused`, `quit`), answers each with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

VARIANTS = ("plain", "repeated", "once", "inline", "floor")
TOKENS, TEXT = 256, 64


def build(double: int, single: int, width: int) -> FluxTransformer2DModel:
    """FLUX with random weights; heads of 32 where the width allows."""
    torch.manual_seed(0)
    head = 32 if width % 32 == 0 and width > 64 else 16
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=[head // 4, head // 4, head // 2],
    )
    return model.eval()


def inputs(timestep: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, TOKENS, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([timestep]),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


class Worker:
    """A model under one variant.

    "floor" is the hand-written lower bound of a reused step: a model made of the first block, head and tail alone.
    """

    def __init__(self, variant: str, double: int, single: int, width: int) -> None:
        self.model = build(1, 0, width) if variant == "floor" else build(double, single, width)
        self.prompt = torch.randn(1, TEXT, 256, generator=torch.Generator().manual_seed(2))
        self.variant = variant
        self.steps = 0

    def compile(self) -> dict[str, float]:
        """Compiles and runs the first steps, a reused one included; seconds, compilation in child processes too."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        if self.variant == "repeated":
            self.model.compile_repeated_blocks(fullgraph=True)
            self.call: Callable[..., Any] = self.model
        elif self.variant in ("once", "inline"):
            options = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
            options |= {"compile_blocks": self.variant}
            self.call = torch.compile(self.model, backend="cachedit", fullgraph=True, options=options)
        else:
            self.call = torch.compile(self.model, fullgraph=True)
        for _ in range(3):
            self.step()
        return {"wall": time.perf_counter() - wall, "cpu": _cpu_seconds() - cpu}

    def step(self) -> dict[str, float]:
        """One step of an endless generation; seconds."""
        kwargs = inputs(1.0 - 1e-5 * self.steps)
        self.steps += 1
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            self.call(encoder_hidden_states=self.prompt, **kwargs)
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def computed(self) -> dict[str, float]:
        if self.variant in ("once", "inline"):
            import cachedit_fx

            cachedit_fx.reset(self.model)  # The next step is the first of its session: warm-up.
            taken = self.step()
            self._expect("warmup")
            self.step()
            return taken
        return self.step()

    def reused(self) -> dict[str, float]:
        taken = self.step()
        if self.variant in ("once", "inline"):
            self._expect("threshold-one")
        return taken

    def _expect(self, reason: str) -> None:
        import cachedit_fx

        found = cachedit_fx.summary(self.model, logging=False)[-1].decisions[-1]
        if found != reason:
            raise RuntimeError(f"the measured step was to be {reason!r}, it was {found!r}")


def _cpu_seconds() -> float:
    import resource

    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    torch.set_num_threads(1)
    worker = Worker(sys.argv[1], *map(int, sys.argv[2:5]))
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            return
        print(json.dumps(getattr(worker, command)()), flush=True)


if __name__ == "__main__":
    main()
