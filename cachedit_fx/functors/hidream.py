"""The patch functor for HiDream, which routes tokens to experts and unpacks images without a graph break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachedit_fx.functors.functor import PatchFunctor


class HiDreamPatchFunctor(PatchFunctor):
    """Lets Dynamo capture the transformer of HiDream as one graph, for inference.

    Dynamo breaks the graph for two reasons. Every mixture-of-experts layer counts its tokens per expert in NumPy and
    slices by the counts; see `_moe_infer`. And `patchify` puts the size of the image into a tensor, which `unpatchify`
    reads to slice and reshape; with this functor, the size remains a pair of integers. Images that the caller has
    packed already, with `img_sizes` as a tensor, are unpacked by the original method, which still breaks the graph.
    """

    def prepare(self, transformer: nn.Module) -> None:
        self.replace_method(transformer, "patchify", _patchify)
        self.replace_method(transformer, "unpatchify", _unpatchify)
        for module in transformer.modules():
            if hasattr(module, "moe_infer"):
                self.replace_method(module, "moe_infer", _moe_infer)


def _patchify(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], Tensor]:
    """Replaces `patchify`. The size, which all images of a batch share, is returned once and as integers.

    Args:
        hidden_states: Latents, [B, C, H, W].

    Returns:
        Patches [B, N, p * p * C]; their mask [B, N], None for square images; [(H / p, W / p)]; ids [B, N, 3].
    """
    patches, masks, _, ids = type(self).patchify(self, hidden_states)
    height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
    return patches, masks, [(height, width)], ids


def _unpatchify(self: Any, x: Tensor, img_sizes: Any, is_training: bool) -> Tensor:
    """Replaces `unpatchify`. The whole batch is unpacked at once if all images have one size.

    Args:
        x: Patches, [B, N, p * p * C], those of the image first.
        img_sizes: Patches per column and per row, one pair for each image or one pair for all images.
        is_training: Whether the model is in training mode.

    Returns:
        Latents, [B, C, H, W], with the dtype of `x`.
    """
    if len(img_sizes) > 1 or (is_training and not self.config.force_inference_output):
        result: Tensor = type(self).unpatchify(self, x, img_sizes, is_training)
        return result
    (height, width), patch = img_sizes[0], self.config.patch_size
    x = x[:, : height * width].reshape(x.shape[0], height, width, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height * patch, width * patch)


@torch.no_grad()  # Like the method that it replaces.
def _moe_infer(self: Any, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
    """Replaces `moe_infer`: returns the weighted sum of the outputs of the k experts chosen for each token.

    The number of tokens per expert depends on data, so slices per expert have no size that is known in the graph. In
    bfloat16, the tokens are therefore sorted by expert, and one grouped matmul takes the ends of the groups as a
    tensor. It needs as many FLOPs as the original loop and does not wait for the device, but the weights of the experts
    are first copied into one tensor (read and written once per layer and call; at 4480 tokens of HiDream-I1, 0.4 GB
    next to 1 TFLOP). PyTorch 2.13 cannot trace the grouped matmul for other dtypes. For these, and if experts are more
    than plain linear layers (LoRA, quantized, offloaded), every expert processes every token, and a mask selects the
    results, which takes (number of experts) / k times the FLOPs. Both ways sum in the order of the experts, like the
    original method.

    Args:
        x: Tokens of all samples, [T, D].
        flat_expert_indices: The k experts of each token, int64 [T * k].
        flat_expert_weights: Their weights, [T * k, 1].

    Returns:
        [T, D], with the dtype that the experts return.
    """
    chosen, weights = flat_expert_indices.view(-1, self.num_activated_experts), flat_expert_weights
    if _fit_for_grouping(self.experts, x) and chosen.shape[1] < len(self.experts):
        return _grouped(self.experts, x, chosen, weights)
    return _masked(self.experts, x, chosen, weights.view_as(chosen))


def _fit_for_grouping(experts: nn.ModuleList, x: Tensor) -> bool:
    """Returns whether `_grouped` is equivalent to calling `experts` on `x`."""
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
    """Returns whether calling `module` runs the forward of its class, with no hook and no replaced method."""
    return "forward" not in module.__dict__ and not module._forward_pre_hooks and not module._forward_hooks


def _grouped(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Runs only the chosen experts of each token.

    Args:
        experts: All experts.
        x: Tokens, bfloat16 [T, D].
        chosen: The experts of each token, int64 [T, k].
        weights: Their weights, [T * k, 1].

    Returns:
        [T, D], bfloat16.
    """
    sorted_experts, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(len(experts), device=x.device), right=True, out_int32=True)
    w1, w2, w3 = (
        torch.stack([getattr(expert, name).weight for expert in experts]).transpose(1, 2) for name in ("w1", "w2", "w3")
    )
    tokens = x[order // chosen.shape[1]]
    hidden = F.silu(F.grouped_mm(tokens, w1, offs=ends)) * F.grouped_mm(tokens, w3, offs=ends)
    out = F.grouped_mm(hidden, w2, offs=ends)
    out = (out * weights[order]).to(out.dtype)
    # The rows of each token in ascending order, which is the order of the experts.
    rows = order.argsort().view_as(chosen).sort(dim=1).values
    return _sum(out[rows].unbind(1))


def _masked(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Runs all experts on all tokens, and selects the results of the chosen ones.

    Args:
        experts: All experts.
        x: Tokens, [T, D].
        chosen: The experts of each token, int64 [T, k].
        weights: Their weights, [T, k].

    Returns:
        [T, D], with the dtype that the experts return.
    """
    parts = []
    for index, expert in enumerate(experts):
        hits = chosen == index
        out = expert(x)
        out = (out * (weights * hits).sum(1, keepdim=True)).to(out.dtype)
        # Multiplying by 0 would turn infinities of experts that were not chosen into NaN.
        parts.append(out.masked_fill(~hits.any(1, keepdim=True), 0))
    return _sum(parts)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Returns the sum in the given order, rounded after each addition, as in the original method."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
