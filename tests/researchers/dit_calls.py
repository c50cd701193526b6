"""DiTs that do not take positional tensors or do not return a single tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from tests.researchers.dit import DiT, DiTBlock


class TupleDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the prediction and a variance, as with learned sigmas."""
        out = super().forward(x, t, y)
        return out, out.square().mean(dim=1)


class DictDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sample": super().forward(x, t, y), "timestep": t}


@dataclass
class Prediction:
    velocity: Tensor
    logvar: Tensor | None = None


class DataclassDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Prediction:
        return Prediction(velocity=super().forward(x, t, y))


@dataclass
class DiTOutput(BaseOutput):
    sample: Tensor


class ModelOutputDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_dict: bool = True) -> DiTOutput | tuple[Tensor]:
        sample = super().forward(x, t, y)
        return DiTOutput(sample=sample) if return_dict else (sample,)


class FeaturesDiT(DiT):
    """Also returns the output of each block, as for a representation loss."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        features = []
        for block in self.blocks:
            x = block(x, c)
            features.append(x)
        return self.unpatchify(self.final_layer(x, c)), features


def in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of a model's forward that casts its arguments."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        return forward(self, *args, **kwargs)

    return wrapper


class DecoratedDiT(DiT):
    @in_float32
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)


class InferenceModeDiT(DiT):
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)


class KeywordsDiT(DiT):
    """Takes only keyword arguments, including `**kwargs` that the model does not know."""

    def forward(self, *, sample: Tensor, sigma: Tensor, class_labels: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(sample, sigma, class_labels)


class VariadicDiT(DiT):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return super().forward(*args, **kwargs)


class BatchDiT(DiT):
    """All inputs are in one dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["x"], batch["t"], batch["y"])


class GuidedDiT(DiT):
    """Guidance inside the model, as in DiT's `forward_with_cfg`: both branches are one batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float = 4.0) -> Tensor:
        both = torch.cat([x, x], dim=0)
        null = torch.full_like(y, self.y_embedder.embedding_table.num_embeddings - 1)
        out = super().forward(both, torch.cat([t, t]), torch.cat([y, null]))
        cond, uncond = out.chunk(2, dim=0)
        return uncond + cfg_scale * (cond - uncond)


class ScalarTimeDiT(DiT):
    """t is a 0-dimensional tensor for the whole batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t.expand(x.shape[0]), y)


class NumberTimeDiT(DiT):
    """t is a Python float."""

    def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        return super().forward(x, torch.full((x.shape[0],), t), y)


class AveragedDiT(nn.Module):
    """Calls a second model, whose weights are a moving average of those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DiT()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.averages = nn.ParameterList(0.9 * p.detach() for p in self.model.parameters())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.averages, strict=True))
        return torch.func.functional_call(self.model, weights, (x, t, y))

    def block_calls(self) -> list[nn.Module]:
        return self.model.block_calls()


class UnconditionalDiT(DiT):
    """The only inputs are the latents and the time: no label, no text."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t, torch.zeros(x.shape[0], dtype=torch.long))


class PositionalBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor, /) -> Tensor:
        return super().forward(x, c)


class PositionalDiT(DiT):
    block = PositionalBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor:
        return super().forward(x, t, y)


class KeywordBlock(DiTBlock):
    def forward(self, *, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c)


class KeywordBlocksDiT(DiT):
    block = KeywordBlock

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x, c=c)
        return x
