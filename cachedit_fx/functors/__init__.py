"""Patch functors: rewrites of a captured graph that a model needs before it can be matched."""

from cachedit_fx.functors.functor import PatchFunctor, block_nodes, give_to_block, rename_stream, split_stream

__all__ = ["PatchFunctor", "block_nodes", "give_to_block", "rename_stream", "split_stream"]
