"""Analyses and rewrites of captured graphs, and the pass manager that runs them."""
