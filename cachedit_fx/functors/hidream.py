"""HiDream: experts are chosen, and images unpacked, without leaving the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachedit_fx.functors.functor import PatchFunctor


class HiDreamPatchFunctor(PatchFunctor):
    """Makes HiDream's transformer one graph, in inference.

    Dynamo stops at two things. Every mixture-of-experts layer counts its tokens per expert in NumPy and slices by the
    counts; see `_moe_infer`. And `patchify` puts the size of the image into a tensor that `unpatchify` reads back to
    slice and reshape by; here it stays a pair of integers. Images that the caller has packed already, with `img_sizes`
    as a tensor, are still unpacked the model's own way, and still end the graph.
    """

    def prepare(self, transformer: nn.Module) -> None:
        self.replace_method(transformer, "patchify", _patchify)
        self.replace_method(transformer, "unpatchify", _unpatchify)
        for module in transformer.modules():
            if hasattr(module, "moe_infer"):
                self.replace_method(module, "moe_infer", _moe_infer)


def _patchify(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], Tensor]:
    """As the model's own, with the one size that all images of a batch have, once, as integers.

    Args:
        hidden_states: Latents, [B, C, H, W].

    Returns:
        Patches [B, N, p * p * C]; their mask [B, N], None for square images; [(H / p, W / p)]; ids [B, N, 3].
    """
    patches, masks, _, ids = type(self).patchify(self, hidden_states)
    height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
    return patches, masks, [(height, width)], ids


def _unpatchify(self: Any, x: Tensor, img_sizes: Any, is_training: bool) -> Tensor:
    """As the model's own, the whole batch at once where one size holds for all of it.

    Args:
        x: Patches, [B, N, p * p * C], those of the image first.
        img_sizes: Patches per column and row of each image, or of all of them.
        is_training: Whether the model is in training mode.

    Returns:
        [B, C, H, W], dtype of `x`.
    """
    if len(img_sizes) > 1 or (is_training and not self.config.force_inference_output):
        result: Tensor = type(self).unpatchify(self, x, img_sizes, is_training)
        return result
    (height, width), patch = img_sizes[0], self.config.patch_size
    x = x[:, : height * width].reshape(x.shape[0], height, width, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height * patch, width * patch)


@torch.no_grad()  # As the method that it replaces.
def _moe_infer(self: Any, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
    """The weighted sum, over the k experts chosen for a token, of what each makes of it.

    How many tokens an expert gets is data, so slices per expert have no size that a graph could know. In bfloat16 the
    tokens are sorted by expert instead, and one grouped matmul takes the ends of the groups as a tensor: as many FLOPs
    as the model's own loop, without its wait for the device, but the experts' weights are copied into one tensor first
    (read and written once per layer and call; at 4480 tokens of HiDream-I1, 0.4 GB next to 1 TFLOP). In other dtypes,
    for which PyTorch (2.13) cannot trace that matmul, and where experts are more than plain linear layers (LoRA,
    quantised, offloaded), every expert takes every token, and a mask picks: number of experts / k times the FLOPs. Both
    add up in the order of the experts, as the model does.

    Args:
        x: Tokens of all samples, [T, D].
        flat_expert_indices: The k experts of each token, int64 [T * k].
        flat_expert_weights: Their weights, [T * k, 1].

    Returns:
        [T, D], in the dtype that the experts return.
    """
    chosen, weights = flat_expert_indices.view(-1, self.num_activated_experts), flat_expert_weights
    if _fit_for_grouping(self.experts, x) and chosen.shape[1] < len(self.experts):
        return _grouped(self.experts, x, chosen, weights)
    return _masked(self.experts, x, chosen, weights.view_as(chosen))


def _fit_for_grouping(experts: nn.ModuleList, x: Tensor) -> bool:
    """Whether `_grouped` can do what calling `experts` on `x` does."""
    if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return False
    if x.device.type != "cpu" and (x.device.type != "cuda" or torch.cuda.get_device_properties(x.device).major < 8):
        return False
    linears = [linear for expert in experts for linear in (expert.w1, expert.w2, expert.w3)]
    return all(_is_bare(module) for module in (*experts, *linears)) and all(
        type(linear) is nn.Linear
        and getattr(linear, "bias", None) is None
        and type(linear.weight) is nn.Parameter
        and (linear.weight.dtype, linear.weight.device) == (x.dtype, x.device)
        and all(size % 8 == 0 for size in linear.weight.shape)  # Rows are multiples of 16 bytes.
        for linear in linears
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward alone: neither a hook nor another method in its place."""
    return "forward" not in module.__dict__ and not module._forward_pre_hooks and not module._forward_hooks


def _grouped(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token through its own experts. `chosen` is [T, k], `weights` [T * k, 1]."""
    sorted_experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(len(experts), device=x.device), right=True, out_int32=True)
    w1, w2, w3 = (
        torch.stack([getattr(expert, name).weight for expert in experts]).transpose(1, 2) for name in ("w1", "w2", "w3")
    )
    tokens = x[order // chosen.shape[1]]
    hidden = F.silu(F.grouped_mm(tokens, w1, offs=ends)) * F.grouped_mm(tokens, w3, offs=ends)
    out = F.grouped_mm(hidden, w2, offs=ends)
    out = (out * weights[order]).to(out.dtype)
    # Where a token's rows are; ascending, thus by expert.
    rows = order.argsort().view_as(chosen).sort(dim=1).values
    return _sum(out[rows].unbind(1))


def _masked(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token through all experts. `chosen` and `weights` are [T, k]."""
    parts = []
    for index, expert in enumerate(experts):
        hits = chosen == index
        out = expert(x)
        out = (out * (weights * hits).sum(1, keepdim=True)).to(out.dtype)
        # A weight of 0 would let the infinities of experts that were not chosen through.
        parts.append(out.masked_fill(~hits.any(1, keepdim=True), 0))
    return _sum(parts)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum in the order given, rounded after each addition as the model's own is."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
