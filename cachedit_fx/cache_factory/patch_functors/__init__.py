"""Where cache-dit's users look for patch functors: `cache_factory.patch_functors`."""

from __future__ import annotations

from cachedit_fx.cache_factory.patch_functors.hidream import HiDreamPatchFunctor
from cachedit_fx.cache_factory.patch_functors.hunyuan_image import HunyuanImagePatchFunctor
from cachedit_fx.functor import PatchFunctor

__all__ = ["HiDreamPatchFunctor", "HunyuanImagePatchFunctor"]


def functor_for(class_name: str) -> type[PatchFunctor] | None:
    """The functor made for a transformer's class: its name begins as the class's does."""
    shipped: tuple[type[PatchFunctor], ...] = (HiDreamPatchFunctor, HunyuanImagePatchFunctor)
    return next((made for made in shipped if class_name.startswith(made.__name__.removesuffix("PatchFunctor"))), None)
