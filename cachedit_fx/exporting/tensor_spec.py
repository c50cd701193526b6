"""The description of one input, output or state tensor of an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor by name, shape, dtype and device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> TensorSpec:
        return TensorSpec(name, tuple(tensor.shape), tensor.dtype, tensor.device)

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @property
    def mapping(self) -> dict[str, Any]:
        """The description for a JSON file: `{"name": "probe", "shape": [2, 36, 32], "dtype": "float32"}`."""
        return {"name": self.name, "shape": [*self.shape], "dtype": str(self.dtype).removeprefix("torch.")}
