"""Benchmarks of speed, memory and quality, run by `make bench` and `make quality`."""
