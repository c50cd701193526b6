"""What a user can set: the fields of `CacheConfig`, what is checked of them, and masks."""

from cachedit_fx.config.cache_config import RECOMMENDED, CacheConfig, CacheType, DBCacheConfig, DBPruneConfig

__all__ = ["RECOMMENDED", "CacheConfig", "CacheType", "DBCacheConfig", "DBPruneConfig"]
