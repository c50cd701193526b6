"""Compares images with those of the uncached model: PSNR, SSIM and relative L2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

MOST_DB = 100.0  # Of an image without an error, whose PSNR is infinite and would hide all others in a mean.
WINDOW = 7  # Pixels per side, as in scikit-image.


@dataclass(frozen=True)
class Nearness:
    """Metrics averaged over images.

    Attributes:
        psnr: The PSNR in dB for a range of 1, at most `MOST_DB` per image.
        psnr_least: The PSNR of the worst image, in dB.
        ssim: The structural similarity, at most 1.
        rel_l2: The relative L2 distance |image - reference| / |reference|, dimensionless.
    """

    psnr: float
    psnr_least: float
    ssim: float
    rel_l2: float


def nearness(images: Tensor, reference: Tensor) -> Nearness:
    """Compares images with references, both float32 [N, ..., H, W] from 0 to 1."""
    each = psnr(images, reference)
    return Nearness(
        each.mean().item(),
        each.min().item(),
        ssim(images, reference).mean().item(),
        rel_l2(images, reference).mean().item(),
    )


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of every image, [N], in dB, at most `MOST_DB`."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    decibels: Tensor = -10 * error.clamp_min(1e-30).log10()
    return decibels.clamp_max(MOST_DB)


def rel_l2(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the relative L2 distance of every image, [N]."""
    error = (images.double() - reference.double()).flatten(1).norm(dim=1)
    return error / reference.double().flatten(1).norm(dim=1).clamp_min(1e-30)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the structural similarity of every image, [N]: windows of 7x7 pixels with equal weights, range 1.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    shape = (images.shape[0], -1, *images.shape[-2:])  # Frames and channels are all the same here.
    x, y = images.double().reshape(shape), reference.double().reshape(shape)
    side = min(WINDOW, *shape[-2:])
    unbiased = side**2 / max(side**2 - 1, 1)

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, side, stride=1)

    at_x, at_y = mean(x), mean(y)
    var_x, var_y = (unbiased * (mean(v * v) - at * at) for v, at in ((x, at_x), (y, at_y)))
    both = unbiased * (mean(x * y) - at_x * at_y)
    c1, c2 = 0.01**2, 0.03**2
    local = (2 * at_x * at_y + c1) * (2 * both + c2) / ((at_x**2 + at_y**2 + c1) * (var_x + var_y + c2))
    return torch.as_tensor(local.flatten(1).mean(1))
