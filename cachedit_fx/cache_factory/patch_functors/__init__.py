"""Patch functors, under the path that they have in cache-dit: `cache_factory.patch_functors`."""

from cachedit_fx.functors.hidream import HiDreamPatchFunctor
from cachedit_fx.functors.hunyuan_image import HunyuanImagePatchFunctor

__all__ = ["HiDreamPatchFunctor", "HunyuanImagePatchFunctor"]
