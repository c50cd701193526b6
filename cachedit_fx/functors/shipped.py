"""The functors that come with the package, by the transformer that each is for."""

from __future__ import annotations

from cachedit_fx.functors.functor import PatchFunctor
from cachedit_fx.functors.hidream import HiDreamPatchFunctor
from cachedit_fx.functors.hunyuan_image import HunyuanImagePatchFunctor


def functor_for(class_name: str) -> type[PatchFunctor] | None:
    """The functor made for a transformer's class: its name begins as the class's does."""
    shipped: tuple[type[PatchFunctor], ...] = (HiDreamPatchFunctor, HunyuanImagePatchFunctor)
    return next((made for made in shipped if class_name.startswith(made.__name__.removesuffix("PatchFunctor"))), None)
