"""Formats FLOPs and bytes with a unit."""

from __future__ import annotations


def flops(count: int) -> str:
    """Formats a number of FLOPs, such as `1.25 GFLOP`."""
    return _scaled(count, 1000, "FLOP")


def size(count: int) -> str:
    """Formats a number of bytes, such as `3.1 MiB`."""
    return _scaled(count, 1024, "B")


def _scaled(count: float, base: int, unit: str) -> str:
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    for prefix in prefixes:
        if count < base or prefix == prefixes[-1]:
            digits = 0 if not prefix else (2 if count < 10 else 1 if count < 100 else 0)
            return f"{count:.{digits}f} {prefix}{unit}"
        count /= base
    raise AssertionError
