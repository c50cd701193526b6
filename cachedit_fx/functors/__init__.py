"""Patch functors: rewrites of a captured graph that a model needs before it can be matched."""
