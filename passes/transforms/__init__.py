"""Transforms: they rewrite a graph, or build new graphs from it."""
