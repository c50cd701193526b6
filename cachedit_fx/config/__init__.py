"""What a user can set: the fields of `CacheConfig`, what is checked of them, and masks."""

from cachedit_fx.config.cache_config import RECOMMENDED, CacheConfig, CacheType, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.steps_mask import steps_mask

BasicCacheConfig = DBCacheConfig  # cache-dit has both names.

__all__ = [
    "RECOMMENDED",
    "BasicCacheConfig",
    "CacheConfig",
    "CacheType",
    "DBCacheConfig",
    "DBPruneConfig",
    "steps_mask",
]
