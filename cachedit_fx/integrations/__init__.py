"""Pipelines of diffusers, and the names that users of cache-dit know."""
