"""Saves what a process has compiled, for other processes: `save_compiled` and `load_compiled`."""

from cachedit_fx.saving.compiled import load_compiled, save_compiled

__all__ = ["load_compiled", "save_compiled"]
