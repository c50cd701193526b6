"""Pipelines of diffusers, and the names that users of cache-dit know."""

from cachedit_fx.integrations.adapter_registry import BlockAdapterRegistry
from cachedit_fx.integrations.block_adapter import BlockAdapter, ParamsModifier

__all__ = ["BlockAdapter", "BlockAdapterRegistry", "ParamsModifier"]
