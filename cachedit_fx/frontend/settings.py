"""The arguments of `enable_cache` for one transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.frontend.backend import Backend
from cachedit_fx.functors.functor import PatchFunctor
from cachedit_fx.patterns.declaration import Declaration


@dataclass(frozen=True)
class Settings:
    """The arguments of `enable_cache` for one transformer.

    Attributes:
        method: The name of the method that is cached instead of the module's own call; None for that call.
    """

    config: CacheConfig
    declared: Declaration
    functor: PatchFunctor | None
    compile_kwargs: Mapping[str, Any]
    method: str | None = None

    def has_compile_arguments_of(self, other: Settings) -> bool:
        """Whether the two call `torch.compile` in the same way, apart from the backend."""
        mine = (self.functor, dict(self.compile_kwargs), self.method)
        return mine == (other.functor, dict(other.compile_kwargs), other.method)

    def backend(self) -> Backend:
        mode, options = self.compile_kwargs.get("mode"), dict(self.compile_kwargs.get("options") or {})
        options.pop("guard_filter_fn", None)
        return Backend(self.config, mode=mode, options=options, declared=self.declared, policy_per_call=True)

    @property
    def dynamo_arguments(self) -> dict[str, Any]:
        """The arguments of `torch.compile` that are not for the inner backend."""
        found = {name: value for name, value in self.compile_kwargs.items() if name not in ("mode", "options")}
        options = self.compile_kwargs.get("options") or {}
        return found | {"options": {k: v for k, v in options.items() if k == "guard_filter_fn"}}
