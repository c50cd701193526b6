"""Maps pipeline classes to block adapters: `BlockAdapterRegistry`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.integrations.block_adapter import BlockAdapter, transformers_of

Maker = Callable[..., BlockAdapter]


class BlockAdapterRegistry:
    """Adapters by the class name of a pipeline or transformer.

    A registered adapter takes precedence over automatic matching. No adapter is built in.
    """

    _makers: ClassVar[dict[str, Maker]] = {}

    @classmethod
    def register(cls, name: str) -> Callable[[Maker], Maker]:
        """Registers the decorated function, which creates an adapter for a pipeline.

            @BlockAdapterRegistry.register("MyModel")
            def my_adapter(pipe, **kwargs) -> BlockAdapter: ...

        Args:
            name: A class name or the beginning of one. A function that is registered later under the same name
                replaces this one.

        Raises:
            ConfigError: The name is empty or not a string.
        """
        if not isinstance(name, str) or not name:
            hint = f"; give {name.__name__!r}" if isinstance(name, type) else ""
            raise ConfigError(
                f"cachedit_fx: register takes a class name or the beginning of one, got {shown(name)}{hint}"
            )

        def register(make: Maker) -> Maker:
            cls._makers[name] = make
            return make

        return register

    @classmethod
    def unregister(cls, name: str) -> None:
        """Removes a registered function. Nothing happens if there is none of this name."""
        cls._makers.pop(name, None)

    @classmethod
    def get(cls, target: Any, **kwargs: Any) -> BlockAdapter | None:
        """Returns the adapter that is registered for a pipeline or transformer; None if there is none.

        The registered name is the class name, or else the longest beginning of the class name.

        Args:
            target: The pipeline or transformer.
            kwargs: Passed on to the registered function.

        Raises:
            ConfigError: The registered function returned something other than a `BlockAdapter`.
        """
        class_name = type(target).__name__
        name = max((prefix for prefix in cls._makers if class_name.startswith(prefix)), key=len, default=None)
        if name is None:
            return None
        # Registered functions expect a pipeline, so a transformer is passed as the only component of one.
        pipe = SimpleNamespace(transformer=target) if isinstance(target, nn.Module) else target
        adapter = cls._makers[name](pipe, **kwargs)
        if not isinstance(adapter, BlockAdapter):
            raise ConfigError(
                f"cachedit_fx: the function registered for {name!r} must return a BlockAdapter, got {shown(adapter)}"
            )
        return adapter

    @classmethod
    def supported_pipelines(cls) -> tuple[int, list[str]]:
        """Returns the number of registered names and the names. Models that match automatically need no adapter."""
        return len(cls._makers), sorted(cls._makers)


def adapter_for(target: Any) -> BlockAdapter | None:
    """Returns `target` if it is an adapter, else the adapter that is registered for it; None if there is none."""
    return target if isinstance(target, BlockAdapter) else BlockAdapterRegistry.get(target)


def modules_of(target: Any) -> dict[str, nn.Module]:
    """Returns the transformers that `enable_cache(target)` would cache, by name.

    Raises:
        ConfigError: There is no transformer.
    """
    return transformers_of(adapter_for(target) or target)
