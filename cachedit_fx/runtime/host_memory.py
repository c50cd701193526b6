"""Cached values in host memory between two steps (`cache_device="cpu"`)."""

from __future__ import annotations

import torch

from cachedit_fx.runtime.cached_values import CachedValue

HOST = torch.device("cpu")


def is_moved(device: torch.device) -> bool:
    """Whether a value of this device has another place in host memory."""
    return device.type != HOST.type


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` in pinned host memory. The copy is queued on the device; the host does not wait for it."""
    can_pin = torch.accelerator.is_available()
    options = dict(dtype=tensor.dtype, device=HOST, pin_memory=can_pin)
    host = torch.empty_strided(tensor.shape, tensor.stride(), **options)  # type: ignore[arg-type]
    return host.copy_(tensor, non_blocking=can_pin)


def on_device(cached: CachedValue, device: torch.device) -> CachedValue:
    """`cached` with its tensors on the device. The copies are queued on the device; the host does not wait for them."""
    return cached._replace(tensors=tuple(tensor.to(device, non_blocking=True) for tensor in cached.tensors))
