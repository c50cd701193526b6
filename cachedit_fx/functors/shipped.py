"""Finds the patch functor of this package for a transformer."""

from __future__ import annotations

from cachedit_fx.functors.functor import PatchFunctor
from cachedit_fx.functors.hidream import HiDreamPatchFunctor
from cachedit_fx.functors.hunyuan_image import HunyuanImagePatchFunctor


def functor_for(class_name: str) -> type[PatchFunctor] | None:
    """Returns the functor whose name without "PatchFunctor" is the beginning of `class_name`; None if there is none."""
    shipped: tuple[type[PatchFunctor], ...] = (HiDreamPatchFunctor, HunyuanImagePatchFunctor)
    return next((kind for kind in shipped if class_name.startswith(kind.__name__.removesuffix("PatchFunctor"))), None)
