"""The sizes of the models on a GPU: those of published models, at full and at reduced depth, with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks import sizes
from benchmarks.work import KINDS, Work

_LOOP = dict(num_steps=12, warmup=3)  # Computed 1, reused 0: 111001001001.


def shallow(work: Work, *, double: int, single: int = 0, **changes: Any) -> Work:
    """Returns `work` with fewer blocks of the same shape."""
    layers = {"num_layers": double, **({"num_single_layers": single} if "num_single_layers" in work.config else {})}
    depth = "+".join(map(str, layers.values()))
    title = f"{work.title.split(':', 1)[0]}, {depth} blocks of{work.title.split('blocks', 1)[-1].removeprefix(',')}"
    config = {**work.config, **layers}
    return dataclasses.replace(work, name=f"{work.name}-shallow", title=title, config=config, **changes)


_FLUX = dataclasses.replace(sizes.WORKS["flux-dev"], **_LOOP)
_WAN = dataclasses.replace(sizes.WORKS["wan-1.3b"], **_LOOP)
_QWEN = Work(
    "qwen-image",
    "Qwen-Image: 60 blocks, width 3072, 4096 tokens, guidance with prompts of 512 and 384 tokens, bfloat16",
    "qwen",
    dict(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=60,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=3584,
        axes_dims_rope=(16, 56, 56),
    ),
    grid=(64, 64),
    text=(512, 384),
    guidance=4.0,
    dtype="bfloat16",
    **_LOOP,
)
_WAN_14B = dataclasses.replace(
    _WAN,
    name="wan-14b",
    title="Wan 2.1 14B: 40 blocks, width 5120, 33 frames of 480x832 (14040 tokens), guidance, bfloat16",
    config={**_WAN.config, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
)

_ALL = (
    shallow(_FLUX, double=2, single=4),
    shallow(_QWEN, double=4),
    shallow(_WAN, double=4),
    shallow(_WAN_14B, double=3),
    _FLUX,
    _QWEN,
    _WAN,
    dataclasses.replace(sizes.WORKS["flux-small"], **_LOOP),
)
GPU_WORKS = {work.name: work for work in _ALL}

# The works of the checks: blocks of the real shapes, few of them, and few steps (11100100).
CHECK_WORKS = {
    "flux": shallow(_FLUX, double=2, single=2, num_steps=8),
    "qwen": shallow(_QWEN, double=3, num_steps=8),
    "wan": shallow(_WAN, double=3, num_steps=8),
}


def register() -> None:
    """Makes these works known to `benchmarks.variants.Settings`, for which `flux-dev` now has fewer steps."""
    sizes.WORKS.update(GPU_WORKS)


def weight_bytes(work: Work) -> int:
    """Returns the bytes of the weights of a model, without allocating them."""
    with torch.device("meta"):
        model = KINDS[work.kind].transformer(**work.config)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, work.dtype).itemsize
