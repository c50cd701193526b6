"""Analyses: they read a graph and change nothing."""
