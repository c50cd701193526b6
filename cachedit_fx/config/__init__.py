"""What a user can set: the fields of `CacheConfig`, what is checked of them, and masks."""
