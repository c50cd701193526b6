"""The algebra of dynamic mode decomposition, which uses inner products of the values instead of the values."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LEAST = 4  # A pair of complex exponentials needs three pairs of neighbors.
_FASTEST = 4.0  # A forecast may move this many times the largest observed step, per step.
_ROUNDING = 1e-7  # Below this fraction of the first singular value, float64 inner products hold only rounding errors.


# This is a custom operator because the number of modes depends on values, which a compiled graph cannot read. Its
# inputs are tiny. It reads from the device, so it cannot be part of a CUDA graph.
@torch.library.custom_op("cachedit_fx::dmd_factors", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def dmd_factors(products: torch.Tensor, numbers: torch.Tensor, rank: int, ridge: float, noise: float) -> torch.Tensor:
    """Returns the factor of each value in the forecast, [B, n], float32, newest first.

    Args:
        products: Inner products of the values, newest first, [B, n, n], float64.
        numbers: The time since the newest value in units of the last gap, and the number of evenly spaced values.
        rank: The number of modes; 0 for all whose singular value exceeds `noise` times the first one.
        ridge: Added to the singular values before they are inverted.
        noise: A fraction of the first singular value, dimensionless.
    """
    horizon, tail = numbers.tolist()
    rows = factors_of(products.cpu().numpy(), horizon, int(tail), rank, ridge, noise)
    return torch.from_numpy(rows).to(device=products.device, dtype=torch.float32)


@dmd_factors.register_fake
def _(products: torch.Tensor, numbers: torch.Tensor, rank: int, ridge: float, noise: float) -> torch.Tensor:
    return products.new_empty(products.shape[:2], dtype=torch.float32)


def factors_of(products: Matrix, horizon: float, tail: int, rank: int, ridge: float, noise: float) -> Matrix:
    """Returns what `dmd_factors` does, on the host and in float64."""
    rows = np.zeros(products.shape[:2])
    for row, matrix in zip(rows, products, strict=True):
        # The functions below expect the oldest value first.
        even = matrix[:tail, :tail][::-1, ::-1]
        found = _fit(even, horizon, rank, ridge, noise) if tail >= LEAST else None
        if found is not None:
            row[: len(found)] = found[::-1]
        else:
            row[0], row[1] = 1 + horizon, -horizon
    return rows


def _fit(products: Matrix, horizon: float, rank: int, ridge: float, noise: float) -> Matrix | None:
    """Returns the factors of all values except the first, oldest first; None if their forecast is not usable."""
    if not np.isfinite(products).all():
        return None
    try:
        with np.errstate(all="ignore"):
            factors = _decompose(products, horizon, rank, ridge, noise)
    except np.linalg.LinAlgError:
        return None
    if factors is None or not np.isfinite(factors).all() or _runs_away(products, factors, horizon):
        return None
    return factors


def _decompose(products: Matrix, horizon: float, rank: int, ridge: float, noise: float) -> Matrix | None:
    """Returns the factors of Re(Phi lambda^k b) in exact DMD.

    The columns of X are all values except the last, those of X' are all values except the first. X = U S V^T follows
    from X^T X = V S^2 V^T, so U = X V / S is never computed, and Phi = X' M with `modes` as M.
    """
    squares, right = np.linalg.eigh(products[:-1, :-1])
    singular = np.sqrt(squares.clip(min=0))[::-1]
    if not singular[0] > 0:
        return None
    count = min(rank or int((singular > noise * singular[0]).sum()), int((singular > _ROUNDING * singular[0]).sum()))
    scaled = right[:, ::-1][:, :count] / (singular[:count] + ridge)
    eigenvalues, vectors = np.linalg.eig(scaled.T @ products[:-1, 1:] @ scaled)
    modes = scaled @ vectors
    # b by least squares, with e the newest value: |X' (M b - e)| = |R (M b - e)| with R^T R = X'^T X'.
    squares, right = np.linalg.eigh(products[1:, 1:])
    root = np.sqrt(squares.clip(min=0))[:, None] * right.T
    weights = np.linalg.lstsq(root @ modes, root[:, -1].astype(complex), rcond=None)[0]
    factors: Matrix = (modes @ (eigenvalues.astype(complex) ** horizon * weights)).real
    return factors


def _runs_away(products: Matrix, factors: Matrix, horizon: float) -> bool:
    """Returns whether the forecast is much further from the newest value than any two neighboring values are."""
    squared = np.diag(products)
    steps = squared[1:] + squared[:-1] - 2 * np.diag(products, 1)
    moved = factors.copy()
    moved[-1] -= 1
    allowed = (_FASTEST * max(horizon, 1.0)) ** 2 * steps.max()
    return bool(moved @ products[1:, 1:] @ moved > allowed)
