"""DiTs with the blocks, and the code around each block, that are common in practice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.researchers.dit import DEPTH, DIM, HEADS, TOKENS, Attention, DiT, DiTBlock, modulate

# In-place residuals.


class AugmentedBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x += gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x += gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class AugmentedDiT(DiT):
    block = AugmentedBlock


class InPlaceBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x.add_(gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa)))
        x = x.add_(gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))
        return x


class InPlaceDiT(DiT):
    block = InPlaceBlock


class HalfInPlaceBlock(DiTBlock):
    """The first addition creates a new tensor, the second writes into it."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x += gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class HalfInPlaceDiT(DiT):
    block = HalfInPlaceBlock


class LoopAddsDiT(DiT):
    """The blocks return only the branch; the loop adds it in place."""

    class block(DiTBlock):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x, c) - x

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x += block(x, c)
        return x


class LoopAddsAnewDiT(LoopAddsDiT):
    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x, c)
        return x


# Checkpoints.


class CheckpointedDiT(DiT):
    """Gradient checkpoints as in training code, in any mode."""

    use_reentrant = False

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=self.use_reentrant)
        return x


class ReentrantDiT(CheckpointedDiT):
    use_reentrant = True


class ClosureCheckpointedDiT(DiT):
    """The checkpoint of the published DiT, which wraps a closure over the block."""

    def ckpt_wrapper(self, module: nn.Module) -> Any:
        def ckpt_forward(*inputs: Tensor) -> Tensor:
            return module(*inputs)

        return ckpt_forward

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.ckpt_wrapper(block), x, c, use_reentrant=False)
        return x


class TrainingCheckpointedDiT(CheckpointedDiT):
    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        return super().run_blocks(x, c) if self.training and torch.is_grad_enabled() else DiT.run_blocks(self, x, c)


class CheckpointWrapper(nn.Module):
    """A wrapper module like that of FSDP, which contains the block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._checkpoint_wrapped_module, *args, use_reentrant=False, **kwargs)


class WrappedDiT(DiT):
    def make_blocks(self) -> None:
        self.blocks = nn.ModuleList(CheckpointWrapper(DiTBlock()) for _ in range(DEPTH))


class SegmentedDiT(DiT):
    """Two blocks per checkpoint, as in `checkpoint_sequential`."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(0, DEPTH, 2):
            x = checkpoint(self.run_segment, i, x, c, use_reentrant=False)
        return x

    def run_segment(self, start: int, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks[start : start + 2]:
            x = block(x, c)
        return x


# Hooks.


class ScaledByHooksDiT(DiT):
    """A forward hook changes the output of every block."""

    def make_blocks(self) -> None:
        super().make_blocks()
        for block in self.blocks:
            block.register_forward_hook(lambda _module, _args, output: output * 0.9)


class PreHooksDiT(DiT):
    """A pre-hook changes the inputs of every block, and another one its keyword arguments."""

    def make_blocks(self) -> None:
        super().make_blocks()
        for block in self.blocks:
            block.register_forward_pre_hook(lambda _module, args: (args[0] + 0.01, *args[1:]))
            block.register_forward_pre_hook(lambda _module, args, kwargs: (args, kwargs), with_kwargs=True)


class RecordingDiT(DiT):
    """Hooks record the output of every block as features."""

    def make_blocks(self) -> None:
        super().make_blocks()
        self.features: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            block.register_forward_hook(self.note(i))

    def note(self, i: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.features[i] = output.detach()

        return hook


# The content of a block.


class AutocastBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
            attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        with torch.autocast("cpu", enabled=False):
            x = x + gate_msa.unsqueeze(1).float() * attended.float()
            x = x + gate_mlp.unsqueeze(1).float() * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class AutocastDiT(DiT):
    block = AutocastBlock


class AutocastAroundDiT(DiT):
    """One context around the whole loop."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = super().run_blocks(x, c)
        return x.float()


class GatedActivation(torch.autograd.Function):
    """A custom backward, as in training kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return grad * gate * (1 + 1.702 * x * (1 - gate))


class FunctionBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + GatedActivation.apply(super().forward(x, c))


class FunctionDiT(DiT):
    block = FunctionBlock


@torch.library.custom_op("researchers::rms_norm", mutates_args=())
def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@rms_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


class CustomOpBlock(DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.mlp(rms_norm(super().forward(x, c), 1e-6))


class CustomOpDiT(DiT):
    block = CustomOpBlock


class WeightNormDiT(DiT):
    """Weights that are computed on every access."""

    def make_blocks(self) -> None:
        super().make_blocks()
        for block in self.blocks:
            weight_norm(block.attn.proj)
            spectral_norm(block.mlp.fc2)


class SpecialEnds(DiTBlock):
    """The first and the last block have no modulation."""

    def __init__(self) -> None:
        super().__init__()
        del self.adaLN_modulation

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SpecialEndsDiT(DiT):
    def make_blocks(self) -> None:
        inner = (DiTBlock() for _ in range(DEPTH - 2))
        self.blocks = nn.ModuleList([SpecialEnds(), *inner, SpecialEnds()])


class WindowAttention(Attention):
    """Attention within rows of tokens, with scaled_dot_product_attention."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        side = int(n**0.5)
        qkv = self.qkv(x).view(b, side, side, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.permute(0, 1, 3, 2, 4).reshape(b, n, d))


class LocalBlock(DiTBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attn = WindowAttention(DIM, HEADS)


class LocalGlobalDiT(DiT):
    """Alternating local and global attention, as different classes."""

    def make_blocks(self) -> None:
        self.blocks = nn.ModuleList(DiTBlock() if i % 2 else LocalBlock() for i in range(DEPTH))


class RegisterDiT(DiT):
    """Learned register tokens before the other tokens, which are removed after the blocks."""

    def make_blocks(self) -> None:
        super().make_blocks()
        self.registers = nn.Parameter(torch.randn(1, 3, DIM) * 0.02)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)
        x = super().run_blocks(x, c)
        return x[:, -TOKENS:]


class CompiledBlocksDiT(DiT):
    """Every block is already compiled by the user."""

    def make_blocks(self) -> None:
        super().make_blocks()
        for block in self.blocks:
            block.compile(backend="eager")


class WrappedByCompileDiT(DiT):
    def make_blocks(self) -> None:
        self.blocks = nn.ModuleList(torch.compile(DiTBlock(), backend="eager") for _ in range(DEPTH))


class DisabledBlock(DiTBlock):
    @torch.compiler.disable
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c)


class DisabledDiT(DiT):
    block = DisabledBlock


class PrintingDiT(DiT):
    """Reads a number from a tensor in the middle of its loop."""

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
            if x.abs().max().item() > 1e4:
                x = x.clamp(-1e4, 1e4)
        return x
