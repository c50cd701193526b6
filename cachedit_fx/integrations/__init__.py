"""Supports diffusers pipelines, and the names and files of cache-dit."""

from cachedit_fx.integrations.adapter_registry import BlockAdapterRegistry
from cachedit_fx.integrations.block_adapter import BlockAdapter, ParamsModifier

__all__ = ["BlockAdapter", "BlockAdapterRegistry", "ParamsModifier"]
