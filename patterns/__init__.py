"""Templates of blocks, and the matcher that fits them to the blocks of a graph."""

from cachedit_fx.patterns.blocks import Block, BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.matcher import match_any, match_list
from cachedit_fx.patterns.mismatch import Match, Mismatch, MismatchError
from cachedit_fx.patterns.pattern_registry import register_pattern, templates, unregister_pattern
from cachedit_fx.patterns.template import BUILT_IN, BlockTemplate

__all__ = [
    "BUILT_IN",
    "Block",
    "BlockList",
    "BlockTemplate",
    "Cause",
    "Match",
    "Mismatch",
    "MismatchError",
    "match_any",
    "match_list",
    "register_pattern",
    "templates",
    "unregister_pattern",
]
