"""Measurements, runnable by anyone: `make bench`."""
