"""The sizes of the models that are measured, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.work import Work


def _flux(double: int, single: int, heads: int, head: int, **others: Any) -> dict[str, Any]:
    """Returns the configuration of a FLUX. Each axis gets about a third of the rotary dimensions, similar to FLUX.1."""
    rest = head // 8 * 3
    rest -= rest % 2
    sizes: dict[str, Any] = dict(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        attention_head_dim=head,
        axes_dims_rope=(head - 2 * rest, rest, rest),
        joint_attention_dim=256,
        pooled_projection_dim=64,
        guidance_embeds=False,
    )
    return sizes | others


def _wan(layers: int, heads: int, head: int, **others: Any) -> dict[str, Any]:
    return dict(
        patch_size=(1, 2, 2),
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=16,
        out_channels=16,
        freq_dim=256,
        cross_attn_norm=True,
        **others,
    )


_FLUX_DEV: dict[str, Any] = dict(
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56)
)
_GPU = dict(num_steps=28, warmup=4, dtype="bfloat16")

_ALL: Sequence[Work] = (
    # On a CPU. The heads and the widths of the prompts are those of the published models.
    Work(
        "flux-compute",
        "FLUX, 6+12 blocks, width 384, 256+64 tokens (compute-bound)",
        "flux",
        _flux(6, 12, heads=3, head=128, **_FLUX_DEV),
        grid=(16, 16),
        text=(64,),
    ),
    Work(
        "flux-dispatch",
        "FLUX, 19+38 blocks, width 64, 64+16 tokens (dispatch-bound, at the depth of FLUX.1)",
        "flux",
        _flux(19, 38, heads=4, head=16, guidance_embeds=True),
        grid=(8, 8),
        text=(16,),
    ),
    Work(
        "qwen",
        "Qwen-Image, 12 blocks, width 256, 256 tokens, true CFG with prompts of 64 and 48 tokens",
        "qwen",
        dict(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=12,
            attention_head_dim=128,
            num_attention_heads=2,
            joint_attention_dim=3584,
            axes_dims_rope=(16, 56, 56),
        ),
        grid=(16, 16),
        text=(64, 48),
        guidance=4.0,
    ),
    Work(
        "wan",
        "Wan 2.2, two transformers of 12 blocks, width 256, 192 tokens, CFG with two prompts of 64 tokens",
        "wan",
        _wan(12, heads=2, head=128, text_dim=4096, ffn_dim=1536),
        grid=(3, 8, 8),
        text=(64, 64),
        guidance=5.0,
        warmup=2,
        switch=7,
    ),
    # On an accelerator.
    Work(
        "flux-dev",
        "FLUX.1-dev: 19+38 blocks, width 3072, 4096+512 tokens, bfloat16",
        "flux",
        _flux(19, 38, heads=24, head=128, **_FLUX_DEV),
        grid=(64, 64),
        text=(512,),
        **_GPU,
    ),
    Work(
        "wan-1.3b",
        "Wan 2.1 1.3B: 30 blocks, width 1536, 33 frames of 480x832 (14040 tokens), guidance, bfloat16",
        "wan",
        _wan(30, heads=12, head=128, text_dim=4096, ffn_dim=8960),
        grid=(9, 30, 52),
        text=(512, 512),
        guidance=5.0,
        **_GPU,
    ),
    Work(
        "flux-small",
        "FLUX, 19+38 blocks, width 512, 256+64 tokens, bfloat16 (dispatch-bound)",
        "flux",
        _flux(19, 38, heads=8, head=64),
        grid=(16, 16),
        text=(64,),
        **_GPU,
    ),
)

WORKS = {work.name: work for work in _ALL}
ON_CPU = ("flux-compute", "flux-dispatch", "qwen", "wan")
ON_GPU = ("flux-dev", "wan-1.3b", "flux-small")
