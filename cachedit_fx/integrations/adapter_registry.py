"""Which adapter belongs to which pipeline: `BlockAdapterRegistry`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.integrations.block_adapter import BlockAdapter, transformers_of

Maker = Callable[..., BlockAdapter]


class BlockAdapterRegistry:
    """Adapters by the class name of a pipeline or transformer. They go before automatic matching; none is built in."""

    _makers: ClassVar[dict[str, Maker]] = {}

    @classmethod
    def register(cls, name: str) -> Callable[[Maker], Maker]:
        """Registers the decorated function, which makes an adapter of a pipeline.

            @BlockAdapterRegistry.register("MyModel")
            def my_adapter(pipe, **kwargs) -> BlockAdapter: ...

        Args:
            name: A class name or what class names begin with. Of a later function of the same name this one is
                forgotten.
        """
        if not isinstance(name, str) or not name:
            hint = f"; give {name.__name__!r}" if isinstance(name, type) else ""
            raise ConfigError(
                f"cachedit_fx: register takes a class name or the beginning of one, got {shown(name)}{hint}"
            )

        def keep(make: Maker) -> Maker:
            cls._makers[name] = make
            return make

        return keep

    @classmethod
    def unregister(cls, name: str) -> None:
        """Forgets the function; nothing happens where there is none."""
        cls._makers.pop(name, None)

    @classmethod
    def get(cls, target: Any, **kwargs: Any) -> BlockAdapter | None:
        """The adapter registered for a pipeline or transformer: under its class name, else under its longest beginning.

        Args:
            kwargs: Handed on to the registered function.

        Raises:
            ConfigError: The function returned something else.
        """
        called = type(target).__name__
        name = max((known for known in cls._makers if called.startswith(known)), key=len, default=None)
        if name is None:
            return None
        # What is registered expects a pipeline; a transformer alone is handed over as the one part of one.
        pipe = SimpleNamespace(transformer=target) if isinstance(target, nn.Module) else target
        adapter = cls._makers[name](pipe, **kwargs)
        if not isinstance(adapter, BlockAdapter):
            raise ConfigError(
                f"cachedit_fx: what is registered for {name!r} must return a BlockAdapter, got {shown(adapter)}"
            )
        return adapter

    @classmethod
    def supported_pipelines(cls) -> tuple[int, list[str]]:
        """How many names are registered, and which. Models that match by themselves need no adapter."""
        return len(cls._makers), sorted(cls._makers)


def adapter_for(target: Any) -> BlockAdapter | None:
    """The adapter that `target` is, or that is registered for it."""
    return target if isinstance(target, BlockAdapter) else BlockAdapterRegistry.get(target)


def modules_of(target: Any) -> dict[str, nn.Module]:
    """The transformers that `enable_cache(target)` means, by name.

    Raises:
        ConfigError: There is none.
    """
    return transformers_of(adapter_for(target) or target)
