"""Caching for compiled diffusion transformers, inside the graph: `torch.compile(model, backend="cachedit")`.

Words, one meaning each:
    block      the nodes that one transformer-block module call left in the graph
    chain      the blocks in execution order; may run through several module lists
    stream     a tensor that one block hands to the next; `hidden_states` or `encoder_hidden_states`
    invariant  a value made before the chain that every block reads
    cut        a place between two blocks, and the values that live there
    region     the blocks between two cuts: what the guard runs or skips
    template   the declared input/output contract of a block (patterns 0-5, or a user's own)
    step       one forward of the transformer for one guidance branch
    session    the cache state of one generation's one guidance branch, across its steps
"""

from cachedit_fx.backend import Backend
from cachedit_fx.config import CacheConfig
from cachedit_fx.errors import ConfigError, NoMatchError, PassError
from cachedit_fx.patterns import BlockTemplate, register_pattern, unregister_pattern
from cachedit_fx.session import is_cached, reset, session, summary
from cachedit_fx.stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BlockTemplate",
    "CacheConfig",
    "CacheStats",
    "ConfigError",
    "NoMatchError",
    "PassError",
    "is_cached",
    "register_pattern",
    "reset",
    "session",
    "summary",
    "unregister_pattern",
]
