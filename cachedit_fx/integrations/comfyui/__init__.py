"""Caches models of ComfyUI: `enable_cache` for custom nodes, and two nodes. Nothing of ComfyUI is imported.

This folder is also a custom node: ComfyUI imports it from `custom_nodes/`, where it is copied or linked to, and reads
the two mappings. The package itself has to be installed for ComfyUI's Python (docs/comfyui.md).
"""

from cachedit_fx.integrations.comfyui.compile_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from cachedit_fx.integrations.comfyui.model_cache import enable_cache

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "enable_cache"]
