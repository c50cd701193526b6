"""Checks and measures cachedit_fx on one GPU: `python -m benchmarks.gpu` (see `__main__.py`)."""
