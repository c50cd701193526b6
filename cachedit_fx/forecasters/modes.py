"""The small algebra of dynamic mode decomposition, on inner products of the values instead of the values."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LEAST = 4  # A pair of complex exponentials takes three pairs of neighbours.
_FASTEST = 4.0  # How many of the largest step seen a forecast may move in one step.
_ROUNDING = 1e-7  # Of the first singular value: below, inner products in float64 hold nothing.


# An operator of our own: how many modes there are depends on values, which no compiler's graph may ask for. What it
# is given is tiny. It reads from the device, so it cannot be part of a CUDA graph.
@torch.library.custom_op("cachedit_fx::dmd_factors", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def dmd_factors(products: torch.Tensor, numbers: torch.Tensor, rank: int, ridge: float, noise: float) -> torch.Tensor:
    """What each value is multiplied with for the forecast, [B, n], float32, newest first.

    Args:
        products: Inner products of the values, newest first, [B, n, n], float64.
        numbers: The time since the newest value, in units of the last gap; how many values are evenly spaced.
        rank: How many modes; 0 for those above `noise` of the first singular value.
        ridge: Added to the singular values before they are inverted.
    """
    horizon, tail = numbers.tolist()
    rows = np.zeros(products.shape[:2])
    for row, matrix in zip(rows, products.cpu().numpy(), strict=True):
        # The algebra below has the oldest first.
        even = matrix[: int(tail), : int(tail)][::-1, ::-1]
        found = _fit(even, horizon, rank, ridge, noise) if tail >= LEAST else None
        if found is not None:
            row[: len(found)] = found[::-1]
        else:
            row[0], row[1] = 1 + horizon, -horizon
    return torch.from_numpy(rows).to(device=products.device, dtype=torch.float32)


@dmd_factors.register_fake
def _(products: torch.Tensor, numbers: torch.Tensor, rank: int, ridge: float, noise: float) -> torch.Tensor:
    return products.new_empty(products.shape[:2], dtype=torch.float32)


def _fit(products: Matrix, horizon: float, rank: int, ridge: float, noise: float) -> Matrix | None:
    """The factors of the values but the first, oldest first; None where they foretell nothing of use."""
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
    """Re(Phi lambda^k b) of exact DMD, with X the values but the last, X' those but the first, as columns.

    X = U S V^T comes from X^T X = V S^2 V^T, so U = X V / S never is made, and Phi = X' M for the M below.
    """
    squares, right = np.linalg.eigh(products[:-1, :-1])
    singular = np.sqrt(squares.clip(min=0))[::-1]
    if not singular[0] > 0:
        return None
    count = min(rank or int((singular > noise * singular[0]).sum()), int((singular > _ROUNDING * singular[0]).sum()))
    scaled = right[:, ::-1][:, :count] / (singular[:count] + ridge)
    eigenvalues, vectors = np.linalg.eig(scaled.T @ products[:-1, 1:] @ scaled)
    modes = scaled @ vectors
    # The newest value in terms of Phi, by least squares: |X' (M b - e)| = |R (M b - e)| where R^T R = X'^T X'.
    squares, right = np.linalg.eigh(products[1:, 1:])
    root = np.sqrt(squares.clip(min=0))[:, None] * right.T
    weights = np.linalg.lstsq(root @ modes, root[:, -1].astype(complex), rcond=None)[0]
    factors: Matrix = (modes @ (eigenvalues.astype(complex) ** horizon * weights)).real
    return factors


def _runs_away(products: Matrix, factors: Matrix, horizon: float) -> bool:
    """Whether the forecast is much further from the newest value than neighbours among the values ever were."""
    squared = np.diag(products)
    steps = squared[1:] + squared[:-1] - 2 * np.diag(products, 1)
    moved = factors.copy()
    moved[-1] -= 1
    allowed = (_FASTEST * max(horizon, 1.0)) ** 2 * steps.max()
    return bool(moved @ products[1:, 1:] @ moved > allowed)
