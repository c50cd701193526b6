"""Explains what the compiler does with a model, and why: `explain`."""
