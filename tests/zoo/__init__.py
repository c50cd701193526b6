"""Tiny diffusers transformers, with one variant for every kind of block loop.

    variant = VARIANTS["Flux"]
    model = variant.build()
    outputs = [model(**call) for call in variant.generation()]

They are at most 64 wide and have four blocks in each list. HunyuanDiT has eight: its second half has skips from the
first half.
"""

from __future__ import annotations

from itertools import chain

from tests.zoo import (
    audio,
    cog,
    cross_attention,
    flux_like,
    hunyuan,
    image,
    kandinsky,
    music,
    one_stream,
    stable_diffusion,
    two_streams,
    video,
    video_dual,
    video_forcing,
    wan_like,
    world,
)
from tests.zoo.variant import Variant

FAMILIES = (flux_like, wan_like, hunyuan, video, cog, stable_diffusion, cross_attention, image, audio)
FAMILIES += (two_streams, one_stream, kandinsky, video_dual, video_forcing, music, world)
VARIANTS: dict[str, Variant] = {v.name: v for v in chain.from_iterable(family.variants() for family in FAMILIES)}
